"""An open file of cells: what every reader gives, and how its errors are told."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import pandas as pd

from .storage import Rows, SpillError


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


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn what libraries raise on a damaged file into a ValueError that names it; our own errors pass."""
    try:
        yield
    except (SpillError, MemoryError):  # not the file's fault
        raise
    except (PermissionError, BlockingIOError) as error:
        raise ValueError(
            f"{name} cannot be opened: {one_line(error)}. Close it in other programs, and see that you may read it."
        ) from error
    except Exception as error:  # libraries raise whatever a damaged file leads them to
        if type(error) is ValueError and name in str(error):
            raise
        raise ValueError(
            f"{name} cannot be read: {one_line(error)}. It is cut off or damaged: download or write it again."
        ) from error


def one_line(error: Exception) -> str:
    """The message of a library's error, as a part of a sentence."""
    return " ".join(str(error).split()).rstrip(".")
