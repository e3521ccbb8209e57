"""Variable genes of training cells, by scanpy."""

import anndata as ad
import numpy as np
import scipy.sparse as sp

from ..tokenization import PanFoMaTokenizer, choose_layer, choose_matrix
from .cells import resolve_columns
from .readers import anndata_cells


def log_normalized(adata: ad.AnnData, layer: str | None = None) -> ad.AnnData:
    """A copy whose ``X`` is CSR log1p(counts per 10,000); the cells themselves are left as they are.

    Raises
    ------
    ImportError
        If scanpy is not installed.
    """
    scanpy = _scanpy()
    matrix, names, _ = choose_matrix(adata, layer)
    copy = ad.AnnData(sp.csr_matrix(matrix, dtype="float32", copy=True), obs=adata.obs[[]].copy())
    copy.var_names = names
    scanpy.pp.normalize_total(copy, target_sum=1e4)
    scanpy.pp.log1p(copy)
    return copy


def variable_genes(
    adata: ad.AnnData,
    num_genes: int,
    tokenizer: PanFoMaTokenizer | None = None,
    *,
    layer: str | None = None,
    gene_column: str | None = None,
) -> list[str]:
    """Find the most variable genes, by Pearson residuals of counts (Lause et al., Genome Biology 2021; scanpy).

    Dispersion of log-normalised values, the older way, compares genes of like mean and so leaves out the very genes
    that name a cell when they tower over all others: insulin, glucagon and somatostatin in the pancreas.

    Parameters
    ----------
    adata
        Training cells; never those that a score is measured on.
    num_genes
        How many genes; all where there are fewer.
    tokenizer
        Restricts the choice to genes that it knows, by their approved symbols, with columns of one gene added up; None
        chooses among all columns.
    layer, gene_column
        As in `panfoma_hf.finetune`.

    Raises
    ------
    ValueError
        If the values are not counts, or no gene is asked for.
    ImportError
        If scanpy is not installed.
    """
    if num_genes < 1:
        raise ValueError(f"At least one variable gene must be asked for, got {num_genes}. 1,000 serve many a tissue.")
    scanpy = _scanpy()
    layer = choose_layer(adata) if layer is None else layer
    matrix, names, source = choose_matrix(adata, layer, gene_column)
    matrix = sp.csr_matrix(matrix)
    if (matrix.data < 0).any() or (matrix.data % 1).any():
        raise ValueError(
            f"Variable genes are found on counts, got values in {source} that are no whole numbers. "
            "Name the layer with counts, or pass the names of genes as `gene_set`."
        )
    if tokenizer is not None:
        resolution = resolve_columns(anndata_cells(adata).matrices[layer], tokenizer, gene_column)
        known = np.flatnonzero(resolution.token_ids >= 0)
        tokens, gene_of_column = np.unique(resolution.token_ids[known], return_inverse=True)
        gene_of_column = sp.csr_matrix((np.ones(len(known)), (known, gene_of_column)), (len(names), len(tokens)))
        matrix, names = matrix @ gene_of_column, np.array(tokenizer.convert_ids_to_tokens(tokens.tolist()))
    chosen = np.flatnonzero((matrix > 0).sum(axis=0))
    cells = ad.AnnData(matrix[:, chosen], var={"name": names[chosen]})
    scanpy.experimental.pp.highly_variable_genes(cells, n_top_genes=min(num_genes, cells.n_vars))
    return cells.var["name"][cells.var["highly_variable"]].tolist()


def _scanpy():
    try:
        import scanpy
    except ImportError as error:
        raise ImportError(
            "Variable genes are found by scanpy, which is not installed. "
            "Run `pip install panfoma-hf[analysis]`, or pass the names of genes as `gene_set`."
        ) from error
    return scanpy
