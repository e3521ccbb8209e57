"""From an AnnData or an `.h5ad` file to tokenized cells."""

from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..tokenization import CellTokens, GeneResolution, PanFoMaTokenizer
from ..tokenization.tokenization_panfoma import choose_matrix
from . import schema


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
        (cells,), class ids.

    Returns
    -------
    One row a cell, with the columns of `schema.features`; rows come out as numpy arrays.

    Raises
    ------
    ValueError
        If the labels are not as many as the cells, or a bin does not fit the schema.
    """
    if tokens.expression_bins.dtype != np.uint8:
        raise ValueError(
            f"A data set holds bins as bytes, got {tokens.expression_bins.dtype}. Use fewer than 254 expression bins."
        )
    if labels is not None and len(labels) != len(tokens):
        raise ValueError(
            f"Every cell needs one label, got {len(labels):,} for {len(tokens):,} cells. Pass one for each."
        )
    offsets = pa.array(tokens.indptr.astype(np.int64))
    columns = {
        schema.INPUT_IDS: pa.LargeListArray.from_arrays(offsets, pa.array(tokens.input_ids)),
        schema.EXPRESSION_BINS: pa.LargeListArray.from_arrays(offsets, pa.array(tokens.expression_bins)),
        schema.LENGTH: pa.array(tokens.lengths.astype(np.int32)),
    }
    if labels is not None:
        columns[schema.LABELS] = pa.array(np.asarray(labels, dtype=np.int64))
    dataset = Dataset.from_dict(columns, features=schema.features(with_labels=labels is not None))
    return dataset.with_format("numpy")
