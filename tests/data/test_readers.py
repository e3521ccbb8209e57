"""Cells from every format: the tokens that come out, the matrix that is chosen, and what its values are taken for."""

import errno
import functools
import gzip
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from panfoma_hf import open_cells, read_expression
from panfoma_hf.data import storage, text_readers
from panfoma_hf.data.cells import read_cells
from panfoma_hf.data.readers import anndata_cells
from panfoma_hf.data.storage import CompressedColumns, CompressedRows, SlicedRows, SpilledRows, SpillError, sample_index
from panfoma_hf.data.variable_genes import variable_genes
from panfoma_hf.tokenization import CellTokens, value_scale
from panfoma_hf.tokenization.value_scale import (
    BINARY,
    COUNTS,
    EMPTY,
    FRACTIONAL,
    LOG,
    NORMALIZED,
    NOT_FINITE,
    OVERFLOW,
    SCALED,
    UNEXPLAINED,
)
from tests.conftest import ROOT


RETIRED_SOD2 = "ENSG00000112096"


# -- writing each format ---------------------------------------------------------------------------------------------


@functools.cache
def ensembl_id_of_symbol() -> dict[str, str]:
    table = pd.read_csv(ROOT / "panfoma_hf/tokenization/genes.tsv.gz", sep="\t", comment="#", dtype=str)
    table = table.dropna(subset="ensembl_id")
    return dict(zip(table["symbol"], table["ensembl_id"].str.split("|").str[0], strict=True))


def ensembl_ids(symbols: Sequence[str]) -> list[str]:
    """The Ensembl ids of approved symbols; where there is none, one that no gene has."""
    id_of = ensembl_id_of_symbol()
    return [id_of.get(symbol, f"ENSG99{index:09d}") for index, symbol in enumerate(symbols)]


def write_text(path: Path, text: str) -> Path:
    """Write a text, gzipped if the name says so."""
    path.write_bytes(gzip.compress(text.encode(), 1) if path.suffix == ".gz" else text.encode())
    return path


