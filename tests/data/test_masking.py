"""Masked expression: what is drawn of a cell, what is hidden, what is to be predicted."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from panfoma_hf import DataCollatorForMaskedExpression, cell_dataset
from panfoma_hf.data.collator import IGNORED
from panfoma_hf.tokenization import CellTokens


LENGTHS = [40, 1, 7, 300, 0, 2, 120, 3, 55, 10]


def made_up(lengths=LENGTHS, seed=0) -> CellTokens:
    generator = np.random.default_rng(seed)
    genes = [generator.permutation(1000)[:length] + 1 for length in lengths]
    bins = generator.integers(1, 51, sum(lengths))
    indptr = np.append(0, np.cumsum(lengths))
    return CellTokens(np.concatenate(genes).astype(np.int32), bins.astype(np.uint8), indptr)


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    """Cells of `LENGTHS`, each with an ``epoch``; tests must not change them."""
    tokens = made_up()
    return [{**tokens.cell(index), "epoch": 0} for index in range(len(tokens))]


def drawn(batch, row: int) -> list[tuple[int, int, int]]:
    """(gene, bin, label) at each place of a cell that is no padding."""
    here = batch["attention_mask"][row] == 1
    return list(
        zip(*(batch[key][row][here].tolist() for key in ("input_ids", "expression_bins", "labels")), strict=True)
    )


def all_drawn(collator, cells) -> list[list[tuple[int, int, int]]]:
    batch = collator(cells)
    return [drawn(batch, row) for row in range(len(cells))]


def in_epoch(cells, epoch: int) -> list[dict]:
    return [{**cell, "epoch": epoch} for cell in cells]


# -- what is masked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("max_genes", [None, 50])
def test_labels_are_the_true_bins_where_the_mask_is_and_ignored_elsewhere(random, max_genes, cells, tokenizer):
    collator = DataCollatorForMaskedExpression(tokenizer, max_genes=max_genes, random=random, pad_to_multiple_of=64)
    batch = collator(cells)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert ("withheld_ids" in batch) == (max_genes is not None)
    batch.pop("withheld_ids", None)
    assert {tensor.shape for tensor in batch.values()} == {(len(cells), 64 if max_genes else 320)}
    masked = batch["labels"] != IGNORED
    assert torch.equal(masked, batch["expression_bins"] == tokenizer.mask_bin_id)
    assert not masked[batch["attention_mask"] == 0].any()
    assert (batch["expression_bins"][batch["attention_mask"] == 0] == tokenizer.pad_bin_id).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    for row, cell in enumerate(cells):
        bins = dict(zip(cell["input_ids"].tolist(), cell["expression_bins"].tolist(), strict=True))
        places = drawn(batch, row)
        assert len({gene for gene, _, _ in places}) == len(places) == min(len(bins), max_genes or 10**9)
        # The pairs of the cell come back, those that are masked by their labels.
        assert [label if label != IGNORED else seen for _, seen, label in places] == [bins[g] for g, _, _ in places]


@pytest.mark.parametrize("ratio", [0.3, [0.3], (0.3, 0.3), 0.001, 0.999])
def test_one_share_masks_that_many_genes_and_at_least_one(ratio, cells, tokenizer):
    share = np.ravel(ratio)[0]
    batch = DataCollatorForMaskedExpression(tokenizer, ratio)(cells)
    expected = [min(length, max(1, round(share * length))) for length in LENGTHS]
    assert (batch["labels"] != IGNORED).sum(1).tolist() == expected


def test_two_shares_are_bounds_between_which_each_cell_draws_its_own(tokenizer):
    tokens = made_up([200] * 300)
    batch = DataCollatorForMaskedExpression(tokenizer, (0.15, 0.4))([tokens.cell(index) for index in range(300)])
    numbers = (batch["labels"] != IGNORED).sum(1)
    assert 30 <= numbers.min() < 33
    assert 77 < numbers.max() <= 80
    assert abs(numbers.double().mean() - 55) < 3  # four standard errors of a uniform draw are 3.3
    assert len(numbers.unique()) > 30


def test_every_place_and_every_gene_is_masked_as_often_as_others(tokenizer):
    """Positions are drawn apart from the order of genes: no place is the one to learn from."""
    (cell,) = [made_up([20]).cell(0)]
    collator = DataCollatorForMaskedExpression(tokenizer, 0.3)
    batch = collator([{**cell, "epoch": epoch} for epoch in range(1000)])
    masked = batch["labels"] != IGNORED
    by_place = masked.double().mean(0)
    by_gene = torch.bincount(batch["input_ids"][masked], minlength=1001)[cell["input_ids"]] / 1000
    for shares in (by_place, by_gene):
        assert (shares - 0.3).abs().max() < 0.07  # nearly five standard errors


def test_a_cell_of_one_gene_is_masked_whole_and_one_without_genes_is_a_cell(cells, tokenizer):
    batch = DataCollatorForMaskedExpression(tokenizer)([cells[1], cells[4]])
    assert batch["expression_bins"].tolist() == [[tokenizer.mask_bin_id], [tokenizer.pad_bin_id]]
    assert batch["labels"].tolist() == [[int(cells[1]["expression_bins"][0])], [IGNORED]]
    assert batch["attention_mask"].tolist() == [[1], [0]]
    alone = DataCollatorForMaskedExpression(tokenizer)([cells[4], cells[4]])
    assert alone["labels"].tolist() == [[IGNORED], [IGNORED]]


def test_the_cells_themselves_are_left_as_they_are(tokenizer):
    tokens = made_up([30, 20])
    rows = [tokens.cell(0), tokens.cell(1)]
    for random in (True, False):
        DataCollatorForMaskedExpression(tokenizer, max_genes=25, random=random)(rows)
    assert np.array_equal(tokens.input_ids, made_up([30, 20]).input_ids)
    assert np.array_equal(tokens.expression_bins, made_up([30, 20]).expression_bins)


# -- what is withheld -----------------------------------------------------------------------------------------------


def withheld(batch, row: int) -> list[int]:
    return [gene for gene in batch["withheld_ids"][row].tolist() if gene]


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("max_genes", [None, 50])
def test_shown_and_withheld_genes_are_together_those_of_the_cell(random, max_genes, cells, tokenizer):
    batch = DataCollatorForMaskedExpression(tokenizer, withhold_ratio=0.4, max_genes=max_genes, random=random)(cells)
    assert batch["withheld_ids"].dtype == torch.int64
    for row, (cell, length) in enumerate(zip(cells, LENGTHS, strict=True)):
        shown = [gene for gene, _, _ in drawn(batch, row)]
        assert sorted(shown + withheld(batch, row)) == sorted(cell["input_ids"].tolist())
        kept = min(length, max_genes or length)
        assert len(shown) == kept - max(0, min(kept - 1, round(0.4 * kept)))
        # Masks are a share of what is shown.
        assert (batch["labels"][row] != IGNORED).sum() == min(len(shown), max(1, round(0.3 * len(shown))))


def test_genes_beyond_the_most_that_are_kept_are_withheld(cells, tokenizer):
    batch = DataCollatorForMaskedExpression(tokenizer, max_genes=50)(cells)
    assert [len(withheld(batch, row)) for row in range(len(cells))] == [max(0, length - 50) for length in LENGTHS]


def test_where_every_gene_is_shown_there_are_no_withheld_ones(cells, tokenizer):
    assert "withheld_ids" not in DataCollatorForMaskedExpression(tokenizer)(cells)


def test_two_shares_to_withhold_are_bounds_between_which_each_cell_draws_its_own(tokenizer):
    tokens = made_up([200] * 300)
    batch = DataCollatorForMaskedExpression(tokenizer, withhold_ratio=(0.0, 0.5))(
        [tokens.cell(index) for index in range(300)]
    )
    numbers = (batch["withheld_ids"] != 0).sum(1)
    assert 0 <= numbers.min() < 5
    assert 95 < numbers.max() <= 100
    assert abs(numbers.double().mean() - 50) < 6.7  # four standard errors of a uniform draw


def test_every_gene_is_withheld_as_often_as_others(tokenizer):
    cell = made_up([20]).cell(0)
    collator = DataCollatorForMaskedExpression(tokenizer, withhold_ratio=0.3, random=False)
    batch = collator([{**cell, "epoch": epoch} for epoch in range(1000)])
    shares = torch.bincount(batch["withheld_ids"].flatten(), minlength=1001)[cell["input_ids"]] / 1000
    assert (shares - 0.3).abs().max() < 0.07  # nearly five standard errors


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_without_random_the_first_genes_stay_in_their_order_and_masks_are_drawn_all_the_same(cells, tokenizer):
    collator = DataCollatorForMaskedExpression(tokenizer, max_genes=50, random=False)
    first, other = all_drawn(collator, cells), all_drawn(collator, in_epoch(cells, 1))
    for places, cell in zip(first, cells, strict=True):
        assert [gene for gene, _, _ in places] == cell["input_ids"][:50].tolist()
    assert [[gene for gene, _, _ in places] for places in first] == [[g for g, _, _ in places] for places in other]
    assert first != other


def test_random_draws_sample_all_of_a_long_cell_in_mixed_order(cells, tokenizer):
    collator = DataCollatorForMaskedExpression(tokenizer, max_genes=50)
    draws = [all_drawn(collator, in_epoch([cells[3]], epoch))[0] for epoch in range(60)]
    genes = [[gene for gene, _, _ in places] for places in draws]
    assert {len(some) for some in genes} == {50}
    assert set().union(*genes) == set(cells[3]["input_ids"].tolist())
    order = {gene: place for place, gene in enumerate(cells[3]["input_ids"].tolist())}
    assert not any([order[gene] for gene in some] == sorted(order[gene] for gene in some) for some in genes)


def test_the_tokenizer_says_how_many_genes_stay_where_nothing_else_does(tokenizer):
    cell = made_up([1000]).cell(0)
    cell = {key: np.tile(values, 4) for key, values in cell.items()}
    collator = DataCollatorForMaskedExpression(tokenizer)
    assert collator.most_genes == tokenizer.model_max_length == 3072
    assert collator([cell])["input_ids"].shape == (1, 3072)
    assert DataCollatorForMaskedExpression(tokenizer, max_genes=5).most_genes == 5


# -- what decides the draws ------------------------------------------------------------------------------------------


def test_a_cell_is_drawn_the_same_whatever_its_batch_and_place(cells, tokenizer):
    collator = DataCollatorForMaskedExpression(tokenizer, (0.1, 0.9), max_genes=50)
    together = all_drawn(collator, cells)
    assert [all_drawn(collator, [cell])[0] for cell in cells] == together
    assert all_drawn(collator, cells[::-1]) == together[::-1]
    assert all_drawn(collator, cells[3:7]) == together[3:7]
    # Nor by what torch and numpy drew before.
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert all_drawn(DataCollatorForMaskedExpression(tokenizer, (0.1, 0.9), max_genes=50), cells) == together


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda values: values.tolist(), id="lists"),
        pytest.param(lambda values: torch.tensor(values.tolist(), dtype=torch.int64), id="tensors"),
        pytest.param(lambda values: values.astype(np.uint16), id="uint16"),
        pytest.param(lambda values: values.astype(np.int64), id="int64"),
        pytest.param(lambda values: np.repeat(values, 2)[::2], id="strided"),
    ],
)
def test_a_cell_is_drawn_the_same_whatever_holds_its_numbers(convert, cells, tokenizer):
    collator = DataCollatorForMaskedExpression(tokenizer, max_genes=50)
    others = [
        {"input_ids": convert(cell["input_ids"]), "expression_bins": convert(cell["expression_bins"]), "epoch": 0}
        for cell in cells
    ]
    assert all_drawn(collator, others) == all_drawn(collator, cells)


def test_workers_draw_what_one_process_draws(cells, tokenizer):
    dataset = cell_dataset(made_up())
    collator = DataCollatorForMaskedExpression(tokenizer, max_genes=50)
    loaders = [DataLoader(dataset, batch_size=3, collate_fn=collator, num_workers=number) for number in (0, 2)]
    alone, shared = (
        [drawn(batch, row) for batch in loader for row in range(len(batch["labels"]))] for loader in loaders
    )
    assert alone == shared == all_drawn(collator, cells)


@pytest.mark.parametrize("random", [True, False])
def test_another_epoch_and_another_seed_draw_otherwise(random, cells, tokenizer):
    def draw(epoch=0, seed=0):
        collator = DataCollatorForMaskedExpression(tokenizer, max_genes=50, random=random, seed=seed)
        return all_drawn(collator, in_epoch(cells, epoch))

    settings = [{}, {"epoch": 1}, {"epoch": 2}, {"seed": 1}, {"seed": 1, "epoch": 1}, {"seed": 2**32 - 1}]
    found = [draw(**some) for some in settings]
    for row, length in enumerate(LENGTHS):
        if length >= 40:
            assert len({str(draws[row]) for draws in found}) == len(settings)
    assert draw(epoch=np.int64(1)) == found[1]


def test_a_cell_without_an_epoch_is_in_the_first(cells, tokenizer):
    collator = DataCollatorForMaskedExpression(tokenizer)
    without = [{key: cell[key] for key in ("input_ids", "expression_bins")} for cell in cells]
    assert all_drawn(collator, without) == all_drawn(collator, cells)


@pytest.mark.parametrize("changed", ["input_ids", "expression_bins"])
def test_cells_that_differ_in_one_token_are_drawn_apart(changed, cells, tokenizer):
    cell = {**cells[3], changed: cells[3][changed].copy()}
    cell[changed][-1] = 1001 if changed == "input_ids" else cells[3][changed][-1] % 50 + 1
    batch = DataCollatorForMaskedExpression(tokenizer, random=False)([cells[3], cell])
    masked = batch["labels"] != IGNORED
    assert masked[0].sum() == masked[1].sum() == 90
    # Independent masks have 27 in common.
    assert (masked[0] & masked[1]).sum() < 50


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio",
    [0, 0.0, 1, 1.0, -0.1, 1.5, float("nan"), (0.4, 0.15), (0.0, 0.3), (0.3, 1.0), (0.1, 0.2, 0.3), [[0.1, 0.2]], ()],
    ids=str,
)
def test_shares_that_cannot_be_masked_are_errors(ratio, tokenizer):
    with pytest.raises(ValueError, match="`mask_ratio` is a share above 0 and below 1") as error:
        DataCollatorForMaskedExpression(tokenizer, ratio)
    assert f"got {ratio!r}." in str(error.value)
    assert "Pass 0.3, or (0.15, 0.4)" in str(error.value)


@pytest.mark.parametrize("ratio", [1, -0.1, float("nan"), (0.4, 0.15), (0.1, 0.2, 0.3), ()], ids=str)
def test_shares_that_cannot_be_withheld_are_errors(ratio, tokenizer):
    with pytest.raises(ValueError, match="`withhold_ratio` is a share of at least 0 and below 1") as error:
        DataCollatorForMaskedExpression(tokenizer, withhold_ratio=ratio)
    assert f"got {ratio!r}." in str(error.value)


@pytest.mark.parametrize("missing", ["input_ids", "expression_bins"])
def test_cells_without_tokens_are_an_error_that_says_what_to_do(missing, cells, tokenizer):
    bad = [{key: values for key, values in cell.items() if key != missing} for cell in cells]
    with pytest.raises(ValueError, match=r"Cells need 'input_ids' and 'expression_bins', got .*remove_unused_columns"):
        DataCollatorForMaskedExpression(tokenizer)(bad)
