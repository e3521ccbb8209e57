# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""Expression as numbers: finding and checking a matrix, cells to tokens, and a fixed order of genes.

Pure functions, which know nothing of genes' names.
"""

import functools
from collections.abc import Sequence

import numpy as np

from .value_scale import COUNT_LAYERS, COUNTS, KINDS, value_scale


# In a cell with columns of one gene, values this close are tied: CPM of 1 and 2 counts do not add up to the very bits
# of CPM of 3. Counts are further apart up to 250,000, and float32 rounds log1p(CPM) to a few times less.
SUM_TOLERANCE = 4e-6


def bin_cells(
    indptr: np.ndarray,
    genes: np.ndarray,
    values: np.ndarray,
    token_of_column: np.ndarray,
    vocab_size: int,
    num_bins: int,
    max_length: int | None = None,
    log_scales: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenize cells that lie one after the other as in a CSR matrix. The plain twin of `token_kernels.bin_cells`.

    Parameters
    ----------
    indptr
        (cells + 1,), where each cell's entries start.
    genes, values
        (entries,), columns and their values.
    token_of_column
        (columns,), token ids; -1 for a column to leave out. Columns of one token are added up.
    vocab_size
        Token ids are below this.
    num_bins
        Bins for non-zero expression.
    max_length
        Tokens of a cell that are kept, in the order of `draw_order`; None keeps all. Bins are of all.
    log_scales
        (cells,), the natural logarithm of b where a cell's values are ``log_b(1 + x)``, so that those of one token are
        added up as x; 0 where they are not logarithms. None is 0 for all.

    Returns
    -------
    Token ids (tokens,) int32, bins (tokens,) uint8 or int32, and the number of tokens of each cell (cells,) int64.

    Raises
    ------
    ValueError
        If a value is negative, NaN or infinite, or a column is out of range.
    """
    check_values(values, "the matrix")
    check_genes(genes, len(token_of_column))
    cells = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    tokens = token_of_column[genes]
    kept = (tokens >= 0) & (values != 0)
    cells, tokens, values = cells[kept], tokens[kept], values[kept].astype(np.float64)  # sums must not overflow
    order = np.lexsort((draw_order(vocab_size)[tokens], cells))
    cells, tokens, values = cells[order], tokens[order], values[order]
    new_token = np.append(True, (cells[1:] != cells[:-1]) | (tokens[1:] != tokens[:-1]))[: len(tokens)]
    tolerance = np.zeros(len(indptr) - 1)
    if not new_token.all():
        tolerance[cells[~new_token]] = SUM_TOLERANCE
        if log_scales is not None:
            is_log = (tolerance[cells] > 0) & (log_scales[cells] > 0)
            values[is_log] = np.expm1(values[is_log] * log_scales[cells[is_log]])
        values = np.add.reduceat(values, np.flatnonzero(new_token))
        cells, tokens = cells[new_token], tokens[new_token]

    bins = quantile_bins(values, cells, num_bins, tolerance[cells])
    lengths = np.bincount(cells, minlength=len(indptr) - 1)
    if max_length is not None and lengths.max(initial=0) > max_length:
        place_in_cell = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        kept = place_in_cell < max_length
        tokens, bins, lengths = tokens[kept], bins[kept], np.minimum(lengths, max_length)
    return tokens.astype(np.int32), bins.astype(np.uint8 if num_bins < 256 else np.int32), lengths


def quantile_bins(
    values: np.ndarray, cells: np.ndarray, num_bins: int, tolerance: np.ndarray | float = 0.0
) -> np.ndarray:
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
    tolerance
        (values,), by which share of itself a value may differ from the next lower one of its cell and be tied with it.

    Returns
    -------
    (values,) int64, 1 to ``num_bins``.
    """
    order = np.lexsort((values, cells))
    sorted_values, sorted_cells = values[order], cells[order]
    new_cell = np.append(True, sorted_cells[1:] != sorted_cells[:-1])[: len(order)]
    margin = np.broadcast_to(tolerance, values.shape)[order] * sorted_values
    new_value = new_cell | np.append(True, np.diff(sorted_values) > margin[1:])[: len(order)]
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
    """Where an AnnData's counts are: of a layer of counts, "raw" and "X", in this order, the best by its values.

    Up to 512 cells of each are looked at, until counts are found.
    """
    layers = [key for key in adata.layers if key.lower() in COUNT_LAYERS]
    kinds = {}
    for layer in [*layers, *(["raw"] if adata.raw is not None else []), "X"]:
        if layer == "X" and adata.X is None:
            continue
        matrix = adata.X if layer == "X" else adata.raw.X if layer == "raw" else adata.layers[layer]
        try:
            indptr, _, values = compressed_rows(matrix[:512], layer)
        except TypeError:  # no numbers
            continue
        kinds[layer] = KINDS.index(value_scale(indptr, values).kind)
        if kinds[layer] == KINDS.index(COUNTS):
            break
    return min(kinds, key=kinds.get, default="X")


def choose_matrix(adata, layer: str | None = None, gene_column: str | None = None):
    """Find an AnnData's expression matrix and its gene names.

    Parameters
    ----------
    adata
        An AnnData.
    layer
        A layer's name, "X" or "raw"; None takes what `choose_layer` finds.
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
    elif (name := layer.removeprefix("layers/")) in adata.layers:
        matrix, var, names, source = adata.layers[name], adata.var, adata.var_names, f"layers[{name!r}]"
    else:
        raise ValueError(
            f"`layer` must be 'X', 'raw' or a layer's name, got {layer!r}; the layers are {sorted(adata.layers)}. "
            "Leave it out to have the counts looked for."
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


def compressed_rows(matrix, source: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each row's entries start, their columns and their values, of a dense or sparse (cells, genes) matrix."""
    if hasattr(matrix, "tocsr"):
        matrix = matrix.tocsr()
        indptr, genes, values = matrix.indptr, matrix.indices, matrix.data
    else:
        if matrix.ndim != 2:
            raise ValueError(
                f"Expression must be a (cells, genes) matrix or one cell's (genes,) vector, got {matrix.ndim} "
                f"dimensions in {source}. Reshape it."
            )
        cells, genes = np.nonzero(matrix)
        values = matrix[cells, genes]
        indptr = np.append(0, np.cumsum(np.bincount(cells, minlength=len(matrix))))
    if not (np.issubdtype(values.dtype, np.number) or values.dtype == bool) or np.iscomplexobj(values):
        raise TypeError(
            f"Expression must be real numbers, got dtype {values.dtype} in {source}. Convert it, or pass another layer."
        )
    return indptr, genes, values


def check_values(values: np.ndarray, source: str) -> None:
    """Raise ValueError unless all values are finite and not negative."""
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


def check_genes(genes: np.ndarray, num_columns: int) -> None:
    """Raise ValueError unless all columns of a sparse matrix are within its width."""
    if len(genes) and not 0 <= genes.min() <= genes.max() < num_columns:
        raise ValueError(
            f"Columns of a sparse matrix must be 0 to {num_columns - 1:,}, got {genes.min():,} to {genes.max():,}. "
            "The matrix is damaged: build or download it again."
        )


def examples(items: Sequence, limit: int = 3) -> str:
    """A parenthesis with the first few items; nothing where there is none."""
    shown = ", ".join(str(item) for item in items[:limit])
    return f" ({shown}{', ...' if len(items) > limit else ''})" if len(items) else ""
