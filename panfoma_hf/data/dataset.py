"""Tokens as a data set for Trainer."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..tokenization import CellTokens
from . import schema


def cell_dataset(tokens: CellTokens, labels: Sequence[int] | None = None, *, has_tasks: bool = False) -> Dataset:
    """Build a data set for Trainer from tokens, without copying them cell by cell.

    Parameters
    ----------
    tokens
        What `cells.tokenize` or ``tokenizer.tokenize_cells`` gives.
    labels
        (cells,) class ids as integers; (cells,) numbers for regression; or (cells, labels) numbers for multi-label
        problems and regression.
    has_tasks
        Whether labels are (cells, tasks) class ids of several tasks, -100 where a label is not known.

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
        labels = _checked_labels(labels, len(tokens), has_tasks)
        columns[schema.LABELS] = pa.array(list(labels) if labels.ndim == 2 else labels)
    dataset = Dataset.from_dict(columns, features=schema.features(labels))
    return dataset.with_format("numpy")


def _checked_labels(labels: Sequence, num_cells: int, has_tasks: bool) -> np.ndarray:
    """Labels as int64 (cells,) or (cells, tasks), or as float32 (cells,) or (cells, labels)."""
    labels = np.asarray(labels)
    if labels.ndim not in (1, 2) or len(labels) != num_cells:
        raise ValueError(f"Every cell needs one label, got {labels.shape} for {num_cells:,} cells. Pass one for each.")
    if not np.issubdtype(labels.dtype, np.number):
        raise ValueError(
            f"Labels must be numbers, got dtype {labels.dtype}. "
            "Pass the names' ids: numpy.unique(names, return_inverse=True)[1]."
        )
    if has_tasks:
        return _checked_tasks(labels)
    is_class = np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1
    missing = labels < 0 if is_class else ~np.isfinite(labels)
    if missing.any():
        raise ValueError(
            f"Every cell needs a label, got {int(missing.sum()):,} that are "
            f"{'negative' if is_class else 'not finite'}. Leave cells without a label out."
        )
    return labels.astype(np.int64 if is_class else np.float32)


def _checked_tasks(labels: np.ndarray) -> np.ndarray:
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"Labels of several tasks are integers, (cells, tasks), got {labels.dtype} of shape {labels.shape}. "
            "Stack the tasks' ids as columns."
        )
    known = labels != -100
    if (labels[known] < 0).any() or not known.any(axis=1).all():
        raise ValueError(
            "A cell needs the label of at least one task, and -100 for a label that is not known, got "
            f"{int((~known).all(axis=1).sum()):,} cells without any and {int((labels[known] < 0).sum()):,} other "
            "negative ids. Leave cells without a label out."
        )
    return labels.astype(np.int64)
