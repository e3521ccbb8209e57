"""Cells in text: Matrix Market as 10x writes it, and tables of any orientation."""

import csv
import gzip
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..tokenization import PanFoMaTokenizer
from ..tokenization.gene_names import SPECIES
from .cell_file import CellFile, Matrix, one_line
from .storage import BLOCK_ENTRIES, Rows, SpilledRows


# Text of a block is parsed in parts, as the parser needs several times their memory.
_PARTS_OF_BLOCK = 4
# Files beside a matrix that name its cells and genes.
_BARCODES = ("barcodes.tsv", "cells.tsv")
_FEATURES = ("features.tsv", "genes.tsv")


# ----------------------------------------------------------------------------------------------------------------------
# Matrix Market, as 10x writes it
# ----------------------------------------------------------------------------------------------------------------------


def files_like(folder: Path, name: str) -> list[Path]:
    """Files of a folder that end as named, packed or not: GEO puts the sample before it."""
    return sorted(file for file in folder.iterdir() if re.search(rf"{re.escape(name)}(\.gz)?$", file.name))


def read_mtx(path: Path) -> CellFile:
    """Open a folder of Cell Ranger, or the `.mtx` file in it, with the files beside that name genes and cells."""
    if path.is_dir():
        matrices = files_like(path, "matrix.mtx")
        if len(matrices) > 1:
            raise ValueError(
                f"A folder holds one sample, got {', '.join(file.name for file in matrices[:3])} in {path}. "
                "Name one of these files."
            )
        path = matrices[0]
    barcodes = _read_names(path, _BARCODES, "cells")
    features = _read_names(path, _FEATURES, "genes")
    obs = pd.DataFrame(index=barcodes[0].to_numpy())
    var = pd.DataFrame(index=features[min(1, features.shape[1] - 1)].to_numpy())
    if features.shape[1] > 1:
        var["gene_ids"] = features[0].to_numpy()
    if features.shape[1] > 2:
        var["feature_types"] = features[2].to_numpy()
    rows = _mtx_rows(path, len(obs), len(var))
    return CellFile(str(path), "10x mtx", obs, {"X": Matrix(rows, var)})


def mtx_files(path: Path) -> list[Path]:
    """A `.mtx` file and those beside it that name its genes and cells."""
    beside = [_file_beside(path, names) for names in (_BARCODES, _FEATURES)]
    return sorted([path, *(file for file in beside if file is not None)])


def _file_beside(path: Path, names: tuple[str, ...]) -> Path | None:
    """The first of the named files beside a matrix, with its prefix, packed or not."""
    prefix = _prefix(path)
    files = (path.parent / f"{prefix}{name}{suffix}" for name in names for suffix in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)


def _prefix(path: Path) -> str:
    return re.sub(r"(matrix)?\.mtx(\.gz)?$", "", path.name)


def _read_names(path: Path, names: tuple[str, ...], what: str) -> pd.DataFrame:
    """A file without header beside the matrix; one column a field."""
    file = _file_beside(path, names)
    if file is None:
        raise ValueError(
            f"A Matrix Market file needs the names of its {what} beside it, got no {_prefix(path)}{names[0]} (or .gz) "
            f"in {path.parent}. Put {' or '.join(names)} there."
        )
    try:
        return pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
    except pd.errors.EmptyDataError as error:
        raise ValueError(
            f"A Matrix Market file needs the names of its {what}, got an empty {file.name} beside {path}. "
            "Write or download it again."
        ) from error


def _mtx_rows(path: Path, num_cells: int, num_genes: int) -> Rows:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        header = file.readline().lower().split()
        if header[:3] != ["%%matrixmarket", "matrix", "coordinate"] or header[3:4] not in (["integer"], ["real"]):
            raise ValueError(
                f"A matrix of counts starts with '%%MatrixMarket matrix coordinate integer', got "
                f"{' '.join(header)[:60]!r} in {path}. Write it with Cell Ranger, STARsolo or scipy.io.mmwrite."
            )
        sizes = next((line for line in file if line.strip() and not line.startswith("%")), "").split()
        if not sizes:
            raise ValueError(f"{path} ends within its header. Download or write it again.")
        if len(sizes) != 3 or not all(map(str.isdecimal, sizes)):
            raise ValueError(
                f"The header of a Matrix Market file ends with the numbers of rows, columns and entries, got "
                f"{' '.join(sizes)[:60]!r} in {path}. Download or write it again."
            )
        height, width, num_entries = map(int, sizes)
        if (height, width) not in ((num_genes, num_cells), (num_cells, num_genes)):
            raise ValueError(
                f"The header of a Matrix Market file must fit the files beside it, got {height:,} x {width:,} in "
                f"{path} for {num_genes:,} genes and {num_cells:,} cells. One of the files is cut off or another "
                "sample's."
            )
        is_transposed = (height, width) == (num_genes, num_cells)
        blocks = _mtx_blocks(file, path, (height, width), num_entries, is_transposed)
        return SpilledRows(blocks, (num_cells, num_genes))


