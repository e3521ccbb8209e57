# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""What the values of an expression matrix are: counts, counts times a factor, their logarithm, or something else."""

import math
from dataclasses import dataclass

import numpy as np


COUNTS = "counts"
FRACTIONAL = "fractional counts"
NORMALIZED = "normalized counts"
LOG = "log-normalized counts"
UNEXPLAINED = "unexplained values"
BINARY = "one value"
SCALED = "negative values"
NOT_FINITE = "values that are not finite"
OVERFLOW = "overflown counts"
EMPTY = "no expression"
# From the best to read to the worst.
KINDS = (COUNTS, FRACTIONAL, NORMALIZED, LOG, UNEXPLAINED, BINARY, EMPTY, OVERFLOW, SCALED, NOT_FINITE)

# What a 32-bit count holds at most. No cell has so many molecules; numbers beyond come from a counter that overflowed.
MAX_COUNT = 2**31 - 2
# Layers that are looked at before raw and X.
COUNT_LAYERS = ("counts", "count", "raw_counts", "counts_raw", "umi", "umis", "umi_counts")
# Multiples of a unit: a whole number to within what is left of logarithms that were written with three decimals.
_ABSOLUTE, _RELATIVE = 1e-3, 1.5e-3
# Larger ratios are whole numbers to that precision by chance too often.
_MAX_RATIO = 30
_MIN_ENTRIES = 5
# What is no counts is told from the first cells with so many values.
_ENOUGH_VALUES = 2**20
_LOG_BASES = {math.e: "log1p", 2.0: "log2(1 + x)", 10.0: "log10(1 + x)"}


@dataclass(frozen=True)
class ValueScale:
    """What the values are, and why they are taken for it.

    Parameters
    ----------
    kind
        One of `KINDS`.
    reason
        What was seen, for people.
    log_base
        Base of the logarithm for log-normalized counts, else None.
    """

    kind: str
    reason: str
    log_base: float | None = None

    @property
    def is_readable(self) -> bool:
        """Whether a cell's order of values is known to be that of its counts."""
        return self.kind in (COUNTS, FRACTIONAL, NORMALIZED, LOG)

    def __str__(self) -> str:
        return f"{self.kind} ({self.reason})"


def value_scale(indptr: np.ndarray, values: np.ndarray) -> ValueScale:
    """Find out what a matrix holds from some of its cells, as in a CSR matrix.

    Counts that were multiplied by a factor for each cell, as CPM are, are multiples of the cell's smallest value; so is
    what a logarithm of them was taken of. Where that does not show, as in TPM, equal sums of cells do.

    Parameters
    ----------
    indptr
        (cells + 1,), where each cell's values start.
    values
        (values,), any of them.
    """
    values = np.asarray(values)
    if not np.isfinite(values).all():
        return ValueScale(NOT_FINITE, f"{np.count_nonzero(~np.isfinite(values)):,} NaN or infinite values")
    if not values.any():
        return ValueScale(EMPTY, "no value other than 0")
    lowest, highest = float(values.min()), float(values.max())
    are_whole = values.dtype.kind in "biu" or bool((values == np.rint(values)).all())
    if lowest < 0:
        if are_whole and lowest < -(2**30):
            return ValueScale(OVERFLOW, f"whole numbers down to {lowest:,.0f}, the sign of an overflow")
        num_negative = np.count_nonzero(values < 0)
        return ValueScale(SCALED, f"{num_negative:,} of {values.size:,} are negative, the lowest {lowest:g}")
    if highest > MAX_COUNT:
        return ValueScale(OVERFLOW, f"values up to {highest:,.0f}, more than a cell can hold")
    if are_whole:
        expressed = values[values != 0]
        if len(expressed) > 1000 and expressed.min() == highest:
            return ValueScale(BINARY, f"every value is 0 or {highest:g}")
        return ValueScale(COUNTS, "whole numbers")

    few = np.searchsorted(indptr, min(len(values), _ENOUGH_VALUES), side="right")
    indptr = indptr[: max(few, 2)]
    values = values[: indptr[-1]].astype(np.float64)
    cells = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))[values != 0]
    values = values[values != 0]
    if not len(values):
        return ValueScale(EMPTY, f"no value other than 0 in {len(indptr) - 1:,} cells")
    is_whole = values == np.rint(values)
    if _are_multiples(values, cells):
        return ValueScale(NORMALIZED, "whole multiples of one value in each cell")
    if _are_multiples(values**2, cells):
        return ValueScale(NORMALIZED, "square roots of whole multiples of one value in each cell")
    if is_whole.mean() >= 0.5:
        return ValueScale(FRACTIONAL, f"{is_whole.mean():.0%} of the values are whole numbers")
    logs = {base: name for base, name in _LOG_BASES.items() if highest * math.log(base) < 50}
    unlogged = {base: np.expm1(values * math.log(base)) for base in logs}
    for base, name in logs.items():
        if _are_multiples(unlogged[base], cells):
            return ValueScale(LOG, f"{name} of whole multiples of one value in each cell", base)
    if total := _common_total(values, cells):
        return ValueScale(NORMALIZED, f"every cell adds up to {total:,.0f}")
    for base, name in logs.items():
        if total := _common_total(unlogged[base], cells):
            return ValueScale(LOG, f"{name} of values that add up to {total:,.0f} in every cell", base)
    for base, name in logs.items():
        for decimals in (1, 2):
            if _are_multiples(unlogged[base], cells, unit=10.0**-decimals):
                return ValueScale(LOG, f"{name} of numbers with {decimals} decimals", base)
    return ValueScale(
        UNEXPLAINED,
        f"{1 - is_whole.mean():.0%} are no whole numbers; neither they nor what they may be the logarithm of are "
        "multiples of one value in each cell or add up to the same in every cell",
    )


