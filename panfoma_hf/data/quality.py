"""Quality control of cells: which are left out of a corpus, and why. The steps are the paper's, the thresholds ours."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from pydantic import BaseModel, ConfigDict, Field
from transformers.utils import logging

from ..tokenization import GeneResolution, ValueScale
from ..tokenization.value_scale import COUNTS, FRACTIONAL
from .cell_file import one_line
from .cells import Expression


logger = logging.get_logger(__name__)

KEPT = "kept"
EXCLUDED = "excluded by the source list"
FEW_GENES = "few genes"
MITOCHONDRIAL = "mitochondrial"
MANY_GENES = "many genes"
MANY_COUNTS = "many counts"
DOUBLET = "doublet"
# Every cell has one of these, the first that applies; a verdict is an index into them.
VERDICTS = (KEPT, EXCLUDED, FEW_GENES, MITOCHONDRIAL, MANY_GENES, MANY_COUNTS, DOUBLET)
# HGNC's prefix of the 37 genes of the mitochondrial genome, of which 13 code for proteins.
MITOCHONDRIAL_PREFIX = "MT-"


class Quality(BaseModel):
    """Thresholds of quality control. All count genes of the vocabulary only, so that studies are treated alike.

    The paper publishes no thresholds. The defaults' sources: 200 genes and 3 cells are those of Seurat's tutorial,
    which scanpy's follows; 5 median absolute deviations of the logarithms are those of Heumos et al., Nature Reviews
    Genetics 2023, who call them permissive; a fifth of mitochondrial counts is at the upper end of what is common, as
    5 % is too low for many a human tissue (Osorio and Cai, Bioinformatics 2021) and tumours.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_genes: int = Field(
        200, ge=0, description="Cells that express fewer genes are left out; those that express none always are."
    )
    max_mitochondrial: float | None = Field(
        0.2, ge=0, le=1, description="Cells with a larger share of mitochondrial counts are left out; null keeps all."
    )
    max_genes_mads: float | None = Field(
        5.0,
        gt=0,
        description="Cells are left out that express more genes than their sample's median by so many median absolute "
        "deviations, both of log(1 + genes); null keeps all.",
    )
    max_counts_mads: float | None = Field(
        5.0, gt=0, description="As max_genes_mads, of counts; only where the file holds counts. Null keeps all."
    )
    min_sample_cells: int = Field(
        50, ge=2, description="Samples with fewer cells are judged neither by deviations nor for doublets."
    )
    min_cells_per_gene: int = Field(
        3,
        ge=0,
        description="Genes expressed in fewer of a file's kept cells are left out of its cells' tokens, if it has at "
        "least twice as many.",
    )
    doublets: Literal["none", "scrublet"] = Field(
        "none", description="scrublet: also leave out what Scrublet calls doublets, in each sample; needs counts."
    )
    expected_doublet_rate: float = Field(0.05, gt=0, lt=1, description="Scrublet's prior.")


@dataclass
class CellQuality:
    """What was measured on the cells of one matrix, and the verdict on each.

    Parameters
    ----------
    genes
        (cells,), genes of the vocabulary that are expressed.
    counts
        (cells,), the sum over them, logarithms taken back.
    mitochondrial
        (cells,), share of the counts on mitochondrial genes; NaN where the matrix has none of these, or the cell no
        counts.
    verdicts
        (cells,) uint8, indices into `VERDICTS`.
    limits
        By sample, what its cells were held to.
    notes
        What could not be judged, and why.
    """

    genes: np.ndarray
    counts: np.ndarray
    mitochondrial: np.ndarray
    verdicts: np.ndarray
    limits: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_kept(self) -> np.ndarray:
        """(cells,), whether a cell stays."""
        return self.verdicts == 0

    def dropped(self) -> dict[str, int]:
        """Number of cells left out, by reason; reasons without cells too."""
        counted = np.bincount(self.verdicts, minlength=len(VERDICTS))
        return {reason: int(count) for reason, count in zip(VERDICTS[1:], counted[1:], strict=True)}


