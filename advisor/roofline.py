"""How long a matrix product and the casts before it take on a device: whichever is slower, arithmetic or memory.

    product   max(waves of tiles × (a tile's operations / rate + its start and end), bytes / bandwidth) + start
    cast      bytes / bandwidth + launch, for every kernel that it takes

The rate is what large products reach of the peak; a product of few tiles does not fill the device.

A site's time is a sum: product_time_s over its products, each of its two operands, and cast_time_s over its roles, each
of its cast. So a planner can tabulate it. A product that no native 8-bit kernel takes runs in 16 bits, or in its own
precision, and what it cost to cast and to widen its operands is paid all the same.

What a cast moves, after torchao's own count (torchao/testing/training/roofline_utils.py): a current scale reads the
tensor once for its largest value; then it is read and written, once for each layout that its products want: where the
matrix units want the inner dimension in a row (Hopper, Ada), a tensor of two products is written a second time,
transposed. A delayed or static scale saves the first read. Rows are scaled as they are read, but their second layout
has other scales, so it is transposed in 16 bits first; blocks are cast from the original once for each layout.

Not in it: everything that is no matrix product (norms, activations, softmax, optimizer, communication), and fusion of a
cast into the kernel before it. `step_speedup` bounds what is gained of a step from the share of products in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import ceil, inf
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from advisor.castnames import keeps
from advisor.device import FULL_PRECISION, Hardware
from advisor.native import has_odd_sizes, refused_op
from advisor.operands import UNSEEN, Operand, cast_operand, is_taken, is_weight, operand, own_operand, widened_format
from advisor.product_shapes import ProductShape, product_shapes
from probes.casts import Cast
from probes.format_names import format_named
from probes.formats import FORMATS
from probes.records import Site

Moved = TypeVar("Moved", float, NDArray[np.float64])

# Rows and columns of a result that one unit works on at once, and what part of the full rate such a tile reaches:
# small ones read their operands more often for each operation. Ours, fitted to published products
# (benchmarks/speedups.py).
TILES = ((128, 256, 1.0), (128, 128, 1.0), (64, 64, 0.65))
SPLITS = (1, 2, 4, 8)
SHORTEST_SPLIT = 256  # inner size that a part keeps where the inner sum is split among units


APPROXIMATIONS = (
    (
        "time: a roofline of matrix products and casts; norms, activations, softmax, the optimizer and communication "
        "are not in it, nor is fusing a cast into the kernel before it"
    ),
    "time: a product that no native 8-bit kernel takes runs in 16 bits; products in fp32 run without tf32",
)


def product_time_s(shape: ProductShape, left: Operand, right: Operand, hardware: Hardware) -> float:
    """Seconds a step for one product on these operands; widening those that the kernel does not take is in it."""
    format_name, bits = runs_in(shape, left, right, hardware)
    seconds = _matmul_s(shape.batch, shape.m, shape.n, shape.k, format_name, bits, hardware)
    seconds += _widening_s(left, shape.batch * shape.m * shape.k, format_name, bits, hardware)
    seconds += _widening_s(right, shape.batch * shape.k * shape.n, format_name, bits, hardware)
    return seconds * shape.calls


def product_times_s(
    shape: ProductShape, lefts: Sequence[Operand], rights: Sequence[Operand], hardware: Hardware
) -> NDArray[np.float64]:
    """The same for every pair of a left operand and a right one: [lefts, rights]."""
    runs, run_of, widened = _pairs(_is_refused(shape), shape.own, tuple(lefts), tuple(rights), hardware)
    each = [_matmul_s(shape.batch, shape.m, shape.n, shape.k, *run, hardware) for run in runs]
    seconds = np.array(each, dtype=np.float64)[run_of]
    for elements, bits in zip((shape.batch * shape.m * shape.k, shape.batch * shape.k * shape.n), widened, strict=True):
        seconds += np.where(bits > 0, _pass_s(elements * bits / 8, hardware), 0.0)
    return seconds * shape.calls


@lru_cache(maxsize=256)
def _pairs(
    refused: bool, own: str, lefts: tuple[Operand, ...], rights: tuple[Operand, ...], hardware: Hardware
) -> tuple[list[tuple[str, int]], NDArray[np.intp], NDArray[np.float64]]:
    """What pairs of operands run in, whatever their sizes: the distinct formats and bits, each pair's place in these.

    And the bits an element that widening the left and the right one reads and writes: [2, lefts, rights].
    """
    found = [[_runs_in(refused, own, left, right, hardware) for right in rights] for left in lefts]
    runs = list(dict.fromkeys(run for row in found for run in row))
    widened = [
        [[_widening_bits(left, *run) for run in row] for left, row in zip(lefts, found, strict=True)],
        [[_widening_bits(right, *run) for right, run in zip(rights, row, strict=True)] for row in found],
    ]
    shape = (len(lefts), len(rights))
    places = np.array([[runs.index(run) for run in row] for row in found], dtype=np.intp).reshape(shape)
    return runs, places, np.array(widened, dtype=np.float64).reshape(2, *shape)


def runs_in(shape: ProductShape, left: Operand, right: Operand, hardware: Hardware) -> tuple[str, int]:
    """The format whose rate a product has, and the bits of an operand in memory.

    An operand that nobody sees outside a kernel follows the other one, but is never of 8 bits.
    """
    return _runs_in(_is_refused(shape), shape.own, left, right, hardware)


@lru_cache(maxsize=4096)
def _runs_in(refused: bool, own: str, left: Operand, right: Operand, hardware: Hardware) -> tuple[str, int]:
    one, other = _seen(left, right, own), _seen(right, left, own)
    assert one.format is not None
    assert other.format is not None
    wider = max(one.bits, other.bits)
    alike = one.format == other.format and wider > 8 and one.format in hardware.tflops
    if alike or (is_taken(one, other, hardware) and not (refused and wider <= 8)):
        return one.format, wider
    wide = widened_format(one.format, other.format, hardware)
    if wide is not None:
        return wide, FORMATS[wide].stored_bits
    return ("fp64", 64) if wider > 32 else (FULL_PRECISION, 32)


def cast_time_s(site: Site, role: str, cast: Cast, hardware: Hardware) -> float:
    """Seconds a step to cast a role for all products that it enters; 0 where the cast leaves it as it is.

    A weight is cast at every call of its module.
    """
    return (
        0.0 if keeps(cast) else float(cast_times_s(site, role, moved_bytes(site, role, (cast,), hardware), hardware)[0])
    )


def cast_times_s(site: Site, role: str, moved: NDArray[np.float64], hardware: Hardware) -> NDArray[np.float64]:
    """The same for several casts, of which `moved_bytes` is known."""
    calls = max(site.calls, 1.0)
    elements = site.elements.get(role, 0.0) / (1.0 if is_weight(role) else calls)
    return calls * np.where(np.isnan(moved), 0.0, _pass_s(elements * moved, hardware)).sum(axis=1)


def moved_bytes(site: Site, role: str, casts: tuple[Cast, ...], hardware: Hardware) -> NDArray[np.float64]:
    """[casts, kernels] bytes an element that each kernel of a cast reads and writes; NaN where it has no more.

    The same for all tensors of a dtype that enter as many products.
    """
    return _moved(own_operand(site, role), casts, uses(site, role), is_weight(role), hardware.inner_layout)


def uses(site: Site, role: str) -> int:
    """In how many products a tensor enters, as far as it matters to what its casts write: 0, 1, or 2 for more."""
    return min(sum(role in product.operands for product in site.products), 2)


@lru_cache(maxsize=1024)
def _moved(own: Operand, casts: tuple[Cast, ...], uses: int, weight: bool, inner_layout: bool) -> NDArray[np.float64]:
    found = []
    for cast in casts:
        new = cast_operand(own, cast)
        layouts = uses if inner_layout and new.bits <= 8 else 1
        idle = keeps(cast) or new == own or not uses
        found.append([] if idle else [*_passes(cast, own.bits / 8, _stored_bytes(cast, new), layouts, weight)])
    table = np.full((len(casts), max(map(len, found), default=0)), np.nan)
    for row, kernels in zip(table, found, strict=True):
        row[: len(kernels)] = kernels
    return table


def site_time_s(site: Site, casts: Mapping[str, Cast], hardware: Hardware) -> float:
    """Seconds a step for all products of a site and all its casts; `casts` has every role."""
    return _site_time_s(site, product_shapes(site), casts, hardware)


def time_s(sites: Iterable[Site], casts: Mapping[tuple[str, str], Cast], hardware: Hardware) -> float:
    """The same of all sites; `casts` by (site, role)."""
    return times_s(sites, (casts,), hardware)[0]


def times_s(
    sites: Iterable[Site], plans: Sequence[Mapping[tuple[str, str], Cast]], hardware: Hardware
) -> tuple[float, ...]:
    """The same under several plans' casts."""
    found = [0.0] * len(plans)
    for site in sites:
        shapes = product_shapes(site)
        for number, casts in enumerate(plans):
            found[number] += _site_time_s(site, shapes, {role: casts[site.name, role] for role in site.roles}, hardware)
    return tuple(found)


