"""Simple methods beside plain pipelines of scikit-learn, on real cells; and intervals beside a plain loop."""

import sys
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from panfoma_hf.evaluation.baselines import (
    CLASSIFIERS,
    EMBEDDERS,
    Predictions,
    embedding_classifier,
    log_matrix,
    of_obsm,
    principal_components,
    variable_genes_logistic_regression,
)
from panfoma_hf.evaluation.integration import harmony
from panfoma_hf.evaluation.metrics import bootstrap_interval, classification_metrics
from panfoma_hf.evaluation.public_tasks import baron_pancreas


# All but scANVI, whose library the tests do without.
METHODS = [name for name in CLASSIFIERS if name != "scanvi"]
LEARNING = [name for name in METHODS if name != "majority"]
ON_GENES = [*LEARNING, "scanvi"]


@pytest.fixture(scope="module")
def pancreas() -> tuple[ad.AnnData, ad.AnnData]:
    """194 cells of the four largest types of Baron's pancreas x 1,500 genes, as counts, halved."""
    baron = baron_pancreas()[::8]
    genes = np.sort(np.argsort(-baron.X.sum(axis=0).A1, kind="stable")[:1500])
    cells = baron[:, genes].copy()
    labels = cells.obs["cell_type"].astype(str)
    cells = cells[labels.isin(labels.value_counts().index[:4])].copy()
    return cells[::2].copy(), cells[1::2].copy()


@pytest.fixture(scope="module")
def blood() -> tuple[ad.AnnData, ad.AnnData]:
    """350 reduced cells of scanpy, whose raw holds logarithms and X scaled values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is of an old AnnData
        cells = scanpy.datasets.pbmc68k_reduced()[::2].copy()
    cells = ad.AnnData(cells.raw.X, obs=cells.obs[["bulk_labels"]].copy(), var=cells.raw.var[[]].copy())
    return cells[::2].copy(), cells[1::2].copy()


def assert_beats_the_majority_class(method: str, train: ad.AnnData, test: ad.AnnData, label: str) -> None:
    true = test.obs[label].astype(str)
    least, found = (
        classification_metrics(true, CLASSIFIERS[name](train, test, label).labels) for name in ("majority", method)
    )
    assert found["accuracy"] > least["accuracy"] + 0.02
    assert found["macro_f1"] > least["macro_f1"] + 0.2


def without_labels(cells: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(cells.X, obs=pd.DataFrame(index=cells.obs_names), var=cells.var)


def logarithms(cells: ad.AnnData) -> sp.csr_matrix:
    """log1p(counts per 10,000) as scanpy's tutorials take them."""
    cells = ad.AnnData(cells.X.copy())
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    return cells.X


# What the methods say


@pytest.mark.parametrize("method", LEARNING)
def test_methods_beat_the_majority_class_on_counts(method, pancreas):
    assert_beats_the_majority_class(method, *pancreas, "cell_type")


@pytest.mark.parametrize("method", LEARNING)
def test_methods_beat_the_majority_class_on_logarithms(method, blood):
    assert_beats_the_majority_class(method, *blood, "bulk_labels")


def test_the_majority_class_has_the_shares_of_the_training_labels(pancreas):
    train, test = pancreas
    found = CLASSIFIERS["majority"](train, test, "cell_type")
    shares = train.obs["cell_type"].astype(str).value_counts(normalize=True)
    np.testing.assert_allclose(found.probabilities[-1], shares[found.names])


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_are_of_double_precision_and_sum_to_one(method, pancreas):
    train, test = pancreas
    found = CLASSIFIERS[method](train, test, "cell_type").probabilities
    assert found.dtype == np.float64
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-14)


