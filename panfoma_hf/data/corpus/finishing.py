"""What is said of all units of a corpus together: splits, manifest, and the files that make it one data set."""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from ...tokenization import PanFoMaTokenizer
from .. import schema
from ..cells import tokenizer_fingerprint
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
from .sources import SourceList, check_exclusions_occur, check_labels_occur, resolved_settings
from .splits import NORMAL, CellGroups, Split, SplitError, make_split
from .units import FINISHED_FOLDER, REPORT_FILE, UNITS_FOLDER, Unit, waiting_folder, written_together


logger = logging.get_logger(__name__)


def finish_corpus(
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


def _make_splits(sources: SourceList, corpus: Corpus, cells: CellGroups, manifest: dict[str, Any]) -> dict[str, Split]:
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
            if folder.exists():  # damaged: its report or shards are missing, and it was built anew
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
