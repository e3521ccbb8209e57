"""Files of cells, in whatever format: what they hold is opened here and read later, a chunk at a time."""

import csv
import gzip
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem

from ..tokenization import PanFoMaTokenizer
from ..tokenization.gene_names import SPECIES
from ..tokenization.value_scale import COUNT_LAYERS
from .storage import BLOCK_ENTRIES, CompressedColumns, CompressedRows, Rows, SlicedRows, SpilledRows, SpillError


TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".tab")
_WEB_PAGE = (b"<!doctype", b"<html")
# Text of a block is parsed in parts, as the parser needs several times their memory.
_PARTS_OF_BLOCK = 4
PACKED = (".gz", ".bz2", ".xz", ".zst")
# Before the key of a layer that is called as X or raw are.
LAYER_PREFIX = "layers/"
FORMATS = ".h5ad, .zarr, .loom, 10x .h5, a 10x folder or .mtx file, .csv or .tsv (also gzipped)"


@dataclass
class Matrix:
    """One matrix of a file with its genes.

    Parameters
    ----------
    rows
        (cells, genes).
    var
        (genes,), gene names in the index, other names and kinds of features in columns.
    """

    rows: Rows
    var: pd.DataFrame


@dataclass
class CellFile(AbstractContextManager):
    """An open file of cells; close it, or use it in a ``with`` statement.

    Parameters
    ----------
    name
        What to call it, such as its path.
    format
        What it is, such as "h5ad".
    obs
        (cells,), barcodes in the index, what is known of the cells in columns.
    matrices
        By key: "X", "raw", or a layer's name.
    notes
        What was decided in reading it.
    """

    name: str
    format: str
    obs: pd.DataFrame
    matrices: dict[str, Matrix]
    notes: list[str] = field(default_factory=list)
    _close: Callable[[], None] | None = None

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and what was kept of it in temporary files; what was read stays."""
        for matrix in self.matrices.values():
            matrix.rows.close()
        if self._close is not None:
            self._close()

    def check(self) -> None:
        """Raise ValueError unless there are cells, with barcodes of their own, and matrices of their number."""
        if not self.matrices:
            raise ValueError(
                f"A file of cells needs a matrix of expression, got none in {self.name}: neither X, raw nor a layer. "
                "Write it again with its counts."
            )
        for key, matrix in self.matrices.items():
            if matrix.rows.shape != (len(self.obs), len(matrix.var)):
                raise ValueError(
                    f"A matrix needs a row for each cell and a column for each gene, got {matrix.rows.shape[0]:,} x "
                    f"{matrix.rows.shape[1]:,} in {key!r} of {self.name} for {len(self.obs):,} cells and "
                    f"{len(matrix.var):,} genes. The file is damaged: write or download it again."
                )
        if not len(self.obs):
            raise ValueError(f"At least one cell is needed, got none in {self.name}. Check how it was written.")
        if not any(matrix.rows.shape[1] for matrix in self.matrices.values()):
            raise ValueError(f"At least one gene is needed, got none in {self.name}. Check how it was written.")
        repeated = self.obs.index[self.obs.index.duplicated()].unique()
        if len(repeated):
            raise ValueError(
                f"Every cell needs a barcode of its own, as results go by it, got {len(repeated):,} that several cells "
                f"of {self.name} share ({', '.join(map(str, repeated[:3]))}). Put the sample's name before the "
                "barcodes, or call `adata.obs_names_make_unique()`."
            )


def open_cells(path: str | Path, tokenizer: PanFoMaTokenizer | None = None) -> CellFile:
    """Open a file or folder of cells by what it holds, whatever it is called.

    Parameters
    ----------
    path
        `.h5ad`, zarr, loom, 10x `.h5`, a folder or file of 10x `.mtx`, or a table in text, gzipped or not.
    tokenizer
        Knows gene names, which tell a table's genes from its cells; None takes the packaged one.

    Raises
    ------
    FileNotFoundError
        If there is nothing at the path.
    ValueError
        If it is of no known format, damaged, empty, or has barcodes twice.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"Cells are read from a file or a folder, got nothing at {path}. Check the path.")
    reader = _reader_of(path)
    with readable(str(path)):
        cells = reader(path) if reader is not read_table else read_table(path, tokenizer or PanFoMaTokenizer())
    try:
        cells.check()
    except ValueError:
        cells.close()
        raise
    return cells


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what libraries raise on a damaged file into a ValueError that names it; our own errors pass."""
    try:
        yield
    except (SpillError, MemoryError):  # not the file's fault
        raise
    except (PermissionError, BlockingIOError) as error:
        raise ValueError(
            f"{name} cannot be opened: {_one_line(error)}. Close it in other programs, and see that you may read it."
        ) from error
    except Exception as error:  # libraries raise whatever a damaged file leads them to
        if type(error) is ValueError and name in str(error):
            raise
        raise ValueError(
            f"{name} cannot be read: {_one_line(error)}. It is cut off or damaged: download or write it again."
        ) from error


def _one_line(error: Exception) -> str:
    """The message of a library's error, as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".")


