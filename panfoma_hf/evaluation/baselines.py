"""What simple methods reach on the same split: the figures that stand beside PanFoMa's."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.special import log_expit, softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.sparsefuncs import mean_variance_axis

from ..data.variable_genes import log_normalized, variable_genes
from ..tokenization import choose_layer, choose_matrix, value_scale
from ..tokenization.expression import compressed_rows
from ..tokenization.value_scale import BINARY, COUNTS, EMPTY, FRACTIONAL, NORMALIZED
from .integration import harmony


NUM_GENES = 2000
NUM_COMPONENTS = 50
NUM_NEIGHBORS = 15
# Values that the logarithm is still to be taken of.
_BEFORE_LOG = (COUNTS, FRACTIONAL, NORMALIZED, BINARY)


@dataclass
class Predictions:
    """What a method says of cells.

    Parameters
    ----------
    names
        (labels,), those of the training cells, in the order of the alphabet.
    probabilities
        (cells, labels), which are scaled to rows of sum 1 in double precision.

    Raises
    ------
    ValueError
        If the shapes do not fit, or a cell has no probability above 0.
    """

    names: np.ndarray
    probabilities: np.ndarray

    def __post_init__(self):
        self.names = np.asarray(self.names).astype(str)
        probabilities = np.asarray(self.probabilities, dtype=np.float64)
        if probabilities.ndim != 2 or probabilities.shape[1] != len(self.names):
            raise ValueError(
                f"Probabilities are (cells, labels), got {probabilities.shape} for {len(self.names):,} labels. Give "
                "one column for each name."
            )
        total = probabilities.sum(axis=1, keepdims=True)
        broken = ~(np.isfinite(total[:, 0]) & (total[:, 0] > 0) & (probabilities >= 0).all(axis=1))
        if broken.any():
            raise ValueError(
                f"Probabilities are finite, at least 0 and not all 0, got other ones for {int(broken.sum()):,} of "
                f"{len(broken):,} cells. Look at what the method gave for them."
            )
        self.probabilities = probabilities / total

    @property
    def labels(self) -> np.ndarray:
        """(cells,), the most probable names."""
        return self.names[self.probabilities.argmax(1)]

    def ids(self, labels: Sequence[str]) -> np.ndarray:
        """(cells,), the columns of these labels, -1 for one that is no name."""
        return pd.Index(self.names).get_indexer(np.asarray(labels).astype(str))


# (train, test, label, *, seed, layer) -> Predictions. Both sides have the same genes; test labels are not read.
Classifier = Callable[..., Predictions]
# (cells, *, batch, seed, layer) -> (cells, dims).
Embedder = Callable[..., np.ndarray]


def majority_class(train_labels: Sequence[str], num_cells: int) -> np.ndarray:
    """Call every cell what most training cells are: (cells,) labels."""
    names, counts = np.unique(np.asarray(train_labels), return_counts=True)
    return np.full(num_cells, names[counts.argmax()])


def variable_genes_logistic_regression(
    train: ad.AnnData,
    test: ad.AnnData,
    label: str,
    *,
    num_genes: int = NUM_GENES,
    layer: str | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Logistic regression on the training cells' variable genes, scaled: the classical way to annotate.

    Parameters
    ----------
    train, test
        Cells with the same genes under names of their own, as counts or logarithms of normalised counts.
    label
        Column of ``train.obs``.
    num_genes
        Variable genes to use.
    layer
        As in `panfoma_hf.finetune`.
    seed
        Seed of the solver.

    Returns
    -------
    (test cells,), predicted labels.

    Raises
    ------
    ValueError
        If the genes differ.
    ImportError
        If scanpy is not installed.
    """
    return _hvg_logistic_regression(train, test, label, num_genes=num_genes, layer=layer, seed=seed).labels


def principal_components(
    cells: ad.AnnData,
    train: np.ndarray,
    *,
    num_components: int = NUM_COMPONENTS,
    seed: int = 0,
    layer: str | None = None,
) -> np.ndarray:
    """Principal components of log-normalised counts, found on the training cells: the classical embedding.

    Parameters
    ----------
    cells
        Counts; or logarithms of normalised counts, which are taken as they are.
    train
        Positions of the training cells.
    num_components
        Components to keep; fewer where there are fewer training cells or genes.
    seed
        Seed of the solver.
    layer
        As in `panfoma_hf.finetune`.

    Returns
    -------
    (cells, components).
    """
    matrix = log_matrix(cells, layer).X
    return _components(matrix[train], num_components, seed).transform(matrix)


