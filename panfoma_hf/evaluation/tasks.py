"""Tasks: labelled cells, how they are split, and what is measured; one function runs any of them with any method."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from ..data.cells import read_cells
from ..data.splits import Leakage, find_groups, find_leakage, split_cells
from .baselines import Predictions
from .calibration import expected_calibration_error
from .integration import integration_metrics
from .methods import classifier_of, embedder_of
from .metrics import bootstrap_interval, classification_metrics


ANNOTATION, INTEGRATION = "annotation", "integration"
CLASSIFICATION_METRICS = ("accuracy", "macro_f1")
INTEGRATION_METRICS = ("avg_bio", "avg_batch", "nmi", "ari", "asw_label", "asw_batch", "graph_connectivity")
SEEDS = (0, 1, 2)
# Labels of fewer cells are left out of a task: both sides of a split need some.
FEWEST_CELLS = 5


@dataclass(frozen=True, eq=False)
class Task:
    """Labelled cells, a split and metrics.

    Parameters
    ----------
    name
        What to call it.
    cells
        An AnnData; a file; or a function of the folder with data that gives an AnnData.
    label
        Column of ``obs`` with the names to find.
    kind
        "annotation", where held-out cells are named; or "integration", where an embedding is scored.
    groups
        Column of ``obs`` whose values are not divided between the sides; None splits by cell; "auto" as in
        `panfoma_hf.finetune`.
    held_out
        Values of ``groups`` that are the test cells, for a fixed split such as a reference study and a query study;
        empty draws them by the seed.
    batch
        Column of ``obs`` with the batches, for integration.
    donor
        Column of ``obs`` by which intervals are drawn and donors named; None takes ``groups``.
    metrics
        Those that are reported with intervals; empty takes those of the kind.
    test_size
        Share of cells to hold out.
    most_cells
        Cells that are drawn where there are more; None takes all.
    note
        What must be said wherever a score is shown.

    Raises
    ------
    ValueError
        If there is no such kind or metric, or a column that the task needs is not named.
    """

    name: str
    cells: ad.AnnData | str | Path | Callable[[Path | None], ad.AnnData]
    label: str
    kind: str = ANNOTATION
    groups: str | None = None
    held_out: tuple[str, ...] = ()
    batch: str | None = None
    donor: str | None = None
    metrics: tuple[str, ...] = ()
    test_size: float = 0.3
    most_cells: int | None = None
    note: str = ""

    def __post_init__(self):
        known = {ANNOTATION: CLASSIFICATION_METRICS, INTEGRATION: INTEGRATION_METRICS}
        if self.kind not in known:
            raise ValueError(f"A task's kind is one of {', '.join(known)}, got {self.kind!r}. Use one of these.")
        object.__setattr__(self, "metrics", tuple(self.metrics) or known[self.kind])
        if not set(self.metrics) <= set(known[self.kind]):
            raise ValueError(
                f"Metrics of {self.kind} are {', '.join(known[self.kind])}, got {', '.join(self.metrics)}. Use these."
            )
        if self.kind == INTEGRATION and self.batch is None:
            raise ValueError("Integration mixes batches, got no column of them. Name one with `batch`.")
        if self.held_out and self.groups in (None, "auto"):
            raise ValueError(
                f"Values are held out of a column, got {', '.join(self.held_out)} and `groups` {self.groups!r}. Name "
                "the column with `groups`."
            )

    def load(self, data: str | Path | None = None) -> ad.AnnData:
        """A copy of the labelled cells of labels that have at least five; of these, some where there are too many.

        Labels that have fewer than five cells after the draw are left out, too.

        Raises
        ------
        ValueError
            If there is no such column, a cell has no batch, donor or group, or fewer than two labels are left.
        """
        if isinstance(self.cells, ad.AnnData):
            cells = self.cells
        elif callable(self.cells):
            cells = self.cells(None if data is None else Path(data))
        else:
            path = Path(self.cells)
            cells = read_cells(path if path.is_absolute() or data is None else Path(data, path))
        for column in (self.label, self.batch, self.donor, None if self.groups == "auto" else self.groups):
            if column is not None and column not in cells.obs:
                raise ValueError(
                    f"A task's columns are in obs, got {column!r} for {self.name}, which has {', '.join(cells.obs)}. "
                    "Name one of these."
                )
            missing = 0 if column in (None, self.label) else int(cells.obs[column].isna().sum())
            if missing:  # as text, they would be a donor or batch of their own
                raise ValueError(
                    f"A task needs batches, donors and groups of all cells, got none in {column!r} for {missing:,} of "
                    f"{cells.n_obs:,} of {self.name}. Leave these out: cells[cells.obs[{column!r}].notna()]."
                )
        # As text, so that unused categories, booleans and numbers are names like others.
        labels = cells.obs[self.label].astype(object)
        labels = labels.where(labels.isna(), labels.astype(str))
        counts = labels.value_counts()
        kept = _of_common_labels(labels, np.arange(len(labels)))
        if self.most_cells is not None and len(kept) > self.most_cells:
            kept = np.sort(np.random.default_rng(0).choice(kept, self.most_cells, replace=False))
            kept = _of_common_labels(labels, kept)
        if labels.iloc[kept].nunique() < 2:
            shown = ", ".join(f"{name} ({count:,})" for name, count in counts.head(5).items())
            raise ValueError(
                f"A task needs two labels of at least {FEWEST_CELLS} cells, got {shown or 'none'} in {self.label!r} of "
                f"{self.name}. Add cells, or take another column."
            )
        cells = cells[kept].copy()
        cells.obs[self.label] = labels.iloc[kept].to_numpy()
        return cells


def _of_common_labels(labels: pd.Series, rows: np.ndarray) -> np.ndarray:
    """Those of the rows whose label at least five of them have."""
    counts = labels.iloc[rows].value_counts()
    return rows[labels.iloc[rows].isin(counts.index[counts >= FEWEST_CELLS]).to_numpy()]


@dataclass
class TaskResult:
    """What `evaluate_task` gives.

    Parameters
    ----------
    scores
        By name: each metric's mean over the seeds, ``<metric>_low`` and ``<metric>_high``, bounds of its 95 % interval,
        and ``seconds`` of one seed.
    by_seed
        The scores of each seed.
    true, predicted
        (test cells,) of each seed, names; empty for integration.
    probabilities
        What the method gave for each seed; None for integration.
    leakage
        What the first seed's sides have in common.
    embedding
        Of the first seed's test cells, with their positions, for integration.
    """

    scores: dict[str, float]
    by_seed: list[dict[str, float]]
    true: list[np.ndarray] = field(default_factory=list)
    predicted: list[np.ndarray] = field(default_factory=list)
    probabilities: list[Predictions] = field(default_factory=list)
    leakage: Leakage | None = None
    embedding: tuple[np.ndarray, np.ndarray] | None = None


def run_task(task: Task, model: str | Callable, **options) -> dict[str, float]:
    """Scores of a method on a task; `evaluate_task`, whose options it takes, also gives what they were made of."""
    return evaluate_task(task, model, **options).scores


def evaluate_task(
    task: Task,
    model: str | Callable,
    *,
    data: str | Path | None = None,
    cells: ad.AnnData | None = None,
    seeds: Sequence[int] = SEEDS,
    budget: float = 1.0,
    layer: str | None = None,
) -> TaskResult:
    """Run a method on a task with several seeds, each with a split of its own.

    Parameters
    ----------
    task
        The task.
    model
        A method: see `methods.classifier_of`, and `methods.embedder_of` for integration.
    data
        Folder with the files of `public_tasks.TASKS`.
    cells
        What ``task.load`` gave, where it was called already.
    seeds
        Of splits and methods.
    budget
        Share of the training cells that a method may see, drawn within each label, at least two of each where there
        are. Smaller budgets are part of larger ones.
    layer
        As in `panfoma_hf.finetune`.

    Returns
    -------
    For annotation, metrics of the held-out cells, where a label that the training cells lack counts as wrong;
    ``calibration_error``, of the cells whose label they have; and with donors, ``donor_accuracy``, the share of them
    that are called what most of their cells are, by the mean of the cells' probabilities. Intervals draw donors anew,
    and cells where there are fewer than two, averaged over the seeds; see `metrics.bootstrap_interval`.
    For integration, each metric twice: ``unseen/<metric>``, of half of the cells, while a method that is trained
    learned from the other half; and ``seen/<metric>``, of all cells after learning from these, as the paper does. Where
    nothing is trained, all cells are embedded once, and both are scores of that. ``_low`` and ``_high`` are the lowest
    and the highest of several seeds.

    Raises
    ------
    ValueError
        If the method is not known, the cells cannot be split, or there is no seed or budget.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"`budget` is a share of the labels above 0 and up to 1, got {budget}. 1 shows all.")
    if not len(seeds):
        raise ValueError("At least one seed is needed, got none. Three show how much a score depends on the draw.")
    run = _integration if task.kind == INTEGRATION else _annotation
    method = embedder_of(model) if task.kind == INTEGRATION else classifier_of(model)  # wrong names fail before loading
    return run(task, task.load(data) if cells is None else cells, method, seeds, budget, layer)


