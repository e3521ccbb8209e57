# Copyright 2026 The PanFoMa-HF authors. Licensed under the Apache License, Version 2.0.
"""Many cells to tokens at once: what `expression.bin_cells` does, compiled by Numba at first use, then cached on disk.

A cell's genes are put in order by marking their places in a table as large as the vocabulary and reading it from front
to back, which also adds up the columns of one gene. Small counts are ranked by counting them, other values by a radix
sort of their bits, without the passes that all of a cell's values agree in.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .expression import SUM_TOLERANCE, check_genes, check_values, draw_order


try:
    from numba import njit
except ImportError as error:
    raise ImportError("Numba cannot be imported here. Install it with `pip install numba`.") from error


# Below so many entries a thread costs more than it brings (about 2 milliseconds on one core).
_MIN_ENTRIES_PER_THREAD = 2**16
# Piece after piece is taken, as cells differ in length and cores in what else they do.
_PIECES_PER_THREAD = 4
_RADIX_BITS = 8
_BUCKETS = 1 << _RADIX_BITS
_PASSES = 64 // _RADIX_BITS
# Counts below this are counted instead of sorted.
_SMALL = 256
# The place of the only bit of a number that has one: 64 windows of 6 bits in this sequence are all different.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_OF = np.empty(64, dtype=np.int64)
for _bit in range(64):
    _BIT_OF[((1 << _bit) * int(_DE_BRUIJN) & (2**64 - 1)) >> 58] = _bit


def bin_cells(
    indptr: np.ndarray,
    genes: np.ndarray,
    values: np.ndarray,
    token_of_column: np.ndarray,
    vocab_size: int,
    num_bins: int,
    max_length: int | None = None,
    log_scales: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `expression.bin_cells`, the same tokens whatever the number of threads."""
    order = draw_order(vocab_size)
    place_of_column = np.where(token_of_column >= 0, order[token_of_column], -1).astype(np.int32)
    token_of_place = np.empty(vocab_size, dtype=np.int32)
    token_of_place[order] = np.arange(vocab_size, dtype=np.int32)
    if genes.dtype.itemsize > 4:
        check_genes(genes, len(token_of_column))  # before they are cut to 32 bits
    # Two kinds of values and one of indices, as each further one would be compiled for itself.
    original, indptr, genes = values, indptr.astype(np.int64, copy=False), genes.astype(np.int32, copy=False)
    values = values if values.dtype == np.float32 else values.astype(np.float64, copy=False)
    num_cells, num_entries = len(indptr) - 1, len(values)
    tokens = np.empty(num_entries, dtype=np.int32)
    bins = np.empty(num_entries, dtype=np.uint8 if num_bins < 256 else np.int32)
    lengths = np.empty(num_cells, dtype=np.int64)
    limit = vocab_size if max_length is None else max_length
    log_scales = np.zeros(num_cells) if log_scales is None else log_scales.astype(np.float64, copy=False)

    threads = max(1, min(_num_cores(), num_entries // _MIN_ENTRIES_PER_THREAD))
    pieces = 1 if threads == 1 else threads * _PIECES_PER_THREAD
    borders = np.searchsorted(indptr, np.linspace(indptr[0], indptr[-1], pieces + 1)[1:-1])
    borders = [0, *borders.tolist(), num_cells]

    def work(piece: int) -> bool:
        first, last = borders[piece], borders[piece + 1]
        return _bin_piece(
            indptr,
            genes,
            values,
            place_of_column,
            token_of_place,
            num_bins,
            limit,
            log_scales,
            first,
            last,
            tokens,
            bins,
            lengths,
        )

    if threads == 1:
        is_good = work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            is_good = all(pool.map(work, range(pieces)))
    if not is_good:
        check_values(original, "the matrix")
        check_genes(genes, len(token_of_column))
    if lengths.sum() < num_entries:
        tokens, bins = _closed_up(indptr, lengths, tokens), _closed_up(indptr, lengths, bins)
    return tokens, bins, lengths


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@njit(cache=True, nogil=True)
def _bin_piece(
    indptr,
    genes,
    values,
    place_of_column,
    token_of_place,
    num_bins,
    limit,
    log_scales,
    first,
    last,
    tokens,
    bins,
    lengths,
):  # pragma: no cover
    """Bin the cells from ``first`` to before ``last``; False where a value or a column is not usable."""
    num_places = len(token_of_place)
    marks = np.zeros(-(-num_places // 64), dtype=np.uint64)  # a bit for each place
    sums = np.zeros(num_places, dtype=np.float64)
    cell_values = np.empty(num_places, dtype=np.float64)
    scratch = (
        np.empty((2, num_places), dtype=np.float64),
        np.empty((2, num_places), dtype=np.int32),
        np.empty((_PASSES, _BUCKETS), dtype=np.int32),
    )
    how_many = np.empty(_SMALL, dtype=np.int32)
    bin_of_count = np.empty(_SMALL, dtype=np.int32)

    for cell in range(first, last):
        start, end, log_scale = indptr[cell], indptr[cell + 1], log_scales[cell]
        is_sum, entry = False, start
        while entry < end:
            value, gene = np.float64(values[entry]), genes[entry]
            if not (0 <= value < np.inf) or gene < 0 or gene >= len(place_of_column):
                return False
            place = place_of_column[gene]
            entry += 1
            if place < 0 or value == 0:
                continue
            word, bit = place >> 6, np.uint64(1) << np.uint64(place & 63)
            if marks[word] & bit and not is_sum:
                is_sum = True
                if log_scale:  # once more from the start of the cell, as what the logarithms were taken of
                    marks[:], sums[:], entry = 0, 0, start
                    continue
            marks[word] |= bit
            sums[place] += np.expm1(value * log_scale) if is_sum and log_scale else value

        size, are_whole = 0, True
        for word in range(len(marks)):
            left = marks[word]
            while left:
                lowest = left & (~left + np.uint64(1))
                left ^= lowest
                place = 64 * word + _BIT_OF[(lowest * _DE_BRUIJN) >> np.uint64(58)]
                if size < limit:
                    tokens[start + size] = token_of_place[place]
                value, sums[place] = sums[place], 0
                are_whole &= value == np.floor(value)
                cell_values[size] = value
                size += 1
            marks[word] = 0
        lengths[cell] = min(size, limit)

        tolerance = SUM_TOLERANCE if is_sum else 0.0
        if not are_whole:
            _bin_sorted(cell_values, size, 0.0, 0, size, num_bins, tolerance, bins[start:], limit, scratch)
            continue
        # Counts: the small ones, nearly all, need no sorting.
        how_many[:] = 0
        num_small = 0
        for index in range(size):
            if cell_values[index] < _SMALL:
                how_many[np.int64(cell_values[index])] += 1
                num_small += 1
        low = 0
        for count in range(_SMALL):
            high = low + how_many[count]
            if high > low:
                bin_of_count[count] = 1 + num_bins * (low + high) // (2 * size)
            low = high
        for index in range(min(size, limit)):
            if cell_values[index] < _SMALL:
                bins[start + index] = bin_of_count[np.int64(cell_values[index])]
        if num_small < size:
            _bin_sorted(cell_values, size, _SMALL, num_small, size, num_bins, tolerance, bins[start:], limit, scratch)
    return True


@njit(cache=True, nogil=True)
def _bin_sorted(
    cell_values, num_values, threshold, num_below, size, num_bins, tolerance, bins, limit, scratch
):  # pragma: no cover
    """Bin those of a cell's values that are not below a threshold, which ``num_below`` are, by sorting them."""
    both_values, both_orders, histogram = scratch
    values, other_values, order, other_order = both_values[0], both_values[1], both_orders[0], both_orders[1]
    # Numbers that are not negative are ordered as their bits are.
    keys, other_keys = values.view(np.uint64), other_values.view(np.uint64)
    histogram[:] = 0
    found = 0
    for index in range(num_values):
        if cell_values[index] >= threshold:
            values[found], order[found] = cell_values[index], index
            key = keys[found]
            for step in range(_PASSES):
                histogram[step, (key >> np.uint64(_RADIX_BITS * step)) & np.uint64(_BUCKETS - 1)] += 1
            found += 1
    for step in range(_PASSES):
        counts, shift = histogram[step], np.uint64(_RADIX_BITS * step)
        if found == 0 or counts[(keys[0] >> shift) & np.uint64(_BUCKETS - 1)] == found:
            continue
        total = 0
        for bucket in range(_BUCKETS):
            counts[bucket], total = total, total + counts[bucket]
        for index in range(found):
            key = keys[index]
            bucket = (key >> shift) & np.uint64(_BUCKETS - 1)
            other_keys[counts[bucket]], other_order[counts[bucket]] = key, order[index]
            counts[bucket] += 1
        keys, other_keys, order, other_order = other_keys, keys, other_order, order
        values, other_values = other_values, values
    low = 0
    while low < found:
        high = low + 1
        while high < found and values[high] - values[high - 1] <= tolerance * values[high]:
            high += 1
        bin_id = 1 + num_bins * (2 * num_below + low + high) // (2 * size)
        for index in range(low, high):
            if order[index] < limit:
                bins[order[index]] = bin_id
        low = high


@njit(cache=True, nogil=True)
def _closed_up(indptr, lengths, tokens):  # pragma: no cover
    """The first tokens of each cell, ``lengths`` of them, one cell after the other."""
    closed = np.empty(lengths.sum(), dtype=tokens.dtype)
    position = 0
    for cell in range(len(lengths)):
        for entry in range(indptr[cell], indptr[cell] + lengths[cell]):
            closed[position] = tokens[entry]
            position += 1
    return closed
