"""Pictures of what the model did; needs the `analysis` extra."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix


def save_umap(adata: ad.AnnData, path: str | Path, colors: Sequence[str], *, embedding: str = "X_panfoma") -> None:
    """Draw a UMAP of an embedding, one panel for each column of ``obs``, and save it.

    The panels share their colours for names that they share. ``obsm["X_umap"]`` of the AnnData is written.

    Parameters
    ----------
    adata
        Cells with ``obsm[embedding]``.
    path
        A PNG, PDF or SVG file.
    colors
        Categorical columns of ``obs``.
    embedding
        Key of ``obsm``.
    """
    import scanpy

    neighbors = ad.AnnData(obs=adata.obs[[]], obsm={embedding: adata.obsm[embedding]})
    scanpy.pp.neighbors(neighbors, use_rep=embedding, random_state=0)
    scanpy.tl.umap(neighbors, random_state=0)
    points = adata.obsm["X_umap"] = neighbors.obsm["X_umap"]

    names = sorted({str(name) for color in colors for name in adata.obs[color].unique()})
    palette = matplotlib.colormaps["tab20"]
    figure = Figure(figsize=(5.2 * len(colors) + 2, 5), layout="constrained")
    axes = figure.subplots(1, len(colors), squeeze=False)[0]
    for axis, color in zip(axes, colors, strict=True):
        for index, name in enumerate(names):
            chosen = (adata.obs[color].astype(str) == name).to_numpy()
            axis.scatter(*points[chosen].T, s=8, color=palette(index % palette.N), label=name, linewidths=0)
        axis.set(title=color, xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", markerscale=2.5, frameon=False)
    figure.savefig(path, dpi=130)


def save_confusion_matrix(true: Sequence[str], predicted: Sequence[str], path: str | Path) -> None:
    """Draw which names were given to the cells of each true name, as shares of the row with counts, and save it.

    Parameters
    ----------
    true, predicted
        (cells,), names.
    path
        A PNG, PDF or SVG file.
    """
    true, predicted = np.asarray(true, dtype=str), np.asarray(predicted, dtype=str)
    names = np.unique(np.concatenate([true, predicted]))
    counts = confusion_matrix(true, predicted, labels=names)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = 0.5 * len(names) + 2.5
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        shade = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, str(counts[row, column]), ha="center", va="center", color=shade, fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=90)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="predicted", ylabel="true")
    figure.colorbar(image, label="share of the true label's cells", shrink=0.8)
    figure.savefig(path, dpi=130)


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
    figure.savefig(path, dpi=150)


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
    figure.savefig(path, dpi=130)


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
    figure.savefig(path, dpi=130)


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
        If there is no gene to draw.
    """
    best = table[table["rank"] <= num_genes]
    if not len(best):
        raise ValueError("At least one gene is needed, got a table without any. Lower `min_share` of gene_scores.")
    groups = list(best["group"].unique())
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(3.2 * columns, (0.24 * num_genes + 0.9) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axis, group in zip(axes, groups, strict=False):
        genes = best[best["group"] == group].sort_values("rank", ascending=False)
        place = np.arange(len(genes))
        axis.hlines(place, 0, genes["score"], color="0.85", lw=1)
        dots = axis.scatter(
            genes["score"], place, s=8 + 70 * genes["share"], c=genes["share"], vmin=0, vmax=1, zorder=2
        )
        axis.set_yticks(place, genes["gene"], fontsize=8)
        axis.set_title(group, fontsize=9)
        axis.tick_params(axis="x", labelbottom=True, labelsize=8)  # also above a place without a panel
        axis.margins(y=0.08)
    for axis in axes[len(groups) :]:
        axis.set_axis_off()
    figure.supxlabel("mean standardised score", fontsize=9)
    figure.colorbar(dots, ax=axes, label="share of the group's cells that express it", shrink=0.8, fraction=0.03)
    figure.savefig(path, dpi=130)
