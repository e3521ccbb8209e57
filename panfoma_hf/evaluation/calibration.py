"""How far scores can be trusted: temperature, calibration error, when to leave a cell unassigned, and unlike cells."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats
from scipy.special import logsumexp


# Temperatures beyond these say that something else is wrong.
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0
# Above every probability: leaves all cells unassigned.
NEVER = 2.0
# Shares of the cells, the surest ones, that the search for a threshold starts from. See `unassigned_threshold`.
_STARTS = (0.1, 0.5, 1.0)


def fit_temperature(logits: np.ndarray, labels: Sequence[int]) -> float:
    """The temperature that minimises the cross-entropy of ``softmax(logits / temperature)``.

    As Guo et al. (ICML 2017). The cross-entropy has one minimum in the temperature, except where no cell is wrong:
    then it falls with the temperature for ever. In that case alone the labels are smoothed by one wrong cell more and
    two cells more, 1 / (cells + 2), as Platt (1999) does, so that few cells do not make scores of 1.

    Parameters
    ----------
    logits
        (cells, labels), of cells that were not trained on.
    labels
        (cells,), ids of their labels.

    Returns
    -------
    The temperature, from 0.05 to 20; 1 where the logits prefer no label.

    Raises
    ------
    ValueError
        If there is no cell, a logit is NaN or infinite, or an id is none of the labels.
    """
    logits = _finite("logits", logits)
    labels = _ids(labels, logits)
    logits = logits - logits.max(axis=1, keepdims=True)
    if not logits.any():  # one label, or equal logits: nothing depends on the temperature
        return 1.0
    num_cells, num_labels = logits.shape
    of_label = np.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    smoothing = 1 / (num_cells + 2) if (of_label >= 0).all() else 0.0
    # The mean logit of the target: all that the cross-entropy needs besides the normalisation.
    target = (1 - smoothing) * of_label
    if smoothing:
        target += smoothing * (logits.sum(axis=1) - of_label) / (num_labels - 1)

    def cross_entropy(log_temperature: float) -> float:
        temperature = np.exp(log_temperature)
        return float(np.mean(logsumexp(logits / temperature, axis=1) - target / temperature))

    bounds = (np.log(LOWEST_TEMPERATURE), np.log(HIGHEST_TEMPERATURE))
    best = optimize.minimize_scalar(cross_entropy, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return float(np.clip(np.exp(best.x), LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE))


@dataclass
class Reliability:
    """Confidence beside accuracy, by bins of the confidence.

    Parameters
    ----------
    edges
        (bins + 1,), of the bins; each includes its upper one, the first its lower one, too.
    confidence, accuracy
        (bins,), means over the cells of a bin; NaN where it has none.
    count
        (bins,), numbers of cells.
    """

    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability(probabilities: np.ndarray, labels: Sequence[int], num_bins: int = 15) -> Reliability:
    """How often the most probable label is right, by equal-width bins of its probability.

    Parameters
    ----------
    probabilities
        (cells, labels).
    labels
        (cells,), ids of the true labels.
    num_bins
        Number of bins.

    Raises
    ------
    ValueError
        If there is no cell or bin, the probabilities of a cell do not sum to 1, or an id is none of the labels.
    """
    if num_bins < 1:
        raise ValueError(f"At least one bin is needed, got {num_bins}. Such as 15.")
    score, is_right = _scored(probabilities, labels)
    edges = np.linspace(0, 1, num_bins + 1)
    bins = np.clip(np.searchsorted(edges, score, side="left") - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    confidence, accuracy = (
        np.divide(np.bincount(bins, values, num_bins), count, out=np.full(num_bins, np.nan), where=count > 0)
        for values in (score, is_right)
    )
    return Reliability(edges, confidence, accuracy, count)


def expected_calibration_error(probabilities: np.ndarray, labels: Sequence[int], num_bins: int = 15) -> float:
    """Mean distance of confidence from accuracy over the bins of `reliability`, weighted by their cells.

    As Guo et al. (ICML 2017). Few cells in a bin differ from its confidence by chance, so even perfect probabilities
    have an error above 0, the larger the fewer the cells.

    Parameters
    ----------
    probabilities, labels, num_bins
        As in `reliability`.
    """
    bins = reliability(probabilities, labels, num_bins)
    used = bins.count > 0
    distance = np.abs(bins.accuracy - bins.confidence)[used]
    return float(np.average(distance, weights=bins.count[used]))


@dataclass
class Threshold:
    """A score below which cells are left unassigned.

    Parameters
    ----------
    value
        Cells whose largest probability is at least this are assigned; 2 where none should be.
    error
        Share of the assigned validation cells that are wrong; 0 where none is assigned.
    coverage
        Share of the validation cells that are assigned.
    is_certified
        Whether the bound on the error of new cells holds, with the confidence that was asked for.
    """

    value: float
    error: float
    coverage: float
    is_certified: bool


def unassigned_threshold(
    probabilities: np.ndarray, labels: Sequence[int], max_error: float = 0.05, confidence: float = 0.9
) -> Threshold:
    """The lowest threshold of the score at which at most ``max_error`` of the assigned cells are wrong.

    The score is the largest probability. Thresholds are those of the surest tenth, half, and all of the validation
    cells, and from each of these on towards lower scores in steps of a hundredth of the cells. Each is tested by the
    upper Clopper-Pearson bound on its error; a walk stops at the first one that fails, and the lowest that passed is
    taken. This is fixed-sequence testing with several starts (Angelopoulos et al., "Learn then test", 2021), each
    start at a third of ``1 - confidence``: however many thresholds are tested, the error of new cells is above
    ``max_error`` with a probability of at most ``1 - confidence``. Several starts, as the surest tenth may be too few
    cells to forgive the wrong labels that real data have.

    The guarantee is for new cells like the validation cells, which must not have been trained on, nor used to choose
    the model. A temperature fitted on them bends it, if little, as it is one number. It takes that cells of higher
    scores are wrong less often, and says nothing of single labels.

    Where nothing passes, as with fewer than 67 validation cells at the defaults, the lowest threshold at which the
    share of wrong validation cells is at most ``max_error`` is taken without a guarantee, and where there is none
    either, all cells are to be left unassigned.

    Parameters
    ----------
    probabilities
        (validation cells, labels), after temperature.
    labels
        (validation cells,), ids of the true labels.
    max_error
        Largest share of wrong cells among the assigned ones, from 0 up to, not including, 1.
    confidence
        Probability of the guarantee, between 0 and 1.

    Raises
    ------
    ValueError
        If a share is out of range, or as in `reliability`.
    """
    if not 0 <= max_error < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"`max_error` is in [0, 1) and `confidence` in (0, 1), got {max_error} and {confidence}. Such as 0.05, 0.9."
        )
    score, is_right = _scored(probabilities, labels)
    order = np.argsort(-score, kind="stable")
    score, wrong = score[order], np.cumsum(~is_right[order])
    # Cells of one score are assigned together: the number assigned with the k surest cells.
    num_assigned = np.searchsorted(-score, -score, side="right")
    certified = _certified(num_assigned, wrong, max_error, 1 - confidence)
    if certified is None:
        enough = np.flatnonzero(wrong[num_assigned - 1] <= max_error * num_assigned)
        chosen = int(num_assigned[enough[-1]]) if len(enough) else 0
    else:
        chosen = certified
    if not chosen:
        return Threshold(NEVER, 0.0, 0.0, False)
    return Threshold(
        float(score[chosen - 1]), float(wrong[chosen - 1] / chosen), chosen / len(score), certified is not None
    )


def _certified(num_assigned: np.ndarray, wrong: np.ndarray, max_error: float, risk: float) -> int | None:
    """The largest number of surest cells that a walk reaches, None where each fails at its start."""
    num_cells = len(num_assigned)
    risk /= len(_STARTS)
    # Fewer cells fail even if none is wrong.
    fewest = np.ceil(np.log(risk) / np.log1p(-max_error)) if max_error > 0 else np.inf
    reached = []
    for share in _STARTS:
        start = max(fewest, share * num_cells)
        if start > num_cells:
            continue
        # From counts, not from how the errors lie: that would spoil the test.
        steps = np.append(np.arange(int(np.ceil(start)), num_cells, max(num_cells // 100, 1)), num_cells)
        assigned = num_assigned[steps - 1]
        errors = wrong[assigned - 1]
        passes = _upper_bound(errors, assigned, risk) <= max_error
        num_passed = len(passes) if passes.all() else int(passes.argmin())
        reached.append(int(assigned[num_passed - 1]) if num_passed else 0)
    return max(reached, default=0) or None


def _upper_bound(errors: np.ndarray, cells: np.ndarray, risk: float) -> np.ndarray:
    """One-sided bound of Clopper and Pearson (1934): the error is above it with a probability of at most ``risk``."""
    bound = stats.beta.ppf(1 - risk, errors + 1, np.maximum(cells - errors, 1))
    return np.where(errors < cells, bound, 1.0)


def energy(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """(cells,), ``-temperature * logsumexp(logits / temperature)``: higher for cells unlike those trained on.

    Liu et al. (NeurIPS 2020).

    Parameters
    ----------
    logits
        (cells, labels).
    temperature
        Above 0.

    Raises
    ------
    ValueError
        If a logit is NaN or infinite, or the temperature is not above 0.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"A temperature is above 0, got {temperature}. 1 changes nothing.")
    return -temperature * logsumexp(_finite("logits", logits) / temperature, axis=1)


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    """Values as float64, two-dimensional and finite."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.shape[1] or not len(values):
        raise ValueError(f"`{name}` are a row for each of at least one cell, got shape {values.shape}. Stack them.")
    if not np.isfinite(values).all():
        where = int((~np.isfinite(values)).any(axis=1).sum())
        raise ValueError(f"`{name}` must be finite, got NaN or infinity in {where:,} cells. Leave these out.")
    return values


def _ids(labels: Sequence[int], rows: np.ndarray) -> np.ndarray:
    """(cells,) ids of labels, checked against the rows, which have a column for each label."""
    labels = np.asarray(labels)
    num_labels = rows.shape[1]
    if labels.shape != rows.shape[:1]:
        raise ValueError(f"Each of the {len(rows):,} cells has a label, got shape {labels.shape}. Pass one for each.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"Labels are ids, whole numbers, got {labels.dtype}. Look names up in `label2id`.")
    outside = labels[(labels < 0) | (labels >= num_labels)]
    if len(outside):
        raise ValueError(
            f"Ids of labels are from 0 to {num_labels - 1}, got {len(outside):,} others, such as {outside[0]}. "
            "Leave cells without a label out."
        )
    return labels.astype(np.int64)


def _scored(probabilities: np.ndarray, labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(cells,) largest probabilities, and whether they are of the true label."""
    probabilities = _finite("probabilities", probabilities)
    labels = _ids(labels, probabilities)
    # Wide enough for half precision.
    if (probabilities < 0).any() or (np.abs(probabilities.sum(axis=1) - 1) > 1e-2).any():
        raise ValueError(
            "The probabilities of a cell are not negative and sum to 1, got sums from "
            f"{probabilities.sum(axis=1).min():.3g} to {probabilities.sum(axis=1).max():.3g}. Take the softmax first."
        )
    return np.minimum(probabilities.max(axis=1), 1), probabilities.argmax(axis=1) == labels
