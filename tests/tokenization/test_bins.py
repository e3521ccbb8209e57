"""Expression bins: properties that hold for any cell, and the compiled tokenizer against the plain one."""

import inspect

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from panfoma_hf import PanFoMaTokenizer
from panfoma_hf.tokenization import expression, token_kernels, tokenization_panfoma
from panfoma_hf.tokenization.expression import bin_cells, draw_order, quantile_bins
from tests.conftest import run_python


VOCABULARY = 64
COLUMNS = 40
BODIES = pytest.mark.parametrize("body", [bin_cells, token_kernels.bin_cells], ids=["plain", "compiled"])

# Cells with ties, gaps and values far apart; 0 is not expressed.
counts = st.lists(
    st.lists(st.one_of(st.just(0), st.integers(0, 6), st.integers(0, 100_000)), min_size=COLUMNS, max_size=COLUMNS),
    min_size=1,
    max_size=6,
).map(lambda rows: np.array(rows, dtype=np.float64))
distinct_tokens = st.permutations(range(1, VOCABULARY)).map(lambda ids: np.array(ids[:COLUMNS]))
few = settings(max_examples=60, deadline=None)


def tokens_of(body, matrix, token_of_column, num_bins=50, **options):
    """Tokens of each cell, as a dictionary from token to bin."""
    matrix = sp.csr_matrix(matrix)
    tokens, bins, lengths = body(
        matrix.indptr, matrix.indices, matrix.data, token_of_column, VOCABULARY, num_bins, **options
    )
    ends = np.cumsum(lengths)
    assert ends[-1] == len(tokens) == len(bins)
    return [
        dict(zip(tokens[end - size : end].tolist(), bins[end - size : end].tolist(), strict=True))
        for end, size in zip(ends, lengths, strict=True)
    ]


def naive_tokens(row, token_of_column, num_bins):
    """One cell by the definition: counts of a token added up, and each one's middle rank as a share of all."""
    sums = {}
    for value, token in zip(row.tolist(), token_of_column.tolist(), strict=True):
        if token >= 0 and value:
            sums[token] = sums.get(token, 0) + value
    values = list(sums.values())
    return {
        token: 1
        + num_bins
        * (sum(other < value for other in values) + sum(other <= value for other in values))
        // (2 * len(values))
        for token, value in sums.items()
    }


@BODIES
@given(matrix=counts, token_of_column=distinct_tokens, num_bins=st.sampled_from([1, 2, 7, 50, 300]))
@few
def test_bins_are_those_of_the_definition(body, matrix, token_of_column, num_bins):
    expected = [naive_tokens(row, token_of_column, num_bins) for row in matrix]
    assert tokens_of(body, matrix, token_of_column, num_bins) == expected


@BODIES
@given(matrix=counts, token_of_column=st.lists(st.integers(-1, 9), min_size=COLUMNS, max_size=COLUMNS).map(np.array))
@few
def test_columns_of_one_gene_are_added_up_and_unknown_ones_left_out(body, matrix, token_of_column):
    token_of_column = np.where(token_of_column == 0, -1, token_of_column)
    expected = [naive_tokens(row, token_of_column, 50) for row in matrix]
    assert tokens_of(body, matrix, token_of_column) == expected


@BODIES
@given(
    matrix=counts,
    token_of_column=distinct_tokens,
    scale=st.sampled_from(
        [np.log1p, np.sqrt, np.arcsinh, lambda x: x**3, lambda x: np.log1p(x / 7).astype(np.float32)]
    ),
)
@few
def test_a_monotone_rescaling_of_each_cell_changes_nothing(body, matrix, token_of_column, scale):
    factors = np.arange(1, len(matrix) + 1)[:, None] / 3
    assert tokens_of(body, scale(matrix * factors), token_of_column) == tokens_of(body, matrix, token_of_column)


@BODIES
@given(matrix=counts, token_of_column=distinct_tokens, order=st.permutations(range(COLUMNS)))
@few
def test_the_order_of_genes_changes_nothing(body, matrix, token_of_column, order):
    permuted = tokens_of(body, matrix[:, order], token_of_column[list(order)])
    assert permuted == tokens_of(body, matrix, token_of_column)


@BODIES
@given(matrix=counts, token_of_column=distinct_tokens)
@few
def test_columns_of_zeros_stored_or_not_change_nothing(body, matrix, token_of_column):
    stored = sp.csr_matrix(matrix + 1)
    stored.data -= 1
    assert stored.nnz == matrix.size
    wider = sp.hstack([stored, sp.csr_matrix((len(matrix), 3))], format="csr")
    expected = tokens_of(body, matrix, token_of_column)
    assert tokens_of(body, wider, np.append(token_of_column, [0, 5, 9])) == expected


@BODIES
@given(matrix=counts, token_of_column=distinct_tokens, max_length=st.integers(1, COLUMNS))
@few
def test_truncation_keeps_the_first_genes_of_the_fixed_order(body, matrix, token_of_column, max_length):
    whole = tokens_of(body, matrix, token_of_column)
    place = draw_order(VOCABULARY)
    for cell, kept in zip(whole, tokens_of(body, matrix, token_of_column, max_length=max_length), strict=True):
        first = sorted(cell, key=lambda token: place[token])[:max_length]
        assert kept == {token: cell[token] for token in first}
        assert list(kept) == first