def judge_cells(
    expression: Expression,
    quality: Quality,
    samples: Sequence[str],
    is_excluded: np.ndarray | None = None,
) -> CellQuality:
    """Measure every cell and say which to leave out, in one pass over the matrix; in two with Scrublet.

    Each cell gets the first reason that applies: excluded beforehand, few genes, mitochondrial, many genes, many
    counts, doublet. Deviations are those from a sample's cells that no earlier reason took, of its genes and counts
    alike.

    Parameters
    ----------
    expression
        A matrix whose genes are resolved.
    quality
        The thresholds.
    samples
        (cells,), the sample that each cell was captured in, as names or categories: doublets and depth are matters of
        one capture.
    is_excluded
        (cells,), cells to leave out whatever they hold; None excludes none.
    """
    judged = _measured(expression)
    verdicts = judged.verdicts

    def leave_out(reason: str, cells: np.ndarray) -> None:
        verdicts[cells[verdicts[cells] == 0]] = VERDICTS.index(reason)

    if is_excluded is not None:
        leave_out(EXCLUDED, np.flatnonzero(is_excluded))
    leave_out(FEW_GENES, np.flatnonzero(judged.genes < max(quality.min_genes, 1)))
    if quality.max_mitochondrial is not None:
        if np.isnan(judged.mitochondrial).all():
            judged.notes.append("the file has no mitochondrial genes: their share was not judged")
        leave_out(MITOCHONDRIAL, np.flatnonzero(judged.mitochondrial > quality.max_mitochondrial))
    samples = pd.Categorical(samples)
    _leave_out_outliers(judged, quality, samples, expression.scale, leave_out)
    if quality.doublets == "scrublet":
        _leave_out_doublets(judged, quality, samples, expression, leave_out)
    return judged


def _measured(expression: Expression) -> CellQuality:
    """Genes, counts and the mitochondrial share of every cell."""
    num_cells, resolution = len(expression), expression.resolution
    is_gene = resolution.token_ids >= 0
    is_mitochondrial = is_gene & np.array([symbol.startswith(MITOCHONDRIAL_PREFIX) for symbol in resolution.symbols])
    log_base = expression.scale.log_base
    genes = np.zeros(num_cells, dtype=np.int32)
    counts, mitochondrial = np.zeros(num_cells), np.zeros(num_cells)
    start = 0
    for chunk in expression.chunks():
        cells = slice(start, start + chunk.shape[0])
        start += chunk.shape[0]
        genes[cells] = np.bincount(_expressed(chunk, resolution)[0], minlength=chunk.shape[0])
        values = chunk.data.astype(np.float64)
        if log_base is not None:
            values = np.expm1(values * np.log(log_base))
        values[~is_gene[chunk.indices]] = 0
        row = np.repeat(np.arange(chunk.shape[0], dtype=np.int32), np.diff(chunk.indptr))
        counts[cells] = np.bincount(row, values, minlength=chunk.shape[0])
        of_mitochondria = is_mitochondrial[chunk.indices]
        mitochondrial[cells] = np.bincount(row[of_mitochondria], values[of_mitochondria], minlength=chunk.shape[0])
    known = (counts > 0) & is_mitochondrial.any()
    share = np.divide(mitochondrial, counts, out=np.full(num_cells, np.nan), where=known)
    return CellQuality(genes, counts, share, np.zeros(num_cells, dtype=np.uint8))


def _leave_out_outliers(judged, quality, samples, scale: ValueScale, leave_out) -> None:
    measures = []
    if quality.max_genes_mads is not None:
        measures.append((MANY_GENES, judged.genes, quality.max_genes_mads))
    if quality.max_counts_mads is not None and scale.kind in (COUNTS, FRACTIONAL):
        measures.append((MANY_COUNTS, judged.counts, quality.max_counts_mads))
    elif quality.max_counts_mads is not None:
        judged.notes.append(f"the file holds {scale.kind}: the number of counts was not judged")
    considered = judged.verdicts == 0
    too_small = 0
    for sample, cells in _cells_by_sample(samples, considered).items():
        if len(cells) < quality.min_sample_cells:
            too_small += 1
            continue
        for reason, values, mads in measures:
            limit = upper_limit(values[cells], mads)
            if limit is not None:
                judged.limits.setdefault(sample, {})[reason] = round(limit, 1)
                leave_out(reason, cells[values[cells] > limit])
    if too_small and measures:
        judged.notes.append(
            f"{too_small:,} samples have fewer than {quality.min_sample_cells} cells: their deviations were not judged"
        )


def upper_limit(values: np.ndarray, mads: float) -> float | None:
    """The value beyond which others lie more than ``mads`` median absolute deviations above the median of log(1 + x).

    None where at least half of the values are the same, of which no deviation can be told.
    """
    logs = np.log1p(values)
    median = np.median(logs)
    deviation = np.median(np.abs(logs - median))
    return None if deviation == 0 else float(np.expm1(median + mads * deviation))


def _cells_by_sample(samples: pd.Categorical, considered: np.ndarray) -> dict[str, np.ndarray]:
    """Indices of the cells considered, by sample; samples without any are not in it."""
    index = np.flatnonzero(considered)
    codes = samples.codes[index]
    order = np.argsort(codes, kind="stable")
    parts = np.split(index[order], np.cumsum(np.bincount(codes, minlength=len(samples.categories)))[:-1])
    return {str(name): part for name, part in zip(samples.categories, parts, strict=True) if len(part)}


