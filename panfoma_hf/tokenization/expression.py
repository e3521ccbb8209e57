# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""Expression as numbers: finding and checking a matrix, binning its values, and a fixed order of genes.

Pure functions, which know nothing of genes' names.
"""

import functools
from collections.abc import Sequence

import numpy as np


def quantile_bins(values: np.ndarray, cells: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin each value by its rank within its cell.

    A value that stands at ranks ``low`` to ``high - 1`` among the ``n`` values of its cell (tied values share their
    ranks) falls at the quantile ``(low + high) / 2n`` and into the bin ``1 + floor(num_bins * quantile)``. This is
    scGPT's value binning (Cui et al., Nature Methods 2024) with ties put at the middle of their ranks instead of drawn
    at random. Only the order of values counts, so raw counts, CPM and log1p(CPM) give the same bins.

    Parameters
    ----------
    values
        (values,), positive expression in any monotone scale.
    cells
        (values,), the cell of each value.
    num_bins
        Number of bins.

    Returns
    -------
    (values,) int64, 1 to ``num_bins``.
    """
    order = np.lexsort((values, cells))
    sorted_values, sorted_cells = values[order], cells[order]
    new_cell = np.append(True, sorted_cells[1:] != sorted_cells[:-1])[: len(order)]
    new_value = new_cell | np.append(True, sorted_values[1:] != sorted_values[:-1])[: len(order)]
    cell_start, cell_size = _runs(new_cell)
    run_start, run_size = _runs(new_value)
    twice_middle_rank = 2 * (run_start - cell_start) + run_size
    bins = np.empty(len(order), dtype=np.int64)
    bins[order] = 1 + num_bins * twice_middle_rank // (2 * cell_size)
    return bins


def _runs(is_start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each position, where the run that it belongs to starts, and how long that run is."""
    starts = np.flatnonzero(is_start)
    sizes = np.diff(np.append(starts, len(is_start)))
    return np.repeat(starts, sizes), np.repeat(sizes, sizes)


@functools.lru_cache(maxsize=4)
def draw_order(vocab_size: int) -> np.ndarray:
    """A fixed pseudo-random order of gene ids: (vocab,) int64, the place of each id.

    It decides which genes of a very large cell are kept and how genes fall into chunks, as a random draw does in
    training, but the same way each time. The place comes from SplitMix64's mixing function (Steele et al., OOPSLA
    2014), so it depends on no library's random generator.
    """
    with np.errstate(over="ignore"):
        mixed = (np.arange(vocab_size, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    place = np.empty(vocab_size, dtype=np.int64)
    place[np.argsort(mixed, kind="stable")] = np.arange(vocab_size)
    place.setflags(write=False)
    return place


def is_anndata(cells) -> bool:
    """Whether the object has AnnData's face; AnnData itself need not be installed."""
    return all(hasattr(cells, name) for name in ("X", "var_names", "obs_names", "layers"))


def choose_layer(adata) -> str:
    """Where an AnnData's counts are most likely: the layer "counts", else "raw", else "X"."""
    if "counts" in adata.layers:
        return "counts"
    return "X" if adata.raw is None else "raw"


def choose_matrix(adata, layer: str | None = None, gene_column: str | None = None):
    """Find an AnnData's expression matrix and its gene names.

    Parameters
    ----------
    adata
        An AnnData.
    layer
        A layer's name, "X" or "raw"; None takes ``layers["counts"]``, else ``raw.X``, else ``X``.
    gene_column
        Column of ``var`` with the gene names; None takes ``var_names``.

    Returns
    -------
    The matrix (cells, genes), the names (genes,), and a description of where it came from.
    """
    layer = choose_layer(adata) if layer is None else layer
    if layer == "raw":
        if adata.raw is None:
            raise ValueError("`layer='raw'` needs an AnnData with `raw`, got one without. Pass 'X' or a layer's name.")
        matrix, var, names, source = adata.raw.X, adata.raw.var, adata.raw.var_names, "raw.X"
    elif layer == "X":
        matrix, var, names, source = adata.X, adata.var, adata.var_names, "X"
    elif layer in adata.layers:
        matrix, var, names, source = adata.layers[layer], adata.var, adata.var_names, f"layers[{layer!r}]"
    else:
        raise ValueError(
            f"`layer` must be 'X', 'raw' or a layer's name, got {layer!r}; the layers are {sorted(adata.layers)}. "
            "Leave it out to take layers['counts'], else raw.X, else X."
        )
    if hasattr(matrix, "to_memory"):  # a matrix that AnnData has left on disk
        matrix = matrix.to_memory()
    if matrix is None:
        raise ValueError(f"The AnnData's {source} must hold a matrix, got None. Pass `layer` to name another.")
    if gene_column is not None:
        if gene_column not in var:
            raise ValueError(
                f"`gene_column` must be a column of var, got {gene_column!r}; the columns are {sorted(var)}. "
                "Leave it out to take var_names."
            )
        names = var[gene_column]
    return matrix, np.asarray(names), source


def expressed_entries(matrix, source: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Cells, genes and values of the non-zero entries of a dense or sparse (cells, genes) matrix, and its height."""
    if hasattr(matrix, "tocsr"):
        matrix = matrix.tocsr()
        cells = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
        genes, values = matrix.indices, matrix.data
    else:
        if matrix.ndim != 2:
            raise ValueError(
                f"Expression must be a (cells, genes) matrix or one cell's (genes,) vector, got {matrix.ndim} "
                f"dimensions in {source}. Reshape it."
            )
        cells, genes = np.nonzero(matrix)
        values = matrix[cells, genes]
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool) or np.iscomplexobj(values):
        raise TypeError(
            f"Expression must be real numbers, got dtype {values.dtype} in {source}. Convert it, or pass another layer."
        )
    _check_values(values, source)
    expressed = values != 0
    if not expressed.all():  # zeros that a sparse matrix stores
        cells, genes, values = cells[expressed], genes[expressed], values[expressed]
    return cells, genes, values, matrix.shape[0]


def _check_values(values: np.ndarray, source: str) -> None:
    if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
        raise ValueError(
            f"Expression must be finite, got {int((~np.isfinite(values)).sum()):,} NaN or infinite values in {source}. "
            "Remove them, or pass the matrix of counts: a layer by `layer=`."
        )
    if (values < 0).any():
        raise ValueError(
            f"Expression must not be negative, got {int((values < 0).sum()):,} negative values in {source}, the lowest "
            f"{values.min():g}. Scaled or centred data cannot be binned: pass counts, CPM or log1p(CPM), such as a "
            "layer by `layer=`."
        )


def examples(items: Sequence, limit: int = 3) -> str:
    """A parenthesis with the first few items; nothing where there is none."""
    shown = ", ".join(str(item) for item in items[:limit])
    return f" ({shown}{', ...' if len(items) > limit else ''})" if len(items) else ""
