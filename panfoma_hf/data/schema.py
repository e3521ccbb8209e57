"""The columns of a tokenized data set: the one contract between files, collator and trainer."""

from datasets import Features, LargeList, Value


INPUT_IDS = "input_ids"
EXPRESSION_BINS = "expression_bins"
LENGTH = "length"
LABELS = "labels"


def features(with_labels: bool = False) -> Features:
    """Arrow types of a tokenized data set, one row a cell.

    ``length`` is the cell's number of tokens, by which batches are grouped. Lists are large ones, as a million cells
    have more tokens than 32 bits count. Bins fit a byte as long as there are fewer
    than 254 of them, which is checked where a data set is built.
    """
    columns = {
        INPUT_IDS: LargeList(Value("int32")),
        EXPRESSION_BINS: LargeList(Value("uint8")),
        LENGTH: Value("int32"),
    }
    if with_labels:
        columns[LABELS] = Value("int64")
    return Features(columns)
