"""Results into a copy of a file of cells: whole or not at all, and without reading its matrices."""

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import zarr
from anndata.io import read_elem, sparse_dataset, write_elem
from anndata.utils import make_index_unique

from ..data.cell_file import CellFile
from ..data.readers import LAYER_PREFIX, open_zarr
from ..data.storage import Rows
from .results import Additions


H5AD, ZARR = "h5ad", "zarr"
_ZARR_FILES = ("zarr.json", ".zgroup", ".zattrs")
# What an AnnData has besides its matrices.
_PARTS = ("obs", "var", "obsm", "varm", "obsp", "varp", "uns")
# An older output on its way out.
_REPLACED = "replaced"
# Values of a matrix that are stored together where it is written anew.
_STORED_TOGETHER = 2**17
Group = h5py.Group | zarr.Group


# ----------------------------------------------------------------------------------------------------------------------
# Before a run
# ----------------------------------------------------------------------------------------------------------------------


def check_output(source: Path, output: Path, overwrite: bool) -> None:
    """Raise unless an output may be written.

    Raises
    ------
    ValueError
        If its name ends in neither .h5ad nor .zarr, or it is the input or a part of it.
    FileExistsError
        If something is there that is not to be replaced.
    """
    if output.suffix not in (".h5ad", ".zarr"):
        raise ValueError(f"An output's name ends in .h5ad or .zarr, got {output}. Rename it.")
    here, there = source.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(
            f"An output is another file than the input and lies outside of it, got {output} for {source}. Name another."
        )
    if not output.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"An output is a new file, got {output}, which exists. Choose another name, or overwrite it with "
            "`overwrite=True` (--overwrite); it stays as it is until the new one is whole."
        )
    is_zarr = output.is_dir() and any((output / name).exists() for name in _ZARR_FILES)
    if not (output.is_file() if _kind(output) == H5AD else is_zarr):
        raise FileExistsError(
            f"An output replaces a file of its own kind only, got something else in {output}. Choose another name."
        )


def check_keys(keys: list[str]) -> None:
    """Raise ValueError for a key that a file would take for a path."""
    bad = [key for key in keys if "/" in key]
    if bad:
        raise ValueError(
            f"A key in a file has no '/', got {bad[0]!r}. Choose another one, or annotate an AnnData in memory."
        )


def check_source(source: Path, cells: CellFile) -> None:
    """Raise ValueError where results could not be added to a file of cells."""
    if cells.format in (H5AD, ZARR):
        with _opened(source, "r") as group:
            entry = group["uns"].get("panfoma") if "uns" in group else None
            is_mapping = isinstance(entry, Group) and entry.attrs.get("encoding-type", "dict") == "dict"
        if entry is not None and not is_mapping:
            raise ValueError(
                f"uns['panfoma'] must be free or PanFoMa's own, got something else in {source}. Rename it."
            )
    check_keys([str(column) for column in cells.obs])


# ----------------------------------------------------------------------------------------------------------------------
# The output
# ----------------------------------------------------------------------------------------------------------------------


def write_output(
    source: Path, cells: CellFile, output: Path, additions: Additions, *, folder: Path, overwrite: bool
) -> None:
    """Copy a file of cells, add results, and put it into its place when it is whole.

    From h5ad to h5ad, and from a folder of zarr to another, everything is copied byte by byte. Otherwise the matrices
    are written as CSR, a chunk at a time, and what else an AnnData has is read and written.

    Parameters
    ----------
    source, cells
        The file, and what it was opened as.
    output
        Where to write.
    additions
        What to add.
    folder
        On the same disk, for what is not finished.
    overwrite
        Whether to replace an older output.

    Raises
    ------
    FileExistsError
        If there is an output by now that is not to be replaced.
    """
    scratch, aside = folder / f"unfinished{output.suffix}", folder / f"{_REPLACED}{output.suffix}"
    remove(scratch)  # of a run that was killed
    try:
        if _kind(output) != cells.format or _is_old(source) or (cells.format == ZARR and source.is_file()):
            _write_anew(source, cells, scratch)
        elif cells.format == H5AD:
            shutil.copyfile(source, scratch)
        else:
            _copy_folder(source, scratch)
        with _opened(scratch, "r+") as group:
            _add(group, additions)
        _sync_all(scratch)
        if output.exists() and not overwrite:
            raise FileExistsError(f"An output is a new file, got {output}, which somebody wrote meanwhile. Move it.")
        if output.is_dir():  # which nothing replaces in one step
            remove(aside)  # of a run that was killed when the new one was in place
            output.rename(aside)
        try:
            scratch.replace(output)
        except OSError:
            restore(output, folder)
            raise
        sync(output.parent)
    finally:
        remove(scratch)
    remove(aside)


def restore(output: Path, folder: Path) -> None:
    """Put an older output back into its place, if a run was cut off between taking it away and putting a new one."""
    aside = folder / f"{_REPLACED}{output.suffix}"
    if aside.exists() and not output.exists():
        aside.rename(output)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, to be written to: neither permissions nor times of its files are kept."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for folder in (target, *(path for path in target.rglob("*") if path.is_dir())):
        folder.chmod(folder.stat().st_mode | 0o700)


