"""What a fine-tune says of itself: a table in the terminal, a file of figures, and the card of its checkpoint."""

import json
from collections.abc import Iterator

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling import PanFoMaConfig
from ..version import __version__


NAMES = {
    "panfoma": "PanFoMa",
    "majority": "majority class",
    "hvg_logistic_regression": "logistic regression, variable genes",
}
METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}


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


def model_card(report: dict, config: PanFoMaConfig) -> str:
    """The card of a fine-tuned checkpoint, with the scores of the model and of simple methods as card data.

    Scores follow `huggingface_hub.EvalResult`; those of a simple method name it in the metric.
    """
    results = [
        EvalResult(
            task_type="text-classification",  # the Hub's own list has no task for cells
            task_name=name,
            dataset_type="validation cells",
            dataset_name=f"{task['validation_cells']:,} validation cells{_held_out(report)}",
            metric_type="f1" if metric == "macro_f1" else metric,
            metric_name=f"{METRICS[metric]}, {NAMES.get(method, method)}",
            metric_value=round(scores[metric], 4),
            metric_config="macro" if metric == "macro_f1" else None,
        )
        for name, task in report["tasks"].items()
        for method, scores in _ordered(task.get("scores", {}))
        for metric in METRICS
    ]
    title = "PanFoMa fine-tuned on " + ", ".join(report["tasks"])
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        tags=["biology", "genomics", "single-cell", "panfoma", "mamba"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    body = [
        f"# {title}",
        "",
        f"Started from {report['started_from']}; {report['mode']} fine-tuning, seed {report['seed']}.",
        "",
    ]
    body += ["```", score_table(report), "```", ""]
    split = report["split"]
    if report["refitted"]:
        body += ["Scores and threshold are of the model before it learned from the validation cells, too.", ""]
    if split["groups"]:
        body += [f"Validation cells are those of `{split['groups']}` {', '.join(split['held_out'])}.", ""]
    body += [f"- {message}" for message in split["leakage"]]
    body += [f"- {name}: {warning}" for name, task in report["tasks"].items() for warning in task["warnings"]]
    body += ["", "Labels and their training cells:", ""]
    body += [
        f"- {name}: " + ", ".join(f"{label} ({count:,})" for label, count in counts.items())
        for name, counts in report["train_counts"].items()
    ]
    body += ["", "Every figure is in `finetuning.json`. Not for clinical use.", ""]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(body)))
