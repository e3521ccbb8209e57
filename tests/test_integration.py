"""Scores of integration, against scikit-learn, scib called directly and plain references; and Harmony."""

import sys
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import (
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_samples,
    silhouette_score,
)

from panfoma_hf.evaluation.integration import harmony, integration_metrics


RESOLUTIONS = [0.3, 1.0]


def overlapping_cells(num_cells: int = 240, shift: float = 2.0, distance: float = 2.5):
    """Cells of four labels that overlap, in three batches of which one is shifted: no score is at its best or worst."""
    rng = np.random.default_rng(0)
    labels, batches = rng.integers(0, 4, num_cells), rng.integers(0, 3, num_cells)
    embedding = rng.normal(size=(num_cells, 8)) + distance * np.eye(8)[labels]
    embedding[:, 5] += shift * (batches == 2)
    return embedding, np.array(["B", "T", "NK", "mast"])[labels], np.array(["x", "y", "z"])[batches]


@pytest.fixture(scope="module")
def case():
    embedding, labels, batches = overlapping_cells(shift=8, distance=4)
    labels[0] = "rare"  # a label with a single cell
    labels[batches == "x"] = np.where(labels[batches == "x"] == "mast", "only x", labels[batches == "x"])
    return embedding, labels, batches


@pytest.fixture(scope="module")
def scores(case):
    return integration_metrics(*case, resolutions=RESOLUTIONS)


@pytest.fixture(scope="module")
def cells(case):
    """The same cells as scib and scanpy take them, with their graph and clusters."""
    import scanpy

    embedding, labels, batches = case
    obs = pd.DataFrame({"type": pd.Categorical(labels), "batch": pd.Categorical(batches)})
    obs.index = obs.index.astype(str)
    cells = ad.AnnData(obs=obs, obsm={"embedding": embedding})
    scanpy.pp.neighbors(cells, n_neighbors=15, use_rep="embedding", random_state=0)
    for resolution in RESOLUTIONS:
        scanpy.tl.leiden(
            cells, resolution, flavor="igraph", directed=False, random_state=0, key_added=f"leiden {resolution}"
        )
    clusterings = [cells.obs[f"leiden {resolution}"] for resolution in RESOLUTIONS]
    cells.obs["cluster"] = max(clusterings, key=lambda clusters: normalized_mutual_info_score(labels, clusters))
    return cells


# -- values ------------------------------------------------------------------------------------------------------------


def test_every_score_of_the_case_says_something(scores):
    assert all(0.05 < score < 0.99 for score in scores.values()), scores


