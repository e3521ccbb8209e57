"""Pictures of a data card; needs matplotlib, which is in the `analysis` extra."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .. import schema
from ..quality import VERDICTS
from .units import HISTOGRAM_STEP


# Larger pictures are hard to read; the smaller studies and cancer types are then left to the tables.
MAX_BARS = 50
# Studies with a colour of their own, the largest; the others share one.
MAX_COLORS = 18
UNKNOWN = "not known"


def draw(manifest: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw a corpus; names of the files and what they show.

    Parameters
    ----------
    manifest
        What is known of the corpus.
    folder
        Where to write.
    """
    pictures = {
        "cells.png": (_cells, "Cells by cancer type and study"),
        "genes.png": (_genes, "Genes per cell: median, middle half and middle nine tenths of each study's cells"),
        "dropped.png": (_dropped, "Cells left out by quality control, as a share of the cells read"),
    }
    for name, (drawn, _) in pictures.items():
        drawn(manifest).savefig(folder / name, dpi=130, metadata={"Software": None})
    return [(name, text) for name, (_, text) in pictures.items()]


def _bars(names: list[str]) -> tuple[Figure, Any]:
    """A figure whose rows, from the top, have names."""
    figure = Figure(figsize=(10, 1.4 + 0.28 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_yticks(range(len(names)), map(_text, names))
    axis.set_ylim(len(names) - 0.4, -0.6)
    return figure, axis


def _text(name: str) -> str:
    """A name as matplotlib draws it, to which dollars are formulas."""
    return name.replace("$", r"\$")


def _cells(manifest: dict[str, Any]) -> Figure:
    counts = {
        name: {
            **study["counts"][schema.CANCER_TYPE],
            UNKNOWN: study["cells"] - sum(study["counts"][schema.CANCER_TYPE].values()),
        }
        for name, study in manifest["studies"].items()
    }
    totals: dict[str, int] = {}
    for of_study in counts.values():
        for kind, count in of_study.items():
            totals[kind] = totals.get(kind, 0) + count
    kinds = sorted((kind for kind in totals if totals[kind]), key=lambda kind: (-totals[kind], kind))[:MAX_BARS]
    studies = sorted(counts, key=lambda name: (-manifest["studies"][name]["cells"], name))
    palette = matplotlib.colormaps["tab20"]
    figure, axis = _bars(kinds)
    left = np.zeros(len(kinds))
    for index, name in enumerate(studies):
        widths = np.array([counts[name].get(kind, 0) for kind in kinds], dtype=float)
        if widths.any():
            label = _text(name) if index < MAX_COLORS else "other studies" if index == MAX_COLORS else None
            color = palette(index) if index < MAX_COLORS else palette(MAX_COLORS)
            axis.barh(range(len(kinds)), widths, left=left, color=color, label=label, edgecolor="white", linewidth=0.4)
        left += widths
    axis.set(xlabel="cells", title="Cells by cancer type and study")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    for row, total in enumerate(left):
        axis.text(total, row, f" {total:,.0f}", va="center", fontsize=8)
    figure.legend(loc="outside right center", fontsize=7, frameon=False)
    return figure


def _genes(manifest: dict[str, Any]) -> Figure:
    histograms: dict[str, np.ndarray] = {}
    for unit in manifest["units"]:
        counted = np.array(unit["genes_per_cell"], dtype=np.int64)
        known = histograms.get(unit["study"], np.empty(0, dtype=np.int64))
        longest = max(len(counted), len(known))
        histograms[unit["study"]] = np.pad(counted, (0, longest - len(counted))) + np.pad(
            known, (0, longest - len(known))
        )
    histograms = {name: counted for name, counted in histograms.items() if counted.sum()}
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = {name: [_quantile(counted, share) for share in shares] for name, counted in histograms.items()}
    names = sorted(quantiles, key=lambda name: (-quantiles[name][2], name))[:MAX_BARS]
    figure, axis = _bars(names)
    for row, name in enumerate(names):
        low, first, median, third, high = quantiles[name]
        axis.plot([low, high], [row, row], color="tab:blue", linewidth=1)
        axis.plot([first, third], [row, row], color="tab:blue", linewidth=5, solid_capstyle="butt")
        axis.plot(median, row, "o", color="white", markeredgecolor="tab:blue", markersize=6)
    axis.axvline(3072, color="gray", linestyle=":", linewidth=1)
    axis.text(
        3072, 1.0, " 3,072: what a model reads at once", transform=axis.get_xaxis_transform(), fontsize=7, va="top"
    )
    axis.set(xlabel="genes per cell", title="Genes per cell", xlim=(0, None))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def _quantile(counted: np.ndarray, share: float) -> float:
    """The value below which a share of a histogram lies, evenly spread within its steps."""
    before = np.append(0, np.cumsum(counted)) / counted.sum()
    return float(np.interp(share, before, HISTOGRAM_STEP * np.arange(len(before))))


def _dropped(manifest: dict[str, Any]) -> Figure:
    studies = manifest["studies"]
    share = {name: 1 - study["cells"] / study["cells_read"] for name, study in studies.items()}
    names = sorted(studies, key=lambda name: (-share[name], name))[:MAX_BARS]
    figure, axis = _bars(names)
    left = np.zeros(len(names))
    for index, reason in enumerate(VERDICTS[1:]):
        widths = np.array(
            [100 * studies[name]["dropped"].get(reason, 0) / studies[name]["cells_read"] for name in names]
        )
        if widths.any():
            axis.barh(range(len(names)), widths, left=left, label=reason, color=matplotlib.colormaps["Set2"](index))
        left += widths
    for row, (name, total) in enumerate(zip(names, left, strict=True)):
        cells = studies[name]["cells_read"] - studies[name]["cells"]
        axis.text(total, row, f" {cells:,}", va="center", fontsize=8)
    axis.set(
        xlabel="% of the cells read", title="Left out by quality control", xlim=(0, max(float(left.max()) * 1.08, 1))
    )
    if left.any():
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    return figure
