"""From a file of cells to a file with results, a chunk at a time; a run that is cut off goes on where it stopped."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from accelerate import PartialState
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from transformers.utils import logging

from ..data.cell_file import CellFile
from ..data.cells import Expression, read_expression, tokenizer_fingerprint
from ..data.readers import open_cells, signature
from ..tokenization import PanFoMaTokenizer
from ..version import __version__
from .files import check_keys, check_source, remove, restore, write_output, write_whole
from .loading import model_fingerprint
from .results import Additions, Inference
from .running import Options, joined


logger = logging.get_logger(__name__)

# What a part holds and how; raised whenever the same settings give other parts.
PART_FORMAT = 1
MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
_OURS = re.compile(r"manifest\.json(\.tmp)?|\.lock|chunk-\d+\.safetensors(\.tmp)?|(unfinished|replaced)\.(h5ad|zarr)")
# Between looks for the parts of other processes.
_WAIT_SECONDS = 0.2


@dataclass
class FileReport:
    """What a run from file to file did.

    Parameters
    ----------
    output
        The file.
    is_written
        Whether this process wrote it: of several only the first one does.
    cells
        Cells of the file.
    cells_resumed
        Those whose results were there from an earlier run.
    cells_run
        Those that this process ran.
    empty_cells
        Those without an expressed gene that the model knows.
    seconds
        From the call to the finished file.
    model_seconds
        Of these, what the model itself took.
    keys
        What was written, such as ``obs["panfoma_cell_type"]``.
    names
        By column of ``obs``, how many cells have each name.
    """

    output: str
    is_written: bool = False
    cells: int = 0
    cells_resumed: int = 0
    cells_run: int = 0
    empty_cells: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    keys: list[str] = field(default_factory=list)
    names: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def cells_per_second(self) -> float:
        """Of the cells that were run, by all processes where this is their report, all of the time counted."""
        run = self.cells - self.cells_resumed if self.is_written else self.cells_run
        return run / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict:
        """The report as what JSON can hold."""
        return {**asdict(self), "cells_per_second": self.cells_per_second}

    @property
    def summary(self) -> str:
        """How many cells, and how fast."""
        resumed = f", {self.cells_resumed:,} of them from an earlier run" if self.cells_resumed else ""
        return f"{self.output}: {self.cells:,} cells{resumed}, {self.cells_per_second:,.1f} cells/s"

    @property
    def written(self) -> str:
        """Under which keys results are."""
        return f"written: {', '.join(self.keys)}"

    def __str__(self) -> str:
        names = [
            f"{key}: {', '.join(f'{name} {count:,}' for name, count in counts.items())}"
            for key, counts in self.names.items()
        ]
        return "\n".join([self.summary, *names, self.written])


def parts_folder(output: str | Path) -> Path:
    """The folder beside an output that holds what is finished of it."""
    return Path(f"{output}.parts")


class Parts:
    """Results of finished chunks in a folder, one file a chunk, and the settings that they were made with.

    Parameters
    ----------
    folder
        New, or one of an earlier run.
    bounds
        First cell of each chunk, and the one after its last.
    """

    def __init__(self, folder: Path, bounds: list[tuple[int, int]]):
        self.folder, self.bounds = folder, bounds

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second run from writing the same output.

        Raises
        ------
        FileExistsError
            If the folder holds something else, or another run is at it.
        """
        others = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        others = [name for name in others if not _OURS.fullmatch(name)]
        if others or self.folder.is_file():
            raise FileExistsError(
                f"{self.folder} holds what is finished of an output, got something else in it: "
                f"{', '.join(others[:3]) or 'a file of that name'}. Move it, or name another output."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise FileExistsError(
                f"One run at a time writes an output, got a second one for that of {self.folder}. Wait for the first."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def prepare(self, settings: dict, resume: bool) -> None:
        """Begin, or go on with an earlier run.

        Parameters
        ----------
        settings
            What decides the parts.
        resume
            Whether to go on; False removes what is there.

        Raises
        ------
        ValueError
            If the earlier run had other settings.
        """
        before = self._manifest()
        if before is None or not resume or not self.finished():
            self.clear()
            write_whole(self.folder / MANIFEST_FILE, json.dumps(settings, indent=1).encode())
            return
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            shown = "; ".join(f"{name} was {_short(before.get(name))}, is {_short(settings[name])}" for name in changed)
            raise ValueError(
                f"A run goes on with the input and settings that it began with, got others for {self.folder}: {shown}. "
                "Give them as they were, or begin anew with `resume=False` (--restart)."
            )
        for path in self.folder.glob("chunk-*"):
            if path.suffix == ".tmp" or not self._is_whole(path):
                path.unlink()

    def _manifest(self) -> dict | None:
        """The settings of an earlier run; None if it did not come so far as to write them."""
        try:
            return json.loads((self.folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _is_whole(self, path: Path) -> bool:
        index = int(path.stem.removeprefix("chunk-"))
        try:
            with safe_open(path, "numpy") as file:
                start, stop = self.bounds[index]
                return file.get_slice("lengths").get_shape() == [stop - start]
        except (SafetensorError, IndexError):
            return False

    def _path(self, index: int) -> Path:
        return self.folder / f"chunk-{index:06d}.safetensors"

    def finished(self) -> list[int]:
        """Places in ``bounds`` of the chunks that are there."""
        return [index for index in range(len(self.bounds)) if self._path(index).exists()]

    def save(self, index: int, part: dict[str, np.ndarray]) -> None:
        """Write the results of a chunk, whole or not at all."""
        write_whole(self._path(index), save({name: np.ascontiguousarray(values) for name, values in part.items()}))

    def wait(self) -> None:
        """Wait until all chunks are there, as other processes write some of them."""
        while len(self.finished()) < len(self.bounds):
            time.sleep(_WAIT_SECONDS)

    def joined(self) -> dict[str, np.ndarray]:
        """Results of all cells, as `running.joined` gives them."""
        return joined(((index, load_file(self._path(index))) for index in range(len(self.bounds))), self.bounds)

    def clear(self) -> None:
        """Remove everything but the lock."""
        for path in self.folder.iterdir():
            if path.name != LOCK_FILE:
                remove(path)


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def infer_file(
    source: Path,
    output: Path,
    begin: Callable[[Expression], Inference],
    tokenizer: PanFoMaTokenizer,
    options: Options,
    *,
    resume: bool,
    overwrite: bool,
) -> FileReport:
    """Run a model over a file of cells and write a copy of it with results.

    Parameters
    ----------
    source, output
        Input, and what to write; checked before.
    begin
        Loads the model for what was read.
    tokenizer
        The model's.
    options
        As in `embed`.
    resume, overwrite
        As in `embed`.
    """
    started = time.perf_counter()
    with open_cells(source, tokenizer) as cells, ExitStack() as stack:
        check_source(source, cells)
        input_signature = signature(source.resolve())
        expression = read_expression(cells, tokenizer, **options.reading)
        inference = begin(expression)
        check_keys(inference.plan.keys)
        processes = PartialState()
        parts = Parts(parts_folder(output), expression.bounds)
        if processes.is_main_process:
            stack.enter_context(parts.locked())
            restore(output, parts.folder)
            parts.prepare(_settings(inference, input_signature), resume)
        else:  # one bar is enough
            inference.runner.options = replace(options, progress=False)
        processes.wait_for_everyone()
        done = set(parts.finished())
        processes.wait_for_everyone()  # before the first new part
        report = FileReport(str(output), cells=len(expression), cells_resumed=_num_cells(expression, done))
        try:
            mine = range(processes.process_index, len(expression.bounds), processes.num_processes)
            todo = [index for index in mine if index not in done]
            with closing(inference.results(todo, _num_cells(expression, done & set(mine)))) as results:
                for index, part in results:
                    parts.save(index, part)
            report.cells_run, report.model_seconds = _num_cells(expression, todo), inference.runner.model_seconds
            if processes.is_main_process:
                _finish(source, cells, output, inference, parts, input_signature, overwrite, report)
        except BaseException:
            if processes.is_main_process and not parts.finished():
                remove(parts.folder)
            raise
    report.seconds = time.perf_counter() - started
    return report


def _num_cells(expression: Expression, which) -> int:
    bounds = expression.bounds
    return sum(bounds[index][1] - bounds[index][0] for index in which)


def _settings(inference: Inference, input_signature: list) -> dict:
    """What decides the parts, as JSON can hold it; neither batches nor devices do."""
    runner, expression = inference.runner, inference.expression
    facts = {
        "tokenizer": tokenizer_fingerprint(runner.tokenizer),
        "genes": expression.resolution.token_ids.tolist(),
        "chunks": expression.bounds,
    }
    return {
        "format": PART_FORMAT,
        "panfoma_hf": __version__,
        "input": input_signature,
        "model": model_fingerprint(inference.plan.model),
        "matrix": expression.source,
        "values": str(expression.scale),
        "outputs": list(inference.plan.outputs),
        "dtype": runner.options.dtype_name,
        "max_length": runner.tokenizer.model_max_length,
        **{name: hashlib.sha256(json.dumps(fact).encode()).hexdigest() for name, fact in facts.items()},
    }


def _finish(
    source: Path,
    cells: CellFile,
    output: Path,
    inference: Inference,
    parts: Parts,
    input_signature: list,
    overwrite: bool,
    report: FileReport,
) -> None:
    """Write the output of what all processes have found, and remove the parts."""
    parts.wait()
    if signature(source.resolve()) != input_signature:
        raise ValueError(f"{source} changed while it was read. Begin anew with `resume=False` (--restart).")
    found = parts.joined()
    additions = inference.additions(found)
    write_output(source, cells, output, additions, folder=parts.folder, overwrite=overwrite)
    remove(parts.folder)
    report.is_written = True
    report.empty_cells = int(np.count_nonzero(found["lengths"] == 0))
    report.keys = _keys(additions)
    report.names = {
        key: {str(name): int(count) for name, count in pd.Series(values).value_counts().items()}
        for key, values in additions.obs.items()
        if isinstance(values, pd.Categorical)
    }


def _keys(additions: Additions) -> list[str]:
    return [*(f'obs["{key}"]' for key in additions.obs), *(f'obsm["{key}"]' for key in additions.obsm)]
