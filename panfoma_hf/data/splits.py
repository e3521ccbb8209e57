"""Training and test cells of one file, split by donor where it names donors, and the search for leaks in any split."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats


# Columns of obs that say which cells belong together: people first, then what was taken of them, then how it was run.
# Upper and lower case are the same.
GROUP_COLUMNS = (
    "donor_id",
    "donor",
    "donor_name",
    "patient",
    "patient_id",
    "individual",
    "individual_id",
    "subject",
    "subject_id",
    "participant",
    "participant_id",
    "case_id",
    "mouse_id",
    "animal_id",
    "sample",
    "sample_id",
    "sample_name",
    "sample_uuid",
    "biosample_id",
    "orig.ident",
    "batch",
    "batch_id",
    "library",
    "library_id",
    "library_uuid",
    "channel",
    "lane",
    "plate",
)
# Draws of whole groups, of which the one is taken that loses the fewest labels.
NUM_DRAWS = 50
# A column tells the label where its groups' majority labels name so many of the cells.
TELLING_PURITY = 0.99
# Cells that express fewer of the shared genes may be equal by chance.
FEWEST_GENES_OF_EQUAL_CELLS = 5
# Barcodes of 10x Genomics' version 2 kits. Separate runs draw from the same list, so some are shared by chance.
NUM_BARCODES = 737_280
# Shared barcodes count as a leak where chance gives as many or more this rarely.
MOST_CHANCE = 1e-3

_UNKNOWN = {"", "nan", "na", "n/a", "none", "null", "unknown", "?"}
_COUNTER = re.compile(r"(cell|c|row|obs|index)?[\s_.-]*\d+", re.IGNORECASE)
_BARE_BARCODE = re.compile(r"[ACGT]{10,}(-\d+)?")


@dataclass
class Split:
    """Which cells to learn from and which to hold out.

    Parameters
    ----------
    train, test
        Positions of the cells, ascending.
    groups
        Whether groups were kept together.
    only_in_test, only_in_train
        Names of labels that the other side lacks, in the order of the alphabet. A model cannot learn the first.
    held_out
        Names of the groups of the test cells, in the order of the alphabet; none for a split by cell.
    """

    train: np.ndarray
    test: np.ndarray
    groups: bool
    only_in_test: tuple[str, ...] = ()
    only_in_train: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()


def find_groups(obs: pd.DataFrame, label: str) -> str | None:
    """The first of `GROUP_COLUMNS` by which cells can be split, None where there is none.

    A column can be split by if it says something of every labelled cell, has at least two groups, not all of one
    cell, and at least one label occurs in two of them: where every group has labels of its own, held-out cells have
    none that was learned.

    Parameters
    ----------
    obs
        (cells, columns), what is known of the cells.
    label
        Column with the labels; cells without one do not count.

    Raises
    ------
    ValueError
        If there is no such label.
    """
    labels = _column(obs, label)
    is_labelled = labels.notna().to_numpy()
    labels = labels[is_labelled].to_numpy()
    for column in _group_columns(obs, without=label):
        groups = _known_groups(obs[column])[is_labelled]
        if groups.isna().any():
            continue
        num_groups = groups.nunique()
        if not 2 <= num_groups < len(groups):
            continue
        pairs = pd.DataFrame({"label": labels, "group": groups.to_numpy()}).drop_duplicates()
        if pairs["label"].duplicated().any():
            return column
    return None


def split_cells(
    labels: Sequence[str], *, groups: Sequence[str] | None = None, test_size: float = 0.2, seed: int = 0
) -> Split:
    """Split cells into training and test cells, the same way for the same seed.

    With groups, none is on both sides. Of 50 draws that hold out about ``test_size`` of the cells, the one is taken
    that leaves the fewest labels out of the training cells, then out of the test cells, then is nearest to
    ``test_size``. It depends on the names of the groups, not on the order of the cells. Without groups, each label is
    split by itself: one of two or more cells is on both sides, the cell of a label with one is trained on.

    Parameters
    ----------
    labels
        (cells,), names.
    groups
        (cells,), such as donors; None splits by cell.
    test_size
        Share of cells to hold out.
    seed
        Seed of the draws.

    Raises
    ------
    ValueError
        If there are fewer than two cells or groups, a label or group is missing, no label has two cells where there
        are no groups, or the share is not between 0 and 1.
    """
    _check_test_size(test_size)
    names, codes = _coded(labels, "label")
    if len(codes) < 2:
        raise ValueError(f"A split needs at least two cells, got {len(codes)}. Add cells.")
    generator = np.random.default_rng(seed)
    if groups is None:
        is_test, held_out = _stratified(codes, len(names), test_size, generator), ()
    else:
        group_names, group_codes = _coded(groups, "group")
        if len(group_codes) != len(codes):
            raise ValueError(
                f"Each cell has a label and a group, got {len(codes):,} labels and {len(group_codes):,} groups. "
                "Pass both of the same cells."
            )
        if len(group_names) < 2:
            raise ValueError(
                f"Holding groups out needs at least two of them, got one, {str(group_names[0])!r}. "
                "Name another column, or split by cell, without groups."
            )
        table = np.zeros((len(names), len(group_names)), dtype=np.int64)
        np.add.at(table, (codes, group_codes), 1)
        is_held_out = _best_draw(table, test_size, generator)
        is_test, held_out = is_held_out[group_codes], tuple(group_names[is_held_out].tolist())
    in_train, in_test = (np.bincount(codes[side], minlength=len(names)) > 0 for side in (~is_test, is_test))
    return Split(
        np.flatnonzero(~is_test),
        np.flatnonzero(is_test),
        groups is not None,
        tuple(names[~in_train].tolist()),
        tuple(names[~in_test].tolist()),
        held_out,
    )


def _check_test_size(test_size: float) -> None:
    if not 0 < test_size < 1:
        raise ValueError(f"`test_size` is a share of the cells between 0 and 1, got {test_size}. Such as 0.2.")


def _stratified(codes: np.ndarray, num_labels: int, test_size: float, generator: np.random.Generator) -> np.ndarray:
    """(cells,), which cells to hold out. Labels get their share rounded down; the largest remainders are made up."""
    counts = np.bincount(codes, minlength=num_labels)
    most = counts - 1
    if not most.any():
        raise ValueError(
            f"Holding cells out needs a label of at least two cells, got {len(counts)} labels of one cell each. "
            "Add cells, or merge labels."
        )
    quota = counts * test_size
    held_out = np.minimum(np.maximum(np.floor(quota).astype(np.int64), 1), most)
    missing = round(len(codes) * test_size) - int(held_out.sum())
    if missing > 0:
        remainder = np.where(held_out < most, quota - held_out, -np.inf)
        more = np.argsort(-remainder, kind="stable")[:missing]
        held_out[more[held_out[more] < most[more]]] += 1
    order = np.lexsort((generator.random(len(codes)), codes))
    place = np.arange(len(codes)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_test = np.zeros(len(codes), dtype=bool)
    is_test[order] = place < np.repeat(held_out, counts)
    return is_test


def _best_draw(table: np.ndarray, test_size: float, generator: np.random.Generator) -> np.ndarray:
    """(groups,), which groups to hold out, from (labels, groups) numbers of cells."""
    sizes, totals = table.sum(axis=0), table.sum(axis=1)
    best, best_rank = None, None
    for _ in range(NUM_DRAWS):
        is_held_out = _draw(sizes, test_size, generator.permutation(len(sizes)))
        in_test = table[:, is_held_out].sum(axis=1)
        share = in_test.sum() / totals.sum()
        rank = (int((in_test == totals).sum()), int((in_test == 0).sum()), abs(share - test_size))
        if best is None or rank < best_rank:
            best, best_rank = is_held_out, rank
    return best


def _draw(sizes: np.ndarray, test_size: float, order: np.ndarray) -> np.ndarray:
    """(groups,), groups to hold out: in the order given, each that brings their share nearer to what is asked."""
    is_held_out = np.zeros(len(sizes), dtype=bool)
    wanted, taken, num_held_out = test_size * sizes.sum(), 0, 0
    for group in order.tolist():
        if abs(taken + sizes[group] - wanted) < abs(taken - wanted) and num_held_out < len(sizes) - 1:
            is_held_out[group] = True
            taken += sizes[group]
            num_held_out += 1
    if not is_held_out.any():  # every group is more than twice what is asked
        is_held_out[order[np.argmin(sizes[order])]] = True
    return is_held_out


@dataclass
class Leakage:
    """What test cells have in common with training cells that makes their score too good.

    Parameters
    ----------
    groups
        By column, in the order of `GROUP_COLUMNS`, the groups with cells on both sides.
    leak_column
        The column of ``groups`` that counts: the first that tells cells apart. Others are mentioned only, as a batch
        may be shared where the donor is not. None where no group of it is shared.
    group_cells
        By column, the number of test cells of these groups.
    single_groups
        By column with one group only, which all cells belong to, its name: no split can keep it on one side.
    shared_names
        Number of test cells whose name is that of a training cell.
    names_by_chance
        Number of these that is expected of separate runs, as they draw from the same list of barcodes.
    equal_cells
        Number of test cells whose expression of the shared genes equals that of a training cell.
    telling_columns
        By column that tells the label, ``purity``, the share of cells with the majority label of their group, and
        ``majority``, the share of the majority label of all.
    num_cells
        Number of test cells.
    """

    groups: dict[str, list[str]] = field(default_factory=dict)
    leak_column: str | None = None
    group_cells: dict[str, int] = field(default_factory=dict)
    single_groups: dict[str, str] = field(default_factory=dict)
    shared_names: int = 0
    names_by_chance: float = 0.0
    equal_cells: int = 0
    telling_columns: dict[str, dict[str, float]] = field(default_factory=dict)
    num_cells: int = 0

    @property
    def names_leak(self) -> bool:
        """Whether more names are shared than chance gives."""
        chance = stats.poisson.sf(self.shared_names - 1, self.names_by_chance)
        return self.shared_names > 0 and bool(chance < MOST_CHANCE)

    @property
    def is_leak(self) -> bool:
        """Whether donors, names beyond chance, or equal cells are on both sides."""
        return self.leak_column is not None or self.names_leak or self.equal_cells > 0

    def messages(self) -> list[str]:
        """A sentence or two for each finding: the rule, what was found, the remedy. Leaks first, then hints."""
        return list(self._leaks()) + list(self._hints())

    def _leaks(self) -> Iterator[str]:
        if self.leak_column is not None:
            yield (
                f"Cells that belong together should be on one side: {self._shared(self.leak_column)} are on both. "
                f"Split by {self.leak_column!r}, or rename what are different groups of the same name."
            )
        if self.names_leak:
            yield (
                f"A cell should be on one side: {self.shared_names:,} of {self.num_cells:,} test cells have the name "
                f"of a training cell{self._chance()}. Leave them out of one side."
            )
        if self.equal_cells:
            yield (
                f"A cell should be on one side: {self.equal_cells:,} of {self.num_cells:,} test cells have exactly the "
                "expression of a training cell. Leave them out of one side."
            )

    def _hints(self) -> Iterator[str]:
        for column in self.groups:
            if column != self.leak_column and column not in self.single_groups:
                yield (
                    f"A score is of cells like the test cells: {self._shared(column)} are among the training cells, "
                    f"too. Split by {column!r} if new cells will be of others."
                )
        for column, name in self.single_groups.items():
            yield (
                f"A score is of cells like the test cells: all cells are of one {column!r}, {name}. "
                "Test on cells of another one to learn how well these are named."
            )
        if self.shared_names and not self.names_leak:
            yield (
                f"A cell should be on one side: {self.shared_names:,} of {self.num_cells:,} test cells have the name "
                f"of a training cell{self._chance()}, so few that they may be others. Make names unique to be sure."
            )
        for column, shares in self.telling_columns.items():
            yield (
                f"A column of the experiment should not tell the label: {column!r} names it for "
                f"{shares['purity']:.1%} of the cells, the most frequent label for {shares['majority']:.1%}. What is "
                "learned may be the label encoded in the batch; add cells with several labels to a group, or read the "
                "score with care."
            )

    def _shared(self, column: str) -> str:
        names = self.groups[column]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        return f"{len(names):,} of {column!r} ({shown}; {self.group_cells[column]:,} of {self.num_cells:,} test cells)"

    def _chance(self) -> str:
        return f", where chance gives {self.names_by_chance:.2g}" if self.names_by_chance else ""

    def to_dict(self) -> dict:
        """All of it, with ``is_leak`` and ``messages``, for JSON."""
        return {"is_leak": self.is_leak, **asdict(self), "messages": self.messages()}


def find_leakage(
    train: ad.AnnData, test: ad.AnnData, label: str | None = None, *, group_columns: Sequence[str] | None = None
) -> Leakage:
    """Look for what training and test cells share: groups such as donors, names, equal cells; and telling columns.

    Parameters
    ----------
    train, test
        The two sides. Expression is compared as it is in ``X``, over genes that both have under the same name, so
        both sides should hold the same kind of values.
    label
        Column of both ``obs`` with the labels; None does not look for columns that tell it.
    group_columns
        Columns of both ``obs`` that say which cells belong together, the one that must not be shared first; None takes
        those of `GROUP_COLUMNS` that both have under the same name, of which a column with one group or one cell a
        group is not held against a split.

    Raises
    ------
    ValueError
        If a column that was named is not there.
    """
    found = Leakage(num_cells=test.n_obs)
    sides = (train.obs, test.obs)
    columns = group_columns
    if columns is None:
        columns = [name for name in _group_columns(train.obs, without=label) if name in test.obs]
    labels = None if label is None else pd.concat([_column(obs, label).astype(object) for obs in sides])
    is_first = True
    for column in columns:
        groups = [_known_groups(_column(obs, column)) for obs in sides]
        tells_cells_apart = _find_shared(found, column, *groups)
        if is_first and (tells_cells_apart or group_columns is not None):
            found.leak_column = column if column in found.groups else None
            is_first = False
        if labels is not None:
            _find_telling(found, column, pd.concat(groups).to_numpy(), labels.to_numpy())
    _find_names(found, train.obs_names, test.obs_names)
    found.equal_cells = _equal_cells(train, test)
    if found.leak_column is not None:
        found.single_groups.pop(found.leak_column, None)
    return found


def _find_shared(found: Leakage, column: str, train: pd.Series, test: pd.Series) -> bool:
    """Note groups on both sides; return whether the column tells cells apart, but does not name each."""
    both = sorted(set(train.dropna()) & set(test.dropna()))
    known = pd.concat([train, test]).dropna()
    num_groups = known.nunique()
    if both:
        found.groups[column] = both
        found.group_cells[column] = int(test.isin(both).sum())
    if both and num_groups == 1:
        found.single_groups[column] = both[0]
    return 2 <= num_groups < len(known)


def _find_telling(found: Leakage, column: str, groups: np.ndarray, labels: np.ndarray) -> None:
    known = ~(pd.isna(groups) | pd.isna(labels))
    pairs = pd.DataFrame({"group": groups[known], "label": labels[known].astype(str)})
    counts = pairs.groupby(["group", "label"]).size()
    by_group = counts.groupby(level="group").max()
    if not 2 <= len(by_group) < len(pairs):
        return
    pure, majority = int(by_group.sum()), int(counts.groupby(level="label").sum().max())
    if pure >= TELLING_PURITY * len(pairs) and pure > majority:
        found.telling_columns[column] = {"purity": pure / len(pairs), "majority": majority / len(pairs)}


def _find_names(found: Leakage, train: pd.Index, test: pd.Index) -> None:
    """Note names on both sides; counters such as "17" or "cell17" name a row of their file, not a cell."""
    names = set(train.astype(str))
    shared = [name for name in test.astype(str) if name in names and not _COUNTER.fullmatch(name)]
    found.shared_names = len(shared)
    if any(_BARE_BARCODE.fullmatch(name) for name in shared):
        found.names_by_chance = len(train) * len(test) / NUM_BARCODES


def _equal_cells(train: ad.AnnData, test: ad.AnnData) -> int:
    """Number of test cells with the expression of a training cell."""
    if train.X is None or test.X is None:
        return 0
    shared = train.var_names[~train.var_names.duplicated(keep=False)]
    shared = shared.intersection(test.var_names[~test.var_names.duplicated(keep=False)], sort=False)
    if not len(shared):
        return 0
    seen = set(_row_digests(train, shared)) - {None}
    return sum(digest in seen for digest in _row_digests(test, shared))


def _row_digests(cells: ad.AnnData, genes: pd.Index, chunk_size: int = 1024) -> Iterator[bytes | None]:
    """Equal for rows with the same values of the genes; None for a row that expresses too few to tell."""
    columns = None if cells.var_names.equals(genes) else cells.var_names.get_indexer(genes)
    matrix = cells.X  # once: a view makes it anew whenever asked
    for start in range(0, cells.n_obs, chunk_size):
        # Single precision: the same logarithms may have been taken in either.
        chunk = sp.csr_matrix(matrix[start : start + chunk_size], dtype=np.float32)
        chunk = (chunk if columns is None else chunk[:, columns]).copy()
        chunk.sum_duplicates()
        chunk.eliminate_zeros()
        indices = chunk.indices.astype(np.int32, copy=False)
        for begin, end in zip(chunk.indptr[:-1], chunk.indptr[1:], strict=True):
            if end - begin < min(FEWEST_GENES_OF_EQUAL_CELLS, len(genes)):
                yield None
                continue
            digest = hashlib.blake2b(indices[begin:end].tobytes(), digest_size=16)
            digest.update(chunk.data[begin:end].tobytes())
            yield digest.digest()


def _group_columns(obs: pd.DataFrame, without: str | None) -> list[str]:
    """Columns of obs that are in `GROUP_COLUMNS`, in its order, but for the label."""
    by_name: dict[str, list[str]] = {}
    for column in obs:
        by_name.setdefault(str(column).lower(), []).append(column)
    return [column for name in GROUP_COLUMNS for column in by_name.get(name, ()) if column != without]


def _column(obs: pd.DataFrame, column: str) -> pd.Series:
    if column not in obs:
        raise ValueError(
            f"A column of obs is needed, got {column!r}. There are {', '.join(map(str, obs)) or 'none'}; name one."
        )
    return obs[column]


def _texts(values: Sequence, text: Callable[[Any], str] = str) -> pd.Series:
    """Values as text; None where one is missing."""
    categories = pd.Categorical(pd.Series(values).reset_index(drop=True))
    texts = np.array([*map(text, categories.categories), None], dtype=object)
    return pd.Series(texts[categories.codes])  # the code of a missing value is -1


def _known_groups(values: pd.Series) -> pd.Series:
    """Groups as text, None also where the text says that it is not known. 1.0 is 1: files differ in that."""
    texts = _texts(values, lambda value: str(int(value)) if _is_whole(value) else str(value))
    return texts.where(~texts.isin([text for text in texts.unique() if str(text).strip().lower() in _UNKNOWN]), None)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float | np.floating) and float(value).is_integer()


def _coded(values: Sequence, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Names in the order of the alphabet, and (cells,) indices into them."""
    texts = _texts(values)
    if texts.isna().any():
        raise ValueError(
            f"Every cell needs a {what}, got {int(texts.isna().sum()):,} of {len(texts):,} cells without. "
            "Leave these cells out."
        )
    return np.unique(texts.to_numpy().astype(str), return_inverse=True)
