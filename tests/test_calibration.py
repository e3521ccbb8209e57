"""Temperature, calibration error, thresholds and scores of unlike cells, beside plain references."""

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import softmax
from sklearn.metrics import log_loss

from panfoma_hf.evaluation.calibration import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    NEVER,
    Threshold,
    _upper_bound,
    energy,
    expected_calibration_error,
    fit_temperature,
    reliability,
    unassigned_threshold,
)


def calibrated(num_cells: int = 2000, num_labels: int = 5, seed: int = 0, spread: float = 2.0):
    """Logits, and labels drawn with the probabilities that these give."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, spread, (num_cells, num_labels))
    draws = generator.random((num_cells, 1))
    labels = (softmax(logits, axis=1).cumsum(axis=1) < draws).sum(axis=1).clip(max=num_labels - 1)
    return logits, labels


# Temperature


@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_the_temperature_is_the_best_of_a_grid(scale):
    logits, labels = calibrated(500)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 1200))
    losses = [log_loss(labels, softmax(scale * logits / t, axis=1), labels=range(5)) for t in grid]
    assert fit_temperature(scale * logits, labels) == pytest.approx(grid[np.argmin(losses)], rel=0.006)


def test_calibrated_logits_have_temperature_one_and_little_error():
    logits, labels = calibrated(20_000)
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert expected_calibration_error(softmax(logits, axis=1), labels) < 0.015
    # What is too sure by a factor of 3 is mended by the temperature.
    assert expected_calibration_error(softmax(3 * logits, axis=1), labels) > 0.1
    mended = softmax(3 * logits / fit_temperature(3 * logits, labels), axis=1)
    assert expected_calibration_error(mended, labels) < 0.015


@pytest.mark.parametrize("factor", [0.2, 4.0])
def test_the_temperature_goes_with_the_scale_of_the_logits_and_not_with_their_level(factor):
    logits, labels = calibrated(300)
    expected = fit_temperature(logits, labels)
    assert fit_temperature(factor * logits, labels) == pytest.approx(factor * expected, rel=1e-4)
    level = np.random.default_rng(0).normal(0, 50, (300, 1))
    assert fit_temperature(logits + level, labels) == pytest.approx(expected, rel=1e-4)


def test_the_temperature_changes_no_label():
    logits, labels = calibrated(300)
    probabilities = softmax(logits / fit_temperature(5 * logits, labels), axis=1)
    np.testing.assert_array_equal(probabilities.argmax(axis=1), logits.argmax(axis=1))


@pytest.mark.parametrize("num_cells", [10, 1000])
def test_where_all_cells_are_right_scores_are_as_sure_as_the_number_of_cells_allows(num_cells):
    logits = np.random.default_rng(0).normal(size=(num_cells, 4))
    logits[:, 0] = logits.max(axis=1) + 2
    labels = logits.argmax(axis=1)
    temperature = fit_temperature(logits, labels)
    wrong = 1 - softmax(logits / temperature, axis=1).max(axis=1)
    assert LOWEST_TEMPERATURE < temperature < 20
    assert 0.5 < wrong.mean() * (num_cells + 2) < 2
    assert fit_temperature(2 * logits, labels) == pytest.approx(2 * temperature, rel=1e-3)


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        pytest.param(np.ones((5, 3)), [0, 1, 2, 0, 1], 1.0, id="equal_logits"),
        pytest.param(np.arange(4.0)[:, None], [0, 0, 0, 0], 1.0, id="one_label"),
        pytest.param(np.eye(3) * 10, [1, 2, 0], HIGHEST_TEMPERATURE, id="all_wrong"),
        pytest.param(np.eye(3) * 1e-6, [0, 1, 2], LOWEST_TEMPERATURE, id="hardly_sure"),
        pytest.param(np.eye(3) * 1e8, [0, 1, 2], HIGHEST_TEMPERATURE, id="very_sure"),
        pytest.param(np.eye(3, dtype=np.float16) * 6e4, [0, 1, 1], HIGHEST_TEMPERATURE, id="half_precision"),
    ],
)
def test_temperatures_stay_within_bounds(logits, labels, expected):
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-4)


# Calibration error


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_the_calibration_error_is_that_of_a_loop(num_bins):
    logits, labels = calibrated(400)
    probabilities = softmax(2 * logits, axis=1)
    score, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error, counts = 0.0, []
    for number in range(num_bins):
        inside = (score > number / num_bins) & (score <= (number + 1) / num_bins)
        counts.append(inside.sum())
        if inside.any():
            error += inside.mean() * abs(is_right[inside].mean() - score[inside].mean())
    assert expected_calibration_error(probabilities, labels, num_bins) == pytest.approx(error)
    bins = reliability(probabilities, labels, num_bins)
    assert bins.count.tolist() == counts
    assert np.isnan(bins.accuracy).tolist() == (bins.count == 0).tolist()
    assert len(bins.edges) == num_bins + 1


def test_sure_and_right_has_no_error_and_sure_and_wrong_has_one():
    assert expected_calibration_error(np.eye(3), [0, 1, 2]) == 0
    assert expected_calibration_error(np.eye(3), [1, 2, 0]) == 1


# Thresholds


def two_labels(score: np.ndarray, is_right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of two labels, and the true labels that make cells right or wrong."""
    return np.column_stack([score, 1 - score]), np.where(is_right, 0, 1)


