"""Files that hold no cells that can be read: each is an error that says the rule, what was got, and what to do."""

import gzip
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import panfoma_hf
from panfoma_hf import open_cells, read_expression
from panfoma_hf.data import cells as cells_module
from panfoma_hf.data.cells import read_cells
from panfoma_hf.tokenization import CellTokens
from tests.data.test_readers import (
    ensembl_ids,
    in_order_of,
    mtx_text,
    named,
    scaled,
    with_matrix,
    write_10x_h5,
    write_h5ad,
    write_loom,
    write_mtx_folder,
    write_table,
    write_text,
    write_zarr,
)


DAMAGED = "[Dd]ownload|write it again|write the file again"
LATE_CELL, LATE_ROW = 40, 80


@pytest.fixture(scope="module")
def cells(baron) -> ad.AnnData:
    """97 real cells x 120 genes that they express most, all with an approved symbol and an Ensembl id; counts."""
    is_known = np.array(ensembl_ids(baron.var_names)) < "ENSG9"
    order = np.argsort(-np.where(is_known, baron.X.sum(0).A1, 0), kind="stable")
    return baron[:, np.sort(order[:120])].copy()


def read(path: Path, tokenizer, layer: str | None = None) -> CellTokens:
    with open_cells(path, tokenizer) as file:
        expression = read_expression(file, tokenizer, layer=layer)
        return CellTokens.concatenate(list(expression.tokens(tokenizer)))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything in a folder, and of the folder itself."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}


def refusal(act: Callable[[], object], folder: Path, error: type[Exception] = ValueError) -> str:
    """What is said when something is refused, which must leave the folder as it was."""
    before = listing(folder)
    with pytest.raises(error) as caught:
        act()
    assert type(caught.value) is error
    assert listing(folder) == before
    return str(caught.value)


@dataclass(frozen=True)
class Bad:
    """A file that cannot be read.

    Parameters
    ----------
    write
        Writes it into a folder, out of good cells, and returns the path to open.
    got
        A pattern of what the error says is wrong.
    remedy
        A pattern of what it says to do.
    """

    write: Callable[[Path, ad.AnnData], Path]
    got: str
    remedy: str = DAMAGED


# -- h5ad --------------------------------------------------------------------------------------------------------------


def truncated_h5ad(share: float) -> Callable:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        path = write_h5ad(folder, cells)
        content = path.read_bytes()
        path.write_bytes(content[: max(100, int(share * len(content)))])
        return path

    return write


def truncated_h5ad_padded_with_zeros(share: float) -> Callable:
    """What is left of a download into a file of the full size that stopped."""

    def write(folder: Path, cells: ad.AnnData) -> Path:
        path = write_h5ad(folder, cells, compression="gzip")
        content = path.read_bytes()
        kept = int(share * len(content))
        path.write_bytes(content[:kept] + bytes(len(content) - kept))
        return path

    return write


def h5ad_whose_data_is_cut(folder: Path, cells: ad.AnnData) -> Path:
    """X comes last in the file; the length in HDF5's first block is that of the cut file, so that it opens."""
    path = write_h5ad(folder, cells)
    with h5py.File(path, "a") as file:
        data = file["X/data"][:]
        del file["X/data"]
        file.create_dataset("X/data", data=data, dtype=np.float64)
    content = bytearray(path.read_bytes()[:-4000])
    content[40:48] = len(content).to_bytes(8, "little")
    path.write_bytes(content)
    with h5py.File(path, "r") as file:
        assert set(file) >= {"X", "obs", "var"}
    return path


def h5ad_whose_chunk_is_garbled(folder: Path, cells: ad.AnnData) -> Path:
    path = write_h5ad(folder, cells, compression="gzip")
    with h5py.File(path, "r") as file:
        chunk = file["X/data"].id.get_chunk_info(0)
    content = bytearray(path.read_bytes())
    middle = chunk.byte_offset + chunk.size // 2
    content[middle : middle + 200] = bytes(200)
    path.write_bytes(content)
    return path


def h5ad_without(*keys: str) -> Callable:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        path = write_h5ad(folder, cells)
        with h5py.File(path, "a") as file:
            for key in keys:
                del file[key]
        return path

    return write


def h5ad_without_x(folder: Path, cells: ad.AnnData) -> Path:
    return write_h5ad(folder, ad.AnnData(obs=cells.obs, var=cells.var))


def h5ad_changed(change: Callable[[h5py.Group], None]) -> Callable:
    """An .h5ad with CSR counts, whose group X is changed."""

    def write(folder: Path, cells: ad.AnnData) -> Path:
        path = write_h5ad(folder, cells)
        with h5py.File(path, "a") as file:
            change(file["X"])
        return path

    return write


