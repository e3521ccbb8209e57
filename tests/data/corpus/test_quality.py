"""Quality control: what is measured against a dense reference, and each verdict on cells that were made to earn it."""

import itertools

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from panfoma_hf.data import storage
from panfoma_hf.data.cells import Expression, read_expression, tokenize
from panfoma_hf.data.quality import (
    DOUBLET,
    EXCLUDED,
    FEW_GENES,
    KEPT,
    MANY_COUNTS,
    MANY_GENES,
    MITOCHONDRIAL,
    VERDICTS,
    CellQuality,
    Quality,
    cells_per_token,
    judge_cells,
    upper_limit,
)
from panfoma_hf.data.readers import anndata_cells


NUM_GENES, NUM_PLAIN = 600, 150
MITOCHONDRIA = ["MT-CO1", "MT-ND4", "MT-RNR2"]
# What is expected of the planted cells, in their order behind the plain ones.
PLANTED = {
    "empty": FEW_GENES,
    "dying": MITOCHONDRIAL,
    "merged": MANY_GENES,
    "swollen": MANY_COUNTS,
    "excluded": EXCLUDED,
    "excluded_and_empty": EXCLUDED,
    "empty_and_dying": FEW_GENES,
    "dying_and_merged": MITOCHONDRIAL,
    "merged_and_swollen": MANY_GENES,
}
THRESHOLDS = Quality(min_genes=20)


def expression_of(cells: ad.AnnData, tokenizer, **options) -> Expression:
    return read_expression(anndata_cells(cells), tokenizer, **options)


def cells_of(values: np.ndarray, names: list[str]) -> ad.AnnData:
    obs = pd.DataFrame(index=[f"cell{index}" for index in range(len(values))])
    return ad.AnnData(sp.csr_matrix(values.astype(np.float32)), obs=obs, var=pd.DataFrame(index=names))


def reasons(judged: CellQuality) -> list[str]:
    return [VERDICTS[verdict] for verdict in judged.verdicts]


def gene_names(tokenizer, number: int) -> list[str]:
    """Genes of the nucleus; the vocabulary's first token is not a gene."""
    return [name for name in tokenizer.convert_ids_to_tokens(range(1, number + 100)) if name[:3] != "MT-"][:number]


def plain_cells(rng, number: int, mean_genes: float) -> np.ndarray:
    """(number, NUM_GENES) counts of cells that express about so many genes, some more and some fewer."""
    rates = -np.log(1 - mean_genes / NUM_GENES) * rng.lognormal(0, 0.1, number)
    return rng.poisson(np.broadcast_to(rates[:, None], (number, NUM_GENES)))


@pytest.fixture(scope="module")
def planted(tokenizer) -> ad.AnnData:
    """Plain cells of about 120 genes with a few mitochondrial counts, and behind them one of each of `PLANTED`."""
    rng = np.random.default_rng(0)
    plain = np.hstack([plain_cells(rng, NUM_PLAIN, 120), rng.poisson(3, (NUM_PLAIN, len(MITOCHONDRIA)))])
    cells = []
    for kinds in PLANTED:
        kinds = kinds.split("_and_")
        cell = plain[len(cells)].copy()
        if "merged" in kinds:
            cell[:500] = np.maximum(cell[:500], 1)
        if "empty" in kinds:
            cell[np.flatnonzero(cell[:NUM_GENES])[5:]] = 0
            cell[NUM_GENES:] = 0
        if "swollen" in kinds:
            cell *= 50
        if "dying" in kinds:
            cell[NUM_GENES:] = cell[:NUM_GENES].sum()
        cells.append(cell)
    names = gene_names(tokenizer, NUM_GENES) + MITOCHONDRIA
    return cells_of(np.vstack([plain, cells]), names)


@pytest.fixture(scope="module")
def is_excluded(planted) -> np.ndarray:
    return np.array([False] * NUM_PLAIN + ["excluded" in kinds for kinds in PLANTED])


@pytest.fixture(scope="module")
def pancreas(baron, tokenizer) -> ad.AnnData:
    """Real cells with one column for each gene, and behind these three of mitochondrial genes and one of no gene."""
    token_ids = tokenizer.resolve_genes(baron.var_names).token_ids
    ids, first = np.unique(token_ids, return_index=True)
    columns = np.sort(np.append(first[ids >= 0], np.flatnonzero(token_ids < 0)[1:]))
    added = np.random.default_rng(1).poisson(100, (baron.n_obs, 4)) * (np.arange(baron.n_obs)[:, None] % 5 > 0)
    names = [*baron.var_names[columns], *MITOCHONDRIA, "MT-of-no-gene"]
    return cells_of(np.hstack([baron.X[:, columns].toarray(), added]), names)