def _reader_of(path: Path) -> Callable[..., CellFile]:
    if path.is_dir():
        if any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs")):
            return read_zarr
        if _files_like(path, "matrix.mtx"):
            return read_mtx
        raise ValueError(
            f"A folder of cells holds zarr or 10x's matrix.mtx, barcodes.tsv and features.tsv, got {path} with "
            f"{', '.join(sorted(file.name for file in path.iterdir())[:4]) or 'nothing'}. Name a file in it."
        )
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"A file of cells must not be empty, got 0 bytes in {path}. Download or write it again.")
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return read_hdf5
    name = path.name.lower()
    is_web_page = start.lstrip().lower().startswith(_WEB_PAGE)
    if name.endswith(".zarr.zip"):
        return read_zarr
    unpacked = next((name.removesuffix(suffix) for suffix in PACKED if name.endswith(suffix)), name)
    if unpacked.endswith(".mtx") and not is_web_page:
        return read_mtx
    if unpacked.endswith(TEXT_SUFFIXES) and not is_web_page and (unpacked != name or b"\0" not in start):
        return read_table
    raise ValueError(f"Cells are read from {FORMATS}, got {path.name}, which is {_looks_like(start, unpacked)}")


def _looks_like(start: bytes, name: str) -> str:
    """What a file that cannot be read seems to be, and what to do."""
    if start.startswith(b"\x80") and start[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle. Load it where it was made and write it with `adata.write_h5ad()`."
    if start.lstrip().lower().startswith(_WEB_PAGE):
        return "a web page. The download went wrong: download it again."
    if name.endswith((".rds", ".rdata", ".rda", ".robj")):
        return "an R object. Write its counts in R, with anndataR's write_h5ad() or DropletUtils' write10xCounts()."
    if start.startswith(b"PK"):
        return "a zip archive or a spreadsheet. Unpack it, or save the sheet as .csv."
    if start.startswith(b"\x1f\x8b"):
        return "compressed. Unpack it with gunzip."
    return "none of these. Convert it with anndata or scanpy."


# ----------------------------------------------------------------------------------------------------------------------
# HDF5 and zarr
# ----------------------------------------------------------------------------------------------------------------------


def read_hdf5(path: Path) -> CellFile:
    """Open an `.h5ad`, a loom or a 10x file, told by what is in it."""
    file = h5py.File(path, "r")
    try:
        cells = _read_hdf5(path, file)
    except BaseException:
        file.close()
        raise
    cells._close = file.close
    return cells


def _read_hdf5(path: Path, file: h5py.File) -> CellFile:
    if "obs" in file and "var" in file and "mod" not in file:
        return _read_anndata(path, file, "h5ad")
    if isinstance(file.get("matrix"), h5py.Group) or _genome_groups(file):
        return _read_10x(path, file)
    if isinstance(file.get("matrix"), h5py.Dataset):
        return _read_loom(path, file)
    if "mod" in file:
        raise ValueError(
            f"Cells are read from one modality, got a MuData with {', '.join(file['mod'])} in {path}. "
            "Write that of RNA by itself: mdata['rna'].write_h5ad()."
        )
    if "mod" in file:
        raise ValueError(
            f"Cells are read from one modality, got a MuData with {', '.join(file['mod'])} in {path}. "
            "Write that of RNA by itself: mdata['rna'].write_h5ad()."
        )
    raise ValueError(
        f"An .h5ad file holds obs, var and X, got {', '.join(file) or 'nothing'} in {path}. "
        "Write it with `adata.write_h5ad()`."
    )


def open_zarr(path: Path) -> zarr.Group:
    """A zarr store to read, a folder or a zip."""
    store = zarr.storage.ZipStore(path, mode="r") if path.is_file() else zarr.storage.LocalStore(path, read_only=True)
    return zarr.open_group(store, mode="r")


def read_zarr(path: Path) -> CellFile:
    """Open an AnnData in zarr, a folder or a `.zarr.zip`."""
    group = open_zarr(path)
    if "obs" not in group or "var" not in group:
        raise ValueError(
            f"A zarr store of cells holds obs, var and X, got {', '.join(group) or 'nothing'} in {path}. "
            "Write it with `adata.write_zarr()`."
        )
    cells = _read_anndata(path, group, "zarr")
    cells._close = group.store.close
    return cells


def _check_chunks(group: zarr.Group, source: str) -> None:
    """Raise ValueError where parts of a sparse matrix are not there, for which zarr itself gives zeros."""
    for name in ("data", "indices"):
        array = group[name]
        # Indices of one gene may be all zeros, which zarr does not write.
        may_be_zero = name == "indices" and array.shape[0] <= group.attrs["shape"][0]
        if array.nchunks_initialized < array.nchunks and not may_be_zero:
            raise ValueError(
                f"A zarr store must be whole, got {array.nchunks_initialized:,} of {array.nchunks:,} chunks of {name} "
                f"in {source}. Copy or write it again."
            )


def _read_anndata(path: Path, group, name: str) -> CellFile:
    if "obs" in group and hasattr(group["obs"], "shape"):  # a compound table, written by an anndata before 0.7
        old = ad.read_h5ad(path, backed="r")
        obs, var, raw_var = old.obs, old.var, None if old.raw is None else old.raw.var
        old.file.close()
    else:
        obs, var = _read_frame(group, "obs", path), _read_frame(group, "var", path)
        raw_var = _read_frame(group, "raw/var", path) if "raw/var" in group else None
    elements = {"X": group.get("X"), "raw": group.get("raw/X", group.get("raw.X"))}
    elements |= {_layer_key(key): group["layers"][key] for key in group.get("layers", ())}
    return _with_matrices(CellFile(str(path), name, obs, {}), elements, var, raw_var)


def anndata_cells(adata: ad.AnnData, name: str = "the AnnData") -> CellFile:
    """The matrices of an AnnData, in memory or backed, as those of a file."""
    elements = {"X": adata.X, "raw": None if adata.raw is None else adata.raw.X}
    elements |= {_layer_key(key): matrix for key, matrix in adata.layers.items()}
    raw_var = None if adata.raw is None else adata.raw.var
    return _with_matrices(CellFile(name, "AnnData", adata.obs, {}), elements, adata.var, raw_var)


def _layer_key(name: str) -> str:
    return f"{LAYER_PREFIX}{name}" if name in ("X", "raw") else name


def _with_matrices(cells: CellFile, elements: dict, var: pd.DataFrame, raw_var: pd.DataFrame | None) -> CellFile:
    """The file with those of its elements that are matrices of numbers; a note says which are not."""
    unusable = []
    for key, element in elements.items():
        if element is None or (hasattr(element, "shape") and len(element.shape) != 2):
            continue
        try:
            cells.matrices[key] = Matrix(
                _rows_of(element, f"{key!r} of {cells.name}"), raw_var if key == "raw" else var
            )
        except ValueError as error:
            unusable.append(error)
            cells.notes.append(f"{key!r} is left out: {error}")
    if unusable and not cells.matrices.keys() & {"X", "raw", *COUNT_LAYERS}:
        raise unusable[0]
    return cells


def _read_frame(group, key: str, path: Path) -> pd.DataFrame:
    try:
        return read_elem(group[key])
    except Exception as error:  # AnnData's own have no public name
        raise ValueError(
            f"{path} cannot be read: {_one_line(error)}. Update anndata, as the file may be newer than it is, or write "
            "the file again."
        ) from error


def _rows_of(element, source: str) -> Rows:
    """The rows of a matrix in memory, of AnnData's on disk, or of an element of a file."""
    if isinstance(element, CSRDataset | CSCDataset) and hasattr(element, "group"):
        element = element.group
    if hasattr(element, "dtype"):
        _check_numbers(element, source)
        return SlicedRows(element)
    attributes = dict(element.attrs)
    kind = attributes.get("encoding-type", attributes.get("h5sparse_format"))
    if kind not in ("csr_matrix", "csc_matrix", "csr", "csc"):
        raise ValueError(
            f"A matrix is stored dense, as CSR or as CSC, got {kind!r} in {source}. Write it anew with anndata."
        )
    _check_numbers(element["data"], source)
    if isinstance(element, zarr.Group):
        _check_chunks(element, source)
    shape = attributes["shape"] if "shape" in attributes else attributes["h5sparse_shape"]
    stored = CompressedRows if kind.startswith("csr") else CompressedColumns
    return stored(element["indptr"], element["indices"], element["data"], tuple(shape))


def _check_numbers(values, source: str) -> None:
    if np.dtype(values.dtype).kind not in "biuf":
        raise ValueError(f"Expression must be numbers, got {values.dtype} in {source}. Convert it to float32.")


def _genome_groups(file: h5py.File) -> list[str]:
    """The genomes of a 10x file of Cell Ranger 2."""
    members = {"barcodes", "genes", "gene_names", "data", "indices", "indptr", "shape"}
    return [name for name, group in file.items() if isinstance(group, h5py.Group) and members <= set(group)]


def _read_10x(path: Path, file: h5py.File) -> CellFile:
    notes = []
    if "matrix" in file:  # Cell Ranger 3 and newer
        group, version = file["matrix"], "v3"
        features = group["features"]
        columns = {"gene_ids": "id", "feature_types": "feature_type", "genome": "genome"}
        var = pd.DataFrame({key: _texts(features[name]) for key, name in columns.items() if name in features})
        var.index = _texts(features["name"])
    else:
        genomes, version = _genome_groups(file), "v2"
        human = [name for name in genomes if re.match(r"GRCh|hg\d", name)]
        if len(genomes) > 1 and len(human) != 1:
            raise ValueError(
                f"One human genome is read, got {', '.join(genomes)} in {path}. Count that of GRCh38 alone."
            )
        group = file[human[0] if human else genomes[0]]
        if len(genomes) > 1:
            notes.append(f"of the genomes {', '.join(genomes)} only {human[0]} is read")
        var = pd.DataFrame({"gene_ids": _texts(group["genes"])}, index=_texts(group["gene_names"]))
    obs = pd.DataFrame(index=_texts(group["barcodes"]))
    # Stored as (genes, cells) in columns, which is (cells, genes) in rows.
    num_genes, num_cells = map(int, group["shape"][:])
    rows = CompressedRows(group["indptr"], group["indices"], group["data"], (num_cells, num_genes))
    return CellFile(str(path), f"10x h5 {version}", obs, {"X": Matrix(rows, var)}, notes)


def _texts(dataset) -> np.ndarray:
    return np.array([text.decode() if isinstance(text, bytes) else str(text) for text in dataset[:]], dtype=object)


def _read_loom(path: Path, file: h5py.File) -> CellFile:
    genes, cells = _loom_attributes(file["row_attrs"]), _loom_attributes(file["col_attrs"])
    var = _indexed(genes, ("Gene", "var_names", "GeneName", "gene_names", "Accession"))
    obs = _indexed(cells, ("CellID", "obs_names", "CellIDs", "barcode"))
    matrices = {"X": Matrix(SlicedRows(file["matrix"], transposed=True), var)}
    for key, layer in file.get("layers", {}).items():
        matrices[key] = Matrix(SlicedRows(layer, transposed=True), var)
    return CellFile(str(path), "loom", obs, matrices)


def _loom_attributes(group: h5py.Group) -> pd.DataFrame:
    columns = {name: data for name, data in group.items() if isinstance(data, h5py.Dataset) and data.ndim == 1}
    return pd.DataFrame(
        {name: data[:] if data.dtype.kind in "biuf" else _texts(data) for name, data in columns.items()}
    )


def _indexed(table: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    """The table with the first of the named columns as its index; its rows' numbers where there is none."""
    name = next((name for name in names if name in table), None)
    index = table.index if name is None else table[name]
    return table.drop(columns=name or []).set_axis(pd.Index(index.astype(str), name=None), axis=0)


# ----------------------------------------------------------------------------------------------------------------------
# Matrix Market, as 10x writes it
# ----------------------------------------------------------------------------------------------------------------------


def _files_like(folder: Path, name: str) -> list[Path]:
    """Files of a folder that end as named, packed or not: GEO puts the sample before it."""
    return sorted(file for file in folder.iterdir() if re.search(rf"{re.escape(name)}(\.gz)?$", file.name))


def read_mtx(path: Path) -> CellFile:
    """Open a folder of Cell Ranger, or the `.mtx` file in it, with the files beside that name genes and cells."""
    if path.is_dir():
        matrices = _files_like(path, "matrix.mtx")
        if len(matrices) > 1:
            raise ValueError(
                f"A folder holds one sample, got {', '.join(file.name for file in matrices[:3])} in {path}. "
                "Name one of these files."
            )
        path = matrices[0]
    prefix = re.sub(r"(matrix)?\.mtx(\.gz)?$", "", path.name)
    barcodes = _read_names(path, prefix, ("barcodes.tsv", "cells.tsv"), "cells")
    features = _read_names(path, prefix, ("features.tsv", "genes.tsv"), "genes")
    obs = pd.DataFrame(index=barcodes[0].to_numpy())
    var = pd.DataFrame(index=features[min(1, features.shape[1] - 1)].to_numpy())
    if features.shape[1] > 1:
        var["gene_ids"] = features[0].to_numpy()
    if features.shape[1] > 2:
        var["feature_types"] = features[2].to_numpy()
    rows = _mtx_rows(path, len(obs), len(var))
    return CellFile(str(path), "10x mtx", obs, {"X": Matrix(rows, var)})


def _read_names(path: Path, prefix: str, names: tuple[str, ...], what: str) -> pd.DataFrame:
    """A file without header beside the matrix; one column a field."""
    for name in names:
        for file in (path.parent / f"{prefix}{name}", path.parent / f"{prefix}{name}.gz"):
            if file.is_file():
                try:
                    return pd.read_csv(file, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=3)
                except pd.errors.EmptyDataError as error:
                    raise ValueError(
                        f"A Matrix Market file needs the names of its {what}, got an empty {file.name} beside {path}. "
                        "Write or download it again."
                    ) from error
    raise ValueError(
        f"A Matrix Market file needs the names of its {what} beside it, got no {prefix}{names[0]} (or .gz) in "
        f"{path.parent}. Put {' or '.join(names)} there."
    )


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
                f"{_one_line(error)}. Write 0 for what is missing, and take out columns that are no cells or genes."
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