def _site_time_s(site: Site, shapes: Sequence[ProductShape], casts: Mapping[str, Cast], hardware: Hardware) -> float:
    operands = {role: operand(site, role, casts[role]) for role in site.roles}
    products = 0.0
    for shape in shapes:
        left, right = (operands.get(name, UNSEEN) for name in shape.product.operands)
        products += product_time_s(shape, left, right, hardware)
    return products + sum(cast_time_s(site, role, casts[role], hardware) for role in site.roles)


def step_speedup(products_speedup: float, products_share: float) -> float:
    """How much faster a whole step gets at most, if products took `products_share` (0 to 1) of its time before.

    Amdahl's law: all else takes as long as it did.
    """
    if not 0 <= products_share <= 1:
        raise ValueError(f"products_share={products_share!r}: a share of the step's time is from 0 to 1")
    left = (1 - products_share) + (products_share / products_speedup if products_speedup else inf)
    return 1 / left


def _is_refused(shape: ProductShape) -> bool:
    """Whether 8-bit kernels refuse this product whatever its operands are."""
    return has_odd_sizes(shape) or refused_op(shape.op, shape.batch > 1, shape.exact) is not None


def _widening_s(one: Operand, elements: int, format_name: str, bits: int, hardware: Hardware) -> float:
    """Seconds to bring an operand from its own format to the one that its product runs in."""
    moved = _widening_bits(one, format_name, bits)
    return _pass_s(elements * moved / 8, hardware) if moved else 0.0


