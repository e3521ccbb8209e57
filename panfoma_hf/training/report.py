"""What a fine-tune says of itself: a table in the terminal, a file of figures, and the card of its checkpoint."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers.utils import logging

from ..hub import HUB_NAME, Facts, Score, model_card
from ..tokenization import PanFoMaTokenizer
from ..version import __version__


NAMES = {
    "panfoma": "PanFoMa",
    "majority": "majority class",
    "hvg_logistic_regression": "logistic regression, variable genes",
}
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what is said at the level of warnings, by Transformers and by this package."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def score_table(report: dict) -> str:
    """Scores of each task beside simple methods on the same cells, as text of fixed width."""
    lines = [f"Learned from {report['train_cells']:,} cells, {report['mode']}, from {report['started_from']}."]
    for name, task in report["tasks"].items():
        if "scores" not in task:
            lines.append(f"{name}: not scored, as there are no validation cells.")
            continue
        lines.append(
            f"{name}, {task['validation_cells']:,} validation cells{_held_out(report)}".ljust(58) + "accuracy  macro-F1"
        )
        for method, scores in _ordered(task["scores"]):
            lines.append(f"  {NAMES.get(method, method):<56}{scores['accuracy']:>8.3f}{scores['macro_f1']:>10.3f}")
        for method, reason in task.get("not_scored", {}).items():
            lines.append(f"  {NAMES.get(method, method)}: not scored. {reason}")
        if calibration := task["calibration"]:
            lines.append("  " + _threshold_sentence(calibration))
    return "\n".join(lines)


def _ordered(scores: dict) -> Iterator[tuple[str, dict]]:
    """Simple methods first, PanFoMa last."""
    return iter(sorted(scores.items(), key=lambda item: item[0] == "panfoma"))


def _held_out(report: dict) -> str:
    split = report["split"]
    if not split["held_out"]:
        return ""
    shown = ", ".join(split["held_out"][:3]) + (", ..." if len(split["held_out"]) > 3 else "")
    return f" ({split['groups']} {shown})" if split["groups"] else f" ({shown})"


def _threshold_sentence(calibration: dict) -> str:
    threshold, error = calibration["unassigned_threshold"], calibration["unassigned_max_error"]
    if not calibration["is_certified"]:
        return (
            f"Too few validation cells, or too many errors, to vouch for {error:.0%}: every cell is named, with its "
            "score."
        )
    return (
        f"Cells with a score below {threshold:.2f} are called Unassigned: {calibration['assigned_share']:.0%} are "
        f"named, {calibration['unassigned_error']:.1%} of them wrong on the validation cells ({error:.0%} allowed)."
    )


def report_file(report: dict) -> str:
    """The report as JSON."""
    return json.dumps(report | {"panfoma_hf_version": __version__}, indent=2) + "\n"


def finetuning_card(report: dict, tokenizer: PanFoMaTokenizer) -> str:
    """The card of a fine-tuned checkpoint: what it learned, with the scores of the model and of simple methods."""
    facts = Facts(
        title="PanFoMa fine-tuned on " + ", ".join(report["tasks"]),
        summary=f"Names the {_and(report['tasks'])} of human cells by their expressed genes. Every figure of its "
        "fine-tuning is in `finetuning.json`.",
        data=_data(report),
        labels=report["train_counts"],
        scores=_scores(report),
        notes=_notes(report),
        base_model=report["started_from"] if HUB_NAME.fullmatch(report["started_from"]) else None,
    )
    return model_card(facts, tokenizer, is_classifier=True)


def _data(report: dict) -> dict[str, str]:
    """What it learned from, how that was split, and how it learned."""
    split = report["split"]
    by = f"`{split['groups']}`" if split["groups"] else "cell"
    data = {
        "started from": report["started_from"],
        "cells": report["cells"],
        "training cells": f"{report['train_cells']:,}",
        "validation cells": f"{report['validation_cells']:,}",
        "split": f"by {by}" if report["validation_cells"] else "none",
        "how": f"{report['mode']} fine-tuning, seed {report['seed']}, panfoma-hf {__version__}",
    }
    if split["groups"]:
        data[f"{by} in training"] = f"{report['train_groups']:,}"
        data[f"{by} in validation"] = f"{len(split['held_out']):,}"
    elif split["held_out"]:
        data["split"] = f"validation cells of their own: {', '.join(split['held_out'])}"
    return data


def _scores(report: dict) -> list[Score]:
    found = []
    for name, task in report["tasks"].items():
        cells = f"{task.get('validation_cells', 0):,} validation cells{_held_out(report)}"
        for method, scores in _ordered(task.get("scores", {})):
            for metric in METRICS:
                bounds = task["intervals"].get(method, {}).get(metric, (None, None))
                found.append(Score(name, cells, NAMES.get(method, method), metric, scores[metric], *bounds))
    return found


def _notes(report: dict) -> list[str]:
    """What must be said of the scores: where they are missing, what they are of, where they flatter, and thresholds."""
    split, notes = report["split"], []
    for name, task in report["tasks"].items():
        if "scores" not in task:
            notes.append(f"{name}: not scored, as there are no validation cells.")
            continue
        notes += [f"{name}: {warning}" for warning in task["warnings"]]
        for method, reason in task.get("not_scored", {}).items():
            notes.append(f"{name}, {NAMES.get(method, method)}: not scored. {reason}")
        if task["intervals"]:
            drawn = f"`{task['intervals_over']}`" if task["intervals_over"] else "cells"
            notes.append(f"{name}: intervals are of {drawn} drawn anew, with the same model.")
        if task["calibration"]:
            notes.append(f"{name}: {_threshold_sentence(task['calibration'])}")
    if split["groups"]:
        notes.append(f"Validation cells are those of `{split['groups']}` {', '.join(split['held_out'])}.")
    if report["refitted"]:
        notes.append("Scores and threshold are of the model before it learned from the validation cells, too.")
    return notes + split["leakage"]


def _and(names: Iterable[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
