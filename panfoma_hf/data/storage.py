"""Rows of a matrix that need not fit into memory: sliced where they lie, or brought into order in a temporary file."""

import itertools
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import scipy.sparse as sp


# Entries that are held at a time; a few hundred MB with what is computed from them.
CHUNK_ENTRIES = 2**21
# Of a matrix in another order, a block is sorted in memory before it is written to the temporary file.
BLOCK_ENTRIES = 2**21
# A sample has no more entries than this, and so fewer cells of a dense matrix.
SAMPLE_ENTRIES = 2**22
# Cells of a sample lie in runs, each of which is one read.
SAMPLE_RUN = 16


class SpillError(OSError):
    """The temporary file of a matrix cannot be written."""


class Rows(ABC):
    """A (cells, genes) matrix that is read a few rows at a time."""

    shape: tuple[int, int]

    @abstractmethod
    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows from ``start`` to before ``stop``, (rows, genes)."""

    @abstractmethod
    def bounds(self) -> list[int]:
        """Where chunks start, and the number of rows: each chunk fits into memory."""

    @abstractmethod
    def entries(self) -> int:
        """About how many entries a row has."""

    def sample(self, index: np.ndarray) -> sp.csr_matrix:
        """Rows of an ascending index, (rows, genes), one read for each run of neighbours."""
        if not len(index):
            return self.read(0, 0)
        runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
        return sp.vstack([self.read(int(run[0]), int(run[-1]) + 1) for run in runs], format="csr")

    def close(self) -> None:  # noqa: B027 - most have nothing to give up
        """Give up temporary files."""


class SlicedRows(Rows):
    """A matrix that gives its rows when sliced: dense or CSR in memory, an array of HDF5 or zarr, AnnData's on disk.

    Parameters
    ----------
    matrix
        (cells, genes).
    transposed
        Whether it is (genes, cells) instead.
    """

    def __init__(self, matrix, transposed: bool = False):
        self._matrix, self._transposed = matrix, transposed
        self.shape = tuple(matrix.shape[::-1] if transposed else matrix.shape)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows from ``start`` to before ``stop``, (rows, genes)."""
        self._bring_into_order()
        rows = self._matrix[:, start:stop].T if self._transposed else self._matrix[start:stop]
        rows = rows.compute() if hasattr(rows, "compute") else rows
        if sp.issparse(rows):
            check_matrix(rows)
        return sp.csr_matrix(rows if rows.dtype != np.float16 else rows.astype(np.float32))

    def _bring_into_order(self) -> None:
        if sp.issparse(self._matrix) and self._matrix.format != "csr":
            check_matrix(self._matrix)
            self._matrix = self._matrix.tocsr()

    def bounds(self) -> list[int]:
        """Where chunks start, and the number of rows."""
        if sp.issparse(self._matrix):
            self._bring_into_order()
            return _bounds(self._matrix.indptr)
        step = max(1, 2 * CHUNK_ENTRIES // max(self.shape[1], 1))
        return [*range(0, self.shape[0], step), self.shape[0]]

    def entries(self) -> int:
        """About how many entries a row has: of a dense matrix at most its width."""
        return self._matrix.nnz // max(self.shape[0], 1) if sp.issparse(self._matrix) else self.shape[1]


class CompressedRows(Rows):
    """A CSR matrix whose three arrays lie on disk.

    Parameters
    ----------
    indptr, indices, data
        Arrays of HDF5 or zarr.
    shape
        (cells, genes).
    """

    def __init__(self, indptr, indices, data, shape: tuple[int, int]):
        self._indptr = _checked_indptr(indptr, indices, data, shape[0])
        self._indices, self._data = indices, data
        self.shape = tuple(map(int, shape))

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows from ``start`` to before ``stop``, (rows, genes)."""
        first, last = self._indptr[start], self._indptr[stop]
        indices = _checked_indices(self._indices[first:last], self.shape[1])
        indptr = self._indptr[start : stop + 1] - first
        return sp.csr_matrix((self._data[first:last], indices, indptr), shape=(stop - start, self.shape[1]))

    def bounds(self) -> list[int]:
        """Where chunks start, and the number of rows."""
        return _bounds(self._indptr)

    def entries(self) -> int:
        """About how many entries a row has."""
        return int(self._indptr[-1]) // max(self.shape[0], 1)


class CompressedColumns(Rows):
    """A CSC matrix whose three arrays lie on disk; it is turned into rows, in a temporary file, when first read whole.

    Parameters
    ----------
    indptr, indices, data
        Arrays of HDF5 or zarr.
    shape
        (cells, genes).
    """

    def __init__(self, indptr, indices, data, shape: tuple[int, int]):
        self._indptr = _checked_indptr(indptr, indices, data, shape[1])
        self._indices, self._data = indices, data
        self.shape = tuple(map(int, shape))
        self._rows: SpilledRows | None = None
        self._lock = threading.Lock()

    def _blocks(self) -> Iterator[sp.csc_matrix]:
        """Blocks of whole columns, as wide as the matrix."""
        bounds = _bounds(self._indptr, BLOCK_ENTRIES)
        for start, stop in itertools.pairwise(bounds):
            first, last = self._indptr[start], self._indptr[stop]
            indptr = np.clip(self._indptr, first, last) - first
            indices = _checked_indices(self._indices[first:last], self.shape[0])
            yield sp.csc_matrix((self._data[first:last], indices, indptr), shape=self.shape)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows from ``start`` to before ``stop``, (rows, genes)."""
        with self._lock:  # chunks are read on a thread of their own
            if self._rows is None:
                self._rows = SpilledRows(((0, block) for block in self._blocks()), self.shape)
        return self._rows.read(start, stop)

    def sample(self, index: np.ndarray) -> sp.csr_matrix:
        """Rows of an ascending index, (rows, genes), in one pass over the columns."""
        if self._rows is not None:
            return self._rows.sample(index)
        place = np.full(self.shape[0], -1, dtype=np.int32)
        place[index] = np.arange(len(index))
        parts = []
        for block in self._blocks():
            block = block.tocoo()
            kept = place[block.row] >= 0
            parts.append((place[block.row[kept]], block.col[kept], block.data[kept]))
        return _merged(parts, (len(index), self.shape[1]))

    def bounds(self) -> list[int]:
        """Where chunks start, and the number of rows."""
        self.read(0, 0)
        return self._rows.bounds()

    def entries(self) -> int:
        """About how many entries a row has."""
        return int(self._indptr[-1]) // max(self.shape[0], 1)

    def close(self) -> None:
        """Give up the temporary file."""
        if self._rows is not None:
            self._rows.close()


class SpilledRows(Rows):
    """Rows whose entries came in another order, in a temporary file that vanishes when it is closed.

    Parameters
    ----------
    blocks
        The first row of a block and the block, sparse (rows, genes). Blocks may share rows: their entries are put
        together.
    shape
        (cells, genes).

    Raises
    ------
    SpillError
        If the temporary folder is full.
    """

    def __init__(self, blocks: Iterable[tuple[int, sp.spmatrix]], shape: tuple[int, int]):
        self.shape = tuple(map(int, shape))
        self._file = tempfile.TemporaryFile(prefix="panfoma-")  # noqa: SIM115 - lives as long as this object
        self._blocks: list[tuple[int, int, int, int, np.dtype]] = []
        self._lock = threading.Lock()
        self._sizes = np.zeros(self.shape[0], dtype=np.int64)
        try:
            for first_row, block in blocks:
                self._add(first_row, block.tocsr())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up the temporary file; no row can be read any more."""
        self._file.close()

    def _add(self, first_row: int, block: sp.csr_matrix) -> None:
        self._sizes[first_row : first_row + block.shape[0]] += np.diff(block.indptr)
        try:
            offset = self._file.seek(0, 2)
            self._file.write(block.indptr.astype(np.int64).tobytes())
            self._file.write(block.indices.astype(np.int32).tobytes())
            self._file.write(np.ascontiguousarray(block.data).tobytes())
            self._file.flush()
        except OSError as error:
            raise SpillError(
                f"A matrix is brought into the order of cells in a temporary file, which cannot be written: {error}. "
                f"Make room in {tempfile.gettempdir()}, or name another folder in the environment variable TMPDIR."
            ) from error
        self._blocks.append((first_row, block.shape[0], block.nnz, offset, block.data.dtype))

    def _load(self, dtype, offset: int, count: int) -> np.ndarray:
        with self._lock:
            self._file.seek(offset)
            return np.frombuffer(self._file.read(count * np.dtype(dtype).itemsize), dtype=dtype)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows from ``start`` to before ``stop``, (rows, genes)."""
        parts = []
        for first_row, num_rows, num_entries, offset, dtype in self._blocks:
            low, high = max(start - first_row, 0), min(stop - first_row, num_rows)
            if low >= high:
                continue
            indptr = self._load(np.int64, offset + 8 * low, high - low + 1)
            first, count = int(indptr[0]), int(indptr[-1] - indptr[0])
            after_indptr = offset + 8 * (num_rows + 1)
            columns = self._load(np.int32, after_indptr + 4 * first, count)
            data = self._load(dtype, after_indptr + 4 * num_entries + dtype.itemsize * first, count)
            rows = np.repeat(np.arange(low + first_row - start, high + first_row - start), np.diff(indptr))
            parts.append((rows, columns, data))
        return _merged(parts, (stop - start, self.shape[1]))

    def bounds(self) -> list[int]:
        """Where chunks start, and the number of rows."""
        return _bounds(np.append(0, np.cumsum(self._sizes)))

    def entries(self) -> int:
        """About how many entries a row has."""
        return int(self._sizes.mean()) if len(self._sizes) else 0


def _merged(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], shape: tuple[int, int]) -> sp.csr_matrix:
    """A matrix of rows, columns and values in parts."""
    if not parts:
        return sp.csr_matrix(shape, dtype=np.float32)
    rows, columns, data = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return sp.coo_matrix((data, (rows, columns)), shape=shape).tocsr()


