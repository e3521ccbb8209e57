"""Cells of a corpus as they come from its shards, for corpora that are not to be stored."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from torch.utils.data import IterableDataset, get_worker_info

from .. import schema
from ..batches import Batching
from ..cell_file import one_line
from .choice import HELD_OUT_CANCER_TYPES, HELD_OUT_DONORS, TRAIN, CellChoice
from .corpus import Corpus, CorpusError
from .splits import PARTS


# Shards that are read at the same time: their cells mix.
SHARDS_AT_ONCE = 8


class StreamedCells(IterableDataset):
    """Batches of cells of like length, pass after pass without end, read from the shards in turn.

    Shards are dealt to processes and their workers anew in each pass. A worker reads some at a time, mixes their cells
    in a pool, and cuts the pool into batches. So cells are mixed less than by a `BatchSchedule`, and which ones meet
    depends on the number of processes and workers; with the same numbers it is always the same.

    Parameters
    ----------
    corpus
        The corpus; opened with ``streaming=True``, shards are read from the Hub.
    choice
        Which cells.
    batching
        How they are put into batches.
    purpose
        Cells of which purpose; see `choice`.
    passes
        Passes to give; None for no end. Processes end theirs on their own: where shards differ in size, one may be
        passes ahead of another after long.

    Raises
    ------
    ValueError
        If no shard can hold cells to learn from; while reading without end, if none does.
    """

    def __init__(
        self,
        corpus: Corpus,
        choice: CellChoice,
        batching: Batching,
        *,
        purpose: int = TRAIN,
        passes: int | None = None,
    ):
        choice.check(corpus)
        self.corpus, self.choice, self.batching = corpus, choice, batching
        self.purpose, self.passes = purpose, passes
        self.parts = corpus.split(choice.split)
        shards = corpus.manifest["shards"]
        self.starts = np.cumsum([0, *(shard["cells"] for shard in shards)])
        measured = {name: study["genes_measured"] for name, study in corpus.manifest["studies"].items()}
        studies = [corpus.manifest["units"][shard["unit"]]["study"] for shard in shards]
        #: Shards that may hold such cells; others are not opened.
        self.shards = [
            number
            for number, study in enumerate(studies)
            if measured[study] >= choice.min_genes_measured
            and not (purpose == TRAIN and study in choice.held_out_studies)
            and self._may_hold(number)
        ]
        if not self.shards and purpose == TRAIN:
            raise choice.nothing_left(corpus)
        # Of these shards; without reading them, cells of cancer types that are held out cannot be told.
        self.num_cells = sum(shards[number]["cells"] for number in self.shards)
        self.mean_length = corpus.manifest["totals"]["tokens"] / max(1, len(corpus))

    def _may_hold(self, number: int) -> bool:
        """Whether a shard can hold held-out cells, as far as its part of the split and the choice tell."""
        if self.purpose == HELD_OUT_CANCER_TYPES:
            return bool(self.choice.held_out_cancer_types)
        if self.purpose == HELD_OUT_DONORS:
            parts = self.parts[self.starts[number] : self.starts[number + 1]]
            return bool((parts == PARTS.index("validation")).any())
        return True

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        if not self.shards:
            return
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, info.id)
        readers = self.batching.num_processes * workers
        reader = self.batching.process_index * workers + worker
        if readers > len(self.shards):
            raise ValueError(
                f"Each process and worker needs a shard of its own, got {readers} of them for {len(self.shards)} "
                "shards. Use fewer workers (`dataloader_num_workers`), or read the corpus from disk."
            )
        pool_size = self.batching.pool_size(self.mean_length)
        seed, epoch, found = self.batching.seed, 0, False
        while self.passes is None or epoch < self.passes:
            generator = np.random.default_rng([seed, epoch, reader])
            order = np.random.default_rng([seed, epoch]).permutation(self.shards)
            mine = self._mixed(order[reader::readers].tolist(), epoch)
            while pool := list(islice(mine, pool_size)):
                found = True
                generator.shuffle(pool)
                lengths = self.batching.kept([len(cell[schema.INPUT_IDS]) for cell in pool])
                batches = self.batching.cut(np.arange(len(pool)), lengths)
                for number in generator.permutation(len(batches)):
                    yield [pool[index] for index in batches[number]]
            # A reader's own shards may hold none in this pass; if no shard does, this would never end.
            if self.passes is None and not found:
                if next(self._mixed(self.shards, epoch), None) is None:
                    raise self.choice.nothing_left(self.corpus)
                found = True
            epoch += 1

    def _mixed(self, shards: list[int], epoch: int) -> Iterator[dict[str, Any]]:
        """Cells of several shards in turn."""
        waiting = iter(shards)
        open_shards = []
        while True:
            while len(open_shards) < SHARDS_AT_ONCE and (number := next(waiting, None)) is not None:
                open_shards.append(self._cells(number, epoch))
            if not open_shards:
                return
            for cells in list(open_shards):
                cell = next(cells, None)
                if cell is None:
                    open_shards.remove(cells)
                else:
                    yield cell

    def _cells(self, number: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Cells of a shard that serve the purpose."""
        shard = self.corpus.manifest["shards"][number]
        study = self.corpus.manifest["units"][shard["unit"]]["study"]
        start, seen = int(self.starts[number]), 0
        try:
            with self.corpus.open_shard(shard) as file, pa.ipc.open_stream(file) as stream:
                for batch in stream:
                    table = pa.Table.from_batches([batch])
                    parts = self.parts[start + seen : start + seen + len(table)]
                    seen += len(table)
                    purposes = self.choice.purposes(self.corpus, study, parts, table[schema.CANCER_TYPE])
                    genes, bins = (batch.column(name) for name in (schema.INPUT_IDS, schema.EXPRESSION_BINS))
                    for row in np.flatnonzero(purposes == self.purpose).tolist():
                        yield {
                            schema.INPUT_IDS: genes[row].values.to_numpy(),
                            schema.EXPRESSION_BINS: bins[row].values.to_numpy(),
                            schema.EPOCH: epoch,
                        }
        except Exception as error:  # of the network, the Hub or the disk, from several libraries
            raise CorpusError(
                f"Shards must be as they were written, got {one_line(error)} in {shard['path']}. Check the connection, "
                "and the corpus: `panfoma corpus info CORPUS --verify`."
            ) from error
        if seen != shard["cells"]:
            raise CorpusError(
                f"A shard must hold the cells that the manifest says, got {seen:,} of {shard['cells']:,} in "
                f"{shard['path']}. Build or download the corpus again."
            )


def gather(corpus: Corpus, choice: CellChoice, purpose: int, num_cells: int) -> Dataset:
    """The first cells of a stream as a data set in memory, at most ``num_cells``; the same ones each time."""
    stream = StreamedCells(corpus, choice, Batching(cells_per_batch=1), purpose=purpose, passes=1)
    cells = [cell for batch in islice(stream, num_cells) for cell in batch]
    columns = {name: [cell[name] for cell in cells] for name in (schema.INPUT_IDS, schema.EXPRESSION_BINS)}
    lengths = [len(cell[schema.INPUT_IDS]) for cell in cells]
    return Dataset.from_dict({**columns, schema.LENGTH: lengths}, features=schema.features()).with_format("numpy")
