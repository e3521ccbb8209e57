"""Metrics as pure functions: arrays in, floats out."""

from collections.abc import Sequence

from sklearn.metrics import accuracy_score, f1_score


def classification_metrics(true: Sequence, predicted: Sequence) -> dict[str, float]:
    """Accuracy and macro-F1.

    Parameters
    ----------
    true, predicted
        (cells,), labels of any kind.

    Returns
    -------
    ``accuracy``; ``macro_f1``, the mean of F1 over the labels that occur in either, 0 for one never predicted.
    """
    return {
        "accuracy": float(accuracy_score(true, predicted)),
        "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0)),
    }
