"""Cells through a model: batches that fit a budget of memory, the next chunk's tokens made meanwhile."""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data.cells import MIN_COVERAGE, Expression
from ..data.collator import DataCollatorForCells
from ..modeling import PanFoMaConfig, PanFoMaPreTrainedModel
from ..tokenization import CellTokens, PanFoMaTokenizer


# On a CPU: some fifteen of the longest cells for `small`, which itself works on fewer at a time.
CPU_MEMORY = 2**30
# Of what is free on a GPU; the rest is for what the allocator cannot fit in.
GPU_SHARE = 0.5
# A cell counts as at least so many tokens, so that a batch of nearly empty cells has an end.
SHORTEST = 64
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_END = object()


@dataclass(frozen=True)
class Options:
    """How cells are read and run; each field is an argument of `embed`.

    Raises
    ------
    ValueError
        If one is out of range.
    """

    tokenizer: PanFoMaTokenizer | None = None
    layer: str | None = None
    gene_column: str | None = None
    min_coverage: float = MIN_COVERAGE
    memory: int | str | None = None
    batch_size: int | None = None
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    num_threads: int | None = None
    progress: bool = True

    def __post_init__(self):
        bytes_of(self.memory)
        dtype_of(self.dtype)
        for name in ("batch_size", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}. Leave it out to have it chosen.")

    @property
    def dtype_name(self) -> str:
        """Of matrix products."""
        return str(dtype_of(self.dtype)).removeprefix("torch.")

    @property
    def reading(self) -> dict:
        """The arguments of `read_expression` among them."""
        return {"layer": self.layer, "gene_column": self.gene_column, "min_coverage": self.min_coverage}


