"""Splits that keep a donor's cells on one side, and the guard that checks any split for it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp

from .sources import SplitSettings


TRAIN, VALIDATION, TEST, LEFT_OUT = range(4)
# Values of a split, (cells,) uint8, are indices into these.
PARTS = ("train", "validation", "test", "left out")
# Cells without a cancer are in no cancer type that can be held out.
NORMAL = "normal"
# A cohort's cells whose donor is not known may be of any of its donors.
UNKNOWN_DONOR = "?"


class LeakageError(ValueError):
    """Donors or equal cells are on both sides of a split."""


class SplitError(ValueError):
    """A corpus has too few groups for a split."""


@dataclass
class CellGroups:
    """What splits need to know of the cells of a corpus.

    Parameters
    ----------
    studies, cohorts, donors, cancer_types
        (cells,) int32, indices into the names below; -1 for a cell without a cancer type.
    content
        (cells,) uint64, equal for cells with the same genes and bins.
    names
        By field, its names; donors as cohort/donor, or cohort/? where no donor is known.
    """

    studies: np.ndarray
    cohorts: np.ndarray
    donors: np.ndarray
    cancer_types: np.ndarray
    content: np.ndarray
    names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.content)

    def grouped_donors(self) -> np.ndarray:
        """(cells,), donors as far as they can be told apart: a cohort with cells of unknown donors counts as one."""
        is_unknown = np.array([name.endswith(f"/{UNKNOWN_DONOR}") for name in self.names["donors"]], dtype=bool)
        unclear = np.zeros(len(self.names["cohorts"]), dtype=bool)
        unclear[self.cohorts[is_unknown[self.donors]]] = True
        return np.where(unclear[self.cohorts], len(is_unknown) + self.cohorts, self.donors)

    def donors_by_cancer_type(self) -> dict[str, int]:
        """Number of named donors by cancer type."""
        types = self.names["cancer_types"]
        pairs = np.unique(self.donors * np.int64(len(types) + 1) + self.cancer_types + 1)
        counts = dict.fromkeys(types, 0)
        for donor, kind in zip(
            (pairs // (len(types) + 1)).tolist(), (pairs % (len(types) + 1) - 1).tolist(), strict=True
        ):
            if kind >= 0 and not self.names["donors"][donor].endswith(f"/{UNKNOWN_DONOR}"):
                counts[types[kind]] += 1
        return counts

    def group_name(self, group: int) -> str:
        """What to call one of `grouped_donors`."""
        donors = self.names["donors"]
        return donors[group] if group < len(donors) else f"{self.names['cohorts'][group - len(donors)]}/*"


@dataclass
class Split:
    """A split of a corpus.

    Parameters
    ----------
    settings
        How it was made.
    parts
        (cells,) uint8, indices into `PARTS`.
    groups
        What was kept together, by part, names in the order of the alphabet; none for a split by cell.
    leaks
        What is on both sides because it was allowed.
    """

    settings: SplitSettings
    parts: np.ndarray
    groups: dict[str, list[str]]
    leaks: "Leaks"

    def cells(self) -> dict[str, int]:
        """Number of cells by part."""
        return dict(zip(PARTS, np.bincount(self.parts, minlength=len(PARTS)).tolist(), strict=True))


@dataclass
class Leaks:
    """What is on both sides of a split.

    Parameters
    ----------
    donors
        Names of donors with cells in several parts.
    duplicates
        Number of cells that have an equal in another part.
    examples
        Indices of two such cells, where there are any.
    """

    donors: list[str]
    duplicates: int
    examples: tuple[int, int] | None = None

    def require_none(self, settings: SplitSettings, name: str, describe=str) -> None:
        """Raise unless what leaks was asked for.

        Parameters
        ----------
        settings
            What is allowed.
        name
            The split's.
        describe
            From the index of a cell to what to call it.

        Raises
        ------
        LeakageError
            If donors or equal cells are on both sides that should not be.
        """
        if self.donors and settings.donors != "allow":
            raise LeakageError(
                f"A donor's cells must be on one side, got {len(self.donors):,} donors in several parts of the split "
                f"{name!r} ({', '.join(self.donors[:3])}). Split by donor, or ask for it with `donors: allow`."
            )
        if self.duplicates and settings.duplicates != "allow":
            first, second = map(describe, self.examples)
            raise LeakageError(
                f"Equal cells must be on one side, got {self.duplicates:,} cells with an equal in another part of the "
                f"split {name!r} (such as {first} and {second}). Take one of the files out, give studies that share "
                "cells the same `cohort`, leave the later ones out with `duplicates: leave_out`, or ask for them with "
                "`duplicates: allow`."
            )


def find_leaks(parts: np.ndarray, cells: CellGroups) -> Leaks:
    """What is on both sides of a split, whoever made it.

    Parameters
    ----------
    parts
        (cells,), indices into `PARTS`.
    cells
        The cells' donors and content.
    """
    used = np.flatnonzero(parts != LEFT_OUT)
    donors = cells.grouped_donors()[used]
    pairs = np.unique(donors * np.int64(len(PARTS)) + parts[used]) // len(PARTS)
    shared, how_many = np.unique(pairs, return_counts=True)
    names = sorted(cells.group_name(group) for group in shared[how_many > 1])

    order = used[np.argsort(cells.content[used], kind="stable")]
    content, part = cells.content[order], parts[order]
    starts = np.flatnonzero(np.append(True, content[1:] != content[:-1])) if len(order) else np.empty(0, dtype=np.int64)
    if not len(starts):
        return Leaks(names, 0)
    lowest, highest = np.minimum.reduceat(part, starts), np.maximum.reduceat(part, starts)
    leaking = np.flatnonzero(lowest != highest)
    sizes = np.diff(np.append(starts, len(order)))
    if not len(leaking):
        return Leaks(names, 0)
    group = order[starts[leaking[0]] : starts[leaking[0]] + sizes[leaking[0]]]
    other = group[np.argmax(parts[group] != parts[group[0]])]
    return Leaks(names, int(sizes[leaking].sum()), (int(group[0]), int(other)))


def make_split(cells: CellGroups, settings: SplitSettings, name: str = "", describe=str) -> Split:
    """Split the cells of a corpus, the same way whenever the corpus is the same.

    - by donor: whole donors, drawn within each cancer type, so that types of several donors are on both sides.
    - by study: whole cohorts, that is studies with whatever shares their donors.
    - by cancer_type: the test cells are of types that nothing was trained on. Their donors' other cells are left out.
    - by cell: any cell anywhere. Donors are then on both sides, which must be allowed.

    Parameters
    ----------
    cells
        What is known of them.
    settings
        How to split.
    name, describe
        What to call the split and a cell in an error.

    Raises
    ------
    SplitError
        If there are too few groups, or a name to hold out is not there.
    LeakageError
        If donors or equal cells end up on both sides and that was not asked for.
    """
    generator = np.random.default_rng([settings.seed, 0x50414E])
    if settings.by == "cell":
        draws = generator.random(len(cells))
        parts = np.full(len(cells), TRAIN, dtype=np.uint8)
        parts[draws < settings.test + settings.validation] = VALIDATION
        parts[draws < settings.test] = TEST
        groups = {}
    else:
        parts, groups = _BY[settings.by](cells, settings, generator)
    if settings.duplicates == "leave_out":
        _leave_out_duplicates(parts, cells)
    cells_in = np.bincount(parts, minlength=len(PARTS))
    if not (cells_in[TRAIN] and cells_in[TEST]):
        raise SplitError(
            f"A split needs cells to train and to test on, got {cells_in[TRAIN]:,} and {cells_in[TEST]:,} of "
            f"{len(cells):,} by {settings.by}. Hold out less or more, or add donors, studies or cancer types."
        )
    leaks = find_leaks(parts, cells)
    leaks.require_none(settings, name or settings.by, describe)
    return Split(settings, parts, groups, leaks)


def _by_donor(cells: CellGroups, settings: SplitSettings, generator) -> tuple[np.ndarray, dict]:
    groups, of_cell = np.unique(cells.grouped_donors(), return_inverse=True)
    names = [cells.group_name(group) for group in groups]
    sizes = np.bincount(of_cell, minlength=len(groups))
    types = _most_frequent(of_cell, cells.cancer_types, len(groups))
    chosen = _held_out(settings, names, "donors")
    if chosen is None:
        if len(groups) < 2:
            raise SplitError(f"A split by donor needs two donors or cohorts, got {', '.join(names)}. Add some.")
        part_of = np.full(len(groups), TRAIN, dtype=np.uint8)
        for kind in np.unique(types):
            members = np.flatnonzero(types == kind)
            part_of[members] = _assigned(sizes[members], settings, generator)
        if not (part_of == TEST).any():  # every type has one donor
            part_of = _assigned(sizes, settings, generator)
    else:
        part_of = _assigned(sizes, settings, generator, chosen)
    return part_of[of_cell], _named(part_of, names)


def _by_study(cells: CellGroups, settings: SplitSettings, generator) -> tuple[np.ndarray, dict]:
    cohorts, of_cell = np.unique(cells.cohorts, return_inverse=True)
    studies, first = np.unique(cells.studies, return_index=True)
    studies_of = {cohort: [] for cohort in cohorts.tolist()}
    for study, cohort in zip(studies, cells.cohorts[first].tolist(), strict=True):
        studies_of[cohort].append(cells.names["studies"][study])
    chosen = None
    if settings.held_out is not None:
        known = [study for studies in studies_of.values() for study in studies]
        _held_out(settings, known, "studies")
        chosen = np.array([bool(set(studies) & set(settings.held_out)) for studies in studies_of.values()])
    if len(cohorts) < 2:
        raise SplitError(f"A split by study needs two that share no donors, got {len(cohorts)}. Add some.")
    part_of = _assigned(np.bincount(of_cell, minlength=len(cohorts)), settings, generator, chosen)
    groups = {part: [] for part in PARTS[:3]}
    for part, studies in zip(part_of, studies_of.values(), strict=True):
        groups[PARTS[part]] += studies
    return part_of[of_cell], {part: sorted(names) for part, names in groups.items()}


def _by_cancer_type(cells: CellGroups, settings: SplitSettings, generator) -> tuple[np.ndarray, dict]:
    types, sizes = np.unique(cells.cancer_types[cells.cancer_types >= 0], return_counts=True)
    is_cancer = np.array([cells.names["cancer_types"][kind] != NORMAL for kind in types], dtype=bool)
    types, sizes = types[is_cancer], sizes[is_cancer]
    names = [cells.names["cancer_types"][kind] for kind in types]
    if len(types) < 2:
        raise SplitError(f"A split by cancer type needs two of them, got {', '.join(names) or 'none'}. Add some.")
    part_of = _assigned(sizes, settings, generator, _held_out(settings, names, "cancer types"))
    part_of_type = np.full(len(cells.names["cancer_types"]) + 1, TRAIN, dtype=np.uint8)
    part_of_type[types] = part_of
    wanted = part_of_type[cells.cancer_types]  # -1, no type, is the last
    # A donor goes where its held-out cells go; what else is of it is seen on neither side.
    donors = cells.grouped_donors()
    part_of_donor = np.zeros(donors.max() + 1, dtype=np.uint8)
    np.maximum.at(part_of_donor, donors, wanted)
    # Neither are cells without a type, which may be of one that is held out.
    is_in = (wanted == part_of_donor[donors]) & (cells.cancer_types >= 0)
    parts = np.where(is_in, wanted, LEFT_OUT).astype(np.uint8)
    return parts, _named(part_of, names)


_BY = {"donor": _by_donor, "study": _by_study, "cancer_type": _by_cancer_type}


def _held_out(settings: SplitSettings, names: Sequence[str], what: str) -> np.ndarray | None:
    """(groups,), which of them to test on; None where that is to be drawn."""
    if settings.held_out is None:
        return None
    unknown = sorted(set(settings.held_out) - set(names))
    if unknown:
        raise SplitError(
            f"`held_out` names {what} of the corpus, got {', '.join(unknown[:3])}; it has {', '.join(names[:20])}"
            f"{', ...' if len(names) > 20 else ''}. Name some of these."
        )
    return np.isin(names, settings.held_out)


def _assigned(sizes: np.ndarray, settings: SplitSettings, generator, held_out: np.ndarray | None = None) -> np.ndarray:
    """(groups,), the part of each: shares of the cells come as near to those asked for as whole groups allow.

    Groups are drawn in random order. Test takes those that fit into what it still lacks, then validation, and train
    the rest; where none fits, one of two groups goes to test and one of three to validation, among the smallest.
    """
    order = generator.permutation(len(sizes))
    part_of = np.full(len(sizes), TRAIN, dtype=np.uint8)
    is_free = np.ones(len(sizes), dtype=bool)
    if held_out is not None:
        part_of[held_out], is_free = TEST, ~held_out
    shares = {TEST: settings.test, VALIDATION: settings.validation}
    for part, min_groups in ((TEST, 2), (VALIDATION, 3)):
        if not shares[part] or (part == TEST and held_out is not None):
            continue
        lacking = wanted = shares[part] * sizes.sum()
        free = order[is_free[order]]
        for group in free:
            if is_free.sum() > 1 and sizes[group] <= lacking + 0.1 * wanted:
                part_of[group], is_free[group] = part, False
                lacking -= sizes[group]
        if lacking == wanted and len(sizes) >= min_groups and is_free.sum() > 1:
            small = free[sizes[free] <= 2 * sizes[free].min()][0]
            part_of[small], is_free[small] = part, False
    return part_of


def _most_frequent(groups: np.ndarray, kinds: np.ndarray, num_groups: int) -> np.ndarray:
    """(groups,), the kind that most of a group's members are of, the first of equals; -1 is a kind too."""
    num_kinds = int(kinds.max(initial=-1)) + 2
    pairs, counts = np.unique(groups * np.int64(num_kinds) + kinds + 1, return_counts=True)
    order = np.lexsort((pairs, -counts))
    most = np.full(num_groups, -1, dtype=np.int64)
    group_of = pairs[order] // num_kinds
    first = np.unique(group_of, return_index=True)[1]
    most[group_of[first]] = pairs[order][first] % num_kinds - 1
    return most


