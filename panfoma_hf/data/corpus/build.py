"""Building a corpus: units in parallel, then what is said of all of them together."""

import contextlib
import errno
import gc
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers.utils import logging

from ...tokenization import PanFoMaTokenizer
from .. import schema
from ..cell_file import one_line
from .card import write_card
from .corpus import (
    CORPUS_FORMAT,
    MANIFEST_FILE,
    SPLITS_FOLDER,
    TOKENIZER_FOLDER,
    Corpus,
    CorpusError,
    read_groups,
)
from .sources import (
    SourceList,
    check_exclusions_occur,
    check_labels_occur,
    check_vocabulary,
    resolved_settings,
    tokenizer_fingerprint,
)
from .splits import NORMAL, SplitError, make_split
from .units import (
    FINISHED_FOLDER,
    REPORT_FILE,
    UNITS_FOLDER,
    WORK_FOLDER,
    Unit,
    build_unit,
    read_progress,
    signature,
    waiting_folder,
    write_whole,
    written_together,
)


logger = logging.get_logger(__name__)

LOCK_FILE = ".lock"
# Checksums of inputs by path, size and time of change, so that a terabyte is not read again to find it unchanged.
INPUTS_FILE = ".inputs.json"
# What a first build that was cut off leaves.
_UNFINISHED = (LOCK_FILE, INPUTS_FILE, WORK_FOLDER, FINISHED_FOLDER, UNITS_FOLDER, SPLITS_FOLDER, TOKENIZER_FOLDER)
# Errors of the place that is written to: the next file would meet them too.
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
_POLL_SECONDS = 0.5


def build_corpus(
    sources: SourceList | str | Path,
    out: str | Path,
    *,
    root: str | Path | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    tokenizer: PanFoMaTokenizer | None = None,
    progress: bool = True,
) -> Corpus:
    """Build a corpus from a source list, or bring one up to date.

    A file that was finished before, with the same content and settings, is not read again. Shards are the same, byte
    for byte, whatever the number of workers and however often a build was cut off.

    Parameters
    ----------
    sources
        A source list, or its file.
    out
        The corpus' folder: new, empty, or a corpus. For a Dask cluster it lies where every worker sees it.
    root
        The folder that the list's paths start from; None takes the list's own folder, or the current one.
    workers
        Processes on this machine. More than one needs a script's ``if __name__ == "__main__":``.
    scheduler
        Address of a Dask scheduler, such as ``tcp://10.0.0.1:8786``, whose workers are used instead.
    tokenizer
        Knows the genes; None takes the packaged one.
    progress
        Whether to show bars and a line for each file.

    Returns
    -------
    The corpus.

    Raises
    ------
    ValueError
        If the source list is wrong, or donors or equal cells are on both sides of a split (`LeakageError`).
    FileNotFoundError, FileExistsError
        If an input is not there, or the folder holds something else.
    CorpusError
        If files could not be read or written; it names them. What was finished stays.
    """
    if workers < 1:
        raise ValueError(f"`workers` is the number of processes, 1 or more, got {workers}. Leave it out for one.")
    if not isinstance(sources, SourceList):
        root = Path(sources).parent if root is None else root
        sources = SourceList.load(sources)
    root = Path("." if root is None else root)
    files = sources.files(root)
    out = Path(out).absolute()
    _check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)
        try:
            tokenizer = PanFoMaTokenizer() if tokenizer is None else tokenizer
            tokenizer_folder = _saved_tokenizer(tokenizer, out)
            inputs = _Inputs(out / INPUTS_FILE)
            units = [
                Unit(
                    study=study,
                    path=path,
                    file=str(Path(root, path).absolute()),  # of a link, the name tells the format
                    settings=resolved_settings(sources, study),
                    vocabularies=sources.vocabularies,
                    corpus=str(out),
                    tokenizer=str(tokenizer_folder),
                    work=f"{number:06d}",
                    **inputs.known(Path(root, path).absolute()),
                )
                for number, (study, path) in enumerate(files)
            ]
            reports = _run(units, workers, scheduler, inputs, progress)
            return _finish(sources, out, units, reports, tokenizer_folder, tokenizer)
        except OSError as error:
            if error.errno not in _FATAL:
                raise
            raise CorpusError(
                f"A corpus needs a place to write to, got {error} in {out}. What was finished is kept: make room, and "
                "build again."
            ) from error
        finally:
            shutil.rmtree(out / WORK_FOLDER, ignore_errors=True)


