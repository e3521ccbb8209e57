"""Counts to tokens, beside what others do with one cell at a time; a part of benchmark_speed.py."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch
from measuring import in_turn, table

from panfoma_hf import PanFoMaTokenizer
from panfoma_hf.data.cells import read_expression
from panfoma_hf.data.readers import open_cells
from panfoma_hf.doctor import check
from panfoma_hf.evaluation.public_tasks import baron_pancreas
from panfoma_hf.tokenization import token_kernels
from panfoma_hf.tokenization.expression import bin_cells


NUM_BINS = 50
GENES, EXPRESSED = 20_000, 1_000


def binned_one_by_one(rows: np.ndarray) -> list[np.ndarray]:
    """Bin values as scGPT does (Cui et al., Nature Methods 2024): non-zero values of a dense row, quantiles, a digitize
    from both sides, ties drawn at random.
    """
    generator, binned = np.random.default_rng(0), []
    for row in rows:
        expressed = row.nonzero()
        values = row[expressed]
        edges = np.quantile(values, np.linspace(0, 1, NUM_BINS))
        lowest, highest = np.digitize(values, edges), np.digitize(values, edges, right=True)
        bins = np.zeros(len(row), dtype=np.int64)
        bins[expressed] = np.ceil(lowest + generator.random(len(values)) * (highest - lowest))
        binned.append(bins)
    return binned


def ranked_one_by_one(rows: np.ndarray, token_of_column: np.ndarray) -> list[np.ndarray]:
    """Rank genes as Geneformer does (Theodoris et al., Nature 2023): non-zero values of a row, in descending order."""
    ranked = []
    for row in rows:
        expressed = np.nonzero(row)[0]
        ranked.append(token_of_column[expressed][np.argsort(-row[expressed])])
    return ranked


def made_up_cells(cells: int) -> sp.csr_matrix:
    """Counts of ``cells`` x 20,000 genes, 1,000 of them expressed in each cell."""
    generator = np.random.default_rng(0)
    some = [np.sort(generator.choice(GENES, EXPRESSED, replace=False)) for _ in range(min(cells, 500))]
    indices = np.concatenate([some[index % len(some)] for index in range(cells)]).astype(np.int32)
    counts = generator.geometric(0.4, len(indices)).astype(np.float32)
    return sp.csr_matrix((counts, indices, np.arange(cells + 1) * EXPRESSED), shape=(cells, GENES))


def tokenize_file(path: Path, tokenizer: PanFoMaTokenizer) -> int:
    """Tokens of a file, read and made a chunk at a time and dropped."""
    with open_cells(path, tokenizer) as cells:
        expression = read_expression(cells, tokenizer)
        return sum(len(tokens.input_ids) for tokens in expression.tokens(tokenizer, max_length=3072))


def benchmark_tokens(arguments, device: torch.device) -> str:
    """Cells a second in memory beside the ways of others, on made-up cells, and from files."""
    tokenizer = PanFoMaTokenizer()
    cells = baron_pancreas()
    matrix, resolution = cells.X.tocsr(), tokenizer.resolve_genes(cells.var_names)
    dense = matrix.toarray()  # what the others start from; not in their times
    plain = (matrix.indptr, matrix.indices, matrix.data, resolution.token_ids, len(tokenizer), NUM_BINS)
    ways = {
        "PanFoMa, Numba": partial(token_kernels.bin_cells, *plain),
        "PanFoMa, NumPy": partial(bin_cells, *plain),
        "binned one by one, as scGPT does": partial(binned_one_by_one, dense),
        "ranked one by one, as Geneformer does": partial(ranked_one_by_one, dense, resolution.token_ids),
    }
    measured = in_turn(ways, torch.device("cpu"), max(arguments.repeats, 3), limit=60.0)
    fastest = measured["PanFoMa, Numba"][0]
    rows = [[name, len(cells) / taken, taken / fastest, peak] for name, (taken, peak) in measured.items()]
    report = (
        f"Baron's pancreas in memory, {len(cells):,} cells with {matrix.nnz / len(cells):,.0f} expressed genes on "
        "average. The ways of others start from dense rows that are there already.\n\n"
    )
    report += table(["way", "cells/s", "time / Numba's", "peak MiB"], rows)

    made_up, names = made_up_cells(arguments.token_cells), tokenizer.convert_ids_to_tokens(list(range(1, GENES + 1)))
    names = tokenizer.resolve_genes(names)
    calls: dict[str, Callable] = {
        "counts in memory": partial(tokenizer.tokenize_cells, made_up, names),
        "their log1p": partial(tokenizer.tokenize_cells, made_up.log1p(), names),
    }
    repeats = -(-arguments.token_cells // len(cells))
    large = ad.AnnData(sp.vstack([matrix] * repeats, format="csr")[: arguments.token_cells], var=cells.var)
    large.obs_names = [f"cell{index}" for index in range(len(large))]
    with tempfile.TemporaryDirectory() as folder:
        files = {"h5ad": {}, "h5ad, gzipped": {"compression": "gzip"}, "h5ad by columns (CSC)": {}}
        for number, (name, options) in enumerate(files.items()):
            path = Path(folder, f"{number}.h5ad")
            large.X = large.X.tocsc() if "CSC" in name else large.X
            large.write_h5ad(path, **options)
            calls[f"Baron's cells, {name}"] = partial(tokenize_file, path, tokenizer)
        calls["`panfoma check` of that h5ad"] = partial(check, Path(folder, "0.h5ad"))
        del large
        measured = in_turn(calls, torch.device("cpu"), 1 if arguments.token_cells > 50_000 else 3, limit=20.0)
    rows = [[name, arguments.token_cells / taken, taken, peak] for name, (taken, peak) in measured.items()]
    report += (
        f"\n{arguments.token_cells:,} cells: made up, with {EXPRESSED:,} expressed of {GENES:,} genes; and Baron's, "
        "repeated.\n\n"
    )
    return report + table(["cells", "cells/s", "seconds", "peak MiB"], rows)