def test_logistic_regression_is_that_of_a_plain_pipeline(pancreas):
    train, test = pancreas
    expressed = train[:, np.flatnonzero(train.X.sum(axis=0).A1)].copy()
    scanpy.experimental.pp.highly_variable_genes(expressed, n_top_genes=300)
    chosen = train.var_names.isin(expressed.var_names[expressed.var["highly_variable"]])
    assert chosen.sum() == 300
    sides = [logarithms(cells)[:, chosen].toarray() for cells in pancreas]
    scaler = StandardScaler().fit(sides[0])
    sides = [np.clip(scaler.transform(side), -10, 10) for side in sides]
    plain = LogisticRegression(max_iter=1000).fit(sides[0], train.obs["cell_type"].astype(str))
    found = CLASSIFIERS["hvg_logistic_regression"](train, test, "cell_type", num_genes=300)
    np.testing.assert_allclose(found.probabilities, plain.predict_proba(sides[1]), atol=1e-6)
    again = variable_genes_logistic_regression(train, test, "cell_type", num_genes=300)
    assert (again == plain.predict(sides[1])).all()


@pytest.mark.parametrize("method", ["pca_knn", "pca_logistic_regression"])
def test_components_are_those_of_a_plain_pipeline(method, pancreas):
    train, test = pancreas
    # Not fit_transform, whose components differ from those of transform by the rounding of single precision.
    pca = PCA(50, svd_solver="arpack", random_state=0).fit(logarithms(train))
    sides = [pca.transform(logarithms(cells)) for cells in pancreas]
    plain = (
        KNeighborsClassifier(15)
        if method == "pca_knn"
        else make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    )
    plain.fit(sides[0], train.obs["cell_type"].astype(str))
    found = CLASSIFIERS[method](train, test, "cell_type")
    np.testing.assert_allclose(found.probabilities, plain.predict_proba(sides[1]), atol=1e-6)


def test_components_of_sparse_logarithms_are_those_of_a_full_decomposition(pancreas):
    both, train = ad.concat(pancreas), np.arange(pancreas[0].n_obs)
    found = principal_components(both, train, num_components=10)
    dense = logarithms(both).toarray().astype("float64")
    exact = PCA(10, svd_solver="full").fit(dense[train]).transform(dense)
    exact *= np.sign((exact * found).sum(axis=0))
    np.testing.assert_allclose(found, exact, atol=1e-3)


def test_celltypist_says_what_its_own_annotation_does_with_its_default_solver(pancreas):
    train, test = pancreas
    sides = [log_matrix(cells) for cells in pancreas]
    expressed = np.flatnonzero(sides[0].X.sum(axis=0).A1)
    matrix = sides[0].X[:, expressed].toarray()
    scaler = StandardScaler().fit(matrix)
    plain = OneVsRestClassifier(LogisticRegression(max_iter=1000))
    plain.fit(np.minimum(scaler.transform(matrix), 10), train.obs["cell_type"].astype(str))
    plain.coef_ = np.concatenate([model.coef_ for model in plain.estimators_])  # annotate takes the genes' weights
    plain.features = sides[0].var_names[expressed].to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import celltypist

        theirs = celltypist.annotate(sides[1], model=celltypist.models.Model(plain, scaler, {}))
    found = CLASSIFIERS["celltypist"](train, test, "cell_type", seed=3)
    assert (found.labels == theirs.predicted_labels["predicted_labels"].to_numpy()).all()
    assert found.names.tolist() == theirs.probability_matrix.columns.tolist()
    shares = theirs.probability_matrix.to_numpy()
    certain = shares.sum(axis=1) > 1e-6
    assert certain.mean() > 0.9
    expected = shares[certain] / shares[certain].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found.probabilities[certain], expected, atol=1e-6)


def test_celltypist_is_left_as_it_was(pancreas, monkeypatch):
    train, test = pancreas
    CLASSIFIERS["celltypist"](train, test, "cell_type")
    module = sys.modules["celltypist.train"]
    assert module.LogisticRegression is LogisticRegression
    monkeypatch.setattr(module, "_LRClassifier", None)  # what fails inside
    with pytest.raises(TypeError):
        CLASSIFIERS["celltypist"](train, test, "cell_type")
    assert module.LogisticRegression is LogisticRegression