def write_h5ad(folder: Path, cells: ad.AnnData, compression: str | None = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells.write_h5ad(folder / "cells.h5ad", compression=compression)
    return folder / "cells.h5ad"


def with_matrix(cells: ad.AnnData, matrix) -> ad.AnnData:
    """The same cells and genes with another X."""
    return ad.AnnData(matrix, obs=cells.obs, var=cells.var)


def scaled(cells: ad.AnnData) -> np.ndarray:
    """Each gene centred on its mean, as scanpy's `pp.scale` leaves it."""
    dense = np.log1p(cells.X.toarray())
    return (dense - dense.mean(0)) / (dense.std(0) + 1)


def write_with_counts_in_raw(folder: Path, cells: ad.AnnData) -> Path:
    variable = cells[:, ::40]
    adata = with_matrix(variable, scaled(variable))
    adata.raw = cells
    return write_h5ad(folder, adata)


def write_with_counts_in_a_layer(folder: Path, cells: ad.AnnData) -> Path:
    adata = with_matrix(cells, scaled(cells))
    adata.layers["counts"] = cells.X
    return write_h5ad(folder, adata)


def write_zarr(folder: Path, cells: ad.AnnData, matrix_format: Callable = sp.csr_matrix) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_matrix(cells, matrix_format(cells.X)).write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def write_loom(folder: Path, cells: ad.AnnData) -> Path:
    """A loom file after the specification 3.0.0: genes in rows."""
    with h5py.File(folder / "cells.loom", "w") as file:
        file["attrs/LOOM_SPEC_VERSION"] = "3.0.0"
        matrix = cells.X.toarray().T
        chunks = tuple(min(64, size) for size in matrix.shape)
        file.create_dataset("matrix", data=matrix, chunks=chunks, compression="gzip", compression_opts=1)
        file.create_dataset("layers/spliced", data=np.floor(matrix / 2), compression="gzip", compression_opts=1)
        file["row_attrs/Gene"] = cells.var_names.to_numpy().astype(object)
        file["col_attrs/CellID"] = cells.obs_names.to_numpy().astype(object)
        for name in cells.obs:
            file[f"col_attrs/{name}"] = cells.obs[name].astype(str).to_numpy().astype(object)
        for name in ("row_graphs", "col_graphs"):
            file.create_group(name)
    return folder / "cells.loom"


def write_10x_h5(folder: Path, cells: ad.AnnData, version: int = 3, feature_types: Sequence[str] | None = None) -> Path:
    """Cell Ranger's file: (genes, cells) in columns, genome by genome before version 3."""
    names, ids = cells.var_names.to_numpy().astype("S"), np.array(ensembl_ids(cells.var_names), dtype="S")
    types = ["Gene Expression"] * cells.n_vars if feature_types is None else feature_types
    columns = cells.X.T.tocsc()
    with h5py.File(folder / "filtered.h5", "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["barcodes"] = cells.obs_names.to_numpy().astype("S")
        group["data"], group["indices"] = columns.data.astype(np.int32), columns.indices.astype(np.int64)
        group["indptr"], group["shape"] = columns.indptr.astype(np.int64), np.array(columns.shape, dtype=np.int32)
        if version == 3:
            features = {"id": ids, "name": names, "feature_type": np.array(types, dtype="S")}
            for name, values in {**features, "genome": np.full(cells.n_vars, b"GRCh38")}.items():
                group[f"features/{name}"] = values
        else:
            group["genes"], group["gene_names"] = ids, names
    return folder / "filtered.h5"


def in_order_of(order: str, cells: ad.AnnData) -> sp.coo_matrix:
    """The entries sorted by cell, by gene, or not at all."""
    entries = (cells.X if order == "cell" else cells.X.tocsc()).tocoo()
    if order == "shuffled":
        shuffle = np.random.default_rng(0).permutation(entries.nnz)
        entries = sp.coo_matrix((entries.data[shuffle], (entries.row[shuffle], entries.col[shuffle])), entries.shape)
    return entries


def mtx_text(entries: sp.coo_matrix, shape: Sequence[int] | None = None, num_entries: int | None = None) -> str:
    """A (cells, genes) matrix as 10x writes it: genes in rows, counted from 1. Its header may be made to lie."""
    height, width = entries.shape[::-1] if shape is None else shape
    lines = pd.DataFrame({"gene": entries.col + 1, "cell": entries.row + 1, "count": entries.data.astype(np.int64)})
    return (
        "%%MatrixMarket matrix coordinate integer general\n"
        '%metadata_json: {"software_version": "cellranger-7.1.0", "format_version": 2}\n'
        f"{height} {width} {entries.nnz if num_entries is None else num_entries}\n"
        f"{lines.to_csv(sep=' ', header=False, index=False)}"
    )


def write_mtx_folder(
    folder: Path,
    cells: ad.AnnData,
    *,
    version: int = 3,
    order: str = "cell",
    prefix: str = "",
    feature_types: Sequence[str] | None = None,
    text: str | None = None,
) -> Path:
    """A folder of Cell Ranger 2 or 3; ``text`` takes the place of the matrix."""
    packed = ".gz" if version == 3 else ""
    columns = [ensembl_ids(cells.var_names), cells.var_names]
    if version == 3:
        columns.append(["Gene Expression"] * cells.n_vars if feature_types is None else feature_types)
    lines = ["\t".join(fields) + "\n" for fields in zip(*columns, strict=True)]
    write_text(folder / f"{prefix}{'features' if version == 3 else 'genes'}.tsv{packed}", "".join(lines))
    write_text(folder / f"{prefix}barcodes.tsv{packed}", "".join(f"{name}\n" for name in cells.obs_names))
    text = mtx_text(in_order_of(order, cells)) if text is None else text
    write_text(folder / f"{prefix}matrix.mtx{packed}", text)
    return folder


def write_mtx_of_geo(folder: Path, cells: ad.AnnData) -> Path:
    write_mtx_folder(folder, cells, prefix="GSM1_")
    write_mtx_folder(folder, cells[:5, :50].copy(), prefix="GSM2_")
    return folder / "GSM1_matrix.mtx.gz"


def write_table(
    folder: Path,
    cells: ad.AnnData,
    *,
    name: str = "cells.csv",
    genes_in_rows: bool = False,
    separator: str = ",",
    quote: str = "",
    corner: bool = True,
    comments: str = "",
    line_end: str = "\n",
    row_names: Sequence[str] | None = None,
    described: dict[str, Sequence[str]] | None = None,
) -> Path:
    """A table in text; ``described`` are columns of text beside the names of the rows, which R writes no name for."""
    matrix = cells.X.toarray().astype(np.int64)
    rows, columns = cells.obs_names, cells.var_names
    if genes_in_rows:
        matrix, rows, columns = matrix.T, columns, rows
    described = described or {}
    labels = zip(rows if row_names is None else row_names, *described.values(), strict=True)
    header = [*([""] if corner else []), *described, *columns]
    lines = [[f"{quote}{field}{quote}" for field in fields] for fields in [header, *labels]]
    lines[1:] = [fields + list(map(str, row)) for fields, row in zip(lines[1:], matrix.tolist(), strict=True)]
    return write_text(folder / name, comments + "".join(separator.join(fields) + line_end for fields in lines))


def write_table_of_described_cells(folder: Path, cells: ad.AnnData) -> Path:
    return write_table(folder, cells, described={"cell_type": list(cells.obs["cell_type"])})


def write_table_of_ids_beside_names(folder: Path, cells: ad.AnnData) -> Path:
    ids = ensembl_ids(cells.var_names)
    return write_table(folder, cells, genes_in_rows=True, row_names=ids, described={"gene_name": list(cells.var_names)})


# -- every format gives the same tokens --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """How a file is written, and what is to be said of it.

    Parameters
    ----------
    write
        Writes cells into a folder and returns the path to open.
    name
        The format as `CellFile` calls it.
    source
        Where the counts are found.
    keeps_obs
        Whether the cells' types come back.
    is_spilled
        Whether the entries need to be brought into the order of cells.
    every
        Which genes are written: 1 is all of them.
    """

    write: Callable[[Path, ad.AnnData], Path]
    name: str
    source: str = "X"
    keeps_obs: bool = False
    is_spilled: bool = False
    every: int = 1


def h5ad_format(convert: Callable, compression: str | None = None, **facts) -> Format:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        return write_h5ad(folder, with_matrix(cells, convert(cells.X)), compression)

    return Format(write, "h5ad", keeps_obs=True, **facts)


def mtx_format(version: int, order: str, every: int = 1) -> Format:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        return write_mtx_folder(folder, cells, version=version, order=order)

    return Format(write, "10x mtx", is_spilled=True, every=every)


def table_format(every: int = 16, **options) -> Format:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        return write_table(folder, cells, **options)

    return Format(write, "table", is_spilled=True, every=every)


FORMATS = {
    "h5ad_csr": h5ad_format(sp.csr_matrix),
    "h5ad_csr_array": h5ad_format(sp.csr_array, every=4),
    "h5ad_csc": h5ad_format(sp.csc_matrix, is_spilled=True),
    "h5ad_dense": h5ad_format(lambda matrix: matrix.toarray(), "gzip"),
    "h5ad_raw": Format(write_with_counts_in_raw, "h5ad", source="raw.X", keeps_obs=True),
    "h5ad_layer": Format(write_with_counts_in_a_layer, "h5ad", source="layers['counts']", keeps_obs=True),
    "zarr_csr": Format(write_zarr, "zarr", keeps_obs=True),
    "zarr_csc": Format(
        lambda folder, cells: write_zarr(folder, cells, sp.csc_matrix), "zarr", keeps_obs=True, is_spilled=True, every=4
    ),
    "zarr_dense": Format(
        lambda folder, cells: write_zarr(folder, cells, lambda matrix: matrix.toarray()),
        "zarr",
        keeps_obs=True,
        every=4,
    ),
    "loom": Format(write_loom, "loom", keeps_obs=True),
    "10x_h5_v3": Format(write_10x_h5, "10x h5 v3"),
    "10x_h5_v2": Format(lambda folder, cells: write_10x_h5(folder, cells, version=2), "10x h5 v2", every=4),
    "mtx_v2_by_cell": mtx_format(2, "cell"),
    "mtx_v2_by_gene": mtx_format(2, "gene", every=4),
    "mtx_v2_shuffled": mtx_format(2, "shuffled", every=4),
    "mtx_v3_by_cell": mtx_format(3, "cell", every=4),
    "mtx_v3_by_gene": mtx_format(3, "gene"),
    "mtx_v3_shuffled": mtx_format(3, "shuffled", every=4),
    "mtx_of_geo": Format(write_mtx_of_geo, "10x mtx", is_spilled=True, every=4),
    "csv_cells_in_rows": table_format(every=1),
    "csv_genes_in_rows": table_format(every=1, genes_in_rows=True),
    "csv_gzipped": table_format(name="cells.csv.gz", genes_in_rows=True),
    "csv_gzipped_cells_in_rows": table_format(name="cells.csv.gz"),
    "tsv_cells_in_rows": table_format(name="cells.tsv", separator="\t"),
    "tsv_genes_in_rows": table_format(name="cells.tsv", separator="\t", genes_in_rows=True),
    "txt_gzipped": table_format(name="GSM1_counts.txt.gz", separator="\t", genes_in_rows=True),
    "csv_semicolons": table_format(separator=";"),
    "csv_quoted": table_format(quote='"'),
    "csv_quoted_genes_in_rows": table_format(quote='"', genes_in_rows=True),
    "csv_of_r_cells_in_rows": table_format(quote='"', corner=False),
    "tsv_of_r_genes_in_rows": table_format(name="c.tsv", separator="\t", quote='"', corner=False, genes_in_rows=True),
    "csv_with_comments": table_format(comments="# GSE84133, donor 1\n# counts, of UMIs; 97 cells\n"),
    "csv_with_a_byte_order_mark": table_format(comments="\ufeff", genes_in_rows=True),
    "csv_of_windows": table_format(line_end="\r\n"),
    "tsv_of_windows_genes_in_rows": table_format(name="c.tsv", separator="\t", line_end="\r\n", genes_in_rows=True),
    "csv_with_empty_lines": table_format(line_end="\n\n"),
    "csv_of_described_cells": Format(
        write_table_of_described_cells, "table", keeps_obs=True, is_spilled=True, every=16
    ),
    "csv_of_ids_beside_names": Format(write_table_of_ids_beside_names, "table", is_spilled=True, every=16),
}


@dataclass(frozen=True)
class Written:
    """A file, the cells that were written to it, and their tokens."""

    path: Path
    cells: ad.AnnData
    tokens: CellTokens


@pytest.fixture(scope="module")
def written(baron, tokenizer, tmp_path_factory) -> Callable[[str], Written]:
    """Each format of `FORMATS` by its key, written once."""
    files, subsets = {}, {}

    def write(key: str) -> Written:
        every = FORMATS[key].every
        if every not in subsets:
            cells = baron[:, ::every].copy()
            subsets[every] = cells, tokenizer.tokenize_cells(cells.X, cells.var_names)
        if key not in files:
            files[key] = FORMATS[key].write(tmp_path_factory.mktemp(key), subsets[every][0])
        return Written(files[key], *subsets[every])

    return write


def read_tokens(expression, tokenizer) -> CellTokens:
    return CellTokens.concatenate(list(expression.tokens(tokenizer)))


def assert_same_tokens(tokens: CellTokens, expected: CellTokens) -> None:
    assert np.array_equal(tokens.indptr, expected.indptr)
    assert np.array_equal(tokens.input_ids, expected.input_ids)
    assert np.array_equal(tokens.expression_bins, expected.expression_bins)


@pytest.mark.parametrize("key", FORMATS)
def test_a_format_gives_back_what_was_written(key, written, tokenizer):
    file, facts = written(key), FORMATS[key]
    with open_cells(file.path, tokenizer) as cells:
        expression = read_expression(cells, tokenizer)
        assert_same_tokens(read_tokens(expression, tokenizer), file.tokens)
        assert (cells.format, expression.source, expression.scale.kind) == (facts.name, facts.source, COUNTS)
        assert cells.name == str(file.path) or Path(cells.name).parent == file.path
        assert list(cells.obs.index) == list(file.cells.obs_names)
        assert len(expression) == file.cells.n_obs
        if facts.keeps_obs:
            assert list(cells.obs["cell_type"]) == list(file.cells.obs["cell_type"])


def small_pieces(monkeypatch, num_entries: int) -> None:
    """Hold so few entries at a time."""
    monkeypatch.setattr(storage, "CHUNK_ENTRIES", num_entries)
    monkeypatch.setattr(storage, "BLOCK_ENTRIES", num_entries)
    monkeypatch.setattr(text_readers, "BLOCK_ENTRIES", num_entries)


def spilled(rows) -> SpilledRows | None:
    """The rows that lie in a temporary file, if they do."""
    rows = getattr(rows, "_rows", rows)
    return rows if isinstance(rows, SpilledRows) else None


@pytest.mark.parametrize("key", FORMATS)
def test_small_chunks_and_blocks_give_the_same_tokens(key, written, tokenizer, monkeypatch):
    file, facts = written(key), FORMATS[key]
    small_pieces(monkeypatch, file.cells.X.nnz // 8)
    with open_cells(file.path, tokenizer) as cells:
        expression = read_expression(cells, tokenizer)
        chunks = list(expression.tokens(tokenizer))
        assert len(chunks) == len(expression.rows.bounds()) - 1 >= 8
        assert_same_tokens(CellTokens.concatenate(chunks), file.tokens)
        in_temporary_file = spilled(expression.rows)
        assert (in_temporary_file is not None) == facts.is_spilled
        if facts.is_spilled:
            assert len(in_temporary_file._blocks) >= 8


def test_a_file_is_told_by_what_it_holds_not_by_its_name(written, tokenizer, tmp_path):
    file = written("10x_h5_v3")
    (tmp_path / "cells.h5ad").symlink_to(file.path)
    with open_cells(tmp_path / "cells.h5ad", tokenizer) as cells:
        assert cells.format == "10x h5 v3"
        assert_same_tokens(read_tokens(read_expression(cells, tokenizer), tokenizer), file.tokens)


def test_quoted_text_in_a_table_may_hold_its_separator(written, tokenizer, tmp_path):
    file = written("csv_quoted")
    types = [f"{name}, of the pancreas" for name in file.cells.obs["cell_type"]]
    names = [f"donor 1, {barcode}" for barcode in file.cells.obs_names]
    path = write_table(tmp_path, file.cells, quote='"', row_names=names, described={"cell_type": types})
    with open_cells(path, tokenizer) as cells:
        assert_same_tokens(read_tokens(read_expression(cells, tokenizer), tokenizer), file.tokens)
    assert list(cells.obs.index) == names
    assert list(cells.obs["cell_type"]) == types


@pytest.mark.filterwarnings("ignore::anndata.OldFormatWarning", "ignore:Moving element from:FutureWarning")
def test_an_h5ad_of_an_old_anndata_is_read_from_its_raw(tokenizer):
    folder = importlib.util.find_spec("scanpy").submodule_search_locations[0]
    path = Path(folder, "datasets", "10x_pbmc68k_reduced.h5ad")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pbmc = ad.read_h5ad(path)
    with open_cells(path, tokenizer) as cells:
        expression = read_expression(cells, tokenizer)
        tokens = read_tokens(expression, tokenizer)
    assert (cells.format, expression.source, expression.scale.kind) == ("h5ad", "raw.X", LOG)
    assert expression.scale.log_base == np.e
    assert list(cells.obs.index) == list(pbmc.obs_names)
    assert list(cells.obs["bulk_labels"]) == list(pbmc.obs["bulk_labels"])
    assert_same_tokens(tokens, tokenizer.tokenize_cells(pbmc.raw.X, pbmc.raw.var_names))


def test_cells_keep_at_most_max_length_genes(written, tokenizer):
    file = written("h5ad_csr")
    with open_cells(file.path, tokenizer) as cells:
        expression = read_expression(cells, tokenizer)
        tokens = CellTokens.concatenate(list(expression.tokens(tokenizer, max_length=100)))
    assert_same_tokens(tokens, tokenizer.tokenize_cells(file.cells.X, file.cells.var_names, max_length=100))
    assert tokens.lengths.max() == 100


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [0, 1, 97, 2048], ids=str)
def test_a_sample_of_few_rows_is_all_of_them(num_rows):
    assert sample_index(num_rows, 2048).tolist() == list(range(num_rows))


@pytest.mark.parametrize("num_rows", [2049, 5_000, 1_000_003], ids=["one_more", "overlapping_twice", "many"])
def test_a_sample_of_many_rows_is_runs_evenly_spaced_from_the_first_to_the_last(num_rows):
    index = sample_index(num_rows, 2048)
    assert (index[0], index[-1]) == (0, num_rows - 1)
    assert (np.diff(index) > 0).all()
    assert len(index) <= 2048
    runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
    assert min(map(len, runs)) >= storage.SAMPLE_RUN
    starts = np.array([run[0] for run in runs])
    if len(starts) > 2:
        assert np.ptp(np.diff(starts)) <= 1 + np.ptp([len(run) for run in runs])
    assert len(index) >= min(2048, num_rows) // 2


@pytest.fixture
def rows_file(tmp_path):
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        yield file


def on_disk(file: h5py.File, matrix) -> list[h5py.Dataset]:
    return [file.create_dataset(name, data=getattr(matrix, name)) for name in ("indptr", "indices", "data")]


def spilled_rows(matrix: sp.csr_matrix) -> SpilledRows:
    """From blocks that share rows: first the even columns of some rows, then the odd ones."""
    is_even = sp.diags_array((np.arange(matrix.shape[1]) % 2 == 0).astype(np.float32))
    even = sp.csr_matrix(matrix @ is_even)
    blocks = [
        (start, part[start:stop]) for part in (even, matrix - even) for start, stop in ((0, 30), (30, 60), (60, 97))
    ]
    return SpilledRows(blocks, matrix.shape)


def backed_rows(file: h5py.File, matrix: sp.csr_matrix) -> SlicedRows:
    ad.io.write_elem(file, "X", matrix)
    return SlicedRows(ad.io.sparse_dataset(file["X"]))


STORAGE = {
    "dense_in_memory": lambda file, matrix: SlicedRows(matrix.toarray()),
    "half_precision_in_memory": lambda file, matrix: SlicedRows(matrix.toarray().astype(np.float16)),
    "csr_in_memory": lambda file, matrix: SlicedRows(matrix),
    "csc_in_memory": lambda file, matrix: SlicedRows(matrix.tocsc()),
    "dense_on_disk": lambda file, matrix: SlicedRows(file.create_dataset("X", data=matrix.toarray())),
    "transposed_on_disk": lambda file, matrix: SlicedRows(file.create_dataset("X", data=matrix.toarray().T), True),
    "backed_by_anndata": backed_rows,
    "csr_on_disk": lambda file, matrix: CompressedRows(*on_disk(file, matrix), matrix.shape),
    "csc_on_disk": lambda file, matrix: CompressedColumns(*on_disk(file, matrix.tocsc()), matrix.shape),
    "spilled": lambda file, matrix: spilled_rows(matrix),
}
INDEXES = {
    "none": np.array([], dtype=np.int64),
    "one": np.array([41]),
    "scattered": np.array([0, 3, 4, 17, 50, 96]),
    "runs": np.r_[5:25, 40:80],
    "all": np.arange(97),
}


@pytest.fixture(scope="module")
def matrix(baron) -> sp.csr_matrix:
    """97 cells x 400 genes, with an empty cell."""
    lines = baron.X[:, ::50][:, :400].tolil()
    lines[50] = 0
    return lines.tocsr()


def same(matrix: sp.csr_matrix, expected: sp.csr_matrix) -> bool:
    return matrix.shape == expected.shape and (matrix != expected).nnz == 0


@pytest.mark.parametrize("store", STORAGE)
def test_rows_however_stored_are_those_of_the_matrix(store, matrix, rows_file, monkeypatch):
    small_pieces(monkeypatch, matrix.nnz // 4)
    with closing(STORAGE[store](rows_file, matrix)) as rows:
        assert rows.shape == matrix.shape
        for index in INDEXES.values():
            assert same(rows.sample(index), matrix[index])
        bounds = rows.bounds()
        assert (bounds[0], bounds[-1]) == (0, 97)
        assert len(bounds) > 4
        assert all(same(rows.read(start, stop), matrix[start:stop]) for start, stop in pairwise(bounds))
        assert same(rows.read(10, 10), matrix[10:10])
        for index in INDEXES.values():
            assert same(rows.sample(index), matrix[index])


def test_columns_on_disk_are_spilled_when_read_whole_and_not_before(matrix, rows_file):
    with closing(CompressedColumns(*on_disk(rows_file, matrix.tocsc()), matrix.shape)) as rows:
        rows.sample(INDEXES["runs"])
        assert spilled(rows) is None
        rows.read(0, 3)
        assert spilled(rows) is not None


def test_a_chunk_holds_no_more_entries_than_allowed_or_one_row(matrix, rows_file, monkeypatch):
    limit = 60
    small_pieces(monkeypatch, limit)
    sizes = np.diff(matrix.indptr)
    bounds = CompressedRows(*on_disk(rows_file, matrix), matrix.shape).bounds()
    assert sizes.max() > limit > sizes.min()
    for start, stop in pairwise(bounds):
        assert stop - start == 1 or sizes[start:stop].sum() <= limit


# -- which matrix is read ----------------------------------------------------------------------------------------------


def per_cell(matrix: sp.csr_matrix, total: float) -> sp.csr_matrix:
    """Counts scaled to the same total in each cell."""
    return sp.csr_matrix(sp.diags(total / matrix.sum(1).A1) @ matrix)


def logarithm(matrix: sp.csr_matrix) -> sp.csr_matrix:
    return matrix.log1p()


@pytest.fixture(scope="module")
def pancreas(baron) -> ad.AnnData:
    """97 cells x 1,500 genes that they express, counts."""
    expressed = np.argsort(-np.asarray(baron.X.sum(0)).ravel(), kind="stable")[:1500]
    cells = baron[:, np.sort(expressed)].copy()
    return cells[np.asarray(cells.X.sum(1)).ravel() > 0].copy()


@pytest.fixture(scope="module")
def kinds(pancreas) -> dict[str, object]:
    """The counts of `pancreas`, and what people make of them."""
    cpm = per_cell(pancreas.X, 1e6)
    return {"counts": pancreas.X, "cpm": cpm, "log": logarithm(per_cell(pancreas.X, 1e4)), "scaled": scaled(pancreas)}


CHOICES = [
    pytest.param({"counts": "counts", "raw": "counts", "X": "counts"}, "layers['counts']", id="layer_of_counts_first"),
    pytest.param({"raw": "counts", "X": "counts", "other": "counts"}, "raw.X", id="raw_before_X"),
    pytest.param({"X": "counts", "other": "counts"}, "X", id="X_before_other_layers"),
    pytest.param({"X": "scaled", "spliced": "counts"}, "layers['spliced']", id="counts_in_another_layer"),
    pytest.param({"X": "log", "raw": "log", "umis": "counts"}, "layers['umis']", id="counts_before_logarithms"),
    pytest.param({"X": "log", "counts": "counts"}, "layers['counts']", id="logarithms_in_X_counts_beside"),
    pytest.param({"X": "counts", "log": "log"}, "X", id="counts_in_X_logarithms_beside"),
    pytest.param({"X": "counts", "counts": "log"}, "X", id="a_layer_that_is_called_counts_and_is_not"),
    pytest.param({"X": "scaled", "raw": "log"}, "raw.X", id="scaled_X_and_logarithms_in_raw"),
    pytest.param({"X": "log", "raw": "scaled"}, "X", id="scaled_raw"),
    pytest.param({"X": "log", "cpm": "cpm"}, "X", id="readable_X_before_other_layers"),
    pytest.param({"X": "log", "ambiguous": "counts", "spliced": "counts"}, "X", id="layers_of_velocyto"),
    pytest.param({"X": "scaled", "raw": "log", "counts": "scaled"}, "raw.X", id="nothing_but_raw"),
    pytest.param({"X": "cpm", "Counts": "counts"}, "layers['Counts']", id="layer_of_counts_in_capitals"),
]


def of_matrices(cells: ad.AnnData, matrices: dict[str, object]) -> ad.AnnData:
    """The same cells and genes with these matrices by key."""
    adata = with_matrix(cells, matrices.get("X"))
    if "raw" in matrices:
        adata.raw = with_matrix(cells, matrices["raw"])
    for key in matrices.keys() - {"raw", "X"}:
        adata.layers[key] = matrices[key]
    return adata


@pytest.mark.parametrize(("matrices", "source"), CHOICES)
def test_the_best_matrix_is_read(matrices, source, pancreas, kinds, tokenizer):
    adata = of_matrices(pancreas, {key: kinds[kind] for key, kind in matrices.items()})
    expression = read_expression(anndata_cells(adata), tokenizer)
    assert expression.source == source
    # Counts times a factor, and logarithms of them, rank the genes of a cell alike.
    expected = tokenizer.tokenize_cells(pancreas.X, pancreas.var_names)
    tokens = read_tokens(expression, tokenizer)
    if expression.scale.kind == COUNTS:
        assert_same_tokens(tokens, expected)
    else:
        assert np.array_equal(tokens.input_ids, expected.input_ids)


@pytest.mark.parametrize(
    ("layer", "source", "kind"),
    [
        pytest.param("X", "X", LOG, id="X"),
        pytest.param("raw", "raw.X", COUNTS, id="raw"),
        pytest.param("cpm", "layers['cpm']", NORMALIZED, id="layer"),
    ],
)
def test_a_named_matrix_is_read_whatever_the_others_are(layer, source, kind, pancreas, kinds, tokenizer, tmp_path):
    stored = {"X": kinds["log"], "raw": kinds["counts"], "cpm": kinds["cpm"], "counts": kinds["counts"]}
    path = write_h5ad(tmp_path, of_matrices(pancreas, stored))
    with open_cells(path, tokenizer) as cells:
        expression = read_expression(cells, tokenizer, layer=layer)
        assert_same_tokens(
            read_tokens(expression, tokenizer), tokenizer.tokenize_cells(stored[layer], pancreas.var_names)
        )
    assert (expression.source, expression.scale.kind) == (source, kind)
    assert expression.layer == layer


def test_a_matrix_that_is_not_there_is_an_error_that_lists_those_that_are(pancreas, tokenizer):
    with pytest.raises(ValueError, match=r"got 'spliced'; the AnnData has \['X'\]"):
        read_expression(anndata_cells(pancreas), tokenizer, layer="spliced")


# -- what the values are -----------------------------------------------------------------------------------------------


def tpm(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Counts per length of each gene, to the same total in each cell."""
    lengths = np.exp(np.random.default_rng(0).normal(7.5, 0.8, counts.shape[1]))
    return per_cell(sp.csr_matrix(counts @ sp.diags(1 / lengths)), 1e6)


def with_values(matrix: sp.csr_matrix, change: Callable[[np.ndarray], np.ndarray]) -> sp.csr_matrix:
    changed = matrix.copy()
    changed.data = change(matrix.data.astype(np.float64))
    return changed


def with_fractions(values: np.ndarray) -> np.ndarray:
    """What RSEM makes of a fifth of the counts: reads that fit several genes are shared among them."""
    rng = np.random.default_rng(0)
    return values + (rng.random(len(values)) < 0.2) * np.round(rng.random(len(values)), 2)


def one_is(value: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda values: np.append(values[:-1], value)


def noise(values: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.001, 1, len(values))


def min_max_scaled(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Each gene's logarithms divided by their highest."""
    logs = logarithm(per_cell(counts, 1e4))
    return sp.csr_matrix(logs @ sp.diags(1 / logs.max(0).toarray().ravel()))


def log2(matrix: sp.csr_matrix) -> sp.csr_matrix:
    return with_values(matrix, lambda values: np.log2(1 + values))


SCALES = {
    "counts": (lambda counts: counts, COUNTS, None),
    "counts_as_integers": (lambda counts: counts.astype(np.int64), COUNTS, None),
    "cpm": (lambda counts: per_cell(counts, 1e6), NORMALIZED, None),
    "cpm_in_float32": (lambda counts: per_cell(counts, 1e6).astype(np.float32), NORMALIZED, None),
    "per_median": (lambda counts: per_cell(counts, 5432.5), NORMALIZED, None),
    "log1p": (lambda counts: logarithm(per_cell(counts, 1e4)), LOG, np.e),
    "log1p_in_float32": (lambda counts: logarithm(per_cell(counts, 1e4)).astype(np.float32), LOG, np.e),
    "log1p_with_three_decimals": (
        lambda counts: with_values(logarithm(per_cell(counts, 1e4)), lambda values: values.round(3)),
        LOG,
        np.e,
    ),
    "log1p_of_cpm": (lambda counts: logarithm(per_cell(counts, 1e6)), LOG, np.e),
    "log1p_of_counts": (logarithm, LOG, np.e),
    "log2_of_cpm": (lambda counts: log2(per_cell(counts, 1e6)), LOG, 2.0),
    "log10_of_cpm": (
        lambda counts: with_values(per_cell(counts, 1e6), lambda values: np.log10(1 + values)),
        LOG,
        10.0,
    ),
    "square_roots": (np.sqrt, NORMALIZED, None),
    "square_roots_of_cpm": (lambda counts: np.sqrt(per_cell(counts, 1e6)), NORMALIZED, None),
    "tpm": (tpm, NORMALIZED, None),
    "log1p_of_tpm": (lambda counts: logarithm(tpm(counts)), LOG, np.e),
    "log2_of_tpm": (lambda counts: log2(tpm(counts)), LOG, 2.0),
    "rsem": (lambda counts: with_values(counts, with_fractions), FRACTIONAL, None),
    "scaled": (lambda counts: sp.csr_matrix(scaled(ad.AnnData(counts))), SCALED, None),
    "one_negative": (lambda counts: with_values(counts, one_is(-1)), SCALED, None),
    "one_nan": (lambda counts: with_values(counts, one_is(np.nan)), NOT_FINITE, None),
    "one_infinite": (lambda counts: with_values(counts, one_is(np.inf)), NOT_FINITE, None),
    "binary": (lambda counts: (counts > 0).astype(np.float32), BINARY, None),
    "uniform_noise": (lambda counts: with_values(counts, noise), UNEXPLAINED, None),
    "min_max_scaled": (min_max_scaled, UNEXPLAINED, None),
    "all_zero": (lambda counts: counts * 0, EMPTY, None),
    "wrapped_furthest": (lambda counts: with_values(counts, one_is(-(2**31))), OVERFLOW, None),
    "wrapped": (lambda counts: with_values(counts, one_is(-(2**31) + 5)), OVERFLOW, None),
    "two_to_the_31": (lambda counts: with_values(counts, one_is(2**31)), OVERFLOW, None),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_is_told_by_the_values(name, pancreas):
    make, kind, log_base = SCALES[name]
    matrix = make(pancreas.X.astype(np.float64))
    scale = value_scale(matrix.indptr, matrix.data)
    assert (scale.kind, scale.log_base) == (kind, log_base), scale


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_is_told_by_a_few_cells_too(name, pancreas):
    make, kind, log_base = SCALES[name]
    matrix = make(pancreas.X.astype(np.float64))[-12:]
    scale = value_scale(matrix.indptr, matrix.data)
    assert (scale.kind, scale.log_base) == (kind, log_base), scale


# -- genes -------------------------------------------------------------------------------------------------------------


def with_antibodies(cells: ad.AnnData) -> tuple[ad.AnnData, list[str]]:
    """The cells with antibodies of a gene's own name and of others, counted far more often than any gene."""
    names = ["INS", "CD3_TotalSeqB", "anti-CD19", "hashtag1"]
    antibodies = sp.csr_matrix(np.random.default_rng(0).integers(500, 5000, (cells.n_obs, len(names))))
    var = pd.DataFrame(index=[*cells.var_names, *names])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = ad.AnnData(sp.hstack([cells.X, antibodies], format="csr"), obs=cells.obs, var=var)
    return adata, ["Gene Expression"] * cells.n_vars + ["Antibody Capture"] * len(names)


@pytest.mark.parametrize("write", [write_10x_h5, write_mtx_folder], ids=["h5", "mtx"])
def test_antibodies_are_no_genes_and_do_not_count_as_expression(write, pancreas, tokenizer, tmp_path):
    assert "INS" in pancreas.var_names
    adata, feature_types = with_antibodies(pancreas)
    with open_cells(write(tmp_path, adata, feature_types=feature_types), tokenizer) as cells:
        expression = read_expression(cells, tokenizer)
        tokens = read_tokens(expression, tokenizer)
    alone = read_expression(anndata_cells(pancreas), tokenizer)
    assert_same_tokens(tokens, read_tokens(alone, tokenizer))
    assert expression.resolution.coverage == alone.resolution.coverage > 0.9
    assert expression.resolution.num_resolved == alone.resolution.num_resolved
    assert (expression.resolution.token_ids[-4:] == -1).all()


def named(cells: ad.AnnData, index: Sequence[str], **columns: Sequence[str]) -> ad.AnnData:
    return ad.AnnData(cells.X, obs=cells.obs, var=pd.DataFrame(columns, index=list(index)))


@pytest.mark.parametrize("column", ["gene_symbols", "feature_name", "gene_name", "Symbol"])
def test_a_second_column_of_names_finds_what_the_first_does_not_know(column, pancreas, tokenizer, tmp_path):
    symbols = list(pancreas.var_names)
    is_sod2 = symbols.index("SOD2")
    ids = ensembl_ids(symbols)
    ids[is_sod2] = RETIRED_SOD2
    adata = named(pancreas, ids, **{column: symbols})
    with open_cells(write_h5ad(tmp_path, adata), tokenizer) as cells:
        expression = read_expression(cells, tokenizer)
        assert_same_tokens(read_tokens(expression, tokenizer), tokenizer.tokenize_cells(pancreas.X, symbols))
    assert expression.resolution.symbols[is_sod2] == "SOD2"


def test_without_a_second_column_a_retired_id_is_no_gene(pancreas, tokenizer):
    symbols = list(pancreas.var_names)
    ids = ensembl_ids(symbols)
    ids[symbols.index("SOD2")] = RETIRED_SOD2
    expression = read_expression(anndata_cells(named(pancreas, ids)), tokenizer)
    assert expression.resolution.token_ids[symbols.index("SOD2")] == -1


def test_ids_beside_symbols_find_a_gene_of_an_unknown_name(pancreas, tokenizer, tmp_path):
    approved = pancreas[:, np.array(ensembl_ids(pancreas.var_names)) < "ENSG9"].copy()
    symbols, ids = list(approved.var_names), ensembl_ids(approved.var_names)
    renamed = approved.copy()
    renamed.var_names = ["my_gene" if symbol == "INS" else symbol for symbol in symbols]
    write_mtx_folder(tmp_path, renamed)
    lines = [f"{id}\t{name}\tGene Expression\n" for id, name in zip(ids, renamed.var_names, strict=True)]
    write_text(tmp_path / "features.tsv.gz", "".join(lines))
    with open_cells(tmp_path, tokenizer) as cells:
        expression = read_expression(cells, tokenizer)
        assert_same_tokens(read_tokens(expression, tokenizer), tokenizer.tokenize_cells(approved.X, symbols))


def test_a_named_column_alone_names_the_genes(pancreas, tokenizer):
    symbols = list(pancreas.var_names)
    adata = named(pancreas, [f"row{index}" for index in range(len(symbols))], mine=symbols)
    expression = read_expression(anndata_cells(adata), tokenizer, gene_column="mine")
    assert_same_tokens(read_tokens(expression, tokenizer), tokenizer.tokenize_cells(pancreas.X, symbols))
    with pytest.raises(ValueError, match="column of var, got 'theirs'"):
        read_expression(anndata_cells(adata), tokenizer, gene_column="theirs")


# -- temporary files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def temporary_folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def open_files_of(folder: Path) -> list[str]:
    """Files of a folder that this process holds open, also those without a name."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link) and os.readlink(link).startswith(str(folder))]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux to see files without a name")
@pytest.mark.parametrize("key", ["zarr_csc", "mtx_v2_by_gene", "csv_gzipped"])
def test_nothing_is_left_in_the_temporary_folder(key, written, tokenizer, temporary_folder):
    path = written(key).path
    with open_cells(path, tokenizer) as cells:
        expression = read_expression(cells, tokenizer)
        read_tokens(expression, tokenizer)
        assert len(open_files_of(temporary_folder)) == 1
    assert open_files_of(temporary_folder) == []
    assert list(temporary_folder.iterdir()) == []


class FullDisk:
    """A temporary file on a disk without room."""

    def __init__(self, **options):
        pass

    def seek(self, *position) -> int:
        return 0

    def write(self, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("key", ["h5ad_csc", "mtx_v2_by_gene", "mtx_v3_by_cell", "csv_gzipped"])
def test_a_full_temporary_folder_is_an_error_that_names_tmpdir(key, written, tokenizer, monkeypatch):
    path = written(key).path
    monkeypatch.setattr(storage.tempfile, "TemporaryFile", FullDisk)

    def read():
        with open_cells(path, tokenizer) as cells:
            read_tokens(read_expression(cells, tokenizer), tokenizer)

    with pytest.raises(SpillError, match=r"No space left on device.*Make room in .*TMPDIR") as caught:
        read()
    assert not isinstance(caught.value, ValueError)


# -- what real files do besides ----------------------------------------------------------------------------------------


def tokens_read(path, tokenizer, **options):
    with open_cells(path, tokenizer) as cells:
        expression = read_expression(cells, tokenizer, **options)
        return CellTokens.concatenate(list(expression.tokens(tokenizer))), expression


def test_row_numbers_as_index_are_no_ids_where_names_stand_beside(baron, tokenizer, tmp_path):
    rows = np.sort(np.random.default_rng(0).choice(36_000, 1000, replace=False))
    cells = baron[:, :1000].copy()
    cells.var["feature_name"] = cells.var_names.to_numpy()
    expected = tokenizer.resolve_genes(cells.var_names)
    cells.var_names = rows.astype(str)
    cells.write_h5ad(tmp_path / "census.h5ad")
    _, expression = tokens_read(tmp_path / "census.h5ad", tokenizer, min_coverage=0)
    assert np.array_equal(expression.resolution.token_ids, expected.token_ids)


def test_missing_symbols_are_filled_from_ids(tokenizer, tmp_path):
    var = pd.DataFrame(
        {"gene_ids": ["ENSG00000153563", "ENSG00000167286", "ENSG00000090382"]}, index=["NA", "NA.1", "LYZ"]
    )
    ad.AnnData(sp.csr_matrix([[3.0, 5, 2]]), var=var).write_h5ad(tmp_path / "cells.h5ad")
    _, expression = tokens_read(tmp_path / "cells.h5ad", tokenizer)
    assert expression.resolution.symbols.tolist() == ["CD8A", "CD3D", "LYZ"]


@pytest.mark.parametrize("key", ["raw", "X"])
def test_a_layer_called_as_another_matrix_is_told_from_it(key, adata, tokenizer, tmp_path):
    adata.layers[key] = adata.X.copy()
    adata.X = adata.X.toarray() - 1
    adata.write_h5ad(tmp_path / "cells.h5ad")
    _, expression = tokens_read(tmp_path / "cells.h5ad", tokenizer)
    assert expression.source == f"layers['{key}']"
    assert len(variable_genes(adata, 5, tokenizer, layer=expression.layer)) == 5


def test_obs_may_have_a_column_of_barcodes(adata, tokenizer, tmp_path):
    adata.obs["barcodes"] = adata.obs_names
    adata.write_h5ad(tmp_path / "cells.h5ad")
    tokens, _ = tokens_read(tmp_path / "cells.h5ad", tokenizer)
    assert len(tokens) == 48


def test_a_layer_of_no_numbers_is_left_out_and_said(adata, tokenizer, tmp_path):
    adata.layers["phases"] = adata.X.astype(np.complex64)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with open_cells(tmp_path / "cells.h5ad", tokenizer) as cells:
        assert list(cells.matrices) == ["X"]
        assert "'phases' is left out" in cells.notes[0]


def test_an_anndata_without_a_matrix_is_an_error(tokenizer):
    with anndata_cells(ad.AnnData(obs=pd.DataFrame(index=["a"]))) as cells:  # noqa: SIM117
        with pytest.raises(ValueError, match="A matrix of expression is needed, got none in the AnnData"):
            read_expression(cells, tokenizer)


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning", "ignore:.*zarr.*:FutureWarning")
def test_a_zipped_zarr_is_read(adata, tokenizer, tmp_path):
    adata.write_zarr(tmp_path / "cells.zarr")
    shutil.make_archive(tmp_path / "cells.zarr", "zip", tmp_path / "cells.zarr")
    tokens, _ = tokens_read(tmp_path / "cells.zarr.zip", tokenizer)
    assert np.array_equal(tokens.input_ids, tokenizer.tokenize_cells(adata.X, adata.var_names).input_ids)
    assert (read_cells(tmp_path / "cells.zarr.zip").X != adata.X).nnz == 0


@pytest.mark.filterwarnings("ignore:Writing zarr v2:UserWarning")
def test_a_zarr_whose_values_are_not_all_there_is_an_error(baron, tokenizer, tmp_path):
    baron.write_zarr(tmp_path / "cells.zarr")
    chunks = [file for file in (tmp_path / "cells.zarr/X/data").rglob("*") if file.name[0].isdigit() and file.is_file()]
    chunks[-1].unlink()
    with pytest.raises(ValueError, match=r"must be whole, got \d+ of \d+ chunks of data in 'X' of .*cells.zarr"):
        tokens_read(tmp_path / "cells.zarr", tokenizer)


def test_names_behind_the_sign_of_a_comment_are_names(tokenizer, tmp_path):
    (tmp_path / "cells.tsv").write_text("# made by hand\n#gene\tc1\tc2\nCD3E\t1\t0\nCD8A\t2\t5\n")
    with open_cells(tmp_path / "cells.tsv", tokenizer) as cells:
        assert cells.obs.index.tolist() == ["c1", "c2"]
        assert cells.matrices["X"].var.index.tolist() == ["CD3E", "CD8A"]
        assert cells.matrices["X"].rows.read(0, 2).toarray().tolist() == [[1, 2], [0, 5]]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(["CD3E\t1\t0", "\t\t", "CD8A\t2\t5"], id="row_of_tabs"),
        pytest.param(["CD3E\t1\t0", '"CD8A\t2\t5', "LYZ\t1\t1"], id="open_quote"),
    ],
)
def test_rows_that_do_not_fit_their_names_are_an_error(lines, tokenizer, tmp_path):
    (tmp_path / "cells.tsv").write_text("\n".join(["gene\tc1\tc2", *lines]) + "\n")
    with pytest.raises(ValueError, match=r"cells\.tsv"):
        tokens_read(tmp_path / "cells.tsv", tokenizer)


def test_chunks_may_be_read_twice_at_a_time(baron, tokenizer, tmp_path, monkeypatch):
    small_pieces(monkeypatch, 5000)
    cells = baron.copy()
    cells.X = cells.X.tocsc()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with open_cells(tmp_path / "cells.h5ad", tokenizer) as file:
        expression = read_expression(file, tokenizer)
        first, second = [], []
        for one, other in zip(expression.chunks(), expression.chunks(), strict=True):
            first.append(one)
            second.append(other)
    for chunks in (first, second):
        assert (sp.vstack(chunks) != baron.X).nnz == 0


def test_a_backed_anndata_in_columns_is_read_as_its_file_is(baron, tokenizer, tmp_path):
    cells = baron.copy()
    cells.X = cells.X.tocsc()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with anndata_cells(backed) as file:
        assert isinstance(file.matrices["X"].rows, CompressedColumns)
        tokens = CellTokens.concatenate(list(read_expression(file, tokenizer).tokens(tokenizer)))
    backed.file.close()
    assert np.array_equal(tokens.input_ids, tokenizer.tokenize_cells(baron.X, baron.var_names).input_ids)


def test_the_tokenizer_and_the_reader_choose_the_same_matrix(adata, tokenizer):
    adata.raw = ad.AnnData(adata.X.log1p()[:, :20], var=adata.var[:20])
    with anndata_cells(adata) as cells:
        expression = read_expression(cells, tokenizer)
        tokens = CellTokens.concatenate(list(expression.tokens(tokenizer)))
    assert expression.source == "X"
    assert np.array_equal(tokens.input_ids, tokenizer.tokenize_cells(adata).input_ids)


def test_a_dense_matrix_is_sampled_by_its_entries(monkeypatch):
    monkeypatch.setattr(storage, "SAMPLE_ENTRIES", 4000)
    rows = SlicedRows(np.ones((500, 40)))
    assert storage.sample_of(rows, 2048).shape == (96, 40)
    assert storage.sample_of(SlicedRows(sp.random(500, 40, 0.01, "csr", rng=0)), 2048).shape == (500, 40)
