"""Metrics as pure functions: arrays in, floats out."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from sklearn.metrics import accuracy_score, f1_score


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
        If the metric is not known, or there is only one group.
    """
    if metric not in ("accuracy", "macro_f1"):
        raise ValueError(f"`metric` is 'accuracy' or 'macro_f1', got {metric!r}. Use one of these.")
    true, predicted = np.asarray(true).astype(str), np.asarray(predicted).astype(str)
    names, codes = np.unique(np.concatenate([true, predicted]), return_inverse=True)
    true, predicted = codes[: len(true)], codes[len(true) :]
    groups = (
        np.arange(len(true)) if groups is None else np.unique(np.asarray(groups).astype(str), return_inverse=True)[1]
    )
    num_groups = groups.max() + 1
    if num_groups < 2:
        raise ValueError(f"An interval over groups needs at least two of them, got {num_groups}. Pass None for cells.")
    # Metrics need, of each label, the cells that have it, those called it, and those of both: sums over groups.
    tables = [sp.csr_matrix((np.ones(len(true)), (groups, ids)), (num_groups, len(names))) for ids in (true, predicted)]
    hits = np.flatnonzero(true == predicted)
    tables.append(sp.csr_matrix((np.ones(len(hits)), (groups[hits], true[hits])), (num_groups, len(names))))
    draws = np.random.default_rng(seed).multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=num_draws)
    of_true, of_predicted, of_both = (np.asarray(draws @ table) for table in tables)
    if metric == "accuracy":
        values = of_both.sum(1) / of_true.sum(1)
    else:
        either = of_true + of_predicted
        values = (2 * of_both / np.maximum(either, 1)).sum(1) / np.maximum((either > 0).sum(1), 1)
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
