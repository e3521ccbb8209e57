"""One unit of a corpus: a file of a study becomes shards of tokens, whole or not at all."""

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import xxhash

from ...tokenization import CellTokens, PanFoMaTokenizer
from ...version import __version__
from .. import schema
from ..cells import read_expression, tokenizer_fingerprint
from ..quality import CellQuality, Quality, cells_per_token, judge_cells, rare_genes
from ..readers import input_files, open_cells, signature
from .sources import Study, cell_fields, check_vocabulary, exclusions_seen, is_excluded


# What a unit holds; raised whenever the same input and settings give other bytes.
UNIT_FORMAT = 1
UNITS_FOLDER = "cells"
# Where finished units wait until the corpus as a whole is written, so that `UNITS_FOLDER` has what the manifest names.
FINISHED_FOLDER = ".finished"
WORK_FOLDER = ".work"
REPORT_FILE = "unit.json"
PROGRESS_FILE = "progress"
# A shard is closed when it is larger: few enough files, each quick to fetch.
SHARD_BYTES = 2**28
# Cells of a record batch, which is what a reader takes from a shard at a time.
BATCH_CELLS = 1000
# Genes per cell are counted in steps of so many.
HISTOGRAM_STEP = 50


@dataclass(frozen=True)
class Unit:
    """A unit of work: what a worker needs to build it, and nothing that only this machine knows but the paths.

    Parameters
    ----------
    study
        The study's name.
    path
        The file's path relative to the root, by which it is called.
    file
        Where it is.
    settings
        What of the source list decides its tokens and labels; see `sources.resolved_settings`.
    vocabularies
        By field, the words that are allowed.
    corpus
        The corpus' folder.
    tokenizer
        A folder with the tokenizer.
    work
        How its folder below `WORK_FOLDER` starts, in which it says how far it is.
    signature
        What the file system said of its input when ``sha256`` was found; None where that is not known.
    sha256
        The checksum of that input.
    """

    study: str
    path: str
    file: str
    settings: dict[str, Any]
    vocabularies: dict[str, list[str]]
    corpus: str
    tokenizer: str
    work: str
    signature: list | None = None
    sha256: str | None = None

    @property
    def name(self) -> str:
        """What to call it."""
        return f"{self.study}: {self.path}"

    def key(self, sha256: str) -> str:
        """Checksum of everything that decides the unit's bytes."""
        facts = {
            "format": UNIT_FORMAT,
            "study": self.study,
            "path": self.path,
            "settings": self.settings,
            "tokenizer": tokenizer_fingerprint(_tokenizer(self.tokenizer)),
            "input": sha256,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def folder(self, sha256: str) -> Path:
        """Where it lies in a finished corpus."""
        stem = re.sub(r"[^\w.-]+", "-", self.path)[-60:].strip("-._")  # `datasets` passes over what starts with __
        # Names decide the order of the rows: that of files, whatever their settings.
        path = hashlib.sha256(self.path.encode()).hexdigest()
        return Path(self.corpus, UNITS_FOLDER, self.study, f"{stem}-{path[:6]}-{self.key(sha256)[:12]}")

    def report(self, sha256: str) -> dict[str, Any] | None:
        """The report of the unit, if it is finished: in its place, or waiting."""
        for folder in (self.folder(sha256), waiting_folder(self.folder(sha256), self.corpus)):
            if (folder / REPORT_FILE).is_file():
                report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
                shards = [(folder / shard["name"], shard["bytes"]) for shard in report["shards"]]
                if all(path.is_file() and path.stat().st_size == size for path, size in shards):
                    return report
        return None


@functools.lru_cache(maxsize=2)
def _tokenizer(folder: str) -> PanFoMaTokenizer:
    return PanFoMaTokenizer.from_pretrained(folder)


# ----------------------------------------------------------------------------------------------------------------------
# What a file is
# ----------------------------------------------------------------------------------------------------------------------


def checksum(path: str | Path) -> str:
    """SHA-256 of a file of cells; of several that belong together, that of the lines that ``sha256sum`` prints."""
    files = input_files(path)
    sums = [_sha256(file) for file in files]
    if len(files) == 1 and files[0] == Path(path):
        return sums[0]
    base = Path(path) if Path(path).is_dir() else Path(path).parent
    lines = "".join(
        f"{digest}  {file.relative_to(base).as_posix()}\n" for digest, file in zip(sums, files, strict=True)
    )
    return hashlib.sha256(lines.encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Building one
# ----------------------------------------------------------------------------------------------------------------------


def waiting_folder(folder: Path, corpus: str | Path) -> Path:
    """Where a unit, or a shard of it, waits until it is put into its place in the corpus."""
    return Path(corpus, FINISHED_FOLDER, folder.relative_to(Path(corpus, UNITS_FOLDER)))


def build_unit(unit: Unit) -> tuple[dict[str, Any], list]:
    """Build a unit, unless it is there already.

    The unit's folder appears in `FINISHED_FOLDER` when everything in it is written. Whatever goes wrong before, nothing
    of it is left; what a killed process leaves lies in `WORK_FOLDER`, which the next build empties.

    Returns
    -------
    Its report, and its input's `signature`.

    Raises
    ------
    OSError
        If the disk is full or the file is not there.
    ValueError
        If the file or what the source list says of it is wrong.
    """
    before = signature(unit.file)
    # The file may have been replaced since the build began.
    sha256 = unit.sha256 if unit.signature == before else checksum(unit.file)
    if (report := unit.report(sha256)) is not None:
        check_vocabulary(report["counts"], unit.vocabularies, unit.name)
        return report, before
    work_root = Path(unit.corpus, WORK_FOLDER)
    work_root.mkdir(exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{unit.work}-", dir=work_root))
    try:
        report = {
            "format": UNIT_FORMAT,
            "key": unit.key(sha256),
            "study": unit.study,
            "file": unit.path,
            "sha256": sha256,
            "bytes": before[0],
            **_build(unit, work, _progress(work)),
            "made_by": f"panfoma_hf {__version__}",
        }
        if signature(unit.file) != before:
            raise ValueError(f"{unit.file} changed while it was read. Build again when it is written.")
        (work / PROGRESS_FILE).unlink(missing_ok=True)
        _write(work / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False).encode())
        folder = waiting_folder(unit.folder(sha256), unit.corpus)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            work.rename(folder)
        except OSError:
            # Another worker, taken for dead, was quicker.
            if unit.report(sha256) is None:
                raise
        _sync(folder.parent)
    except OSError as error:
        if error.errno is None:  # one of ours, which says what to do
            raise
        raise OSError(error.errno, f"{error.strerror}, in {error.filename or unit.corpus}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report, before


def _build(unit: Unit, work: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Write a unit's shards; the part of its report that tells what is in them."""
    tokenizer = _tokenizer(unit.tokenizer)
    study = Study.model_construct(**{key: value for key, value in unit.settings.items() if key != "quality"})
    quality = Quality.model_validate(unit.settings["quality"])
    with open_cells(unit.file, tokenizer) as cells:
        fields, seen = cell_fields(cells.obs, study, unit.file)
        excluded = is_excluded(cells.obs, study, unit.file)
        expression = read_expression(
            cells,
            tokenizer,
            layer=study.layer,
            gene_column=study.gene_column,
            min_coverage=study.min_coverage,
        )
        progress(0.05)
        judged = judge_cells(expression, quality, _samples(fields), excluded)
        progress(0.35)
        is_kept = judged.is_kept
        kept = fields[is_kept].reset_index(drop=True)
        check_vocabulary(_counts(kept), unit.vocabularies, unit.name)
        expressed_in = cells_per_token(expression, is_kept, len(tokenizer))
        progress(0.55)
        is_rare = rare_genes(expressed_in, int(is_kept.sum()), quality, judged.notes)
        names = cells.obs.index.to_numpy()[is_kept]
        writer = _ShardWriter(work, schema.corpus_features(len(tokenizer)).arrow_schema, unit.study)
        lengths = []
        for tokens in expression.tokens(tokenizer, is_kept=is_kept):
            rows = slice(writer.num_cells, writer.num_cells + len(tokens))
            content = content_hashes(tokens)
            tokens = without_tokens(tokens, is_rare) if is_rare.any() else tokens
            writer.write(tokens, names[rows], kept[rows], content)
            lengths.append(tokens.lengths)
            progress(0.55 + 0.45 * writer.num_cells / max(len(names), 1))
        shards = writer.close()
        lengths = np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int64)
        return {
            "layer": expression.source,
            "scale": str(expression.scale),
            "genes": expression.resolution.provenance(),
            "genes_measured": len(np.unique(expression.resolution.token_ids[expression.resolution.token_ids >= 0])),
            "genes_expressed": int((expressed_in > 0).sum()),
            "genes_rare": int(is_rare.sum()),
            "cells_read": len(fields),
            "cells": len(names),
            "dropped": judged.dropped(),
            "limits": judged.limits,
            "tokens": int(lengths.sum()),
            "tokens_rare": int(expressed_in[is_rare].sum()),
            "genes_per_cell": np.bincount(lengths // HISTOGRAM_STEP).tolist(),
            "medians": _medians(judged, lengths),
            "counts": _counts(kept),
            "wordings": {field: words for field, words in seen.items() if study.labels.get(field)},
            "exclusions": exclusions_seen(cells.obs, study, unit.file),
            "notes": [note.replace(unit.file, unit.path) for note in (*cells.notes, *judged.notes)],
            "shards": shards,
        }


def _samples(fields: pd.DataFrame) -> pd.Categorical:
    """(cells,), where a cell was captured: its sample, else its donor, else the file."""
    samples, donors = fields[schema.SAMPLE_ID].cat, fields[schema.DONOR_ID].cat
    codes = samples.codes.to_numpy(np.int32, copy=True)
    names = [*(f"sample {name}" for name in samples.categories), *(f"donor {name}" for name in donors.categories)]
    names.append("the file")
    is_missing = codes < 0
    codes[is_missing] = donors.codes.to_numpy(np.int32)[is_missing] + len(samples.categories)
    codes[is_missing & (donors.codes.to_numpy() < 0)] = len(names) - 1
    return pd.Categorical.from_codes(codes, categories=names)


def _medians(judged: CellQuality, lengths: np.ndarray) -> dict[str, float | None]:
    """What is typical of the cells kept."""
    kept = judged.is_kept
    shares = judged.mitochondrial[kept]
    shares = shares[~np.isnan(shares)]
    return {
        "genes": float(np.median(lengths)) if len(lengths) else None,
        "counts": round(float(np.median(judged.counts[kept])), 1) if kept.any() else None,
        "mitochondrial": round(float(np.median(shares)), 4) if len(shares) else None,
    }


def _counts(fields: pd.DataFrame) -> dict[str, dict[str, int]]:
    """By field, how many cells have each word, the most frequent first; cells without one are not counted."""
    counts = {}
    for field in schema.CELL_FIELDS:
        words = {str(word): int(count) for word, count in fields[field].value_counts().items() if count}
        counts[field] = dict(sorted(words.items(), key=lambda item: (-item[1], item[0])))
    return counts


def content_hashes(tokens: CellTokens) -> np.ndarray:
    """(cells,) uint64, equal for cells with the same genes in the same bins: to a model they are one cell."""
    ids = np.ascontiguousarray(tokens.input_ids, dtype="<i4").view(np.uint8)
    bins = np.ascontiguousarray(tokens.expression_bins, dtype=np.uint8)
    hashes = np.empty(len(tokens), dtype=np.uint64)
    for cell, (start, stop) in enumerate(zip(tokens.indptr[:-1].tolist(), tokens.indptr[1:].tolist(), strict=True)):
        hashed = xxhash.xxh3_64(ids[4 * start : 4 * stop])
        hashed.update(bins[start:stop])
        hashes[cell] = hashed.intdigest()
    return hashes


def without_tokens(tokens: CellTokens, is_left_out: np.ndarray) -> CellTokens:
    """The same cells without some genes; the bins of the others stay, as the cell alone would have them.

    Parameters
    ----------
    tokens
        Of some cells.
    is_left_out
        (vocabulary,), by token id.
    """
    kept = ~is_left_out[tokens.input_ids]
    before = np.append(0, np.cumsum(kept))
    return CellTokens(tokens.input_ids[kept], tokens.expression_bins[kept], before[tokens.indptr])


class _ShardWriter:
    """Writes cells into shards of about `SHARD_BYTES`, in batches of up to `BATCH_CELLS`.

    Parameters
    ----------
    folder
        Where to write.
    schema_
        Of the table.
    study
        The same in every row.
    """

    def __init__(self, folder: Path, schema_: pa.Schema, study: str):
        self._folder, self._schema, self._study = folder, schema_, study
        self._file = self._stream = None
        self._shards: list[dict[str, Any]] = []
        self.num_cells = 0

    def write(self, tokens: CellTokens, names: np.ndarray, fields: pd.DataFrame, content: np.ndarray) -> None:
        """Add cells: their tokens, names, fields and hashes."""
        for start in range(0, len(tokens), BATCH_CELLS):
            rows = slice(start, min(start + BATCH_CELLS, len(tokens)))
            self._write_batch(tokens, rows, names, fields, content)
        self.num_cells += len(tokens)

    def _write_batch(self, tokens, rows: slice, names, fields, content) -> None:
        first, last = tokens.indptr[rows.start], tokens.indptr[rows.stop]
        offsets = pa.array(tokens.indptr[rows.start : rows.stop + 1] - first)
        ids = pa.array(tokens.input_ids[first:last].astype(self._type_of(schema.INPUT_IDS).to_pandas_dtype()))
        bins = pa.array(tokens.expression_bins[first:last].astype(np.uint8))
        size = rows.stop - rows.start
        columns = {
            schema.INPUT_IDS: pa.LargeListArray.from_arrays(offsets, ids),
            schema.EXPRESSION_BINS: pa.LargeListArray.from_arrays(offsets, bins),
            schema.LENGTH: pa.array(tokens.lengths[rows].astype(np.int32)),
            schema.CELL_ID: pa.array(names[rows].astype(str), pa.string()),
            schema.STUDY: pa.repeat(pa.scalar(self._study), size),
            **{
                field: pa.Array.from_pandas(
                    fields[field].iloc[rows].astype(object), type=self._schema.field(field).type
                )
                for field in schema.CELL_FIELDS
            },
            schema.CONTENT_HASH: pa.array(content[rows]),
        }
        batch = pa.record_batch([columns[name] for name in self._schema.names], schema=self._schema)
        if self._stream is None:
            self._file = (self._folder / f"{len(self._shards):05d}.arrow").open("wb")
            self._stream = pa.ipc.new_stream(self._file, self._schema)
            self._shards.append({"name": f"{len(self._shards):05d}.arrow", "cells": 0, "tokens": 0})
        self._stream.write_batch(batch)
        self._shards[-1]["cells"] += size
        self._shards[-1]["tokens"] += int(last - first)
        if self._file.tell() >= SHARD_BYTES:
            self._close_shard()

    def _type_of(self, column: str) -> pa.DataType:
        return self._schema.field(column).type.value_type

    def _close_shard(self) -> None:
        self._stream.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = self._stream = None
        path = self._folder / self._shards[-1]["name"]
        self._shards[-1] |= {"bytes": path.stat().st_size, "sha256": _sha256(path)}

    def close(self) -> list[dict[str, Any]]:
        """Close the last shard; what all of them hold."""
        if self._stream is not None:
            self._close_shard()
        return self._shards


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or as it was before."""
    with written_together({path: content}):
        pass


@contextmanager
def written_together(files: dict[Path, bytes]) -> Iterator[None]:
    """Write files beside their places, let the caller do what belongs to them, then put them there, in their order.

    What can fail for want of room fails before anything has changed.
    """
    scratch = {path: path.with_name(f".{path.name}.new") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(scratch[path], content)
        yield
        for path in files:
            scratch[path].replace(path)
    finally:
        for path in scratch.values():
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _progress(work: Path) -> Callable[[float], None]:
    """A function that writes how far a unit is, for whoever waits for it; a file, as workers may be other machines."""

    def tell(share: float) -> None:
        (work / PROGRESS_FILE).write_text(f"{share:.3f}", encoding="utf-8")

    tell(0.0)
    return tell


def read_progress(corpus: Path, work: str) -> float:
    """How far a unit is, 0 to 1."""
    shares = [0.0]
    for path in Path(corpus, WORK_FOLDER).glob(f"{work}-*/{PROGRESS_FILE}"):
        try:
            shares.append(float(path.read_text(encoding="utf-8") or 0))
        except (OSError, ValueError):  # finished or half written just now
            continue
    return max(shares)
