"""Tokens as a data set for Trainer."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..tokenization import CellTokens
from . import schema


def cell_dataset(tokens: CellTokens, labels: Sequence[int] | None = None) -> Dataset:
    """Build a data set for Trainer from tokens, without copying them cell by cell.

    Parameters
    ----------
    tokens
        What `cells.tokenize` or ``tokenizer.tokenize_cells`` gives.
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
