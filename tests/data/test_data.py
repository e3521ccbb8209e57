"""From cells to batches."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from panfoma_hf import DataCollatorForCells, PanFoMaTokenizer, cell_dataset
from panfoma_hf.data.cells import tokenize
from panfoma_hf.data.variable_genes import log_normalized, variable_genes
from panfoma_hf.tokenization import CellTokens


@pytest.fixture
def dataset(adata, tokenizer):
    tokens, _ = tokenize(adata, tokenizer)
    return cell_dataset(tokens, labels=np.arange(len(tokens)) % 3)


def test_a_data_set_holds_each_cells_tokens(dataset, adata, tokenizer):
    tokens = tokenizer.tokenize_cells(adata)
    assert len(dataset) == adata.n_obs
    for index in (0, 17, 47):
        row, cell = dataset[index], tokens.cell(index)
        assert np.array_equal(row["input_ids"], cell["input_ids"])
        assert np.array_equal(row["expression_bins"], cell["expression_bins"])
        assert row["length"] == len(cell["input_ids"])
        assert row["labels"] == index % 3
    assert dataset.features["expression_bins"].feature.dtype == "uint8"


@pytest.mark.parametrize(
    "labels", [np.linspace(-1, 1, 48), np.eye(3)[np.arange(48) % 3]], ids=["regression", "multi_label"]
)
def test_labels_may_be_numbers_and_rows_of_numbers(labels, adata, tokenizer):
    dataset = cell_dataset(tokenizer.tokenize_cells(adata), labels=labels)
    batch = DataCollatorForCells(tokenizer)([dataset[index] for index in range(48)])
    torch.testing.assert_close(batch["labels"], torch.tensor(labels, dtype=torch.float32))


def test_tokenize_says_which_matrix_it_read_and_what_resolved(adata, tokenizer):
    adata.layers["counts"] = adata.X
    tokens, expression = tokenize(adata, tokenizer)
    assert (len(tokens), expression.resolution.num_resolved, expression.source) == (48, 40, "layers['counts']")
    assert str(expression.scale) == "counts (whole numbers)"


def test_the_collator_pads_to_the_longest_cell_of_the_batch(dataset, tokenizer):
    collator = DataCollatorForCells(tokenizer, random=False)
    batches = list(DataLoader(dataset, batch_size=16, collate_fn=collator))
    for start, batch in zip((0, 16, 32), batches, strict=True):
        lengths = dataset[start : start + 16]["length"]
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (16, max(lengths))
        assert batch["attention_mask"].sum(1).tolist() == list(lengths)
        assert batch["labels"].tolist() == [index % 3 for index in range(start, start + 16)]
        assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_fixed_draws_are_the_tokenizers_truncation(dataset, adata, tokenizer):
    collator = DataCollatorForCells(tokenizer, max_genes=10, random=False)
    expected = tokenizer(adata, max_length=10, padding=True, return_tensors="pt")
    batch = collator([dataset[index] for index in range(48)])
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_random_draws_follow_the_seed_and_keep_pairs_together(dataset, tokenizer):
    collator = DataCollatorForCells(tokenizer, max_genes=10)
    cells = [dataset[index] for index in range(48)]

    def draw(seed):
        torch.manual_seed(seed)
        return collator(cells)

    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert first["input_ids"].shape == (48, 10)
    for row, cell in enumerate(cells):
        bins = dict(zip(cell["input_ids"].tolist(), cell["expression_bins"].tolist(), strict=True))
        genes = first["input_ids"][row][first["attention_mask"][row] == 1].tolist()
        assert len(set(genes)) == len(genes) == min(10, len(bins))
        assert [bins[gene] for gene in genes] == first["expression_bins"][row][: len(genes)].tolist()


def test_random_draws_reach_every_gene(dataset, tokenizer):
    collator = DataCollatorForCells(tokenizer, max_genes=3)
    seen = {gene for _ in range(200) for gene in collator([dataset[0]])["input_ids"][0].tolist()}
    assert seen == set(dataset[0]["input_ids"].tolist())


def test_a_batch_of_empty_cells_is_a_batch(tokenizer):
    empty = CellTokens(np.array([], dtype=np.int32), np.array([], dtype=np.uint8), np.zeros(3, dtype=np.int64))
    dataset = cell_dataset(empty)
    batch = DataCollatorForCells(tokenizer)([dataset[0], dataset[1]])
    assert batch["attention_mask"].tolist() == [[0], [0]]


def test_variable_genes_are_found_among_known_genes_and_leave_the_cells_alone(baron):
    before = baron.X.copy()
    chosen = variable_genes(baron, 200, PanFoMaTokenizer())
    assert len(chosen) == 200
    # Hormones of the islets and enzymes of the acini: what pancreas cells differ in.
    assert {"INS", "GCG", "SST", "PRSS1"} <= set(chosen)
    assert (before != baron.X).nnz == 0
    assert "log1p" not in baron.uns
    assert set(chosen) <= set(PanFoMaTokenizer().get_vocab())
    totals = np.expm1(log_normalized(baron).X.toarray()).sum(1)
    np.testing.assert_allclose(totals, 1e4, rtol=1e-3)


def test_variable_genes_of_what_is_no_counts_are_an_error(adata):
    adata.X = adata.X * 0.5
    with pytest.raises(ValueError, match="found on counts"):
        variable_genes(adata, 10)
    with pytest.raises(ValueError, match="got 0"):
        variable_genes(adata, 0)


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        pytest.param([0, 1, 2], r"got \(3,\) for 48 cells", id="too_few"),
        pytest.param([0] * 47 + [-1], "got 1 that are negative", id="missing_code"),
        pytest.param([0.5] * 47 + [np.nan], "got 1 that are not finite", id="missing_number"),
        pytest.param(["mast"] * 48, "Labels must be numbers", id="names"),
    ],
)
def test_labels_that_cannot_be_learned_are_errors(labels, message, adata, tokenizer):
    with pytest.raises(ValueError, match=message):
        cell_dataset(tokenizer.tokenize_cells(adata), labels=labels)


def test_no_cells_are_an_error(adata, tokenizer):
    with pytest.raises(ValueError, match="At least one cell"):
        tokenize(adata[:0], tokenizer)


def test_cells_without_bins_are_an_error_that_names_trainers_habit(tokenizer):
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        DataCollatorForCells(tokenizer)([{"input_ids": [1, 2]}])