def _check_folder(out: Path) -> None:
    if not out.exists():
        return
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    is_ours = out.is_dir() and names <= {*_UNFINISHED} and (not names or LOCK_FILE in names)
    if not is_ours and out.is_dir() and (out / MANIFEST_FILE).is_file():
        with contextlib.suppress(CorpusError):
            is_ours = "shards" in Corpus.open(out).manifest
    if not is_ours:
        raise FileExistsError(
            f"A corpus is built in a new or empty folder, or brought up to date in its own, got {out} with something "
            "else. Choose another folder."
        )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    lock = FileLock(out / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CorpusError(
            f"One build at a time writes a corpus, got a second one for {out}. Wait for the first."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _saved_tokenizer(tokenizer: PanFoMaTokenizer, out: Path) -> Path:
    """The folder, below the corpus, that workers load the tokenizer from, and by whose name they know it again."""
    facts = json.dumps(tokenizer_fingerprint(tokenizer), sort_keys=True).encode()
    folder = out / WORK_FOLDER / f"{TOKENIZER_FOLDER}-{hashlib.sha256(facts).hexdigest()}"
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    return folder


class _Inputs:
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
        if self._known.get(file) != [found, sha256]:
            self._known[file] = [found, sha256]
            with contextlib.suppress(OSError):  # a full disk shows where it matters
                write_whole(self._path, json.dumps(self._known, indent=0, sort_keys=True).encode())


# ----------------------------------------------------------------------------------------------------------------------
# Running
# ----------------------------------------------------------------------------------------------------------------------


def _run(
    units: list[Unit], workers: int, scheduler: str | None, inputs: _Inputs, progress: bool
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
                    if isinstance(error, BrokenProcessPool) or getattr(error, "errno", None) in _FATAL:
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
    if any(getattr(error, "errno", None) in _FATAL for _, error in failures):
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


# ----------------------------------------------------------------------------------------------------------------------
# What is said of all units together
# ----------------------------------------------------------------------------------------------------------------------


def _finish(
    sources: SourceList,
    out: Path,
    units: list[Unit],
    reports: list[dict[str, Any]],
    tokenizer_folder: Path,
    tokenizer: PanFoMaTokenizer,
) -> Corpus:
    """Make the splits, and write what belongs to the corpus as a whole; the manifest is last and makes it valid."""
    folders = [unit.folder(report["sha256"]) for unit, report in zip(units, reports, strict=True)]
    # In the order of their names, in which `datasets` finds them.
    order = sorted(range(len(units)), key=lambda number: str(folders[number]))
    folders, reports = [folders[number] for number in order], [reports[number] for number in order]
    shards = [
        {
            "path": (folder / shard["name"]).relative_to(out).as_posix(),
            **_without(shard, "name"),
            "unit": index,
        }
        for index, (folder, report) in enumerate(zip(folders, reports, strict=True))
        for shard in report["shards"]
    ]
    if not shards:
        raise CorpusError(
            f"A corpus needs cells, got none of {sum(report['cells_read'] for report in reports):,} that passed "
            f"quality control: {_dropped(reports)}. Lower the thresholds in `quality`."
        )
    manifest = {
        "format": CORPUS_FORMAT,
        "name": sources.name,
        "description": sources.description,
        "licence": sources.licence,
        "versions": _versions(),
        "tokenizer": {
            **tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
            "gene_table": tokenizer.gene_table_source,
        },
        "quality": sources.quality.model_dump(),
        "studies": {name: {**_described(sources, name), **_of_study(name, reports)} for name in sources.studies},
        "totals": _totals(sources, reports),
        "dropped": _sum(report["dropped"] for report in reports),
        "counts": {
            field: _sum(report["counts"][field] for report in reports)
            for field in schema.CELL_FIELDS
            if field not in (schema.DONOR_ID, schema.SAMPLE_ID)
        },
        "donors": _donors(sources, reports),
        "units": [
            {
                **_without(report, "shards", "wordings", "exclusions", "format"),
                "folder": folder.relative_to(out).as_posix(),
            }
            for folder, report in zip(folders, reports, strict=True)
        ],
        "shards": shards,
        "notes": [
            *check_labels_occur(sources, _seen(reports, "wordings")),
            *check_exclusions_occur(sources, _seen(reports, "exclusions")),
        ],
    }
    corpus = Corpus(out, manifest)
    cells, overlaps = read_groups(corpus)
    manifest["notes"] += overlaps
    manifest["donors_by_cancer_type"] = cells.donors_by_cancer_type()
    splits = _make_splits(sources, corpus, cells, manifest)
    for note in manifest["notes"]:
        logger.warning(note)

    manifest["splits"] = {
        name: {
            "settings": split.settings.model_dump(),
            "cells": split.cells(),
            "groups": split.groups,
            "leaks": {"donors": len(split.leaks.donors), "duplicates": split.leaks.duplicates},
            "sha256": hashlib.sha256(split.parts.tobytes()).hexdigest(),
        }
        for name, split in splits.items()
    }
    files = {out / SPLITS_FOLDER / f"{name}.npy": _array_file(split.parts) for name, split in splits.items()}
    files |= {out / path: _json(content) for path, content in corpus.dataset_files().items()}
    files[out / MANIFEST_FILE] = _json(manifest)
    with written_together(files):  # from here on no room is needed
        _put_in_place(folders, out)
        _replace_folder(tokenizer_folder, out / TOKENIZER_FOLDER)
    _remove_others(out, folders, set(splits))
    write_card(corpus)
    return corpus


def _without(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in keys}


def _versions() -> dict[str, str]:
    names = ("panfoma-hf", "anndata", "datasets", "numpy", "pyarrow", "scipy")
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _described(sources: SourceList, name: str) -> dict[str, Any]:
    study = sources.studies[name]
    return {
        "cohort": sources.cohort_of(name),
        "licence": study.licence,
        "citation": study.citation,
        "url": study.url,
        "settings": resolved_settings(sources, name),
    }


def _of_study(name: str, reports: list[dict[str, Any]]) -> dict[str, Any]:
    own = [report for report in reports if report["study"] == name]
    return {
        **{key: sum(report[key] for report in own) for key in ("cells_read", "cells", "tokens", "tokens_rare")},
        "dropped": _sum(report["dropped"] for report in own),
        "genes_measured": max(report["genes_measured"] for report in own),
        "genes_rare": max(report["genes_rare"] for report in own),
        "counts": {field: _sum(report["counts"][field] for report in own) for field in schema.CELL_FIELDS},
    }


def _sum(tables) -> dict[str, int]:
    """Numbers of several tables added up, the largest first, of equal ones in the order of the alphabet."""
    total: dict[str, int] = {}
    for table in tables:
        for key, count in table.items():
            total[key] = total.get(key, 0) + count
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def _dropped(reports: list[dict[str, Any]]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in _sum(r["dropped"] for r in reports).items() if count)


def _donors(sources: SourceList, reports: list[dict[str, Any]]) -> dict[str, int]:
    """Cells by donor, as cohort/donor."""
    return _sum(
        {
            f"{sources.cohort_of(report['study'])}/{donor}": count
            for donor, count in report["counts"][schema.DONOR_ID].items()
        }
        for report in reports
    )


def _totals(sources: SourceList, reports: list[dict[str, Any]]) -> dict[str, int]:
    cells = sum(report["cells"] for report in reports)
    cancers = _sum(report["counts"][schema.CANCER_TYPE] for report in reports)
    return {
        "cells_read": sum(report["cells_read"] for report in reports),
        "cells": cells,
        "tokens": sum(report["tokens"] for report in reports),
        "bytes": sum(shard["bytes"] for report in reports for shard in report["shards"]),
        "studies": len({report["study"] for report in reports if report["cells"]}),
        "donors": len(_donors(sources, reports)),
        "cells_without_donor": cells - sum(_donors(sources, reports).values()),
        "cancer_types": len(set(cancers) - {NORMAL}),
        "cell_types": len(_sum(report["counts"][schema.CELL_TYPE] for report in reports)),
        "tissues": len(_sum(report["counts"][schema.TISSUE] for report in reports)),
    }


def _seen(reports: list[dict[str, Any]], what: str) -> dict[str, dict[str, set[str]]]:
    """By study and field or column, the words that occur in any of its files."""
    seen: dict[str, dict[str, set[str]]] = {}
    for report in reports:
        fields = seen.setdefault(report["study"], {})
        for field, words in report[what].items():
            fields.setdefault(field, set()).update(words)
    return seen


def _make_splits(sources: SourceList, corpus: Corpus, cells, manifest: dict[str, Any]) -> dict[str, Any]:
    splits = {}
    for name, settings in sources.split_settings().items():
        try:
            splits[name] = split = make_split(cells, settings, name, corpus.describe_cell)
            share = split.cells()["test"] / len(cells)
            is_drawn = settings.held_out is None and settings.by != "cancer_type"  # of which normal cells are no part
            if is_drawn and not settings.test / 2 <= share <= settings.test * 2:
                manifest["notes"].append(
                    f"split {name!r}: {share:.0%} of the cells are for testing, where {settings.test:.0%} were asked "
                    "for, as groups go whole"
                )
        except SplitError as error:
            if sources.splits is not None:
                raise SplitError(f"split {name!r}: {error}") from None
            manifest["notes"].append(f"there is no split {name!r}: {error}")
    return splits


def _put_in_place(folders: list[Path], out: Path) -> None:
    """Move the units that wait to where the manifest will name them."""
    for folder in folders:
        waiting = waiting_folder(folder, out)
        if waiting.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():  # without its report, which is written last
                shutil.rmtree(folder)
            waiting.rename(folder)


def _array_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=1, ensure_ascii=False).encode()


def _replace_folder(new: Path, folder: Path) -> None:
    old = new.with_name(f"{new.name}-old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)


def _remove_others(out: Path, folders: list[Path], splits: set[str]) -> None:
    """Remove units and splits of an earlier state of the corpus, now that nothing points to them."""
    shutil.rmtree(out / FINISHED_FOLDER, ignore_errors=True)
    kept = set(folders)
    for report in (out / UNITS_FOLDER).glob(f"*/*/{REPORT_FILE}"):
        unit = report.parent
        if unit not in kept:
            shutil.rmtree(unit)
            with contextlib.suppress(OSError):
                unit.parent.rmdir()  # if it is empty
    for path in (out / SPLITS_FOLDER).glob("*.npy"):
        if path.stem not in splits and path.is_file():
            path.unlink()