def _kind(path: Path) -> str:
    return H5AD if path.suffix == ".h5ad" else ZARR


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[Group]:
    """The root of an h5ad or zarr; the index of a zarr store, where it has one, is brought up to date at the end."""
    if path.is_file() and h5py.is_hdf5(path):
        with h5py.File(path, mode) as file:
            yield file
    elif mode == "r":
        group = open_zarr(path)
        try:
            yield group
        finally:
            group.store.close()
    else:
        is_indexed = zarr.open_group(path, mode="r").metadata.consolidated_metadata is not None
        yield zarr.open_group(path, mode=mode, use_consolidated=False)
        if is_indexed:
            _index(path)


def _index(path: Path) -> None:
    """Write the index of a zarr store, so that its metadata is found in one read."""
    with warnings.catch_warnings():
        # Of zarr 3's format, which has it as an extension; anndata writes it all the same.
        warnings.filterwarnings("ignore", category=zarr.errors.ZarrUserWarning)
        zarr.consolidate_metadata(path)


def _is_old(source: Path) -> bool:
    """Whether an anndata before 0.7 wrote a file: its tables take no further column."""
    with _opened(source, "r") as group:
        return hasattr(group["obs"], "shape")


def _write_anew(source: Path, cells: CellFile, path: Path) -> None:
    """Write cells of any format as an AnnData."""
    skeleton = ad.AnnData(**_parts(source, cells))
    skeleton.strings_to_categoricals()  # as AnnData's own writers do
    storage = {"chunks": (_STORED_TOGETHER,)}
    if _kind(path) == H5AD:
        storage |= {"compression": "gzip", "compression_opts": 1}
        with h5py.File(path, "w") as file:
            write_elem(file, "/", skeleton)
    else:
        write_elem(zarr.open_group(path, mode="w", zarr_format=ad.settings.zarr_write_format), "/", skeleton)
        _index(path)
    with _opened(path, "r+") as group:
        for key, matrix in cells.matrices.items():
            if key == "raw":
                write_elem(group, "raw", {})
                raw = group["raw"]
                raw.attrs["encoding-type"], raw.attrs["encoding-version"] = "raw", "0.1.0"
                write_elem(raw, "var", matrix.var)
                write_elem(raw, "varm", {})
                _write_rows(raw, "X", matrix.rows, storage)
            elif key == "X":
                _write_rows(group, "X", matrix.rows, storage)
            else:
                _write_rows(_mapping(group, "layers"), key.removeprefix(LAYER_PREFIX), matrix.rows, storage)


def _parts(source: Path, cells: CellFile) -> dict:
    """What an AnnData of a file has besides its matrices, in memory."""
    if cells.format not in (H5AD, ZARR):
        var = cells.matrices["X"].var
        return {"obs": cells.obs, "var": var.set_axis(make_index_unique(var.index.astype(str)))}
    if _is_old(source):
        old = ad.read_h5ad(source, backed="r")
        try:
            return {"obs": old.obs, "var": old.var, **{name: dict(getattr(old, name)) for name in _PARTS[2:]}}
        finally:
            old.file.close()
    with _opened(source, "r") as group:
        return {name: read_elem(group[name]) for name in _PARTS if name in group}


def _write_rows(group: Group, key: str, rows: Rows, storage: dict) -> None:
    """Write a matrix as CSR, a chunk at a time."""
    for start, stop in pairwise(rows.bounds()):
        chunk = rows.read(start, stop)
        if start:
            sparse_dataset(group[key]).append(chunk)
        else:
            chunk.indptr = chunk.indptr.astype(np.int64)  # what is appended may take it beyond 32 bits
            write_elem(group, key, chunk, dataset_kwargs=storage)


def _add(group: Group, additions: Additions) -> None:
    """Add results to an AnnData on disk."""
    obs = group["obs"]
    for key, values in additions.obs.items():
        write_elem(obs, key, values)
    if additions.obs:
        columns = [name.decode() if isinstance(name, bytes) else str(name) for name in obs.attrs["column-order"]]
        obs.attrs["column-order"] = [*columns, *(key for key in additions.obs if key not in columns)]
    obsm = _mapping(group, "obsm")
    for key, values in additions.obsm.items():
        write_elem(obsm, key, values)
    uns = _mapping(_mapping(group, "uns"), "panfoma")
    for key, values in additions.uns.items():
        write_elem(uns, key, values)


def _mapping(group: Group, key: str) -> Group:
    """A mapping in a group, new if it is not there."""
    if key not in group:
        write_elem(group, key, {})
    return group[key]


# ----------------------------------------------------------------------------------------------------------------------
# Disk
# ----------------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, even if the machine goes down."""
    scratch = path.with_name(f"{path.name}.tmp")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file, or the list of files of a folder, written to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(path: Path) -> None:
    for part in (path, *path.rglob("*")) if path.is_dir() else (path,):
        sync(part)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
