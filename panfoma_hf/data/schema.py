"""The columns of a tokenized data set: the one contract between files, collator and trainer."""

import numpy as np
from datasets import Features, LargeList, List, Value


INPUT_IDS = "input_ids"
EXPRESSION_BINS = "expression_bins"
LENGTH = "length"
LABELS = "labels"


def features(labels: np.ndarray | None = None) -> Features:
    """Arrow types of a tokenized data set, one row a cell.

    ``length`` is the cell's number of tokens, by which batches are grouped. Lists are large ones, as a million cells
    have more tokens than 32 bits count. Bins fit a byte as long as there are fewer
    than 254 of them, which is checked where a data set is built. ``labels`` (cells,) or (cells, labels), where there
    are any, give the type of their column.
    """
    columns = {
        INPUT_IDS: LargeList(Value("int32")),
        EXPRESSION_BINS: LargeList(Value("uint8")),
        LENGTH: Value("int32"),
    }
    if labels is not None:
        value = Value(str(labels.dtype))
        columns[LABELS] = value if labels.ndim == 1 else List(value)
    return Features(columns)