def test_of_labels_that_are_certain_to_rounding_the_decision_tells(pancreas, monkeypatch):
    train, test = pancreas
    import celltypist

    class Classifier:
        classes_ = np.array(["a", "b", "c"])

        def decision_function(self, matrix):
            return np.tile([60.0, 90.0, -3.0], (len(matrix), 1))

    class Model:
        features = np.array(["0", "1"])
        classifier = Classifier()
        scaler = StandardScaler().fit(np.eye(2))

    monkeypatch.setattr(celltypist, "train", lambda *arguments, **options: Model())
    found = CLASSIFIERS["celltypist"](train, test, "cell_type")
    assert set(found.labels) == {"b"}


# What the methods may not look at


@pytest.mark.parametrize("method", METHODS)
def test_methods_look_at_no_test_label_and_at_no_other_test_cell(method, pancreas):
    train, test = pancreas
    classify = CLASSIFIERS[method]
    expected = classify(train, test, "cell_type", seed=1)
    permuted = test.copy()
    permuted.obs["cell_type"] = permuted.obs["cell_type"].to_numpy()[::-1].copy()
    for other in (test, permuted, without_labels(test)):  # the first: the same seed gives the same
        assert (classify(train, other, "cell_type", seed=1).probabilities == expected.probabilities).all()
    few = classify(train, test[[4]], "cell_type", seed=1)
    np.testing.assert_allclose(few.probabilities, expected.probabilities[[4]], atol=1e-5)
    turned = classify(train, test[::-1], "cell_type", seed=1)
    np.testing.assert_allclose(turned.probabilities, expected.probabilities[::-1], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_methods_leave_the_cells_as_they_are(method, pancreas):
    train, test = (cells.copy() for cells in pancreas)
    CLASSIFIERS[method](train, test, "cell_type")
    for cells, before in zip((train, test), pancreas, strict=True):
        assert (cells.X != before.X).nnz == 0
        assert cells.var_names.equals(before.var_names)
        pd.testing.assert_frame_equal(cells.obs, before.obs)


# Which cells they take


@pytest.mark.parametrize("method", LEARNING)
def test_logarithms_say_what_counts_do_where_genes_are_not_chosen(method, pancreas):
    train, test = pancreas
    counts = CLASSIFIERS[method](train, test, "cell_type")
    logs = []
    for cells in pancreas:
        side = log_matrix(cells)
        side.obs["cell_type"] = cells.obs["cell_type"]
        logs.append(side)
    found = CLASSIFIERS[method](*logs, "cell_type")
    np.testing.assert_allclose(found.probabilities, counts.probabilities, atol=1e-3)


def test_counts_per_million_are_taken_the_logarithm_of(pancreas):
    train, _ = pancreas
    scaled = train.copy()
    scaled.X = sp.csr_matrix(train.X.multiply(1e6 / train.X.sum(axis=1)))
    np.testing.assert_allclose(log_matrix(scaled).X.toarray(), log_matrix(train).X.toarray(), rtol=1e-4)


@pytest.mark.parametrize("method", LEARNING)
def test_a_layer_is_read_from_views_with_genes_of_one_name(method, pancreas):
    train, test = pancreas
    expected = CLASSIFIERS[method](train, test, "cell_type")
    sides = []
    for cells in pancreas:
        side = ad.AnnData(sp.csr_matrix(cells.shape, dtype="float32"), obs=cells.obs, layers={"molecules": cells.X})
        side.var_names = ["gene"] * 3 + cells.var_names[3:].tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # AnnData's own, of the names
            sides.append(side[np.arange(len(side))])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Variable names are not unique")
        found = CLASSIFIERS[method](*sides, "cell_type", layer="molecules")
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)


@pytest.mark.parametrize("method", LEARNING)
def test_genes_that_differ_are_refused(method, pancreas):
    train, test = pancreas
    with pytest.raises(ValueError, match=r"same genes in the same order, got 1,500 and 1,499, 1,499 of them shared"):
        CLASSIFIERS[method](train, test[:, 1:].copy(), "cell_type")
    with pytest.raises(ValueError, match="same genes"):
        CLASSIFIERS[method](train, test[:, ::-1].copy(), "cell_type")


