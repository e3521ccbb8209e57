"""How often each gene has each bin, compared with counting token by token."""

import numpy as np
import pytest
from datasets import Dataset

from panfoma_hf import cell_dataset
from panfoma_hf.data import bin_frequencies, schema
from panfoma_hf.data.bin_frequencies import BinFrequencies
from panfoma_hf.tokenization import CellTokens


VOCAB, BINS = 30, 6
UNSEEN = [0, 11, 29]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Cells of 0 to 20 genes, which leave some out."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 21, 70)
    lengths[[0, 12, 69]] = 0
    known = np.setdiff1d(np.arange(VOCAB), UNSEEN)
    genes = np.concatenate([generator.choice(known, length, replace=False) for length in lengths])
    bins = generator.binomial(BINS - 1, (genes + 1) / VOCAB) + 1
    return cell_dataset(CellTokens(genes.astype(np.int32), bins.astype(np.uint8), np.append(0, np.cumsum(lengths))))


def counted(rows) -> list[list[int]]:
    counts = [[0] * (BINS + 1) for _ in range(VOCAB)]
    for row in rows:
        for gene, level in zip(row["input_ids"].tolist(), row["expression_bins"].tolist(), strict=True):
            counts[gene][level] += 1
    return counts


@pytest.fixture(scope="module")
def frequencies(dataset) -> BinFrequencies:
    return BinFrequencies.of(dataset, VOCAB, BINS)


def test_counts_are_those_of_a_plain_loop(dataset, frequencies):
    assert frequencies.counts.dtype == np.int64
    assert frequencies.counts.tolist() == counted(dataset)
    assert frequencies.counts.sum() == sum(dataset["length"])


@pytest.mark.parametrize(
    "rows", [range(5, 20), [69, 3, 3, 40, 0], range(60, 2, -7), [12]], ids=["slice", "repeated", "steps", "empty_cell"]
)
def test_counts_of_some_rows_are_those_of_these_rows(rows, dataset):
    chosen = dataset.select(rows)
    assert BinFrequencies.of(chosen, VOCAB, BINS).counts.tolist() == counted(chosen)


def test_counts_add_up_over_batches_of_cells(dataset, frequencies, monkeypatch):
    whole = bin_frequencies.token_batches
    monkeypatch.setattr(bin_frequencies, "token_batches", lambda cells: whole(cells, 16))
    assert len(list(bin_frequencies.token_batches(dataset))) == 5
    assert np.array_equal(BinFrequencies.of(dataset, VOCAB, BINS).counts, frequencies.counts)


def test_types_of_a_corpus_and_many_genes_do_not_overflow():
    features = schema.corpus_features(60_000)
    columns = {"input_ids": [[59_999, 7]], "expression_bins": [[50, 1]]}
    dataset = Dataset.from_dict(columns, features=type(features)({name: features[name] for name in columns}))
    counts = BinFrequencies.of(dataset, 60_000, 50).counts
    assert counts.shape == (60_000, 51)
    assert [counts[59_999, 50], counts[7, 1], counts.sum()] == [1, 1, 2]


def test_the_majority_bin_is_the_commonest_the_lowest_of_equals_and_that_of_all_for_an_unseen_gene():
    counts = np.zeros((4, 5), dtype=np.int64)
    counts[0] = [0, 1, 0, 9, 2]
    counts[1] = [0, 4, 0, 4, 1]
    counts[3] = [0, 0, 0, 0, 1]
    assert BinFrequencies(counts, 15).majority_bins().tolist() == [3, 1, 3, 4]


def test_the_majority_bins_name_the_most_genes_that_one_bin_a_gene_can(dataset, frequencies):
    majority = frequencies.majority_bins()
    named = sum(int((majority[row["input_ids"]] == row["expression_bins"]).sum()) for row in dataset if row["length"])
    assert named == sum(max(line) for line in counted(dataset))
    overall = np.sum(counted(dataset), axis=0)
    assert set(majority[UNSEEN]) == {overall.argmax()}


def test_shares_of_bins_over_all_genes_sum_to_one_and_none_is_zero(dataset, frequencies):
    shares = frequencies.bin_frequencies()
    assert (shares.dtype, shares.shape) == (np.float32, (BINS + 1,))
    assert shares.sum() == pytest.approx(1, abs=1e-6)
    assert shares.min() > 0
    totals = np.sum(counted(dataset), axis=0)
    np.testing.assert_allclose(shares, (totals + 1 / (BINS + 1)) / (totals.sum() + 1), rtol=1e-6)


@pytest.mark.parametrize("prior_cells", [10.0, 0.5])
def test_probabilities_given_the_gene_are_counts_with_a_prior_of_all_genes(prior_cells, dataset, frequencies):
    logs = frequencies.log_probabilities(prior_cells)
    assert (logs.dtype, logs.shape) == (np.float32, (VOCAB, BINS + 1))
    assert np.isfinite(logs).all()
    np.testing.assert_allclose(np.exp(logs.astype(np.float64)).sum(1), 1, atol=1e-6)
    shares, counts = frequencies.bin_frequencies().tolist(), counted(dataset)
    expected = [
        [(count + prior_cells * share) / (sum(line) + prior_cells) for count, share in zip(line, shares, strict=True)]
        for line in counts
    ]
    np.testing.assert_allclose(np.exp(logs.astype(np.float64)), expected, rtol=1e-5)
    # A gene that was never seen has the frequencies of all.
    np.testing.assert_allclose(np.exp(logs[UNSEEN]), [shares] * len(UNSEEN), rtol=1e-5)


def test_a_gene_with_many_cells_is_told_by_its_own_counts_and_the_prior_is_ten_cells():
    counts = np.zeros((2, 4), dtype=np.int64)
    counts[0] = [0, 10**6, 0, 10**6]
    frequencies = BinFrequencies(counts, 2 * 10**6)
    np.testing.assert_allclose(np.exp(frequencies.log_probabilities()[0, [1, 3]]), 0.5, atol=1e-5)
    np.testing.assert_array_equal(frequencies.log_probabilities(), frequencies.log_probabilities(10.0))


def test_log_odds_of_presence_are_those_of_the_cells_that_have_the_gene(dataset, frequencies):
    assert frequencies.num_cells == len(dataset) == 70
    cells = np.zeros(VOCAB)
    for row in dataset:
        for gene in row["input_ids"].tolist():
            cells[gene] += 1
    found = frequencies.presence_log_odds()
    assert (found.dtype, found.shape) == (np.float32, (VOCAB,))
    np.testing.assert_allclose(found, np.log((cells + 0.5) / (70 - cells + 0.5)), rtol=1e-5)
    assert set(found[UNSEEN].tolist()) == {found.min()}


def test_a_gene_that_is_not_expressed_counts_as_absent_though_a_cell_lists_it():
    counts = np.array([[3, 1, 0], [0, 2, 2]])
    np.testing.assert_allclose(BinFrequencies(counts, 4).presence_log_odds(), np.log([1.5 / 3.5, 4.5 / 0.5]), rtol=1e-6)


def test_without_cells_every_bin_is_equally_likely(dataset):
    frequencies = BinFrequencies.of(dataset.select([]), VOCAB, BINS)
    assert not frequencies.counts.any()
    np.testing.assert_allclose(frequencies.bin_frequencies(), 1 / (BINS + 1))
    np.testing.assert_allclose(np.exp(frequencies.log_probabilities()), 1 / (BINS + 1), rtol=1e-5)