def drawn_cells(generator, num_cells, accuracy):
    score = generator.uniform(0.5, 1, num_cells)
    return score, generator.random(num_cells) < accuracy(score)


def test_the_bound_is_that_of_clopper_and_pearson():
    for errors, num_cells in [(0, 10), (3, 50), (10, 10)]:
        bound = _upper_bound(np.array([errors]), np.array([num_cells]), 0.1)[0]
        expected = 1.0
        if errors < num_cells:  # the error with which so few errors have a probability of a tenth
            expected = optimize.brentq(lambda p, e=errors, n=num_cells: stats.binom.cdf(e, n, p) - 0.1, 1e-9, 1 - 1e-9)
        assert bound == pytest.approx(expected)


@pytest.mark.parametrize(
    "accuracy",
    [
        pytest.param(lambda score: score, id="calibrated"),
        pytest.param(lambda score: np.full_like(score, 0.95), id="score_says_nothing_just_within"),
        pytest.param(lambda score: np.full_like(score, 0.94), id="score_says_nothing_just_beyond"),
        pytest.param(lambda score: np.where(score > 0.7, 0.96, 0.5), id="a_cliff"),
    ],
)
@pytest.mark.parametrize("num_cells", [120, 600])
def test_the_guarantee_holds(accuracy, num_cells):
    generator = np.random.default_rng(0)
    score = np.sort(generator.uniform(0.5, 1, 50_000))[::-1]
    true_error = 1 - np.cumsum(accuracy(score)) / np.arange(1, 50_001)
    failures = 0
    for _ in range(200):
        found = unassigned_threshold(*two_labels(*drawn_cells(generator, num_cells, accuracy)), max_error=0.05)
        if found.is_certified:
            num_assigned = np.searchsorted(-score, -found.value, side="right")
            failures += true_error[num_assigned - 1] > 0.05 + 1e-3  # what 50,000 cells do not settle
    # At most a tenth, and three standard deviations of 200 draws.
    assert failures / 200 <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 200)


def test_a_certified_threshold_is_far_from_the_worst():
    generator = np.random.default_rng(0)
    # All but the 30 % below 0.65 are right but for wrong labels, 2 %.
    found = unassigned_threshold(
        *two_labels(*drawn_cells(generator, 3000, lambda score: np.where(score > 0.65, 0.98, 0.6)))
    )
    assert found.is_certified
    assert found.value == pytest.approx(0.63, abs=0.03)
    assert found.coverage == pytest.approx(0.73, abs=0.05)
    assert found.error <= 0.05


def test_where_all_are_right_all_are_assigned():
    score = np.linspace(0.6, 1, 200)
    found = unassigned_threshold(*two_labels(score, np.ones(200, dtype=bool)))
    assert found == Threshold(0.6, 0.0, 1.0, True)


