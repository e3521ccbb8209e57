"""Classifiers solved, not trained by steps: logistic regression on cell embeddings and on the bins of genes."""

import warnings
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import scipy.sparse as sp
import torch
from datasets import Dataset
from scipy import optimize
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ..data import schema
from ..modeling import PanFoMaConfig, PanFoMaForCellClassification


# Inverse strengths of L2 that are tried on validation cells, and the one that is taken without any. See docs/log.md.
EMBEDDING_STRENGTHS, EMBEDDING_STRENGTH = (0.01, 0.1, 1.0), 0.1
GENE_STRENGTHS, GENE_STRENGTH = (0.3, 1.0, 3.0), 1.0
# Cells that a regression is solved on; more add little and take long.
MOST_CELLS = 20_000
# No part of the classifier weighs more than this beside logits as they were solved.
MOST_WEIGHT = 10.0


class LinearClassifier:
    """A linear function, ``features @ weight.T + bias``, of each task's labels side by side.

    Parameters
    ----------
    weight
        (labels, features).
    bias
        (labels,).
    strengths
        (tasks,), the inverse strengths of L2 that it was solved with.
    """

    def __init__(self, weight: np.ndarray, bias: np.ndarray, strengths: Sequence[float] = ()):
        self.weight, self.bias, self.strengths = weight, bias, list(strengths)

    def __call__(self, features: np.ndarray | sp.csr_matrix) -> np.ndarray:
        """(cells, labels), logits of features (cells, features)."""
        return np.asarray(features @ self.weight.T) + self.bias


def solve(
    features: np.ndarray | sp.csr_matrix,
    labels: np.ndarray,
    sizes: Sequence[int],
    class_weights: np.ndarray,
    validation: tuple[np.ndarray | sp.csr_matrix, np.ndarray] | None,
    strengths: Sequence[float],
    default: float | Sequence[float],
    seed: int,
) -> LinearClassifier:
    """L2-regularised multinomial logistic regression for each task.

    Parameters
    ----------
    features
        (cells, features), dense ones standardised.
    labels
        (cells, tasks), ids within each task, -100 where a label is not known.
    sizes
        Labels of each task.
    class_weights
        (labels,), weights in the loss.
    validation
        Features and labels of the cells on which the inverse strength is chosen, by cross-entropy; or None.
    strengths, default
        Those to try, and the one to take without validation cells, of all tasks or of each.
    seed
        Of the draw where there are more than `MOST_CELLS` cells.
    """
    drawn = draw_cells(labels, seed)
    features, labels = features[drawn], labels[drawn]
    defaults = np.broadcast_to(default, len(sizes)).tolist()
    parts = []
    for task, (size, weights) in enumerate(zip(sizes, np.split(class_weights, np.cumsum(sizes)[:-1]), strict=True)):
        known = np.flatnonzero(labels[:, task] >= 0)
        told = None
        if validation is not None and (validation[1][:, task] >= 0).any():
            rows = np.flatnonzero(validation[1][:, task] >= 0)
            told = validation[0][rows], validation[1][rows, task]
        best, best_loss = None, np.inf
        for strength in strengths if told is not None else (defaults[task],):
            solved = _solve_task(features[known], labels[known, task], size, weights, strength)
            loss = 0.0 if told is None else cross_entropy(solved(told[0]), told[1])
            if best is None or loss < best_loss:
                best, best_loss = solved, loss
        parts.append(best)
    return LinearClassifier(
        np.concatenate([part.weight for part in parts]),
        np.concatenate([part.bias for part in parts]),
        [strength for part in parts for strength in part.strengths],
    )


