"""What a corpus says of itself: a summary for the terminal, and the data card of the Hub with its pictures."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCardData
from transformers.utils import logging

from .. import schema
from .splits import PARTS


if TYPE_CHECKING:
    from .corpus import Corpus

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
PICTURES_FOLDER = "pictures"
# Rows of a table beyond these are added up in one.
MAX_ROWS = 40
_SIZES = [
    (1e3, "n<1K"),
    (1e4, "1K<n<10K"),
    (1e5, "10K<n<100K"),
    (1e6, "100K<n<1M"),
    (1e7, "1M<n<10M"),
    (1e8, "10M<n<100M"),
]


def summary(corpus: "Corpus") -> str:
    """The corpus in a screenful."""
    manifest, totals = corpus.manifest, corpus.manifest["totals"]
    lines = [
        f"{manifest['name']}: {totals['cells']:,} cells of {totals['cells_read']:,} read, "
        f"{totals['studies']:,} studies, "
        f"{totals['donors']:,} donors, {totals['cancer_types']:,} cancer types, {totals['cell_types']:,} cell types",
        f"{totals['tokens']:,} tokens ({totals['tokens'] / max(totals['cells'], 1):,.0f} genes a cell), "
        f"{size(totals['bytes'])} in {len(manifest['shards']):,} shards",
        "dropped: "
        + (", ".join(f"{count:,} {reason}" for reason, count in manifest["dropped"].items() if count) or "none"),
        "",
        *_plain(_study_rows(manifest)),
        "",
        *_plain(_cancer_rows(manifest)),
        "",
        *_plain(_split_rows(manifest)),
    ]
    notes = [f"note: {note}" for note in manifest["notes"]]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def size(num_bytes: float) -> str:
    """Bytes as people write them."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def write_card(corpus: "Corpus") -> Path:
    """Write the corpus' data card, and its pictures where matplotlib is installed; the card's path."""
    from .units import write_whole

    pictures = _draw(corpus)
    path = corpus.folder / CARD_FILE
    write_whole(path, data_card(corpus, pictures).encode())
    return path


def _draw(corpus: "Corpus") -> list[tuple[str, str]]:
    """Paths of the pictures and what they show."""
    try:
        from .pictures import draw
    except ImportError:
        logger.warning(
            "The data card is written without pictures, as matplotlib is not installed: "
            "`pip install 'panfoma-hf[analysis]'` and build again, which takes seconds."
        )
        shutil.rmtree(corpus.folder / PICTURES_FOLDER, ignore_errors=True)
        return []
    folder = corpus.folder / PICTURES_FOLDER
    folder.mkdir(exist_ok=True)
    return [(f"{PICTURES_FOLDER}/{name}", text) for name, text in draw(corpus.manifest, folder)]


def data_card(corpus: "Corpus", pictures: list[tuple[str, str]]) -> str:
    """The data card in Markdown, with the head that the Hub reads.

    Parameters
    ----------
    corpus
        What it is about.
    pictures
        Paths relative to the corpus, and what they show.
    """
    manifest, totals = corpus.manifest, corpus.manifest["totals"]
    head = DatasetCardData(
        pretty_name=manifest["name"],
        license=manifest["licence"],
        tags=["biology", "single-cell", "scRNA-seq", "cancer", "gene-expression", "panfoma"],
        size_categories=[next((name for limit, name in _SIZES if totals["cells"] < limit), "100M<n<1B")],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "cells/**/*.arrow"}]}],
    )
    sections = [
        f"---\n{head.to_yaml()}\n---",
        f"# {manifest['name']}",
        manifest["description"],
        f"**{totals['cells']:,} human cells** from {totals['studies']:,} studies, "
        f"{totals['donors']:,} named donors, "
        f"{totals['cancer_types']:,} cancer types and {totals['tissues']:,} tissues, as tokens for "
        "[PanFoMa](https://arxiv.org/abs/2512.03111): gene ids (HGNC) and within-cell expression bins. Built with "
        f"`panfoma corpus build` from {len(manifest['units']):,} files; everything below is counted from the shards "
        "and written down in `manifest.json`, with the checksum of every input and output.",
        _markdown(_totals_rows(manifest)),
        *[f"![{text}]({path})\n\n*{text}*" for path, text in pictures],
        "## Use",
        _usage(corpus),
        "## Studies",
        "Genes measured are those of the vocabulary that the file lists; small panels hold too few for a model of the "
        "whole transcriptome.",
        _markdown(_study_rows(manifest)),
        "## Cancer types",
        _markdown(_cancer_rows(manifest)),
        "## What quality control left out",
        "A cell counts under the first reason that applies to it.",
        _markdown(_dropped_rows(manifest)),
        _quality(manifest),
        "## Splits",
        "Donors go by cohort and name; a cohort with cells of unknown donors is kept together. What is on both sides "
        "of a split was asked for, and is counted here.",
        _markdown(_split_rows(manifest)),
        "## Columns",
        _markdown(_column_rows(manifest)),
    ]
    if manifest["notes"]:
        sections += ["## Notes", "\n".join(f"- {note}" for note in manifest["notes"])]
    sections += ["## Sources, licences, citations", _markdown(_licence_rows(manifest)), _CITATION]
    return "\n\n".join(section for section in sections if section) + "\n"


