"""Splits: what may never be on both sides, how near the shares come, and the guard against a plain reference."""

import itertools
import re
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panfoma_hf.data.corpus.sources import SplitSettings
from panfoma_hf.data.corpus.splits import (
    LEFT_OUT,
    PARTS,
    TEST,
    TRAIN,
    VALIDATION,
    CellGroups,
    LeakageError,
    SplitError,
    find_leaks,
    make_split,
    shared_barcodes,
)


WHITELIST = 737_000


def groups_of(rows: list[tuple], content=None) -> CellGroups:
    """Cells as rows of (study, cohort, donor or None, cancer type or None); all different where no content is given."""
    studies, cohorts, donors, types = zip(*rows, strict=True)
    donors = [f"{cohort}/{'?' if donor is None else donor}" for cohort, donor in zip(cohorts, donors, strict=True)]
    names = {
        key: sorted({word for word in words if word is not None})
        for key, words in (("studies", studies), ("cohorts", cohorts), ("donors", donors), ("cancer_types", types))
    }
    codes = []
    for words, known in zip((studies, cohorts, donors, types), names.values(), strict=True):
        place = {word: index for index, word in enumerate(known)}
        codes.append(np.array([place.get(word, -1) for word in words], dtype=np.int32))
    content = np.arange(len(rows)) if content is None else content
    return CellGroups(*codes, np.asarray(content, dtype=np.uint64), names)


def merged_donors(rows: list[tuple]) -> list[tuple]:
    """Who each cell is of, a cohort with an unknown donor being one: the reference of `grouped_donors`."""
    unclear = {cohort for _, cohort, donor, _ in rows if donor is None}
    return [(cohort, None) if cohort in unclear else (cohort, donor) for _, cohort, donor, _ in rows]


def parts_of(keys, parts) -> dict:
    """By key, the parts that its cells are in, left out ones aside."""
    found = defaultdict(set)
    for key, part in zip(keys, parts.tolist(), strict=True):
        if part != LEFT_OUT:
            found[key].add(part)
    return found


def random_rows(seed: int, num_donors: int = 60, max_cells: int = 20, types=("x", "y", "z", "normal", None)) -> list:
    """Donors of six cohorts and seven studies, one type each."""
    rng = np.random.default_rng(seed)
    rows = []
    for donor in range(num_donors):
        cohort = int(rng.integers(6))
        study = f"s{cohort}" if cohort or rng.random() < 0.5 else "s0b"
        rows += [(study, f"c{cohort}", str(donor), types[rng.integers(len(types))])] * int(rng.integers(1, max_cells))
    return [rows[index] for index in rng.permutation(len(rows))]


@st.composite
def any_rows(draw) -> list[tuple]:
    """A few donors of few cohorts, which share studies or not, some unknown, of any cancer types."""
    rows = []
    for _ in range(draw(st.integers(1, 10))):
        cohort = draw(st.sampled_from("abcd"))
        study = cohort + draw(st.sampled_from("12"))
        donor = draw(st.sampled_from(["1", "2", "3", "4", None]))
        types = draw(st.lists(st.sampled_from(["x", "y", "z", "normal", None]), min_size=1, max_size=2))
        rows += [(study, cohort, donor, types[index % len(types)]) for index in range(draw(st.integers(1, 6)))]
    return rows


shares = st.sampled_from([(0.1, 0.1), (0.0, 0.2), (0.3, 0.5), (0.05, 0.01)])


# -- nobody on both sides --------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(any_rows(), st.sampled_from(["donor", "study", "cancer_type"]), shares, st.integers(0, 3))
def test_no_donor_is_in_two_parts_and_only_too_few_groups_are_an_error(rows, by, share, seed):
    cells, donors = groups_of(rows), merged_donors(rows)
    asked = SplitSettings(by=by, validation=share[0], test=share[1], seed=seed)
    types = {kind for *_, kind in rows} - {"normal", None}
    groups = {"donor": set(donors), "study": {row[1] for row in rows}, "cancer_type": types}[by]
    try:
        split = make_split(cells, asked)
    except SplitError:
        types_of = defaultdict(set)
        for donor, row in zip(donors, rows, strict=True):
            types_of[donor].add(row[3])
        # Where donors have several types, those of the other types may all be left out.
        assert len(groups) < 2 or (by == "cancer_type" and any(len(kinds) > 1 for kinds in types_of.values()))
        return
    assert len(groups) >= 2
    assert all(len(parts) == 1 for parts in parts_of(donors, split.parts).values())
    assert split.leaks.donors == []
    assert min(split.cells()["train"], split.cells()["test"]) > 0
    assert (split.parts != LEFT_OUT).all() or by == "cancer_type"
    if not share[0]:
        assert split.cells()["validation"] == 0
    if by == "study":
        cohorts = parts_of([row[1] for row in rows], split.parts)
        assert all(len(parts) == 1 for parts in cohorts.values())