def _widening_bits(one: Operand, format_name: str, bits: int) -> int:
    """Bits an element that this reads and writes."""
    return 0 if one.bits >= bits or one.format in (None, format_name) else one.bits + bits


def _matmul_s(batch: int, m: int, n: int, k: int, format_name: str, bits: int, hardware: Hardware) -> float:
    """One call. The result is written in 16 bits, by wider products and those of integers in 32."""
    written = 32 if bits > 16 or format_name == "int8" else 16
    moved = batch * ((float(m) * k + float(k) * n) * bits + float(m) * n * written) / 8
    arithmetic = _arithmetic_s(batch, m, n, k, hardware.rate_flops_s(format_name, bits), hardware)
    return max(arithmetic, moved / hardware.traffic_bytes_s) + hardware.product_start_s


@lru_cache(maxsize=65536)
def _arithmetic_s(batch: int, m: int, n: int, k: int, rate_flops_s: float, hardware: Hardware) -> float:
    """By the best of a few tiles and splits, as libraries choose them.

    Tiles are whole, and as many run side by side as there are units, in waves: the last wave leaves some units
    without work, and each begins and ends with time in which nothing is multiplied. A split inner sum makes more
    tiles, whose parts are added up through memory.
    """
    if hardware.units <= 1:
        return 2.0 * batch * m * n * k / rate_flops_s
    a_unit, best = rate_flops_s / hardware.units, inf
    for rows, columns, reached in TILES:
        tiles = batch * ceil(m / rows) * ceil(n / columns)
        whole = 2 * rows * columns * k / a_unit / reached
        start = hardware.tile_s * rows * columns / (128 * 256)
        for split in SPLITS:
            if split > 1 and k < SHORTEST_SPLIT * split:
                break
            parts = (split - 1) * 2.0 * batch * m * n * 4 / hardware.traffic_bytes_s
            best = min(best, ceil(tiles * split / hardware.units) * (whole / split + start) + parts)
    return best


def _passes(cast: Cast, own: float, new: float, layouts: int, weight: bool) -> Iterator[float]:
    """Bytes an element that each kernel of a cast reads and writes."""
    if cast.scale is None or cast.granularity == "tensor":
        if cast.scale is not None and cast.scale.rule == "current":
            yield own  # the largest value
            yield 0.0  # and what reduces the parts of it
        if weight:  # forward and backward cast it at different times
            yield from [own + new] * layouts
        else:
            yield own + new * layouts
    elif cast.granularity in ("row", "column"):
        if layouts > 1 and not weight:  # the first kernel writes the transpose as well
            yield 2 * own + new
        else:
            yield own + new
        if layouts > 1:
            yield from [2 * own] * weight
            yield own + new
    else:
        yield from [own + new] * max(layouts, 1)


def _stored_bytes(cast: Cast, new: Operand) -> float:
    """Bytes an element, with its share of a block's scales."""
    block = {"block32": 32, "block16": 16, "block1x128": 128}.get(cast.granularity)
    return new.bits / 8 + (1 / block if block else 0.0)


def _pass_s(moved_bytes: Moved, hardware: Hardware) -> Moved:
    return moved_bytes / hardware.traffic_bytes_s + hardware.launch_s


def _seen(one: Operand, other: Operand, own: str) -> Operand:
    if one.format is not None:
        return one
    found = format_named(other.format if other.format is not None and other.bits > 8 else own)
    return Operand(found.name, found.stored_bits)