# -- measures --------------------------------------------------------------------------------------------------------


def test_genes_counts_and_the_mitochondrial_share_are_those_of_the_dense_matrix(pancreas, tokenizer):
    expression = expression_of(pancreas, tokenizer)
    judged = judge_cells(expression, Quality(), ["one"] * len(expression))
    is_known = np.array([tokenizer.resolve_genes([name]).num_resolved == 1 for name in pancreas.var_names[-4:]])
    assert is_known.tolist() == [True, True, True, False]
    dense = pancreas.X.toarray().astype(np.float64)
    known = dense[:, tokenizer.resolve_genes(pancreas.var_names).token_ids >= 0]
    assert known.shape[1] < dense.shape[1] - 1
    assert np.array_equal(judged.genes, (known > 0).sum(1))
    np.testing.assert_allclose(judged.counts, known.sum(1), rtol=1e-12)
    np.testing.assert_allclose(judged.mitochondrial, dense[:, -4:-1].sum(1) / known.sum(1), rtol=1e-12)
    assert 0 < (judged.mitochondrial == 0).sum() < len(expression)  # planted, and so are shares above none


def test_genes_are_as_many_as_a_cells_tokens(pancreas, tokenizer):
    tokens, expression = tokenize(pancreas, tokenizer)
    assert np.array_equal(judge_cells(expression, Quality(), ["one"] * len(tokens)).genes, tokens.lengths)


def test_several_columns_of_one_gene_are_one_gene_of_a_cell(baron, tokenizer):
    tokens, expression = tokenize(baron, tokenizer)
    known = expression.resolution.token_ids[expression.resolution.token_ids >= 0]
    assert len(np.unique(known)) < len(known)
    assert np.array_equal(judge_cells(expression, Quality(), ["one"] * len(tokens)).genes, tokens.lengths)


@pytest.mark.parametrize("base", [np.e, 2, 10], ids=["log1p", "log2", "log10"])
def test_logarithms_give_the_genes_and_the_mitochondrial_share_of_the_counts(base, planted, is_excluded, tokenizer):
    logs = planted.copy()
    totals = planted.X.sum(1).A1
    logs.X = sp.csr_matrix(np.log1p(planted.X.toarray() / totals[:, None] * 1e4) / np.log(base)).astype(np.float32)
    samples = ["one"] * planted.n_obs
    of_counts = judge_cells(expression_of(planted, tokenizer), THRESHOLDS, samples, is_excluded)
    expression = expression_of(logs, tokenizer)
    assert expression.scale.log_base == base
    of_logs = judge_cells(expression, THRESHOLDS, samples, is_excluded)
    assert np.array_equal(of_logs.genes, of_counts.genes)
    np.testing.assert_allclose(of_logs.mitochondrial, of_counts.mitochondrial, rtol=1e-4)
    np.testing.assert_allclose(of_logs.counts, 1e4, rtol=1e-4)
    # A cell of many counts is as any other; all else is judged as before.
    assert of_logs.notes == [f"the file holds {expression.scale.kind}: the number of counts was not judged"]
    expected = [KEPT if reason == MANY_COUNTS else reason for reason in reasons(of_counts)]
    assert reasons(of_logs) == expected
    assert MANY_COUNTS in reasons(of_counts)


def test_a_cell_without_counts_has_no_mitochondrial_share(planted, tokenizer):
    cells = planted.copy()
    cells.X = sp.csr_matrix(planted.X.toarray() * (np.arange(planted.n_obs) != 3)[:, None])
    judged = judge_cells(expression_of(cells, tokenizer), THRESHOLDS, ["one"] * planted.n_obs)
    assert (judged.genes[3], judged.counts[3]) == (0, 0)
    assert np.isnan(judged.mitochondrial).tolist() == [index == 3 for index in range(planted.n_obs)]
    assert reasons(judged)[3] == FEW_GENES