def log_matrix(cells: ad.AnnData, layer: str | None = None) -> ad.AnnData:
    """Logarithms of normalised counts as CSR ``X``: made of counts, also such as CPM; or else values as they are.

    Raises
    ------
    ImportError
        If scanpy is not installed.
    """
    return _logarithms(cells, layer, _kind(cells, layer) in _BEFORE_LOG)


def _kind(cells: ad.AnnData, layer: str | None) -> str:
    matrix, _, source = choose_matrix(cells, layer)
    indptr, _, values = compressed_rows(matrix, source)
    return value_scale(indptr, values).kind


def _logarithms(cells: ad.AnnData, layer: str | None, are_made: bool) -> ad.AnnData:
    if are_made:
        return log_normalized(cells, layer)
    matrix, names, _ = choose_matrix(cells, layer)
    logs = ad.AnnData(sp.csr_matrix(matrix, dtype="float32"), obs=cells.obs[[]].copy())
    logs.var_names = names
    return logs


def _log_sides(train: ad.AnnData, test: ad.AnnData, layer: str | None) -> tuple[list[ad.AnnData], str]:
    """`log_matrix` of both sides, and the kind of the training cells' values, which counts for both.

    Few test cells do not tell: a cell whose counts are all 1 looks like counts after any step.
    """
    layer = choose_layer(train) if layer is None else layer
    kind, of_test = _kind(train, layer), _kind(test, layer)
    if (of_test == COUNTS and kind not in _BEFORE_LOG) or (kind == COUNTS and of_test not in (COUNTS, EMPTY, BINARY)):
        raise ValueError(
            f"Both sides must hold the same kind of values, got {kind} and {of_test}. Name a layer that has the same."
        )
    sides = [_logarithms(cells, layer, kind in _BEFORE_LOG) for cells in (train, test)]
    _check_genes(*sides)
    return sides, kind


def _components(matrix: sp.csr_matrix, num_components: int, seed: int) -> PCA:
    most = min(matrix.shape) - 1  # what ARPACK finds
    if most < 1:
        raise ValueError(
            f"Principal components need at least two cells and two genes, got {matrix.shape[0]:,} and "
            f"{matrix.shape[1]:,}. Add some."
        )
    return PCA(min(num_components, most), svd_solver="arpack", random_state=seed).fit(matrix)


def majority(
    train: ad.AnnData, test: ad.AnnData, label: str, *, seed: int = 0, layer: str | None = None
) -> Predictions:
    """The shares of the training labels, whatever the cell."""
    names, counts = np.unique(_names(train, label), return_counts=True)
    return Predictions(names, np.tile(counts / counts.sum(), (test.n_obs, 1)))


def _hvg_logistic_regression(
    train: ad.AnnData,
    test: ad.AnnData,
    label: str,
    *,
    num_genes: int = NUM_GENES,
    seed: int = 0,
    layer: str | None = None,
) -> Predictions:
    names = _names(train, label)
    (logs, of_test), kind = _log_sides(train, test, layer)
    if len(set(names)) < 2:
        return majority(train, test, label)
    chosen = _variable_columns(train, logs, kind, num_genes, layer)
    features = [side.X[:, chosen].toarray() for side in (logs, of_test)]
    scaler = StandardScaler().fit(features[0])
    # The clip keeps a gene that few training cells express from blowing up in a test cell, as is usual after scaling.
    features = [np.clip(scaler.transform(matrix), -10, 10) for matrix in features]
    return _fitted(LogisticRegression(max_iter=1000, random_state=seed), *features, names)


def _variable_columns(cells: ad.AnnData, logs: ad.AnnData, kind: str, num_genes: int, layer: str | None) -> np.ndarray:
    """Columns of variable genes, ascending: by Pearson residuals, which need counts; of logarithms by variance."""
    if kind == COUNTS:
        matrix, names, _ = choose_matrix(cells, layer)
        counts = ad.AnnData(sp.csr_matrix(matrix), obs=cells.obs[[]].copy())
        counts.var_names = np.arange(len(names)).astype(str)  # names of their own, which genes need not have
        return np.sort(np.array(variable_genes(counts, num_genes, layer="X"), dtype=np.int64))
    _, variances = mean_variance_axis(logs.X, axis=0)
    return np.sort(np.argsort(-variances, kind="stable")[:num_genes])