@pytest.mark.parametrize(("num_cells", "is_certified"), [(66, False), (67, True)])
def test_too_few_cells_certify_nothing_and_are_taken_at_their_word(num_cells, is_certified):
    found = unassigned_threshold(*two_labels(np.linspace(0.6, 1, num_cells), np.ones(num_cells, dtype=bool)))
    assert found == Threshold(0.6, 0.0, 1.0, is_certified)


def test_without_a_certificate_the_lowest_threshold_with_few_errors_is_taken():
    score = np.linspace(1, 0.55, 40)
    is_right = np.arange(40) < 30
    found = unassigned_threshold(*two_labels(score, is_right), max_error=0.1)
    # 3 of 33 are wrong, 4 of 34 would be too many.
    assert found == Threshold(pytest.approx(score[32]), pytest.approx(3 / 33), pytest.approx(33 / 40), False)


def test_where_every_threshold_errs_no_cell_is_assigned():
    found = unassigned_threshold(*two_labels(np.linspace(0.6, 1, 100), np.zeros(100, dtype=bool)))
    assert found == Threshold(NEVER, 0.0, 0.0, False)


def test_cells_of_one_score_are_assigned_together():
    score = np.repeat([0.9, 0.7], 100)
    is_right = np.append(np.ones(100, dtype=bool), np.arange(100) < 50)
    found = unassigned_threshold(*two_labels(score, is_right))
    assert found == Threshold(pytest.approx(0.9), 0.0, 0.5, True)


def test_a_threshold_does_not_depend_on_the_order_of_the_cells():
    probabilities, labels = two_labels(*drawn_cells(np.random.default_rng(0), 500, lambda score: score**0.3))
    order = np.random.default_rng(1).permutation(500)
    assert unassigned_threshold(probabilities, labels) == unassigned_threshold(probabilities[order], labels[order])


def test_no_error_at_all_cannot_be_certified():
    found = unassigned_threshold(*two_labels(np.linspace(0.6, 1, 500), np.arange(500) >= 100), max_error=0)
    assert (found.error, found.coverage, found.is_certified) == (0, 0.8, False)


# Cells unlike those trained on


def test_energy_is_higher_for_cells_that_no_label_claims():
    logits = np.array([[10.0, 0.0], [0.0, 0.0], [1e4, 0.0]])
    np.testing.assert_allclose(energy(logits), [-np.log(np.exp(10) + 1), -np.log(2), -1e4])
    np.testing.assert_allclose(energy(logits, 2.0), 2 * energy(logits / 2))


# Inputs

PROBABILITIES = np.array([[0.5, 0.5], [0.9, 0.1]])


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        pytest.param(fit_temperature, ([[1, 2]], [-1]), "from 0 to 1, got 1 others, such as -1", id="no_label"),
        pytest.param(fit_temperature, ([[1, 2]], [2]), "such as 2", id="label_outside"),
        pytest.param(fit_temperature, ([[1, 2]], ["a"]), "Look names up", id="names"),
        pytest.param(fit_temperature, ([[1, 2]], [0, 1]), "Each of the 1 cells", id="lengths"),
        pytest.param(fit_temperature, ([[1, np.nan]], [0]), "NaN or infinity in 1 cells", id="nan"),
        pytest.param(fit_temperature, (np.empty((0, 2)), []), "at least one cell", id="no_cells"),
        pytest.param(fit_temperature, ([1, 2], [0, 1]), "got shape", id="one_dimension"),
        pytest.param(reliability, (PROBABILITIES, [0, 0], 0), "one bin", id="no_bins"),
        pytest.param(reliability, (3 * PROBABILITIES, [0, 0]), "sum to 1, got sums from 3", id="logits"),
        pytest.param(unassigned_threshold, (PROBABILITIES, [0, 0], 1.0), "max_error", id="max_error"),
        pytest.param(unassigned_threshold, (PROBABILITIES, [0, 0], 0.1, 1.0), "confidence", id="confidence"),
        pytest.param(energy, (PROBABILITIES, 0.0), "above 0", id="temperature"),
    ],
)
def test_what_cannot_be_used_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
