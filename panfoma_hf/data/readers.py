"""Files of cells, in whatever format: what they hold is opened here and read later, a chunk at a time."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import read_elem

from ..tokenization import PanFoMaTokenizer
from ..tokenization.value_scale import COUNT_LAYERS
from .cell_file import CellFile, Matrix, one_line, readable
from .storage import CompressedColumns, CompressedRows, Rows, SlicedRows
from .text_readers import files_like, mtx_files, read_mtx, read_table


TEXT_SUFFIXES = (".csv", ".tsv", ".txt", ".tab")
_WEB_PAGE = (b"<!doctype", b"<html")
PACKED = (".gz", ".bz2", ".xz", ".zst")
# Before the key of a layer that is called as X or raw are.
LAYER_PREFIX = "layers/"
FORMATS = ".h5ad, .zarr, .loom, 10x .h5, a 10x folder or .mtx file, .csv or .tsv (also gzipped)"


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


def input_files(path: str | Path) -> list[Path]:
    """All files that `open_cells` reads for a path, sorted: a folder's, and what lies beside a `.mtx` file.

    Raises
    ------
    FileNotFoundError
        If there is nothing at the path.
    """
    path = Path(path)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if not path.exists():
        raise FileNotFoundError(f"Cells are read from a file or a folder, got nothing at {path}. Check the path.")
    return mtx_files(path) if re.search(r"\.mtx(\.gz)?$", path.name) else [path]


def signature(path: str | Path) -> list:
    """Size in bytes of a file or folder of cells, and a checksum of its files' names, sizes and times of change."""
    stats = [(str(file), stat.st_size, stat.st_mtime_ns) for file in input_files(path) for stat in (file.stat(),)]
    return [sum(size for _, size, _ in stats), hashlib.sha256(json.dumps(stats).encode()).hexdigest()]


def _reader_of(path: Path) -> Callable[..., CellFile]:
    if path.is_dir():
        if any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zattrs")):
            return read_zarr
        if files_like(path, "matrix.mtx"):
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
    """The file with those of its elements that are matrices of numbers; a note says which layers are not."""
    for key, element in elements.items():
        if element is None or (hasattr(element, "shape") and len(element.shape) != 2):
            continue
        try:
            rows = _rows_of(element, f"{key!r} of {cells.name}")
        except ValueError as error:
            if key in ("X", "raw", *COUNT_LAYERS):
                raise
            cells.notes.append(f"{key!r} is left out: {error}")
        else:
            cells.matrices[key] = Matrix(rows, raw_var if key == "raw" else var)
    return cells


def _read_frame(group, key: str, path: Path) -> pd.DataFrame:
    try:
        return read_elem(group[key])
    except Exception as error:  # AnnData's own have no public name
        raise ValueError(
            f"{path} cannot be read: {one_line(error)}. Update anndata, as the file may be newer than it is, or write "
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
        matrices[_layer_key(key)] = Matrix(SlicedRows(layer, transposed=True), var)
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