def _on_components(train: ad.AnnData, test: ad.AnnData, label: str, model, layer: str | None, seed: int) -> Predictions:
    """Fit a model on components found on the training cells."""
    names = _names(train, label)
    (logs, of_test), _ = _log_sides(train, test, layer)
    if len(set(names)) < 2:
        return majority(train, test, label)
    found = _components(logs.X, NUM_COMPONENTS, seed)
    return _fitted(model, found.transform(logs.X), found.transform(of_test.X), names)


def pca_knn(train: ad.AnnData, test: ad.AnnData, label: str, *, seed: int = 0, layer: str | None = None) -> Predictions:
    """The 15 nearest training cells among 50 principal components vote."""
    return _on_components(train, test, label, _neighbors(train.n_obs), layer, seed)


def pca_logistic_regression(
    train: ad.AnnData, test: ad.AnnData, label: str, *, seed: int = 0, layer: str | None = None
) -> Predictions:
    """Logistic regression on 50 standardised principal components."""
    return _on_components(train, test, label, _logistic(seed), layer, seed)


def celltypist(
    train: ad.AnnData, test: ad.AnnData, label: str, *, seed: int = 0, layer: str | None = None
) -> Predictions:
    """CellTypist (Domínguez Conde et al., Science 2022), trained on the training cells by its default solver.

    Its probabilities are of each label against the rest; here they are scaled to a sum of 1.

    Raises
    ------
    ImportError
        If celltypist is not installed.
    """
    names = _names(train, label)
    sides, _ = _log_sides(train, test, layer)
    if len(set(names)) < 2:
        return majority(train, test, label)
    with warnings.catch_warnings(), _quiet("celltypist"):
        warnings.simplefilter("ignore")  # its own use of scanpy, pandas and scikit-learn
        package = _required("celltypist", "CellTypist", "benchmark")
        for side in sides:
            side.var_names = np.arange(side.n_vars).astype(str)  # names of their own, which genes need not have
        with _one_against_the_rest():
            model = package.train(sides[0], labels=names, check_expression=False, n_jobs=1, random_state=seed)
        # As its own prediction: scaled, clipped, then the decisions of each label.
        matrix = sides[1].X[:, model.features.astype(np.int64)].toarray()
        scaled = np.minimum((matrix - model.scaler.mean_) / model.scaler.scale_, 10)
        decisions = model.classifier.decision_function(scaled)
    if decisions.ndim == 1:
        decisions = np.stack([-decisions, decisions], axis=1)
    # softmax(log(p)) is p over its sum, and stays exact where no label is likely.
    probabilities = softmax(log_expit(decisions), axis=1)
    # Of labels whose probabilities are all 1 to rounding, the decisions tell which comes first.
    probabilities[np.arange(len(decisions)), decisions.argmax(1)] += 1e-12
    return Predictions(model.classifier.classes_, probabilities)


@contextlib.contextmanager
def _one_against_the_rest() -> Iterator[None]:
    """Fit CellTypist's default, logistic regression of each label against the rest, with any scikit-learn.

    It asks for it by ``multi_class="ovr"``, which scikit-learn 1.8 took away in favour of `OneVsRestClassifier`. Its
    stochastic gradient descent runs as it is, but on a few hundred cells is up to 0.3 of macro-F1 behind.
    """
    module = importlib.import_module("celltypist.train")
    before = module.LogisticRegression
    module.LogisticRegression = _one_vs_rest
    try:
        yield
    finally:
        module.LogisticRegression = before


def _one_vs_rest(*, multi_class: str = "ovr", n_jobs: int | None = None, **options) -> OneVsRestClassifier:
    return OneVsRestClassifier(LogisticRegression(**options), n_jobs=n_jobs)


