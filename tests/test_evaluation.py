"""Metrics and baselines."""

import numpy as np
import pytest

from panfoma_hf.evaluation.baselines import majority_class, variable_genes_logistic_regression
from panfoma_hf.evaluation.metrics import classification_metrics


def test_macro_f1_is_the_mean_over_labels_of_either_side():
    scores = classification_metrics(["a", "a", "a", "b"], ["a", "a", "c", "c"])
    # a: precision 1, recall 2/3; b and c: 0.
    assert scores == pytest.approx({"accuracy": 0.5, "macro_f1": 0.8 / 3})


def test_the_majority_class_is_that_of_the_training_cells():
    assert majority_class(["a", "b", "b"], 3).tolist() == ["b", "b", "b"]


def test_logistic_regression_names_small_cells_it_has_not_seen(adata):
    predicted = variable_genes_logistic_regression(adata[:30].copy(), adata[30:].copy(), "cell_type", num_genes=30)
    assert np.mean(predicted == adata.obs["cell_type"][30:].to_numpy()) == 1
