"""From cells in whatever file or AnnData to tokens: which matrix is read, what its genes are, and a chunk at a time."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from transformers.utils import logging

from ..tokenization import CellTokens, GeneResolution, PanFoMaTokenizer, ValueScale, value_scale
from ..tokenization.value_scale import (
    BINARY,
    COUNT_LAYERS,
    COUNTS,
    EMPTY,
    KINDS,
    MAX_COUNT,
    NOT_FINITE,
    OVERFLOW,
    SCALED,
    UNEXPLAINED,
)
from .cell_file import CellFile, Matrix, readable
from .readers import LAYER_PREFIX, anndata_cells, open_cells, open_zarr
from .storage import Rows, check_matrix, sample_of


logger = logging.get_logger(__name__)

# Below this share of counts on known genes something is wrong with the names: real files reach 0.86 to 0.999, the
# lowest with a tenth of their counts on pseudogenes (docs/gene-names.md).
MIN_COVERAGE = 0.7
# Cells that are looked at to tell what a matrix holds and how much of it known genes cover.
SAMPLE_CELLS = 2048
# Columns of var that may hold further names of the same genes.
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
        What its columns are, weighted by the counts of a sample: evenly spaced runs of up to `SAMPLE_CELLS` cells.
    scale
        What its values are, told by that sample.
    name
        What to call the file in an error.
    """

    layer: str
    rows: Rows
    resolution: GeneResolution
    scale: ValueScale
    name: str

    @property
    def source(self) -> str:
        """The matrix as Python writes it, such as ``layers['counts']``."""
        return source_of(self.layer)

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """First cell of each chunk, and the one after its last."""
        return list(pairwise(self.rows.bounds()))

    def chunks(self, which: Sequence[int] | None = None) -> Iterator[sp.csr_matrix]:
        """All cells in order, (some cells, genes) at a time; the next chunk is read while one is worked on.

        Parameters
        ----------
        which
            Places in ``bounds`` of the chunks to read; None reads all.

        Raises
        ------
        ValueError
            If the file turns out to be damaged, or a count to be too large.
        """
        bounds = self.bounds
        with ThreadPoolExecutor(1) as reader:
            pending = None
            for index in range(len(bounds)) if which is None else which:
                coming = reader.submit(self.rows.read, *bounds[index])
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

    def tokens(
        self,
        tokenizer: PanFoMaTokenizer,
        max_length: int | None = None,
        is_kept: np.ndarray | None = None,
        which: Sequence[int] | None = None,
    ) -> Iterator[CellTokens]:
        """Cells in order as tokens, a chunk at a time.

        Parameters
        ----------
        tokenizer
            The one that resolved the genes.
        max_length
            Genes of a cell that are kept; None keeps all.
        is_kept
            (cells,), which cells to tokenize; None takes all.
        which
            Places in ``bounds`` of the chunks to tokenize; None takes all.
        """
        bounds = self.bounds
        which = range(len(bounds)) if which is None else which
        for index, chunk in zip(which, self.chunks(which), strict=True):
            if is_kept is not None:
                chunk = chunk[is_kept[slice(*bounds[index])]]
            try:
                tokens = tokenizer.tokenize_cells(chunk, self.resolution, max_length=max_length, scale=self.scale)
            except ValueError as error:
                raise ValueError(str(error).replace("the matrix", f"{self.source} of {self.name}", 1)) from None
            yield tokens


def source_of(layer: str) -> str:
    """A matrix's key as Python writes it."""
    return {"X": "X", "raw": "raw.X"}.get(layer, f"layers[{layer.removeprefix(LAYER_PREFIX)!r}]")