def test_bio_scores_are_those_of_scikit_learn(case, cells, scores):
    embedding, labels, _ = case
    expected = {
        "nmi": normalized_mutual_info_score(labels, cells.obs["cluster"]),
        "ari": adjusted_rand_score(labels, cells.obs["cluster"]),
        "asw_label": (silhouette_score(embedding, labels) + 1) / 2,
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("ignore:pandas.value_counts is deprecated:FutureWarning")
def test_scores_are_those_of_scib(cells, scores):
    import scib

    expected = {
        "nmi": scib.me.nmi(cells, cluster_key="cluster", label_key="type"),
        "ari": scib.me.ari(cells, cluster_key="cluster", label_key="type"),
        "asw_label": scib.me.silhouette(cells, label_key="type", embed="embedding"),
        "asw_batch": scib.me.silhouette_batch(cells, batch_key="batch", label_key="type", embed="embedding"),
        "graph_connectivity": scib.me.graph_connectivity(cells, label_key="type"),
    }
    assert {name: scores[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_asw_of_batches_is_that_of_a_plain_reference(case, scores):
    embedding, labels, batches = case
    means = {}
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        if 1 < len(np.unique(batches[rows])) < len(rows):
            means[label] = np.mean(1 - np.abs(silhouette_samples(embedding[rows], batches[rows])))
    assert set(means) == {"B", "T", "NK", "mast"}  # neither the rare one nor that of one batch
    assert scores["asw_batch"] == pytest.approx(np.mean(list(means.values())), abs=1e-6)


def test_graph_connectivity_is_that_of_a_plain_reference(cells, scores):
    labels, graph = cells.obs["type"].to_numpy(), cells.obsp["connectivities"]
    shares = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        _, parts = connected_components(graph[rows][:, rows], directed=False)
        shares.append(np.bincount(parts).max() / len(rows))
    assert scores["graph_connectivity"] == pytest.approx(np.mean(shares), abs=1e-6)


def test_averages_are_those_of_the_paper(scores):
    assert list(scores) == ["nmi", "ari", "asw_label", "asw_batch", "graph_connectivity", "avg_bio", "avg_batch"]
    assert scores["avg_bio"] == pytest.approx((scores["nmi"] + scores["ari"] + scores["asw_label"]) / 3)
    assert scores["avg_batch"] == pytest.approx((scores["asw_batch"] + scores["graph_connectivity"]) / 2)
    assert {type(score) for score in scores.values()} == {float}


def test_the_resolution_of_the_highest_nmi_is_taken(case, scores):
    each = [integration_metrics(*case, resolutions=[resolution]) for resolution in RESOLUTIONS]
    assert each[0]["nmi"] != each[1]["nmi"]
    assert scores == max(each, key=lambda scores: scores["nmi"])


def test_resolutions_are_those_of_scib_by_default(case):
    given = integration_metrics(*case, resolutions=[0.2 * step for step in range(1, 11)])
    assert integration_metrics(*case) == pytest.approx(given, abs=1e-6)


# -- behaviour ---------------------------------------------------------------------------------------------------------


def test_mixed_batches_score_higher_than_separated_ones():
    mixed, apart = (integration_metrics(*overlapping_cells(shift=shift), resolutions=[0.5]) for shift in (0, 12))
    assert mixed["avg_batch"] > apart["avg_batch"] + 0.1
    assert mixed["asw_batch"] > 0.9


def test_shuffled_labels_score_lower():
    embedding, labels, batches = overlapping_cells()
    shuffled = np.random.default_rng(1).permutation(labels)
    true, wrong = (integration_metrics(embedding, names, batches, resolutions=[0.5]) for names in (labels, shuffled))
    assert true["avg_bio"] > wrong["avg_bio"] + 0.3
    assert abs(wrong["ari"]) < 0.05


def test_the_same_input_gives_the_same_scores_and_is_left_as_it_is(case, scores):
    embedding, labels, batches = case
    before = embedding.copy()
    assert integration_metrics(embedding, labels, batches, resolutions=RESOLUTIONS) == scores
    assert np.array_equal(embedding, before)


def test_labels_may_be_columns_with_any_index_and_unused_categories(case, scores):
    embedding, labels, batches = case
    index = [f"cell-{row}" for row in range(len(labels))]
    labels = pd.Series(pd.Categorical(labels, [*np.unique(labels), "unused"]), index=index)
    assert integration_metrics(embedding, labels, list(batches), resolutions=RESOLUTIONS) == scores


def test_names_that_are_numbers_do_for_text():
    embedding, labels, batches = overlapping_cells(60)
    labels_as_numbers, batches_as_numbers = (np.unique(names, return_inverse=True)[1] for names in (labels, batches))
    text = integration_metrics(embedding, labels, batches, resolutions=[1])
    assert integration_metrics(embedding, labels_as_numbers, batches_as_numbers, resolutions=[1]) == text


def test_single_precision_scores_as_double():
    embedding, labels, batches = overlapping_cells(60)
    single = embedding.astype(np.float32)
    expected = integration_metrics(single.astype(np.float64), labels, batches, resolutions=[1])
    assert integration_metrics(single, labels, batches, resolutions=[1]) == expected


def test_clusters_that_say_nothing_of_the_labels_score_zero():
    embedding, labels, batches = overlapping_cells(60)
    scores = integration_metrics(embedding, labels, batches, resolutions=[1e-9])  # one cluster
    assert scores["nmi"] == scores["ari"] == 0


def test_cells_that_are_all_the_same_are_scored():
    _, labels, batches = overlapping_cells(60)
    scores = integration_metrics(np.ones((60, 3)), labels, batches, resolutions=[1])
    assert (scores["asw_label"], scores["asw_batch"]) == (0.5, 1)
    assert np.isfinite(list(scores.values())).all()


def test_nothing_is_printed(case, capsys):
    integration_metrics(*case, resolutions=[1])
    harmony(case[0], case[2])
    assert capsys.readouterr() == ("", "")


# -- Harmony -----------------------------------------------------------------------------------------------------------


def test_harmony_mixes_shifted_batches_and_keeps_labels_apart():
    embedding, labels, batches = overlapping_cells(shift=8, distance=5)
    corrected = harmony(embedding, batches)
    before, after = (integration_metrics(cells, labels, batches, resolutions=[0.3]) for cells in (embedding, corrected))
    assert after["avg_batch"] > before["avg_batch"] + 0.05
    assert after["asw_label"] > before["asw_label"]
    assert after["nmi"] > 0.9
    assert not np.array_equal(corrected, harmony(embedding, batches, seed=1))


@pytest.mark.parametrize("num_cells", [pytest.param(60, id="more_cells"), pytest.param(20, id="as_many_as_components")])
def test_harmony_gives_cells_by_components_and_the_same_each_time(num_cells):
    embedding, _, batches = overlapping_cells(num_cells)
    components = np.hstack([embedding, 0.1 * np.random.default_rng(0).normal(size=(num_cells, 12))])
    before = components.copy()
    corrected = harmony(components, batches, seed=3)
    assert corrected.shape == (num_cells, 20)
    assert corrected.dtype == np.float64
    # Were rows components, they would have nothing in common with what was given.
    assert np.corrcoef(corrected.ravel(), components.ravel())[0, 1] > 0.8
    assert np.array_equal(corrected, harmony(components, pd.Series(batches), seed=3))
    assert np.array_equal(components, before)


# -- real cells --------------------------------------------------------------------------------------------------------


def test_harmony_mends_a_shift_between_batches_of_real_blood_cells():
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old file
        blood = scanpy.datasets.pbmc68k_reduced()
    labels, components = blood.obs["bulk_labels"], blood.obsm["X_pca"][:, :20].astype(np.float64)
    batches = np.random.default_rng(0).permutation(np.arange(len(labels)) % 2)
    shifted = components + 5 * batches[:, None] * (np.arange(20) < 3)
    original, apart, mended = (
        integration_metrics(cells, labels, batches, resolutions=[0.5, 1])
        for cells in (components, shifted, harmony(shifted, batches))
    )
    assert apart["avg_batch"] < original["avg_batch"] - 0.1
    assert mended["avg_batch"] > apart["avg_batch"] + 0.1
    assert mended["avg_bio"] > apart["avg_bio"]
    assert mended["avg_batch"] == pytest.approx(original["avg_batch"], abs=0.03)
    assert mended["avg_bio"] == pytest.approx(original["avg_bio"], abs=0.1)


# -- bad input ---------------------------------------------------------------------------------------------------------

EMBEDDING, LABELS, BATCHES = np.random.default_rng(0).normal(size=(20, 3)), ["B", "T"] * 10, ["x"] * 10 + ["y"] * 10
WITH_NAN = np.where(np.arange(20)[:, None] == 4, np.nan, EMBEDDING)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(
            {"labels": LABELS[:19]}, r"one label for each of the 20 cells, got the shape \(19,\)", id="labels"
        ),
        pytest.param({"batches": [BATCHES]}, r"one batch for each of the 20 cells, got the shape \(1, 20\)", id="rows"),
        pytest.param({"embedding": EMBEDDING[0]}, r"shape \(cells, dims\), got \(3,\)", id="one_cell"),
        pytest.param({"embedding": EMBEDDING[:, :0]}, r"shape \(cells, dims\), got \(20, 0\)", id="no_dims"),
        pytest.param({"embedding": EMBEDDING[:15]}, "at least 16 cells.*got 15. Add cells", id="few_cells"),
        pytest.param({"embedding": WITH_NAN}, "in 1 of 20 cells, the first of which is cell 4", id="nan"),
        pytest.param({"embedding": np.full((20, 3), np.inf)}, "in 20 of 20 cells", id="infinite"),
        pytest.param({"labels": [None, *LABELS[1:]]}, "needs a label, got none for 1 of 20", id="none_as_label"),
        pytest.param({"batches": pd.Categorical(BATCHES, ["x"])}, "needs a batch, got none for 10", id="no_batch"),
        pytest.param({"labels": ["B"] * 20}, "two different labels, got only 'B'", id="one_label"),
        pytest.param({"batches": ["x"] * 20}, "two different batches, got only 'x'", id="one_batch"),
        pytest.param({"labels": range(20)}, "20 labels for as many cells", id="labels_of_their_own"),
        pytest.param({"labels": BATCHES}, "label that occurs in two batches.*none among x, y", id="confounded"),
        pytest.param({"batches": range(20)}, "with two cells in one of them", id="batches_of_their_own"),
        pytest.param({"resolutions": []}, r"at least one resolution, all positive, got \[\]", id="no_resolution"),
        pytest.param({"resolutions": [1, 0]}, r"got \[1.0, 0.0\]", id="resolution_zero"),
    ],
)
def test_bad_input_is_refused(changed, message):
    arguments = {"embedding": EMBEDDING, "labels": LABELS, "batches": BATCHES, **changed}
    with pytest.raises(ValueError, match=message):
        integration_metrics(**arguments)


@pytest.mark.parametrize(
    ("components", "batches", "message"),
    [
        pytest.param(EMBEDDING.T, BATCHES, "at least 16 cells", id="transposed"),
        pytest.param(WITH_NAN, BATCHES, "must be finite", id="nan"),
        pytest.param(EMBEDDING, BATCHES[1:], "one batch for each of the 20 cells", id="lengths"),
        pytest.param(EMBEDDING, ["x"] * 20, "two different batches", id="one_batch"),
    ],
)
def test_harmony_refuses_bad_input(components, batches, message):
    with pytest.raises(ValueError, match=message):
        harmony(components, batches)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scib", None)
    monkeypatch.setitem(sys.modules, "harmonypy", None)
    with pytest.raises(ImportError, match=r"by scib.*pip install panfoma-hf\[benchmark\]"):
        integration_metrics(EMBEDDING, LABELS, BATCHES)
    with pytest.raises(ImportError, match=r"by harmonypy.*pip install panfoma-hf\[benchmark\]"):
        harmony(EMBEDDING, BATCHES)
