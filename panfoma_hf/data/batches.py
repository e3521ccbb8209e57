"""Which cells make up each batch of a long run, decided before it starts, whatever runs it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler

from . import schema


# Batches whose cells are drawn together and then sorted by length, so that little of a batch is padding.
BATCHES_SORTED_TOGETHER = 64


@dataclass(frozen=True)
class Batching:
    """How cells are put into batches, and which of the batches are a process'.

    Parameters
    ----------
    cells_per_batch
        Cells of a batch; or None.
    tokens_per_batch
        Most genes of a batch, padding included, in place of ``cells_per_batch``; a longer cell is a batch by itself.
    max_genes
        Genes of a cell that are kept, where it has more.
    seed
        Of the order of cells and batches.
    process_index, num_processes
        Whose batches to give.

    Raises
    ------
    ValueError
        If not exactly one of the two sizes is given, or it is less than 1.
    """

    cells_per_batch: int | None = None
    tokens_per_batch: int | None = None
    max_genes: int | None = None
    seed: int = 0
    process_index: int = 0
    num_processes: int = 1

    def __post_init__(self):
        sizes = [size for size in (self.cells_per_batch, self.tokens_per_batch) if size is not None]
        if len(sizes) != 1 or sizes[0] < 1:
            raise ValueError(
                "A batch has either a number of cells or a number of tokens, at least 1, got "
                f"cells_per_batch={self.cells_per_batch} and tokens_per_batch={self.tokens_per_batch}. Give one."
            )

    def kept(self, lengths: Sequence[int]) -> np.ndarray:
        """(cells,) int64, genes that are kept of cells of such lengths."""
        return np.minimum(np.asarray(lengths, dtype=np.int64), self.max_genes or np.iinfo(np.int64).max)

    def pool_size(self, mean_length: float) -> int:
        """Cells that are drawn together before they are sorted by length."""
        typical = self.cells_per_batch or max(1, int(self.tokens_per_batch / max(1.0, mean_length)))
        return typical * BATCHES_SORTED_TOGETHER

    def cut(self, cells: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """Cut some cells into batches of like length, the longest first."""
        order = np.argsort(-lengths, kind="stable")
        batches, start = [], 0
        while start < len(order):
            longest = max(1, int(lengths[order[start]]))
            size = self.cells_per_batch or max(1, self.tokens_per_batch // longest)
            batches.append(cells[order[start : start + size]])
            start += size
        return batches


class BatchSchedule(Sampler[list[int]]):
    """Batches of cells of like length, pass after pass over a corpus, for a number of steps.

    The schedule follows from lengths, batching and seed alone. Processes take turns: batch ``i`` of the whole run goes
    to process ``i % num_processes``. So a step of two processes reads the same cells as a step of one that accumulates
    two batches, and a run that is resumed goes on where it was.

    A batch is a list of keys ``epoch * cells + index``, which `EpochCells` understands.

    Parameters
    ----------
    lengths
        (cells,), genes of each cell.
    batching
        How they are put into batches.
    num_batches
        Batches of each process; settable.

    Raises
    ------
    ValueError
        If there are no cells.
    """

    def __init__(self, lengths: Sequence[int], batching: Batching, num_batches: int = 0):
        self.lengths = batching.kept(lengths)
        if not len(self.lengths):
            raise ValueError("A schedule needs at least one cell, got none. Choose studies that have cells.")
        self.batching = batching
        self.num_batches = num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        for index, batch in enumerate(self._all_batches()):
            if index == self.num_batches * self.batching.num_processes:
                return
            if index % self.batching.num_processes == self.batching.process_index:
                yield batch

    def batches_of(self, passes: float) -> int:
        """How many batches, of all processes, hold so many passes over the cells."""
        cells = 0
        for index, batch in enumerate(self._all_batches()):
            if cells >= passes * len(self.lengths):
                return index
            cells += len(batch)
        raise AssertionError("batches do not end")

    def _all_batches(self) -> Iterator[list[int]]:
        """Batches of all processes, without end."""
        num_cells = len(self.lengths)
        pool_size = self.batching.pool_size(self.lengths.mean())
        epoch = 0
        while True:
            generator = np.random.default_rng([self.batching.seed, epoch])
            order = generator.permutation(num_cells)
            for start in range(0, num_cells, pool_size):
                pool = order[start : start + pool_size]
                batches = self.batching.cut(pool, self.lengths[pool])
                for number in generator.permutation(len(batches)):
                    yield (batches[number] + epoch * num_cells).tolist()
            epoch += 1


class EpochCells:
    """Cells by the keys of a `BatchSchedule`, each with the pass that it is read in.

    Parameters
    ----------
    dataset
        Tokenized cells, one row each, with their ``length``.
    """

    def __init__(self, dataset: Dataset):
        self.lengths = np.asarray(dataset.select_columns([schema.LENGTH])[:][schema.LENGTH])
        # Other columns would be read and decoded with every cell.
        self.dataset = dataset.select_columns([schema.INPUT_IDS, schema.EXPRESSION_BINS])

    @property
    def num_cells(self) -> int:
        """Cells of one pass."""
        return len(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[int]) -> list[dict[str, Any]]:
        rows = self.dataset.__getitems__([key % len(self) for key in keys])
        return [{**row, schema.EPOCH: key // len(self)} for key, row in zip(keys, rows, strict=True)]

    def __getitem__(self, key: int) -> dict[str, Any]:
        return self.__getitems__([key])[0]