def log_bases(indptr: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each cell by itself: the base of the logarithm that its values are of, (cells,), NaN where they are of none.

    A cell's own values tell, whatever other cells there are: multiples of its smallest value before the logarithm.

    Parameters
    ----------
    indptr
        (cells + 1,), where each cell's values start.
    values
        (values,), not negative.
    """
    bases = np.full(len(indptr) - 1, np.nan)
    values = np.asarray(values, dtype=np.float64)
    cells = np.repeat(np.arange(len(bases)), np.diff(indptr))
    usable = (values > 0) & (values < 20)  # no logarithm of counts is larger
    values, cells = values[usable], cells[usable]
    if not len(values):
        return bases
    expressed = np.unique(cells)
    is_open = ~_multiples(values, cells)[0]
    for base in _LOG_BASES:
        are_multiples, _ = _multiples(np.expm1(np.minimum(values * math.log(base), 50)), cells)
        bases[expressed[is_open & are_multiples]] = base
        is_open &= ~are_multiples
    return bases


def _are_multiples(values: np.ndarray, cells: np.ndarray, unit: float | None = None) -> bool:
    """Whether nine in ten cells hold multiples of a unit; None: of their lowest value, or a half or a third of it."""
    are_multiples, informative = _multiples(values, cells, unit)
    return bool(informative.any() and are_multiples[informative].mean() >= 0.9)


def _multiples(values: np.ndarray, cells: np.ndarray, unit: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which cells with values hold multiples of a unit, and which have enough values to tell."""
    starts = np.flatnonzero(np.append(True, cells[1:] != cells[:-1]))
    sizes = np.diff(np.append(starts, len(cells)))
    ratios = values / (np.repeat(np.minimum.reduceat(values, starts), sizes) if unit is None else unit)
    told = (ratios > 1 + _ABSOLUTE) & (ratios < _MAX_RATIO)
    num_told = np.add.reduceat(told.astype(np.int64), starts)
    informative = num_told >= _MIN_ENTRIES
    best = np.zeros(len(starts))
    for parts in (1, 2, 3) if unit is None else (1,):
        multiples = ratios * parts
        is_near = np.abs(multiples - np.rint(multiples)) <= _ABSOLUTE + _RELATIVE * multiples
        best = np.maximum(best, np.add.reduceat((is_near & told).astype(np.int64), starts) / np.maximum(num_told, 1))
    return informative & (best >= 0.98), informative


def _common_total(values: np.ndarray, cells: np.ndarray) -> float | None:
    """What all cells add up to, to within a percent, or None."""
    totals = np.bincount(cells, values)
    totals = totals[totals > 0]
    middle = float(np.median(totals))
    return middle if len(totals) >= 3 and np.ptp(np.quantile(totals, [0.05, 0.95])) <= 0.01 * middle else None
