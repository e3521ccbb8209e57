"""Splits by donor and by cell, and the search for leaks."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from panfoma_hf.data.splits import Leakage, find_groups, find_leakage, split_cells


def cells(num_cells: int = 60, *, seed: int = 0, prefix: str = "cell_", **columns) -> ad.AnnData:
    """Counts of 40 genes, no two cells alike, under names of their own."""
    counts = np.random.default_rng(seed).poisson(2.0, (num_cells, 40)).astype(np.float32)
    names = [f"{prefix}{seed}_{number}x" for number in range(num_cells)]
    var = pd.DataFrame(index=[f"gene{number}" for number in range(40)])
    return ad.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame(columns, index=names), var=var)


def donors_and_labels(num_donors: int = 6, num_cells: int = 60) -> dict[str, list[str]]:
    number = np.arange(num_cells)
    return {"donor": [f"d{n}" for n in number % num_donors], "cell_type": [f"t{n}" for n in number // 6 % 3]}


def by_donor(adata: ad.AnnData, **options) -> tuple[ad.AnnData, ad.AnnData]:
    split = split_cells(adata.obs["cell_type"], groups=adata.obs["donor"], **options)
    return adata[split.train], adata[split.test]


# Which column


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        pytest.param({"batch": list("xxyy"), "Donor": list("aabb")}, "Donor", id="donors_before_batches"),
        pytest.param({"donor": list("aaaa"), "sample": list("xyxy")}, "sample", id="one_donor"),
        pytest.param({"donor": list("abcd")}, None, id="a_group_for_each_cell"),
        pytest.param({"donor": list("uuvv"), "batch": list("xyxy")}, "donor", id="labels_in_both"),
        pytest.param({"donor": ["a", "a", None, "b"], "batch": list("xyxy")}, "batch", id="donor_of_a_cell_unknown"),
        pytest.param({"donor": ["a", "a", "unknown", "b"]}, None, id="donor_unknown_in_words"),
        pytest.param({"tissue": list("xyxy")}, None, id="no_such_column"),
        pytest.param({"donor_id": pd.Categorical([1, 2, 1, 2])}, "donor_id", id="categories_of_numbers"),
    ],
)
def test_the_first_column_that_can_split_is_found(columns, expected):
    obs = pd.DataFrame({**columns, "cell_type": list("tttu")})
    assert find_groups(obs, "cell_type") == expected


def test_groups_that_each_have_labels_of_their_own_do_not_split():
    obs = pd.DataFrame({"donor": list("aabb"), "sample": list("xyxy"), "cell_type": list("ttuu")})
    assert find_groups(obs, "cell_type") == "sample"


def test_cells_without_a_label_do_not_count():
    obs = pd.DataFrame({"donor": ["a", "b", "a", "b", None], "cell_type": ["t", "t", "u", "u", None]})
    assert find_groups(obs, "cell_type") == "donor"


def test_the_label_is_no_group():
    assert find_groups(pd.DataFrame({"sample": list("xyxy"), "batch": list("xxyy")}), "sample") == "batch"


# Splits


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_cell_is_on_one_side_and_every_group_too(data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=2, max_size=50))
    labels, groups = (np.array(values).astype(str) for values in zip(*pairs, strict=True))
    test_size = data.draw(st.floats(0.01, 0.99))
    if len(set(groups)) > 1:
        split = split_cells(labels, groups=groups, test_size=test_size, seed=data.draw(st.integers(0, 5)))
        assert not set(groups[split.train]) & set(groups[split.test])
        assert set(split.held_out) == set(groups[split.test])
    elif np.unique(labels, return_counts=True)[1].max() > 1:
        split = split_cells(labels, test_size=test_size)
    else:
        return
    assert len(split.train)
    assert len(split.test)
    assert sorted([*split.train, *split.test]) == list(range(len(labels)))
    assert (np.diff(split.train) > 0).all()
    assert (np.diff(split.test) > 0).all()
    assert set(split.only_in_test) == set(labels[split.test]) - set(labels[split.train])
    assert set(split.only_in_train) == set(labels[split.train]) - set(labels[split.test])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=20).filter(lambda counts: max(counts) > 1),
    test_size=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_by_cell_every_label_of_two_cells_is_on_both_sides(counts, test_size, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    split = split_cells(labels, test_size=test_size, seed=seed)
    in_train, in_test = (np.bincount(labels[side], minlength=len(counts)) for side in (split.train, split.test))
    assert (in_train > 0).all()
    assert ((in_test > 0) == (np.array(counts) > 1)).all()
    assert (np.abs(in_test - np.array(counts) * test_size) <= 1).all()
    assert split.only_in_test == ()


def test_the_share_is_met_over_all_labels():
    labels = np.repeat(np.arange(100), 7)  # a fifth of 7 is between 1 and 2
    assert len(split_cells(labels, test_size=0.2).test) == 140


@pytest.mark.parametrize("grouped", [False, True])
def test_three_hundred_labels_split(grouped):
    labels = np.tile([f"type {number}" for number in range(300)], 10)
    groups = np.repeat(np.arange(10), 300) if grouped else None
    split = split_cells(labels, groups=groups)
    assert (len(split.train), len(split.test)) == (2400, 600)
    assert not split.only_in_test
    assert not split.only_in_train


def test_a_label_of_one_cell_is_trained_on():
    split = split_cells(["a", "b", "b", "b", "b"])
    assert 0 in split.train
    assert split.only_in_train == ("a",)


def test_one_label_splits():
    assert len(split_cells(["a"] * 10).test) == 2


def test_groups_do_not_depend_on_the_order_of_the_cells():
    generator = np.random.default_rng(0)
    groups = generator.choice([f"d{number}" for number in range(12)], 200, p=np.arange(1, 13) / 78)
    labels = generator.choice(list("abcdef"), 200)
    for seed in range(5):
        expected = split_cells(labels, groups=groups, seed=seed).held_out
        order = generator.permutation(200)
        assert split_cells(labels[order], groups=groups[order], seed=seed).held_out == expected
    assert len({split_cells(labels, groups=groups, seed=seed).held_out for seed in range(10)}) > 1


def test_the_draw_that_loses_no_label_is_taken():
    # Only the first of ten donors has the label rare, only two have uncommon.
    groups = np.repeat([f"d{number}" for number in range(10)], 20)
    labels = np.tile(["common"] * 19 + ["often"], 10)
    labels[:5], labels[25], labels[45] = "rare", "uncommon", "uncommon"
    for seed in range(10):
        split = split_cells(labels, groups=groups, seed=seed)
        assert split.only_in_test == ()
        assert split.only_in_train == ("rare",)
        assert len({"d1", "d2"} & set(split.held_out)) == 1


def test_a_large_donor_is_not_held_out_where_small_ones_are():
    groups = ["large"] * 80 + ["small"] * 20
    assert split_cells(["a"] * 100, groups=groups).held_out == ("small",)


@pytest.mark.parametrize("test_size", [0.05, 0.95])
def test_two_equal_donors_are_one_on_each_side(test_size):
    split = split_cells(list("abababab"), groups=list("xxxxyyyy"), test_size=test_size)
    assert (len(split.train), len(split.test)) == (4, 4)


def test_labels_that_training_lacks_are_told():
    split = split_cells(list("aabbcc"), groups=list("xxyyzz"))
    assert split.only_in_test == tuple({"x": "a", "y": "b", "z": "c"}[name] for name in split.held_out)
    assert len(split.only_in_test) == 1


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        pytest.param((["a"],), {}, "at least two cells, got 1", id="one_cell"),
        pytest.param((list("ab"),), {}, "a label of at least two cells", id="no_label_of_two"),
        pytest.param((["a", None],), {}, "needs a label, got 1 of 2", id="missing_label"),
        pytest.param((["a", float("nan")],), {}, "needs a label, got 1 of 2", id="nan_label"),
        pytest.param((list("aab"),), {"groups": ["x", "y", None]}, "needs a group, got 1 of 3", id="missing_group"),
        pytest.param((list("aab"),), {"groups": list("xxx")}, "at least two of them, got one, 'x'", id="one_group"),
        pytest.param((list("aab"),), {"groups": list("xy")}, "got 3 labels and 2 groups", id="lengths"),
        pytest.param((list("aab"),), {"test_size": 0.0}, "between 0 and 1, got 0.0", id="none"),
        pytest.param((list("aab"),), {"test_size": 1}, "between 0 and 1, got 1", id="all"),
    ],
)
def test_what_cannot_be_split_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        split_cells(*arguments, **options)


def test_a_label_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="got 'type'"):
        find_groups(pd.DataFrame({"donor": list("ab")}), "type")


# Leaks


def test_a_clean_split_has_no_leak():
    found = find_leakage(*by_donor(cells(**donors_and_labels())), "cell_type")
    assert not found.is_leak
    assert found.messages() == []
    assert found == Leakage(num_cells=10)


def test_donors_on_both_sides_are_found():
    adata = cells(**donors_and_labels())
    split = split_cells(adata.obs["cell_type"])
    found = find_leakage(adata[split.train], adata[split.test], "cell_type")
    assert found.is_leak
    assert found.leak_column == "donor"
    assert found.groups["donor"] == sorted(set(adata.obs["donor"].iloc[split.test]))
    assert found.group_cells == {"donor": len(split.test)}
    assert "Split by 'donor'" in found.messages()[0]
    assert json.loads(json.dumps(found.to_dict()))["is_leak"] is True


def test_one_donor_of_many_on_both_sides_is_found():
    adata = cells(**donors_and_labels())
    split = split_cells(adata.obs["cell_type"], groups=adata.obs["donor"])
    moved = split.test[:1]
    found = find_leakage(adata[np.append(split.train, moved)], adata[split.test[1:]])
    assert found.groups == {"donor": [adata.obs["donor"].iloc[moved[0]]]}
    assert found.is_leak


def test_a_batch_may_be_shared_where_the_donor_is_not():
    adata = cells(**donors_and_labels(), batch=["b1", "b1", "b2"] * 20)
    found = find_leakage(*by_donor(adata), "cell_type")
    assert set(found.groups) == {"batch"}
    assert found.leak_column is None
    assert not found.is_leak
    assert "'batch'" in found.messages()[0]


def test_a_batch_counts_where_no_donor_is_known():
    adata = cells(**donors_and_labels()).copy()
    adata.obs = adata.obs.rename(columns={"donor": "batch"})
    assert find_leakage(adata[:30], adata[30:]).leak_column == "batch"


def test_the_only_donor_is_mentioned_but_no_leak():
    adata = cells(**{**donors_and_labels(), "donor": "d0"})
    found = find_leakage(adata[:40], adata[40:], "cell_type")
    assert not found.is_leak
    assert found.single_groups == {"donor": "d0"}
    assert len(found.messages()) == 1
    assert "all cells are of one 'donor', d0" in found.messages()[0]
    assert find_leakage(adata[:40], adata[40:], group_columns=["donor"]).is_leak


def test_cells_of_unknown_donors_are_not_one_donor():
    columns = donors_and_labels()
    columns["donor"][::6] = ["unknown"] * 10
    adata = cells(**columns)
    is_test = np.isin(adata.obs["donor"], ["d1"]) | (np.arange(60) % 12 == 0)
    assert find_leakage(adata[~is_test], adata[is_test]).groups == {}


def test_donors_are_the_same_as_numbers_and_as_text():
    train = cells(12, donor_id=[1.0, 2.0] * 6)
    test = cells(12, seed=1, donor_id=pd.Categorical(["2", "3"] * 6))
    assert find_leakage(train, test).groups == {"donor_id": ["2"]}


def test_columns_that_are_named_are_looked_at():
    adata = cells(**donors_and_labels(), person=["p1", "p2"] * 30)
    found = find_leakage(*by_donor(adata), group_columns=["person", "donor"])
    assert found.leak_column == "person"
    with pytest.raises(ValueError, match="got 'persons'"):
        find_leakage(adata, adata, group_columns=["persons"])
    with pytest.raises(ValueError, match="got 'type'"):
        find_leakage(adata, adata, "type")


def test_the_same_names_are_found():
    train, test = cells(40), cells(20, seed=1)
    test.obs_names = [*train.obs_names[:3], *test.obs_names[3:]]
    found = find_leakage(train, test)
    assert found.shared_names == 3
    assert found.equal_cells == 0
    assert found.is_leak
    assert "3 of 20 test cells have the name" in found.messages()[0]


@pytest.mark.parametrize("name", ["{}", "cell{}", "Cell_{}"])
def test_counters_are_no_names(name):
    train, test = cells(40), cells(20, seed=1)
    train.obs_names, test.obs_names = ([name.format(number) for number in range(side.n_obs)] for side in (train, test))
    found = find_leakage(train, test)
    assert found.shared_names == 0
    assert not found.is_leak


@pytest.mark.parametrize(("shared", "is_leak"), [(1, False), (20, True)])
def test_barcodes_of_two_runs_are_shared_by_chance(shared, is_leak):
    generator = np.random.default_rng(0)
    barcodes = ["".join(letters) + "-1" for letters in generator.choice(list("ACGT"), (1400, 16))]
    train, test = cells(700), cells(700, seed=1)
    train.obs_names, test.obs_names = barcodes[:700], barcodes[700 - shared : 1400 - shared]
    found = find_leakage(train, test)
    assert found.shared_names == shared
    assert found.names_by_chance == pytest.approx(700 * 700 / 737_280)
    assert found.is_leak == is_leak
    assert "chance" in found.messages()[0]


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda matrix: matrix, id="csr"),
        pytest.param(lambda matrix: matrix.toarray().astype(np.float64), id="dense_double"),
        pytest.param(sp.csc_matrix, id="csc"),
        pytest.param(lambda matrix: sp.csr_matrix(matrix).astype(np.int32), id="integers"),
    ],
)
def test_the_same_cell_under_another_name_and_with_other_genes_is_found(form):
    train, test = cells(40), cells(20, seed=1)
    matrix = test.X.tolil()
    matrix[5:7] = train.X[[30, 2]]
    test.X = sp.csr_matrix(matrix)
    test = test[:, np.random.default_rng(0).permutation(40)[:30]].copy()
    test = ad.AnnData(form(test.X), obs=test.obs, var=test.var)
    found = find_leakage(train, test)
    assert found.equal_cells == 2
    assert found.shared_names == 0
    assert found.is_leak
    assert "2 of 20 test cells have exactly the expression" in found.messages()[0]


def test_stored_zeros_and_the_order_of_what_is_stored_make_no_other_cell():
    train = cells(1)
    counts = train.X
    test = train.copy()
    reverse = np.arange(counts.nnz)[::-1]
    zero = np.setdiff1d(np.arange(40), counts.indices)[:1]
    test.X = sp.csr_matrix(
        (np.append(counts.data[reverse], 0), np.append(counts.indices[reverse], zero), [0, counts.nnz + 1]), (1, 40)
    )
    test.obs_names = ["other_name"]
    assert find_leakage(train, test).equal_cells == 1


def test_cells_with_no_or_few_counts_are_not_equal():
    train, test = cells(10), cells(10, seed=1)
    for side in (train, test):
        matrix = side.X.tolil()
        matrix[0] = 0
        matrix[1] = 0
        matrix[1, 3] = 1
        side.X = sp.csr_matrix(matrix)
    assert find_leakage(train, test).equal_cells == 0


def test_nothing_is_compared_without_shared_genes_or_expression():
    train, test = cells(10), cells(10, seed=1)
    test.X = train.X
    test.var_names = [f"other{number}" for number in range(40)]
    assert find_leakage(train, test).equal_cells == 0
    assert find_leakage(train, ad.AnnData(obs=test.obs)).equal_cells == 0


def test_a_file_on_disk_is_searched(tmp_path):
    train = cells(20, **donors_and_labels(num_cells=20))
    train.write_h5ad(tmp_path / "train.h5ad")
    backed = ad.read_h5ad(tmp_path / "train.h5ad", backed="r")
    assert find_leakage(backed, train[:5].copy(), "cell_type").equal_cells == 5
    backed.file.close()


def test_a_batch_that_tells_the_label_is_found():
    columns = donors_and_labels()
    adata = cells(**columns, batch=[f"run {name}{number % 2}" for number, name in enumerate(columns["cell_type"])])
    found = find_leakage(*by_donor(adata), "cell_type")
    assert found.telling_columns == {"batch": {"purity": 1.0, "majority": pytest.approx(24 / 60)}}
    assert not found.is_leak
    assert any("label encoded in the batch" in message for message in found.messages())


@pytest.mark.parametrize(
    ("batch", "label"),
    [
        pytest.param(["b1", "b2"] * 30, ["t1"] * 60, id="one_label"),
        pytest.param([f"b{number}" for number in range(60)], ["t1", "t2"] * 30, id="a_batch_for_each_cell"),
        pytest.param(["b1"] * 60, ["t1", "t2"] * 30, id="one_batch"),
        pytest.param(["b1", "b1", "b2"] * 20, ["t1", "t2", "t2"] * 20, id="told_in_part"),
        pytest.param(["b1", "b2"] * 30, ["t1"] * 59 + ["t2"], id="no_better_than_the_majority"),
    ],
)
def test_a_batch_that_does_not_tell_the_label_is_not_reported(batch, label):
    adata = cells(batch=batch, cell_type=label)
    assert find_leakage(adata[:40], adata[40:], "cell_type").telling_columns == {}


def test_what_is_found_does_not_depend_on_the_order_of_the_cells():
    adata = cells(**donors_and_labels(), batch=["b1", "b1", "b2"] * 20)
    train, test = adata[:45], adata[40:]  # five cells twice
    expected = find_leakage(train, test, "cell_type")
    generator = np.random.default_rng(0)
    found = find_leakage(train[generator.permutation(45)], test[generator.permutation(20)], "cell_type")
    assert found == expected
    assert (found.shared_names, found.equal_cells) == (5, 5)
    assert json.loads(json.dumps(found.to_dict()))["equal_cells"] == 5