def _leave_out_doublets(judged, quality, samples, expression: Expression, leave_out) -> None:
    if expression.scale.kind not in (COUNTS, FRACTIONAL):
        judged.notes.append(f"the file holds {expression.scale.kind}: Scrublet, which needs counts, was not run")
        return
    is_gene = np.flatnonzero(expression.resolution.token_ids >= 0)
    for sample, cells in _cells_by_sample(samples, judged.verdicts == 0).items():
        if len(cells) < quality.min_sample_cells:
            continue
        try:
            called = _scrublet(expression.rows.sample(cells)[:, is_gene], quality.expected_doublet_rate)
        except _NoVerdict as error:
            judged.notes.append(f"Scrublet did not judge {sample}, of which no cell was left out for it: {error}")
            continue
        leave_out(DOUBLET, cells[called])


class _NoVerdict(Exception):
    """Scrublet cannot tell doublets in a sample."""


def _scrublet(counts: sp.csr_matrix, expected_rate: float) -> np.ndarray:
    """(cells,), what Scrublet calls doublets among a sample's cells."""
    try:
        import scanpy
        import skimage  # noqa: F401 - Scrublet's threshold
    except ImportError as error:
        raise ValueError(
            f"Doublets are found by Scrublet in scanpy with scikit-image, got none: {error}. "
            "Install them with `pip install 'panfoma-hf[analysis]'`, or set `doublets: none`."
        ) from error
    cells = ad.AnnData(counts.astype(np.float32))
    verbosity, scanpy.settings.verbosity = scanpy.settings.verbosity, 0
    try:
        scanpy.pp.scrublet(
            cells,
            expected_doublet_rate=expected_rate,
            # Exact ones depend on no number of threads, nor on pynndescent, whose 0.7 fails with scanpy 1.11.
            use_approx_neighbors=False,
            random_state=0,
        )
    except ValueError as error:  # fewer variable genes or cells than it takes components
        raise _NoVerdict(one_line(error)) from error
    finally:
        scanpy.settings.verbosity = verbosity
    if "predicted_doublet" not in cells.obs:
        raise _NoVerdict("its scores have no threshold between singlets and doublets")
    return cells.obs["predicted_doublet"].to_numpy(bool)


def rare_genes(expressed_in: np.ndarray, num_cells: int, quality: Quality, notes: list[str]) -> np.ndarray:
    """(vocabulary,), which genes to leave out; a note is added where there are too few cells to tell.

    Parameters
    ----------
    expressed_in
        (vocabulary,), what `cells_per_token` gives.
    num_cells
        Cells kept.
    quality
        The thresholds.
    notes
        Of the file.
    """
    is_rare = (expressed_in > 0) & (expressed_in < quality.min_cells_per_gene)
    if is_rare.any() and num_cells < 2 * quality.min_cells_per_gene:
        notes.append(f"{num_cells:,} cells are too few to tell rare genes by: none was left out")
        return np.zeros_like(is_rare)
    return is_rare


def cells_per_token(expression: Expression, is_kept: np.ndarray, num_tokens: int) -> np.ndarray:
    """In how many of the kept cells each gene is expressed, in one pass over the matrix.

    Parameters
    ----------
    expression
        A matrix whose genes are resolved.
    is_kept
        (cells,), the cells that count.
    num_tokens
        Size of the vocabulary.

    Returns
    -------
    (num_tokens,) int64, by token id.
    """
    cells = np.zeros(num_tokens, dtype=np.int64)
    start = 0
    for chunk in expression.chunks():
        kept = chunk[is_kept[start : start + chunk.shape[0]]]
        start += chunk.shape[0]
        cells += np.bincount(_expressed(kept, expression.resolution)[1], minlength=num_tokens)
    return cells


def _expressed(chunk: sp.csr_matrix, resolution: GeneResolution) -> tuple[np.ndarray, np.ndarray]:
    """Cells and token ids of the genes of the vocabulary that are expressed, each gene once in a cell."""
    tokens = resolution.token_ids[chunk.indices]
    is_expressed = (tokens >= 0) & (chunk.data > 0)
    row = np.repeat(np.arange(chunk.shape[0], dtype=np.int32), np.diff(chunk.indptr))[is_expressed]
    tokens = tokens[is_expressed]
    if resolution.duplicates:  # several columns of one gene
        shared = np.isin(resolution.symbols, list(resolution.duplicates))[chunk.indices[is_expressed]]
        size = np.int64(tokens.max(initial=0) + 1)
        pairs = np.unique(row[shared] * size + tokens[shared])
        row = np.append(row[~shared], pairs // size)
        tokens = np.append(tokens[~shared], pairs % size)
    return row, tokens