def sample_of(rows: Rows, size: int) -> sp.csr_matrix:
    """About ``size`` evenly spaced rows, fewer where these had more than `SAMPLE_ENTRIES` entries."""
    size = min(size, max(2 * SAMPLE_RUN, SAMPLE_ENTRIES // max(rows.entries(), 1)))
    return rows.sample(sample_index(rows.shape[0], size))


def sample_index(num_rows: int, size: int) -> np.ndarray:
    """An ascending index of about ``size`` rows in runs, evenly spaced over all of them; every row of fewer."""
    if num_rows <= size:
        return np.arange(num_rows)
    starts = np.linspace(0, num_rows - SAMPLE_RUN, size // SAMPLE_RUN).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(SAMPLE_RUN))


def _bounds(indptr: np.ndarray, entries: int | None = None) -> list[int]:
    """Cut rows into chunks of at most so many entries, a chunk's where None, or of one row."""
    entries = CHUNK_ENTRIES if entries is None else entries
    bounds, num_rows = [0], len(indptr) - 1
    while bounds[-1] < num_rows:
        fits = np.searchsorted(indptr, indptr[bounds[-1]] + entries, side="right") - 1
        bounds.append(min(max(int(fits), bounds[-1] + 1), num_rows))
    return bounds


def _checked_indptr(indptr, indices, data, num_rows: int) -> np.ndarray:
    indptr = np.asarray(indptr[:], dtype=np.int64)
    if (
        len(indptr) != num_rows + 1
        or indptr[0] != 0
        or (np.diff(indptr) < 0).any()
        or indptr[-1] > min(indices.shape[0], data.shape[0])
    ):
        raise ValueError(
            f"A sparse matrix needs {num_rows + 1:,} ascending offsets into its values, got {len(indptr):,} up to "
            f"{indptr.max(initial=0):,} for {data.shape[0]:,} values. The file is damaged: write or download it again."
        )
    return indptr


def check_matrix(matrix: sp.spmatrix) -> None:
    """Raise ValueError where a CSR or CSC matrix in memory has indices beyond its shape."""
    _checked_indices(matrix.indices, matrix.shape[0 if matrix.format == "csc" else 1])


def _checked_indices(indices: np.ndarray, size: int) -> np.ndarray:
    if len(indices) and not 0 <= indices.min() <= indices.max() < size:
        raise ValueError(
            f"Indices of a sparse matrix must be 0 to {size - 1:,}, got {indices.min():,} to {indices.max():,}. "
            "The file is damaged: write or download it again."
        )
    return indices