def split_task(task: Task, cells: ad.AnnData, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of training and test cells.

    Raises
    ------
    ValueError
        If the cells cannot be split, or a fixed split leaves too few on a side.
    """
    column = _column_of_groups(task, cells)
    groups = None if column is None else cells.obs[column].astype(str)
    if not task.held_out:
        split = split_cells(cells.obs[task.label].to_numpy(), groups=groups, test_size=task.test_size, seed=seed)
        return split.train, split.test
    is_test = groups.isin(task.held_out).to_numpy()
    if is_test.all() or is_test.sum() < 2:
        raise ValueError(
            f"A fixed split needs training cells and at least two test cells, got {int(is_test.sum()):,} of "
            f"{len(is_test):,} with {column} in {', '.join(task.held_out)}. Name other values."
        )
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _column_of_groups(task: Task, cells: ad.AnnData) -> str | None:
    return find_groups(cells.obs, task.label) if task.groups == "auto" else task.groups


def _annotation(task, cells, classifier, seeds, budget, layer) -> TaskResult:
    result = TaskResult({}, [])
    donor = task.donor or _column_of_groups(task, cells)
    donors = None if donor is None else cells.obs[donor].astype(str).to_numpy()
    labels = cells.obs[task.label].to_numpy().astype(str)
    intervals = {metric: [] for metric in task.metrics}
    for seed in seeds:
        train, test = split_task(task, cells, seed)
        if budget < 1:
            train = _budget(train, labels, budget, seed)
        learned, asked = cells[train].copy(), cells[test].copy()
        if result.leakage is None:
            result.leakage = find_leakage(learned, asked, task.label)
        del asked.obs[task.label]  # nothing can look
        started = time.perf_counter()
        found = classifier(learned, asked, task.label, seed=seed, layer=layer)
        seconds = time.perf_counter() - started
        of_test = None if donors is None else donors[test]
        result.by_seed.append(_scores(labels[test], found, of_test) | {"seconds": seconds})
        drawn = of_test if of_test is not None and len(set(of_test)) > 1 else None
        for metric, bounds in intervals.items():
            bounds.append(bootstrap_interval(labels[test], found.labels, drawn, metric, seed=seed))
        result.true.append(labels[test])
        result.predicted.append(found.labels)
        result.probabilities.append(found)
    result.scores = _means(result.by_seed)
    for metric, bounds in intervals.items():
        low, high = np.mean(bounds, axis=0)
        result.scores |= {f"{metric}_low": float(low), f"{metric}_high": float(high)}
    return result


def _scores(true: np.ndarray, found: Predictions, donors: np.ndarray | None) -> dict[str, float]:
    if len(found.probabilities) != len(true):
        raise ValueError(
            f"A method must say something of each of the {len(true):,} test cells, got {len(found.probabilities):,}. "
            "Give one row of probabilities for each."
        )
    scores = classification_metrics(true, found.labels)
    ids = found.ids(true)
    known = ids >= 0
    if known.any():
        scores["calibration_error"] = expected_calibration_error(found.probabilities[known], ids[known])
    if donors is not None:
        scores["donor_accuracy"] = _donor_accuracy(true, found, donors)
        scores["test_donors"] = float(len(np.unique(donors)))
    return scores


def _budget(train: np.ndarray, labels: np.ndarray, budget: float, seed: int) -> np.ndarray:
    """Some training cells of each label, at least two where there are; smaller budgets are part of larger ones."""
    order = np.random.default_rng(seed).permutation(train)
    kept = []
    for label in np.unique(labels[train]):
        of_label = order[labels[order] == label]
        kept.append(of_label[: max(min(2, len(of_label)), round(budget * len(of_label)))])
    return np.sort(np.concatenate(kept))


def _donor_accuracy(true: np.ndarray, found: Predictions, donors: np.ndarray) -> float:
    """Share of the donors that are called what most of their cells are, by the mean of their cells' probabilities."""
    hits = []
    for donor in np.unique(donors):
        of_donor = donors == donor
        names, counts = np.unique(true[of_donor], return_counts=True)
        called = found.names[found.probabilities[of_donor].mean(axis=0).argmax()]
        hits.append(called == names[counts.argmax()])
    return float(np.mean(hits))


def _integration(task, cells, method, seeds, budget, layer) -> TaskResult:
    if budget < 1:
        raise ValueError(f"Integration has no budget of labels, got {budget}. Leave it out.")
    embedder, trainable = method
    result = TaskResult({}, [])
    labels, batches = (cells.obs[column].astype(str).to_numpy().astype(str) for column in (task.label, task.batch))
    # Every label and batch is in both halves, as far as there are two cells of them.
    pairs = np.char.add(np.char.add(labels, "\t"), batches)
    asked = cells.copy()
    del asked.obs[task.label]  # nothing can look
    for seed in seeds:
        split = split_cells(pairs, test_size=0.5, seed=seed)
        started = time.perf_counter()
        if trainable is None:
            seen = _checked(embedder(asked, batch=task.batch, seed=seed, layer=layer), cells)
            unseen = seen[split.test]
        else:
            held_out = asked[split.test].copy()
            unseen = trainable(cells[split.train].copy(), held_out, task.label, seed=seed, layer=layer)
            unseen = _checked(unseen, held_out)
            seen = _checked(trainable(cells.copy(), asked, task.label, seed=seed, layer=layer), cells)
        scores = {"seconds": time.perf_counter() - started}
        for name, embedding, scored in (("unseen", unseen, split.test), ("seen", seen, np.arange(cells.n_obs))):
            found = integration_metrics(embedding, labels[scored], batches[scored], seed=seed)
            scores |= {f"{name}/{metric}": found[metric] for metric in task.metrics}
        if result.embedding is None:
            result.embedding = (unseen, split.test)
        result.by_seed.append(scores)
    result.scores = _means(result.by_seed)
    if len(seeds) > 1:
        for name in result.by_seed[0]:
            if name != "seconds":
                values = [scores[name] for scores in result.by_seed]
                result.scores |= {f"{name}_low": float(min(values)), f"{name}_high": float(max(values))}
    return result


def _checked(embedding, cells: ad.AnnData) -> np.ndarray:
    embedding = np.asarray(embedding)
    if len(embedding) != cells.n_obs:
        raise ValueError(
            f"A method must embed each of the {cells.n_obs:,} cells, got {len(embedding):,} rows. Give one for each."
        )
    return embedding


def _means(by_seed: list[dict[str, float]]) -> dict[str, float]:
    """Means over the seeds that have a score."""
    names = dict.fromkeys(name for scores in by_seed for name in scores)
    return {name: float(np.mean([scores[name] for scores in by_seed if name in scores])) for name in names}


def __getattr__(name: str):
    if name == "TASKS":  # which is made of tasks
        from .public_tasks import TASKS

        return TASKS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