def index_too_high(group: h5py.Group) -> None:
    group["indices"][-1] = 120


def index_negative(group: h5py.Group) -> None:
    group["indices"][5] = -1


def offsets_descending(group: h5py.Group) -> None:
    offsets = group["indptr"][:]
    group["indptr"][:] = np.r_[offsets[:10], offsets[20:10:-1], offsets[20:]]


def offsets_too_far(group: h5py.Group) -> None:
    group["indptr"][-1] = group["data"].shape[0] + 1


def shape_of_another_matrix(group: h5py.Group) -> None:
    group.attrs["shape"] = np.array([97, 500])


def unknown_encoding(group: h5py.Group) -> None:
    group.attrs["encoding-type"] = "coo_matrix"


def h5ad_of_a_newer_anndata(folder: Path, cells: ad.AnnData) -> Path:
    """A column is stored in a way that the installed anndata does not know yet."""
    path = write_h5ad(folder, cells)
    with h5py.File(path, "a") as file:
        file["obs/cell_type"].attrs["encoding-type"] = "categorical-of-tomorrow"
    return path


def h5ad_of(make: Callable[[ad.AnnData], ad.AnnData]) -> Callable:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return write_h5ad(folder, make(cells))

    return write


def repeated_barcodes(cells: ad.AnnData) -> ad.AnnData:
    repeated = cells.copy()
    repeated.obs_names = ["AAACCTG-1", "AAACCTG-1", *cells.obs_names[2:]]
    return repeated


def h5ad_of_strings(folder: Path, cells: ad.AnnData) -> Path:
    path = write_h5ad(folder, with_matrix(cells, cells.X.toarray()))
    with h5py.File(path, "a") as file:
        texts = file["X"][:].astype(str).astype(object)
        del file["X"]
        file["X"] = texts
    return path


def mudata(folder: Path, cells: ad.AnnData) -> Path:
    path = write_h5ad(folder, cells)
    with h5py.File(path, "a") as file:
        for key in list(file):
            file.move(key, f"mod/rna/{key}")
        file.create_group("mod/prot")
        for key in ("obs", "var"):
            file.copy(f"mod/rna/{key}", key)
    return path.rename(folder / "cells.h5mu")


def hdf5_of_something_else(folder: Path, cells: ad.AnnData) -> Path:
    with h5py.File(folder / "weights.h5", "w") as file:
        file["layer1/kernel"] = np.zeros((3, 3))
    return folder / "weights.h5"


def h5ad_with_offsets_of(other: Callable[[ad.AnnData], ad.AnnData]) -> Callable:
    """Obs or var of another file beside the matrix."""

    def write(folder: Path, cells: ad.AnnData) -> Path:
        (folder / "other").mkdir()
        source = write_h5ad(folder / "other", other(cells))
        path = write_h5ad(folder, cells)
        with h5py.File(source) as read_from, h5py.File(path, "a") as file:
            for key in ("obs", "var"):
                del file[key]
                read_from.copy(key, file)
        return path

    return write


IN_H5AD = {
    "cut_at_100_bytes": Bad(truncated_h5ad(0), "truncated|cannot be read"),
    "cut_at_a_third": Bad(truncated_h5ad(0.33), "truncated"),
    "cut_at_nine_tenths": Bad(truncated_h5ad(0.9), "truncated"),
    "cut_at_the_last_byte": Bad(truncated_h5ad(0.99999), "truncated"),
    "zeros_after_a_hundredth": Bad(truncated_h5ad_padded_with_zeros(0.01), "cannot be read"),
    "zeros_after_a_third": Bad(truncated_h5ad_padded_with_zeros(0.33), "cannot be read"),
    "zeros_after_nine_tenths": Bad(truncated_h5ad_padded_with_zeros(0.9), "cannot be read"),
    "data_cut": Bad(h5ad_whose_data_is_cut, "cannot be read"),
    "chunk_garbled": Bad(h5ad_whose_chunk_is_garbled, "cannot be read"),
    "no_x": Bad(h5ad_without_x, "neither X, raw nor a layer", "[Ww]rite it"),
    "x_deleted": Bad(h5ad_without("X"), "neither X, raw nor a layer", "[Ww]rite it"),
    "no_obs": Bad(h5ad_without("obs"), "holds obs, var and X, got", "write_h5ad"),
    "no_values": Bad(h5ad_without("X/data"), "data", DAMAGED),
    "no_offsets": Bad(h5ad_without("X/indptr"), "indptr", DAMAGED),
    "index_too_high": Bad(h5ad_changed(index_too_high), r"must be 0 to 119, got \d+ to 120"),
    "index_negative": Bad(h5ad_changed(index_negative), r"must be 0 to 119, got -1 to \d+"),
    "offsets_descending": Bad(h5ad_changed(offsets_descending), "ascending offsets"),
    "offsets_too_far": Bad(h5ad_changed(offsets_too_far), "offsets"),
    "shape_of_another_matrix": Bad(h5ad_changed(shape_of_another_matrix), "97 x 500 .*97 cells and 120 genes"),
    "unknown_encoding": Bad(h5ad_changed(unknown_encoding), "'coo_matrix'", "[Ww]rite it"),
    "newer_anndata": Bad(h5ad_of_a_newer_anndata, "categorical-of-tomorrow", "[Uu]pdate|[Ww]rite it"),
    "fewer_cells_in_obs": Bad(h5ad_with_offsets_of(lambda cells: cells[:50].copy()), "97 x 120 .*50 cells"),
    "fewer_genes_in_var": Bad(h5ad_with_offsets_of(lambda cells: cells[:, :50].copy()), "97 x 120 .*50 genes"),
    "genes_as_cells": Bad(h5ad_of(lambda cells: cells.T.copy()), "gene names for the cells", r"adata\.T"),
    "barcodes_twice": Bad(h5ad_of(repeated_barcodes), "AAACCTG-1", "obs_names_make_unique"),
    "strings": Bad(h5ad_of_strings, "must be numbers, got", "astype|Convert"),
    "no_cells": Bad(h5ad_of(lambda cells: cells[:0].copy()), "[Aa]t least one cell", "Check"),
    "no_genes": Bad(h5ad_of(lambda cells: cells[:, :0].copy()), "[Aa]t least one gene", "Check"),
    "mudata": Bad(mudata, "MuData with prot, rna", r"mdata\['rna'\]"),
    "hdf5_of_something_else": Bad(hdf5_of_something_else, "got layer1", "write_h5ad"),
}