_CITATION = """Please cite the sources above, and the model and benchmark that this format is for:

> Huang et al. PanFoMa: A Lightweight Foundation Model and Benchmark for Pan-Cancer. AAAI 2026.
> [doi:10.1609/aaai.v40i1.37008](https://doi.org/10.1609/aaai.v40i1.37008)"""


def _usage(corpus: "Corpus") -> str:
    split = next(iter(corpus.manifest["splits"]), None)
    chosen = f'corpus.dataset(split="{split}", part="train")' if split else "corpus.dataset()"
    return f"""```python
import panfoma_hf

corpus = panfoma_hf.Corpus.open("{corpus.manifest["name"]}")  # a folder, or a name on the Hub
cells = {chosen}  # datasets.Dataset, read from disk
tokenizer = corpus.tokenizer
```

Without panfoma-hf: `datasets.load_from_disk("{corpus.manifest["name"]}/cells")`, or
`datasets.load_dataset("{corpus.manifest["name"]}", streaming=True)`. Splits are in `splits/*.npy`, one byte a cell
in the order of the rows: {", ".join(f"{index} {part}" for index, part in enumerate(PARTS))}."""


# ----------------------------------------------------------------------------------------------------------------------
# Tables: rows of text, the first the head
# ----------------------------------------------------------------------------------------------------------------------


def _totals_rows(manifest: dict[str, Any]) -> list[list[str]]:
    totals = manifest["totals"]
    return [
        ["", ""],
        ["cells read", f"{totals['cells_read']:,}"],
        ["cells kept", f"{totals['cells']:,}"],
        ["cells without a named donor", f"{totals['cells_without_donor']:,}"],
        ["tokens", f"{totals['tokens']:,}"],
        ["genes a cell", f"{totals['tokens'] / max(totals['cells'], 1):,.0f}"],
        ["cell types", f"{totals['cell_types']:,}"],
        ["malignant / non-malignant / not known", _malignancy(manifest)],
        ["shards", f"{len(manifest['shards']):,} ({size(totals['bytes'])})"],
    ]


def _malignancy(manifest: dict[str, Any]) -> str:
    counts = manifest["counts"][schema.IS_MALIGNANT]
    yes, no = counts.get("True", 0), counts.get("False", 0)
    return f"{yes:,} / {no:,} / {manifest['totals']['cells'] - yes - no:,}"


def _study_rows(manifest: dict[str, Any]) -> list[list[str]]:
    rows = [["study", "cells", "read", "donors", "cancer types", "cell types", "genes a cell", "genes measured"]]
    for name, study in manifest["studies"].items():
        counts = study["counts"]
        rows.append(
            [
                name,
                f"{study['cells']:,}",
                f"{study['cells_read']:,}",
                f"{len(counts[schema.DONOR_ID]):,}",
                ", ".join(counts[schema.CANCER_TYPE]) or "",
                f"{len(counts[schema.CELL_TYPE]):,}",
                f"{study['tokens'] / study['cells']:,.0f}" if study["cells"] else "",
                f"{study['genes_measured']:,}",
            ]
        )
    return rows


def _cancer_rows(manifest: dict[str, Any]) -> list[list[str]]:
    rows = [["cancer type", "cells", "studies", "donors"]]
    counts = manifest["counts"][schema.CANCER_TYPE]
    donors = manifest["donors_by_cancer_type"]
    for kind, count in list(counts.items())[:MAX_ROWS]:
        studies = sum(kind in study["counts"][schema.CANCER_TYPE] for study in manifest["studies"].values())
        rows.append([kind, f"{count:,}", f"{studies:,}", f"{donors.get(kind, 0):,}"])
    others = list(counts.items())[MAX_ROWS:]
    if others:
        rows.append([f"{len(others):,} others", f"{sum(count for _, count in others):,}", "", ""])
    unknown = manifest["totals"]["cells"] - sum(counts.values())
    return [*rows, ["not known", f"{unknown:,}", "", ""]] if unknown else rows


