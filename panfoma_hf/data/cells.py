"""From cells in whatever file or AnnData to tokens: which matrix is read, what its genes are, and a chunk at a time."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from transformers.utils import logging

from ..tokenization import CellTokens, GeneResolution, PanFoMaTokenizer, ValueScale, value_scale
from ..tokenization.value_scale import (
    BINARY,
    COUNTS,
    EMPTY,
    KINDS,
    MAX_COUNT,
    NOT_FINITE,
    OVERFLOW,
    SCALED,
    UNEXPLAINED,
)
from .readers import CellFile, Matrix, anndata_cells, open_cells, readable
from .storage import Rows, check_matrix, sample_index


logger = logging.get_logger(__name__)

# Below this share of counts on known genes something is wrong with the names: real files reach 0.86 to 0.999, the
# lowest with a tenth of their counts on pseudogenes (docs/gene-names.md).
MIN_COVERAGE = 0.7
# Cells that are looked at to tell what a matrix holds and how much of it known genes cover.
SAMPLE_CELLS = 2048
# Layers that are looked at first, and columns of var that may hold further names of the same genes.
COUNT_LAYERS = ("counts", "count", "raw_counts", "counts_raw", "umi", "umi_counts")
NAME_COLUMNS = (
    "gene_ids", "gene_id", "ensembl", "ensembl_id", "ensembl_gene_id", "ensemblid", "accession", "feature_id",
    "gene_symbols", "gene_symbol", "symbols", "symbol", "gene_names", "gene_name", "gene_short_name", "gene",
    "feature_name", "hgnc_symbol", "hgnc_id", "name",
)  # fmt: skip
TYPE_COLUMNS = ("feature_types", "feature_type", "type")
GENE_TYPE = "gene expression"

# What is not readable: the rule, and the remedy.
_RULES = {
    UNEXPLAINED: (
        "be counts, counts times a factor for each cell, or the logarithm of those",
        "Name the matrix of counts with `layer`. If a cell's values rise with its counts, as TPM do, name this matrix "
        "itself and it is read as it is.",
    ),
    BINARY: (
        "tell one gene from another",
        "Binarised values have no ranks: name the matrix of counts with `layer`.",
    ),
    EMPTY: ("not be all zero", "Name another matrix with `layer`."),
    OVERFLOW: (
        "be at most 2,147,483,646 and not negative",
        "A number overflowed when the file was written: write its counts as int64 or float32.",
    ),
    SCALED: (
        "not be negative",
        "Scaled or centred data cannot be binned: name a matrix of counts, CPM or log1p(CPM) with `layer`, or write "
        "one into the file.",
    ),
    NOT_FINITE: ("be finite", "Remove these cells or values, or name another matrix with `layer`."),
}


@dataclass
class Expression:
    """One matrix of cells, its genes resolved, to be read a chunk at a time.

    Parameters
    ----------
    layer
        Its key: "X", "raw" or a layer's name.
    rows
        (cells, genes).
    resolution
        What its columns are, weighted by the counts of ``sample``.
    scale
        What its values are, told by ``sample``.
    scales
        What the matrices hold that were looked at, by key.
    sample
        (sampled cells, genes), evenly spaced runs of cells; all of up to `SAMPLE_CELLS`.
    name
        What to call the file in an error.
    """

    layer: str
    rows: Rows
    resolution: GeneResolution
    scale: ValueScale
    scales: dict[str, ValueScale]
    sample: sp.csr_matrix
    name: str

    @property
    def source(self) -> str:
        """The matrix as Python writes it, such as ``layers['counts']``."""
        return source_of(self.layer)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def chunks(self) -> Iterator[sp.csr_matrix]:
        """All cells in order, (some cells, genes) at a time; the next chunk is read while one is worked on.

        Raises
        ------
        ValueError
            If the file turns out to be damaged, or a count to be too large.
        """
        with ThreadPoolExecutor(1) as reader:
            pending = None
            for start, stop in pairwise(self.rows.bounds()):
                coming = reader.submit(self.rows.read, start, stop)
                if pending is not None:
                    yield self._checked(pending)
                pending = coming
            if pending is not None:
                yield self._checked(pending)

    def _checked(self, pending) -> sp.csr_matrix:
        with readable(self.name):
            chunk = pending.result()
        if chunk.nnz and MAX_COUNT < chunk.data.max() < np.inf:
            scale = ValueScale(OVERFLOW, f"values up to {chunk.data.max():,.0f}")
            raise ValueError(_unreadable(scale, self.source, self.name))
        return chunk

    def tokens(self, tokenizer: PanFoMaTokenizer, max_length: int | None = None) -> Iterator[CellTokens]:
        """All cells in order as tokens, a chunk at a time.

        Parameters
        ----------
        tokenizer
            The one that resolved the genes.
        max_length
            Genes of a cell that are kept; None keeps all.
        """
        for chunk in self.chunks():
            try:
                yield tokenizer.tokenize_cells(chunk, self.resolution, max_length=max_length, scale=self.scale)
            except ValueError as error:
                raise ValueError(str(error).replace("the matrix", f"{self.source} of {self.name}", 1)) from None


def source_of(layer: str) -> str:
    """A matrix's key as Python writes it."""
    return {"X": "X", "raw": "raw.X"}.get(layer, f"layers[{layer!r}]")


