"""Model cards: what is known of a checkpoint, in the Hub's metadata and in words, by one template."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..modeling import PanFoMaConfig
from ..tokenization import PanFoMaTokenizer
from .folder import ADAPTER_CONFIG, CONFIG, base_model, read_settings


# In the package, not beside the facts of released checkpoints, as every fine-tune writes its card by it.
TEMPLATE = Path(__file__).with_name("template.md")
TAGS = ["biology", "genomics", "single-cell", "pan-cancer", "panfoma", "mamba"]
# The Hub has no task for cells: each is a row of a table, which is named or embedded.
CLASSIFICATION, EMBEDDING = "tabular-classification", "feature-extraction"
# By a metric's name: type and configuration among the Hub's metrics, and what to call it.
METRICS = {
    "accuracy": ("accuracy", None, "accuracy"),
    "macro_f1": ("f1", "macro", "macro-F1"),
    "cross_entropy": ("cross_entropy", None, "cross-entropy"),
}
LIMITS = (
    "Not for clinical use: it is not a medical device, and no decision about a patient may rest on it.",
    "It reads human genes, those of its vocabulary; other species are refused.",
    "Cells unlike those that it learned from get a name or an embedding all the same: other tissues, protocols and "
    "diseases are to be checked on labelled cells first.",
)


@dataclass(frozen=True)
class Score:
    """One figure of a card.

    Parameters
    ----------
    task
        What was asked for, such as the name of a label.
    cells
        Which cells it was measured on.
    method
        What it is of: PanFoMa, or something to compare it with.
    metric
        A key of `METRICS`.
    value
        The figure.
    low, high
        Bounds of its 95 % interval, if there is one.
    """

    task: str
    cells: str
    method: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass
class Facts:
    """What a card says of a checkpoint, besides what its tokenizer knows.

    Parameters
    ----------
    title, summary
        Its name, and what it is in a few sentences.
    data
        What it learned from, and how: rows of a table, name to text.
    labels
        Of a classifier: training cells by label, or None where that is not known, by task.
    scores
        Figures of the model and of what it is compared with.
    notes
        What must be said of the scores.
    limits
        Besides those of every checkpoint.
    licence
        As the Hub abbreviates it.
    base_model, datasets
        Names on the Hub of what it started from and learned from.
    """

    title: str
    summary: str
    data: dict[str, str] = field(default_factory=dict)
    labels: dict[str, dict[str, int | None]] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    licence: str = "apache-2.0"
    base_model: str | None = None
    datasets: list[str] = field(default_factory=list)


def model_card(facts: Facts, tokenizer: PanFoMaTokenizer, *, is_classifier: bool, is_adapter: bool = False) -> str:
    """The card of a checkpoint in Markdown, with the metadata that the Hub reads.

    Scores become a ``model-index``; those of another method name it in the metric, and intervals are arguments of it.

    Parameters
    ----------
    facts
        What is known of it.
    tokenizer
        Its tokenizer, for bins, genes and vocabulary.
    is_classifier
        Whether it names cells, or else embeds them.
    is_adapter
        Whether it is PEFT's weights alone.
    """
    data = ModelCardData(
        license=facts.licence,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=CLASSIFICATION if is_classifier else EMBEDDING,
        tags=TAGS,
        base_model=facts.base_model,
        datasets=facts.datasets or None,
        model_name=facts.title if facts.scores else None,
        eval_results=[_result(score, is_classifier) for score in facts.scores] or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=facts.title,
        summary=facts.summary.strip(),
        rows=[(name, _cell(text)) for name, text in facts.data.items()],
        labels=[(task, _listed(counts)) for task, counts in facts.labels.items()],
        has_counts=any(count is not None for counts in facts.labels.values() for count in counts.values()),
        scores=_score_table(facts.scores),
        has_intervals=any(score.low is not None for score in facts.scores),
        notes=facts.notes,
        limits=[*LIMITS, *facts.limits],
        is_classifier=is_classifier,
        is_adapter=is_adapter,
        auto_class="AutoModelForSequenceClassification" if is_classifier else "AutoModel",
        bins=tokenizer.num_expression_bins,
        max_genes=tokenizer.model_max_length,
        gene_set=len(tokenizer.gene_set or ()),
        vocabulary=tokenizer.gene_table_source,
        genes=tokenizer.vocab_size - 1,
        sha256=tokenizer.genes_sha256,
    )
    return str(card).rstrip() + "\n"


def plain_card(folder: Path) -> str:
    """The card of a checkpoint that nothing is known of but what its own files say."""
    settings = read_settings(folder)
    labels, is_classifier = {}, False
    if CONFIG in settings:
        config = PanFoMaConfig.from_pretrained(folder)
        is_classifier = "PanFoMaForCellClassification" in (config.architectures or ())
        if is_classifier:
            labels = {task: dict.fromkeys(names) for task, names in config.tasks.items()}
    elif mapping := settings[ADAPTER_CONFIG].get("auto_mapping"):
        is_classifier = mapping["base_model_class"] == "PanFoMaForCellClassification"
    base = base_model(settings)
    facts = Facts(
        title=("A PEFT adapter of PanFoMa" if base else "PanFoMa") + (" that names cells" if is_classifier else ""),
        summary="Nothing was said of the cells that it learned from, nor of how good it is, when it was published.",
        labels=labels,
        base_model=base,
    )
    tokenizer = PanFoMaTokenizer.from_pretrained(folder)
    return model_card(facts, tokenizer, is_classifier=is_classifier, is_adapter=bool(base))


def released_card(facts: str | Path, checkpoint: str | Path) -> str:
    """The card of a released, pretrained checkpoint.

    Parameters
    ----------
    facts
        YAML file with the parameters of `Facts`; ``scores`` is a list of parameters of `Score`, by methods.
    checkpoint
        Folder of the checkpoint.
    """
    content = yaml.safe_load(Path(facts).read_text(encoding="utf-8"))
    scores = [Score(**row) for row in content.pop("scores", ())]
    return model_card(
        Facts(**content, scores=scores), PanFoMaTokenizer.from_pretrained(checkpoint), is_classifier=False
    )


def _result(score: Score, is_classifier: bool) -> EvalResult:
    kind, config, name = METRICS[score.metric]
    interval = None
    if score.low is not None:
        interval = {"confidence_interval": [round(score.low, 4), round(score.high, 4)], "level": 0.95}
    return EvalResult(
        task_type=CLASSIFICATION if is_classifier else EMBEDDING,
        task_name=score.task,
        # Not on the Hub. Results of one type and configuration are taken for one task on one set of cells.
        dataset_type="cells",
        dataset_name=score.cells,
        dataset_config=f"{score.task}, {score.cells}",
        metric_type=kind,
        metric_name=f"{name}, {score.method}",
        metric_value=round(score.value, 4),
        metric_config=config,
        metric_args=interval,
    )


def _score_table(scores: list[Score]) -> list[list[str]]:
    """Rows of a table, the first its head: a row for each method on the same cells, a column for each metric."""
    metrics = list(dict.fromkeys(score.metric for score in scores))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for score in scores:
        text = f"{score.value:.3f}"
        if score.low is not None:
            text += f" ({score.low:.3f} to {score.high:.3f})"
        rows.setdefault((score.task, score.cells, score.method), {})[score.metric] = text
    table = [["", "cells", "method", *(METRICS[metric][2] for metric in metrics)]]
    for names, figures in rows.items():
        table.append([*map(_cell, names), *(figures.get(metric, "") for metric in metrics)])
    return table if rows else []


def _listed(counts: Mapping[str, int | None]) -> str:
    """Labels, with their cells where these are known."""
    return ", ".join(name if count is None else f"{name} ({count:,})" for name, count in counts.items())


def _cell(text: str) -> str:
    """Text as a part of a table in Markdown."""
    return " ".join(text.split()).replace("|", "\\|")