def read_expression(
    cells: CellFile,
    tokenizer: PanFoMaTokenizer,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
    min_coverage: float = MIN_COVERAGE,
) -> Expression:
    """Choose the matrix to read, find out what it holds, and resolve its genes.

    Of a layer of counts, raw and X, counts come before counts times a factor, and these before logarithms; of equal
    ones the layer before raw, and raw before X. Other layers are read where none of these can be.

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
    check_scale(cells, looked, is_named=layer is not None)
    matrix = cells.matrices[looked.layer]
    resolution = weigh(resolve_columns(matrix, tokenizer, gene_column), looked.sample, looked.scale)
    check_genes(cells, resolution, looked.sample, tokenizer, min_coverage)
    return Expression(looked.layer, matrix.rows, resolution, looked.scale, cells.name)


@dataclass
class Look:
    """What a look at some cells of each matrix gave.

    Parameters
    ----------
    scales
        What the matrices hold that were looked at, by key.
    layer
        The best of them.
    sample
        (sampled cells, genes), cells of that one.
    """

    scales: dict[str, ValueScale]
    layer: str
    sample: sp.csr_matrix

    @property
    def scale(self) -> ValueScale:
        """What the best matrix holds."""
        return self.scales[self.layer]


def look_at_matrices(cells: CellFile, layer: str | None = None) -> Look:
    """Look at one layer; or at layers of counts, raw and X until counts are found, and at others if none is readable.

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
    if not cells.matrices:
        raise ValueError(f"A matrix of expression is needed, got none in {cells.name}. Write it again with its counts.")
    names = {key: key.removeprefix(LAYER_PREFIX).lower() for key in cells.matrices if key not in ("raw", "X")}
    first = [key for key, name in names.items() if name in (*COUNT_LAYERS, "raw")]
    first += [key for key in ("raw", "X") if key in cells.matrices]
    others = [key for key in cells.matrices if key not in first]
    scales, best, best_sample = {}, None, None
    for key in [*first, *others] if layer is None else [layer]:
        if best is not None and key in others and scales[best].is_readable:
            break
        rows = cells.matrices[key].rows
        with readable(cells.name):
            sample = _without_repeats(sample_of(rows, SAMPLE_CELLS), source_of(key))
        scales[key] = value_scale(sample.indptr, sample.data)
        if best is None or KINDS.index(scales[key].kind) < KINDS.index(scales[best].kind):
            best, best_sample = key, sample
        if scales[key].kind == COUNTS:
            break
    return Look(scales, best, best_sample)


def _without_repeats(sample: sp.csr_matrix, source: str) -> sp.csr_matrix:
    """The sample in canonical form; a gene that stands twice in a cell is a sign of damage."""
    num_entries = sample.nnz
    if not sample.has_canonical_format:
        sample.sum_duplicates()
    if sample.nnz < num_entries:
        raise ValueError(
            f"a gene must stand once in a cell, got some {num_entries - sample.nnz:,} times more in {source}"
        )
    return sample


def check_scale(cells: CellFile, looked: Look, is_named: bool = False) -> None:
    """Raise ValueError where no matrix is usable; one that the user named may hold values that nothing explains."""
    if looked.scale.is_readable:
        return
    message = _unreadable(looked.scale, source_of(looked.layer), cells.name)
    if not (is_named and looked.scale.kind in (UNEXPLAINED, BINARY)):
        raise ValueError(message)
    logger.warning(f"{message} It is read as it is, as you named it.")


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
        names = [var[column] for column in var if str(column).lower() in NAME_COLUMNS]
        names = [column for column in names if column.dtype.kind not in "biufc"]
        # Numbers count rows more often than they name genes of NCBI.
        if not (names and np.mean([str(name).isdecimal() for name in var.index]) > 0.5):
            names.insert(0, var.index)
        first, *others = (tokenizer.resolve_genes(column) for column in names)
        resolution = functools.reduce(GeneResolution.filled_from, others, first)
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


def tokenizer_fingerprint(tokenizer: PanFoMaTokenizer) -> dict[str, Any]:
    """What of a tokenizer decides its tokens, as JSON can hold it."""
    return {
        "genes_sha256": tokenizer.genes_sha256,
        "gene_set": tokenizer.gene_set,
        "num_expression_bins": tokenizer.num_expression_bins,
        "added": dict(sorted(tokenizer.get_added_vocab().items())),
    }


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


def _read_zarr(path: str | Path) -> ad.AnnData:
    group = open_zarr(Path(path))
    try:
        return ad.read_zarr(group)
    finally:
        group.store.close()


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
                adata = ad.read_h5ad(cells) if file.format == "h5ad" else _read_zarr(cells)
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
