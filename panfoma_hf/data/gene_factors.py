"""How genes go together in cells: factors of genes that a model can start from."""

from collections.abc import Iterable

import numpy as np
import scipy.sparse as sp
from datasets import Dataset
from sklearn.utils.extmath import randomized_svd

from .bin_frequencies import token_batches


# Genes of fewer cells have no factors: the singular vectors would be noise for them.
MIN_CELLS = 10


def gene_factors(
    dataset: Dataset, vocab_size: int, num_factors: int, *, max_cells: int = 20_000, seed: int = 0
) -> np.ndarray:
    """Factors of genes by truncated singular value decomposition of their bins in each cell.

    Each gene's column is divided by its standard deviation. The first factor, a cell's number of genes, is left out.
    The others, times the square roots of their singular values, are rotated at random, so that no dimension of a model
    stands for more than another, and each gene's are brought to one length. It is latent semantic analysis (Deerwester
    et al., JASIS 1990) with cells for documents and genes for words.

    Parameters
    ----------
    dataset
        Cells in the columns of a corpus.
    vocab_size
        Rows of the result.
    num_factors
        Columns of the result; of fewer cells or genes, fewer directions differ from zero.
    max_cells
        Most cells to look at, drawn at random.
    seed
        Seed of the draw, the solver and the rotation.

    Returns
    -------
    (vocab, factors) float32, root mean square 1 in each row; 0 for genes that fewer than 10 cells express, or all.
    """
    generator = np.random.default_rng(seed)
    if len(dataset) > max_cells:
        dataset = dataset.select(np.sort(generator.choice(len(dataset), max_cells, replace=False)))
    bins = _bins(token_batches(dataset), vocab_size)
    deviations = _standard_deviations(bins)
    kept = np.flatnonzero((np.bincount(bins.indices, minlength=vocab_size) >= MIN_CELLS) & (deviations > 0))
    factors = np.zeros((vocab_size, num_factors), dtype=np.float32)
    rank = min(num_factors, len(dataset) - 1, len(kept) - 1)
    if rank < 1:
        return factors
    scaled = (bins[:, kept] @ sp.diags_array(1 / deviations[kept])).astype(np.float32)
    _, values, vectors = randomized_svd(scaled, rank + 1, n_iter=3, random_state=seed)
    loadings = (vectors.T * np.sqrt(values))[:, 1:]
    rotation = np.linalg.qr(generator.normal(size=(num_factors, num_factors)))[0][:rank]
    found = loadings @ rotation
    size = np.sqrt((found**2).mean(1, keepdims=True))
    factors[kept] = found / np.maximum(size, np.finfo(np.float32).tiny)
    return factors


def _bins(batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], vocab_size: int) -> sp.csr_array:
    """(cells, vocab) float32, each gene's bin, 0 where a cell does not express it."""
    parts = []
    for genes, bins, lengths in batches:
        ends = np.concatenate([[0], np.cumsum(lengths)])
        part = sp.csr_array((bins.astype(np.float32), genes, ends), shape=(len(lengths), vocab_size))
        part.eliminate_zeros()
        parts.append(part)
    return sp.vstack(parts, format="csr") if parts else sp.csr_array((0, vocab_size), dtype=np.float32)


def _standard_deviations(bins: sp.csr_array) -> np.ndarray:
    """(genes,) float64, of the columns; 0 where they hold the same bin in all cells."""
    cells, genes = max(1, bins.shape[0]), bins.shape[1]
    totals, squares = (
        np.bincount(bins.indices, weights=bins.data.astype(np.float64) ** power, minlength=genes) for power in (1, 2)
    )
    return np.sqrt(np.maximum(squares / cells - (totals / cells) ** 2, 0.0))
