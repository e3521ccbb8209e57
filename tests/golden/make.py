"""Make the golden checkpoint: ``python -m tests.golden.make FOLDER``; README.md says when."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import panfoma_hf
from panfoma_hf import PanFoMaConfig, PanFoMaForCellClassification, PanFoMaTokenizer
from panfoma_hf.evaluation.public_tasks import baron_pancreas
from tests.conftest import spread_out


NUM_CELLS, NUM_GENES = 8, 300
# Genes are read in the order of their scores: where two are as good as equal, rounding decides, and outputs jump.
SMALLEST_GAP = 2e-5
LABELS = ["acinar", "beta", "delta", "ductal"]


def make(folder: Path) -> None:
    """Write checkpoint, cells and outputs."""
    everything = baron_pancreas()
    cells = everything[:: everything.n_obs // NUM_CELLS][:NUM_CELLS].copy()
    is_expressed = np.asarray((cells.X > 0).sum(0)).ravel()
    cells = cells[:, np.sort(np.argsort(-is_expressed, kind="stable")[:NUM_GENES])].copy()
    cells.obs = cells.obs[["cell_type"]].astype(str)
    checkpoint = folder / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = PanFoMaTokenizer(genes_file=str(_part_of_genes(cells.var_names, folder)), model_max_length=NUM_GENES)
    batch = tokenizer(cells, padding=True, return_tensors="pt")
    for seed in range(1000):
        torch.manual_seed(seed)
        model = spread_out(PanFoMaForCellClassification(_config(len(tokenizer))))
        with torch.no_grad():
            model.gene_logits.weight.normal_(std=0.3)
            body, logits = model.panfoma(**batch), model(**batch).logits
        if _smallest_gap(body.gene_scores, batch["attention_mask"]) > SMALLEST_GAP:
            break
    else:
        raise SystemExit(f"Scores must be {SMALLEST_GAP} apart, got none of 1,000 models that keeps to it.")
    panfoma_hf.save_checkpoint(checkpoint, model, tokenizer)
    for path in checkpoint.iterdir():
        if path.suffix in {".py", ".md"}:  # it is the package's code that must load it
            path.unlink()
    cells.write_h5ad(folder / "cells.h5ad", compression="gzip")
    save_file(
        {
            **{name: tensor.contiguous() for name, tensor in batch.items()},
            "logits": logits,
            **{name: body[name].contiguous() for name in ("pooler_output", "last_hidden_state", "gene_scores")},
        },
        folder / "expected.safetensors",
    )
    panfoma_hf.annotate(cells, checkpoint, progress=False)
    names = {
        "names": cells.obs["panfoma_cell_type"].astype(str).tolist(),
        "scores": cells.obs["panfoma_cell_type_score"].astype(float).round(6).tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    (folder / "genes.tsv.gz").unlink()


def _config(vocab_size: int) -> PanFoMaConfig:
    return PanFoMaConfig.from_size(
        "tiny",
        vocab_size=vocab_size,
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
        label_name="cell_type",
        problem_type="single_label_classification",
        use_gene_logits=True,
        calibration={"cell_type": {"temperature": 1.5, "unassigned_threshold": 0.55, "is_certified": True}},
        hidden_dropout_prob=0.0,
    )


def _smallest_gap(scores: torch.Tensor, mask: torch.Tensor) -> float:
    """Between two genes of a cell, beside the spread of the cell's scores."""
    gaps = []
    for of_cell, is_gene in zip(scores, mask.bool(), strict=True):
        ordered = of_cell[is_gene].double().sort().values
        gaps.append((ordered.diff().min() / ordered.std()).item())
    return min(gaps)


def _part_of_genes(names, folder: Path) -> Path:
    """The rows of the packaged table that these names are found in, numbered anew."""
    whole = PanFoMaTokenizer()
    ids = whole.resolve_genes(names).token_ids
    lines = gzip.decompress(Path(panfoma_hf.tokenization.__file__).with_name("genes.tsv.gz").read_bytes()).decode()
    source, header, *rows = lines.splitlines()
    kept = [row.split("\t", 1) for row in rows]
    kept = [rest for token_id, rest in kept if token_id and int(token_id) in set(ids[ids >= 0].tolist())]
    text = "\n".join([source, header, *(f"{number}\t{rest}" for number, rest in enumerate(kept, start=1))]) + "\n"
    path = folder / "genes.tsv.gz"
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