def test_values_of_different_kinds_are_refused(pancreas):
    train, test = pancreas
    logs = log_matrix(test)
    with pytest.raises(ValueError, match="same kind of values, got counts and log-normalized counts"):
        CLASSIFIERS["pca_knn"](train, logs, "cell_type")
    logs.obs["cell_type"] = test.obs["cell_type"]
    with pytest.raises(ValueError, match="same kind of values, got log-normalized counts and counts"):
        CLASSIFIERS["pca_knn"](logs, train, "cell_type")


@pytest.mark.parametrize("method", METHODS)
def test_one_training_label_is_what_every_cell_is_called(method, pancreas):
    train, test = pancreas
    train = train[train.obs["cell_type"] == train.obs["cell_type"].iloc[0]]  # a view, with unused categories
    for cells in (train, train[:1]):
        found = CLASSIFIERS[method](cells, test, "cell_type")
        assert found.names.tolist() == [train.obs["cell_type"].iloc[0]]
        assert (found.probabilities == 1).all()


@pytest.mark.parametrize("method", METHODS)
def test_few_training_cells_and_a_label_of_one_will_do(method, pancreas):
    train, test = pancreas
    names = train.obs["cell_type"].astype(str)
    first, second = names.unique()[:2]
    few = train[np.r_[np.flatnonzero(names == first)[:3], np.flatnonzero(names == second)[:1]]].copy()
    found = CLASSIFIERS[method](few, test, "cell_type")
    assert found.names.tolist() == sorted([first, second])
    assert found.probabilities.shape == (test.n_obs, 2)


@pytest.mark.parametrize("method", METHODS)
def test_truth_values_are_labels_like_others(method, pancreas):
    train, test = (cells.copy() for cells in pancreas)
    train.obs["is beta"] = (train.obs["cell_type"] == train.obs["cell_type"].value_counts().index[0]).to_numpy()
    found = CLASSIFIERS[method](train, test, "is beta")
    assert found.names.tolist() == ["False", "True"]
    assert set(found.labels) <= {"False", "True"}


@pytest.mark.parametrize("method", METHODS)
def test_missing_labels_are_refused(method, pancreas):
    train, test = (cells.copy() for cells in pancreas)
    with pytest.raises(ValueError, match="column of obs, got 'tissue'; there are cell_type"):
        CLASSIFIERS[method](train, test, "tissue")
    train.obs["cell_type"] = train.obs["cell_type"].where(np.arange(train.n_obs) > 1)
    with pytest.raises(ValueError, match=f"needs a label, got none in 'cell_type' for 2 of {train.n_obs}"):
        CLASSIFIERS[method](train, test, "cell_type")


@pytest.mark.parametrize(
    ("method", "module", "extra"),
    [("celltypist", "celltypist", "benchmark"), ("scanvi", "scvi", "scvi"), ("pca_knn", "scanpy", "analysis")],
)
def test_a_missing_library_is_named_with_its_extra(method, module, extra, pancreas, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"not installed. Run `pip install panfoma-hf\[{extra}\]`"):
        CLASSIFIERS[method](*pancreas, "cell_type")