@pytest.mark.parametrize("by", ["donor", "study"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_say_what_is_in_each_part(by, seed):
    rows = [*random_rows(seed), *[("s6", "c6", None, "x"), ("s6", "c6", "1", "y")] * 5]
    split = make_split(groups_of(rows), SplitSettings(by=by, seed=seed))
    found = {part: set() for part in PARTS[:3]}
    for (study, *_), (cohort, donor), part in zip(rows, merged_donors(rows), split.parts.tolist(), strict=True):
        found[PARTS[part]].add(study if by == "study" else f"{cohort}/{'*' if donor is None else donor}")
    assert split.groups == {part: sorted(names) for part, names in found.items()}
    assert split.cells() == {
        name: int((split.parts == index).sum())
        for index, name in enumerate(("train", "validation", "test", "left out"))
    }


def test_a_cohort_with_an_unknown_donor_stays_together():
    rows = [("a", "a", donor, "x") for donor in ["1", "2", "3", None] for _ in range(5)]
    rows += [("b", "b", str(donor), "x") for donor in range(12) for _ in range(5)]
    cells = groups_of(rows)
    sides = set()
    for seed in range(20):
        split = make_split(cells, SplitSettings(by="donor", test=0.4, seed=seed))
        assert len(set(split.parts[:20].tolist())) == 1
        assert len(set(split.parts[20:].tolist())) > 1
        sides.add(int(split.parts[0]))
        assert sum("a/*" in names for names in split.groups.values()) == 1
    assert len(sides) > 1  # it is drawn as others are


def test_donors_of_the_same_name_in_two_cohorts_are_two():
    rows = [("a", "a", "1", "x")] * 5 + [("b", "b", "1", "x")] * 5
    split = make_split(groups_of(rows), SplitSettings(by="donor"))
    assert {split.groups["train"][0], split.groups["test"][0]} == {"a/1", "b/1"}


def test_studies_of_one_cohort_stay_together():
    rows = [(study, "ab" if study in "ab" else study, None, "x") for study in "abcde" for _ in range(10)]
    for seed in range(10):
        split = make_split(groups_of(rows), SplitSettings(by="study", test=0.3, seed=seed))
        part = {study: PARTS[split.parts[index * 10]] for index, study in enumerate("abcde")}
        assert part["a"] == part["b"]
        assert all(part[study] == name for name, studies in split.groups.items() for study in studies)


def test_known_donors_are_counted_by_cancer_type():
    rows = [("a", "a", "1", "x"), ("a", "a", "1", "x"), ("a", "a", "2", "x"), ("a", "a", None, "x")]
    rows += [("b", "b", "1", "y"), ("b", "b", "1", "x"), ("b", "b", None, "normal"), ("b", "b", "2", None)]
    assert groups_of(rows).donors_by_cancer_type() == {"x": 3, "y": 1, "normal": 0}


# -- seeds and shares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["donor", "study", "cancer_type", "cell"])
def test_the_same_seed_gives_the_same_split_and_another_one_another(by):
    # Twelve groups of a size and kind: which of them it is must be drawn.
    rows = [(f"s{donor}", f"s{donor}", str(donor), f"t{donor % 12}") for donor in range(144) for _ in range(3)]

    def parts(seed):
        asked = SplitSettings(by=by, test=0.3, validation=0.2, seed=seed, donors="allow" if by == "cell" else "error")
        return make_split(groups_of(rows), asked).parts.tolist()

    assert parts(0) == parts(0)
    assert len({tuple(parts(seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("by", ["donor", "study", "cancer_type"])
@pytest.mark.parametrize(("validation", "test"), [(0.1, 0.1), (0.25, 0.15), (0, 0.3)], ids=["even", "more", "none"])
def test_of_many_small_groups_the_shares_are_near_those_asked_for(validation, test, by, seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 12, 300)
    rows = [
        (f"s{group}", f"s{group}", str(group), f"t{group}" if by == "cancer_type" else "x")
        for group, size in enumerate(sizes)
        for _ in range(size)
    ]
    split = make_split(groups_of(rows), SplitSettings(by=by, validation=validation, test=test, seed=seed))
    # A group is taken where it takes a part to at most 1.1 of its share, so of the groups left to train the smallest
    # would have taken it beyond; the largest group bounds what is missing.
    for part, share in (("test", test), ("validation", validation)):
        wanted = share * len(rows)
        assert split.cells()[part] <= 1.1 * wanted
        assert split.cells()[part] > 1.1 * wanted - sizes.max() or not share
    assert split.cells()["left out"] == 0


@pytest.mark.parametrize("seed", range(3))
def test_by_donor_each_cancer_type_has_its_share(seed):
    rng = np.random.default_rng(seed)
    rows = [
        ("s", "s", f"{kind}{donor}", kind) for kind in "xyz" for donor in range(80) for _ in range(rng.integers(1, 6))
    ]
    split = make_split(groups_of(rows), SplitSettings(by="donor", test=0.2, seed=seed))
    for kind in "xyz":
        of_kind = np.array([row[3] == kind for row in rows])
        in_test = (split.parts[of_kind] == TEST).sum()
        assert 1.1 * 0.2 * of_kind.sum() - 5 < in_test <= 1.1 * 0.2 * of_kind.sum()


def test_by_cell_the_shares_are_those_of_chance():
    rows = [("s", "s", str(cell), "x") for cell in range(20_000)]
    split = make_split(groups_of(rows), SplitSettings(by="cell", validation=0.2, test=0.1))
    for part, share in (("test", 0.1), ("validation", 0.2), ("train", 0.7)):
        deviation = np.sqrt(20_000 * share * (1 - share))
        assert abs(split.cells()[part] - 20_000 * share) < 5 * deviation
    assert split.groups == {}


@pytest.mark.parametrize("seed", range(5))
def test_types_with_several_donors_are_on_both_sides_by_donor(seed):
    rng = np.random.default_rng(seed)
    rows = [
        ("s", "s", f"{kind}{donor}", kind)
        for kind, donors in (("x", 2), ("y", 3), ("z", 7), ("normal", 2), (None, 2), ("alone", 1))
        for donor in range(donors)
        for _ in range(rng.integers(1, 30))
    ]
    split = make_split(groups_of(rows), SplitSettings(by="donor", seed=seed))
    parts = parts_of([row[3] for row in rows], split.parts)
    assert all({TRAIN, TEST} <= parts[kind] for kind in ("x", "y", "z", "normal", None))
    assert all(VALIDATION in parts[kind] for kind in ("y", "z"))
    assert parts["alone"] == {TRAIN}


def test_where_each_type_has_one_donor_donors_are_drawn_from_all():
    rows = [("s", "s", str(donor), f"t{donor}") for donor in range(10) for _ in range(10)]
    split = make_split(groups_of(rows), SplitSettings(by="donor"))
    assert split.cells() == {"train": 80, "validation": 10, "test": 10, "left out": 0}


# -- cancer types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_cancer_types_held_out_and_their_donors_other_cells_are_not_in_train(seed):
    rng = np.random.default_rng(seed)
    rows = [
        ("s", f"c{donor % 3}", None if donor % 13 == 0 and donor % 3 == 0 else str(donor), kind)
        for donor in range(60)
        for kind in rng.choice(["t1", "t2", "t3", "t4", "t5", "t6", "normal", None], rng.integers(1, 3), replace=False)
        for _ in range(rng.integers(1, 8))
    ]
    split = make_split(groups_of(rows), SplitSettings(by="cancer_type", test=0.2, validation=0.2, seed=seed))
    part_of_type = {kind: PARTS.index(part) for part, kinds in split.groups.items() for kind in kinds}
    assert set(part_of_type) == {"t1", "t2", "t3", "t4", "t5", "t6"}
    assert {TEST, VALIDATION} <= set(part_of_type.values())
    wanted = [part_of_type.get(kind, TRAIN) for *_, kind in rows]
    of_donor = defaultdict(lambda: TRAIN)
    for donor, part in zip(merged_donors(rows), wanted, strict=True):
        of_donor[donor] = max(of_donor[donor], part)  # test before validation before train
    expected = [
        part if part == of_donor[donor] and kind is not None else LEFT_OUT
        for donor, part, (*_, kind) in zip(merged_donors(rows), wanted, rows, strict=True)
    ]
    assert split.parts.tolist() == expected
    assert split.cells()["left out"] > 0


def test_normal_is_never_held_out():
    rows = [("s", "s", kind, kind) for kind in ("normal", "x", "y", "z") for _ in range(10)]
    for seed in range(20):
        split = make_split(groups_of(rows), SplitSettings(by="cancer_type", test=0.3, seed=seed))
        assert set(split.parts[:10].tolist()) == {TRAIN}
        assert not any("normal" in names for names in split.groups.values())
    with pytest.raises(SplitError, match="cancer types of the corpus, got normal; it has x, y, z"):
        make_split(groups_of(rows), SplitSettings(by="cancer_type", held_out=["normal"]))


def test_cells_without_a_cancer_type_may_be_of_one_that_is_held_out():
    rows = [("s", "s", str(donor), kind) for donor, kind in enumerate([None, "x", "y", "z"]) for _ in range(5)]
    split = make_split(groups_of(rows), SplitSettings(by="cancer_type", held_out=["z"], validation=0))
    assert split.parts.tolist() == [LEFT_OUT] * 5 + [TRAIN] * 10 + [TEST] * 5


# -- held out by name ------------------------------------------------------------------------------------------------

NAMED = [
    *[("a1", "a", "1", "x")] * 4,
    *[("a2", "a", "2", "y")] * 4,
    *[("b", "b", None, "z")] * 4,
    *[("b", "b", "1", "x")] * 4,
    *[("d", "d", "1", "normal")] * 4,
    *[("e", "e", "1", "z")] * 4,
]


@pytest.mark.parametrize(
    ("by", "held_out", "expected"),
    [
        pytest.param("donor", ["a/1"], [1, 0, 0, 0, 0, 0], id="a_donor"),
        pytest.param("donor", ["a/2", "b/*"], [0, 1, 1, 1, 0, 0], id="donors_and_a_cohort"),
        pytest.param("study", ["d"], [0, 0, 0, 0, 1, 0], id="a_study"),
        pytest.param("study", ["a1"], [1, 1, 0, 0, 0, 0], id="a_study_with_its_cohort"),
        pytest.param("cancer_type", ["y"], [0, 1, 0, 0, 0, 0], id="a_type"),
        pytest.param("cancer_type", ["x", "y"], [1, 1, None, 1, 0, 0], id="types"),
    ],
)
def test_what_is_held_out_by_name_is_tested_on_and_nothing_else(by, held_out, expected):
    for seed in range(5):
        # The donors of a type to validate on would be left out too.
        validation = 0 if by == "cancer_type" else 0.3
        asked = SplitSettings(by=by, held_out=held_out, seed=seed, validation=validation, test=0.05)
        parts = make_split(groups_of(NAMED), asked).parts.reshape(-1, 4)
        assert (parts == parts[:, :1]).all()
        assert [None if part == LEFT_OUT else int(part == TEST) for part in parts[:, 0].tolist()] == expected
        assert (VALIDATION in parts) == (validation > 0)


@pytest.mark.parametrize(
    ("by", "held_out", "message"),
    [
        pytest.param(
            "donor", ["a/1", "1", "a/9"], "donors of the corpus, got 1, a/9; it has a/1, a/2, d/1", id="donor"
        ),
        pytest.param("donor", ["b/1"], "got b/1; it has", id="donor_of_an_unclear_cohort"),
        pytest.param("study", ["a"], "studies of the corpus, got a; it has a1, a2, b, d, e.", id="cohort_for_study"),
        pytest.param("cancer_type", ["w"], "cancer types of the corpus, got w; it has x, y, z.", id="type"),
    ],
)
def test_unknown_names_to_hold_out_are_an_error_that_shows_the_known_ones(by, held_out, message):
    with pytest.raises(SplitError, match=re.escape(message)):
        make_split(groups_of(NAMED), SplitSettings(by=by, held_out=held_out))


def test_of_many_known_names_the_first_twenty_are_shown():
    rows = [("s", "s", f"{donor:02}", "x") for donor in range(30)]
    with pytest.raises(SplitError, match=r"s/18, s/19, \.\.\.\. Name some"):
        make_split(groups_of(rows), SplitSettings(by="donor", held_out=["s/99"]))


# -- too few ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "rows", "message"),
    [
        pytest.param("donor", [("a", "a", "1", "x")] * 9, "needs two donors or cohorts, got a/1", id="one_donor"),
        pytest.param(
            "donor",
            [("a", "a", "1", "x"), ("a", "a", None, "x")],
            r"two donors or cohorts, got a/\*",
            id="unclear_cohort",
        ),
        pytest.param(
            "study", [("a", "ab", "1", "x"), ("b", "ab", "2", "x")], "two that share no donors, got 1", id="one_cohort"
        ),
        pytest.param(
            "cancer_type", [("a", "a", "1", "x"), ("a", "a", "2", "normal")], "needs two of them, got x", id="one_type"
        ),
        pytest.param("cancer_type", [("a", "a", "1", None)] * 3, "needs two of them, got none", id="no_type"),
    ],
)
def test_too_few_groups_are_an_error(by, rows, message):
    with pytest.raises(SplitError, match=message):
        make_split(groups_of(rows), SplitSettings(by=by))


@pytest.mark.parametrize(
    ("by", "held_out", "got"),
    [
        pytest.param("study", ["a1", "b", "d", "e"], "got 0 and 24 of 24 by study", id="all"),
        pytest.param("donor", [], "got 16 and 0 of 24 by donor", id="none"),
    ],
)
def test_a_split_without_a_side_is_an_error(by, held_out, got):
    with pytest.raises(SplitError, match=got):
        make_split(groups_of(NAMED), SplitSettings(by=by, held_out=held_out))


# -- the guard -------------------------------------------------------------------------------------------------------


def test_by_cell_donors_on_both_sides_are_an_error_that_names_them_unless_allowed():
    rows = [("a", "a", str(donor), "x") for donor in range(5) for _ in range(40)] + [("b", "b", "once", "x")]
    with pytest.raises(LeakageError) as caught:
        make_split(groups_of(rows), SplitSettings(by="cell"), name="mine")
    message = str(caught.value)
    assert "got 5 donors in several parts of the split 'mine' (a/0, a/1, a/2)" in message
    assert "`donors: allow`" in message
    allowed = make_split(groups_of(rows), SplitSettings(by="cell", donors="allow"))
    assert allowed.leaks.donors == [f"a/{donor}" for donor in range(5)]
    assert allowed.leaks.duplicates == 0


# Cells 1 and 6 are equal and in two studies, of which the second is tested on; 2, 3 and 4 are equal and in the first,
# 8 and 9 and in the second.
TWICE = [("a", "a", "1", "x")] * 5 + [("b", "b", "1", "x")] * 5
TWICE_CONTENT = [10, 11, 12, 12, 12, 13, 11, 14, 15, 15]


def by_study(**options) -> SplitSettings:
    return SplitSettings(by="study", held_out=["b"], validation=0, **options)


@pytest.mark.parametrize("duplicates", [None, "error"], ids=["by_default", "asked_for"])
def test_equal_cells_on_both_sides_are_an_error_that_names_two(duplicates):
    with pytest.raises(LeakageError) as caught:
        make_split(
            groups_of(TWICE, TWICE_CONTENT), by_study(duplicates=duplicates), "mine", lambda cell: f"cell {cell}"
        )
    message = str(caught.value)
    assert "got 2 cells with an equal in another part of the split 'mine' (such as cell 1 and cell 6)" in message
    assert "`duplicates: leave_out`" in message
    assert "the same `cohort`" in message


def test_equal_cells_on_both_sides_can_be_allowed_and_are_counted():
    split = make_split(groups_of(TWICE, TWICE_CONTENT), by_study(duplicates="allow"))
    assert (split.leaks.duplicates, split.leaks.examples, split.leaks.donors) == (2, (1, 6), [])
    assert split.parts.tolist() == [TRAIN] * 5 + [TEST] * 5


def test_of_equal_cells_on_both_sides_those_of_the_firsts_side_are_kept():
    split = make_split(groups_of(TWICE, TWICE_CONTENT), by_study(duplicates="leave_out"))
    assert split.parts.tolist() == [TRAIN] * 5 + [TEST, LEFT_OUT, TEST, TEST, TEST]
    assert split.leaks.duplicates == 0
    turned = make_split(groups_of(TWICE[::-1], TWICE_CONTENT[::-1]), by_study(duplicates="leave_out"))
    assert turned.parts.tolist() == [TEST] * 5 + [TRAIN, TRAIN, TRAIN, LEFT_OUT, TRAIN]


def test_equal_cells_of_one_part_are_no_leak():
    content = [value if cell != 6 else 16 for cell, value in enumerate(TWICE_CONTENT)]
    split = make_split(groups_of(TWICE, content), by_study())
    assert (split.leaks.duplicates, split.leaks.examples) == (0, None)


def test_equal_cells_of_which_the_others_are_left_out_already_are_no_leak():
    rows = [("s", "s", "1", "normal"), ("s", "s", "1", "x"), ("s", "s", "2", "y"), ("s", "s", "3", "y")]
    split = make_split(groups_of(rows, [5, 5, 6, 7]), SplitSettings(by="cancer_type", held_out=["x"], validation=0))
    assert split.parts.tolist() == [LEFT_OUT, TEST, TRAIN, TRAIN]


def test_a_split_of_which_a_side_is_all_duplicates_is_an_error():
    with pytest.raises(SplitError):
        make_split(groups_of(TWICE, [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]), by_study(duplicates="leave_out"))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_out_for_duplicates_is_what_a_walk_over_the_cells_leaves_out(seed):
    rows = random_rows(seed, num_donors=40)
    content = np.random.default_rng(seed).integers(0, 400, len(rows))
    cells = groups_of(rows, content)
    options = {"by": "cancer_type", "test": 0.3, "validation": 0.1, "seed": seed}
    before = make_split(cells, SplitSettings(**options, duplicates="allow")).parts.tolist()
    first, expected = {}, []
    for part, value in zip(before, content.tolist(), strict=True):
        if part != LEFT_OUT:
            part = part if first.setdefault(value, part) == part else LEFT_OUT
        expected.append(part)
    assert expected != before
    assert make_split(cells, SplitSettings(**options, duplicates="leave_out")).parts.tolist() == expected


@settings(max_examples=200, deadline=None)
@given(any_rows(), st.data())
def test_leaks_are_those_of_a_plain_reference(rows, data):
    cell = st.tuples(st.integers(0, 3), st.integers(0, 30) | st.just(2**64 - 1))
    drawn = data.draw(st.lists(cell, min_size=len(rows), max_size=len(rows)))
    parts = np.array([part for part, _ in drawn], dtype=np.uint8)
    content = [value for _, value in drawn]
    leaks = find_leaks(parts, groups_of(rows, np.array(content, dtype=np.uint64)))
    donors = parts_of(merged_donors(rows), parts)
    assert leaks.donors == sorted(
        f"{cohort}/{'*' if donor is None else donor}" for (cohort, donor), its in donors.items() if len(its) > 1
    )
    by_content = parts_of(content, parts)
    leaking = [len(by_content[value]) > 1 and part != LEFT_OUT for part, value in drawn]
    assert leaks.duplicates == sum(leaking)
    if leaks.examples is None:
        assert not any(leaking)
    else:
        first, second = leaks.examples
        assert content[first] == content[second]
        assert LEFT_OUT not in (parts[first], parts[second])
        assert parts[first] != parts[second]


@pytest.mark.parametrize("seed", range(3))
def test_leaks_of_many_cells_are_those_of_a_plain_reference(seed):
    rows = random_rows(seed, num_donors=150)
    rng = np.random.default_rng(seed)
    parts = rng.choice([TRAIN, VALIDATION, TEST, LEFT_OUT], len(rows)).astype(np.uint8)
    content = rng.integers(0, 2**63, len(rows), dtype=np.uint64)
    content[rng.random(len(rows)) < 0.1] = content[0]
    content[:200] = content[200:400]
    leaks = find_leaks(parts, groups_of(rows, content))
    by_content = parts_of(content.tolist(), parts)
    used = parts != LEFT_OUT
    assert leaks.duplicates == sum(len(by_content[value]) > 1 for value in content[used].tolist()) > 0
    donors = parts_of(merged_donors(rows), parts)
    assert len(leaks.donors) == sum(len(its) > 1 for its in donors.values()) > 0


def test_where_all_cells_are_left_out_nothing_leaks():
    leaks = find_leaks(np.full(len(TWICE), LEFT_OUT, dtype=np.uint8), groups_of(TWICE, TWICE_CONTENT))
    assert (leaks.donors, leaks.duplicates, leaks.examples) == ([], 0, None)


# -- barcodes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whitelist() -> np.ndarray:
    """Hashes of as many barcodes as 10x's older list has."""
    return np.random.default_rng(0).integers(1, 2**64 - 1, WHITELIST, dtype=np.uint64)


def drawn_barcodes(whitelist, sizes: list[int], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.choice(whitelist, size, replace=False) for size in sizes]


def in_one(cohorts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Codes of cohorts and barcodes of all cells, shuffled."""
    codes = np.repeat(np.arange(len(cohorts), dtype=np.int32), [len(its) for its in cohorts])
    order = np.random.default_rng(9).permutation(len(codes))
    return codes[order], np.concatenate(cohorts)[order]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([8000, 5000, 3000], id="large"),
        pytest.param([60_000, 20_000], id="so_large_that_chance_gives_a_twentieth"),
        pytest.param([20_000, 300], id="uneven"),
        pytest.param([60, 40], id="small"),
    ],
)
def test_barcodes_shared_by_chance_are_not_told(sizes, seed, whitelist):
    cohorts = drawn_barcodes(whitelist, sizes, seed)
    if min(sizes) > 100:
        assert all(len(np.intersect1d(*pair)) > 0 for pair in itertools.combinations(cohorts, 2))
    assert shared_barcodes(*in_one(cohorts), ["a", "b", "c"][: len(sizes)]) == []


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_cohorts_that_share_cells_are_told_with_how_many(share, whitelist):
    cohorts = drawn_barcodes(whitelist, [5000, 3000, 4000], 1)
    shared = int(3000 * share)
    cohorts[1][:shared] = cohorts[2][:shared]
    cohorts[1] = np.append(cohorts[1], cohorts[1][:100])  # a barcode that stands twice in a cohort counts once
    count, size = len(np.intersect1d(cohorts[1], cohorts[2])), len(np.unique(cohorts[1]))
    assert count >= shared
    lines = shared_barcodes(*in_one(cohorts), ["first", "second", "third"])
    assert len(lines) == 1
    assert lines[0].startswith(f"second and third share {count:,} barcodes, {count / size:.0%} of the smaller one's")
    assert "the same `cohort`" in lines[0]


@pytest.mark.parametrize(("shared", "is_told"), [(5, False), (6, True)], ids=["five", "six"])
def test_a_handful_of_barcodes_is_not_told_whatever_its_share(shared, is_told, whitelist):
    cohorts = [whitelist[:40], whitelist[40 - shared : 80]]
    assert len(shared_barcodes(*in_one(cohorts), ["a", "b"])) == is_told


def test_every_pair_of_three_cohorts_with_the_same_cells_is_told(whitelist):
    (barcodes,) = drawn_barcodes(whitelist, [500], 2)
    lines = shared_barcodes(*in_one([barcodes] * 3), ["a", "b", "c"])
    assert [line.split(" share ")[0] for line in lines] == ["a and b", "a and c", "b and c"]
    assert all("500 barcodes, 100%" in line for line in lines)


def test_cells_without_a_barcode_share_none(whitelist):
    none = np.zeros(500, dtype=np.uint64)
    assert shared_barcodes(*in_one([none, none]), ["a", "b"]) == []
    (barcodes,) = drawn_barcodes(whitelist, [400], 3)
    assert shared_barcodes(*in_one([np.append(none, barcodes), none]), ["a", "b"]) == []
    lines = shared_barcodes(*in_one([np.append(none, barcodes), np.append(none, barcodes)]), ["a", "b"])
    assert len(lines) == 1
    assert "400 barcodes, 100% of the smaller" in lines[0]


def test_no_cells_share_no_barcodes():
    assert shared_barcodes(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.uint64), ["a"]) == []
