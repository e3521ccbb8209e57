"""A corpus on disk: tokens of many files, with what is known of them."""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, load_from_disk
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, snapshot_download

from ...tokenization import PanFoMaTokenizer
from .. import schema
from ..cell_file import one_line
from .card import CARD_FILE, PICTURES_FOLDER
from .sources import SplitSettings
from .splits import PARTS, UNKNOWN_DONOR, CellGroups, Leaks, find_leaks, shared_barcodes
from .units import REPORT_FILE, UNITS_FOLDER, waiting_folder


CORPUS_FORMAT = 1
DATASET_FOLDER = UNITS_FOLDER
SPLITS_FOLDER = "splits"
TOKENIZER_FOLDER = "tokenizer"
MANIFEST_FILE = "manifest.json"
# Folders that are the corpus' own on the Hub too: files in them that it does not have any more are removed there.
_FOLDERS = (DATASET_FOLDER, SPLITS_FOLDER, TOKENIZER_FOLDER, PICTURES_FOLDER)
_BARCODE = r"(?P<barcode>[ACGT]{12,})"


class CorpusError(RuntimeError):
    """A corpus cannot be built, or is not whole."""


@dataclass
class Corpus:
    """A corpus of tokenized cells.

    Its folder holds Arrow shards (``cells/``), splits, the tokenizer, a manifest and a data card. `datasets` reads it
    as well: ``load_from_disk(folder / "cells")``, or ``load_dataset(str(folder), streaming=True)``; rows have the
    columns of `schema.corpus_features`, in the same order.

    Parameters
    ----------
    folder
        Where it lies.
    manifest
        What is known of it, as in ``manifest.json``; docs/corpus.md explains the keys.
    remote
        Where its shards are on the Hub, if not in the folder; as `huggingface_hub.HfFileSystem` names it.
    token
        Access token of the Hub.
    """

    folder: Path
    manifest: dict[str, Any] = field(repr=False)
    remote: str | None = None
    token: str | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls, folder: str | Path, *, revision: str | None = None, token: str | None = None, streaming: bool = False
    ) -> "Corpus":
        """Open a corpus in a folder, or fetch one from the Hub by its name there.

        Parameters
        ----------
        folder
            A folder, or a data set's name on the Hub.
        revision, token
            Of the data set on the Hub; None takes the newest, and the token that you logged in with.
        streaming
            Whether to leave a corpus' shards on the Hub, for `pretrain(streaming=True)`; the rest of it is small.

        Raises
        ------
        CorpusError
            If the folder holds no corpus, or one that was not finished.
        """
        path = Path(folder)
        if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            try:
                path = Path(
                    snapshot_download(
                        str(folder),
                        repo_type="dataset",
                        revision=revision,
                        token=token,
                        ignore_patterns=["*.arrow"] if streaming else None,
                    )
                )
            except Exception as error:  # of the network, the Hub or the disk, from several libraries
                raise CorpusError(
                    f"A corpus is a folder or a data set on the Hub, got {folder}: there is no such folder, and the "
                    f"Hub says: {one_line(error)}. Check the name, the connection, and that you are logged in."
                ) from error
        manifest = path / MANIFEST_FILE
        if not manifest.is_file():
            raise CorpusError(
                f"A corpus is a folder with {MANIFEST_FILE}, got none in {path}. Build it, or build it again if it was "
                "cut off: `panfoma corpus build SOURCES OUT`."
            )
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CorpusError(f"A manifest is JSON, got {one_line(error)} in {manifest}. Build it again.") from error
        found = content.get("format") if isinstance(content, dict) else None
        if found != CORPUS_FORMAT:
            raise CorpusError(
                f"This version reads corpora of format {CORPUS_FORMAT}, got {found} in {path}. Build it again, or "
                "install the version that built it."
            )
        # The Hub's cache names a snapshot's folder by its commit.
        remote = f"datasets/{folder}@{path.name}" if streaming and path != Path(folder) else None
        return cls(path, content, remote, token)

    def __len__(self) -> int:
        return self.manifest["totals"]["cells"]

    @property
    def fingerprint(self) -> str:
        """Of all its shards and splits."""
        sums = [shard["sha256"] for shard in self.manifest["shards"]]
        sums += [f"{name}:{split['sha256']}" for name, split in sorted(self.splits.items())]
        return hashlib.sha256("".join(sums).encode()).hexdigest()

    @cached_property
    def tokenizer(self) -> PanFoMaTokenizer:
        """The tokenizer that its cells were read with."""
        return PanFoMaTokenizer.from_pretrained(self.folder / TOKENIZER_FOLDER)

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """The splits stored with it, by name: settings, cells by part, what was kept together, what leaks."""
        return self.manifest["splits"]

    def split(self, name: str) -> np.ndarray:
        """(cells,) uint8, the part of every cell: an index into `PARTS`.

        Raises
        ------
        KeyError
            If there is no such split.
        CorpusError
            If it is not that of the manifest.
        """
        if name not in self.splits:
            raise KeyError(
                f"The corpus has the splits {', '.join(self.splits) or '(none)'}, got {name!r}. Name one of these."
            )
        path = self.folder / SPLITS_FOLDER / f"{name}.npy"
        try:
            parts = np.load(path)
        except (OSError, ValueError, EOFError):  # missing, damaged, cut off
            parts = np.empty(0, dtype=np.uint8)
        if hashlib.sha256(parts.tobytes()).hexdigest() != self.splits[name]["sha256"]:
            raise CorpusError(
                f"A split must be that of the manifest, got another or none in {path}. Build the corpus again."
            )
        return parts

    def dataset(self, split: str | None = None, part: str = "train") -> Dataset:
        """Its cells as a data set, read from disk as they are asked for.

        Parameters
        ----------
        split
            A split's name; None takes all cells.
        part
            "train", "validation" or "test".

        Raises
        ------
        CorpusError
            If it is not whole, or was left on the Hub.
        """
        self._require_shards_here()
        state = self.folder / DATASET_FOLDER / "state.json"
        expected = self.dataset_files()[f"{DATASET_FOLDER}/state.json"]
        if not state.is_file() or json.loads(state.read_text(encoding="utf-8")) != expected:
            raise CorpusError(
                f"{state} must be that of the manifest, got another: a build was cut off. Build the corpus again."
            )
        dataset = load_from_disk(str(self.folder / DATASET_FOLDER), keep_in_memory=False).with_format("numpy")
        if split is None:
            return dataset
        if part not in PARTS[:3]:
            raise ValueError(f"`part` is one of {', '.join(PARTS[:3])}, got {part!r}. Name one of these.")
        return dataset.select(np.flatnonzero(self.split(split) == PARTS.index(part)))

    @cached_property
    def groups(self) -> CellGroups:
        """Donors, studies, cancer types and content of all cells."""
        return read_groups(self)[0]

    def check_split(self, parts: np.ndarray, *, donors: str = "error", duplicates: str = "error") -> Leaks:
        """Guard a split that you made yourself: find donors and equal cells on both sides.

        Parameters
        ----------
        parts
            (cells,), an index into `PARTS` for each cell.
        donors, duplicates
            "error" or "allow".

        Returns
        -------
        What is on both sides and was allowed.

        Raises
        ------
        LeakageError
            If something is that was not.
        """
        parts = np.asarray(parts)
        if parts.shape != (len(self),) or not np.isin(parts, range(len(PARTS))).all():
            raise ValueError(
                f"A split gives each of the {len(self):,} cells an index into {PARTS}, got shape {parts.shape} with "
                f"values {np.unique(parts)[:5].tolist()}. Pass one number for each cell."
            )
        leaks = find_leaks(parts.astype(np.uint8), self.groups)
        settings = SplitSettings(by="donor", donors=donors, duplicates=duplicates)
        leaks.require_none(settings, "given", self.describe_cell)
        return leaks

    def describe_cell(self, index: int) -> str:
        """What to call a cell: its name and its file."""
        shards = self.manifest["shards"]
        ends = list(accumulate(shard["cells"] for shard in shards))
        number = bisect_right(ends, index)
        row = index - (ends[number - 1] if number else 0)
        table = _columns(self._shard(shards[number]), [schema.CELL_ID])
        unit = self.manifest["units"][shards[number]["unit"]]
        return f"{table[schema.CELL_ID][row].as_py()} of {unit['study']}: {unit['file']}"

    def open_shard(self, shard: dict[str, Any]) -> BinaryIO:
        """Open a shard of the manifest to be read, from the folder or from the Hub.

        Raises
        ------
        OSError
            If it is not there.
        """
        if self.remote is None:
            return (self.folder / shard["path"]).open("rb")
        return HfFileSystem(token=self.token).open(f"{self.remote}/{shard['path']}", "rb")

    def shard_columns(self, shard: dict[str, Any], names: Sequence[str]) -> pa.Table:
        """Some columns of a shard on disk; others are not read."""
        return _columns(self._shard(shard), list(names))

    def _require_shards_here(self) -> None:
        if self.remote is not None:
            raise CorpusError(
                f"Cells in any order are read from disk, got a corpus whose shards were left on the Hub: {self.remote}."
                " Open it without `streaming`, which downloads them, or read it in turn: `pretrain(streaming=True)`."
            )

    def _shard(self, shard: dict[str, Any]) -> Path:
        """Where a shard is; while the corpus is being built, perhaps where it waits."""
        self._require_shards_here()
        path = self.folder / shard["path"]
        return path if path.is_file() else waiting_folder(path, self.folder)

    def verify(self) -> None:
        """Compare every shard with its checksum in the manifest.

        Raises
        ------
        CorpusError
            If shards are missing or other than they were written; it names them. Or if they were left on the Hub.
        """
        self._require_shards_here()
        wrong = []
        for shard in self.manifest["shards"]:
            path = self.folder / shard["path"]
            if not path.is_file():
                wrong.append(f"{shard['path']} (missing)")
                continue
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                    wrong.append(f"{shard['path']} (changed)")
        if wrong:
            raise CorpusError(
                f"Shards must be as they were written, got {len(wrong):,} of {len(self.manifest['shards']):,} in "
                f"{self.folder} that are not: {', '.join(wrong[:5])}. Remove their folders and build again, or "
                "download the corpus again."
            )
        for name in self.splits:
            self.split(name)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, message: str | None = None
    ) -> str:
        """Publish the corpus as a data set on the Hub, in one commit that also removes files of an earlier state.

        Shards that are there already are not sent again.

        Parameters
        ----------
        repo_id
            Its name there, such as ``lab/panfoma-bench``; made if it is not there.
        private
            Whether others may see a new one.
        token
            Access token; None takes the one that you logged in with.
        message
            Of the commit.

        Returns
        -------
        The commit's address.

        Raises
        ------
        CorpusError
            If the corpus is not whole, or the Hub does not take it.
        """
        self.verify()
        files = self.files()
        api = HfApi(token=token)
        try:
            repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
            there = api.list_repo_files(repo_id, repo_type="dataset")
            stale = [path for path in there if path.split("/")[0] in _FOLDERS and path not in files]
            commit = api.create_commit(
                repo_id,
                [
                    *(CommitOperationDelete(path) for path in stale),
                    *(CommitOperationAdd(path, str(self.folder / path)) for path in files),
                ],
                repo_type="dataset",
                commit_message=message or f"{self.manifest['name']}: {len(self):,} cells",
            )
        except Exception as error:  # of the network or the Hub, from several libraries
            raise CorpusError(
                f"The Hub must take the corpus, got for {repo_id}: {one_line(error)}. Check the name, the connection, "
                "and that you are logged in (`hf auth login`) and may write there; then push again."
            ) from error
        return str(commit.commit_url)

    def dataset_files(self) -> dict[str, dict[str, Any]]:
        """What `datasets.load_from_disk` looks for: paths and content."""
        shards = self.manifest["shards"]
        sums = "".join(shard["sha256"] for shard in shards)
        state = {
            "_data_files": [{"filename": shard["path"].removeprefix(f"{DATASET_FOLDER}/")} for shard in shards],
            "_fingerprint": hashlib.sha256(sums.encode()).hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": "train",
        }
        info = {
            "dataset_name": self.manifest["name"],
            "description": self.manifest["description"],
            "citation": "",
            "homepage": "",
            "license": self.manifest["licence"],
            "features": schema.corpus_features(self.manifest["tokenizer"]["vocab_size"]).to_dict(),
        }
        return {f"{DATASET_FOLDER}/dataset_info.json": info, f"{DATASET_FOLDER}/state.json": state}

    def files(self) -> list[str]:
        """Paths, relative to the folder, of what belongs to the corpus; other files in it are this machine's own."""
        found = [CARD_FILE, MANIFEST_FILE]
        found += list(self.dataset_files())
        found += [f"{unit['folder']}/{REPORT_FILE}" for unit in self.manifest["units"]]
        found += [shard["path"] for shard in self.manifest["shards"]]
        found += [f"{SPLITS_FOLDER}/{name}.npy" for name in self.splits]
        for folder in (TOKENIZER_FOLDER, PICTURES_FOLDER):
            names = sorted(path.name for path in (self.folder / folder).glob("*") if path.is_file())
            found += [f"{folder}/{name}" for name in names if not name.startswith(".")]
        return found

    def __str__(self) -> str:
        from .card import summary

        return summary(self)


