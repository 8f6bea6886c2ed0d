"""The relative sketch's CPU kernel: the tensor is taken in panels that stay in the cache, each read twice there.

The first reading finds the largest magnitude of each of the panel's tiles, the second divides by what the rule makes of
it and counts. Both go along memory whatever the tiles' shape: a tile is a stretch of a line, a stretch of a column, or
a square, and a panel is as many whole tiles as fit. Only nvfp4, which must know the largest magnitude of the whole
tensor first, reads it from memory once more.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from probes import layout, relative_layout
from probes.kernel_cache import keep_to_sources
from probes.layout import BIN_SHIFT
from probes.memory import memory_of
from probes.relative_layout import (
    BINS,
    EXTREME,
    FINE_LOWEST,
    FINE_SHIFT,
    FOURTHS,
    LOWEST,
    NVFP4_STEPS,
    TAIL,
    TILES,
    VERY_LARGE,
    VERY_SMALL,
)
from probes.tiles import Tiling

_ONE_BITS, _INF_BITS = 0x3F800000, 0x7F800000
_PANEL = 1 << 15  # elements: 128 KiB of float32, half of a second-level cache
_NARROWEST = 128  # columns of a panel of tall tiles, so that whole cache lines are used
_ZERO, _NOT_FINITE, _LARGEST = range(BINS, BINS + 3)  # columns of the tables, behind the bins
_WIDTH = BINS + 3
_CODES = {"current": 0, "e8m0": 1, "nvfp4": 2}


def add(sums: NDArray[np.float64] | Tensor, values: Tensor, tiling: Tiling) -> None:
    """Add a CPU tensor to one piece `sums` [size_of(classes)], as laid out in `relative_layout.py`."""
    batches, rows, columns = tiling.in_memory(values)
    single = batches.float().contiguous()
    source = memory_of(single.view(torch.int32)).reshape(single.shape)
    flat = sums.numpy() if isinstance(sums, Tensor) else sums
    half = tiling.classes * BINS
    cells = flat[: 2 * half].reshape(2, tiling.classes, BINS)
    code = _CODES[tiling.kind]
    over_all = _largest(source.reshape(-1)) if tiling.kind == "nvfp4" else 0
    _add(cells, flat[-TAIL:], source, rows, columns, code, over_all)


@njit(cache=True, nogil=True)
def _add(cells, tail, source, rows, columns, code, over_all):  # type: ignore[no-untyped-def]
    batches, lines, width = source.shape
    classes = cells.shape[1]
    counts = np.zeros((classes, _WIDTH), dtype=np.int64)
    squares = np.zeros((classes, _WIDTH), dtype=np.float64)
    panel = _panel_width(rows, columns, width)
    over_all_value = _value_of(over_all)
    largest = np.empty(panel // columns + 1, dtype=np.int32)
    amax = largest.view(np.float32)
    mantissas = np.empty(panel // columns + 1, dtype=np.int32)
    fine = np.empty(panel // columns + 1, dtype=np.int32)
    looked_for = np.empty(panel // columns + 1, dtype=np.int32)
    held = np.empty(panel // columns + 1, dtype=np.int64)
    tops = np.empty(panel // columns + 1, dtype=np.int64)
    reference = np.empty(panel // columns + 1, dtype=np.float32)
    square = np.empty(panel // columns + 1, dtype=np.float64)
    tile_class = np.empty(panel // columns + 1, dtype=np.int64)
    bins = np.empty(panel, dtype=np.int32)
    ratios = np.empty(panel, dtype=np.float32)
    for batch in range(batches):
        for top in range(0, lines, rows):
            bottom = min(top + rows, lines)
            for left in range(0, width, panel):
                right = min(left + panel, width)
                tiles = -(-(right - left) // columns)
                largest[:tiles], held[:tiles], tops[:tiles] = 0, 0, 0
                for line in range(top, bottom):
                    _raise_largest(largest, source[batch, line, left:right], columns)
                for tile in range(tiles):
                    reference[tile], tile_class[tile] = _reference(largest[tile], amax[tile], code, over_all_value)
                    mantissas[tile] = _mantissa(largest[tile], amax[tile])
                _find_fine(fine, looked_for, square, largest, reference, mantissas, code, tiles)
                for line in range(top, bottom):
                    values = source[batch, line, left:right]
                    _bin(bins[: right - left], ratios, values, reference, looked_for, columns)
                    _count(counts, squares, held, tops, bins[: right - left], square, tile_class, columns)
                for tile in range(tiles):
                    if tops[tile] > 0:
                        counts[classes - 1, fine[tile]] += tops[tile]
                        squares[classes - 1, fine[tile]] += tops[tile] * square[tile]
                _count_tiles(tail, largest, amax, square, held, tiles)
    for c in range(classes):
        for b in range(BINS):
            cells[0, c, b] += counts[c, b]
            cells[1, c, b] += squares[c, b]


@njit(cache=True, nogil=True)
def _panel_width(rows, columns, width):  # type: ignore[no-untyped-def]
    """Columns of a panel: whole tiles, as many as the cache holds of their rows."""
    wanted = max(_PANEL // rows, _NARROWEST, columns)
    return min(-(-wanted // columns) * columns, -(-width // columns) * columns)


@njit(cache=True, nogil=True)
def _raise_largest(largest, line, columns):  # type: ignore[no-untyped-def]
    """Bit patterns of the largest finite magnitudes, tile by tile, raised to those of one line."""
    if columns == 1:
        for i in range(line.size):
            bits = line[i] & np.int32(0x7FFFFFFF)
            largest[i] = max(largest[i], bits if bits < np.int32(_INF_BITS) else np.int32(0))
        return
    for tile in range(-(-line.size // columns)):
        largest[tile] = max(largest[tile], _largest(_of_tile(line, tile, columns)))


@njit(cache=True, nogil=True)
def _largest(line):  # type: ignore[no-untyped-def]
    """Bit pattern of the largest finite magnitude."""
    found = np.int32(0)
    for i in range(line.size):
        bits = line[i] & np.int32(0x7FFFFFFF)
        found = max(found, bits if bits < np.int32(_INF_BITS) else np.int32(0))
    return found


@njit(cache=True, nogil=True, inline="always")
def _of_tile(line, tile, columns):  # type: ignore[no-untyped-def]
    return line[tile * columns : min((tile + 1) * columns, line.size)]


@njit(cache=True, nogil=True)
def _value_of(bits):  # type: ignore[no-untyped-def]
    pattern = np.empty(1, dtype=np.int32)
    pattern[0] = bits
    return pattern.view(np.float32)[0]


@njit(cache=True, nogil=True, error_model="numpy", inline="always")
def _reference(bits, amax, code, over_all):  # type: ignore[no-untyped-def]
    """R of a tile, and its class; 1 where there is nothing."""
    if bits == 0:
        return np.float32(1.0), 0
    if code == 0:
        return amax, 0
    if code == 1:
        mantissa, above = _mantissa(bits, amax), 0
        for k in range(7):
            above += mantissa > _ONE_BITS + 0x800000 - (0x800000 >> k)
        return np.float32(math.ldexp(1.0, math.frexp(np.float64(amax))[1] - 1)), above
    share = amax / over_all * np.float32(NVFP4_STEPS)
    _, exponent = math.frexp(np.float64(share))
    step = 2.0 ** (max(exponent - 1, -6) - 3)
    scale = min(max(np.rint(share / step) * step, 2.0**-9), NVFP4_STEPS)
    tile_class = 8 if scale < 2.0**-6 else int(math.frexp(scale)[0] * 16) - 8
    reference = np.float32(scale) * (over_all / np.float32(NVFP4_STEPS))
    return (reference if reference > 0 else np.float32(1.0)), tile_class


@njit(cache=True, nogil=True, inline="always")
def _mantissa(bits, amax):  # type: ignore[no-untyped-def]
    """Bit pattern of m, 1 ≤ m < 2, of a magnitude m·2^e."""
    if bits >= 0x800000:
        return np.int32(bits & 0x7FFFFF | _ONE_BITS)
    if bits == 0:
        return np.int32(_ONE_BITS)
    return np.int32(_ONE_BITS + int((2 * math.frexp(np.float64(amax))[0] - 1) * 0x800000))


@njit(cache=True, nogil=True, error_model="numpy")
def _find_fine(fine, looked_for, square, largest, reference, mantissas, code, tiles):  # type: ignore[no-untyped-def]
    """The fine bins of the tiles' largest elements, by their mantissas under current scaling and by their ratios
    otherwise; the bits by which these elements are known, if they have such a bin; and R²."""
    amax = largest.view(np.float32)
    tops = mantissas.view(np.float32)
    if code != 0:
        for tile in range(tiles):
            tops[tile] = amax[tile] / reference[tile]
    for tile in range(tiles):
        fine[tile] = (mantissas[tile] - np.int32(FINE_LOWEST)) >> np.int32(FINE_SHIFT)
        has_bin = (fine[tile] >= 0) & (fine[tile] < BINS) & (largest[tile] != 0)
        looked_for[tile] = largest[tile] if has_bin else np.int32(-1)
        square[tile] = np.float64(reference[tile]) * np.float64(reference[tile])


@njit(cache=True, nogil=True, error_model="numpy")  # Python's own, which looks for zeros, cannot be vector code
def _bin(bins, ratios, line, reference, looked_for, columns):  # type: ignore[no-untyped-def]
    """The bin of every element of a line; another column of the tables for what has none, and for the largest."""
    values = line.view(np.float32)
    if columns == 1:
        for i in range(line.size):
            ratios[i] = values[i] / reference[i]
    else:
        for tile in range(-(-line.size // columns)):
            part, into = _of_tile(values, tile, columns), _of_tile(ratios, tile, columns)
            for i in range(part.size):
                into[i] = part[i] / reference[tile]
    patterns = ratios.view(np.int32)
    for i in range(line.size):
        found = max(((patterns[i] & np.int32(0x7FFFFFFF)) >> np.int32(BIN_SHIFT)) - np.int32(LOWEST), np.int32(0))
        bits = line[i] & np.int32(0x7FFFFFFF)
        found = min(found, np.int32(BINS - 1))
        found = np.int32(_ZERO) if bits == 0 else found
        bins[i] = np.int32(_NOT_FINITE) if bits >= np.int32(_INF_BITS) else found
    if columns == 1:
        for i in range(line.size):
            bins[i] = np.int32(_LARGEST) if line[i] & np.int32(0x7FFFFFFF) == looked_for[i] else bins[i]
    else:
        for tile in range(-(-line.size // columns)):
            part, of_tile = _of_tile(line, tile, columns), _of_tile(bins, tile, columns)
            for i in range(part.size):
                of_tile[i] = np.int32(_LARGEST) if part[i] & np.int32(0x7FFFFFFF) == looked_for[tile] else of_tile[i]


@njit(cache=True, nogil=True)
def _count(counts, squares, held, tops, bins, square, tile_class, columns):  # type: ignore[no-untyped-def]
    """Count a line's elements and their R²; for each tile, its largest ones, and all that are neither zero nor
    non-finite."""
    if columns == 1:
        for i in range(bins.size):
            held[i] += (bins[i] < BINS) | (bins[i] == _LARGEST)
            tops[i] += bins[i] == _LARGEST
        for i in range(bins.size):
            bins[i] += np.int32(tile_class[i]) * np.int32(_WIDTH)
        flat_counts, flat_squares = counts.reshape(-1), squares.reshape(-1)
        for i in range(bins.size):
            flat_counts[bins[i]] += 1
            flat_squares[bins[i]] += square[i]
        return
    for tile in range(-(-bins.size // columns)):
        of_class, sums, s = counts[tile_class[tile]], squares[tile_class[tile]], square[tile]
        part = _of_tile(bins, tile, columns)
        inside, at_top = 0, 0
        for i in range(part.size):
            inside += part[i] < BINS
            at_top += part[i] == _LARGEST
        held[tile] += inside + at_top
        tops[tile] += at_top
        for i in range(part.size):
            of_class[part[i]] += 1
            sums[part[i]] += s


@njit(cache=True, nogil=True)
def _count_tiles(tail, largest, amax, square, held, tiles):  # type: ignore[no-untyped-def]
    """Σ R⁴, tiles, and elements of extreme tiles."""
    for tile in range(tiles):
        if largest[tile] == 0:
            continue
        tail[FOURTHS] += square[tile] * square[tile] * held[tile]
        tail[TILES] += 1
        if amax[tile] < np.float32(VERY_SMALL) or amax[tile] > np.float32(VERY_LARGE):
            tail[EXTREME] += held[tile]


keep_to_sources(_add, layout, relative_layout)
