"""Metrics as pure functions: arrays in, floats out."""

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse as sp
from sklearn.metrics import accuracy_score, f1_score


# Numbers of draws that are held at a time.
_MOST_VALUES = 2**23


def classification_metrics(true: Sequence, predicted: Sequence) -> dict[str, float]:
    """Accuracy and macro-F1.

    Parameters
    ----------
    true, predicted
        (cells,), labels of any kind.

    Returns
    -------
    ``accuracy``; ``macro_f1``, the mean of F1 over the labels that occur in either, 0 for one never predicted.
    """
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0)),
    }


def bootstrap_interval(
    true: Sequence,
    predicted: Sequence,
    groups: Sequence | None = None,
    metric: str = "macro_f1",
    *,
    num_draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a metric when donors are drawn anew, with replacement (Efron, 1979).

    Cells of one donor are alike, so an interval over cells would be too narrow. The model is what it is; how much
    another training set would change it, several seeds tell.

    Parameters
    ----------
    true, predicted
        (cells,), labels of any kind.
    groups
        (cells,), such as donors, which are drawn whole; None draws cells.
    metric
        "accuracy" or "macro_f1".
    num_draws, level, seed
        Draws, coverage of the interval, and seed of the draws.

    Returns
    -------
    The lower and the upper bound.

    Raises
    ------
    ValueError
        If the metric is not known, lengths differ, or there is only one group or cell.
    """
    if metric not in ("accuracy", "macro_f1"):
        raise ValueError(f"`metric` is 'accuracy' or 'macro_f1', got {metric!r}. Use one of these.")
    true, predicted = np.asarray(true).astype(str), np.asarray(predicted).astype(str)
    if len(true) != len(predicted) or (groups is not None and len(groups) != len(true)):
        raise ValueError(
            f"There must be one prediction, and one group, for each of the {len(true):,} cells, got {len(predicted):,}"
            f"{'' if groups is None else f' and {len(groups):,}'}. Pass those of the same cells."
        )
    names, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    true, predicted = codes[: len(true)], codes[len(true) :]
    if groups is None:
        groups, num_groups = np.arange(len(true)), len(true)
    else:
        names_of_groups, groups = np.unique(np.asarray(groups).astype(str), return_inverse=True)
        num_groups = len(names_of_groups)
    if num_groups < 2:
        raise ValueError(
            f"An interval needs at least two groups, or cells where there are no groups, got {num_groups} among "
            f"{len(true):,} cells. Pass None as `groups` to draw cells, or add some."
        )
    # Metrics need, of each label, the cells that have it, those called it, and those of both: sums over groups.
    tables = [sp.csr_matrix((np.ones(len(true)), (groups, ids)), (num_groups, len(names))) for ids in (true, predicted)]
    hits = np.flatnonzero(true == predicted)
    tables.append(sp.csr_matrix((np.ones(len(hits)), (groups[hits], true[hits])), (num_groups, len(names))))
    generator, shares = np.random.default_rng(seed), np.full(num_groups, 1 / num_groups)
    values = []
    # In parts, as the draws of many cells would take gigabytes; they are the same whatever the parts.
    for size in _parts(num_draws, max(1, _MOST_VALUES // num_groups)):
        draws = generator.multinomial(num_groups, shares, size=size)
        of_true, of_predicted, of_both = (np.asarray(draws @ table) for table in tables)
        if metric == "accuracy":
            values.append(of_both.sum(1) / of_true.sum(1))
        else:
            either = of_true + of_predicted
            values.append((2 * of_both / np.maximum(either, 1)).sum(1) / np.maximum((either > 0).sum(1), 1))
    tail = (1 - level) / 2
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return float(low), float(high)


def _parts(number: int, largest: int) -> Iterator[int]:
    """Sizes of parts of a number."""
    for start in range(0, number, largest):
        yield min(largest, number - start)