# -- Matrix Market -----------------------------------------------------------------------------------------------------


def mtx_of(make: Callable[[sp.coo_matrix], str], version: int = 3) -> Callable:
    """A folder whose matrix is this text, made of the true entries."""

    def write(folder: Path, cells: ad.AnnData) -> Path:
        return write_mtx_folder(folder, cells, version=version, text=make(in_order_of("cell", cells)))

    return write


def with_entry(row: str, column: str, value: str) -> Callable[[sp.coo_matrix], str]:
    """One more entry at the end, which the header knows of."""

    def make(entries: sp.coo_matrix) -> str:
        return mtx_text(entries, num_entries=entries.nnz + 1) + f"{row} {column} {value}\n"

    return make


def mtx_cut(share: float) -> Callable:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        path = write_mtx_folder(folder, cells) / "matrix.mtx.gz"
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        return path

    return write


def mtx_without(name: str) -> Callable:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        (write_mtx_folder(folder, cells) / name).unlink()
        return folder

    return write


def mtx_in_a_packed_file_that_is_not(folder: Path, cells: ad.AnnData) -> Path:
    path = write_mtx_folder(folder, cells) / "matrix.mtx.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    return path


def mtx_of_another_sample(folder: Path, cells: ad.AnnData) -> Path:
    write_mtx_folder(folder, cells)
    write_text(folder / "barcodes.tsv.gz", "".join(f"cell{index}\n" for index in range(50)))
    return folder


def two_samples(folder: Path, cells: ad.AnnData) -> Path:
    for name in ("GSM1_", "GSM2_"):
        write_mtx_folder(folder, cells, prefix=name)
    return folder


def mtx_with_empty_names(folder: Path, cells: ad.AnnData) -> Path:
    write_mtx_folder(folder, cells)
    write_text(folder / "barcodes.tsv.gz", "")
    return folder