def scanvi(train: ad.AnnData, test: ad.AnnData, label: str, *, seed: int = 0, layer: str | None = None) -> Predictions:
    """ScANVI (Xu et al., Molecular Systems Biology 2021), which reads the test cells' counts, but not their labels.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    ValueError
        If the genes differ or the values are not counts.
    """
    names = _names(train, label)
    sides = [_counts(cells, layer) for cells in (train, test)]
    _check_genes(*sides)
    package = _required("scvi", "scANVI", "scvi")
    if len(set(names)) < 2:
        return majority(train, test, label)
    unlabelled = "panfoma: not labelled"
    for side in sides:
        side.var_names_make_unique()
    both = ad.concat(sides, index_unique="-", keys=["train", "test"])
    both.obs["label"] = np.concatenate([names, np.full(test.n_obs, unlabelled)])
    package.settings.seed = seed
    package.model.SCVI.setup_anndata(both, labels_key="label")
    body = package.model.SCVI(both)
    body.train(enable_progress_bar=False)
    model = package.model.SCANVI.from_scvi_model(body, unlabeled_category=unlabelled, labels_key="label")
    model.train(enable_progress_bar=False)
    probabilities = model.predict(both[train.n_obs :].copy(), soft=True)
    names = np.unique(names)
    return Predictions(names, probabilities[names].to_numpy())


def embedding_classifier(key: str, method: str = "knn") -> Classifier:
    """Score embeddings that cells bring along in ``obsm[key]``.

    Parameters
    ----------
    key
        Key of ``obsm`` of both sides.
    method
        "knn", 15 neighbours; or "logistic_regression", on standardised embeddings.

    Raises
    ------
    ValueError
        If there is no such method; when called, if there are no such embeddings or they are not finite.
    """
    if method not in ("knn", "logistic_regression"):
        raise ValueError(f"`method` is 'knn' or 'logistic_regression', got {method!r}. Use one of these.")
    return partial(_of_embeddings, key=key, method=method)


def _of_embeddings(
    train: ad.AnnData,
    test: ad.AnnData,
    label: str,
    *,
    key: str,
    method: str,
    seed: int = 0,
    layer: str | None = None,
) -> Predictions:
    features = [embedding_of(cells, key) for cells in (train, test)]
    if features[0].shape[1] != features[1].shape[1]:
        raise ValueError(
            f"Both sides must have embeddings of the same kind, got {features[0].shape[1]:,} and "
            f"{features[1].shape[1]:,} dimensions in obsm[{key!r}]. Embed them by one model."
        )
    model = _neighbors(train.n_obs) if method == "knn" else _logistic(seed)
    return _fitted(model, *features, _names(train, label))


def embedding_of(cells: ad.AnnData, key: str) -> np.ndarray:
    """(cells, dims), what is in ``obsm[key]``.

    Raises
    ------
    ValueError
        If it is not there or not finite.
    """
    if key not in cells.obsm:
        raise ValueError(
            f"Embeddings are scored by their key of obsm, got {key!r}; there are {sorted(cells.obsm)}. Name one of "
            "these, or write the embeddings there."
        )
    features = np.asarray(cells.obsm[key], dtype=np.float64)
    if features.ndim != 2 or not np.isfinite(features).all():
        raise ValueError(
            f"Embeddings must be finite and (cells, dims), got obsm[{key!r}] of shape {features.shape} with "
            f"{int((~np.isfinite(features)).sum()):,} values that are not finite. Leave these cells out."
        )
    return features


def _neighbors(num_cells: int) -> KNeighborsClassifier:
    return KNeighborsClassifier(min(NUM_NEIGHBORS, num_cells))


def _logistic(seed: int):
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, random_state=seed))


def _fitted(model, train: np.ndarray, test: np.ndarray, names: np.ndarray) -> Predictions:
    if len(set(names)) < 2:  # nothing to tell apart, which scikit-learn refuses
        return Predictions(np.unique(names), np.ones((len(test), 1)))
    model.fit(train, names)
    return Predictions(model.classes_, model.predict_proba(test))


def _names(cells: ad.AnnData, label: str) -> np.ndarray:
    """(cells,), labels as text."""
    if label not in cells.obs:
        raise ValueError(
            f"The label is a column of obs, got {label!r}; there are {', '.join(cells.obs)}. Name one of these."
        )
    missing = int(cells.obs[label].isna().sum())
    if missing:
        raise ValueError(
            f"Every training cell needs a label, got none in {label!r} for {missing:,} of {cells.n_obs:,}. Leave these "
            f"out: cells[cells.obs[{label!r}].notna()]."
        )
    return cells.obs[label].to_numpy().astype(str)