@BODIES
@given(matrix=counts, token_of_column=st.lists(st.integers(1, 9), min_size=COLUMNS, max_size=COLUMNS).map(np.array))
@few
def test_logarithms_of_columns_of_one_gene_are_added_up_as_counts(body, matrix, token_of_column):
    totals = np.maximum(matrix.sum(1, keepdims=True), 1)
    expected = tokens_of(body, matrix, token_of_column)
    for base, logged in ((np.e, np.log1p(matrix / totals * 1e4)), (2.0, np.log2(1 + matrix / totals * 1e6))):
        assert tokens_of(body, logged, token_of_column, log_scales=np.full(len(matrix), np.log(base))) == expected


def test_equal_values_have_equal_bins_and_larger_ones_no_smaller():
    rng = np.random.default_rng(0)
    values = rng.integers(1, 40, 500).astype(float)
    bins = quantile_bins(values, np.zeros(500, dtype=int), 50)
    order = np.argsort(values)
    assert (np.diff(bins[order]) >= 0).all()
    assert len(np.unique(bins)) == len(np.unique(values))


# -- the compiled tokenizer --------------------------------------------------------------------------------------------


def both(tokenizer, matrix, names, monkeypatch, **options):
    """Tokens by NumPy and by Numba."""
    plain = tokenizer.tokenize_cells(matrix, names, **options)
    monkeypatch.setattr(tokenization_panfoma, "FEW_ENTRIES", 0)
    compiled = tokenizer.tokenize_cells(matrix, names, **options)
    monkeypatch.undo()
    return plain, compiled


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x, id="float32"),
        pytest.param(lambda x: x.astype(np.float64), id="float64"),
        pytest.param(lambda x: x.astype(np.int16), id="int16"),
        pytest.param(lambda x: x.astype(np.uint64), id="uint64"),
        pytest.param(lambda x: x > 0, id="bool"),
        pytest.param(lambda x: x.log1p(), id="logarithms"),
        pytest.param(lambda x: x[:0], id="no_cells"),
        pytest.param(lambda x: x * 0, id="empty_cells"),
        pytest.param(lambda x: x.tocsc(), id="csc"),
        pytest.param(lambda x: x.toarray(), id="dense"),
    ],
)
@pytest.mark.parametrize("max_length", [None, 300])
def test_real_cells_get_the_same_tokens_from_numpy_and_numba(change, max_length, tokenizer, baron, monkeypatch):
    plain, compiled = both(tokenizer, change(baron.X), baron.var_names, monkeypatch, max_length=max_length)
    for key in ("input_ids", "expression_bins", "indptr"):
        expected, got = getattr(plain, key), getattr(compiled, key)
        assert got.dtype == expected.dtype
        assert np.array_equal(got, expected), key


def test_many_bins_need_more_than_a_byte(baron, monkeypatch):
    plain, compiled = both(PanFoMaTokenizer(num_expression_bins=1000), baron.X, baron.var_names, monkeypatch)
    assert compiled.expression_bins.dtype == np.int32
    assert compiled.expression_bins.max() > 256
    assert np.array_equal(plain.expression_bins, compiled.expression_bins)


def test_the_number_of_threads_changes_nothing(tokenizer, baron, monkeypatch):
    monkeypatch.setattr(tokenization_panfoma, "FEW_ENTRIES", 0)
    monkeypatch.setattr(token_kernels, "_MIN_ENTRIES_PER_THREAD", 1000)
    results = []
    for cores in (1, 2, 5):
        monkeypatch.setattr(token_kernels, "_num_cores", lambda cores=cores: cores)
        results.append(tokenizer.tokenize_cells(baron.X, baron.var_names))
    for other in results[1:]:
        assert np.array_equal(other.input_ids, results[0].input_ids)
        assert np.array_equal(other.expression_bins, results[0].expression_bins)


@BODIES
@pytest.mark.parametrize(
    ("value", "column", "message"),
    [
        pytest.param(-1, 3, "must not be negative, got 1 negative values", id="negative"),
        pytest.param(np.nan, 3, "1 NaN or infinite", id="nan"),
        pytest.param(np.inf, 3, "1 NaN or infinite", id="infinite"),
        pytest.param(1, COLUMNS, "Columns of a sparse matrix must be 0 to 39, got 0 to 40", id="column_too_large"),
        pytest.param(1, -1, "got -1 to 39", id="column_negative"),
    ],
)
def test_what_cannot_be_binned_is_an_error(body, value, column, message):
    genes, values = np.arange(COLUMNS, dtype=np.int32), np.ones(COLUMNS)
    genes[3], values[3] = column, value
    with pytest.raises(ValueError, match=message):
        body(np.array([0, COLUMNS]), genes, values, np.arange(COLUMNS), VOCABULARY, 50)


def test_without_numba_numpy_gives_the_same_tokens_and_says_that_it_is_slower(tokenizer):
    code = """
import sys
sys.stderr = sys.stdout
import numpy as np, panfoma_hf
tokenizer = panfoma_hf.PanFoMaTokenizer()
names = tokenizer.convert_ids_to_tokens(list(range(1, 2001)))
tokens = tokenizer.tokenize_cells(np.random.default_rng(0).integers(0, 5, (200, 2000)), names)
print(tokens.expression_bins.tolist()[:5000])
"""
    printed = run_python(code, without=("numba",))
    names = tokenizer.convert_ids_to_tokens(list(range(1, 2001)))
    tokens = tokenizer.tokenize_cells(np.random.default_rng(0).integers(0, 5, (200, 2000)), names)
    assert len(tokens.input_ids) > tokenization_panfoma.FEW_ENTRIES
    assert "several times slower than by Numba" in printed
    assert str(tokens.expression_bins.tolist()[:5000]) in printed


def test_the_two_bodies_take_the_same_arguments():
    assert inspect.signature(expression.bin_cells) == inspect.signature(token_kernels.bin_cells)
