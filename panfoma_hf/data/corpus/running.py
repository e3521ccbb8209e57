"""Running the units of a corpus: in this process, in several, or on a Dask cluster."""

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..cell_file import one_line
from .corpus import CorpusError
from .sources import check_vocabulary
from .units import Unit, build_unit, read_progress, signature, write_whole


# Errors of the place that is written to: the next file would meet them too.
FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_POLL_SECONDS = 0.5


class Inputs:
    """Checksums of files that were read before and have not changed since, by what the file system says of them."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._known = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # it only saves time
            self._known = {}

    def known(self, file: Path) -> dict[str, Any]:
        """Signature and checksum of a file, if it is as it was; else nothing."""
        try:
            found, sha256 = self._known[str(file)]
        except (KeyError, ValueError, TypeError):
            return {}
        return {"signature": found, "sha256": sha256} if found == signature(file) else {}

    def add(self, file: str, found: list, sha256: str) -> None:
        """Remember a file by its signature and checksum."""
        if self._known.get(file) != [found, sha256]:
            self._known[file] = [found, sha256]
            with contextlib.suppress(OSError):  # a full disk shows where it matters
                write_whole(self._path, json.dumps(self._known, indent=0, sort_keys=True).encode())


def run_units(
    units: list[Unit], workers: int, scheduler: str | None, inputs: Inputs, progress: bool
) -> list[dict[str, Any]]:
    """Reports of all units, in their order.

    Raises
    ------
    CorpusError
        If units failed; the others were finished first, unless there is no place to write to.
    """
    reports: dict[int, dict[str, Any]] = {}
    failures: dict[int, BaseException] = {}
    for number, unit in enumerate(units):
        if unit.sha256 and (report := unit.report(unit.sha256)):
            try:
                check_vocabulary(report["counts"], unit.vocabularies, unit.name)
                reports[number] = report
            except ValueError as error:
                failures[number] = error
    known = {*reports, *failures}
    sizes = {number: signature(unit.file)[0] for number, unit in enumerate(units) if number not in known}
    display = _Display(len(units), len(reports), sizes, units, progress)
    # The largest first, so that no worker starts on it when the others are done.
    todo = sorted(sizes, key=lambda number: (-sizes[number], number))
    with _executor(min(workers, max(len(todo), 1)), scheduler) as executor, display:
        futures: dict[Future, int] = {executor.submit(build_unit, units[number]): number for number in todo}
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                number = futures[future]
                try:
                    report, found = future.result()
                except Exception as error:
                    failures[number] = error
                    display.failed(number, error)
                    if isinstance(error, BrokenProcessPool) or getattr(error, "errno", None) in FATAL:
                        for other in waiting:
                            other.cancel()
                        waiting = {other for other in waiting if not other.cancelled()}
                else:
                    reports[number] = report
                    inputs.add(units[number].file, found, report["sha256"])
                    display.finished(number, report)
            display.show({number for future, number in futures.items() if future in waiting and future.running()})
    if failures:
        failed = [(units[number], failures[number]) for number in sorted(failures)]
        raise CorpusError(_told(failed, len(reports), len(units)))
    return [reports[number] for number in range(len(units))]


def _told(failures: list[tuple[Unit, BaseException]], num_finished: int, num_units: int) -> str:
    if any(isinstance(error, BrokenProcessPool) for _, error in failures):
        names = ", ".join(unit.path for unit, _ in failures[:5])
        return (
            f"Workers must live, got one that died, probably for want of memory, on one of {names}. "
            f"{num_finished:,} of {num_units:,} files are finished and kept: build again with fewer workers. "
            'A script that builds with several workers needs `if __name__ == "__main__":`.'
        )
    lines = "\n".join(f"  {unit.name}: {error}" for unit, error in failures)
    if any(getattr(error, "errno", None) in FATAL for _, error in failures):
        remedy = f"Make room in {failures[0][0].corpus}"
    else:
        remedy = "Mend these, or take them out of the source list"
    return (
        f"Every file must be read and written, got {len(failures):,} of {num_units:,} that were not; {num_finished:,} "
        f"are finished and kept. {remedy}, and build again:\n{lines}"
    )


@contextlib.contextmanager
def _executor(workers: int, scheduler: str | None) -> Iterator[Executor]:
    """What runs units: this process, several, or a Dask cluster."""
    if scheduler is not None:
        try:
            from dask.distributed import Client
        except ImportError:
            raise ValueError(
                "`scheduler` needs Dask, got none. Install it, also on the workers: `pip install 'panfoma-hf[dask]'`."
            ) from None
        problem = None
        try:
            client = Client(scheduler, timeout="20s")
        except Exception as error:  # Dask raises what its parts do, by the kind of address
            problem = one_line(error) or type(error).__name__
        if problem is not None:
            # Closes the client that failed. Later, within the start of another, Dask would wait for itself.
            gc.collect()
            raise CorpusError(
                f"`scheduler` is the address of a running Dask scheduler, got {scheduler!r}: {problem}. Start one with "
                "`dask scheduler`."
            )
        with client:
            executor = client.get_executor(pure=False)
            try:
                yield executor
            finally:
                executor.shutdown(wait=False)  # which cancels what is not done
    else:
        if workers == 1:
            executor = ThreadPoolExecutor(1)
        else:
            executor = ProcessPoolExecutor(workers, mp_context=_context(), initializer=_end_with_parent)
        try:
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)


def _context() -> multiprocessing.context.BaseContext:
    """How workers start: forked off a server that imports the libraries once, whose memory they share.

    Not off this process, which may have threads that a fork would leave half copied.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload"])
    return context


