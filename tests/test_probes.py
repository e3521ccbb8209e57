"""Linear probes: what a classifier reads from embeddings, and how sure that is."""

import math

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

from panfoma_hf import Corpus, LinearProbe, PanFoMaModel, build_corpus, cell_dataset
from panfoma_hf.data.corpus import SourceList
from panfoma_hf.evaluation import probes
from panfoma_hf.evaluation.baselines import principal_components
from panfoma_hf.evaluation.probes import (
    FEWEST_CELLS_OF_A_LABEL,
    ProbeScores,
    embed_dataset,
    linear_probe,
    resampled_interval,
)
from panfoma_hf.tokenization import CellTokens
from tests.conftest import VOCAB_SIZE, spread_out, tiny_config


NAMES = np.array(["B cell", "T cell", "mast"])


def separable(num_cells: int = 120, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings in which each label has a place of its own, far from the others on a far from standard scale."""
    generator = np.random.default_rng(seed)
    codes = np.arange(num_cells) % 3
    embeddings = generator.normal(size=(num_cells, 8))
    embeddings[:, :3] += 8 * np.eye(3)[codes]
    return (embeddings * 1e-3 + 5).astype(np.float32), NAMES[codes]


class Recorded:
    """Embeddings that are asked for, and for which training cells."""

    def __init__(self, embeddings: np.ndarray):
        self.embeddings, self.train = embeddings, []

    def __call__(self, train: np.ndarray) -> np.ndarray:
        self.train.append(train.tolist())
        return self.embeddings


# -- scores ----------------------------------------------------------------------------------------------------------


def test_labels_that_a_plane_divides_are_read_whatever_their_scale():
    embeddings, labels = separable()
    scores = linear_probe(embeddings, labels, num_splits=4, test_size=0.25)
    assert scores.accuracy.tolist() == scores.macro_f1.tolist() == [1] * 4
    assert scores.test_share == pytest.approx(1 / 3)


def test_shuffled_labels_are_read_by_chance_only():
    embeddings, labels = separable(240)
    labels = np.random.default_rng(1).permutation(labels)
    scores = linear_probe(embeddings, labels, num_splits=8)
    assert abs(scores.accuracy.mean() - 1 / 3) < 0.1
    assert abs(scores.macro_f1.mean() - 1 / 3) < 0.1
    assert len(set(scores.accuracy)) > 1


def test_f1_counts_a_label_that_few_cells_have_as_much_as_one_of_many():
    embeddings = np.random.default_rng(0).normal(size=(100, 2))
    labels = ["many"] * 90 + ["few"] * 10
    scores = linear_probe(embeddings, labels)
    assert scores.accuracy.mean() > 0.85
    assert scores.macro_f1.mean() < 0.6


def test_splits_follow_the_seed_and_hold_out_as_many_cells_of_each_label():
    embeddings, labels = separable(90)

    def splits(**options):
        recorded = Recorded(embeddings)
        linear_probe(recorded, labels, **options)
        return recorded.train

    found = splits(seed=1, num_splits=3)
    assert splits(seed=1, num_splits=3) == found
    assert splits(seed=2, num_splits=3) != found
    assert len({tuple(sorted(train)) for train in found}) == 3
    for train in found:
        assert len(set(train)) == len(train) == 63
        assert np.unique(labels[train], return_counts=True)[1].tolist() == [21] * 3


def test_embeddings_may_be_fitted_on_the_training_cells():
    embeddings, labels = separable(60)
    fitted = linear_probe(lambda train: embeddings - embeddings[train].mean(0), labels)
    plain = linear_probe(embeddings, labels)
    np.testing.assert_allclose(fitted.accuracy, plain.accuracy)
    # The held-out cells are scored, not those that were learned from.
    generator = np.random.default_rng(0)

    def only_training_cells(train):
        spoiled = generator.normal(size=embeddings.shape)
        spoiled[train] = embeddings[train]
        return spoiled

    assert linear_probe(only_training_cells, labels).accuracy.mean() < 0.7


def planted_groups(num_groups: int = 24, cells_of_a_group: int = 10):
    """Embeddings that tell groups apart, each of which has one label: nothing else tells the label."""
    groups = np.repeat(np.arange(num_groups), cells_of_a_group)
    generator = np.random.default_rng(0)
    embeddings = 10 * np.eye(num_groups)[groups] + generator.normal(size=(len(groups), num_groups))
    labels = NAMES[generator.permutation(np.arange(num_groups) % 2)[groups]]
    return embeddings, labels, np.array([f"donor{group}" for group in groups])


def test_cells_of_a_group_are_never_on_both_sides():
    embeddings, labels, groups = planted_groups()
    recorded = Recorded(embeddings)
    scores = linear_probe(recorded, labels, groups=groups, num_splits=6, test_size=0.25)
    assert scores.test_share == pytest.approx(1 / 3)
    assert len({tuple(train) for train in recorded.train}) == 6
    for train in recorded.train:
        test = np.setdiff1d(np.arange(len(groups)), train)
        assert len(set(groups[train])) == 18
        assert len(set(groups[test])) == 6
        assert not set(groups[train]) & set(groups[test])


def test_what_only_tells_groups_apart_scores_well_until_groups_are_kept_together():
    embeddings, labels, groups = planted_groups()
    assert linear_probe(embeddings, labels).accuracy.mean() > 0.9
    assert linear_probe(embeddings, labels, groups=groups.tolist()).accuracy.mean() < 0.7


def test_labels_of_few_cells_are_left_out():
    embeddings, labels = separable(60)
    labels = labels.astype(object)
    labels[:FEWEST_CELLS_OF_A_LABEL] = "just enough"
    rare = np.arange(20, 20 + FEWEST_CELLS_OF_A_LABEL - 1)
    labels[rare] = "rare"
    embeddings[rare] = np.nan  # which no classifier takes
    recorded = Recorded(embeddings)
    linear_probe(recorded, labels.tolist(), num_splits=20)
    used = set().union(*recorded.train)
    assert used == set(range(60)) - set(rare.tolist())
    assert all("just enough" in labels[train] for train in recorded.train)
    # Positions in groups are those of all cells, too.
    groups = np.arange(60) // 3
    recorded = Recorded(embeddings)
    linear_probe(recorded, labels, groups=groups, num_splits=5)
    for train in recorded.train:
        test = set(range(60)) - set(rare.tolist()) - set(train)
        assert not set(groups[train]) & {groups[index] for index in test}
        assert not set(train) & set(rare.tolist())


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        (["mast"] * 20, r"\{'mast': 20\}"),
        (["mast"] * 20 + ["T cell"] * 4, r"\{'T cell': 4, 'mast': 20\}"),
        (["mast"] * 4 + ["T cell"] * 4, r"\{'T cell': 4, 'mast': 4\}"),
        ([], r"\{\}"),
    ],
    ids=["one", "one_and_a_rare_one", "rare_ones", "none"],
)
def test_fewer_than_two_labels_are_an_error(labels, got):
    with pytest.raises(ValueError, match=f"two labels of at least 5 cells, got {got}. Add cells, or take another"):
        linear_probe(np.zeros((len(labels), 2)), labels)


# -- intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_nadeau_and_bengio():
    # Mean 0.8, variance (0.01 + 0 + 0.01) / 2; (1/3 + 1/4) * 0.01 is the error's square; t(0.975, 2) = 4.302653.
    mean, half_width = resampled_interval([0.7, 0.8, 0.9], 0.25)
    assert mean == pytest.approx(0.8)
    assert half_width == pytest.approx(4.302653 * math.sqrt((1 / 3 + 1 / 4) * 0.01), rel=1e-6)


def test_the_interval_is_wider_than_that_of_independent_scores_and_grows_with_the_held_out_share():
    values = np.random.default_rng(0).normal(size=10)
    plain = stats.t.ppf(0.975, 9) * values.std(ddof=1) / math.sqrt(10)
    assert resampled_interval(values, 0)[1] == pytest.approx(plain)
    widths = [resampled_interval(values, share)[1] for share in (0, 0.1, 0.5)]
    assert widths == sorted(set(widths))


def test_scores_that_are_all_equal_have_no_width_and_one_split_is_an_error():
    assert resampled_interval(np.full(5, 0.5), 0.4) == (0.5, 0)
    for values in ([0.5], []):
        with pytest.raises(ValueError, match=rf"at least two splits, got {len(values)}\. Draw more"):
            resampled_interval(values, 0.4)


def test_scores_on_the_same_splits_are_compared_split_by_split():
    first = ProbeScores(np.array([0.9, 0.7, 0.8]), np.array([0.5, 0.6, 0.4]), 0.4)
    other = ProbeScores(np.array([0.8, 0.6, 0.7]), np.array([0.4, 0.6, 0.5]), 0.4)
    assert first.interval() == resampled_interval(first.accuracy, 0.4)
    assert first.interval("macro_f1") == resampled_interval(first.macro_f1, 0.4)
    assert first.interval_of_difference(other) == pytest.approx((0.1, 0), abs=1e-9)
    expected = resampled_interval([0.1, 0, -0.1], 0.4)
    assert first.interval_of_difference(other, "macro_f1") == pytest.approx(expected)


# -- embeddings ------------------------------------------------------------------------------------------------------


LENGTHS = [5, 60, 1, 100, 33, 60, 2, 47, 80, 12, 9]


@pytest.fixture(scope="module")
def model() -> PanFoMaModel:
    """Tests must leave its weights as they are; it drops out, when it is trained."""
    torch.manual_seed(0)
    return spread_out(PanFoMaModel(tiny_config(hidden_dropout_prob=0.3, chunk_size=32)))


@pytest.fixture(scope="module")
def dataset():
    generator = np.random.default_rng(0)
    genes = [generator.permutation(VOCAB_SIZE - 1)[:length] + 1 for length in LENGTHS]
    bins = generator.integers(1, 51, sum(LENGTHS)).astype(np.uint8)
    tokens = CellTokens(np.concatenate(genes).astype(np.int32), bins, np.append(0, np.cumsum(LENGTHS)))
    return cell_dataset(tokens, labels=np.arange(len(LENGTHS)))


def one_at_a_time(model, dataset) -> np.ndarray:
    with torch.no_grad():
        found = [
            model(
                input_ids=torch.as_tensor(row["input_ids"].astype(np.int64))[None],
                expression_bins=torch.as_tensor(row["expression_bins"].astype(np.int64))[None],
            ).pooler_output[0]
            for row in dataset
        ]
    return torch.stack(found).numpy()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_embeddings_are_those_of_each_cell_alone_in_the_order_of_the_data_set(batch_size, model, dataset, tokenizer):
    embeddings = embed_dataset(model, dataset, tokenizer, batch_size)
    assert (embeddings.dtype, embeddings.shape) == (np.float32, (len(LENGTHS), model.config.hidden_size))
    expected = one_at_a_time(model, dataset)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    # Cells are told apart, by far more than the tolerance.
    distances = np.linalg.norm(expected[:, None] - expected[None], axis=-1)
    assert distances[~np.eye(len(LENGTHS), dtype=bool)].min() > 1e-2


def test_embeddings_are_those_of_the_rows_that_were_chosen(model, dataset, tokenizer):
    whole = embed_dataset(model, dataset, tokenizer)
    rows = [7, 0, 3, 3, 10]
    np.testing.assert_allclose(embed_dataset(model, dataset.select(rows), tokenizer), whole[rows], atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_embedding_drops_nothing_out_and_leaves_the_mode_as_it_was(training, model, dataset, tokenizer):
    expected = embed_dataset(model.eval(), dataset, tokenizer)
    model.train(training)
    try:
        embeddings = embed_dataset(model, dataset, tokenizer)
        assert {module.training for module in model.modules()} == {training}
        assert all(parameter.grad is None and not parameter.is_inference() for parameter in model.parameters())
        assert torch.is_grad_enabled()
        np.testing.assert_array_equal(embeddings, expected)
        if training:
            assert np.abs(one_at_a_time(model, dataset) - expected).max() > 1e-2
        with pytest.raises(RuntimeError, match="on purpose"):
            embed_dataset(model, dataset, Stopping())
        assert {module.training for module in model.modules()} == {training}
    finally:
        model.eval()


class Stopping:
    """A tokenizer that fails in the midst of it."""

    model_max_length = 3072

    def pad(self, *arguments, **options):
        raise RuntimeError("on purpose")


# -- probes of a corpus ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tokenizer, tmp_path_factory) -> Corpus:
    """A study with labels for four cells of five, and one without any."""
    folder = tmp_path_factory.mktemp("probes")
    generator = np.random.default_rng(0)
    studies = {}
    for name in ("labelled", "other"):
        types = np.arange(60) % 2
        rates = np.where((np.arange(40) % 2)[None] == types[:, None], 5.0, 0.6)
        cells = ad.AnnData(sp.csr_matrix(generator.poisson(rates).astype(np.float32)))
        cells.var_names = tokenizer.convert_ids_to_tokens(list(range(1, 41)))
        cells.obs_names = [f"{name}-{index}" for index in range(60)]
        cells.obs["donor"] = np.repeat(["a", "b"], 30)
        cells.obs["type"] = pd.Categorical(np.where(np.arange(60) % 5 == 4, "?", np.where(types, "odd", "even")))
        cells.write_h5ad(folder / f"{name}.h5ad")
        studies[name] = {"files": [f"{name}.h5ad"], "licence": "CC0", "citation": "Made up"}
    studies["labelled"] |= {
        "columns": {"donor_id": "donor", "cell_type": "type"},
        "labels": {"cell_type": {"?": None}},
    }
    studies["other"] |= {"columns": {"donor_id": "donor"}}
    settings = {
        "name": "probes",
        "quality": {"min_genes": 2, "max_genes_mads": None, "max_counts_mads": None, "min_cells_per_gene": 1},
        "studies": studies,
        "splits": {"donor": {"by": "donor", "validation": 0.0, "test": 0.3}},
    }
    return build_corpus(SourceList.model_validate(settings), folder / "corpus", root=folder, progress=False)


def test_a_probe_takes_the_labelled_cells_of_its_study(corpus):
    probe = LinearProbe.of_study(corpus, "labelled")
    rows = [row for row in corpus.dataset().with_format(None) if row["study"] == "labelled" and row["cell_type"]]
    assert len(rows) == 48
    assert probe.labels.tolist() == [row["cell_type"] for row in rows]
    assert list(probe.dataset["cell_id"]) == [row["cell_id"] for row in rows]


def test_a_probe_of_many_cells_draws_some_the_same_each_time_with_their_labels(corpus):
    probe, again = (LinearProbe.of_study(corpus, "labelled", most_cells=20) for _ in range(2))
    names = list(probe.dataset["cell_id"])
    assert list(again.dataset["cell_id"]) == names
    assert len(set(names)) == 20
    known = {row["cell_id"]: row["cell_type"] for row in corpus.dataset().with_format(None)}
    assert probe.labels.tolist() == [known[name] for name in names]
    whole = list(LinearProbe.of_study(corpus, "labelled", most_cells=48).dataset["cell_id"])
    assert len(whole) == 48
    assert names not in (whole[:20], whole[-20:])


def test_a_probe_gives_the_mean_scores_of_its_cells_embeddings(corpus, monkeypatch):
    model = spread_out(PanFoMaModel(tiny_config(vocab_size=len(corpus.tokenizer))))
    probe = LinearProbe.of_study(corpus, "labelled", label="cell_type")
    scores = probe(model.train())
    assert model.training
    expected = linear_probe(embed_dataset(model, probe.dataset, corpus.tokenizer), probe.labels)
    assert scores["accuracy"] == pytest.approx(expected.accuracy.mean())
    assert scores["macro_f1"] == pytest.approx(expected.macro_f1.mean())
    # What tells the labels is read, and what does not is not.
    told = np.where(probe.labels == "odd", 3.0, -3.0)[:, None]
    monkeypatch.setattr(probes, "embed_dataset", lambda *arguments: told)
    again = probe(model)
    assert (again.pop("accuracy"), again.pop("macro_f1")) == (1, 1)
    assert again == {key: scores[key] for key in ("random_accuracy", "random_macro_f1")}


def test_a_probe_scores_random_weights_of_the_models_shape_once_and_draws_nothing(corpus, monkeypatch):
    model = spread_out(PanFoMaModel(tiny_config(vocab_size=len(corpus.tokenizer))))
    probe = LinearProbe.of_study(corpus, "labelled")
    torch.manual_seed(0)
    expected = linear_probe(
        embed_dataset(PanFoMaModel(model.config), probe.dataset, corpus.tokenizer), probe.labels
    ).accuracy.mean()
    torch.manual_seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    scores = probe(model)
    torch.testing.assert_close(torch.rand(3), drawn)
    assert scores["random_accuracy"] == pytest.approx(expected)
    embedded = []
    monkeypatch.setattr(
        probes, "embed_dataset", lambda model, *others: embedded.append(model) or embed_dataset(model, *others)
    )
    assert probe(model) == scores
    assert embedded == [model]


@pytest.mark.parametrize("as_file", [True, False])
def test_a_probe_of_cells_scores_principal_components_of_their_counts_too(as_file, corpus, tokenizer, tmp_path):
    cells = ad.read_h5ad(corpus.folder.parent / "labelled.h5ad")
    cells.obs["cell_type"] = cells.obs["type"].astype(object).where(cells.obs["type"] != "?", None)
    known = cells[cells.obs["cell_type"].notna()].copy()
    expected = linear_probe(lambda train: principal_components(known, train), known.obs["cell_type"])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    probe = LinearProbe.of_cells(tmp_path / "cells.h5ad" if as_file else cells, tokenizer)
    assert probe.labels.tolist() == known.obs["cell_type"].tolist()
    scores = probe(spread_out(PanFoMaModel(tiny_config(vocab_size=len(tokenizer)))))
    assert scores["components_accuracy"] == pytest.approx(expected.accuracy.mean())
    assert scores["components_accuracy"] > 0.9
    assert scores["components_macro_f1"] == pytest.approx(expected.macro_f1.mean())
    # The tokens are those that the corpus has of these cells.
    same = LinearProbe.of_study(corpus, "labelled")
    for mine, theirs in zip(probe.dataset, same.dataset, strict=True):
        assert mine["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert mine["expression_bins"].tolist() == theirs["expression_bins"].tolist()


def test_cells_that_cannot_be_probed_are_an_error_that_says_why(adata, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"a column of obs, got 'lineage'"):
        LinearProbe.of_cells(adata, tokenizer, label="lineage")
    adata.obs["cell_type"] = "the same"
    with pytest.raises(ValueError, match="A probe needs two labels"):
        LinearProbe.of_cells(adata, tokenizer)
    adata.obs["cell_type"] = None
    with pytest.raises(ValueError, match=r"without 'cell_type'"):
        LinearProbe.of_cells(adata, tokenizer)
    with pytest.raises(FileNotFoundError):
        LinearProbe.of_cells(tmp_path / "nothing.h5ad", tokenizer)


def test_a_study_without_labels_is_an_error_that_names_it(corpus):
    with pytest.raises(ValueError, match=r"got 60 cells of 'other' without 'cell_type'\. Choose one that has it"):
        LinearProbe.of_study(corpus, "other")
    with pytest.raises(ValueError, match=r"got 60 cells of 'labelled' without 'tissue'"):
        LinearProbe.of_study(corpus, "labelled", label="tissue")


def test_labels_that_cannot_be_probed_are_an_error_before_a_run(corpus):
    with pytest.raises(ValueError, match="A probe needs two labels of at least 5 cells"):
        LinearProbe.of_study(corpus, "labelled", most_cells=8)


def test_a_study_that_is_not_there_is_an_error_that_says_which_are(corpus):
    with pytest.raises(ValueError, match=r"got '?brain.*labelled, other"):
        LinearProbe.of_study(corpus, "brain")