def _mtx_blocks(
    file, path: Path, shape: tuple[int, int], num_entries: int, is_transposed: bool
) -> Iterator[tuple[int, sp.spmatrix]]:
    """Blocks of the entries in the order of the file, for `SpilledRows`."""
    entries = _mtx_entries(file, path, shape, num_entries)
    while parts := list(islice(entries, _PARTS_OF_BLOCK)):
        row, column, values = map(np.concatenate, zip(*parts, strict=True))
        cells, genes = (column, row) if is_transposed else (row, column)
        first = int(cells.min())
        size = (int(cells.max()) - first + 1, shape[0] if is_transposed else shape[1])
        yield first, sp.coo_matrix((values, (cells - first, genes)), shape=size)


def _mtx_entries(file, path: Path, shape: tuple[int, int], num_entries: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Rows and columns from 0 and values, a part of the file at a time."""
    seen, step = 0, max(1, BLOCK_ENTRIES // _PARTS_OF_BLOCK)
    try:
        parts = pd.read_csv(file, sep=r"\s+", header=None, chunksize=step)
    except pd.errors.EmptyDataError:
        parts = ()
    for lines in parts:
        kinds = "".join(dtype.kind for dtype in lines.dtypes)
        if not re.fullmatch("[iu][iu][iuf]", kinds) or lines.isna().any(axis=None):
            raise ValueError(
                f"Lines of a Matrix Market file are three numbers, got others in the {len(lines):,} lines after entry "
                f"{seen:,} of {path}. The file is damaged, its positions are no whole numbers, or its numbers are too "
                "large for 64 bits: write it again."
            )
        row, column, values = (lines[position].to_numpy() for position in range(3))
        is_outside = (row < 1) | (row > shape[0]) | (column < 1) | (column > shape[1])
        if is_outside.any():
            first = int(np.argmax(is_outside))
            raise ValueError(
                f"Entries of {path} must lie within its header's {shape[0]:,} x {shape[1]:,}, got one at "
                f"({row[first]:,}, {column[first]:,}). The header is of another matrix: write the file again."
            )
        seen += len(lines)
        yield (row - 1).astype(np.int32), (column - 1).astype(np.int32), values
    if seen != num_entries:
        raise ValueError(
            f"The header of {path} promises {num_entries:,} entries, got {seen:,}. "
            "The file is cut off or its header lies: download or write it again."
        )


# ----------------------------------------------------------------------------------------------------------------------
# Tables in text
# ----------------------------------------------------------------------------------------------------------------------


def read_table(path: Path, tokenizer: PanFoMaTokenizer) -> CellFile:
    """Open a table of cells and genes, told apart by their names; columns of text describe its rows."""
    table = _TextTable(path)
    table.check_text(_are_genes(table.columns, tokenizer))
    columns = [table.columns[position] for position in table.numeric]
    across = _are_genes(columns, tokenizer).mean()
    down = _are_genes(table.labels.index[:2000], tokenizer).mean()
    if max(across, down) < 0.02:
        raise ValueError(
            f"A table needs gene names in its first row or column, got {', '.join(columns[:3])} and "
            f"{', '.join(table.labels.index[:3])} in {path}. Add symbols or Ensembl ids."
        )
    by_column = pd.DataFrame(index=columns)
    if down > across:
        rows = SpilledRows(table.blocks(genes_in_rows=True), (len(columns), len(table.labels)))
        return CellFile(str(path), "table", by_column, {"X": Matrix(rows, table.labels)}, ["genes are in its rows"])
    rows = SpilledRows(table.blocks(genes_in_rows=False), (len(table.labels), len(columns)))
    return CellFile(str(path), "table", table.labels, {"X": Matrix(rows, by_column)}, ["genes are in its columns"])


class _TextTable:
    """A table with names in its first row and column; columns of text are told by its first lines.

    pandas reads the names and the text; NumPy reads the numbers, as pandas takes a millisecond for each of 20,000
    columns.
    """

    def __init__(self, path: Path):
        self.path, self._skipped = path, 1
        with self._open() as handles:
            line = handles.handle.readline()
            comment = ""
            while line.startswith("#"):
                comment, line, self._skipped = line, handles.handle.readline(), self._skipped + 1
            self._separator = max("\t,;", key=line.count)
            header, *self._head = csv.reader([line, *islice(handles.handle, 50)], delimiter=self._separator)
            if comment.count(self._separator) == len(header) - 1 and all(map(_is_number, header[1:])):
                # The names stand behind the sign of a comment.
                self._head.insert(0, header)
                header = next(csv.reader([comment.removeprefix("#")], delimiter=self._separator))
                self._skipped -= 1
        self._head = [row for row in self._head if row]
        width = len(self._head[0]) if self._head else 0
        if width < 2 or len(header) not in (width, width - 1) or any(len(row) != width for row in self._head):
            raise ValueError(
                f"A table needs a row of names and then rows of a name and numbers, got rows of {len(header)} and "
                f"{', '.join(map(str, sorted({len(row) for row in self._head}))) or 'no'} fields in {path}. "
                "Check its separator."
            )
        self.columns = header[-(width - 1) :]  # R leaves the corner out
        is_text = [not all(map(_is_number, fields)) for fields in zip(*(row[1:] for row in self._head), strict=True)]
        self.numeric = [position for position, text in enumerate(is_text) if not text]
        self.text = [position for position, text in enumerate(is_text) if text]
        used = [0, *(position + 1 for position in self.text)]
        # By position, as names may occur twice.
        labels = pd.read_csv(
            path,
            sep=self._separator,
            header=None,
            skiprows=self._skipped,
            usecols=used,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
        )
        self.labels = labels.set_index(0).set_axis([self.columns[position] for position in self.text], axis=1)
        self.labels.index.name = None

    def _open(self):
        return pd.io.common.get_handle(self.path, "r", encoding="utf-8-sig", compression="infer")

    def check_text(self, is_gene: np.ndarray) -> None:
        """Raise ValueError where text stands among numbers, or is all there is."""
        for position in self.text:
            fields = [row[position + 1] for row in self._head]
            is_text = [not _is_number(text) for text in fields]
            if is_gene[position] or not self.numeric or np.mean(is_text) < 0.5:
                row = int(np.argmax(is_text))
                raise ValueError(
                    f"Expression must be numbers, got the text {fields[row]!r} in row {self._head[row][0]!r}, column "
                    f"{self.columns[position]!r} of {self.path}. Check the separator and the decimal point, and take "
                    "out columns that are no cells or genes."
                )

    def blocks(self, genes_in_rows: bool) -> Iterator[tuple[int, sp.spmatrix]]:
        """Blocks of the table's rows, for `SpilledRows`."""
        first, step = 0, max(1, BLOCK_ENTRIES // len(self.columns))
        with self._open() as handles:
            lines = islice(handles.handle, self._skipped, None)
            while block := list(islice(lines, step)):
                block = [line for line in block if line.strip("\r\n")]
                if not block:
                    continue
                numbers = self._numbers(block, first)
                if genes_in_rows:
                    size = (len(self.numeric), len(self.labels))
                    yield 0, sp.coo_matrix((numbers.data, (numbers.col, numbers.row + first)), shape=size)
                else:
                    yield first, numbers
                first += len(block)
        if first != len(self.labels):
            raise ValueError(
                f"Every row of a table needs its name, got {len(self.labels):,} names for {first:,} rows in "
                f"{self.path}. A quote is open or a row is empty: write it again."
            )

    def _numbers(self, lines: list[str], first: int) -> sp.coo_matrix:
        used, width = [position + 1 for position in self.numeric], len(self.columns) + 1
        for row, line in enumerate(lines, start=first + 1):
            num_fields = line.count(self._separator) + 1
            if num_fields != width and '"' not in line:
                raise ValueError(
                    f"Rows of a table must have the same number of fields, got {num_fields:,} in row {row:,} of "
                    f"{self.path} where others have {width:,}. The file is cut off or its separator is in a name."
                )
        try:
            return sp.coo_matrix(
                np.loadtxt(lines, delimiter=self._separator, usecols=used, quotechar='"', comments=None, ndmin=2)
            )
        except ValueError as error:
            raise ValueError(
                f"Expression must be numbers, got others in the {len(lines):,} rows after {first:,} of {self.path}: "
                f"{one_line(error)}. Write 0 for what is missing, and take out columns that are no cells or genes."
            ) from error


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return text in ("NA", "N/A", "NULL")
    return True


def _are_genes(names: Sequence[str], tokenizer: PanFoMaTokenizer) -> np.ndarray:
    """Which of the names are of genes, of any species."""
    resolution = tokenizer.resolve_genes(names)
    return (resolution.token_ids >= 0) | (resolution.symbols != "") | (resolution.rule == SPECIES)
