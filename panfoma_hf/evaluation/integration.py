"""How well an embedding keeps cell types apart and mixes batches, by scib; and Harmony, the classical integration."""

import contextlib
import io
import warnings
from collections.abc import Sequence

import anndata as ad
import numpy as np
import pandas as pd
from scipy.sparse import SparseEfficiencyWarning


NUM_NEIGHBOURS = 15  # as scanpy counts them: the cell itself is one
# Fewer would shrink the neighbourhoods, and Harmony would have no cluster, as it takes one for each 30 cells.
FEWEST_CELLS = 16


def integration_metrics(
    embedding: np.ndarray,
    labels: Sequence[str],
    batches: Sequence[str],
    *,
    seed: int = 0,
    resolutions: Sequence[float] | None = None,
) -> dict[str, float]:
    """Score how an embedding keeps labels apart and mixes batches (Luecken et al., Nature Methods 2022), by scib.

    The averages are those of PanFoMa's paper. All scores lie between 0 and 1, of which 1 is best, except ARI, which may
    fall below 0. The same input gives the same scores. Time grows with the square of the number of cells.

    Parameters
    ----------
    embedding
        (cells, dims), finite; distances are Euclidean, and it is taken as it is: not scaled, not reduced.
    labels
        (cells,), cell types. One of a single cell counts in all scores but ``asw_batch``.
    batches
        (cells,), at least two different ones.
    seed
        Seed of the clustering.
    resolutions
        Of Leiden, of which the one with the highest NMI is taken; None takes scib's, 0.2 to 2 in steps of 0.2.

    Returns
    -------
    ``nmi``, ``ari``: of labels and Leiden clusters of the graph of 15 neighbours.
    ``asw_label``: silhouette width of labels, averaged over cells, rescaled from -1 to 1 to 0 to 1.
    ``asw_batch``: 1 - abs(silhouette width of batches) within each label, averaged over its cells, then over labels.
    Labels without a silhouette are left out: those in one batch only, and those with as many batches as cells. A cell
    that is alone in its batch within a label has a width of 0 by definition, and so counts as mixed.
    ``graph_connectivity``: share of a label's cells in the largest connected part of its graph, averaged over labels.
    ``avg_bio``: mean of ``nmi``, ``ari`` and ``asw_label``.
    ``avg_batch``: mean of ``asw_batch`` and ``graph_connectivity``.

    Raises
    ------
    ImportError
        If scib is not installed.
    ValueError
        If lengths differ; a value of the embedding is not finite; a label or batch is missing; there are fewer than 16
        cells, two labels or two batches; each cell has a label of its own; no label has a silhouette of its batches; or
        a resolution is not positive.
    """
    embedding = _checked_embedding(embedding)
    labels, batches = (
        _checked_names(names, what, len(embedding)) for names, what in ((labels, "label"), (batches, "batch"))
    )
    _check_that_scores_exist(labels, batches)
    resolutions = None if resolutions is None else _checked_resolutions(resolutions)
    scanpy, scib = _scanpy_and_scib()

    # The names of the columns are given to scib below. Its graph connectivity fails on categories without cells, so
    # they are those that occur.
    names = np.arange(len(embedding)).astype(str)
    cells = ad.AnnData(obs=pd.DataFrame({"label": labels, "batch": batches}, index=names), obsm={"X_emb": embedding})
    with warnings.catch_warnings():
        # Arises where more cells are the same than a cell has neighbours, as where an embedding has collapsed.
        warnings.filterwarnings("ignore", "Changing the sparsity structure", SparseEfficiencyWarning)
        # Exact neighbours depend on no number of threads, nor on pynndescent, whose 0.7 fails with scanpy 1.11; the
        # silhouette takes the distances of all pairs, too.
        scanpy.pp.neighbors(cells, NUM_NEIGHBOURS, use_rep="X_emb", transformer="sklearn", random_state=seed)
    with contextlib.redirect_stdout(io.StringIO()):  # prints each resolution, even if it is asked not to
        best, nmi = scib.me.cluster_optimal_resolution(
            cells,
            label_key="label",
            cluster_key="cluster",
            cluster_function=scanpy.tl.leiden,
            resolutions=resolutions,
            verbose=False,
            flavor="igraph",
            directed=False,
            random_state=seed,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pandas.value_counts is deprecated", FutureWarning)
        connectivity = scib.me.graph_connectivity(cells, label_key="label")
    scores = {
        "nmi": nmi,
        # Not the column "cluster", which is empty where every resolution has an NMI of 0.
        "ari": scib.me.ari(cells, cluster_key=f"cluster_{best}", label_key="label"),
        "asw_label": scib.me.silhouette(cells, label_key="label", embed="X_emb"),
        "asw_batch": scib.me.silhouette_batch(
            cells, batch_key="batch", label_key="label", embed="X_emb", verbose=False
        ),
        "graph_connectivity": connectivity,
    }
    scores["avg_bio"] = np.mean([scores[name] for name in ("nmi", "ari", "asw_label")])
    scores["avg_batch"] = np.mean([scores[name] for name in ("asw_batch", "graph_connectivity")])
    return {name: float(score) for name, score in scores.items()}


def harmony(components: np.ndarray, batches: Sequence[str], *, seed: int = 0) -> np.ndarray:
    """Mix batches by Harmony (Korsunsky et al., Nature Methods 2019), with harmonypy's defaults.

    Parameters
    ----------
    components
        (cells, components), principal components of log-normalised counts.
    batches
        (cells,), at least two different ones.
    seed
        Seed of the clustering inside; the same input gives the same result.

    Returns
    -------
    (cells, components) float64, corrected.

    Raises
    ------
    ImportError
        If harmonypy is not installed.
    ValueError
        If lengths differ; a component is not finite; a batch is missing; or there are fewer than 16 cells or two
        batches.
    """
    components = _checked_embedding(components)
    batches = _checked_names(batches, "batch", len(components))
    try:
        import harmonypy
    except ImportError as error:
        raise ImportError(
            "Harmony is run by harmonypy, which is not installed. Run `pip install panfoma-hf[benchmark]`."
        ) from error
    # Transposed, as harmonypy tells cells from components by their number and takes (components, cells) where that is
    # the same; what it returns is (cells, components) since 2.0 and was the transpose before.
    result = harmonypy.run_harmony(
        components.T, pd.DataFrame({"batch": batches}), "batch", random_state=seed, verbose=False
    )
    corrected = np.asarray(result.Z_corr)
    return corrected if len(corrected) == len(components) else corrected.T


def _checked_embedding(embedding: np.ndarray) -> np.ndarray:
    """(cells, dims) float64: distances of half precision would be those of its rounding."""
    embedding = np.asarray(embedding, dtype=np.float64)
    if embedding.ndim != 2 or embedding.shape[1] == 0:
        raise ValueError(
            f"An embedding has the shape (cells, dims), got {embedding.shape}. Give one row of numbers for each cell."
        )
    if len(embedding) < FEWEST_CELLS:
        raise ValueError(
            f"Integration needs at least {FEWEST_CELLS} cells, as each has {NUM_NEIGHBOURS} neighbours, got "
            f"{len(embedding)}. Add cells."
        )
    broken = np.flatnonzero(~np.isfinite(embedding).all(axis=1))
    if len(broken):
        raise ValueError(
            f"An embedding must be finite, got NaN or infinity in {len(broken):,} of {len(embedding):,} cells, the "
            f"first of which is cell {broken[0]}. Leave them out, or look at how they were embedded."
        )
    return embedding


def _checked_names(names: Sequence[str], what: str, num_cells: int) -> pd.Categorical:
    """Labels or batches as categories, all of which occur."""
    names = np.asarray(names)
    if names.shape != (num_cells,):
        raise ValueError(
            f"There must be one {what} for each of the {num_cells:,} cells, got the shape {names.shape}. Give those of "
            "the embedded cells, in their order."
        )
    missing = int(pd.isna(names).sum())
    if missing:
        raise ValueError(
            f"Every cell needs a {what}, got none for {missing:,} of {num_cells:,}. Leave these cells out of the "
            "embedding, too, or name them."
        )
    categories = pd.Categorical(names.astype(str))
    if len(categories.categories) < 2:
        raise ValueError(
            f"Integration needs at least two different {'batches' if what == 'batch' else 'labels'}, got only "
            f"{categories.categories[0]!r}. Take another column, or add cells."
        )
    return categories


def _check_that_scores_exist(labels: pd.Categorical, batches: pd.Categorical) -> None:
    """Raise where every cell has a label of its own, or no label has a silhouette of its batches."""
    cells_of_batch = pd.crosstab(labels, batches).to_numpy()
    num_batches, num_cells = (cells_of_batch > 0).sum(axis=1), cells_of_batch.sum(axis=1)
    if num_cells.max() == 1:
        raise ValueError(
            f"A label needs several cells, got {len(num_cells):,} labels for as many cells. Take the column of cell "
            "types, not of barcodes."
        )
    if not ((num_batches > 1) & (num_batches < num_cells)).any():
        raise ValueError(
            "ASW of batches needs a label that occurs in two batches, with two cells in one of them, got none among "
            f"{', '.join(labels.categories[:5])}{', ...' if len(num_cells) > 5 else ''}. Use the same names of cell "
            "types in all batches, or take another column for these."
        )


def _checked_resolutions(resolutions: Sequence[float]) -> list[float]:
    resolutions = [float(resolution) for resolution in resolutions]
    if not resolutions or not all(0 < resolution < np.inf for resolution in resolutions):
        raise ValueError(
            f"Leiden needs at least one resolution, all positive, got {resolutions}. 1 is usual; None takes scib's."
        )
    return resolutions


def _scanpy_and_scib():
    try:
        import scanpy
        import scib
    except ImportError as error:
        raise ImportError(
            "Integration is scored by scib, which is not installed. Run `pip install panfoma-hf[benchmark]`."
        ) from error
    return scanpy, scib