def test_columns_that_are_no_genes_of_the_vocabulary_do_not_count(planted, is_excluded, tokenizer):
    plain = judge_cells(expression_of(planted, tokenizer), THRESHOLDS, ["one"] * planted.n_obs, is_excluded)
    noise = np.random.default_rng(2).poisson(5, (planted.n_obs, 30))
    names = [*(f"no gene {index}" for index in range(29)), "MT-none"]
    more = cells_of(np.hstack([noise, planted.X.toarray()]), names + list(planted.var_names))
    expression = expression_of(more, tokenizer, min_coverage=0)
    judged = judge_cells(expression, THRESHOLDS, ["one"] * planted.n_obs, is_excluded)
    assert np.array_equal(judged.genes, plain.genes)
    assert np.array_equal(judged.counts, plain.counts)
    assert np.array_equal(judged.mitochondrial, plain.mitochondrial)
    assert np.array_equal(judged.verdicts, plain.verdicts)
    everything = np.ones(planted.n_obs, dtype=bool)
    assert np.array_equal(
        cells_per_token(expression, everything, len(tokenizer)),
        cells_per_token(expression_of(planted, tokenizer), everything, len(tokenizer)),
    )


# -- verdicts --------------------------------------------------------------------------------------------------------


def test_each_cell_gets_the_first_reason_that_applies(planted, is_excluded, tokenizer):
    judged = judge_cells(expression_of(planted, tokenizer), THRESHOLDS, ["one"] * planted.n_obs, is_excluded)
    assert dict(zip(PLANTED, reasons(judged)[NUM_PLAIN:], strict=True)) == PLANTED
    assert set(reasons(judged)[:NUM_PLAIN]) == {KEPT}
    assert judged.dropped() == {
        EXCLUDED: 2,
        FEW_GENES: 2,
        MITOCHONDRIAL: 2,
        MANY_GENES: 2,
        MANY_COUNTS: 1,
        DOUBLET: 0,
    }
    assert sum(judged.dropped().values()) + judged.is_kept.sum() == planted.n_obs
    assert judged.notes == []


@pytest.mark.parametrize(
    ("setting", "value", "saved"),
    [
        pytest.param("min_genes", 0, {"empty": KEPT, "empty_and_dying": MITOCHONDRIAL}, id="genes"),
        pytest.param("max_mitochondrial", None, {"dying": KEPT, "dying_and_merged": MANY_GENES}, id="mitochondria"),
        pytest.param("max_genes_mads", None, {"merged": KEPT, "merged_and_swollen": MANY_COUNTS}, id="many_genes"),
        pytest.param("max_counts_mads", None, {"swollen": KEPT}, id="many_counts"),
    ],
)
def test_a_step_that_is_off_leaves_its_cells_to_the_next(setting, value, saved, planted, is_excluded, tokenizer):
    # A dying cell has twice the counts of others and a merged one four times: here that is not too many yet.
    quality = THRESHOLDS.model_copy(update={"max_genes_mads": 8.0, "max_counts_mads": 15.0, setting: value})
    judged = judge_cells(expression_of(planted, tokenizer), quality, ["one"] * planted.n_obs, is_excluded)
    assert dict(zip(PLANTED, reasons(judged)[NUM_PLAIN:], strict=True)) == {**PLANTED, **saved}


def test_with_all_steps_off_only_the_lists_own_exclusions_are_left_out(planted, is_excluded, tokenizer):
    quality = Quality(min_genes=0, max_mitochondrial=None, max_genes_mads=None, max_counts_mads=None)
    judged = judge_cells(expression_of(planted, tokenizer), quality, ["one"] * planted.n_obs, is_excluded)
    assert np.array_equal(judged.is_kept, ~is_excluded)
    assert set(reasons(judged)) == {KEPT, EXCLUDED}
    assert (judged.notes, judged.limits) == ([], {})
    assert judge_cells(expression_of(planted, tokenizer), quality, ["one"] * planted.n_obs).is_kept.all()


def test_thresholds_themselves_are_allowed(tokenizer):
    values = np.zeros((60, NUM_GENES + 1))
    values[:30, :20] = 1  # 20 genes
    values[30:, :19] = 1  # 19
    values[:10, -1] = 5  # a fifth of 25
    values[10:20, -1] = 6
    judged = judge_cells(
        expression_of(cells_of(values, gene_names(tokenizer, NUM_GENES) + ["MT-CO1"]), tokenizer),
        THRESHOLDS,
        ["one"] * 60,
    )
    assert reasons(judged) == [KEPT] * 10 + [MITOCHONDRIAL] * 10 + [KEPT] * 10 + [FEW_GENES] * 30