def read_expression(
    cells: CellFile,
    tokenizer: PanFoMaTokenizer,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
) -> Expression:
    """Choose the matrix to read, find out what it holds, and resolve its genes.

    Of the matrices that are there, counts come before counts times a factor, and these before logarithms; of equal ones
    a layer of counts before raw, raw before X and X before other layers.

    Parameters
    ----------
    cells
        What `open_cells` gives.
    tokenizer
        Knows the genes.
    layer
        A layer's name, "X" or "raw", which is then read whatever the others are; None chooses.
    gene_column
        Column of ``var`` with gene names. None takes the index, and for names that are not found there further columns
        of names or ids.
    min_coverage
        Share of the counts that must fall on genes of the vocabulary.

    Raises
    ------
    ValueError
        If no matrix is usable, cells lie in columns, genes are another species', too few are known, or the same genes
        are there under two kinds of names.
    """
    looked = look_at_matrices(cells, layer)
    chosen = choose_matrix(cells, looked, is_named=layer is not None)
    sample, scale = looked[chosen]
    matrix = cells.matrices[chosen]
    resolution = weigh(resolve_columns(matrix, tokenizer, gene_column), sample, scale)
    check_genes(cells, resolution, sample, tokenizer, min_coverage)
    scales = {key: scale for key, (_, scale) in looked.items()}
    return Expression(chosen, matrix.rows, resolution, scale, scales, sample, cells.name)


def look_at_matrices(cells: CellFile, layer: str | None = None) -> dict[str, tuple[sp.csr_matrix, ValueScale]]:
    """Some cells of each matrix, by key, and what they hold; of one layer, or of all until counts are found.

    Raises
    ------
    ValueError
        If there is no such layer, or the file is damaged.
    """
    if layer is not None and layer not in cells.matrices:
        raise ValueError(
            f"`layer` must be 'X', 'raw' or a layer's name, got {layer!r}; {cells.name} has {sorted(cells.matrices)}. "
            "Leave it out to have the counts looked for."
        )
    index = sample_index(len(cells.obs), SAMPLE_CELLS)
    looked = {}
    for key in _in_order(cells.matrices) if layer is None else [layer]:
        with readable(cells.name):
            sample = _without_repeats(cells.matrices[key].rows.sample(index), source_of(key))
        looked[key] = sample, value_scale(sample.indptr, sample.data)
        if looked[key][1].kind == COUNTS:
            break
    return looked


def _without_repeats(sample: sp.csr_matrix, source: str) -> sp.csr_matrix:
    """The sample in canonical form; zarr gives zeros for parts of a folder that are not there, indices among them."""
    num_entries = sample.nnz
    if not sample.has_canonical_format:
        sample.sum_duplicates()
    if sample.nnz < num_entries:
        raise ValueError(
            f"a gene must stand once in a cell, got some {num_entries - sample.nnz:,} times more in {source}"
        )
    return sample


