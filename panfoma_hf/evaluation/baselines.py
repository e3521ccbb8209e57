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
import scipy.sparse as sp
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..data.variable_genes import log_normalized, variable_genes
from ..tokenization import choose_matrix
from .integration import harmony


NUM_GENES = 2000
NUM_COMPONENTS = 50
NUM_NEIGHBORS = 15


@dataclass
class Predictions:
    """What a method says of cells.

    Parameters
    ----------
    names
        (labels,), those of the training cells, in the order of the alphabet.
    probabilities
        (cells, labels), rows of sum 1.
    """

    names: np.ndarray
    probabilities: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """(cells,), the most probable names."""
        return self.names[self.probabilities.argmax(1)]


# (train, test, label, *, seed, layer) -> Predictions. Both sides have the same genes; the test cells' labels are not read.
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
    most = min(len(train), matrix.shape[1]) - 1
    components = PCA(min(num_components, most), svd_solver="arpack", random_state=seed).fit(matrix[train])
    return components.transform(matrix)


def log_matrix(cells: ad.AnnData, layer: str | None = None) -> ad.AnnData:
    """Logarithms of normalised counts as CSR ``X``: made of counts, or taken as they are.

    Raises
    ------
    ImportError
        If scanpy is not installed.
    """
    matrix, names, _ = choose_matrix(cells, layer)
    if _is_counts(matrix):
        return log_normalized(cells, layer)
    logs = ad.AnnData(sp.csr_matrix(matrix, dtype="float32"), obs=cells.obs[[]].copy())
    logs.var_names = names
    return logs


def _is_counts(matrix) -> bool:
    values = sp.csr_matrix(matrix[:50]).data
    return np.array_equal(values, np.round(values))


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
    features = _variable_features(train, test, num_genes, layer)
    scaler = StandardScaler().fit(features[0])
    # The clip keeps a gene that few training cells express from blowing up in a test cell, as is usual after scaling.
    features = [np.clip(scaler.transform(matrix), -10, 10) for matrix in features]
    return _fitted(LogisticRegression(max_iter=1000, random_state=seed), *features, _names(train, label))


def _variable_features(train, test, num_genes: int, layer: str | None) -> list[np.ndarray]:
    """Log-normalised variable genes of both sides, (cells, genes) each."""
    _check_genes(train, test)
    matrix, _, _ = choose_matrix(train, layer)
    logs = [log_matrix(cells, layer) for cells in (train, test)]
    if _is_counts(matrix):
        names = logs[0].var_names
        if names.has_duplicates:  # found by position, under names of their own
            unique = [str(index) for index in range(len(names))]
            counts = ad.AnnData(sp.csr_matrix(matrix), obs=train.obs[[]].copy(), var={"name": unique})
            counts.var_names = unique
            chosen = np.array([int(name) for name in variable_genes(counts, num_genes)])
        else:
            chosen = names.get_indexer(variable_genes(train, num_genes, layer=layer))
    else:  # Pearson residuals need counts; of logarithms the variance tells.
        values = logs[0].X
        variances = (
            np.asarray(values.multiply(values).mean(axis=0)).ravel() - np.asarray(values.mean(axis=0)).ravel() ** 2
        )
        chosen = np.sort(np.argsort(-variances, kind="stable")[:num_genes])
    return [np.asarray(cells.X[:, chosen].todense()) for cells in logs]


def _pca(train, test, layer: str | None, seed: int) -> list[np.ndarray]:
    """Components found on the training cells, of both sides."""
    _check_genes(train, test)
    both = [log_matrix(cells, layer).X for cells in (train, test)]
    most = min(both[0].shape) - 1
    found = PCA(min(NUM_COMPONENTS, most), svd_solver="arpack", random_state=seed).fit(both[0])
    return [found.transform(matrix) for matrix in both]


def pca_knn(train: ad.AnnData, test: ad.AnnData, label: str, *, seed: int = 0, layer: str | None = None) -> Predictions:
    """The 15 nearest training cells among 50 principal components vote."""
    return _fitted(_neighbors(train.n_obs), *_pca(train, test, layer, seed), _names(train, label))


def pca_logistic_regression(
    train: ad.AnnData, test: ad.AnnData, label: str, *, seed: int = 0, layer: str | None = None
) -> Predictions:
    """Logistic regression on 50 standardised principal components."""
    return _fitted(_logistic(seed), *_pca(train, test, layer, seed), _names(train, label))


