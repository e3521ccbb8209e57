"""Pictures of what the model did; needs the `analysis` extra."""

import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from transformers.utils import logging


logger = logging.get_logger(__name__)

# What `panfoma_hf.annotate` calls a cell of a low score, and what a cell without a name is called here.
UNASSIGNED = "Unassigned"
MISSING = "missing"
_GREYS = {UNASSIGNED: "#8c8c8c", MISSING: "#dedede"}
# UMAP asks for more cells than it has dimensions.
MIN_CELLS = 5
# In inches: a panel of a UMAP, and a letter of a legend at its size.
_PANEL, _LETTER = 4.2, 0.085
_PANELS_A_ROW = 3
# Names one below the other in a legend beside a panel.
_LEGEND_ROWS = 22
# From here on, a confusion matrix is drawn smaller.
_MANY_NAMES = 20
# A column of so many different whole numbers holds names.
_FEW_NUMBERS = 20
# Of UMAP, and of the order in which cells are drawn.
_SEED = 0


def save_umap(
    adata: ad.AnnData, path: str | Path, colors: str | Sequence[str], *, embedding: str = "X_panfoma"
) -> None:
    """Draw a UMAP of an embedding, one panel for each column of ``obs``, and save it.

    A column of numbers, such as a score, has a colour bar. Any other has a colour for each name: the same one in every
    panel and picture of these cells (`name_colors`); panels that share names share a legend. "Unassigned" is grey,
    and what is missing light grey, below the other cells, whose order is by chance. ``obsm["X_umap"]`` is written.

    Parameters
    ----------
    adata
        Cells with ``obsm[embedding]``.
    path
        A PNG, PDF or SVG file; cells are pixels in any of them.
    colors
        Columns of ``obs``. Numbers are amounts, unless there are at most 20 different ones, all whole, as of donors;
        make a column categorical to have more of them taken for names.
    embedding
        Key of ``obsm``. "X_umap" is drawn as it is, without being computed again.

    Raises
    ------
    ValueError
        If there is no such column or embedding, a column has no value or more names than there are colours, an
        embedding is not finite, cells are too few, or the file is of another format.
    """
    colors = [colors] if isinstance(colors, str) else list(colors)
    if not colors:
        raise ValueError("At least one column of `obs` is drawn, got none. Name one in `colors`.")
    _check_path(path)
    for column in colors:
        _check_column(adata, column)
    points = _umap(adata, embedding)

    is_numeric = {column: _is_numeric(adata.obs[column]) for column in colors}
    legends = _shared_legends(adata.obs, [column for column in colors if not is_numeric[column]])
    rows = -(-len(colors) // _PANELS_A_ROW)
    columns = -(-len(colors) // rows)
    widths = np.zeros(columns)
    for place, column in enumerate(colors):
        wide = 0.9 if is_numeric[column] else _legend_width(legends[column])
        widths[place % columns] = max(widths[place % columns], wide)
    figure = Figure(figsize=(_PANEL * columns + widths.sum(), (_PANEL + 0.5) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, column in zip(axes, colors, strict=False):
        values = adata.obs[column]
        if is_numeric[column]:
            _draw_numbers(axis, points, values.to_numpy(dtype=float, na_value=np.nan))
        else:
            by_name = name_colors(adata.obs, column)
            _draw_names(axis, points, _names_of(values), by_name)
        axis.set(title=column, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
        if legends.get(column):
            _draw_legend(axis, legends[column])
    for axis in axes[len(colors) :]:
        axis.set_axis_off()
    _save(figure, path)


def _umap(adata: ad.AnnData, embedding: str) -> np.ndarray:
    """(cells, 2), where cells are drawn; written to ``obsm["X_umap"]`` if it was computed."""
    if embedding not in adata.obsm:
        raise ValueError(
            f"`embedding` is a key of `obsm`, got {embedding!r}; there are {sorted(adata.obsm)}. Embed the cells first "
            "with `panfoma_hf.embed`."
        )
    values = np.asarray(adata.obsm[embedding])
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"An embedding has at least two columns, got {values.shape} in obsm[{embedding!r}].")
    if not np.isfinite(values).all():
        raise ValueError(f"An embedding is drawn where it is finite, got NaN or infinity in obsm[{embedding!r}].")
    if embedding == "X_umap":
        return values[:, :2]
    if adata.n_obs < MIN_CELLS:
        raise ValueError(f"A UMAP needs at least {MIN_CELLS} cells, got {adata.n_obs}. Draw more cells at once.")
    # Not by way of scanpy.pp.neighbors, as scanpy 1.11 fails above 8,192 cells with pynndescent 0.7.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of Tensorflow, which another UMAP of this package needs
        from umap import UMAP

    # One thread, as UMAP with a seed has no more, and says so. It starts from principal components, as Kobak and
    # Linderman (Nature Biotechnology 2021) advise; the default takes many minutes where types lie far apart.
    umap = UMAP(n_neighbors=min(15, adata.n_obs - 1), min_dist=0.5, init="pca", random_state=_SEED, n_jobs=1)
    adata.obsm["X_umap"] = umap.fit_transform(values)
    return adata.obsm["X_umap"]


def _draw_numbers(axis: Axes, points: np.ndarray, values: np.ndarray) -> None:
    is_known = np.isfinite(values)
    order = np.random.default_rng(_SEED).permutation(np.flatnonzero(is_known))
    if not is_known.all():
        _draw_cells(axis, points, np.flatnonzero(~is_known), color=_GREYS[MISSING])
        handle = _legend_handle(f"{MISSING} ({(~is_known).sum():,} cells)", _GREYS[MISSING])
        axis.legend(handles=[handle], loc="upper left", bbox_to_anchor=(0, -0.06), frameon=False, fontsize=9)
    drawn = _draw_cells(axis, points, order, c=values[order], cmap="viridis")
    axis.figure.colorbar(drawn, ax=axis, shrink=0.7)


def _draw_names(axis: Axes, points: np.ndarray, names: np.ndarray, by_name: Mapping[str, str]) -> None:
    is_missing = names == MISSING
    _draw_cells(axis, points, np.flatnonzero(is_missing), color=_GREYS[MISSING])
    order = np.random.default_rng(_SEED).permutation(np.flatnonzero(~is_missing))
    _draw_cells(axis, points, order, c=[by_name[name] for name in names[order]])


def _draw_cells(axis: Axes, points: np.ndarray, order: np.ndarray, **colors):
    size = np.clip(24_000 / len(points), 0.4, 24)
    # Pixels, as a file of 100,000 circles opens in no viewer.
    return axis.scatter(*points[order].T, s=size, linewidths=0, rasterized=True, **colors)


def _shared_legends(obs: pd.DataFrame, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colours by name in the legend beside each column; empty where a later one that shares names has it."""
    drawn = {column: set(_names_of(obs[column])) for column in columns}
    legends = {column: {} for column in columns}
    for column in columns:
        sharing = _connected(column, {key: names - _GREYS.keys() for key, names in drawn.items()})
        last = [key for key in columns if key in sharing][-1]
        names = sorted(set().union(*(drawn[key] for key in sharing)), key=_place)
        by_name = {key: color for other in sharing for key, color in name_colors(obs, other).items()}
        legends[last] = {name: by_name[name] for name in names}
    return legends


def _draw_legend(axis: Axes, by_name: Mapping[str, str]) -> None:
    axis.legend(
        handles=[_legend_handle(name, color) for name, color in by_name.items()],
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        ncols=-(-len(by_name) // _LEGEND_ROWS),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
        columnspacing=1,
        borderaxespad=0,
    )


def _legend_handle(name: str, color: str) -> Line2D:
    return Line2D([], [], ls="", marker="o", ms=6, color=color, label=name)


def _legend_width(names: Sequence[str]) -> float:
    """In inches."""
    columns = -(-len(names) // _LEGEND_ROWS)
    return columns * (0.4 + _LETTER * max(map(len, names), default=0))


def name_colors(obs: pd.DataFrame, column: str) -> dict[str, str]:
    """Colour of each name of a column, and of each column that shares names with it.

    All of ``obs`` is looked at, not only what is drawn, so that a name has the same colour in all pictures of the same
    cells; it may have another one in a picture of some of them, where there are fewer names. Up to 20 names have
    scanpy's colours for so many; more have its 102, without those that are grey or too pale to be seen.

    Parameters
    ----------
    obs
        A table of cells.
    column
        One of its columns, which is no column of numbers.

    Returns
    -------
    Colours by name, as hexadecimal text. "Unassigned" is grey; missing values are light grey, and called "missing".
    """
    few, many = _palettes()
    by_column = {
        key: set(names) - _GREYS.keys()
        for key in obs
        if not _is_numeric(obs[key]) and len(names := _possible_names(obs[key])) <= len(many)
    }
    sharing = _connected(column, by_column)
    names = sorted(set().union(*(by_column[key] for key in sharing)), key=_place)
    palette = few if len(names) <= len(few) else many
    if len(names) > len(palette):
        logger.warning(
            f"{len(palette)} colours are told apart, got {len(names)} names like those of {column}: some repeat."
        )
    return {**{name: palette[place % len(palette)] for place, name in enumerate(names)}, **_GREYS}


def _palettes() -> tuple[list[str], list[str]]:
    """Colours for few names and for many."""
    from scanpy.plotting import palettes

    def is_seen(color: str) -> bool:
        rgb = np.array(to_rgb(color))
        return np.ptp(rgb) >= 0.15 and rgb @ (0.2126, 0.7152, 0.0722) < 0.8

    return list(palettes.vega_20_scanpy), [color for color in palettes.default_102 if is_seen(color)]


def _connected(column: str, names: Mapping[str, set[str]]) -> list[str]:
    """The column and those that share names with it, or with one that does, and so on."""
    found, all_names, before = [column], set(names[column]), 0
    while len(found) > before:
        before = len(found)
        for key, own in names.items():
            if key not in found and own & all_names:
                found.append(key)
                all_names |= own
    return found


def _is_numeric(values: pd.Series) -> bool:
    """Whether a column holds amounts; a few whole numbers are names, as those of donors, batches and clusters."""
    if pd.api.types.is_integer_dtype(values.dtype):
        return values.nunique() > _FEW_NUMBERS
    return pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype)


def _possible_names(values: pd.Series) -> list[str]:
    """Names of a column; of a categorical one those that no cell has, too."""
    if isinstance(values.dtype, pd.CategoricalDtype):
        return [str(name) for name in values.cat.categories]
    return [str(name) for name in values.dropna().unique()]


def _names_of(values: pd.Series) -> np.ndarray:
    """(cells,), names as text; "missing" where there is none."""
    names = values.astype(object).where(values.notna(), MISSING)
    return names.astype(str).to_numpy(dtype=object)


def _place(name: str) -> tuple:
    """Sorts names: by the numbers in them, "Unassigned" and what is missing last."""
    parts = re.split(r"(\d+)", name.lower())
    return name == MISSING, name == UNASSIGNED, [int(part) if part.isdecimal() else part for part in parts], name


def _check_column(adata: ad.AnnData, column: str, *, is_named: bool = False) -> None:
    """Raise ValueError unless a column of ``obs`` can be drawn; if ``is_named``, as one of names."""
    if column not in adata.obs:
        raise ValueError(
            f"A column of `obs` is drawn, got {column!r}; there are {', '.join(adata.obs) or 'none'}. Name one of "
            "these, or write it first with `panfoma_hf.annotate`."
        )
    values = adata.obs[column]
    if not values.notna().any():
        raise ValueError(f"A column is drawn that has a value, got {len(values):,} missing ones in {column!r}.")
    if _is_numeric(values):
        if is_named:
            raise ValueError(
                f"A column of names is needed, got numbers in {column!r}. If they are names, make it categorical: "
                f"adata.obs[{column!r}] = adata.obs[{column!r}].astype('category')."
            )
        if not np.isfinite(values.to_numpy(dtype=float, na_value=np.nan)).any():
            raise ValueError(f"A column of numbers is drawn where it is finite, got no such cell in {column!r}.")
        return
    num_names, most = len(_possible_names(values)), len(_palettes()[1])
    if num_names > most:
        raise ValueError(
            f"At most {most} names are told apart by colour, got {num_names:,} in {column!r}. Put rare ones together, "
            "or choose a coarser column."
        )


def _check_path(path: str | Path) -> None:
    """Raise ValueError unless a picture can be written there; before it is computed."""
    path = Path(path)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"A picture's name ends in .png, .pdf or .svg, got {path}. Rename it.")
    if not path.parent.is_dir():
        raise ValueError(f"A picture is written to a folder that exists, got {path}. Make {path.parent} first.")


def _save(figure: Figure, path: str | Path) -> None:
    # Pixels in a PDF are looked at more closely.
    figure.savefig(path, dpi=150 if Path(path).suffix.lower() == ".png" else 300)


def save_label_composition(adata: ad.AnnData, path: str | Path, label: str, groupby: str) -> None:
    """Draw which share of the cells of each group has each name, a bar for each group, and save it.

    Names have the colours that `save_umap` gives them. "Unassigned" and what is missing come last in each bar; the
    number of cells stands at its end.

    Parameters
    ----------
    adata
        The cells.
    path
        A PNG, PDF or SVG file.
    label
        Column of ``obs`` with names, such as "panfoma_cell_type".
    groupby
        Column of ``obs`` with groups, such as donors; cells without a group have a bar of their own.

    Raises
    ------
    ValueError
        If there is no such column, one is empty, ``label`` holds numbers or more names than there are colours, or the
        file is of another format.
    """
    _check_path(path)
    _check_column(adata, label, is_named=True)
    if groupby not in adata.obs or not adata.obs[groupby].notna().any():
        raise ValueError(
            f"`groupby` is a column of `obs` with a group of each cell, got {groupby!r}; columns with one are "
            f"{', '.join(key for key in adata.obs if adata.obs[key].notna().any())}. Name one of these."
        )
    names, groups = _names_of(adata.obs[label]), _names_of(adata.obs[groupby])
    counts = pd.crosstab(groups, names)
    counts = counts.loc[sorted(counts.index, key=_place), sorted(counts.columns, key=_place)]
    totals = counts.sum(axis=1)
    shares = counts.div(totals, axis=0)
    by_name = name_colors(adata.obs, label)
    by_name = {name: by_name[name] for name in shares}

    height = 0.3 * len(shares) + 1.2
    legend_height = 0.21 * min(len(by_name), _LEGEND_ROWS) + 0.3
    figure = Figure(figsize=(6.5 + _legend_width(by_name), max(height, legend_height)), layout="constrained")
    axis = figure.subplots()
    place, left = np.arange(len(shares)), np.zeros(len(shares))
    for name, color in by_name.items():
        axis.barh(place, shares[name], left=left, color=color, height=0.8, linewidth=0, label=name)
        left += shares[name].to_numpy()
    for row, total in enumerate(totals):
        axis.text(1.01, row, f"{total:,}", va="center", fontsize=8, color="0.3")
    axis.set_yticks(place, shares.index, fontsize=9)
    axis.set_ylim(len(shares) - 0.5, -0.5)
    axis.set(xlim=(0, 1), xlabel=f"share of the cells with each {label}; right: number of cells", ylabel=groupby)
    axis.spines[["top", "right", "left"]].set_visible(False)
    _draw_legend(axis, by_name)
    axis.get_legend().set_bbox_to_anchor((1.12, 0.5))
    _save(figure, path)


def save_confusion_matrix(true: Sequence[str], predicted: Sequence[str], path: str | Path) -> None:
    """Draw which names were given to the cells of each true name, as shares of the row with counts, and save it.

    Rows are the true names, with their cells; columns all names, "Unassigned" last. With more than 20 names, the counts
    below 1 % of their row are left out, so that those that matter can be read.

    Parameters
    ----------
    true, predicted
        (cells,), names.
    path
        A PNG, PDF or SVG file.

    Raises
    ------
    ValueError
        If there are no cells, the two are not of the same cells, or the file is of another format.
    """
    _check_path(path)
    if len(true) != len(predicted) or not len(true):
        raise ValueError(
            f"Each cell needs a true and a predicted name, got {len(true):,} and {len(predicted):,}. Pass both of the "
            "same cells."
        )
    true, predicted = _names_of(pd.Series(np.asarray(true))), _names_of(pd.Series(np.asarray(predicted)))
    rows = sorted(set(true), key=_place)
    names = sorted({*true, *predicted}, key=_place)
    counts = pd.crosstab(true, predicted).reindex(index=rows, columns=names, fill_value=0).to_numpy()
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / totals
    is_large = len(names) > _MANY_NAMES
    side, letter, size = (0.31, 0.07, 6.5) if is_large else (0.5, 0.085, 8)
    margin = letter * max(map(len, names)) + 0.6
    figure = Figure(
        figsize=(max(side * len(names) + margin + 1.8, 4.5), max(side * len(rows) + margin, 2.5)), layout="constrained"
    )
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        if is_large and shares[row, column] < 0.01:
            continue
        shade = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=shade, fontsize=size)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=9)
    labels = [f"{name} ({total:,})" for name, total in zip(rows, totals[:, 0], strict=True)]
    axis.set_yticks(range(len(rows)), labels, fontsize=9)
    axis.set_xticks(np.arange(1, len(names)) - 0.5, minor=True)
    axis.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
    axis.grid(which="minor", color="0.9", lw=0.5)
    axis.tick_params(which="minor", length=0)
    axis.set(xlabel="predicted", ylabel="true (number of cells)")
    figure.colorbar(image, label="share of the\ntrue name's cells", shrink=0.6, aspect=25, fraction=0.03)
    _save(figure, path)


def save_pretraining_curve(
    log: Sequence[dict[str, float]], path: str | Path, *, held_out: str = "held_out_donors"
) -> None:
    """Draw loss and accuracy of pretraining against steps, beside predictors without a model, and save it.

    Where linear probes were asked on the way, a third panel has theirs, beside random weights and principal components.

    Parameters
    ----------
    log
        ``log_history`` of a run's ``trainer_state.json``.
    path
        A PNG, PDF or SVG file.
    held_out
        The evaluation set to draw.
    """
    steps = [line for line in log if "gene_loss" in line]
    tests = [line for line in log if f"eval_{held_out}_gene_loss" in line]
    probes = sorted(
        {key.removesuffix("_random_accuracy") for line in log for key in line if key.endswith("_random_accuracy")}
    )
    panels = 3 if probes else 2
    figure = Figure(figsize=(5.5 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels)
    for axis, measure, context, simple, name in (
        (axes[0], "loss", "context_frequency_loss", "frequency_loss", "cross-entropy of masked bins"),
        (axes[1], "accuracy", "context_frequency_accuracy", "majority_accuracy", "accuracy of masked bins"),
    ):
        for color, head, label in (
            ("tab:blue", "gene", "from gene states"),
            ("tab:orange", "cell", "from the cell embedding"),
        ):
            key = f"{head}_{measure}"
            axis.plot([line["step"] for line in steps], [line[key] for line in steps], color=color, alpha=0.3, lw=1)
            held = [line[f"eval_{held_out}_{key}"] for line in tests]
            axis.plot([line["step"] for line in tests], held, color=color, marker="o", ms=3, label=label)
        for style, key, label in (("--", simple, "by gene alone"), (":", context, "by gene and the cell's other bins")):
            if tests:
                axis.axhline(
                    tests[-1][f"eval_{held_out}_{key}"], color="0.3", ls=style, lw=1, label=f"no model, {label}"
                )
        axis.set(xlabel="step", ylabel=name)
    for index, probe in enumerate(probes):
        points = [line for line in log if f"{probe}_accuracy" in line]
        color = f"C{index}"
        steps_of = [line["step"] for line in points]
        found = [line[f"{probe}_accuracy"] for line in points]
        axes[2].plot(steps_of, found, color=color, marker="o", ms=3, label=probe.removeprefix("eval_"))
        for style, key, label in (("--", "random", "random weights"), (":", "components", "principal components")):
            if f"{probe}_{key}_accuracy" in points[-1]:
                axes[2].axhline(
                    points[-1][f"{probe}_{key}_accuracy"],
                    color=color,
                    ls=style,
                    lw=1,
                    label=label if index == 0 else None,
                )
    if probes:
        axes[2].set(
            xlabel="step", ylabel="accuracy of a linear probe, cell types", ylim=(0, 1), xlim=axes[0].get_xlim()
        )
        axes[2].legend(fontsize=8)
    axes[0].legend(fontsize=8, title=f"dots: {held_out.replace('_', ' ')}; faint: training", title_fontsize=8)
    _save(figure, path)


def save_calibration_curve(curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], path: str | Path) -> None:
    """Draw how often cells of a confidence are named rightly, a line for each model, and save it.

    Parameters
    ----------
    curves
        By name, (bins,) mean confidence, accuracy and number of cells, as `evaluation.calibration.Reliability` has
        them; bins without a cell are left out.
    path
        A PNG, PDF or SVG file.
    """
    figure = Figure(figsize=(5.5, 5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.6", ls="--", lw=1, label="confidence = accuracy")
    for name, (confidence, accuracy, count) in curves.items():
        kept = np.asarray(count) > 0
        sizes = 5 + 95 * np.asarray(count)[kept] / max(1, np.max(count))
        (line,) = axis.plot(np.asarray(confidence)[kept], np.asarray(accuracy)[kept], lw=1.5, label=name)
        axis.scatter(np.asarray(confidence)[kept], np.asarray(accuracy)[kept], s=sizes, color=line.get_color())
    axis.set(
        xlabel="mean confidence of a bin", ylabel="share named rightly", xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal"
    )
    axis.legend(frameon=False, fontsize=8, title="larger dots: more cells", title_fontsize=8)
    _save(figure, path)


def save_budget_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: str | Path, *, metric: str = "macro-F1"
) -> None:
    """Draw a metric against the share of the labels that a method saw, a line for each method, and save it.

    Parameters
    ----------
    curves
        By name, (budgets,) shares of the labels and the metric's values.
    path
        A PNG, PDF or SVG file.
    metric
        What to call it.
    """
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, (budgets, values) in curves.items():
        axis.plot(np.asarray(budgets) * 100, values, marker="o", ms=4, label=name)
    axis.set(xlabel="share of the training labels, %", ylabel=metric, xscale="log")
    ticks = sorted({100 * budget for budgets, _ in curves.values() for budget in budgets})
    axis.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def save_gene_ranking(table: pd.DataFrame, path: str | Path, *, num_genes: int = 10) -> None:
    """Draw the genes of the highest score of each group, a panel for each, and save it.

    A dot's place is the gene's score, its size and colour the share of the group's cells that express it.

    Parameters
    ----------
    table
        What `panfoma_hf.gene_scores` gives: ``group``, ``gene``, ``score``, ``share`` and ``rank``.
    path
        A PNG, PDF or SVG file.
    num_genes
        Genes of each group.

    Raises
    ------
    ValueError
        If there is no gene to draw, or the file is of another format.
    """
    _check_path(path)
    lacking = [name for name in ("group", "gene", "score", "share", "rank") if name not in table]
    if lacking:
        raise ValueError(
            f"The table is that of `panfoma_hf.gene_scores`, got one without {', '.join(lacking)}. Pass it."
        )
    best = table[table["rank"] <= num_genes]
    if not len(best):
        raise ValueError("At least one gene is needed, got a table without any. Lower `min_share` of gene_scores.")
    groups = list(best["group"].unique())
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    most = best["group"].value_counts().max()
    figure = Figure(figsize=(3.2 * columns + 0.9, max(0.24 * most + 0.9, 2.5) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, group in zip(axes, groups, strict=False):
        genes = best[best["group"] == group].sort_values("rank", ascending=False)
        place = np.arange(len(genes))
        axis.hlines(place, 0, genes["score"], color="0.85", lw=1)
        dots = axis.scatter(
            genes["score"], place, s=8 + 70 * genes["share"], c=genes["share"], vmin=0, vmax=1, zorder=2
        )
        axis.set_yticks(place, genes["gene"], fontsize=8)
        axis.set_title(textwrap.fill(str(group), 40), fontsize=9)
        axis.tick_params(axis="x", labelbottom=True, labelsize=8)  # also above a place without a panel
        axis.set_ylim(len(genes) - most - 0.7, len(genes) - 0.3)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    figure.supxlabel("mean standardised score", fontsize=9)
    label = "share of the group's cells\nthat express it"
    figure.colorbar(dots, ax=axes, label=label, shrink=0.8 if rows < 3 else 0.4, aspect=30, fraction=0.12 / columns)
    _save(figure, path)