def _dropped_rows(manifest: dict[str, Any]) -> list[list[str]]:
    reasons = [reason for reason, count in manifest["dropped"].items() if count]
    rows = [["study", "read", "kept", *reasons, "rare genes", "tokens of them"]]
    for name, study in manifest["studies"].items():
        tokens = study["tokens"] + study["tokens_rare"]
        rows.append(
            [
                name,
                f"{study['cells_read']:,}",
                f"{study['cells']:,}",
                *(f"{study['dropped'].get(reason, 0):,}" for reason in reasons),
                f"{study['genes_rare']:,}",
                f"{study['tokens_rare'] / tokens:.2%}" if tokens else "",
            ]
        )
    totals = manifest["totals"]
    dropped = [f"{manifest['dropped'][reason]:,}" for reason in reasons]
    return [*rows, ["all", f"{totals['cells_read']:,}", f"{totals['cells']:,}", *dropped, "", ""]]


def _split_rows(manifest: dict[str, Any]) -> list[list[str]]:
    rows = [["split", *PARTS, "held out for test", "donors on both sides", "equal cells on both sides"]]
    for name, split in manifest["splits"].items():
        test = split["groups"].get("test", [])
        shown = ", ".join(test[:3]) + (f" and {len(test) - 3:,} more" if len(test) > 3 else "")
        leaks = split["leaks"]
        cells = (f"{split['cells'][part]:,}" for part in PARTS)
        rows.append([name, *cells, shown, f"{leaks['donors']:,}", f"{leaks['duplicates']:,}"])
    return rows


def _column_rows(manifest: dict[str, Any]) -> list[list[str]]:
    features = schema.corpus_features(manifest["tokenizer"]["vocab_size"])
    meanings = {
        schema.INPUT_IDS: "gene ids, in the tokenizer's fixed pseudo-random order",
        schema.EXPRESSION_BINS: f"bins of expression in the cell, 1 to {manifest['tokenizer']['num_expression_bins']}",
        schema.LENGTH: "number of tokens",
        schema.CELL_ID: "the cell's name in its file",
        schema.STUDY: "the study's name in the source list",
        schema.DONOR_ID: "donor, within the study's cohort",
        schema.SAMPLE_ID: "sample or batch: one capture",
        schema.CELL_TYPE: "cell type, in the benchmark's words",
        schema.CANCER_TYPE: "cancer type of the donor, or normal",
        schema.TISSUE: "where the sample was taken",
        schema.ASSAY: "protocol",
        schema.IS_MALIGNANT: "whether the cell itself is malignant",
        schema.CONTENT_HASH: "equal for cells with the same genes and bins, before rare genes are left out",
    }
    rows = [["column", "type", "meaning"]]
    for name, feature in features.items():
        kind = feature.dtype if hasattr(feature, "dtype") else f"list of {feature.feature.dtype}"
        rows.append([f"`{name}`", kind, meanings[name]])
    return rows


def _quality(manifest: dict[str, Any]) -> str:
    settings = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in manifest["quality"].items())
    own = {
        name: {key: value for key, value in study["settings"]["quality"].items() if manifest["quality"][key] != value}
        for name, study in manifest["studies"].items()
    }
    others = [
        f"{name}: {', '.join(f'`{k}: {json.dumps(v)}`' for k, v in changed.items())}"
        for name, changed in own.items()
        if changed
    ]
    return f"Thresholds: {settings}." + (f" Other ones: {'; '.join(others)}." if others else "")


def _licence_rows(manifest: dict[str, Any]) -> list[list[str]]:
    rows = [["study", "licence", "citation"]]
    for name, study in manifest["studies"].items():
        citation = f"[{study['citation']}]({study['url']})" if study["url"] else study["citation"]
        rows.append([name, study["licence"], citation])
    return rows


def _markdown(rows: list[list[str]]) -> str:
    cells = [[text.replace("|", "\\|").replace("\n", " ") for text in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], f"|{'---|' * len(cells[0])}", *lines[1:]])


def _plain(rows: list[list[str]], widest: int = 36) -> list[str]:
    """Rows in columns; text beyond a width is cut."""
    cut = [[text if len(text) <= widest else text[: widest - 3] + "..." for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
    is_number = [all(not text or text[0].isdigit() for text in column[1:]) for column in zip(*cut, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if number else text.ljust(width)
            for text, width, number in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in cut
    ]