def _named(part_of: np.ndarray, names: Sequence[str]) -> dict[str, list[str]]:
    return {
        PARTS[part]: sorted(name for name, its in zip(names, part_of, strict=True) if its == part)
        for part in (TRAIN, VALIDATION, TEST)
    }


def _leave_out_duplicates(parts: np.ndarray, cells: CellGroups) -> None:
    """Of equal cells in several parts, leave out those that are not in the part of the first."""
    used = np.flatnonzero(parts != LEFT_OUT)
    order = used[np.argsort(cells.content[used], kind="stable")]
    content = cells.content[order]
    is_first = np.append(True, content[1:] != content[:-1]) if len(order) else np.empty(0, dtype=bool)
    first = order[is_first][np.cumsum(is_first) - 1]
    parts[order[parts[order] != parts[first]]] = LEFT_OUT


def shared_barcodes(cohorts: np.ndarray, barcodes: np.ndarray, names: Sequence[str]) -> list[str]:
    """Cohorts whose cells have more barcodes in common than chance gives, a line each: they may be the same cells.

    Equal content does not show cells of which two files hold other genes; their barcodes do. By chance two cohorts
    share about the product of their sizes over the 737,000 barcodes of 10x's older whitelist; noted is what is five
    times that and a twentieth of the smaller one.

    Parameters
    ----------
    cohorts
        (cells,), indices into ``names``.
    barcodes
        (cells,) uint64, hashes of barcodes; 0 where a cell's name holds none.
    names
        The cohorts'.
    """
    # Barcode and cohort in one number each, which sorts in place: 48 bits of the hash keep chance hits to a handful.
    keys = (barcodes << np.uint64(16)) | cohorts.astype(np.uint64)
    keys = np.unique(keys[barcodes != 0])
    cohort_of = (keys & np.uint64(0xFFFF)).astype(np.int64)
    sizes = np.bincount(cohort_of, minlength=len(names))
    row = np.cumsum(np.append(True, keys[1:] >> np.uint64(16) != keys[:-1] >> np.uint64(16)))[: len(keys)]
    occurs = sp.csr_matrix((np.ones(len(keys), np.int64), (row, cohort_of)), shape=(len(keys) + 1, len(names)))
    both = sp.triu(occurs.T @ occurs, k=1).tocoo()
    shared = dict(zip(zip(both.row.tolist(), both.col.tolist(), strict=True), both.data.tolist(), strict=True))
    lines = []
    for (first, second), count in sorted(shared.items()):
        smaller, by_chance = min(sizes[first], sizes[second]), sizes[first] * sizes[second] / 737_000
        if count > max(5 * by_chance, 0.05 * smaller, 5):
            lines.append(
                f"{names[first]} and {names[second]} share {count:,} barcodes, {count / smaller:.0%} of the smaller "
                "one's: if they are the same cells, give their studies the same `cohort`"
            )
    return lines