def choose_matrix(cells: CellFile, looked: dict[str, tuple[sp.csr_matrix, ValueScale]], is_named: bool = False) -> str:
    """The key of the matrix to read; one that the user named may hold values that nothing explains.

    Raises
    ------
    ValueError
        If none is usable.
    """
    layer = min(looked, key=lambda key: KINDS.index(looked[key][1].kind))
    scale = looked[layer][1]
    if not scale.is_readable:
        message = _unreadable(scale, source_of(layer), cells.name)
        if not (is_named and scale.kind in (UNEXPLAINED, BINARY)):
            raise ValueError(message)
        logger.warning(f"{message} It is read as it is, as you named it.")
    return layer


def weigh(resolution: GeneResolution, sample: sp.csr_matrix, scale: ValueScale) -> GeneResolution:
    """The resolution with the counts of each column in a sample, logarithms taken back."""
    counts = sample.data if scale.log_base is None else np.expm1(sample.data * np.log(scale.log_base))
    usable = np.isfinite(counts) & (counts > 0)
    if not usable.all():
        counts = np.where(usable, counts, 0)
    return resolution.with_counts(np.bincount(sample.indices, counts, minlength=len(resolution)))


def check_genes(
    cells: CellFile,
    resolution: GeneResolution,
    sample: sp.csr_matrix,
    tokenizer: PanFoMaTokenizer,
    min_coverage: float = MIN_COVERAGE,
) -> None:
    """Raise ValueError where the genes are not what a model can read; see `read_expression`."""
    _check_orientation(cells, resolution, tokenizer)
    resolution.require(min_coverage, cells.name)
    _check_two_kinds(resolution, sample, cells.name)


def _in_order(matrices: Mapping[str, Matrix]) -> list[str]:
    first = [key for key in matrices if key.lower() in COUNT_LAYERS]
    first += [key for key in ("raw", "X") if key in matrices]
    return first + [key for key in matrices if key not in first]


def _unreadable(scale: ValueScale, source: str, name: str) -> str:
    rule, remedy = _RULES[scale.kind]
    return f"Expression must {rule}, got {scale.kind} in {source} of {name}: {scale.reason}. {remedy}"


def resolve_columns(matrix: Matrix, tokenizer: PanFoMaTokenizer, gene_column: str | None = None) -> GeneResolution:
    """Resolve a matrix's genes by a column of ``var``, or by its index and further columns of names."""
    var = matrix.var
    if gene_column is not None:
        if gene_column not in var:
            raise ValueError(
                f"`gene_column` must be a column of var, got {gene_column!r}; the columns are {sorted(var)}. "
                "Leave it out to take var_names."
            )
        resolution = tokenizer.resolve_genes(var[gene_column])
    else:
        resolution = tokenizer.resolve_genes(var.index)
        for column in var:
            if str(column).lower() in NAME_COLUMNS and var[column].dtype.kind not in "biufc":
                resolution = resolution.filled_from(tokenizer.resolve_genes(var[column]))
    for column in var:
        types = var[column].astype(str).str.lower() if str(column).lower() in TYPE_COLUMNS else None
        if types is not None and (types == GENE_TYPE).any():
            resolution = resolution.without((types != GENE_TYPE).to_numpy())
    return resolution


def _check_orientation(cells: CellFile, resolution: GeneResolution, tokenizer: PanFoMaTokenizer) -> None:
    if resolution.num_resolved > 0.1 * len(resolution):
        return
    barcodes = tokenizer.resolve_genes(cells.obs.index)
    if barcodes.num_resolved > max(0.3 * len(barcodes), resolution.num_resolved):
        raise ValueError(
            f"Cells must lie in rows and genes in columns, got gene names for the cells of {cells.name} "
            f"({', '.join(map(str, barcodes.names[barcodes.token_ids >= 0][:3]))}). Transpose it: `adata.T`."
        )


