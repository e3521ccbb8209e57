"""Tasks: what a method may see, how scores are made, and what planted leaks look like in the report."""

import json
from itertools import pairwise

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import panfoma_hf
from panfoma_hf import PanFoMaConfig, PanFoMaModel
from panfoma_hf.evaluation import methods
from panfoma_hf.evaluation.baselines import CLASSIFIERS, EMBEDDERS, Predictions
from panfoma_hf.evaluation.integration import integration_metrics
from panfoma_hf.evaluation.methods import (
    adapted_embedder,
    classifier_of,
    embedder_of,
    embeddings,
    finetuned,
    pretrained,
    supervised_embedder,
    trained_checkpoint,
)
from panfoma_hf.evaluation.metrics import bootstrap_interval, classification_metrics
from panfoma_hf.evaluation.tasks import (
    INTEGRATION,
    INTEGRATION_METRICS,
    Task,
    evaluate_task,
    run_task,
    split_task,
)
from tests.conftest import cells_of_counts, small_cells, spread_out


QUICK = {"num_train_epochs": 1, "disable_tqdm": True, "baselines": False, "gene_logits": False}


@pytest.fixture
def cells(adata) -> ad.AnnData:
    """The small cells, of six donors that have all three labels, with embeddings of their own."""
    adata.obs["donor"] = np.array(list("uvwxyz"))[np.arange(48) // 8]
    rng = np.random.default_rng(1)
    adata.obsm["X_own"] = rng.normal(size=(48, 3)) + 5 * np.eye(3)[np.arange(48) % 3]
    return adata


@pytest.fixture
def task(cells) -> Task:
    return Task("small", cells, "cell_type", groups="donor")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny checkpoint of random weights, large enough to tell cells apart, with a classifier of the small cells."""
    start, folder = (tmp_path_factory.mktemp("tasks") / name for name in ("start", "checkpoint"))
    torch.manual_seed(0)
    spread_out(PanFoMaModel(PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer)))).save_pretrained(start)
    tokenizer.save_pretrained(start)
    options = QUICK | {"gene_logits": True}
    panfoma_hf.finetune(small_cells(tokenizer), "cell_type", folder, model=start, mode="probe", **options)
    return folder


def always(name: str):
    """A method that says one name, whatever the cell."""
    return lambda train, test, label, **options: Predictions([name], np.ones((test.n_obs, 1)))


# Methods by name


@pytest.mark.parametrize("method", ["hvg_logistic_regression", "obsm:X_own", "obsm:X_own:logistic_regression"])
def test_a_task_runs_with_methods_by_name(method, task):
    scores = run_task(task, method, seeds=[0, 1])
    assert set(scores) == {
        *("accuracy", "accuracy_low", "accuracy_high", "macro_f1", "macro_f1_low", "macro_f1_high"),
        *("calibration_error", "donor_accuracy", "test_donors", "seconds"),
    }
    assert all(isinstance(score, float) for score in scores.values())
    assert scores["accuracy"] > 0.9
    for metric in ("accuracy", "macro_f1"):
        assert scores[f"{metric}_low"] <= scores[metric] <= scores[f"{metric}_high"]


def test_a_task_runs_with_a_function_and_gives_what_scores_were_made_of(task, cells):
    result = evaluate_task(task, always("mast"), seeds=[3, 4])
    assert len(result.by_seed) == len(result.true) == len(result.predicted) == len(result.probabilities) == 2
    for seed, true, predicted, scores in zip([3, 4], result.true, result.predicted, result.by_seed, strict=True):
        _, test = split_task(task, cells, seed)
        assert true.tolist() == cells.obs["cell_type"].iloc[test].tolist()
        assert set(predicted) == {"mast"}
        assert scores["accuracy"] == np.mean(true == "mast")
        assert scores["macro_f1"] == classification_metrics(true, predicted)["macro_f1"]
    assert result.scores["accuracy"] == pytest.approx(np.mean([scores["accuracy"] for scores in result.by_seed]))
    lows = [
        bootstrap_interval(
            true, predicted, cells.obs["donor"].iloc[split_task(task, cells, seed)[1]], "accuracy", seed=seed
        )[0]
        for seed, true, predicted in zip([3, 4], result.true, result.predicted, strict=True)
    ]
    assert result.scores["accuracy_low"] == pytest.approx(np.mean(lows))
    assert result.scores == evaluate_task(task, always("mast"), seeds=[3, 4]).scores | {
        "seconds": result.scores["seconds"]
    }


def test_the_majority_class_scores_what_it_should(task):
    result = evaluate_task(task, "majority", seeds=[0])
    assert result.scores["accuracy"] == np.mean(result.true[0] == result.predicted[0])
    # The shares are those of the cells, so that their confidence is right up to the draw.
    assert result.scores["calibration_error"] < 0.2


def test_a_checkpoint_is_scored_as_it_is(task, cells, folder):
    result = evaluate_task(task, f"checkpoint:{folder}", seeds=[0])
    _, test = split_task(task, cells, 0)
    annotated = panfoma_hf.annotate(cells[test].copy(), folder, min_score=0, progress=False)
    assert result.predicted[0].tolist() == annotated.obs["panfoma_cell_type"].tolist()
    np.testing.assert_allclose(
        result.probabilities[0].probabilities, annotated.obsm["panfoma_cell_type_proba"], atol=1e-6
    )
    assert result.scores["accuracy"] > 0.8
    other = Task("other", cells, "state")
    cells.obs["state"] = np.where(np.arange(48) % 2, "active", "resting")
    with pytest.raises(ValueError, match=r"got 'state' for .*, which names cell_type"):
        evaluate_task(other, trained_checkpoint(folder), seeds=[0])


@pytest.mark.parametrize("mode", ["full", "probe"])
def test_finetuning_runs_on_what_is_visible(mode, task, folder, tokenizer):
    start = folder if mode == "probe" else PanFoMaConfig.from_size("tiny", vocab_size=len(tokenizer))
    result = evaluate_task(task, finetuned(mode, start, **QUICK), seeds=[0])
    assert result.probabilities[0].names.tolist() == ["B cell", "T cell", "mast"]
    assert len(result.predicted[0]) == len(result.true[0])


def test_neighbours_of_embeddings_are_scored(task, folder):
    assert run_task(task, pretrained(folder), seeds=[0])["accuracy"] > 0.5  # of three labels


def test_embeddings_leave_cells_as_they_are_and_read_the_layer(cells, folder, tokenizer):
    expected = panfoma_hf.embed(cells.copy(), folder, progress=False).obsm["X_panfoma"]
    before = cells.copy()
    view = cells[np.arange(48)]
    found = embeddings(view, folder)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert view.is_view
    assert "panfoma" not in cells.uns
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    layered = ad.AnnData(cells.X * 0, obs=cells.obs, var=cells.var, layers={"molecules": cells.X})
    layered.raw = layered.copy()
    np.testing.assert_allclose(embeddings(layered, folder, layer="molecules"), expected, rtol=1e-6)
    only_raw = cells.copy()
    only_raw.raw = cells.copy()
    only_raw.X = np.log1p(cells.X.toarray()) - 1
    np.testing.assert_allclose(embeddings(only_raw, folder), expected, rtol=1e-6)


def test_random_weights_are_those_of_the_seed_alone(cells, folder, monkeypatch):
    monkeypatch.setattr(methods, "checkpoint", lambda: folder)
    first, again, other = (embeddings(cells[:3].copy(), "random", seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    assert not np.allclose(first, other)
    assert not np.allclose(first, embeddings(cells[:3].copy()))


@pytest.mark.parametrize(
    ("name", "made_by", "arguments"),
    [
        ("panfoma:full", "finetuned", ("full", None)),
        ("panfoma:lora:here/model", "finetuned", ("lora", "here/model")),
        ("random:probe", "finetuned", ("probe", "small")),
        ("panfoma:knn", "pretrained", (None, "knn")),
        ("panfoma:logistic_regression:a:b", "pretrained", ("a:b", "logistic_regression")),
        ("random:knn", "pretrained", ("random", "knn")),
        ("checkpoint:here", "trained_checkpoint", ("here",)),
        ("obsm:X_own", "embedding_classifier", ("X_own", "knn")),
        ("obsm:X_own:logistic_regression", "embedding_classifier", ("X_own", "logistic_regression")),
    ],
)
def test_names_stand_for_methods(name, made_by, arguments, monkeypatch):
    monkeypatch.setattr(methods, made_by, lambda *got: (made_by, got))
    assert classifier_of(name) == (made_by, arguments)


@pytest.mark.parametrize(
    ("name", "made_by", "arguments", "options"),
    [
        ("panfoma:full", "supervised_embedder", ("full", None), {}),
        ("random:lora", "supervised_embedder", ("lora", "small"), {}),
        ("panfoma:logits", "supervised_embedder", ("probe", None), {"output": "logits"}),
        ("panfoma:logits:a:b", "supervised_embedder", ("probe", "a:b"), {"output": "logits"}),
        ("panfoma:full:here", "supervised_embedder", ("full", "here"), {}),
        ("panfoma:adapted", "adapted_embedder", (None,), {}),
        ("panfoma:adapted:here", "adapted_embedder", ("here",), {}),
    ],
)
def test_names_stand_for_embedders_that_are_trained(name, made_by, arguments, options, monkeypatch):
    monkeypatch.setattr(methods, made_by, lambda *got, **more: (made_by, got, more))
    assert embedder_of(name) == (None, (made_by, arguments, options))


def test_a_network_and_the_bins_by_themselves_are_probes_without_the_other(monkeypatch):
    monkeypatch.setattr(methods, "finetuned", lambda *got, **more: (got, more))
    assert classifier_of("panfoma:network") == (("probe", None), {"gene_logits": False})
    assert classifier_of("panfoma:network:here") == (("probe", "here"), {"gene_logits": False})
    assert classifier_of("panfoma:bins") == (("probe", None), {"gene_logits": "alone"})
    assert classifier_of("random:network") == (("probe", "small"), {"gene_logits": False})


def test_a_checkpoint_embeds_as_it_is(cells, folder):
    embedder, trained = embedder_of(f"checkpoint:{folder}")
    assert trained is None
    np.testing.assert_array_equal(embedder(cells), embeddings(cells, folder))


def test_what_is_no_method_is_refused(task):
    for name in ("svm", "panfoma", "panfoma:svm", "random:bins", "random:full:elsewhere", "obsm:", "checkpoint:"):
        with pytest.raises(ValueError, match=f"A method is one of majority, .*, got '{name}'"):
            run_task(task, name)
    with pytest.raises(ValueError, match="'knn' or 'logistic_regression', got 'svm'"):
        run_task(task, "obsm:X_own:svm")
    for name in ("umap", "panfoma:probe", "random:adapted", "random:logits", "random:full:x", "obsm:", "checkpoint:"):
        with pytest.raises(ValueError, match=f"A way to embed is one of pca, .*, got '{name}'"):
            embedder_of(name)
    with pytest.raises(ValueError, match="'embedding' or 'logits', got 'umap'"):
        supervised_embedder("probe", output="umap")
    assert classifier_of(CLASSIFIERS["majority"]) is CLASSIFIERS["majority"]
    assert embedder_of(EMBEDDERS["pca"]) == (EMBEDDERS["pca"], None)


# What a method may see


@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_test_cells_come_without_labels_and_all_methods_get_the_same(budget, task, cells):
    seen = []

    def spy(train, test, label, *, seed, layer):
        assert label in train.obs
        assert label not in test.obs
        assert not set(train.obs_names) & set(test.obs_names)
        assert not set(train.obs["donor"]) & set(test.obs["donor"])
        assert not train.is_view
        assert layer is None
        seen.append((seed, train.obs_names.tolist(), test.obs_names.tolist()))
        train.X *= 0  # what a method does to its cells is nobody else's business
        train.obs[label] = "mast"
        return Predictions(["mast"], np.ones((test.n_obs, 1)))

    before = cells.copy()
    for _ in range(2):
        evaluate_task(task, spy, seeds=[0, 1, 2], budget=budget, cells=cells)
    assert (cells.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert seen[:3] == seen[3:]
    assert [seed for seed, *_ in seen[:3]] == [0, 1, 2]
    assert len({tuple(test) for _, _, test in seen[:3]}) == 3  # each seed has a split of its own


def test_embedders_get_no_labels_and_trained_ones_those_they_learn_from(cells):
    task = Task("mixed", cells, "cell_type", kind=INTEGRATION, batch="donor", metrics=("nmi",))
    calls = []

    def embed(asked, *, batch, seed, layer):
        assert "cell_type" not in asked.obs
        assert batch == "donor"
        calls.append(asked.n_obs)
        return asked.obsm["X_own"]

    run_task(task, embed, seeds=[0, 1])
    assert calls == [48, 48]  # once for each seed

    def train(learned, asked, label, *, seed, layer):
        assert label in learned.obs
        assert label not in asked.obs
        calls.append((learned.n_obs, asked.n_obs, bool(set(learned.obs_names) & set(asked.obs_names))))
        return asked.obsm["X_own"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("panfoma_hf.evaluation.tasks.embedder_of", lambda name: (None, train))
        run_task(task, "any", seeds=[0])
    unseen, seen = calls[2:]
    assert unseen[2] is False
    assert abs(unseen[0] - unseen[1]) <= 12
    assert seen == (48, 48, True)


def test_budgets_are_part_of_larger_ones_and_keep_every_label(task, cells):
    seen = {}

    def spy(train, test, label, **options):
        seen[budget] = set(train.obs_names), set(train.obs[label]), set(test.obs_names)
        assert train.obs[label].value_counts().min() >= 2
        return Predictions(["mast"], np.ones((test.n_obs, 1)))

    budgets = [0.01, 0.3, 0.5, 0.9, 1.0]
    for budget in budgets:
        evaluate_task(task, spy, seeds=[5], budget=budget)
    for small, large in pairwise(budgets):
        assert seen[small][0] <= seen[large][0]
        assert seen[small][2] == seen[large][2]
    assert all(labels == {"B cell", "T cell", "mast"} for _, labels, _ in seen.values())
    assert len(seen[0.01][0]) == 6
    assert len(seen[0.5][0]) == pytest.approx(0.5 * len(seen[1.0][0]), abs=2)


def test_a_fixed_split_holds_out_what_it_names(cells):
    task = Task("mapping", cells, "cell_type", groups="donor", held_out=("x", "z"))
    for seed in (0, 1):
        train, test = split_task(task, cells, seed)
        assert set(cells.obs["donor"].iloc[test]) == {"x", "z"}
        assert set(cells.obs["donor"].iloc[train]) == set("uvwy")
    with pytest.raises(ValueError, match="at least two test cells, got 0 of 48 with donor in nobody"):
        split_task(Task("mapping", cells, "cell_type", groups="donor", held_out=("nobody",)), cells, 0)


def test_auto_takes_the_donors_of_the_cells(cells):
    task = Task("auto", cells, "cell_type", groups="auto")
    train, test = split_task(task, cells, 0)
    assert not set(cells.obs["donor"].iloc[train]) & set(cells.obs["donor"].iloc[test])
    assert "donor_accuracy" in run_task(task, "majority", seeds=[0])
    del cells.obs["donor"]
    assert "donor_accuracy" not in run_task(task, "majority", seeds=[0])


# Planted leaks


def cells_of_batches(tokenizer) -> ad.AnnData:
    """192 cells of two labels that differ in nothing; each of 12 batches has a fingerprint of genes, and one label."""
    rng = np.random.default_rng(0)
    batches = np.arange(192) // 16
    rates = np.full((192, 60), 0.1)
    for batch in range(12):
        rates[batches == batch, 5 * batch : 5 * batch + 5] = 12.0
    cells = cells_of_counts(tokenizer, rng.poisson(rates), "cell")
    cells.obs["batch"] = pd.Categorical([f"batch {batch}" for batch in batches])
    cells.obs["state"] = pd.Categorical(np.where(batches % 2, "sick", "well"))
    return cells


@pytest.mark.parametrize("method", ["hvg_logistic_regression", "pca_knn"])
def test_a_batch_that_encodes_the_label_shows_beside_a_split_by_batch(method, tokenizer):
    cells = cells_of_batches(tokenizer)
    random = evaluate_task(Task("random", cells, "state"), method)
    by_batch = evaluate_task(Task("by batch", cells, "state", groups="batch"), method)
    assert random.scores["accuracy"] > 0.9
    assert by_batch.scores["accuracy"] < 0.7
    assert random.scores["accuracy"] - by_batch.scores["accuracy"] > 0.3
    # Either report names the column that tells the label; only the random split has it on both sides.
    assert random.leakage.leak_column == "batch"
    assert random.leakage.is_leak
    assert by_batch.leakage.leak_column is None
    assert not by_batch.leakage.is_leak
    for result in (random, by_batch):
        assert result.leakage.telling_columns["batch"] == {"purity": 1.0, "majority": 0.5}
    assert len(random.leakage.groups["batch"]) == 12


def test_donors_on_both_sides_are_reported_for_a_random_split_alone(cells):
    random = evaluate_task(Task("random", cells, "cell_type", donor="donor"), "majority", seeds=[0])
    by_donor = evaluate_task(Task("by donor", cells, "cell_type", groups="donor"), "majority", seeds=[0])
    assert random.leakage.leak_column == "donor"
    assert "are on both. Split by 'donor'" in random.leakage.messages()[0]
    assert by_donor.leakage.messages() == []
    json.dumps(random.leakage.to_dict())
    assert "donor_accuracy" in random.scores


def test_cells_that_are_twice_in_the_file_are_reported(cells):
    twice = ad.concat([cells, cells], index_unique="-", keys=["a", "b"])
    leakage = evaluate_task(Task("twice", twice, "cell_type"), "majority", seeds=[0]).leakage
    assert leakage.equal_cells > 10
    assert leakage.is_leak


# Scores


def test_labels_that_training_lacks_count_as_wrong(cells):
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    labels[cells.obs["donor"] == "z"] = "only in z"
    cells.obs["cell_type"] = labels
    task = Task("new", cells, "cell_type", groups="donor", held_out=("y", "z"))
    result = evaluate_task(task, "hvg_logistic_regression", seeds=[0])
    assert "only in z" not in result.probabilities[0].names
    assert result.scores["accuracy"] <= 0.5
    assert result.scores["macro_f1"] <= 0.75
    known = evaluate_task(Task("y", cells, "cell_type", groups="donor", held_out=("y",)), "obsm:X_own", seeds=[0])
    assert known.scores["accuracy"] > 0.9
    # Where no test label is known, there is nothing to calibrate.
    only = evaluate_task(Task("z", cells, "cell_type", groups="donor", held_out=("z",)), "obsm:X_own", seeds=[0])
    assert only.scores["accuracy"] == 0
    assert "calibration_error" not in only.scores


def test_donors_are_called_by_the_mean_of_their_cells_probabilities(tokenizer):
    cells = cells_of_counts(tokenizer, np.random.default_rng(0).poisson(2.0, (20, 10)), "cell")
    cells.obs["donor"] = list("xxxyyyzz") + ["w"] * 12
    #         x: a by most, called a by the mean; y: b, called a; z: b by both cells, called b.
    cells.obs["kind"] = list("aabbbbbb") + list("ab") * 6
    of_a = [0.9, 0.4, 0.4, 0.45, 0.45, 0.9, 0.4, 0.5]  # of a; 1 - this of b

    def method(train, test, label, **options):
        shares = np.array(of_a)[[int(name.removeprefix("cell-")) for name in test.obs_names]]
        return Predictions(["a", "b"], np.stack([shares, 1 - shares], axis=1))

    task = Task("donors", cells, "kind", groups="donor", held_out=("x", "y", "z"))
    result = evaluate_task(task, method, seeds=[0])
    assert result.scores["donor_accuracy"] == pytest.approx(2 / 3)
    assert result.scores["test_donors"] == 3
    # By cell: a, b, b of x against a, a, b; b, b, a of y against b, b, b; b of z, and a for the tie.
    assert result.predicted[0].tolist() == list("abbbbaba")
    assert result.scores["accuracy"] == pytest.approx(5 / 8)


def test_names_of_a_method_may_have_any_order(task):
    def turned(train, test, label, **options):
        found = CLASSIFIERS["hvg_logistic_regression"](train, test, label)
        return Predictions(found.names[::-1], found.probabilities[:, ::-1])

    expected = run_task(task, "hvg_logistic_regression", seeds=[0])
    assert run_task(task, turned, seeds=[0]) | {"seconds": 0} == pytest.approx(expected | {"seconds": 0})


def test_a_method_must_answer_for_each_cell(task):
    with pytest.raises(ValueError, match=r"something of each of the .* test cells, got 2"):
        run_task(task, lambda train, test, label, **options: Predictions(["a"], np.ones((2, 1))))


def test_three_hundred_labels_run():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(300), 6)
    cells = ad.AnnData(sp.csr_matrix(rng.poisson(1.0, (1800, 20)).astype("float32")))
    cells.obs["kind"] = pd.Categorical([f"label {code}" for code in codes])
    cells.obsm["X_own"] = np.eye(300)[codes] + rng.normal(0, 0.05, (1800, 300))
    result = evaluate_task(Task("many", cells, "kind"), "obsm:X_own", seeds=[0])
    assert result.scores["accuracy"] > 0.99
    assert result.probabilities[0].probabilities.shape[1] == 300


# Loading


def test_rare_and_missing_labels_are_left_out(cells):
    labels = cells.obs["cell_type"].astype(object).to_numpy()
    labels[0], labels[1:5], labels[5] = "one", "four", np.nan
    cells.obs["cell_type"] = pd.Categorical(labels, categories=["one", "four", "B cell", "T cell", "mast", "unused"])
    before = cells.copy()
    loaded = Task("rare", cells, "cell_type").load()
    assert loaded.n_obs == 42
    assert set(loaded.obs["cell_type"]) == {"B cell", "T cell", "mast"}
    assert list(loaded.obs_names) == list(cells.obs_names[6:])
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    assert run_task(Task("rare", cells, "cell_type"), "obsm:X_own", seeds=[0])["accuracy"] > 0.9


def test_labels_that_the_draw_leaves_few_cells_of_are_left_out(cells):
    cells = ad.concat([cells] * 8, index_unique="-")
    labels = np.array(["B cell", "T cell"], dtype=object)[np.arange(len(cells)) % 2]
    labels[:6] = "few"
    cells.obs["cell_type"] = labels
    assert "few" in set(Task("all", cells, "cell_type").load().obs["cell_type"])
    loaded = Task("drawn", cells, "cell_type", most_cells=100).load()
    assert set(loaded.obs["cell_type"]) == {"B cell", "T cell"}
    assert 94 <= loaded.n_obs <= 100


@pytest.mark.parametrize("role", ["groups", "donor", "batch"])
def test_a_cell_without_donor_group_or_batch_is_an_error(role, cells):
    cells.obs["donor"] = cells.obs["donor"].where(np.arange(48) > 2)
    kind = {"kind": INTEGRATION} if role == "batch" else {}
    with pytest.raises(ValueError, match=r"of all cells, got none in 'donor' for 3 of 48 of t\. Leave these out"):
        Task("t", cells, "cell_type", **{role: "donor"}, **kind).load()


def test_truth_values_and_numbers_are_labels(cells):
    cells.obs["is_mast"] = (cells.obs["cell_type"] == "mast").to_numpy()
    cells.obs["cluster"] = np.arange(48) % 3
    assert set(Task("bool", cells, "is_mast").load().obs["is_mast"]) == {"True", "False"}
    assert set(Task("numbers", cells, "cluster").load().obs["cluster"]) == {"0", "1", "2"}
    assert run_task(Task("bool", cells, "is_mast"), "hvg_logistic_regression", seeds=[0])["accuracy"] > 0.9


def test_cells_come_from_files_functions_and_memory(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    asked = []

    def load(folder):
        asked.append(folder)
        return cells

    sources = [cells, "cells.h5ad", tmp_path / "cells.h5ad", load]
    loaded = [Task("t", source, "cell_type").load(tmp_path) for source in sources]
    assert asked == [tmp_path]
    for other in loaded[1:]:
        assert (other.X != loaded[0].X).nnz == 0
        assert other.obs["cell_type"].tolist() == loaded[0].obs["cell_type"].tolist()
    few = Task("t", cells, "cell_type", most_cells=30)
    assert few.load().n_obs == 30
    assert few.load().obs_names.tolist() == few.load().obs_names.tolist()
    assert run_task(Task("t", "cells.h5ad", "cell_type"), "majority", data=tmp_path, seeds=[0])["accuracy"] > 0


def test_what_cannot_be_a_task_is_refused(cells):
    with pytest.raises(ValueError, match=r"columns are in obs, got 'tissue' for t, which has cell_type, donor"):
        run_task(Task("t", cells, "tissue"), "majority")
    with pytest.raises(ValueError, match="got 'patient' for t"):
        run_task(Task("t", cells, "cell_type", groups="patient"), "majority")
    cells.obs["one"] = "T cell"
    cells.obs["barcode"] = cells.obs_names
    with pytest.raises(ValueError, match=r"two labels of at least 5 cells, got T cell \(48\) in 'one' of t"):
        run_task(Task("t", cells, "one"), "majority")
    with pytest.raises(ValueError, match=r"two labels of at least 5 cells"):
        run_task(Task("t", cells, "barcode"), "majority")
    with pytest.raises(ValueError, match="kind is one of annotation, integration, got 'clustering'"):
        Task("t", cells, "cell_type", kind="clustering")
    with pytest.raises(ValueError, match="Metrics of annotation are accuracy, macro_f1, got nmi"):
        Task("t", cells, "cell_type", metrics=("nmi",))
    with pytest.raises(ValueError, match=r"got no column of them. Name one with `batch`"):
        Task("t", cells, "cell_type", kind=INTEGRATION)
    with pytest.raises(ValueError, match="Values are held out of a column, got u and `groups` None"):
        Task("t", cells, "cell_type", held_out=("u",))


def test_arguments_of_a_run_are_checked(task, cells):
    for budget in (0, -0.5, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share of the labels above 0 and up to 1, got"):
            run_task(task, "majority", budget=budget)
    with pytest.raises(ValueError, match="At least one seed is needed, got none"):
        run_task(task, "majority", seeds=[])
    mixed = Task("t", cells, "cell_type", kind=INTEGRATION, batch="donor")
    assert mixed.metrics == INTEGRATION_METRICS
    with pytest.raises(ValueError, match=r"Integration has no budget of labels, got 0.5"):
        run_task(mixed, "pca", budget=0.5)
    with pytest.raises(ValueError, match="must embed each of the 48 cells, got 3 rows"):
        run_task(mixed, lambda asked, **options: np.ones((3, 2)))


# Integration


@pytest.fixture
def mixed(cells) -> Task:
    cells.obs["plate"] = np.where(np.arange(48) < 24, "first", "second")
    return Task("mixed", cells, "cell_type", kind=INTEGRATION, batch="plate")


@pytest.mark.parametrize("method", ["pca", "pca_harmony", "obsm:X_own"])
def test_integration_is_scored_for_half_and_for_all_of_the_cells(method, mixed, cells):
    result = evaluate_task(mixed, method, seeds=[0])
    assert set(result.scores) == {
        "seconds",
        *(f"{side}/{metric}" for side in ("unseen", "seen") for metric in INTEGRATION_METRICS),
    }
    assert result.scores["seen/asw_label"] > 0.5
    embedding, rows = result.embedding
    assert len(embedding) == len(rows) == 24
    if method == "obsm:X_own":
        labels, batches = cells.obs["cell_type"].to_numpy(), cells.obs["plate"].to_numpy()
        expected = integration_metrics(cells.obsm["X_own"], labels, batches)
        assert {
            name.removeprefix("seen/"): result.scores[name] for name in result.scores if "/" in name and name[0] == "s"
        } == (pytest.approx(expected))
        half = integration_metrics(embedding, labels[rows], batches[rows])
        assert result.scores["unseen/nmi"] == pytest.approx(half["nmi"])


def test_scores_of_integration_have_the_range_of_the_seeds(mixed):
    mixed = Task("mixed", mixed.cells, "cell_type", kind=INTEGRATION, batch="plate", metrics=("asw_label",))
    result = evaluate_task(mixed, "obsm:X_own", seeds=[0, 1])
    values = [scores["unseen/asw_label"] for scores in result.by_seed]
    assert result.scores["unseen/asw_label_low"] == min(values)
    assert result.scores["unseen/asw_label_high"] == max(values)
    assert min(values) < result.scores["unseen/asw_label"] < max(values)


def test_embeddings_after_finetuning_are_scored_on_cells_that_were_not_learned(mixed, folder, monkeypatch):
    train = supervised_embedder("probe", folder, **QUICK)
    monkeypatch.setattr("panfoma_hf.evaluation.tasks.embedder_of", lambda name: (None, train))
    result = evaluate_task(mixed, "probe", seeds=[0])
    embedding, rows = result.embedding
    # A probe trains no more than the classifier.
    np.testing.assert_allclose(embedding, embeddings(mixed.cells[rows].copy(), folder), rtol=1e-5)
    assert all(np.isfinite(score) for score in result.scores.values())


def test_logits_after_finetuning_tell_labels_apart(cells, folder):
    embed = supervised_embedder("probe", folder, output="logits", **QUICK | {"gene_logits": True})
    learned, asked = cells[:24].copy(), cells[24:].copy()
    del asked.obs["cell_type"]
    found = embed(learned, asked, "cell_type")
    assert found.shape == (24, 3)
    names = np.array(["B cell", "T cell", "mast"])[found.argmax(axis=1)]
    assert np.mean(names == cells.obs["cell_type"][24:].to_numpy()) > 0.7
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


def test_embeddings_after_more_pretraining_are_others(cells, folder):
    unlabelled = ad.AnnData(cells.X, obs=cells.obs[[]], var=cells.var)
    found = adapted_embedder(folder, epochs=1)(unlabelled, unlabelled[:5].copy(), "cell_type")
    assert found.shape == (5, 32)
    assert np.isfinite(found).all()
    assert not np.allclose(found, embeddings(unlabelled[:5].copy(), folder), atol=1e-3)