IN_MTX = {
    "too_many_promised": Bad(
        mtx_of(lambda entries: mtx_text(entries, num_entries=entries.nnz + 7)), r"promises [\d,]+ entries, got [\d,]+"
    ),
    "too_few_promised": Bad(
        mtx_of(lambda entries: mtx_text(entries, num_entries=entries.nnz - 7)), r"promises [\d,]+ entries, got [\d,]+"
    ),
    "none_promised": Bad(
        mtx_of(lambda entries: mtx_text(entries, num_entries=0)), r"promises 0 entries, got", "header|download"
    ),
    "another_shape": Bad(
        mtx_of(lambda entries: mtx_text(entries, shape=(119, 97))),
        "119 x 97 .*120 genes and 97 cells",
        "cut off|another",
    ),
    "another_samples_barcodes": Bad(mtx_of_another_sample, "120 x 97 .*120 genes and 50 cells", "cut off|another"),
    "gene_out_of_range": Bad(
        mtx_of(with_entry("121", "3", "1")), r"within its header's 120 x 97, got one at \(121, 3\)", DAMAGED
    ),
    "cell_out_of_range": Bad(
        mtx_of(with_entry("3", "98", "1")), r"within its header's 120 x 97, got one at \(3, 98\)", DAMAGED
    ),
    "counted_from_zero": Bad(
        mtx_of(with_entry("0", "1", "1")), r"within its header's 120 x 97, got one at \(0, 1\)", DAMAGED
    ),
    "far_out_of_range": Bad(mtx_of(with_entry("99999999999999999999", "1", "1")), "too large", "damaged"),
    "fractional_position": Bad(mtx_of(with_entry("1.5", "1", "1")), "position|whole|1.5", DAMAGED),
    "text_among_numbers": Bad(mtx_of(with_entry("3", "1", "many")), "three numbers.*got others", "damaged"),
    "line_of_two_numbers": Bad(mtx_of(with_entry("3", "1", "")), "three numbers.*got others", "damaged"),
    "line_of_four_numbers": Bad(mtx_of(with_entry("3", "1", "1 7")), "cannot be read|three numbers", DAMAGED),
    "beyond_64_bits": Bad(
        mtx_of(with_entry("3", "1", "36893488147419103232")), "too large|more than a cell", "damaged|int64"
    ),
    "beyond_63_bits": Bad(
        mtx_of(with_entry("3", "1", str(2**63 + 1))), "more than a cell can hold", "int64 or float32"
    ),
    "nan": Bad(mtx_of(with_entry("3", "1", "nan")), "nan|NaN|three numbers", "damaged|Remove"),
    "infinity": Bad(mtx_of(with_entry("3", "1", "inf")), "infinite|three numbers", "damaged|Remove"),
    "no_header": Bad(mtx_of(lambda entries: "1 1 5\n" * 20), "starts with '%%MatrixMarket", "[Ww]rite it"),
    "dense_header": Bad(
        mtx_of(lambda entries: "%%MatrixMarket matrix array integer general\n2 1\n1\n2\n"), "array", "[Ww]rite it"
    ),
    "short_header": Bad(
        mtx_of(lambda entries: "%%MatrixMarket matrix coordinate\n120 97 0\n"), "coordinate", "[Ww]rite it"
    ),
    "nothing_but_a_header": Bad(
        mtx_of(lambda entries: "%%MatrixMarket matrix coordinate integer general\n%\n"),
        "within its header|header .*got",
    ),
    "header_without_sizes": Bad(
        mtx_of(lambda entries: "%%MatrixMarket matrix coordinate integer general\n120 97\n1 1 1\n"),
        "header|120 97",
        DAMAGED,
    ),
    "cut_gzip": Bad(mtx_cut(0.5), "cannot be read"),
    "cut_within_the_header": Bad(mtx_cut(0.005), "cannot be read|header|starts with"),
    "not_gzipped": Bad(mtx_in_a_packed_file_that_is_not, "cannot be read"),
    "no_barcodes": Bad(mtx_without("barcodes.tsv.gz"), "names of its cells .*barcodes.tsv", "Put .*barcodes.tsv"),
    "no_features": Bad(mtx_without("features.tsv.gz"), "names of its genes .*features.tsv", "Put .*features.tsv"),
    "empty_barcodes": Bad(mtx_with_empty_names, r"barcodes\.tsv", DAMAGED + "|another|Check"),
    "two_samples": Bad(two_samples, "GSM1_matrix.mtx.gz, GSM2_matrix.mtx.gz", "Name one"),
    "barcodes_twice": Bad(
        lambda folder, cells: write_mtx_folder(folder, repeated_barcodes(cells)), "AAACCTG-1", "before the barcodes"
    ),
    "no_entries": Bad(
        mtx_of(lambda entries: mtx_text(sp.coo_matrix(entries.shape))), "all zero", "Name another matrix|[Ww]rite"
    ),
}


# -- tables ------------------------------------------------------------------------------------------------------------


def table_with(row: int, change: Callable[[str], str], **options) -> Callable:
    """A table of cells in rows in which one line is changed; line 0 names the columns."""

    def write(folder: Path, cells: ad.AnnData) -> Path:
        path = write_table(folder, cells, **options)
        lines = path.read_text().splitlines()
        lines[row] = change(lines[row])
        return write_text(path, "\n".join(lines) + "\n")

    return write


def last_field(text: str) -> Callable[[str], str]:
    return lambda line: line.rpartition(",")[0] + "," + text


def fewer_fields(line: str) -> str:
    return line.rpartition(",")[0]


def more_fields(line: str) -> str:
    return line + ",0"