def test_a_file_without_mitochondrial_genes_is_noted_unless_nobody_asked(planted, tokenizer):
    expression = expression_of(planted[:, :NUM_GENES].copy(), tokenizer)
    samples = ["one"] * planted.n_obs
    judged = judge_cells(expression, THRESHOLDS, samples)
    assert judged.notes == ["the file has no mitochondrial genes: their share was not judged"]
    assert np.isnan(judged.mitochondrial).all()
    assert judged.dropped()[MITOCHONDRIAL] == 0
    assert judge_cells(expression, THRESHOLDS.model_copy(update={"max_mitochondrial": None}), samples).notes == []


# -- deviations of a sample ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_depths(tokenizer) -> ad.AnnData:
    """80 cells of about 60 genes and 80 of about 400; cell 5 has as many genes as the deep ones."""
    rng = np.random.default_rng(3)
    values = np.vstack([plain_cells(rng, 80, 60), plain_cells(rng, 80, 400)])
    values[5] = values[100]
    return cells_of(values, gene_names(tokenizer, NUM_GENES))


def test_an_outlier_is_judged_by_its_own_sample(two_depths, tokenizer):
    expression = expression_of(two_depths, tokenizer)
    apart = judge_cells(expression, THRESHOLDS, ["shallow"] * 80 + ["deep"] * 80)
    assert np.flatnonzero(~apart.is_kept).tolist() == [5]
    assert reasons(apart)[5] == MANY_GENES
    together = judge_cells(expression, THRESHOLDS, ["one"] * 160)
    assert together.is_kept.all()
    assert set(apart.limits) == {"shallow", "deep"}


def test_samples_may_lie_in_any_order(two_depths, tokenizer):
    order = np.random.default_rng(4).permutation(160)
    samples = np.array(["shallow"] * 80 + ["deep"] * 80)
    judged = judge_cells(expression_of(two_depths[order].copy(), tokenizer), THRESHOLDS, samples[order])
    assert order[~judged.is_kept].tolist() == [5]
    apart = judge_cells(expression_of(two_depths, tokenizer), THRESHOLDS, samples)
    assert judged.limits == apart.limits


def test_limits_are_those_of_the_cells_that_no_earlier_reason_took(two_depths, tokenizer):
    is_excluded = np.arange(160) % 3 == 0
    quality = THRESHOLDS.model_copy(update={"min_genes": 50, "min_sample_cells": 20})
    judged = judge_cells(expression_of(two_depths, tokenizer), quality, ["shallow"] * 80 + ["deep"] * 80, is_excluded)
    dense = two_depths.X.toarray()
    genes, counts = (dense > 0).sum(1), dense.sum(1)
    considered = ~is_excluded & (genes >= 50)
    assert (~is_excluded & ~considered).any()
    for sample, cells in (("shallow", slice(0, 80)), ("deep", slice(80, 160))):
        for reason, values in ((MANY_GENES, genes), (MANY_COUNTS, counts)):
            logs = np.log1p(values[cells][considered[cells]])
            limit = np.expm1(np.median(logs) + 5 * median_abs_deviation(logs))
            assert judged.limits[sample][reason] == pytest.approx(limit, abs=0.051)


@pytest.mark.parametrize(("number", "is_judged"), [(49, False), (50, True)], ids=["too_few", "just_enough"])
def test_a_sample_of_few_cells_is_not_judged_and_a_note_says_so(number, is_judged, two_depths, tokenizer):
    index = np.append(np.arange(number), np.arange(80, 160))
    samples = ["small"] * number + ["deep"] * 80
    judged = judge_cells(expression_of(two_depths[index].copy(), tokenizer), THRESHOLDS, samples)
    assert (reasons(judged)[5] == MANY_GENES) == is_judged
    assert ("small" in judged.limits) == is_judged
    assert "deep" in judged.limits
    notes = [note for note in judged.notes if "deviations" in note]
    assert notes == ([] if is_judged else ["1 samples have fewer than 50 cells: their deviations were not judged"])


def test_of_a_samples_cells_only_those_still_kept_make_it_large_enough(two_depths, tokenizer):
    is_excluded = np.arange(160) < 31  # 49 shallow ones stay
    judged = judge_cells(
        expression_of(two_depths, tokenizer), THRESHOLDS, ["shallow"] * 80 + ["deep"] * 80, is_excluded
    )
    assert set(judged.limits) == {"deep"}