def draw_cells(labels: np.ndarray, seed: int, most: int | None = None) -> np.ndarray:
    """Positions of at most `MOST_CELLS` cells, ascending; a label that the cells have is among those drawn.

    Parameters
    ----------
    labels
        (cells, tasks), as in `solve`.
    seed
        Of the draw.
    most
        Cells to draw; None takes `MOST_CELLS`.
    """
    most = MOST_CELLS if most is None else most
    if len(labels) <= most:
        return np.arange(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    of_each_label = np.unique(np.concatenate([np.unique(task, return_index=True)[1] for task in labels[order].T]))
    return np.sort(np.concatenate([order[of_each_label], np.delete(order, of_each_label)])[:most])


def _solve_task(features, labels: np.ndarray, size: int, weights: np.ndarray, strength: float) -> LinearClassifier:
    weight, bias = np.zeros((size, features.shape[1])), np.zeros(size)
    present = np.unique(labels)
    if len(present) == 1:
        bias[present] = 1.0
        return LinearClassifier(weight, bias, [strength])
    # A gene that no cell has keeps a weight of 0, and most of the vocabulary is such genes.
    used = np.flatnonzero(features.getnnz(axis=0)) if sp.issparse(features) else np.arange(features.shape[1])
    # More steps move predictions by less than what another draw of cells does.
    model = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(features[:, used], labels, sample_weight=weights[labels])
    coefficients, intercepts = model.coef_, model.intercept_
    if len(present) == 2:  # scikit-learn gives the logit of the second class alone
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight[np.ix_(present, used)], bias[present] = coefficients, intercepts
    bias[np.setdiff1d(np.arange(size), present)] = intercepts.min() - 5  # a label that no training cell has
    return LinearClassifier(weight, bias, [strength])


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of logits (cells, labels) and ids (cells,)."""
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def standardised(solver, train: np.ndarray, validation: np.ndarray | None) -> LinearClassifier:
    """Solve on standardised embeddings; the classifier that comes back takes them as they are.

    Parameters
    ----------
    solver
        Called with standardised training and validation embeddings, gives a `LinearClassifier`.
    train, validation
        (cells, hidden), embeddings.
    """
    scaler = StandardScaler().fit(train)
    solved = solver(scaler.transform(train), None if validation is None else scaler.transform(validation))
    weight = solved.weight / scaler.scale_
    return LinearClassifier(weight, solved.bias - weight @ scaler.mean_, solved.strengths)


def bins_matrix(dataset: Dataset, config: PanFoMaConfig, max_genes: int) -> sp.csr_matrix:
    """(cells, vocab), bins as shares of the highest, of the genes that the model reads of each cell."""
    columns = dataset.select_columns([schema.INPUT_IDS, schema.EXPRESSION_BINS])[:]
    ids = [np.asarray(cell)[:max_genes] for cell in columns[schema.INPUT_IDS]]
    bins = [np.asarray(cell)[:max_genes] for cell in columns[schema.EXPRESSION_BINS]]
    indptr = np.concatenate([[0], np.cumsum([len(cell) for cell in ids])])
    data = np.concatenate(bins).astype(np.float32) / config.num_expression_bins
    return sp.csr_matrix((data, np.concatenate(ids), indptr), shape=(len(ids), config.vocab_size))


def write_classifier(model: PanFoMaForCellClassification, classifier: LinearClassifier) -> None:
    """Put a classifier of cell embeddings into a model."""
    layer = model.classifier
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(classifier.weight))
        layer.bias.copy_(torch.as_tensor(classifier.bias))


def pool(network: np.ndarray, genes: np.ndarray, labels: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Weights of the network's logits and of the genes', for each task, that minimise the cross-entropy.

    A log-linear pool of two opinions; the loss is convex in the weights. Targets are smoothed by one cell, so that
    weights stay finite where no cell is wrong.

    Parameters
    ----------
    network, genes
        (cells, labels), logits of validation cells.
    labels
        (cells, tasks), as in `solve`.
    sizes
        Labels of each task.

    Returns
    -------
    (tasks, 2), not negative; a half each for a task without validation cells.
    """
    weights = np.full((len(sizes), 2), 0.5)
    for task, (start, stop) in enumerate(pairwise(np.cumsum([0, *sizes]))):
        rows = np.flatnonzero(labels[:, task] >= 0)
        if not len(rows):
            continue
        parts = np.stack([network[rows, start:stop], genes[rows, start:stop]])
        smoothing = 1 / (len(rows) + 2)
        targets = np.full(parts.shape[1:], smoothing / (stop - start))
        targets[np.arange(len(rows)), labels[rows, task]] += 1 - smoothing

        def loss(pair, parts=parts, targets=targets):
            log_probabilities = log_softmax(np.tensordot(pair, parts, 1), axis=1)
            gradient = np.einsum("pcl,cl->p", parts, np.exp(log_probabilities) - targets) / len(targets)
            return -(targets * log_probabilities).sum() / len(targets), gradient

        found = optimize.minimize(loss, [0.5, 0.5], jac=True, bounds=[(0, MOST_WEIGHT)] * 2, method="L-BFGS-B")
        if found.x.sum() > 0:
            weights[task] = found.x
    return weights


def add_gene_logits(model: PanFoMaForCellClassification, genes: LinearClassifier, weights: np.ndarray) -> None:
    """Give a model logits of genes beside its classifier of embeddings, each weighed.

    Parameters
    ----------
    model
        A classifier; what it had of such logits is replaced.
    genes
        Of bins (cells, vocab).
    weights
        (tasks, 2), as `pool` gives them. They are scaled to a sum of 1, which leaves the temperature to calibration.
    """
    sizes = [len(names) for names in model.config.tasks.values()]
    shares = np.repeat(weights / weights.sum(1, keepdims=True), sizes, axis=0)
    network, linear = (torch.as_tensor(share, dtype=model.classifier.weight.dtype) for share in shares.T)
    device = model.classifier.weight.device
    table = torch.nn.EmbeddingBag(model.config.vocab_size, model.num_labels, mode="sum").to(model.classifier.weight)
    with torch.no_grad():
        table.weight.copy_(torch.as_tensor((genes.weight * linear.double().numpy()[:, None]).T))
        model.classifier.weight.mul_(network.to(device)[:, None])
        model.classifier.bias.mul_(network.to(device)).add_((torch.as_tensor(genes.bias) * linear).to(device))
    model.gene_logits = table
    model.config.use_gene_logits = True
