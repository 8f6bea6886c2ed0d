"""The casts on CUDA: one Triton kernel reads a tensor, scales, rounds and limits it in registers, and writes it.

A cast on a GPU is a matter of memory: an H100 has time for some 60 instructions while a float32 comes and goes, and
for half as many with bfloat16. So what counts is to pass over memory once. Where a scale belongs to a block, a square
of 128 by 128 or a row, a program finds the largest magnitudes of whole tiles and casts them; what is too large to be
held in registers is read again, from the cache. A scale for a whole tensor, a column, or one of a few very long rows
needs a kernel before. It takes the maximum of the magnitudes' bits, which sort as the magnitudes do, so that it does
not matter in which order programs add theirs. Delayed scaling knows its scale beforehand and finds the largest
magnitude for later in passing; the kernel before it has nothing to do but where no call has seen a value yet. The host
waits for nothing: largest magnitudes stay on the device, where each program makes the scales it needs. float16 and
bfloat16 are widened in registers and rounded back there. Nothing but the result is allocated, and 4 bytes for each
scale where there is a kernel before.

Bit for bit the same as `rounding.py` and `scaling.py`, by these means:

    rounding    of normal values on their bits as integers: add a half (or the draw), cut off. A carry into the
                exponent is what rounding up to the next octave needs. Of values below the format's smallest normal
                one, whose grid is even, by adding and taking off 2^23 spacings, to which float32 rounds by itself
    division    Triton's `/` is approximate, and its IEEE division branches, away from the fast way for each zero. As
                many values share a divisor, they are multiplied by its reciprocal and corrected by the remainder,
                from two fused multiply-adds: the IEEE quotient wherever nothing underflows (Brisebarre, Muller and
                Raina 2004, "Accelerating correctly rounded floating-point division when the divisor is known in
                advance"). Dividends are lifted by 2^64, so that nothing does. Formats with more exponents than that
                leaves room for take IEEE's division. A power of two is divided by as a product with its reciprocal
    fusing      of a product and a sum is turned off, as is the flushing of subnormal values: each operation in the PTX
                says so
    NaN         put back at the end. In between it may be anything: a GPU's products have another NaN (all ones)
                than the CPU's, and an integer carry makes -0 of that one
    bfloat16    as 16-bit integers: the interpreter of Triton 3.9 rounds every half away from zero
    draws       from the place in the tensor, in 32-bit integers that wrap around
    places      64 bits wide where a block begins; within it 32 bits do

What was checked where (Triton 3.9): all of it on the interpreter, against the specification. Every kernel is compiled
for sm_90, which needs no device: arithmetic rounded to nearest, subnormal values kept, accesses of 16 bytes, and
from 17 instructions a value (float32 to e4m3fn without a scale) to 65 (bfloat16, scaled, stochastic). Neither run nor
timed on a device yet; the tests for one are there, and skipped without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import frexp
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from probes.formats import Format
from probes.scaling import (
    E4M3,
    E8M0_EXPONENTS,
    NVFP4_LARGEST,
    SMALLEST_EXPONENT,
    Scale,
    Tile,
    largest_exponent,
    largest_scale,
    static_value,
)

History = Sequence[float | Tensor]

_BLOCK = 2048  # elements of a program: 16 a thread, in 4 warps
_LARGE_BLOCK = 8192  # the same in 16 warps: the most that a program holds
_MANY_ROWS = 256  # longer ones keep a device busy if each has one program
_SEARCHERS = 1024  # programs that look for a largest magnitude: they fill a device, and few meet at one address

# Integers for whose sake no kernel is compiled anew where they are 1 or multiples of 16, as Triton otherwise does.
_ANY_VALUE = ("first_key", "second_key", "tiles", "rows", "height", "parts", "chunks", "searchers", "below")

_EXPONENT = tl.constexpr(0x7F800000)
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-0x80000000)
_MANTISSA = tl.constexpr(0x007FFFFF)
_ONE = tl.constexpr(0x3F800000)
_TOO_LARGE = tl.constexpr(
    2.0**126
)  # a dividend, 2^64 times as large as it was, for any quotient that is divided by parts
_DOWN = tl.constexpr(2.0**-64)
_SMALLEST_SCALE = tl.constexpr(2.0**SMALLEST_EXPONENT)
_E4M3_LARGEST = tl.constexpr(E4M3.largest)
_E4M3_SMALLEST = tl.constexpr(E4M3.smallest_subnormal)
_E4M3_OCTAVE = tl.constexpr(2.0**E4M3.emin)
_E4M3_ADDER = tl.constexpr(2.0**23 * E4M3.smallest_subnormal)
_E4M3_MANTISSA_BITS = tl.constexpr(E4M3.mantissa_bits)


class _How(NamedTuple):
    """What a kernel is compiled for."""

    rule: str
    """How a scale is found: none, given, divided (by the format's largest value), power (of two, down), power up,
    two levels"""
    rounding: str
    mantissa_bits: int
    saturate: bool
    symmetric: bool
    keeps_negative_zero: bool
    divides_by_parts: bool
    """Whether quotients below 2^-126 need only be told from 0, and those above 2^60 are all too large"""
    clips: bool
    """Whether values may round beyond the tensor's own dtype, of 16 bits, and must not"""


class _Numbers(NamedTuple):
    """A cast's numbers, all float32."""

    octave: float
    """The format's smallest normal value, 2^emin; of an integer format, where its one octave ends"""
    one_over_octave: float
    spacing: float
    """Distance between neighbours below that octave"""
    adder: float
    """2^23 of these distances"""
    draws: float
    """2^24 · octave / spacing"""
    top: float
    bottom: float
    """Largest positive and largest negative magnitude"""
    beyond: float
    """What becomes of more, unless saturated"""
    limit: float
    """The largest value of the tensor's own dtype"""
    given: float
    """A static scale"""
    margin: float
    """For delayed scaling: what the largest magnitude is multiplied by"""
    significand: float
    one_over_power: float
    """top = significand · power: from 1 up to 2, and a power of two"""
    smallest_scale: float
    largest_scale: float
    over_all: float
    largest_over_all: float
    """For nvfp4's scale over all: what the tensor's largest magnitude is divided by, and the largest it may be"""


def round_whole(
    values: Tensor,
    out: Tensor,
    scale: Scale | None,
    target: Format,
    rounding: str,
    saturate: bool,
    stream: int = 0,
    history: History = (),
) -> Tensor | None:
    """out = cast(values / scale)·scale in the order of memory, with one scale for all; None is 1.

    values, out  float16, bfloat16 or float32, both alike: the same strides, and no holes in memory
    history      for delayed scaling, the largest magnitudes of the calls before

    Returns the largest finite magnitude, 0-dim float32 on the device, where it was looked for.
    """
    how = _told(values.dtype, scale, target, rounding, saturate) | _keys(stream)
    if scale is None or scale.rule == "static":
        _cast_rows(values, out, None, None, 1, how)
        return None
    earlier = _largest_of(history, values.device) if scale.rule == "delayed" else None
    found = _found(values, 1, earlier)
    _cast_rows(values, out, found, earlier, 1, how)
    return found.view(torch.float32)[0]


def round_tiles(
    values: Tensor,
    out: Tensor,
    tile: Tile,
    scale: Scale | None,
    target: Format,
    rounding: str,
    saturate: bool,
    stream: int = 0,
) -> None:
    """The same over contiguous matrices [rows, columns], with a scale for each tile."""
    how, (rows, columns) = _told(values.dtype, scale, target, rounding, saturate) | _keys(stream), values.shape
    height, width = min(tile.rows or rows, rows), min(tile.columns or columns, columns)
    if scale is None:
        _cast_rows(values, out, None, None, 1, how)
    elif tile.rows is None:
        _cast_columns(values, out, how)
    elif height > 1 or (width > _LARGE_BLOCK and rows >= _MANY_ROWS):
        _cast_large_tiles(values, out, height, width, how)
    elif width <= _LARGE_BLOCK:
        _cast_tiles(values, out, _found(values, 1) if scale.rule == "nvfp4" else None, width, how)
    else:
        _cast_rows(values, out, _found(values, rows), None, rows, how)


def finite_amax(values: Tensor) -> Tensor:
    """0-dim float32 on the device: the largest finite magnitude; 0 where there is none."""
    return _found(values, 1).view(torch.float32)[0]


def _cast_rows(
    values: Tensor, out: Tensor, found: Tensor | None, earlier: Tensor | None, rows: int, how: dict[str, Any]
) -> None:
    columns, block = values.numel() // rows, _BLOCK if how["HOW"].rounding == "stochastic" else _block(values)
    memory = _loadable(values), _loadable(out), found, earlier
    _launch(_rows_cast, (triton.cdiv(columns, block), rows), 4, *memory, columns, BLOCK=block, **how)


def _cast_tiles(values: Tensor, out: Tensor, found: Tensor | None, width: int, how: dict[str, Any]) -> None:
    (rows, columns), padded = values.shape, triton.next_power_of_2(width)
    tiles, at_once = rows * triton.cdiv(columns, width), max(_BLOCK // padded, 1)
    memory, sizes = (_loadable(values), _loadable(out), found), (tiles, columns, width)
    block = {"TILES": at_once, "WIDTH": padded, "RAGGED": padded != width or columns % width > 0}
    _launch(_tiles_cast, (triton.cdiv(tiles, at_once),), _warps(at_once * padded), *memory, *sizes, **block, **how)


def _cast_large_tiles(values: Tensor, out: Tensor, height: int, width: int, how: dict[str, Any]) -> None:
    """Tiles of a part's width or of one row."""
    (rows, columns), across = values.shape, min(triton.next_power_of_2(width), _LARGE_BLOCK)
    down = min(triton.next_power_of_2(height), _LARGE_BLOCK // across)
    parts = triton.cdiv(height, down) if height > 1 else triton.cdiv(width, across)
    step = (down, 0) if height > 1 else (0, across)
    tiles = triton.cdiv(rows, height) * triton.cdiv(columns, width)
    memory, block = (_loadable(values), _loadable(out)), {"HEIGHT": down, "WIDTH": across}
    _launch(_large_tiles_cast, (tiles,), 16, *memory, rows, columns, height, width, parts, *step, **block, **how)


def _cast_columns(values: Tensor, out: Tensor, how: dict[str, Any]) -> None:
    rows, columns = values.shape
    found = torch.zeros(columns, dtype=torch.int32, device=values.device)
    width = min(128, triton.next_power_of_2(columns))
    block = {"HEIGHT": _BLOCK // width, "WIDTH": width}
    beside, below = triton.cdiv(columns, width), triton.cdiv(rows, block["HEIGHT"])
    searchers = min(below, max(_SEARCHERS // beside, 1))
    memory = _loadable(values)
    _launch(_amax_of_columns, (beside * searchers,), 4, memory, found, rows, columns, below, searchers, **block)
    _launch(_columns_cast, (beside * below,), 4, memory, _loadable(out), found, rows, columns, **block, **how)


def _found(values: Tensor, rows: int, earlier: Tensor | None = None) -> Tensor:
    """int32 [rows]: the bits of each row's largest finite magnitude; 0 instead where `earlier` is above 0."""
    found = torch.zeros(rows, dtype=torch.int32, device=values.device)
    columns, block = values.numel() // rows, _block(values)
    chunks = triton.cdiv(columns, block)
    programs = min(chunks, max(_SEARCHERS // rows, 1)), rows
    _launch(_amax_of_rows, programs, 4, _loadable(values), found, earlier, columns, chunks, BLOCK=block)
    return found


def _block(values: Tensor) -> int:
    """Elements that make 64 bytes a thread. Draws take so many registers that with them 16 bits get half of it."""
    return _BLOCK * 4 // values.element_size()


def _launch(kernel: Any, programs: tuple[int, ...], warps: int, *arguments: Any, **named: Any) -> None:
    """A kernel on its tensors' device. Triton before 3.6 does not know the last option, and flushes in divisions."""
    with torch.cuda.device_of(arguments[0]):
        kernel[programs](*arguments, **named, num_warps=warps, enable_fp_fusion=False, enable_reflect_ftz=False)


def _warps(elements: int) -> int:
    """As many as leave 16 elements to a thread, but no more than 16: two such programs run side by side."""
    return min(max(elements // 512, 4), 16)


def _loadable(values: Tensor) -> Tensor:
    return values.view(torch.int16) if values.dtype == torch.bfloat16 else values


def _largest_of(history: History, device: torch.device) -> Tensor | None:
    """0-dim float32 on the device, not waited for; None if there is nothing."""
    here = [one.to(device, torch.float32) for one in history if isinstance(one, Tensor)]
    numbers = [float(one) for one in history if not isinstance(one, Tensor)]
    if numbers:  # `full` writes it by a kernel; a copy from the host would be waited for
        here.append(torch.full((), max(numbers), dtype=torch.float32, device=device))
    return torch.stack(here).amax() if here else None


@cache
def _told(dtype: torch.dtype, scale: Scale | None, target: Format, rounding: str, saturate: bool) -> dict[str, Any]:
    """What every kernel is told of a cast."""
    numbers = _numbers(scale, target, saturate, torch.finfo(dtype).max)
    how = _How(
        rule=_rule(scale),
        rounding=rounding,
        mantissa_bits=target.mantissa_bits,
        saturate=saturate,
        symmetric=numbers.top == numbers.bottom,
        keeps_negative_zero=target.keeps_negative_zero,
        divides_by_parts=(
            (saturate or rounding != "zero") and target.smallest_subnormal > 2.0**-76 and target.largest < 2.0**60
        ),
        clips=saturate and dtype != torch.float32 and (scale is not None or numbers.limit < numbers.top),
    )
    return {"numbers": numbers, "HOW": how}


def _rule(scale: Scale | None) -> str:
    if scale is None:
        return "none"
    if scale.rule in ("current", "delayed"):
        return "power up" if scale.power_of_two else "divided"
    return {"static": "given", "e8m0": "power", "e8m0up": "power up", "nvfp4": "two levels"}[scale.rule]


def _numbers(scale: Scale | None, target: Format, saturate: bool, limit: float) -> _Numbers:
    beyond = target.largest if saturate else target.overflow
    assert beyond is not None  # Cast refuses to be anything but saturating then
    is_power, is_e8m0 = "power" in _rule(scale), scale is not None and scale.rule in ("e8m0", "e8m0up")
    mantissa, exponent = frexp(target.largest)
    highest = 2.0 ** min(E8M0_EXPONENTS[1], largest_exponent(target))
    over_all = min(target.largest, NVFP4_LARGEST) * E4M3.largest
    return _Numbers(
        octave=2.0**target.emin,
        one_over_octave=2.0**-target.emin,
        spacing=target.smallest_subnormal,
        adder=2.0**23 * target.smallest_subnormal,
        draws=2.0 ** (24 + target.mantissa_bits),
        top=target.largest,
        bottom=-target.lowest,
        beyond=beyond,
        limit=limit,
        given=1.0 if scale is None or scale.value is None else static_value(scale),
        margin=1.0 if scale is None else 2.0**scale.margin,
        significand=2 * mantissa,
        one_over_power=2.0 ** (1 - exponent),
        smallest_scale=2.0 ** (E8M0_EXPONENTS[0] if is_e8m0 else SMALLEST_EXPONENT),
        largest_scale=highest if is_power else largest_scale(target.largest_magnitude),
        over_all=float(np.float32(over_all)),
        largest_over_all=largest_scale(min(target.largest_magnitude, NVFP4_LARGEST) * E4M3.largest),
    )


def _keys(stream: int) -> dict[str, int]:
    """A stream's halves as signed integers, so that both are 32 bits wide."""
    first, second = np.array([stream & 0xFFFFFFFF, stream >> 32 & 0xFFFFFFFF], dtype=np.uint32).view(np.int32).tolist()
    return {"first_key": first, "second_key": second}


@triton.jit(do_not_specialize=_ANY_VALUE)
def _rows_cast(  # type: ignore[no-untyped-def]
    values, out, found, earlier, columns, first_key, second_key, numbers, HOW: tl.constexpr, BLOCK: tl.constexpr
):
    """A block of a row, whose scale is known, or its largest magnitude is: that of earlier calls, or the one found."""
    start, row = tl.program_id(0).to(tl.int64) * BLOCK, tl.program_id(1)
    offset = tl.arange(0, BLOCK)
    within = offset < tl.minimum(columns - start, BLOCK).to(tl.int32)
    start += row.to(tl.int64) * columns
    value = _load(values + start + offset, within)
    if found is None:
        scale = numbers.given
    else:
        amax = _float(tl.load(found + row))
        if earlier is not None:
            amax = tl.where(tl.load(earlier) > 0, tl.load(earlier), amax)
            tl.atomic_max(found + row, tl.max(_finite_bits(value), axis=0), sem="relaxed")
        moved = (amax * numbers.margin).to(tl.int32, bitcast=True)
        moved = _float(tl.minimum(tl.maximum(moved, 1), _EXPONENT - 1))  # neither 0 nor Inf
        scale = _scale(tl.where(amax > 0, moved, amax), 0.0, numbers, HOW)
    index = start.to(tl.uint32) + offset.to(tl.uint32)
    written = _cast(value, scale, _draw(index, first_key, second_key, HOW), numbers, HOW)
    _store(out + start + offset, written, within)


@triton.jit(do_not_specialize=_ANY_VALUE)
def _tiles_cast(  # type: ignore[no-untyped-def]
    values,
    out,
    found,
    tiles,
    columns,
    width,
    first_key,
    second_key,
    numbers,
    HOW: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """TILES tiles of `width` elements of a row each, the last of a row perhaps of fewer.

    RAGGED  whether a tile may have fewer than WIDTH; if not, the whole matrix is a row
    """
    tile, column = tl.arange(0, TILES)[:, None], tl.arange(0, WIDTH)[None, :]
    first = tl.program_id(0) * TILES
    within = first + tile < tiles
    if RAGGED:
        per_row = tl.cdiv(columns, width)
        row, left = (first + tile) // per_row, (first + tile) % per_row * width
        within = within & (column < tl.minimum(columns - left, width))
        place = row.to(tl.int64) * columns + left + column
    else:
        place = first.to(tl.int64) * WIDTH + (tile * WIDTH + column)
    value = _load(values + place, within)
    amax = _float(tl.max(_finite_bits(value), axis=1, keep_dims=True))
    over_all = 0.0
    if found is not None:
        over_all = _float(tl.load(found))
    scale = _scale(amax, over_all, numbers, HOW)
    written = _cast(value, scale, _draw(place.to(tl.uint32), first_key, second_key, HOW), numbers, HOW)
    _store(out + place, written, within)


@triton.jit(do_not_specialize=_ANY_VALUE)
def _large_tiles_cast(  # type: ignore[no-untyped-def]
    values,
    out,
    rows,
    columns,
    height,
    width,
    parts,
    down,
    right,
    first_key,
    second_key,
    numbers,
    HOW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A tile in parts, of which each lies `down` rows and `right` columns from the last. The second time they are read
    from the cache: held in registers, a tile would leave none to a second program, whose reads overlap our sums."""
    beside = tl.cdiv(columns, width)
    top, left = (tl.program_id(0) // beside).to(tl.int64) * height, tl.program_id(0) % beside * width
    largest = tl.zeros([HEIGHT, WIDTH], dtype=tl.int32)
    for part in range(parts):
        place, _, within = _part(top + part * down, left + part * right, rows, columns, HEIGHT, WIDTH)
        largest = tl.maximum(largest, _finite_bits(_load(values + place, within)))
    amax = _float(tl.max(tl.max(largest, axis=1, keep_dims=True), axis=0, keep_dims=True))
    scale = _scale(amax, 0.0, numbers, HOW)
    for part in range(parts):
        place, _, within = _part(top + part * down, left + part * right, rows, columns, HEIGHT, WIDTH)
        draw = _draw(place.to(tl.uint32), first_key, second_key, HOW)
        _store(out + place, _cast(_load(values + place, within), scale, draw, numbers, HOW), within)


@triton.jit(do_not_specialize=_ANY_VALUE)
def _columns_cast(  # type: ignore[no-untyped-def]
    values,
    out,
    found,
    rows,
    columns,
    first_key,
    second_key,
    numbers,
    HOW: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A part of several columns, whose largest magnitudes are known."""
    beside = tl.cdiv(columns, WIDTH)
    top, left = (tl.program_id(0) // beside).to(tl.int64) * HEIGHT, tl.program_id(0) % beside * WIDTH
    place, column, within = _part(top, left, rows, columns, HEIGHT, WIDTH)
    amax = _float(tl.load(found + column, mask=column < columns, other=0))
    scale = _scale(amax, 0.0, numbers, HOW)
    draw = _draw(place.to(tl.uint32), first_key, second_key, HOW)
    written = _cast(_load(values + place, within), scale, draw, numbers, HOW)
    _store(out + place, written, within)


@triton.jit(do_not_specialize=_ANY_VALUE)
def _amax_of_rows(  # type: ignore[no-untyped-def]
    values, found, earlier, columns, chunks, BLOCK: tl.constexpr
):
    """Every so many-th block of a row."""
    row, last = tl.program_id(1), chunks
    if earlier is not None:
        last = tl.where(tl.load(earlier) > 0, 0, chunks)
    offset = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], dtype=tl.int32)
    for chunk in range(tl.program_id(0), last, tl.num_programs(0)):
        start = tl.cast(chunk, tl.int64) * BLOCK
        within = offset < tl.minimum(columns - start, BLOCK).to(tl.int32)
        value = _load(values + (row.to(tl.int64) * columns + start) + offset, within)
        largest = tl.maximum(largest, _finite_bits(value))
    tl.atomic_max(found + row, tl.max(largest, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=_ANY_VALUE)
def _amax_of_columns(  # type: ignore[no-untyped-def]
    values, found, rows, columns, below, searchers, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """Every so many-th part of several columns."""
    beside = tl.cdiv(columns, WIDTH)
    left = tl.program_id(0) % beside * WIDTH
    largest = tl.zeros([HEIGHT, WIDTH], dtype=tl.int32)
    for part in range(tl.program_id(0) // beside, below, searchers):
        place, _, within = _part(tl.cast(part, tl.int64) * HEIGHT, left, rows, columns, HEIGHT, WIDTH)
        largest = tl.maximum(largest, _finite_bits(_load(values + place, within)))
    column = left + tl.arange(0, WIDTH)
    tl.atomic_max(found + column, tl.max(largest, axis=0), mask=column < columns, sem="relaxed")


@triton.jit
def _part(top, left, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Places [HEIGHT, WIDTH] of a part of the matrix, its columns [1, WIDTH], and which places there are."""
    row, column = top + tl.arange(0, HEIGHT)[:, None], left + tl.arange(0, WIDTH)[None, :]
    return row * columns + column, column, (row < rows) & (column < columns)


@triton.jit
def _scale(amax, over_all, numbers, HOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """The scale for a largest magnitude."""
    if HOW.rule == "two levels":
        over_all = tl.div_rn(over_all, numbers.over_all)
        over_all = tl.minimum(tl.maximum(over_all, _SMALLEST_SCALE), numbers.largest_over_all)
        block = tl.div_rn(tl.div_rn(amax, numbers.top), over_all)
        block = _nearest(block, _E4M3_OCTAVE, _E4M3_ADDER, _E4M3_MANTISSA_BITS)
        scale = tl.minimum(tl.maximum(block, _E4M3_SMALLEST), _E4M3_LARGEST) * over_all
        scale = tl.minimum(scale, numbers.largest_scale)
    else:
        if HOW.rule == "divided":
            scale = tl.div_rn(amax, numbers.top)
        else:  # of a subnormal magnitude this makes 0, and then the smallest scale, which is right
            bits = amax.to(tl.int32, bitcast=True)
            scale = _float(bits & _EXPONENT) * numbers.one_over_power
            if HOW.rule == "power up":
                scale = tl.where(_float(bits & _MANTISSA | _ONE) > numbers.significand, scale * 2, scale)
        scale = tl.minimum(tl.maximum(scale, tl.cast(numbers.smallest_scale, tl.float32)), numbers.largest_scale)
    return tl.where(amax > 0, scale, 1.0)


@triton.jit
def _cast(value, scale, draw, numbers, HOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Divided by the scale, rounded, limited, and multiplied by it again."""
    magnitude = _quotient(value, scale, HOW)
    rounded = _rounded(magnitude, draw, numbers, HOW)
    top = numbers.top
    if not HOW.symmetric:
        top = tl.where(value < 0, numbers.bottom, top)
    sign = value.to(tl.int32, bitcast=True) & _SIGN
    if not HOW.keeps_negative_zero:
        sign = tl.where(rounded == 0, 0, sign)
    beyond = rounded > top
    if HOW.rounding == "zero":
        beyond = tl.abs(value) == float("inf")
    if HOW.saturate or HOW.rounding == "zero":
        rounded = tl.minimum(rounded, top)
    if HOW.rule != "none":
        rounded *= scale
    if not HOW.saturate:
        rounded = tl.where(beyond, numbers.beyond, rounded)
    if HOW.clips:
        rounded = tl.minimum(rounded, numbers.limit)
    rounded = tl.where(value == value, rounded, value)
    return _float(rounded.to(tl.int32, bitcast=True) | sign)


@triton.jit
def _quotient(value, scale, HOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """|value / scale| as IEEE 754 rounds it, unless it is too large or too small to matter; NaN is left open."""
    if HOW.rule == "none":
        return tl.abs(value)
    if HOW.rule == "power" or HOW.rule == "power up":
        return tl.abs(value * tl.div_rn(1.0, scale))
    if not HOW.divides_by_parts:
        return tl.abs(tl.div_rn(value, scale))
    # scale = divisor · 2^n with a divisor from 1 up to 2; the dividend is |value| · 2^(64 - n), by two factors, as one
    # may be beyond float32.
    lifted = scale < _SMALLEST_SCALE  # nvfp4's scales may be subnormal
    bits = tl.where(lifted, scale * 16777216.0, scale).to(tl.int32, bitcast=True)
    divisor = _float(bits & _MANTISSA | _ONE)
    reciprocal = tl.div_rn(1.0, divisor)
    power = 191 - (bits >> 23) + tl.where(lifted, 24, 0)
    dividend = tl.abs(value) * _power(tl.minimum(power, 100)) * _power(tl.maximum(power - 100, 0))
    dividend = tl.minimum(dividend, _TOO_LARGE)
    quotient = dividend * reciprocal
    return tl.fma(tl.fma(quotient, -divisor, dividend), reciprocal, quotient) * _DOWN


@triton.jit
def _power(exponent):  # type: ignore[no-untyped-def]
    return _float((exponent + 127) << 23)


@triton.jit
def _rounded(magnitude, draw, numbers, HOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """Magnitudes on the format's grid, which has no end here; what a NaN becomes is left open."""
    if HOW.rounding == "nearest":
        return _nearest(magnitude, numbers.octave, numbers.adder, HOW.mantissa_bits)
    bits = magnitude.to(tl.int32, bitcast=True)
    below = (magnitude + numbers.adder) - numbers.adder
    below = tl.where(below > magnitude, below - numbers.spacing, below)
    if HOW.rounding == "stochastic":
        # The draw's complement carries out of the bits that are cut off exactly where these are above the draw.
        bits += ((draw ^ 0xFFFFFFFF) >> 9 >> HOW.mantissa_bits).to(tl.int32)
        fraction = (magnitude - below) * numbers.draws * numbers.one_over_octave
        below = tl.where((draw >> 8).to(tl.int32).to(tl.float32) < fraction, below + numbers.spacing, below)
    return tl.where(magnitude < numbers.octave, below, _cut(bits, HOW.mantissa_bits))


@triton.jit
def _nearest(magnitude, octave, adder, MANTISSA_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    bits = magnitude.to(tl.int32, bitcast=True)
    if MANTISSA_BITS == 0:  # the one bit of the significand, which no bit stands for, is odd
        bits += (_MANTISSA >> 1) + 1
    elif MANTISSA_BITS < 23:
        bits += (_MANTISSA >> (MANTISSA_BITS + 1)) + ((bits >> (23 - MANTISSA_BITS)) & 1)
    return tl.where(magnitude < octave, (magnitude + adder) - adder, _cut(bits, MANTISSA_BITS))


@triton.jit
def _cut(bits, MANTISSA_BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    return _float(bits & ~(_MANTISSA >> MANTISSA_BITS))


@triton.jit
def _draw(index, first_key, second_key, HOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """32 random bits for a place, of which `rounding.dither` has the upper 24."""
    if HOW.rounding == "stochastic":
        index = _hash(_hash(index + first_key.to(tl.uint32)) ^ second_key.to(tl.uint32))
    return index


@triton.jit
def _hash(z):  # type: ignore[no-untyped-def]
    z = (z ^ (z >> 16)) * 0x21F0AAAD
    z = (z ^ (z >> 15)) * 0xD35A2D97
    return z ^ (z >> 15)


@triton.jit
def _finite_bits(value):  # type: ignore[no-untyped-def]
    """A magnitude's bits; 0 of Inf and NaN."""
    bits = value.to(tl.int32, bitcast=True) & _MAGNITUDE
    return tl.where(bits < _EXPONENT, bits, 0)


@triton.jit
def _float(bits):  # type: ignore[no-untyped-def]
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load(place, within):  # type: ignore[no-untyped-def]
    """In float32."""
    loaded = tl.load(place, mask=within, other=0)
    if loaded.dtype == tl.int16:  # bfloat16
        return _float(loaded.to(tl.int32) << 16)
    return loaded.to(tl.float32)


@triton.jit
def _store(place, value, within):  # type: ignore[no-untyped-def]
    """In the dtype of the place, to nearest."""
    if place.dtype.element_ty == tl.int16:  # bfloat16; no NaN here has a bit that could carry
        bits = value.to(tl.int32, bitcast=True)
        tl.store(place, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16), mask=within)
    else:
        tl.store(place, value.to(place.dtype.element_ty), mask=within)