def bytes_of(memory: int | str | None) -> int | None:
    """A budget of memory in bytes.

    Parameters
    ----------
    memory
        Bytes, or a text such as "4GB", "500MB" or "2GiB"; None stays None.

    Raises
    ------
    ValueError
        If it is no amount above 0.
    """
    if memory is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", str(memory))
    size = int(float(match[1]) * {**_UNITS, **_BINARY_UNITS}[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError(f"`memory` is an amount above 0, got {memory!r}. Pass bytes, or a text such as '4GB'.")
    return size


def dtype_of(dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype of matrix products; None is float32.

    Raises
    ------
    ValueError
        If it is neither float32 nor bfloat16.
    """
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"`dtype` must be 'float32' or 'bfloat16', got {dtype!r}. bfloat16 is the fast one on a GPU.")
    return getattr(torch, name)


def bytes_per_token(config: PanFoMaConfig) -> int:
    """What a token of a batch takes at most, while a model runs without gradients in float32.

    Counted from what is alive at once in a decoder layer (in both directions: projection, convolution, step sizes and
    output, each as wide as the mixer or twice that) and beside it (embeddings, states before and after sorting, the
    outputs of all decoder layers), or in an encoder layer where that is more.
    """
    hidden, channels = config.hidden_size, config.mamba_intermediate_size
    decoder = 2 * (6 * channels + 2 * config.state_size + config.time_step_rank)
    encoder = 4 * hidden + 2 * config.intermediate_size
    return 4 * ((14 + config.num_decoder_layers) * hidden + max(decoder, encoder))


def tokens_per_batch(model: PanFoMaPreTrainedModel, memory: int | str | None) -> int:
    """How many tokens, pads among them, a batch may have to stay within a budget of memory."""
    memory = bytes_of(memory)
    if memory is None and model.device.type == "cuda":
        memory = GPU_SHARE * torch.cuda.mem_get_info(model.device)[0]
    return max(SHORTEST, int((CPU_MEMORY if memory is None else memory) / bytes_per_token(model.config)))


def length_batches(lengths: np.ndarray, max_tokens: int, batch_size: int | None = None) -> Iterator[np.ndarray]:
    """Cut cells into batches of like length, the longest first, to fail early on memory.

    Parameters
    ----------
    lengths
        (cells,), tokens of each cell.
    max_tokens
        Tokens of a batch with its pads; a longer cell has one by itself.
    batch_size
        Cells of a batch, in place of ``max_tokens``.

    Returns
    -------
    Indices of the cells of each batch.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = batch_size or max(1, max_tokens // max(int(lengths[order[start]]), SHORTEST))
        yield order[start : start + size]
        start += size


def prefetched(items: Iterable) -> Iterator:
    """The items, each made on a thread of its own while the one before it is worked on."""
    iterator = iter(items)
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator, _END)
        while (item := coming.result()) is not _END:
            coming = pool.submit(next, iterator, _END)
            yield item


@contextmanager
def _ready(model: torch.nn.Module, num_threads: int | None) -> Iterator[None]:
    """The model in evaluation and torch on so many threads; as they were afterwards."""
    was_training, threads = model.training, torch.get_num_threads()
    model.eval()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        model.train(was_training)
        torch.set_num_threads(threads)


@dataclass
class Runner:
    """Runs a model over cells, a chunk at a time.

    Parameters
    ----------
    model
        In evaluation while it runs, on the device where it is.
    tokenizer
        Tokenizes and pads.
    options
        As in `embed`.
    model_seconds
        Time that the model itself took so far.
    """

    model: PanFoMaPreTrainedModel
    tokenizer: PanFoMaTokenizer
    options: Options
    model_seconds: float = 0.0

    def chunks(
        self,
        expression: Expression,
        which: Sequence[int] | None = None,
        is_kept: np.ndarray | None = None,
        done: int = 0,
    ) -> Iterator[tuple[int, CellTokens, Iterator]]:
        """Go through chunks of cells.

        Parameters
        ----------
        expression
            The cells.
        which
            Places of the chunks in ``expression.bounds``; None takes all.
        is_kept
            (cells,), which cells to run; None takes all.
        done
            Cells of an earlier run, for the progress bar.

        Returns
        -------
        Of each chunk its place, its tokens, and its batches as `_batches` gives them, which are to be gone through.
        """
        bounds = expression.bounds
        which = range(len(bounds)) if which is None else which
        total = sum(bounds[index][1] - bounds[index][0] for index in which)
        total = done + (total if is_kept is None else int(is_kept.sum()))
        max_tokens = tokens_per_batch(self.model, self.options.memory)  # before the run itself takes memory
        bar = tqdm(total=total, initial=done, desc="PanFoMa", unit=" cells", disable=not self.options.progress)
        with _ready(self.model, self.options.num_threads), bar:
            tokens_of_chunks = prefetched(expression.tokens(self.tokenizer, is_kept=is_kept, which=which))
            for index, tokens in zip(which, tokens_of_chunks, strict=True):
                yield index, tokens, self._batches(tokens, max_tokens, bar)

    def _batches(self, tokens: CellTokens, max_tokens: int, bar: tqdm) -> Iterator[tuple[np.ndarray, dict, dict]]:
        """Of each batch its cells' indices, what the model was given (cells, seq), and its output."""
        lengths = np.minimum(tokens.lengths, self.tokenizer.model_max_length)
        collate = DataCollatorForCells(self.tokenizer, random=False)
        batches = length_batches(lengths, max_tokens, self.options.batch_size)
        for index, batch in prefetched((index, collate([tokens.cell(cell) for cell in index])) for index in batches):
            batch = {key: tensor.to(self.model.device) for key, tensor in batch.items()}
            started = time.perf_counter()
            output = self._forward(batch)
            self.model_seconds += time.perf_counter() - started
            yield index, batch, output
            bar.update(len(index))

    def _forward(self, batch: dict[str, torch.Tensor]) -> dict:
        device, dtype = self.model.device, dtype_of(self.options.dtype)
        autocast = nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)
        # Not inference mode: it would mark weights that a sharded model gathers as unfit for training.
        try:
            with torch.no_grad(), autocast:
                output = self.model(**batch)
            if device.type == "cuda":  # whose work is only begun
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError as error:
            cells, length = batch["input_ids"].shape
            raise MemoryError(
                f"A batch must fit into the memory of {device}, got {cells:,} cells of up to {length:,} genes that do "
                "not. Allow a batch less, such as `memory='1GB'` (--memory); finished chunks of a file are kept."
            ) from error
        return output

    def results(
        self, expression: Expression, outputs: Sequence[str], which: Sequence[int] | None = None, done: int = 0
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Results of each chunk: its place, and arrays by name.

        Parameters
        ----------
        expression, which, done
            As in `chunks`.
        outputs
            Names of the model's outputs to keep, one row a cell each.

        Returns
        -------
        Of each chunk its place and ``outputs`` (cells, ...) in float32, in the order of the cells, with ``lengths``
        (cells,), the genes read of each cell, and ``gene_ids``, the ids of all these genes.
        """
        for index, tokens, batches in self.chunks(expression, which, done=done):
            found: dict[str, np.ndarray] = {}
            for cells, _, output in batches:
                for name in outputs:
                    values = output[name].float().cpu().numpy()
                    if name not in found:
                        found[name] = np.empty((len(tokens), *values.shape[1:]), dtype=np.float32)
                    found[name][cells] = values
            yield (
                index,
                {
                    **found,
                    "lengths": tokens.lengths.astype(np.int32),
                    "gene_ids": np.unique(tokens.input_ids).astype(np.int32),
                },
            )


def joined(parts: Iterable[tuple[int, dict[str, np.ndarray]]], bounds: Sequence[tuple[int, int]]) -> dict:
    """Results of chunks, put together in the order of the cells; only the results of one chunk are held twice."""
    found: dict[str, np.ndarray] = {}
    gene_ids = np.empty(0, dtype=np.int32)
    for index, part in parts:
        gene_ids = np.union1d(gene_ids, part["gene_ids"])
        for name in part.keys() - {"gene_ids"}:
            if name not in found:
                found[name] = np.empty((bounds[-1][1], *part[name].shape[1:]), dtype=part[name].dtype)
            found[name][slice(*bounds[index])] = part[name]
    return {**found, "gene_ids": gene_ids}