def celltypist(
    train: ad.AnnData, test: ad.AnnData, label: str, *, seed: int = 0, layer: str | None = None
) -> Predictions:
    """CellTypist (Domínguez Conde et al., Science 2022), trained on the training cells.

    Its probabilities are of each label against the rest; here they are scaled to a sum of 1.

    Raises
    ------
    ImportError
        If celltypist is not installed.
    """
    _check_genes(train, test)
    names = _names(train, label)
    if len(set(names)) < 2:
        return majority(train, test, label)
    with warnings.catch_warnings(), _quiet("celltypist"):
        warnings.simplefilter("ignore")  # its own use of scanpy, pandas and scikit-learn
        package = _required("celltypist", "CellTypist", "benchmark")
        logs = [log_matrix(cells, layer) for cells in (train, test)]
        for side in logs:
            side.var_names_make_unique()
        # By its stochastic gradient descent: its other solver asks scikit-learn for an argument that 1.8 took away.
        model = package.train(logs[0], labels=names, check_expression=False, n_jobs=1, use_SGD=True, random_state=seed)
        if not any(gene in logs[1].var_names for gene in model.features):
            raise ValueError("CellTypist needs genes that vary, got none. Check the counts.")
        classifier = model.classifier
        matrix = logs[1][:, model.features].X.toarray()
        # As its own prediction: scaled, clipped, then the decisions of each label.
        scaled = np.minimum((matrix - model.scaler.mean_) / model.scaler.scale_, 10)
        decisions = classifier.decision_function(scaled)
    if decisions.ndim == 1:
        decisions = np.stack([-decisions, decisions], axis=1)
    shares = 1 / (1 + np.exp(-np.clip(decisions, -500, 500)))
    total = shares.sum(axis=1, keepdims=True)
    # Where no label is likely, the decisions tell which is the least unlikely.
    probabilities = np.where(total > 1e-9, shares / np.maximum(total, 1e-9), softmax(decisions, axis=1))
    return Predictions(np.asarray(classifier.classes_).astype(str), probabilities)


def scanvi(train: ad.AnnData, test: ad.AnnData, label: str, *, seed: int = 0, layer: str | None = None) -> Predictions:
    """ScANVI (Xu et al., Molecular Systems Biology 2021), which reads the test cells' counts, but not their labels.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    ValueError
        If the genes differ or the values are not counts.
    """
    _check_genes(train, test)
    scvi = _required("scvi", "scANVI", "scvi")
    unknown = "unknown"
    both = ad.concat([_counts(train, layer), _counts(test, layer)])
    both.obs_names_make_unique()
    both.obs["label"] = np.concatenate([_names(train, label), np.full(test.n_obs, unknown)])
    scvi.settings.seed = seed
    scvi.model.SCVI.setup_anndata(both, labels_key="label")
    body = scvi.model.SCVI(both)
    body.train(enable_progress_bar=False)
    model = scvi.model.SCANVI.from_scvi_model(body, unlabeled_category=unknown, labels_key="label")
    model.train(enable_progress_bar=False)
    probabilities = model.predict(both[train.n_obs :].copy(), soft=True)
    names = np.unique(_names(train, label))
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

    def classify(train, test, label, *, seed: int = 0, layer: str | None = None) -> Predictions:
        features = [embedding_of(cells, key) for cells in (train, test)]
        model = _neighbors(train.n_obs) if method == "knn" else _logistic(seed)
        return _fitted(model, *features, _names(train, label))

    return classify


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
    return cells.obs[label].astype(str).to_numpy().astype(str)


def _counts(cells: ad.AnnData, layer: str | None) -> ad.AnnData:
    matrix, names, source = choose_matrix(cells, layer)
    if not _is_counts(matrix):
        raise ValueError(
            f"scVI reads counts, got values in {source} that are no whole numbers. Name the counts' layer."
        )
    counts = ad.AnnData(sp.csr_matrix(matrix, dtype="float32"), obs=cells.obs[[]].copy())
    counts.var_names = names
    counts.var_names_make_unique()
    return counts


def _check_genes(train: ad.AnnData, test: ad.AnnData) -> None:
    if not train.var_names.equals(test.var_names):
        raise ValueError(
            f"Both sides must have the same genes in the same order, got {train.n_vars:,} and {test.n_vars:,}, "
            f"{len(train.var_names.intersection(test.var_names)):,} of them shared. "
            "Keep the shared ones: genes = train.var_names.intersection(test.var_names); train[:, genes], test[:, genes]."
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
    matrix = _variable_features(cells, cells[:1], NUM_GENES, layer)[0]
    most = min(matrix.shape) - 1
    return PCA(min(NUM_COMPONENTS, most), svd_solver="arpack", random_state=seed).fit_transform(matrix)


def pca_harmony(cells: ad.AnnData, *, batch: str, seed: int = 0, layer: str | None = None) -> np.ndarray:
    """(cells, 50), `pca` with the batches of ``obs[batch]`` brought together by `harmony`."""
    return harmony(pca(cells, seed=seed, layer=layer), cells.obs[batch].astype(str).to_numpy(), seed=seed)


def scvi(cells: ad.AnnData, *, batch: str | None = None, seed: int = 0, layer: str | None = None) -> np.ndarray:
    """(cells, 10), the latent space of scVI (Lopez et al., Nature Methods 2018), which is told the batches.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    ValueError
        If the values are not counts.
    """
    package = _required("scvi", "scVI", "scvi")
    counts = _counts(cells, layer)
    if batch is not None:
        counts.obs["batch"] = cells.obs[batch].astype(str).to_numpy()
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