@pytest.mark.parametrize("mads", [1.0, 3.0, 5.0])
@settings(deadline=None)
@given(values=st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_the_upper_limit_is_that_of_scipys_deviation(mads, values):
    logs = np.log1p(np.array(values))
    deviation = median_abs_deviation(logs)
    limit = upper_limit(np.array(values), mads)
    if deviation == 0:
        assert limit is None
    else:
        assert limit == pytest.approx(np.expm1(np.median(logs) + mads * deviation), rel=1e-12)


@pytest.mark.parametrize(
    "values",
    [[7], [7, 7, 7], [7, 7, 7, 1, 900], [0, 0, 0, 5]],
    ids=["one_value", "all_the_same", "most_the_same", "most_zero"],
)
def test_where_most_values_are_the_same_there_is_no_limit(values):
    assert upper_limit(np.array(values), 5.0) is None


# -- genes of the kept cells -----------------------------------------------------------------------------------------


def test_cells_per_token_are_those_of_the_dense_matrix_of_the_kept_cells(baron, tokenizer):
    expression = expression_of(baron, tokenizer)
    token_ids = expression.resolution.token_ids
    is_kept = np.arange(baron.n_obs) % 3 > 0
    expressed = baron.X.toarray()[is_kept] > 0
    by_token = np.zeros((len(tokenizer), is_kept.sum()), dtype=bool)
    np.logical_or.at(by_token, token_ids[token_ids >= 0], expressed[:, token_ids >= 0].T)
    counted = cells_per_token(expression, is_kept, len(tokenizer))
    assert (counted.shape, counted.dtype) == ((len(tokenizer),), np.int64)
    assert np.array_equal(counted, by_token.sum(1))
    summed_columns = np.bincount(token_ids[token_ids >= 0], expressed[:, token_ids >= 0].sum(0), len(tokenizer))
    assert (summed_columns > counted).any()  # genes of several columns are among them
    assert not cells_per_token(expression, np.zeros(baron.n_obs, dtype=bool), len(tokenizer)).any()


def test_zeros_that_are_written_down_are_not_expressed(planted, tokenizer):
    cells = planted.copy()
    cells.X.data[::2] = 0
    assert (cells.X.data == 0).any()
    clean = planted.copy()
    clean.X = cells.X.copy()
    clean.X.eliminate_zeros()
    with_zeros, without = expression_of(cells, tokenizer), expression_of(clean, tokenizer)
    everything = np.ones(planted.n_obs, dtype=bool)
    counted = [cells_per_token(expression, everything, len(tokenizer)) for expression in (with_zeros, without)]
    assert np.array_equal(*counted)
    samples = ["one"] * planted.n_obs
    first, second = (judge_cells(expression, THRESHOLDS, samples) for expression in (with_zeros, without))
    assert np.array_equal(first.genes, second.genes)
    assert np.array_equal(first.verdicts, second.verdicts)


# -- chunks ----------------------------------------------------------------------------------------------------------


def test_tiny_chunks_give_the_same_verdicts(planted, is_excluded, tokenizer, monkeypatch):
    expression = expression_of(planted, tokenizer)
    samples = np.where(np.arange(planted.n_obs) % 2 == 0, "even", "odd")
    assert len(list(expression.chunks())) == 1
    whole = judge_cells(expression, THRESHOLDS, samples, is_excluded)
    monkeypatch.setattr(storage, "CHUNK_ENTRIES", 500)
    assert len(list(expression.chunks())) > planted.n_obs / 5
    pieces = judge_cells(expression, THRESHOLDS, samples, is_excluded)
    for name in ("genes", "counts", "mitochondrial", "verdicts"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name)), name
    assert (whole.limits, whole.notes) == (pieces.limits, pieces.notes)


def test_tiny_chunks_give_the_same_cells_per_token(baron, tokenizer, monkeypatch):
    expression = expression_of(baron, tokenizer)
    is_kept = np.arange(baron.n_obs) % 4 > 0
    assert len(list(expression.chunks())) == 1
    whole = cells_per_token(expression, is_kept, len(tokenizer))
    monkeypatch.setattr(storage, "CHUNK_ENTRIES", 5000)
    assert len(list(expression.chunks())) > baron.n_obs / 5
    assert np.array_equal(cells_per_token(expression, is_kept, len(tokenizer)), whole)


# -- doublets --------------------------------------------------------------------------------------------------------

TYPES = ("beta", "ductal", "endothelial", "acinar")
SINGLES_OF_A_TYPE, DOUBLETS_OF_A_PAIR = 80, 4
ONLY_SCRUBLET = Quality(
    min_genes=0, max_mitochondrial=None, max_genes_mads=None, max_counts_mads=None, doublets="scrublet"
)


