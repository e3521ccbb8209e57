"""What simple methods reach on the same split: the figures that stand beside PanFoMa's."""

from collections.abc import Sequence

import anndata as ad
import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ..data.variable_genes import log_normalized, variable_genes


def majority_class(train_labels: Sequence[str], num_cells: int) -> np.ndarray:
    """Call every cell what most training cells are: (cells,) labels."""
    names, counts = np.unique(np.asarray(train_labels), return_counts=True)
    return np.full(num_cells, names[counts.argmax()])


def variable_genes_logistic_regression(
    train: ad.AnnData, test: ad.AnnData, label: str, *, num_genes: int = 2000, layer: str | None = None, seed: int = 0
) -> np.ndarray:
    """Logistic regression on the training cells' variable genes, scaled: the classical way to annotate.

    Parameters
    ----------
    train, test
        Cells with the same genes under names of their own, as counts.
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
    """
    genes = variable_genes(train, num_genes, layer=layer)
    train_matrix, test_matrix = (log_normalized(cells, layer)[:, genes].X.toarray() for cells in (train, test))
    # The clip keeps a gene that few training cells express from blowing up in a test cell, as is usual after scaling.
    scaler = StandardScaler().fit(train_matrix)
    train_matrix, test_matrix = (np.clip(scaler.transform(matrix), -10, 10) for matrix in (train_matrix, test_matrix))
    model = LogisticRegression(max_iter=1000, random_state=seed)
    return model.fit(train_matrix, train.obs[label].astype(str)).predict(test_matrix)


def principal_components(
    cells: ad.AnnData, train: np.ndarray, *, num_components: int = 50, seed: int = 0
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

    Returns
    -------
    (cells, components).
    """
    is_log = not np.array_equal(cells.X[:50].data, np.round(cells.X[:50].data))
    matrix = cells.X if is_log else log_normalized(cells).X
    most = min(len(train), matrix.shape[1]) - 1
    components = PCA(min(num_components, most), svd_solver="arpack", random_state=seed).fit(matrix[train])
    return components.transform(matrix)