def test_the_embedder_scvi_names_its_extra_and_wants_counts(pancreas, blood, monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(ImportError, match=r"scVI is not installed. Run `pip install panfoma-hf\[scvi\]`"):
        EMBEDDERS["scvi"](pancreas[0], batch=None)
    with pytest.raises(ValueError, match="scVI reads counts, got values in X that are no whole numbers"):
        CLASSIFIERS["scanvi"](*blood, "bulk_labels")


# Embeddings


@pytest.mark.parametrize("method", ["knn", "logistic_regression"])
def test_embeddings_of_the_cells_are_scored(method):
    train, test = (
        ad.AnnData(obs=pd.DataFrame({"kind": list("ab" * 20)}, index=[str(i) for i in range(40)])) for _ in "xy"
    )
    rng = np.random.default_rng(0)
    for cells in (train, test):
        cells.obsm["X_own"] = rng.normal(size=(40, 3)) + 6 * (cells.obs["kind"] == "b").to_numpy()[:, None]
    found = embedding_classifier("X_own", method)(train, without_labels_of(test), "kind")
    assert (found.labels == test.obs["kind"]).all()
    assert of_obsm("X_own")(test).shape == (40, 3)
    assert embedding_classifier("X_own", method)(train[:3].copy(), test, "kind").probabilities.shape == (40, 2)


def without_labels_of(cells: ad.AnnData) -> ad.AnnData:
    return ad.AnnData(obs=cells.obs[[]], obsm=dict(cells.obsm))


def test_embeddings_that_cannot_be_scored_are_refused(adata):
    with pytest.raises(ValueError, match="`method` is 'knn' or 'logistic_regression', got 'svm'"):
        embedding_classifier("X_own", "svm")
    adata.obsm["X_pca"] = np.ones((48, 4))
    with pytest.raises(ValueError, match=r"key of obsm, got 'X_own'; there are \['X_pca'\]"):
        embedding_classifier("X_own")(adata, adata, "cell_type")
    other = adata.copy()
    other.obsm["X_pca"] = np.ones((48, 3))
    with pytest.raises(ValueError, match="got 4 and 3 dimensions"):
        embedding_classifier("X_pca")(adata, other, "cell_type")
    other.obsm["X_pca"] = np.full((48, 4), np.nan)
    with pytest.raises(ValueError, match="192 values that are not finite"):
        embedding_classifier("X_pca")(adata, other, "cell_type")
    with pytest.raises(ValueError, match="192 values that are not finite"):
        of_obsm("X_pca")(other)


def test_the_embedder_is_the_usual_recipe_and_harmony_goes_on_from_it(pancreas):
    cells = pancreas[0].copy()
    found = EMBEDDERS["pca"](cells, seed=1)
    expressed = np.flatnonzero(cells.X.sum(axis=0).A1)  # fewer than 2,000, so that all are taken
    dense = logarithms(cells)[:, expressed].toarray().astype("float64")
    exact = PCA(50, svd_solver="full").fit_transform(dense)
    exact *= np.sign((exact * found).sum(axis=0))
    # Up to single precision, which the late components, of like variance, feel most.
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-3)
    cells.obs["batch"] = np.array(list("xy"))[np.arange(cells.n_obs) % 2]
    mixed = EMBEDDERS["pca_harmony"](cells, batch="batch", seed=1)
    assert (mixed == harmony(found, cells.obs["batch"], seed=1)).all()
    assert not np.allclose(mixed, found)


def test_batches_that_are_not_there_are_refused(pancreas):
    cells = pancreas[0].copy()
    cells.obs["batch"] = (
        pd.Series(list("xy"), dtype=object).sample(cells.n_obs, replace=True, random_state=0).to_numpy()
    )
    for batch in (None, "plate"):
        with pytest.raises(ValueError, match=f"column of obs, got {batch!r}; there are cell_type, batch"):
            EMBEDDERS["pca_harmony"](cells, batch=batch)
    cells.obs["batch"] = cells.obs["batch"].where(np.arange(cells.n_obs) > 2)
    with pytest.raises(ValueError, match=f"needs a batch, got none in 'batch' for 3 of {cells.n_obs}"):
        EMBEDDERS["pca_harmony"](cells, batch="batch")


def test_components_of_few_cells_are_few(adata):
    assert principal_components(adata, np.arange(10)).shape == (48, 9)
    assert EMBEDDERS["pca"](adata).shape == (48, 39)
    with pytest.raises(ValueError, match="need at least two cells and two genes, got 1 and 40"):
        principal_components(adata, np.array([0]))