def _end_with_parent() -> None:
    """Let a worker end when the build that started it was killed."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Display:
    """A bar in bytes of input, with the time left, and a line for each file; without a terminal the lines only."""

    def __init__(self, num_units: int, num_known: int, sizes: dict[int, int], units: list[Unit], is_shown: bool):
        self._units, self._sizes, self._is_shown = units, sizes, is_shown
        self._done, self._total = num_known, num_units
        self._cells, self._finished_bytes, self._started = 0, 0, time.perf_counter()
        self._bar = tqdm(
            total=sum(sizes.values()),
            unit="B",
            unit_scale=True,
            disable=not (is_shown and sys.stderr.isatty()),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        if is_shown and num_known:
            self._say(f"{num_known:,} of {num_units:,} files are finished and unchanged")

    def __enter__(self) -> "_Display":
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def _say(self, line: str) -> None:
        if self._is_shown:
            tqdm.write(line, file=sys.stderr)

    def finished(self, number: int, report: dict[str, Any]) -> None:
        self._done += 1
        self._cells += report["cells_read"]
        self._finished_bytes += self._sizes[number]
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items() if count)
        seconds = time.perf_counter() - self._started
        self._say(
            f"[{self._done:,}/{self._total:,}] {self._units[number].name}: {report['cells']:,} of "
            f"{report['cells_read']:,} cells{f' (without {dropped})' if dropped else ''}; "
            f"{self._cells / seconds:,.0f} cells/s so far{self._left()}"
        )

    def _left(self) -> str:
        """About how long the rest takes, by its bytes."""
        total = sum(self._sizes.values())
        if self._bar.disable is False or not 0 < self._finished_bytes < total:
            return ""
        seconds = (time.perf_counter() - self._started) * (total / self._finished_bytes - 1)
        return f", about {tqdm.format_interval(seconds)} left"

    def failed(self, number: int, error: BaseException) -> None:
        self._finished_bytes += self._sizes[number]
        self._say(f"{self._units[number].name} failed: {error}")

    def show(self, running: set[int]) -> None:
        if self._bar.disable:
            return
        under_way = sum(
            self._sizes[number] * read_progress(Path(self._units[number].corpus), self._units[number].work)
            for number in running
        )
        self._bar.n = max(self._bar.n, int(self._finished_bytes + under_way))
        self._bar.set_postfix_str(f"{self._done:,} of {self._total:,} files, {self._cells:,} cells", refresh=True)
