"""Schedules of batches: every cell once a pass, within the budget, the same whoever runs them."""

from itertools import chain

import numpy as np
import pytest
from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from panfoma_hf import DataCollatorForMaskedExpression, cell_dataset
from panfoma_hf.data.batches import BATCHES_SORTED_TOGETHER, Batching, BatchSchedule, EpochCells
from panfoma_hf.tokenization import CellTokens


LENGTHS = np.random.default_rng(0).lognormal(4, 0.8, 500).astype(int)
LENGTHS[[3, 77]] = 0
SIZES = [{"cells_per_batch": 8}, {"tokens_per_batch": 600}, {"tokens_per_batch": 600, "max_genes": 90}]
some_sizes = pytest.mark.parametrize("sizes", SIZES, ids=["cells", "tokens", "tokens_of_cut_cells"])


def schedule(num_batches: int, lengths=LENGTHS, **options) -> BatchSchedule:
    return BatchSchedule(lengths, Batching(**options), num_batches)


def one_pass(sizes: dict, **options) -> list[list[int]]:
    """Batches of the first pass."""
    number = schedule(0, **sizes, **options).batches_of(1)
    return list(schedule(number, **sizes, **options))


# -- what is in batches ----------------------------------------------------------------------------------------------


@some_sizes
def test_each_pass_holds_every_cell_once(sizes):
    whole = schedule(0, **sizes)
    ends = [whole.batches_of(passes) for passes in range(4)]
    batches = list(schedule(ends[-1], **sizes))
    for epoch in range(3):
        keys = np.array(list(chain(*batches[ends[epoch] : ends[epoch + 1]])))
        assert (keys // len(LENGTHS) == epoch).all()
        assert sorted(keys % len(LENGTHS)) == list(range(len(LENGTHS)))
    assert all(type(key) is int for batch in batches for key in batch)
    first, second = (list(chain(*batches[ends[epoch] : ends[epoch + 1]])) for epoch in range(2))
    assert [key + len(LENGTHS) for key in first] != second


@some_sizes
def test_a_batch_keeps_to_its_size_padding_included(sizes):
    lengths = np.minimum(LENGTHS, sizes.get("max_genes", 10**9))
    batches = one_pass(sizes)
    for batch in batches:
        assert len(batch) > 0
        if "cells_per_batch" in sizes:
            assert len(batch) <= 8
        elif len(batch) > 1:
            assert len(batch) * lengths[batch].max() <= 600
    if "tokens_per_batch" in sizes:
        # Some cells are longer than the budget, unless they are cut: each is by itself.
        assert {len(batch) for batch in batches if lengths[batch].max() > 600} == (
            {1} if lengths.max() > 600 else set()
        )
        assert (lengths.max() > 600) == ("max_genes" not in sizes)


def test_cells_of_a_batch_are_of_like_length_and_batches_in_mixed_order():
    batches = one_pass({"tokens_per_batch": 600, "max_genes": 300})
    lengths = np.minimum(LENGTHS, 300)
    positions = sum(len(batch) * lengths[batch].max() for batch in batches)
    assert lengths.sum() / positions > 0.9
    assert sum(len(batch) for batch in batches) / len(batches) > 4
    longest = [lengths[batch].max() for batch in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)
    # Half of the batches are filled up: another cell of that length would not fit.
    assert np.mean([(len(batch) + 1) * lengths[batch].max() > 600 for batch in batches]) > 0.5


def test_each_pass_mixes_cells_over_all_of_the_corpus():
    lengths = np.full(4 * 4 * BATCHES_SORTED_TOGETHER, 10)
    batches = list(schedule(BATCHES_SORTED_TOGETHER, lengths, cells_per_batch=4))
    seen = np.array(list(chain(*batches)))
    # The first quarter of a pass comes from all quarters of the corpus.
    shares = np.bincount(seen * 4 // len(lengths), minlength=4) / len(seen)
    assert (np.abs(shares - 0.25) < 0.12).all()


def test_cutting_by_length_puts_the_longest_first_and_loses_no_cell():
    cells, lengths = np.array([10, 11, 12, 13, 14]), np.array([3, 9, 3, 0, 5])
    cut = Batching(cells_per_batch=2).cut(cells, lengths)
    assert [batch.tolist() for batch in cut] == [[11, 14], [10, 12], [13]]
    cut = Batching(tokens_per_batch=10).cut(cells, lengths)
    assert [batch.tolist() for batch in cut] == [[11], [14, 10], [12, 13]]
    cut = Batching(tokens_per_batch=4).cut(cells, lengths)
    assert [batch.tolist() for batch in cut] == [[11], [14], [10], [12], [13]]
    assert Batching(cells_per_batch=2).cut(cells[:0], lengths[:0]) == []


# -- what decides the schedule ---------------------------------------------------------------------------------------


@some_sizes
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_take_turns_at_the_batches_of_one(sizes, num_processes):
    alone = list(schedule(40 * num_processes, **sizes))
    for index in range(num_processes):
        own = list(schedule(40, **sizes, process_index=index, num_processes=num_processes))
        assert own == alone[index::num_processes]
    assert len(own) == len(schedule(40, **sizes, process_index=index, num_processes=num_processes)) == 40


@some_sizes
def test_the_schedule_follows_from_the_seed_and_begins_the_same_however_long_it_is(sizes):
    again = schedule(150, **sizes, seed=5)
    straight = list(again)
    assert list(again) == list(schedule(150, **sizes, seed=5)) == straight
    assert list(schedule(60, **sizes, seed=5)) == straight[:60]
    assert list(schedule(150, **sizes, seed=6)) != straight
    again.num_batches = 70
    assert len(again) == 70
    assert list(again) == straight[:70]


@some_sizes
def test_a_resumed_run_goes_on_where_a_straight_one_is(sizes, tokenizer):
    """Skipping as Trainer does it, over the end of a pass."""
    cells = EpochCells(dataset_of(np.minimum(LENGTHS, 40)))
    collator = DataCollatorForMaskedExpression(tokenizer)
    sampler = schedule(90, cells.lengths, **sizes)
    assert sampler.batches_of(1) < 80
    straight = list(DataLoader(cells, batch_sampler=sampler, collate_fn=collator))
    rest = list(skip_first_batches(DataLoader(cells, batch_sampler=sampler, collate_fn=collator), 80))
    assert (len(straight), len(rest)) == (90, 10)
    assert max(batch["input_ids"].numel() for batch in straight) <= (8 * 40 if "cells_per_batch" in sizes else 600)
    for batch, expected in zip(rest, straight[80:], strict=True):
        assert all((batch[key] == expected[key]).all() for key in expected)


@some_sizes
def test_batches_of_some_passes_are_those_that_hold_so_many_cells(sizes):
    whole = schedule(0, **sizes)
    assert whole.batches_of(0) == 0
    ends = np.cumsum([len(batch) for batch in schedule(whole.batches_of(3), **sizes)])
    assert ends[-1] == 3 * len(LENGTHS)
    for passes in (0.1, 0.5, 1, 1.7, 3):
        number = whole.batches_of(passes)
        assert ends[number - 1] >= passes * len(LENGTHS) > (ends[number - 2] if number > 1 else 0)
        assert schedule(0, **sizes, process_index=1, num_processes=2).batches_of(passes) == number


# -- keys ------------------------------------------------------------------------------------------------------------


def dataset_of(lengths):
    generator = np.random.default_rng(1)
    total = int(np.sum(lengths))
    genes = [generator.permutation(1000)[:length] + 1 for length in lengths]
    bins = generator.integers(1, 51, total).astype(np.uint8)
    tokens = CellTokens(np.concatenate(genes).astype(np.int32), bins, np.append(0, np.cumsum(lengths)))
    return cell_dataset(tokens, labels=np.arange(len(lengths)))


def test_keys_say_which_cell_and_which_pass():
    dataset = dataset_of([3, 0, 5, 2])
    # As pretraining chooses its cells: rows of a larger data set, in their order.
    cells = EpochCells(dataset.select([3, 1, 2]))
    assert (len(cells), cells.num_cells, cells.lengths.tolist()) == (3, 3, [2, 0, 5])
    rows = cells.__getitems__([2, 3, 0, 2, 13])
    assert [row["epoch"] for row in rows] == [0, 1, 0, 0, 4]
    for row, index in zip(rows, [2, 3, 3, 2, 1], strict=True):
        assert set(row) == {"input_ids", "expression_bins", "epoch"}
        assert np.array_equal(row["input_ids"], dataset[index]["input_ids"])
        assert np.array_equal(row["expression_bins"], dataset[index]["expression_bins"])
    assert cells[5]["epoch"] == 1
    assert np.array_equal(cells[5]["input_ids"], dataset[2]["input_ids"])


def test_a_schedule_over_epoch_cells_reads_every_cell_in_every_pass():
    lengths = np.arange(1, 21)
    cells = EpochCells(dataset_of(lengths))
    assert np.array_equal(cells.lengths, lengths)
    sampler = BatchSchedule(cells.lengths, Batching(tokens_per_batch=40))
    sampler.num_batches = sampler.batches_of(2)
    loader = DataLoader(cells, batch_sampler=sampler, collate_fn=list)
    read = sorted((row["epoch"], len(row["input_ids"])) for batch in loader for row in batch)
    assert read == [(epoch, length) for epoch in range(2) for length in lengths.tolist()]


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"cells_per_batch": 8, "tokens_per_batch": 600},
        {"cells_per_batch": 0},
        {"tokens_per_batch": 0},
        {"cells_per_batch": -1},
        {"cells_per_batch": 8, "tokens_per_batch": 0},
    ],
    ids=str,
)
def test_a_batch_without_exactly_one_size_is_an_error(sizes):
    with pytest.raises(ValueError, match="either a number of cells or a number of tokens, at least 1, got") as error:
        Batching(**sizes)
    assert f"cells_per_batch={sizes.get('cells_per_batch')}" in str(error.value)
    assert "Give one." in str(error.value)


def test_a_schedule_without_cells_is_an_error():
    with pytest.raises(ValueError, match=r"at least one cell, got none\. Choose studies"):
        BatchSchedule([], Batching(cells_per_batch=1), 3)