def _counts(cells: ad.AnnData, layer: str | None) -> ad.AnnData:
    matrix, names, source = choose_matrix(cells, layer)
    counts = ad.AnnData(sp.csr_matrix(matrix, dtype="float32"), obs=cells.obs[[]].copy())
    if (counts.X.data % 1).any() or (counts.X.data < 0).any():
        raise ValueError(
            f"scVI reads counts, got values in {source} that are no whole numbers. Name the counts' layer."
        )
    counts.var_names = names
    return counts


def _check_genes(train: ad.AnnData, test: ad.AnnData) -> None:
    if not train.var_names.equals(test.var_names):
        raise ValueError(
            f"Both sides must have the same genes in the same order, got {train.n_vars:,} and {test.n_vars:,}, "
            f"{len(train.var_names.intersection(test.var_names)):,} of them shared. "
            "Keep the shared ones: genes = train.var_names.intersection(test.var_names), then [:, genes] of both."
        )


def _required(module: str, name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{name} is not installed. Run `pip install panfoma-hf[{extra}]`.") from error


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    target = logging.getLogger(logger)
    level = target.level
    target.setLevel(logging.ERROR)
    try:
        yield
    finally:
        target.setLevel(level)


CLASSIFIERS: dict[str, Classifier] = {
    "majority": majority,
    "hvg_logistic_regression": _hvg_logistic_regression,
    "pca_knn": pca_knn,
    "pca_logistic_regression": pca_logistic_regression,
    "celltypist": celltypist,
    "scanvi": scanvi,
}


def pca(cells: ad.AnnData, *, batch: str | None = None, seed: int = 0, layer: str | None = None) -> np.ndarray:
    """(cells, 50), principal components of 2,000 variable genes, log-normalised."""
    kind = _kind(cells, layer)
    logs = _logarithms(cells, layer, kind in _BEFORE_LOG)
    matrix = logs.X[:, _variable_columns(cells, logs, kind, NUM_GENES, layer)]
    return _components(matrix, NUM_COMPONENTS, seed).transform(matrix)


def pca_harmony(cells: ad.AnnData, *, batch: str | None = None, seed: int = 0, layer: str | None = None) -> np.ndarray:
    """(cells, 50), `pca` with the batches of ``obs[batch]`` brought together by `harmony`.

    Raises
    ------
    ImportError
        If harmonypy is not installed.
    ValueError
        If there is no such column, or a cell has no batch.
    """
    batches = _batches(cells, batch)
    return harmony(pca(cells, seed=seed, layer=layer), batches, seed=seed)


def _batches(cells: ad.AnnData, batch: str | None) -> np.ndarray:
    """(cells,), names of batches."""
    if batch not in cells.obs:
        raise ValueError(
            f"Batches are a column of obs, got {batch!r}; there are {', '.join(cells.obs)}. Name one of these."
        )
    missing = int(cells.obs[batch].isna().sum())
    if missing:  # as text, they would be a batch of their own
        raise ValueError(
            f"Every cell needs a batch, got none in {batch!r} for {missing:,} of {cells.n_obs:,}. Leave these out: "
            f"cells[cells.obs[{batch!r}].notna()]."
        )
    return cells.obs[batch].to_numpy().astype(str)


def scvi(cells: ad.AnnData, *, batch: str | None = None, seed: int = 0, layer: str | None = None) -> np.ndarray:
    """(cells, 10), the latent space of scVI (Lopez et al., Nature Methods 2018), which is told the batches.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    ValueError
        If the values are not counts, there is no such column, or a cell has no batch.
    """
    package = _required("scvi", "scVI", "scvi")
    counts = _counts(cells, layer)
    counts.var_names_make_unique()
    if batch is not None:
        counts.obs["batch"] = _batches(cells, batch)
    package.settings.seed = seed
    package.model.SCVI.setup_anndata(counts, batch_key=None if batch is None else "batch")
    model = package.model.SCVI(counts)
    model.train(enable_progress_bar=False)
    return model.get_latent_representation()


def of_obsm(key: str) -> Embedder:
    """Embeddings that cells bring along in ``obsm[key]``, behind the interface of `EMBEDDERS`."""
    return partial(_of_obsm, key=key)


def _of_obsm(cells: ad.AnnData, *, key: str, batch: str | None = None, seed: int = 0, layer: str | None = None):
    return embedding_of(cells, key)


EMBEDDERS: dict[str, Embedder] = {"pca": pca, "pca_harmony": pca_harmony, "scvi": scvi}
