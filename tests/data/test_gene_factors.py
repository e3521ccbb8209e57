"""Factors of genes, compared with which cells were made to express them together."""

import numpy as np
import pytest
from datasets import Dataset

from panfoma_hf import cell_dataset
from panfoma_hf.data.gene_factors import MIN_CELLS, gene_factors
from panfoma_hf.tokenization import CellTokens


VOCAB = 60
RARE, EVERYWHERE, UNSEEN = 57, 58, 59
GROUPS = np.arange(RARE) % 3


def cells(number: int = 300, seed: int = 0) -> Dataset:
    """Cells of three kinds; each kind expresses mostly genes of its own group. Depth differs between cells."""
    generator = np.random.default_rng(seed)
    lists = []
    for cell in range(number):
        depth = generator.uniform(0.5, 1)
        likely = np.where(cell % 3 == GROUPS, 0.8, 0.1) * depth
        genes = np.flatnonzero(generator.random(RARE) < likely)
        lists.append(np.concatenate([genes, [EVERYWHERE], [RARE] if cell < MIN_CELLS - 1 else []]).astype(np.int32))
    genes = np.concatenate(lists)
    ends = np.append(0, np.cumsum([len(some) for some in lists]))
    return cell_dataset(CellTokens(genes, generator.integers(1, 51, len(genes)).astype(np.uint8), ends))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return cells()


def cosine(factors: np.ndarray) -> np.ndarray:
    return factors @ factors.T / factors.shape[1]


def test_genes_that_cells_express_together_point_the_same_way(dataset):
    factors = gene_factors(dataset, VOCAB, 8)
    assert (factors.shape, factors.dtype) == ((VOCAB, 8), np.float32)
    similar = cosine(factors[:RARE])
    together = GROUPS[:, None] == GROUPS
    np.fill_diagonal(similar, np.nan)
    assert np.nanmean(similar[together]) > 0.4
    assert np.nanmean(similar[~together]) < 0
    nearest = np.nanargmax(similar, axis=1)
    assert np.mean(GROUPS[nearest] == GROUPS) > 0.95


def test_every_known_gene_has_one_length_and_others_none(dataset):
    factors = gene_factors(dataset, VOCAB, 8)
    known = [*range(RARE), EVERYWHERE]
    np.testing.assert_allclose(np.sqrt((factors[known] ** 2).mean(1)), 1, rtol=1e-5)
    # Too few cells; no cell.
    assert not factors[[RARE, UNSEEN]].any()
    # One bin in every cell tells none from another.
    same = dataset.map(
        lambda cell: {
            "expression_bins": [
                7 if gene == EVERYWHERE else value
                for gene, value in zip(cell["input_ids"], cell["expression_bins"], strict=True)
            ]
        }
    )
    factors = gene_factors(same, VOCAB, 8)
    assert not factors[EVERYWHERE].any()
    assert factors[:RARE].any(1).all()


def test_no_dimension_stands_for_more_than_another(dataset):
    """Of three groups, singular vectors would put nearly everything into two of 16 columns."""
    factors = gene_factors(dataset, VOCAB, 16)
    shares = (factors**2).sum(0) / (factors**2).sum()
    assert shares.max() < 4 / 16


def test_genes_that_all_cells_express_are_told_by_how_much():
    """Every cell has every gene, and more of those of its own group."""
    generator = np.random.default_rng(0)
    bins = np.array([np.where(cell % 3 == GROUPS, 30, 10) + generator.integers(0, 15, RARE) for cell in range(300)])
    genes, ends = np.tile(np.arange(RARE, dtype=np.int32), 300), np.arange(301) * RARE
    similar = cosine(gene_factors(cell_dataset(CellTokens(genes, bins.ravel().astype(np.uint8), ends)), RARE, 8))
    np.fill_diagonal(similar, -1)
    assert np.mean(GROUPS[similar.argmax(1)] == GROUPS) > 0.95


def test_factors_are_those_of_a_plain_decomposition(dataset):
    """Cosines of genes, which the rotation leaves as they are, against NumPy's decomposition of the dense matrix."""
    dense = np.zeros((len(dataset), VOCAB))
    for row, cell in enumerate(dataset):
        dense[row, cell["input_ids"]] = cell["expression_bins"]
    known = [*range(RARE), EVERYWHERE]
    _, values, vectors = np.linalg.svd(dense[:, known] / dense[:, known].std(0), full_matrices=False)
    loadings = (vectors[1:] * np.sqrt(values[1:, None])).T
    loadings /= np.linalg.norm(loadings, axis=1, keepdims=True)
    # As many factors as there are: the solver finds all of them exactly.
    found = gene_factors(dataset, VOCAB, len(known) - 1)
    np.testing.assert_allclose(cosine(found)[np.ix_(known, known)], loadings @ loadings.T, atol=1e-4)


def test_they_are_the_same_each_time_and_the_seed_decides_which_way_they_point(dataset):
    first = gene_factors(dataset, VOCAB, 8)
    np.testing.assert_array_equal(gene_factors(dataset, VOCAB, 8), first)
    turned = gene_factors(dataset, VOCAB, 8, seed=1)
    assert np.abs(turned - first).max() > 0.5


def test_of_many_cells_some_are_drawn_from_all_of_them(dataset):
    few = gene_factors(dataset, VOCAB, 8, max_cells=120)
    np.testing.assert_array_equal(gene_factors(dataset, VOCAB, 8, max_cells=120), few)
    assert np.abs(few - gene_factors(dataset, VOCAB, 8)).max() > 1e-3
    first = gene_factors(dataset.select(range(120)), VOCAB, 8)
    assert np.abs(few - first).max() > 1e-3
    similar = cosine(few[:RARE])
    assert similar[GROUPS[:, None] == GROUPS].mean() > 0.3


def test_fewer_cells_than_factors_leave_directions_at_zero():
    few = cells(40)
    factors = gene_factors(few, VOCAB, 48)
    cells_with = np.bincount(np.concatenate(few["input_ids"][:]), minlength=VOCAB)
    np.testing.assert_array_equal(factors.any(1), cells_with >= MIN_CELLS)
    assert np.isfinite(factors).all()
    assert np.linalg.matrix_rank(factors, tol=1e-3) <= 39


def test_without_enough_cells_there_are_none(dataset):
    assert not gene_factors(dataset.select([]), VOCAB, 8).any()
    assert not gene_factors(dataset.select([0]), VOCAB, 8).any()