def _columns(path: Path, names: list[str]) -> pa.Table:
    """Some columns of a shard, mapped from disk: the tokens beside them are not read."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all().select(names)


def read_groups(corpus: Corpus) -> tuple[CellGroups, list[str]]:
    """What splits need to know of a corpus' cells, and a line for each two cohorts that seem to share cells."""
    manifest = corpus.manifest
    cohort_of = {name: study["cohort"] for name, study in manifest["studies"].items()}
    names = {"studies": sorted(cohort_of), "cohorts": sorted(set(cohort_of.values())), "donors": [], "cancer_types": []}
    place = {key: {name: index for index, name in enumerate(known)} for key, known in names.items()}

    def codes(key: str, words: pa.ChunkedArray, rename) -> np.ndarray:
        """(cells,) int32, indices into the names of a field, which grow; -1 where ``rename`` gives None."""
        encoded = words.combine_chunks().dictionary_encode()
        new = []
        for word in [*encoded.dictionary.to_pylist(), *([None] if encoded.null_count else [])]:
            name = rename(word)
            if name is not None and name not in place[key]:
                place[key][name] = len(names[key])
                names[key].append(name)
            new.append(-1 if name is None else place[key][name])
        return np.array(new, dtype=np.int32)[pc.fill_null(encoded.indices, len(new) - 1).to_numpy()]

    parts: dict[str, list[np.ndarray]] = {
        key: [] for key in ("studies", "cohorts", "donors", "cancer_types", "content", "barcodes")
    }
    for shard in manifest["shards"]:
        study = manifest["units"][shard["unit"]]["study"]
        cohort = cohort_of[study]
        columns = [schema.DONOR_ID, schema.CANCER_TYPE, schema.CONTENT_HASH, schema.CELL_ID]
        table = _columns(corpus._shard(shard), columns)
        parts["studies"].append(np.full(table.num_rows, place["studies"][study], dtype=np.int32))
        parts["cohorts"].append(np.full(table.num_rows, place["cohorts"][cohort], dtype=np.int32))
        donor_name = lambda donor, cohort=cohort: f"{cohort}/{UNKNOWN_DONOR if donor is None else donor}"  # noqa: E731
        parts["donors"].append(codes("donors", table[schema.DONOR_ID], donor_name))
        parts["cancer_types"].append(codes("cancer_types", table[schema.CANCER_TYPE], lambda word: word))
        parts["content"].append(table[schema.CONTENT_HASH].to_numpy())
        parts["barcodes"].append(_barcode_hashes(table[schema.CELL_ID]))
    arrays = {key: np.concatenate(some) for key, some in parts.items()}
    overlaps = shared_barcodes(arrays["cohorts"], arrays.pop("barcodes"), names["cohorts"])
    return CellGroups(**arrays, names=names), overlaps


def _barcode_hashes(names: pa.ChunkedArray) -> np.ndarray:
    """(cells,) uint64, a hash of the barcode in each cell's name; 0 where there is none."""
    found = pc.struct_field(pc.extract_regex(names, _BARCODE), "barcode")
    hashes = pd.util.hash_array(pc.fill_null(found, "").to_numpy().astype(object), categorize=False)
    hashes[pc.is_null(found).to_numpy()] = 0
    return hashes