def table_cut(folder: Path, cells: ad.AnnData) -> Path:
    path = write_table(folder, cells, name="cells.csv.gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def table_without_genes(folder: Path, cells: ad.AnnData) -> Path:
    return write_table(folder, named(cells, [f"feature{index}" for index in range(cells.n_vars)]))


def text_file(name: str, content: str | bytes) -> Callable:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


IN_TABLE = {
    "text_in_an_early_row": Bad(table_with(3, last_field("low")), "text 'low'", "decimal point|take out"),
    "text_in_a_late_row": Bad(table_with(LATE_ROW, last_field("low")), "low", "take out"),
    "missing_in_an_early_row": Bad(table_with(3, last_field("NA")), "NA", "Write 0 for what is missing"),
    "missing_in_a_late_row": Bad(table_with(LATE_ROW, last_field("NA")), "NA", "Write 0 for what is missing"),
    "empty_field": Bad(table_with(LATE_ROW, last_field("")), "must be numbers, got", "Write 0 for what is missing"),
    "nan": Bad(table_with(LATE_ROW, last_field("nan")), "finite, got", "Remove"),
    "infinity": Bad(table_with(LATE_ROW, last_field("inf")), "finite, got", "Remove"),
    "decimal_commas": Bad(
        lambda folder, cells: write_text(folder / "cells.csv", ";INS;GCG;SST\n" + "cell;1,5;2,5;0,0\n" * 5),
        "'1,5'",
        "decimal point",
    ),
    "negative": Bad(table_with(LATE_ROW, last_field("-1")), "not be negative, got", "`layer`|counts"),
    "beyond_32_bits": Bad(table_with(LATE_ROW, last_field(str(2**31))), "2,147,483,648", "int64 or float32"),
    "beyond_64_bits": Bad(
        table_with(LATE_ROW, last_field("36893488147419103232")), "more than a cell", "int64 or float32"
    ),
    "short_row_early": Bad(table_with(3, fewer_fields), "120, 121 fields", "separator"),
    "short_row_late": Bad(table_with(LATE_ROW, fewer_fields), "fields|column", "separator|take out|again|Check"),
    "long_row_early": Bad(table_with(3, more_fields), "121, 122 fields", "separator"),
    "long_row_late": Bad(table_with(LATE_ROW, more_fields), "fields|column", "separator|take out|again|Check"),
    "cut_gzip": Bad(table_cut, "cannot be read"),
    "no_gene_names": Bad(table_without_genes, "gene names in its first row or column, got feature0", "Add symbols"),
    "cells_twice_in_rows": Bad(
        lambda folder, cells: write_table(folder, repeated_barcodes(cells)), "AAACCTG-1", "before the barcodes"
    ),
    "cells_twice_in_columns": Bad(
        lambda folder, cells: write_table(folder, repeated_barcodes(cells), genes_in_rows=True),
        "AAACCTG-1",
        "before the barcodes",
    ),
    "nothing_but_names": Bad(text_file("cells.csv", ",INS,GCG,SST\n"), "no fields", "separator|again|Check"),
    "one_column": Bad(text_file("cells.csv", "INS\nGCG\nSST\n"), "fields", "separator"),
    "prose": Bad(text_file("cells.txt", "These are the counts of GSE84133.\nSee the README.\n"), "fields", "separator"),
    "not_gzipped": Bad(text_file("cells.csv.gz", ",INS,GCG\ncell,1,2\n"), "cannot be read"),
    "not_utf8": Bad(
        text_file("cells.csv", b",INS,GCG,SST\n" + "Zelle_\xe4,1,2,3\n".encode("latin-1") * 5),
        "utf-8|UTF-8",
        "[Cc]heck|[Ww]rite|[Ss]ave",
    ),
    "words_only": Bad(text_file("cells.csv", "cell,INS,GCG\n" + "AAAC,high,low\n" * 5), "text 'high'", "take out"),
}


# -- other files -------------------------------------------------------------------------------------------------------


def pickled(folder: Path, cells: ad.AnnData) -> Path:
    (folder / "cells.h5ad").write_bytes(pickle.dumps(cells.X))
    return folder / "cells.h5ad"


def gzipped_h5ad(name: str) -> Callable:
    def write(folder: Path, cells: ad.AnnData) -> Path:
        path = write_h5ad(folder, cells)
        content = gzip.compress(path.read_bytes(), 1)
        path.unlink()
        (folder / name).write_bytes(content)
        return folder / name

    return write


def spreadsheet(folder: Path, cells: ad.AnnData) -> Path:
    with zipfile.ZipFile(folder / "cells.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return folder / "cells.xlsx"


def empty_folder(folder: Path, cells: ad.AnnData) -> Path:
    (folder / "outs").mkdir()
    return folder / "outs"


def folder_of_something_else(folder: Path, cells: ad.AnnData) -> Path:
    (empty_folder(folder, cells) / "web_summary.html").write_text("<html></html>")
    return folder / "outs"


def empty_zarr(folder: Path, cells: ad.AnnData) -> Path:
    (folder / "cells.zarr").mkdir()
    (folder / "cells.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    return folder / "cells.zarr"


def garbled_zarr(folder: Path, cells: ad.AnnData) -> Path:
    (empty_zarr(folder, cells) / "zarr.json").write_text("{")
    return folder / "cells.zarr"


def zarr_without_a_chunk(folder: Path, cells: ad.AnnData) -> Path:
    """A folder that was copied in part; zarr itself takes zeros for what is not there."""
    path = write_zarr(folder, cells)
    (chunk,) = (file for file in (path / "X" / "indices").rglob("*") if file.is_file() and file.name[0].isdigit())
    chunk.unlink()
    return path


def loom_without_genes(folder: Path, cells: ad.AnnData) -> Path:
    path = write_loom(folder, cells)
    with h5py.File(path, "a") as file:
        del file["row_attrs"]
    return path


def loom_with_fewer_names(folder: Path, cells: ad.AnnData) -> Path:
    path = write_loom(folder, cells)
    with h5py.File(path, "a") as file:
        names = file["row_attrs/Gene"][:100]
        del file["row_attrs/Gene"]
        file["row_attrs/Gene"] = names
    return path


def h5_of_10x_without_features(folder: Path, cells: ad.AnnData) -> Path:
    path = write_10x_h5(folder, cells)
    with h5py.File(path, "a") as file:
        del file["matrix/features"]
    return path


OTHERS = {
    "empty_h5ad": Bad(text_file("cells.h5ad", b""), "0 bytes"),
    "empty_csv": Bad(text_file("cells.csv", b""), "0 bytes"),
    "pickle": Bad(pickled, "a Python pickle", "write_h5ad"),
    "web_page": Bad(
        text_file("cells.h5ad", "\n<!DOCTYPE html>\n<html>Not found</html>"), "a web page", "download it again"
    ),
    "web_page_in_capitals": Bad(text_file("cells.h5ad", "<HTML><BODY>"), "a web page", "download it again"),
    "web_page_named_csv": Bad(
        text_file("cells.csv", "<!DOCTYPE html>\n<html>\n<body>\n<p>Not found</p>\n"), "a web page", "download it again"
    ),
    "text": Bad(text_file("cells.h5ad", "cells and genes\n"), "none of these", "Convert"),
    "gzip_named_h5ad": Bad(gzipped_h5ad("cells.h5ad"), "compressed", "gunzip"),
    "h5ad_gz": Bad(gzipped_h5ad("cells.h5ad.gz"), "compressed", "gunzip"),
    "rds": Bad(text_file("cells.rds", gzip.compress(b"X\n\x00\x00")), "an R object", "in R"),
    "rds_in_capitals": Bad(text_file("cells.RDS", gzip.compress(b"X\n\x00\x00")), "an R object", "in R"),
    "spreadsheet": Bad(spreadsheet, "spreadsheet", r"\.csv"),
    "binary_named_csv": Bad(text_file("cells.csv", bytes(range(256))), "none of these", "Convert"),
    "empty_folder": Bad(empty_folder, "with nothing", "Name a file"),
    "folder_of_something_else": Bad(folder_of_something_else, "web_summary.html", "Name a file"),
    "empty_zarr": Bad(empty_zarr, "holds obs, var and X, got nothing", "write_zarr"),
    "garbled_zarr": Bad(garbled_zarr, "cannot be read", "again"),
    "zarr_without_a_chunk": Bad(zarr_without_a_chunk, "X", "again"),
    "loom_without_genes": Bad(loom_without_genes, "row_attrs", "again"),
    "loom_with_fewer_names": Bad(loom_with_fewer_names, "97 x 120 .*100 genes"),
    "10x_without_features": Bad(h5_of_10x_without_features, "features", "again"),
}


# -- values ------------------------------------------------------------------------------------------------------------


def with_value(value: float, dtype, row: int = LATE_CELL, dense: bool = False) -> Callable:
    """One count is replaced."""

    def make(cells: ad.AnnData) -> ad.AnnData:
        matrix = cells.X.toarray().astype(dtype)
        matrix[row, 7] = value
        return with_matrix(cells, matrix if dense else sp.csr_matrix(matrix))

    return make


def noise(cells: ad.AnnData) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, cells.shape).astype(np.float32)


def noise_in_a_layer(cells: ad.AnnData) -> ad.AnnData:
    adata = with_matrix(cells, scaled(cells))
    adata.layers["counts"] = noise(cells)
    return adata


def wrapped(cells: ad.AnnData) -> ad.AnnData:
    """Counts that were added up in int32 beyond what it holds."""
    matrix = cells.X.astype(np.int32)
    matrix.data[:5] = (2**31 + 1000 * np.arange(1, 6)).astype(np.int32)
    return with_matrix(cells, matrix)


def both_kinds_of_names(cells: ad.AnnData) -> ad.AnnData:
    """50 genes, each once by its symbol and once by its Ensembl id, with the same counts."""
    genes = cells[:, :50]
    names = [*genes.var_names, *ensembl_ids(genes.var_names)]
    return ad.AnnData(sp.hstack([genes.X, genes.X], format="csr"), obs=cells.obs, var=pd.DataFrame(index=names))


def mouse_symbols(cells: ad.AnnData) -> ad.AnnData:
    return named(cells, [name.capitalize() for name in cells.var_names])


def mouse_ids(cells: ad.AnnData) -> ad.AnnData:
    return named(cells, [f"ENSMUSG{index + 1:011d}" for index in range(cells.n_vars)])


def unknown_names(cells: ad.AnnData) -> ad.AnnData:
    return named(cells, [f"gene_{index}" for index in range(cells.n_vars)])


VALUES = {
    "negative": Bad(h5ad_of(with_value(-1, np.float32)), "not be negative, got", "`layer`"),
    "scaled": Bad(h5ad_of(lambda cells: with_matrix(cells, scaled(cells))), "not be negative, got", "Scaled .*`layer`"),
    "nan": Bad(h5ad_of(with_value(np.nan, np.float32)), "finite, got .*NaN", "Remove|`layer`"),
    "nan_in_dense": Bad(h5ad_of(with_value(np.nan, np.float32, dense=True)), "finite, got .*NaN", "Remove|`layer`"),
    "infinity": Bad(h5ad_of(with_value(np.inf, np.float64)), "finite, got .*infinite", "Remove|`layer`"),
    "wrapped_to_negative": Bad(h5ad_of(wrapped), "overflow", "int64 or float32"),
    "two_to_the_31": Bad(h5ad_of(with_value(2**31, np.int64)), "2,147,483,648", "int64 or float32"),
    "two_to_the_31_in_float": Bad(h5ad_of(with_value(2**31, np.float64)), "2,147,483,648", "int64 or float32"),
    "noise_in_x": Bad(
        h5ad_of(lambda cells: with_matrix(cells, noise(cells))), "unexplained values in X", "Name the matrix of counts"
    ),
    "noise_in_a_layer": Bad(
        h5ad_of(noise_in_a_layer), r"unexplained values in layers\['counts'\]", "Name the matrix of counts"
    ),
    "binary": Bad(
        h5ad_of(lambda cells: with_matrix(cells, (cells.X > 0).astype(np.float32))), "one value", "matrix of counts"
    ),
    "all_zero": Bad(h5ad_of(lambda cells: with_matrix(cells, sp.csr_matrix(cells.shape))), "all zero", "Name another"),
    "two_kinds_of_names": Bad(
        h5ad_of(both_kinds_of_names), "50 genes .*mixed id types", "Keep the columns of one type"
    ),
    "mouse_symbols": Bad(h5ad_of(mouse_symbols), "human genes, got those of mouse", "orthologues"),
    "mouse_ids": Bad(h5ad_of(mouse_ids), r"human genes, got those of mouse .*\(ENSMUSG00000000001", "orthologues"),
    "unknown_genes": Bad(h5ad_of(unknown_names), r"70% of the counts .*got 0\.\d%", "`gene_column`"),
}

GROUPS = {"h5ad": IN_H5AD, "mtx": IN_MTX, "table": IN_TABLE, "other": OTHERS, "values": VALUES}
BAD_FILES = {f"{group}-{name}": bad for group, files in GROUPS.items() for name, bad in files.items()}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_an_error_that_says_what_is_wrong_and_what_to_do(name, cells, tokenizer, tmp_path):
    bad = BAD_FILES[name]
    path = bad.write(tmp_path, cells)
    message = refusal(lambda: read(path, tokenizer), tmp_path)
    assert path.name in message
    assert re.search(bad.got, message)
    assert re.search(bad.remedy, message)
    assert message.endswith(".")
    assert not re.search(r"(?<!\.)\.\.(?!\.)", message)
    assert "\n" not in message


def test_the_cells_that_are_spoilt_here_can_be_read_themselves(cells, tokenizer, tmp_path):
    expected = tokenizer.tokenize_cells(cells.X, cells.var_names)
    for write in (write_h5ad, write_mtx_folder, write_table):
        tokens = read(write(tmp_path, cells), tokenizer)
        assert np.array_equal(tokens.input_ids, expected.input_ids)
        assert np.array_equal(tokens.expression_bins, expected.expression_bins)


@pytest.mark.parametrize("name", ["cells.h5ad", "folder/matrix.mtx.gz", "cells.csv", "outs"])
def test_a_path_with_nothing_there_is_an_error(name, tokenizer, tmp_path):
    for act in (lambda path: read(path, tokenizer), read_cells):
        message = refusal(lambda act=act: act(tmp_path / name), tmp_path, FileNotFoundError)
        assert re.search(f"{name}.*Check the path", message)


# Cells 0 to 15 and 81 to 96 are the sample then, and cell 40 is seen only when it is tokenized.
LATE_VALUES = {
    "negative": (-1, "must not be negative, got"),
    "nan": (np.nan, "must be finite, got"),
    "infinity": (np.inf, "must be finite, got"),
    "two_to_the_31": (2**31, "2,147,483,648"),
}


@pytest.mark.parametrize("late", LATE_VALUES)
def test_a_bad_value_beyond_the_sampled_cells_is_found_when_they_are_read(
    late, cells, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(cells_module, "SAMPLE_CELLS", 32)
    value, got = LATE_VALUES[late]
    path = write_h5ad(tmp_path, with_value(value, np.float64)(cells))
    with open_cells(path, tokenizer) as file:
        expression = read_expression(file, tokenizer)
        assert expression.scale.is_readable
        message = refusal(lambda: list(expression.tokens(tokenizer)), tmp_path)
    assert re.search(got, message)
    assert path.name in message


@pytest.mark.parametrize("layer", ["counts", "X"])
def test_noise_that_is_named_is_read_with_a_warning(layer, cells, tokenizer, tmp_path, caplog):
    adata = with_matrix(cells, noise(cells))
    adata.layers["counts"] = noise(cells)
    path = write_h5ad(tmp_path, adata)
    tokens = read(path, tokenizer, layer=layer)
    assert np.array_equal(tokens.input_ids, tokenizer.tokenize_cells(noise(cells), cells.var_names).input_ids)
    assert "unexplained values" in caplog.text
    assert path.name in caplog.text
    assert "as you named it" in caplog.text


@pytest.mark.parametrize(
    ("make", "got"),
    [
        pytest.param(lambda cells: with_matrix(cells, scaled(cells)), "not be negative", id="scaled"),
        pytest.param(with_value(np.nan, np.float32), "be finite", id="nan"),
        pytest.param(with_value(2**31, np.int64), "2,147,483,648", id="overflow"),
    ],
)
def test_naming_a_matrix_does_not_make_values_without_ranks_readable(make, got, cells, tokenizer, tmp_path):
    path = write_h5ad(tmp_path, make(cells))
    assert re.search(got, refusal(lambda: read(path, tokenizer, layer="X"), tmp_path))


def test_genes_by_symbol_and_others_by_id_are_read_if_none_is_there_twice(cells, tokenizer, tmp_path):
    symbols = list(cells.var_names)
    mixed = [*symbols[:60], *ensembl_ids(symbols[60:])]
    tokens = read(write_h5ad(tmp_path, named(cells, mixed)), tokenizer)
    expected = tokenizer.tokenize_cells(cells.X, symbols)
    assert np.array_equal(tokens.input_ids, expected.input_ids)
    assert np.array_equal(tokens.expression_bins, expected.expression_bins)


@pytest.mark.parametrize(
    "name",
    [
        "h5ad-cut_at_a_third",
        "h5ad-no_x",
        "h5ad-barcodes_twice",
        "h5ad-strings",
        "h5ad-index_too_high",
        "mtx-cut_gzip",
        "mtx-no_barcodes",
        "mtx-too_many_promised",
        "table-text_in_a_late_row",
        "other-web_page",
        "other-pickle",
        "other-empty_folder",
    ],
)
def test_reading_a_bad_file_into_memory_is_the_same_error(name, cells, tmp_path):
    bad = BAD_FILES[name]
    path = bad.write(tmp_path, cells)
    message = refusal(lambda: read_cells(path), tmp_path)
    assert path.name in message
    assert re.search(bad.got, message)
    assert re.search(bad.remedy, message)


@pytest.mark.parametrize("act", [panfoma_hf.annotate, panfoma_hf.embed], ids=["annotate", "embed"])
@pytest.mark.parametrize(
    "name",
    [
        "h5ad-cut_at_a_third",
        "h5ad-no_x",
        "h5ad-index_too_high",
        "mtx-too_few_promised",
        "table-text_in_a_late_row",
        "other-web_page",
        "values-scaled",
        "values-mouse_symbols",
    ],
)
def test_a_bad_file_is_refused_before_a_model_is_looked_for(name, act, cells, tokenizer, tmp_path):
    bad = BAD_FILES[name]
    path = bad.write(tmp_path, cells)
    message = refusal(lambda: act(path, tmp_path / "no_checkpoint", tokenizer=tokenizer), tmp_path)
    assert re.search(bad.got, message)
    assert re.search(bad.remedy, message)
    assert path.name in message
