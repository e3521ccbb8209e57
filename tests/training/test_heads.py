"""Classifiers that are solved: logistic regression, the pool of two opinions, and what of them enters the model."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from panfoma_hf import PanFoMaForCellClassification, cell_dataset
from panfoma_hf.tokenization import CellTokens
from panfoma_hf.training import heads
from panfoma_hf.training.heads import (
    LinearClassifier,
    add_gene_logits,
    bins_matrix,
    cross_entropy,
    draw_cells,
    pool,
    solve,
    standardised,
    write_classifier,
)
from tests.conftest import pad_batch, random_cells, spread_out, tiny_config


def blobs(num_cells=90, num_labels=3, seed=0, distance=2.0):
    """Features (cells, 6) around a mean of each label, and the labels."""
    generator = np.random.default_rng(seed)
    labels = np.arange(num_cells) % num_labels
    centres = np.random.default_rng(99).normal(size=(num_labels, 6)) * distance
    return centres[labels] + generator.normal(size=(num_cells, 6)), labels


def solved(features, labels, sizes, validation=None, strengths=(1.0,), weights=None):
    weights = np.ones(sum(sizes)) if weights is None else weights
    return solve(features, labels, sizes, weights, validation, strengths, 1.0, seed=0)


# -- logistic regression -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_labels", [2, 3])
def test_it_is_scikit_learns_on_standardised_features(num_labels):
    features, labels = blobs(num_labels=num_labels, distance=0.5)
    features = features * [1, 10, 100, 0.1, 1, 1] + 5
    weights = np.linspace(0.5, 2, num_labels)
    classifier = standardised(
        lambda train, _: solved(train, labels[:, None], [num_labels], weights=weights), features, None
    )
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    pipeline.fit(features, labels, logisticregression__sample_weight=weights[labels])
    np.testing.assert_allclose(
        log_softmax(classifier(features), axis=1), pipeline.predict_log_proba(features), rtol=1e-6, atol=1e-6
    )


def test_the_strength_is_the_one_that_is_best_on_validation_cells():
    features, labels = blobs(distance=0.3)
    validation = blobs(seed=1, distance=0.3)
    told = validation[0], validation[1][:, None]
    losses = {
        strength: cross_entropy(
            solved(features, labels[:, None], [3], strengths=(strength,), validation=told)(told[0]), validation[1]
        )
        for strength in (1e-4, 100.0, 1e-2)
    }
    chosen = solved(features, labels[:, None], [3], validation=told, strengths=tuple(losses))
    assert cross_entropy(chosen(told[0]), validation[1]) == pytest.approx(min(losses.values()))
    assert min(losses, key=losses.get) == 100.0  # neither the first nor the last


def test_without_validation_cells_of_a_task_its_default_is_taken():
    features, labels = blobs()
    untold = features[:5], np.full((5, 1), -100)
    without = solved(features, labels[:, None], [3], strengths=(1e-4, 1e-3))
    np.testing.assert_array_equal(solved(features, labels[:, None], [3], untold, (1e-4, 1e-3)).weight, without.weight)
    assert not np.allclose(
        solved(features, labels[:, None], [3], (features, labels[:, None]), (1e-4,)).weight, without.weight
    )


def test_tasks_are_solved_each_on_the_cells_that_have_its_label():
    features, labels = blobs()
    other = np.where(np.arange(90) < 40, labels % 2, -100)
    both = solved(features, np.stack([labels, other], axis=1), [3, 2])
    first, second = solved(features, labels[:, None], [3]), solved(features[:40], other[:40, None], [2])
    np.testing.assert_allclose(both(features), np.hstack([first(features), second(features)]))


def test_sparse_features_give_what_dense_ones_give():
    features, labels = blobs(distance=0.5)
    features = np.maximum(features, 0)
    dense, sparse = (solved(matrix, labels[:, None], [3])(matrix) for matrix in (features, sp.csr_matrix(features)))
    np.testing.assert_allclose(sparse, dense, atol=0.05)


def test_a_label_that_no_cell_has_is_never_the_first_choice():
    features, labels = blobs()
    classifier = solved(features, np.where(labels == 1, 0, labels)[:, None], [3])
    assert set(classifier(features).argmax(1)) == {0, 2}
    only = solved(features, np.full((90, 1), 1), [3])
    assert set(only(features).argmax(1)) == {1}
    assert np.isfinite(classifier(features)).all()


def test_what_does_not_converge_is_no_warning():
    features, labels = blobs(num_labels=9, distance=0.01)
    solved(features * 1e4, labels[:, None], [9], strengths=(1e6,))


def test_of_many_cells_every_label_is_drawn():
    labels = np.stack([np.zeros(1000, dtype=int), np.full(1000, -100)], axis=1)
    labels[[3, 500, 999], 0] = [1, 2, 3]
    labels[[700, 800], 1] = [0, 1]
    drawn = draw_cells(labels, seed=0, most=20)
    assert len(drawn) == len(set(drawn)) == 20
    assert (np.diff(drawn) > 0).all()
    assert set(labels[drawn, 0]) == {0, 1, 2, 3}
    assert set(labels[drawn, 1]) == {-100, 0, 1}
    np.testing.assert_array_equal(drawn, draw_cells(labels, seed=0, most=20))
    assert not np.array_equal(drawn, draw_cells(labels, seed=1, most=20))
    np.testing.assert_array_equal(draw_cells(labels, seed=0, most=1000), np.arange(1000))


def test_of_too_many_cells_a_regression_sees_those_drawn(monkeypatch):
    features, labels = blobs()
    monkeypatch.setattr(heads, "MOST_CELLS", 30)
    drawn = draw_cells(labels[:, None], seed=0)
    assert len(drawn) == 30
    few = solved(features[drawn], labels[drawn][:, None], [3])
    np.testing.assert_array_equal(solved(features, labels[:, None], [3]).weight, few.weight)


# -- the pool ------------------------------------------------------------------------------------------------------


def pool_loss(pair, network, genes, labels):
    """The loss that `pool` states, written once more."""
    log_probabilities = log_softmax(pair[0] * network + pair[1] * genes, axis=1)
    smoothing = 1 / (len(labels) + 2)
    right = log_probabilities[np.arange(len(labels)), labels]
    return -((1 - smoothing) * right + smoothing * log_probabilities.mean(1)).mean()


def opinions(seed=0, num_cells=60, skill=(1.0, 2.0)):
    generator = np.random.default_rng(seed)
    labels = np.arange(num_cells) % 3
    return *(generator.normal(size=(num_cells, 3)) * 2 + np.eye(3)[labels] * each for each in skill), labels


@pytest.mark.parametrize("skill", [(1.0, 2.0), (2.0, 1.0), (0.0, 2.0), (-2.0, 2.0)])
def test_weights_are_those_of_a_search_over_a_grid(skill):
    network, genes, labels = opinions(skill=skill)
    found = pool(network, genes, labels[:, None], [3])[0]
    grid = np.linspace(0, 3, 121)
    losses = [[pool_loss((first, second), network, genes, labels) for second in grid] for first in grid]
    best = np.unravel_index(np.argmin(losses), (121, 121))
    np.testing.assert_allclose(found, grid[list(best)], atol=0.03)
    assert pool_loss(found, network, genes, labels) <= np.min(losses) + 1e-6
    assert (found >= 0).all()


def test_weights_are_finite_where_no_cell_is_wrong():
    labels = np.arange(12) % 3
    sure = np.eye(3)[labels] * 4
    found = pool(sure, sure, labels[:, None], [3])
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert 0 < found.sum() < heads.MOST_WEIGHT


def test_two_opinions_that_mislead_weigh_a_half_each():
    labels = np.arange(12) % 3
    wrong = np.eye(3)[(labels + 1) % 3] * 4
    np.testing.assert_array_equal(pool(wrong, wrong, labels[:, None], [3]), [[0.5, 0.5]])


def test_a_task_without_validation_cells_gets_a_half_each_and_others_their_own():
    network, genes, labels = opinions()
    alone = pool(network, genes, labels[:, None], [3])
    beside = np.stack([np.full(60, -100), np.where(np.arange(60) < 60, labels, -100)], axis=1)
    found = pool(np.hstack([network[:, :2], network]), np.hstack([genes[:, :2], genes]), beside, [2, 3])
    np.testing.assert_array_equal(found[0], [0.5, 0.5])
    np.testing.assert_allclose(found[1], alone[0])


# -- what enters the model -----------------------------------------------------------------------------------------


def test_a_written_classifier_is_the_models():
    model = spread_out(PanFoMaForCellClassification(tiny_config()))
    generator = np.random.default_rng(0)
    classifier = LinearClassifier(generator.normal(size=(3, 32)), generator.normal(size=3))
    write_classifier(model, classifier)
    found = model(**pad_batch(random_cells([9, 21])))
    np.testing.assert_allclose(
        found.logits.detach().numpy(), classifier(found.pooler_output.detach().numpy()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("tasks", [None, {"type": ["a", "b"], "state": ["x", "y", "z"]}], ids=["one_task", "two_tasks"])
def test_combined_logits_are_the_weighted_sum_of_both(tasks):
    sizes = [3] if tasks is None else [3, 2]  # "state" comes before "type"
    model = spread_out(PanFoMaForCellClassification(tiny_config(label_tasks=tasks)))
    generator = np.random.default_rng(0)
    cells = random_cells([0, 5, 21])
    batch = pad_batch(cells)
    dataset = cell_dataset(
        CellTokens(
            np.concatenate([cell["input_ids"][0] for cell in cells]).astype(np.int32),
            np.concatenate([cell["expression_bins"][0] for cell in cells]).astype(np.uint8),
            np.array([0, 0, 5, 26]),
        )
    )
    genes = LinearClassifier(generator.normal(size=(sum(sizes), 120)), generator.normal(size=sum(sizes)))
    weights = generator.uniform(0.1, 3, size=(len(sizes), 2))
    network = model(**batch).logits.detach().numpy()
    add_gene_logits(model, genes, weights)
    shares = np.repeat(weights / weights.sum(1, keepdims=True), sizes, axis=0)
    expected = network * shares[:, 0] + genes(bins_matrix(dataset, model.config, 4096)) * shares[:, 1]
    np.testing.assert_allclose(model(**batch).logits.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    assert model.config.use_gene_logits
    # Once more: what it had of such logits is replaced.
    nothing = LinearClassifier(np.zeros_like(genes.weight), np.zeros_like(genes.bias))
    before = model.classifier.weight.detach().clone()
    add_gene_logits(model, nothing, np.tile([1.0, 0.0], (len(sizes), 1)))
    torch.testing.assert_close(model.classifier.weight, before)
    assert not model.gene_logits.weight.any()


def test_bins_are_of_the_genes_that_the_model_reads():
    model = PanFoMaForCellClassification(tiny_config())
    tokens = CellTokens(
        np.array([5, 7, 9], dtype=np.int32), np.array([50, 25, 10], dtype=np.uint8), np.array([0, 3, 3])
    )
    dataset = cell_dataset(tokens)
    whole = bins_matrix(dataset, model.config, 10).toarray()
    assert whole.shape == (2, 120)
    np.testing.assert_allclose(whole[0, [5, 7, 9]], [1, 0.5, 0.2])
    assert not whole[1].any()
    np.testing.assert_allclose(bins_matrix(dataset, model.config, 2).toarray()[0, [5, 7, 9]], [1, 0.5, 0])