# What a method says


def test_predictions_are_checked_and_scaled():
    found = Predictions(np.array(["a", "b"], dtype=object), np.array([[2, 6], [1, 0]], dtype="float32"))
    assert found.probabilities.tolist() == [[0.25, 0.75], [1, 0]]
    assert found.labels.tolist() == ["b", "a"]
    assert found.ids(["b", "c", "a"]).tolist() == [1, -1, 0]
    with pytest.raises(ValueError, match=r"\(cells, labels\), got \(2, 1\) for 2 labels"):
        Predictions(["a", "b"], np.ones((2, 1)))
    for broken in ([0, 0], [np.nan, 1], [2, -1]):
        with pytest.raises(ValueError, match="got other ones for 1 of 2 cells"):
            Predictions(["a", "b"], [[0.5, 0.5], broken])


# Intervals


@pytest.mark.parametrize("metric", ["macro_f1", "accuracy"])
@pytest.mark.parametrize("by_donor", [True, False])
def test_the_interval_is_that_of_a_plain_loop(metric, by_donor):
    rng = np.random.default_rng(0)
    true, predicted = rng.choice(list("abcd"), 60), rng.choice(list("abce"), 60)
    donors = rng.choice(list("xyzuvw"), 60) if by_donor else np.arange(60)
    names = np.unique(donors)
    values = []
    for draw in np.random.default_rng(5).multinomial(len(names), np.full(len(names), 1 / len(names)), size=80):
        rows = np.concatenate(
            [np.repeat(np.flatnonzero(donors == name), n) for name, n in zip(names, draw, strict=True)]
        )
        score = f1_score(true[rows], predicted[rows], average="macro", zero_division=0)
        values.append(accuracy_score(true[rows], predicted[rows]) if metric == "accuracy" else score)
    found = bootstrap_interval(true, predicted, donors if by_donor else None, metric, num_draws=80, level=0.9, seed=5)
    assert found == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])), abs=1e-12)


def test_the_interval_does_not_depend_on_how_many_draws_are_held_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    true, predicted = rng.choice(list("abc"), (2, 50))
    expected = bootstrap_interval(true, predicted, num_draws=100)
    monkeypatch.setattr("panfoma_hf.evaluation.metrics._MOST_VALUES", 350)
    assert bootstrap_interval(true, predicted, num_draws=100) == expected


def test_donors_widen_the_interval_where_they_matter_and_not_where_they_do_not():
    rng = np.random.default_rng(0)
    donors = np.repeat(np.arange(10), 50)
    true = rng.choice(list("ab"), 500)
    easy = donors % 2 == 0  # every second donor is read well, the others are not
    for share, factor in ((np.where(easy, 0.99, 0.6), 2), (np.full(500, 0.8), None)):
        is_right = rng.random(500) < share
        predicted = np.where(is_right, true, np.where(true == "a", "b", "a"))
        low, high = bootstrap_interval(true, predicted, None, "accuracy")
        donor_low, donor_high = bootstrap_interval(true, predicted, donors, "accuracy")
        assert low < is_right.mean() < high
        width = (donor_high - donor_low) / (high - low)
        assert width > factor if factor else 0.5 < width < 1.6


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(
        ValueError, match="at least two groups, or cells where there are no groups, got 1 among 3 cells"
    ):
        bootstrap_interval(list("aab"), list("abb"), list("xxx"))
    with pytest.raises(ValueError, match="got 1 among 1 cells"):
        bootstrap_interval(["a"], ["a"])
    with pytest.raises(ValueError, match="each of the 3 cells, got 2"):
        bootstrap_interval(list("aab"), list("ab"))
    with pytest.raises(ValueError, match="each of the 2 cells, got 2 and 3"):
        bootstrap_interval(list("ab"), list("ab"), list("xyz"))
    with pytest.raises(ValueError, match="'accuracy' or 'macro_f1', got 'auc'"):
        bootstrap_interval(list("ab"), list("ab"), metric="auc")