@pytest.fixture(scope="module")
def with_doublets(baron) -> tuple[ad.AnnData, np.ndarray]:
    """Cells drawn from real types' profiles, and which of them are sums of two of different types."""
    rng = np.random.default_rng(0)
    counts, types = baron.X.toarray().astype(np.float64), baron.obs["cell_type"].to_numpy()
    profiles = {kind: counts[types == kind].sum(0) / counts[types == kind].sum() for kind in TYPES}

    def draw(kind, number):
        return np.array([rng.multinomial(int(total), profiles[kind]) for total in rng.lognormal(8, 0.4, number)])

    singles = [draw(kind, SINGLES_OF_A_TYPE) for kind in TYPES]
    pairs = itertools.combinations(TYPES, 2)
    doublets = [draw(one, DOUBLETS_OF_A_PAIR) + draw(other, DOUBLETS_OF_A_PAIR) for one, other in pairs]
    values = np.vstack(singles + doublets)
    is_doublet = np.arange(len(values)) >= SINGLES_OF_A_TYPE * len(TYPES)
    order = rng.permutation(len(values))
    return cells_of(values[order], list(baron.var_names)), is_doublet[order]


def test_scrublet_finds_most_planted_doublets_and_is_the_same_twice(with_doublets, tokenizer):
    cells, is_doublet = with_doublets
    expression = expression_of(cells, tokenizer)
    first, again = (judge_cells(expression, ONLY_SCRUBLET, ["one"] * cells.n_obs) for _ in range(2))
    assert set(reasons(first)) == {KEPT, DOUBLET}
    assert (~first.is_kept[is_doublet]).mean() > 0.75
    assert (~first.is_kept[~is_doublet]).mean() < 0.05
    assert first.dropped()[DOUBLET] == (~first.is_kept).sum()
    assert np.array_equal(first.verdicts, again.verdicts)


def test_scrublet_looks_at_each_sample_and_at_none_of_few_cells(with_doublets, tokenizer):
    cells, is_doublet = with_doublets
    samples = np.where(np.arange(cells.n_obs) % 8 == 0, "small", "large")
    assert (samples == "small").sum() < ONLY_SCRUBLET.min_sample_cells
    assert is_doublet[samples == "small"].any()
    judged = judge_cells(expression_of(cells, tokenizer), ONLY_SCRUBLET, samples)
    assert judged.is_kept[samples == "small"].all()
    alone = judge_cells(
        expression_of(cells[samples == "large"].copy(), tokenizer), ONLY_SCRUBLET, samples[samples == "large"]
    )
    assert np.array_equal(judged.verdicts[samples == "large"], alone.verdicts)
    assert alone.dropped()[DOUBLET] > 0


def test_cells_left_out_before_are_no_doublets_and_not_shown_to_scrublet(with_doublets, tokenizer):
    cells, is_doublet = with_doublets
    is_excluded = np.arange(cells.n_obs) % 4 == 0
    judged = judge_cells(expression_of(cells, tokenizer), ONLY_SCRUBLET, ["one"] * cells.n_obs, is_excluded)
    assert set(np.array(reasons(judged))[is_excluded]) == {EXCLUDED}
    rest = cells[~is_excluded].copy()
    alone = judge_cells(expression_of(rest, tokenizer), ONLY_SCRUBLET, ["one"] * rest.n_obs)
    assert np.array_equal(judged.verdicts[~is_excluded], alone.verdicts)
    assert (~alone.is_kept[is_doublet[~is_excluded]]).any()


def test_scrublet_is_not_run_on_logarithms_and_a_note_says_so(with_doublets, tokenizer):
    logs = with_doublets[0][:60, :].copy()
    logs.X = logs.X.log1p()
    expression = expression_of(logs, tokenizer)
    judged = judge_cells(expression, ONLY_SCRUBLET, ["one"] * 60)
    assert judged.is_kept.all()
    assert judged.notes == [f"the file holds {expression.scale.kind}: Scrublet, which needs counts, was not run"]


@pytest.mark.parametrize("num_genes", [10, 40], ids=["10_genes", "40_genes"])
def test_scrublet_on_a_panel_of_few_genes_is_no_crash(num_genes, tokenizer):
    values = np.random.default_rng(0).poisson(1.0, (120, num_genes))
    expression = expression_of(cells_of(values, gene_names(tokenizer, num_genes)), tokenizer)
    judged = judge_cells(expression, ONLY_SCRUBLET, ["one"] * 120)
    assert set(reasons(judged)) <= {KEPT, DOUBLET}
