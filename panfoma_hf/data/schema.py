"""The columns of a tokenized data set: the one contract between files, collator and trainer."""

import numpy as np
from datasets import Features, LargeList, List, Value


INPUT_IDS = "input_ids"
EXPRESSION_BINS = "expression_bins"
LENGTH = "length"
LABELS = "labels"

# Further columns of a corpus, which name CELLxGENE's obs columns where it has them.
CELL_ID = "cell_id"
STUDY = "study"
DONOR_ID = "donor_id"
SAMPLE_ID = "sample_id"
CELL_TYPE = "cell_type"
CANCER_TYPE = "cancer_type"
TISSUE = "tissue"
ASSAY = "assay"
IS_MALIGNANT = "is_malignant"
CONTENT_HASH = "content_hash"
# Which pass over the corpus a cell is read in, for the draws of `DataCollatorForMaskedExpression`.
EPOCH = "epoch"
# Genes that a batch does not show, though the cell expresses them.
WITHHELD_IDS = "withheld_ids"
# What a source list may say of a cell; each may be missing.
CELL_FIELDS = (DONOR_ID, SAMPLE_ID, CELL_TYPE, CANCER_TYPE, TISSUE, ASSAY, IS_MALIGNANT)


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


def corpus_features(num_tokens: int) -> Features:
    """Arrow types of a corpus, one row a cell.

    Gene ids take two bytes where the vocabulary, of ``num_tokens``, allows it. ``content_hash`` is equal where gene ids
    and bins were, before rare genes were left out. Fields of `CELL_FIELDS` are text, ``is_malignant`` is a truth; null
    where nothing is known.
    """
    text = Value("string")
    return Features(
        {
            INPUT_IDS: LargeList(Value("uint16" if num_tokens <= 2**16 else "int32")),
            EXPRESSION_BINS: LargeList(Value("uint8")),
            LENGTH: Value("int32"),
            CELL_ID: text,
            STUDY: text,
            **{field: Value("bool") if field == IS_MALIGNANT else text for field in CELL_FIELDS},
            CONTENT_HASH: Value("uint64"),
        }
    )