def _check_two_kinds(resolution: GeneResolution, sample: sp.csr_matrix, name: str) -> None:
    """Raise ValueError where cells express many a gene under two kinds of names: its counts would be added twice."""
    twice = resolution.named_by_two_kinds
    if len(twice) <= max(0.01 * resolution.num_resolved, 1):
        return
    is_twice = np.flatnonzero(np.isin(resolution.symbols, list(twice)) & (resolution.token_ids >= 0))
    expressed = (sample[:, is_twice] > 0).astype(np.int32)
    _, gene_of_column = np.unique(resolution.token_ids[is_twice], return_inverse=True)
    per_gene = expressed @ sp.csr_matrix((np.ones(len(is_twice), np.int32), (np.arange(len(is_twice)), gene_of_column)))
    if per_gene.nnz and (per_gene.data > 1).mean() > 0.1:
        shown = next(iter(twice.values()))
        raise ValueError(
            f"A gene's counts must stand in one column, got {len(twice):,} genes of {name} under mixed id types in the "
            f"same cells ({' and '.join(shown[:2])}): they would be counted twice. Keep the columns of one type of id."
        )


def tokenize(
    cells: ad.AnnData,
    tokenizer: PanFoMaTokenizer,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    name: str = "the AnnData",
) -> tuple[CellTokens, Expression]:
    """Tokenize an AnnData's cells, whole; sub-sampling is the collator's.

    Parameters
    ----------
    cells, tokenizer, layer, gene_column, min_coverage
        As in `read_expression`.
    name
        What to call the cells in an error, such as the file that they came from.

    Returns
    -------
    The tokens, and the matrix that was read with what its genes were taken for.

    Raises
    ------
    ValueError
        As `read_expression`, and if there is no cell or a value cannot be read.
    """
    if not cells.n_obs:
        raise ValueError("At least one cell is needed, got an AnnData without cells. Check how it was subset.")
    expression = read_expression(
        anndata_cells(cells, name), tokenizer, layer=layer, gene_column=gene_column, min_coverage=min_coverage
    )
    tokens = CellTokens.concatenate(list(expression.tokens(tokenizer)))
    logger.warning(
        f"{len(tokens):,} cells from {expression.source}, {expression.scale}: {expression.resolution.summary()}; "
        f"{tokens.lengths.mean():.0f} genes a cell."
    )
    return tokens, expression


def name_of(cells: ad.AnnData | str | Path) -> str:
    """What to call cells in an error."""
    return "the AnnData" if isinstance(cells, ad.AnnData) else str(cells)


def writable_cells(cells: ad.AnnData | str | Path) -> ad.AnnData:
    """As `read_cells`, for cells that results will be written to.

    Raises
    ------
    ValueError
        If that cannot be done: a view of a file, or something else than entries in ``uns["panfoma"]``.
    """
    adata = read_cells(cells)
    if adata.isbacked and adata.is_view:
        raise ValueError(
            "Results cannot be written to a view of cells that lie on disk. Pass `adata[...].to_memory()` instead."
        )
    if not isinstance(adata.uns.get("panfoma", {}), Mapping):
        raise ValueError(
            f"uns['panfoma'] must be free or PanFoMa's own, got {type(adata.uns['panfoma']).__name__}. Rename it."
        )
    return adata


def read_cells(cells: ad.AnnData | str | Path) -> ad.AnnData:
    """Read cells into memory: an AnnData is passed through, a file of any format that `open_cells` knows is read.

    Raises
    ------
    FileNotFoundError, ValueError
        As `open_cells`.
    """
    if isinstance(cells, ad.AnnData):
        return cells
    with open_cells(cells) as file:
        if file.format in ("h5ad", "zarr"):
            file.close()
            with readable(file.name):
                adata = ad.read_h5ad(cells) if file.format == "h5ad" else ad.read_zarr(cells)
                for matrix in (adata.X, None if adata.raw is None else adata.raw.X, *adata.layers.values()):
                    if sp.issparse(matrix):
                        check_matrix(matrix)
            return adata
        with readable(file.name):
            matrices = {
                key: sp.vstack([matrix.rows.read(*bounds) for bounds in pairwise(matrix.rows.bounds())], format="csr")
                for key, matrix in file.matrices.items()
            }
        var = pd.DataFrame(file.matrices["X"].var)
        adata = ad.AnnData(matrices.pop("X"), obs=file.obs, var=var.set_axis(var.index.astype(str)), layers=matrices)
    adata.var_names_make_unique()
    return adata
