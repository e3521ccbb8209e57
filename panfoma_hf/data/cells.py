"""From an AnnData or an `.h5ad` file to tokenized cells."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..tokenization import CellTokens, GeneResolution, PanFoMaTokenizer, choose_layer, choose_matrix
from . import schema


def writable_cells(cells: ad.AnnData | str | Path) -> ad.AnnData:
    """As `read_cells`, for cells that results will be written to.

    Raises
    ------
    ValueError
        If that cannot be done: a view of a file, or something else than entries in ``uns["panfoma"]``.
    """
    adata = read_cells(cells)
    if adata.isbacked and adata.is_view:
        raise ValueError(
            "Results cannot be written to a view of cells that lie on disk. Pass `adata[...].to_memory()` instead."
        )
    if not isinstance(adata.uns.get("panfoma", {}), Mapping):
        raise ValueError(
            f"uns['panfoma'] must be free or PanFoMa's own, got {type(adata.uns['panfoma']).__name__}. Rename it."
        )
    return adata


def read_cells(cells: ad.AnnData | str | Path) -> ad.AnnData:
    """Open cells: an AnnData is passed through, an `.h5ad` file is read.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not an `.h5ad` file.
    """
    if isinstance(cells, ad.AnnData):
        return cells
    path = Path(cells)
    if not path.is_file():
        raise FileNotFoundError(
            f"Cells are read from an AnnData or an .h5ad file, got no file at {path}. Check the path."
        )
    if path.suffix != ".h5ad":
        raise ValueError(
            f"Cells are read from an .h5ad file, got {path.name}. Read it with anndata or scanpy and pass the AnnData."
        )
    return ad.read_h5ad(path)


def tokenize(
    adata: ad.AnnData, tokenizer: PanFoMaTokenizer, *, layer: str | None = None, gene_column: str | None = None
) -> tuple[CellTokens, GeneResolution, str]:
    """Tokenize an AnnData's cells, whole; sub-sampling is the collator's.

    Returns
    -------
    The tokens; what each gene name was taken for; and which matrix was read, such as ``layers['counts']``.
    """
    if not adata.n_obs:
        raise ValueError("At least one cell is needed, got an AnnData without cells. Check how it was subset.")
    layer = choose_layer(adata) if layer is None else layer
    _, names, source = choose_matrix(adata, layer, gene_column)
    resolution = tokenizer.resolve_genes(names)
    tokens = tokenizer.tokenize_cells(adata, resolution, layer=layer, gene_column=gene_column)
    return tokens, resolution, source


def cell_dataset(tokens: CellTokens, labels: Sequence[int] | None = None) -> Dataset:
    """Build a data set for Trainer from tokens, without copying them cell by cell.

    Parameters
    ----------
    tokens
        What `tokenize` or ``tokenizer.tokenize_cells`` returns.
    labels
        (cells,) class ids as integers; (cells,) numbers for regression; or (cells, labels) numbers for multi-label
        problems and regression.

    Returns
    -------
    One row a cell, with the columns of `schema.features`; rows come out as numpy arrays.

    Raises
    ------
    ValueError
        If the labels are not as many as the cells, a label is missing, or a bin does not fit the schema.
    """
    if tokens.expression_bins.dtype != np.uint8:
        raise ValueError(
            f"A data set holds bins as bytes, got {tokens.expression_bins.dtype}. Use fewer than 254 expression bins."
        )
    offsets = pa.array(tokens.indptr.astype(np.int64))
    columns = {
        schema.INPUT_IDS: pa.LargeListArray.from_arrays(offsets, pa.array(tokens.input_ids)),
        schema.EXPRESSION_BINS: pa.LargeListArray.from_arrays(offsets, pa.array(tokens.expression_bins)),
        schema.LENGTH: pa.array(tokens.lengths.astype(np.int32)),
    }
    if labels is not None:
        labels = _checked_labels(labels, len(tokens))
        columns[schema.LABELS] = pa.array(list(labels) if labels.ndim == 2 else labels)
    dataset = Dataset.from_dict(columns, features=schema.features(labels))
    return dataset.with_format("numpy")


def _checked_labels(labels: Sequence, num_cells: int) -> np.ndarray:
    """Labels as int64 (cells,), or as float32 (cells,) or (cells, labels)."""
    labels = np.asarray(labels)
    if labels.ndim not in (1, 2) or len(labels) != num_cells:
        raise ValueError(f"Every cell needs one label, got {labels.shape} for {num_cells:,} cells. Pass one for each.")
    if not np.issubdtype(labels.dtype, np.number):
        raise ValueError(
            f"Labels must be numbers, got dtype {labels.dtype}. "
            "Pass the names' ids: numpy.unique(names, return_inverse=True)[1]."
        )
    is_class = np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1
    missing = labels < 0 if is_class else ~np.isfinite(labels)
    if missing.any():
        raise ValueError(
            f"Every cell needs a label, got {int(missing.sum()):,} that are "
            f"{'negative' if is_class else 'not finite'}. Leave cells without a label out."
        )
    return labels.astype(np.int64 if is_class else np.float32)
