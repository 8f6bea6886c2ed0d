"""The compiled loops and the plain specification agree bit for bit, for every cast; and the specification is right."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from oracles import assert_same, by_specification, overflows, sized
from tensors import generator
from torch import Tensor

from probes import cast_kernels, rounding, threads
from probes.casts import Cast, CastState
from probes.format_names import format_named
from probes.formats import FORMATS, Format
from probes.rounding import ROUNDINGS
from probes.scaling import RULES

EVERY_FORMAT = [*FORMATS.values(), *(format_named(name) for name in ("e8m7", "e8m3", "e7m7", "e3m0", "e2m0", "e6m23"))]
# Each way in which the loops round: by the adder, by bits, below normal only; with a sign of its own, without a
# mantissa, with more negative values, with neither Inf nor NaN, and with no need of a scale.
EVERY_LOOP = ["e4m3fn", "bf16", "e6m23", "e5m2fnuz", "e3m0", "int4", "e2m1", "fp32"]

SCALES = [
    "/".join(part for part in (granularity, option) if part)
    for granularity, rules in RULES.items()
    for rule in rules or ("",)
    for option in {
        "current": ("current", "current:pow2"),
        "delayed": ("delayed(len=3,margin=-2)", "delayed:pow2"),
        "static": ("static=0.013", "static=0.013:pow2"),
    }.get(rule, (rule,))
]
FEW_SCALES = ["none", "tensor/current", "row/current:pow2", "block32/e8m0", "block16/nvfp4", "block128x128/e8m0up"]


def any_bits(*shape: int, seed: int = 1) -> Tensor:
    """float32 from random bits: every magnitude, NaN and Inf."""
    return torch.randint(-(2**31), 2**31, shape, generator=generator(seed)).to(torch.int32).view(torch.float32)


def uneven(*shape: int, seed: int = 2) -> Tensor:
    """Normal values whose size differs from row to row, with what sits at edges among them."""
    rows = 10.0 ** torch.randint(-40, 38, (shape[0], *[1] * (len(shape) - 1)), generator=generator(seed))
    x = torch.randn(shape, generator=generator(seed)) * rows.float()
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-126), 3.4028234663852886e38]
    x.view(-1)[: 8 * 7 : 7] = torch.tensor(special)
    return x


def largest_values() -> Tensor:
    """A row for each format: blocks whose largest magnitude is the format's largest value times a power of two."""
    largest = torch.tensor([target.largest for target in FORMATS.values() if target.largest < 1e30])
    x = torch.rand(len(largest), 40, generator=generator(4)) - 0.5
    x[:, ::16] = torch.tensor([2.0, 1.0, 4.0])
    return x * largest[:, None]


# Longer than a strip of scales; ragged blocks in both directions; three dimensions; where rules that round scales up
# or down divide; one dimension; none; nothing finite but zeros.
INPUTS = [
    (any_bits(2, 1100), (-1, 0)),
    (uneven(131, 130), (-1,)),
    (uneven(3, 5, 40), (0, 1)),
    (largest_values(), (-1,)),
    (any_bits(50, seed=3), (-1,)),
    (torch.tensor(-3.7), (-1,)),
    (torch.tensor([[0.0, -0.0], [np.nan, np.inf]]), (-1,)),
]


def casts_of(target: Format, scales: list[str]) -> Iterator[Cast]:
    for scale in scales:
        if "nvfp4" in scale and target.largest > 1e30:
            continue
        for how in ROUNDINGS:
            for saturate in overflows(target):
                yield Cast.parse(f"{target}/{scale}/{how}{'' if saturate else ':inf'}")


def assert_equals_specification(cast: Cast, x: Tensor, dimension: int) -> None:
    fast, plain = CastState(3), CastState(3)
    for state in (fast, plain):
        state.history.extend([1.0, 100.0, 3.0])
    for _ in range(2 if cast.scale is not None and cast.scale.rule == "delayed" else 1):
        assert_same(cast(x, fast, dimension), by_specification(cast, x, plain, dimension), f"{cast} {dimension}")
    assert fast == plain


@pytest.mark.parametrize("name", EVERY_LOOP)
def test_every_cast_equals_its_specification(name: str) -> None:
    for cast in casts_of(format_named(name), SCALES):
        for x, dimensions in INPUTS:
            for dimension in dimensions:
                assert_equals_specification(cast, x, dimension)


@pytest.mark.parametrize("target", [one for one in EVERY_FORMAT if str(one) not in EVERY_LOOP], ids=str)
def test_every_format_equals_its_specification(target: Format) -> None:
    for cast in casts_of(target, FEW_SCALES):
        for x, dimensions in (*INPUTS[:2], INPUTS[3]):
            assert_equals_specification(cast, x, dimensions[-1])


@pytest.mark.parametrize("target", sized(range(20, 33)) + sized(range(9, 20))[::5], ids=str)
def test_every_size_equals_its_specification(target: Format) -> None:
    x = torch.cat([any_bits(20_000), uneven(200, 50).view(-1)])
    for cast in casts_of(target, ["none", "block32/e8m0up"]):
        assert_equals_specification(cast, x, -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["e4m3fn", "bf16", "fp16", "int8", "e6m23"])
def test_16_bit_tensors_are_widened_cast_and_rounded(name: str, dtype: torch.dtype) -> None:
    x, limit = uneven(40, 70).to(dtype), torch.finfo(dtype).max
    for cast in casts_of(format_named(name), FEW_SCALES):
        expected = by_specification(cast, x.float(), CastState(3))
        if cast.saturate:
            expected = expected.clamp(-limit, limit)
        assert_same(cast(x, CastState(3)), expected.to(dtype), str(cast))


@pytest.fixture
def threads_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


SHARED = ["none", "tensor/current", "row/current", "column/current", "block32/e8m0", "block16/nvfp4"]
SHARED_CASTS = [Cast.parse(f"e4m3fn/{scale}/{how}") for scale in SHARED for how in ("nearest", "stochastic")]
SHARED_CASTS += [Cast.parse("e5m2/block1x128/current/zero"), Cast.parse("bf16/block128x128/current/stochastic:inf")]


def on_threads(count: int, cast: Cast, x: Tensor) -> Tensor:
    torch.set_num_threads(count)
    return cast(x, CastState(5))


@pytest.mark.usefixtures("threads_before")
@pytest.mark.parametrize("cast", SHARED_CASTS, ids=str)
def test_threads_share_the_work_and_change_nothing(cast: Cast) -> None:
    for shape in ((519, 513), (2, 140_001), (90_003, 3)):
        x = uneven(*shape)
        assert x.numel() >= 4 * threads.SMALLEST_SHARE
        assert_same(on_threads(2, cast, x), on_threads(1, cast, x), str(shape))


@pytest.mark.usefixtures("threads_before")
def test_several_threads_may_cast_at_once() -> None:
    """As autograd does, which runs hooks on threads of its own."""
    x = uneven(519, 513)
    alone = [on_threads(1, cast, x) for cast in SHARED_CASTS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda cast: on_threads(2, cast, x), SHARED_CASTS * 2))
    for cast, expected, found in zip(SHARED_CASTS * 2, alone * 2, together, strict=True):
        assert_same(found, expected, str(cast))


@pytest.mark.parametrize("target", EVERY_FORMAT, ids=str)
def test_rounding_gives_the_nearer_neighbour_and_a_tie_the_even_one(target: Format) -> None:
    x = any_bits(50_000, seed=3).double()
    x = x[x.isfinite() & (x.abs() <= target.largest)]
    spacing = rounding.grid_spacing(x, target)
    rounded = rounding.round_nearest(x, target)
    below, above = torch.floor(x / spacing) * spacing, torch.ceil(x / spacing) * spacing
    nearer = torch.where(above - x < x - below, above, below)
    tie = (above - x == x - below) & (above != below)
    assert torch.equal(rounded[~tie], nearer[~tie])
    assert ((rounded[tie] / spacing[tie]) % 2 == 0).all()
    toward_zero = rounding.round_toward_zero(x, target)
    assert torch.equal(toward_zero, torch.where(x < 0, above, below))


@pytest.mark.parametrize("target", EVERY_FORMAT, ids=str)
@pytest.mark.parametrize("how", ROUNDINGS)
def test_rounding_again_changes_nothing(target: Format, how: str) -> None:
    draws = torch.zeros(50_000, dtype=torch.int64)  # which send up all that is not on the grid
    x = rounding.to_grid(any_bits(50_000, seed=4).double(), target, "nearest", saturate=True)
    assert_same(rounding.to_grid(x, target, how, saturate=True, dither=draws), x)


@pytest.mark.parametrize("target", EVERY_FORMAT, ids=str)
@pytest.mark.parametrize("how", ["nearest", "zero"])
def test_rounding_keeps_the_order(target: Format, how: str) -> None:
    x = any_bits(50_000, seed=5).double()
    x = (x[~x.isnan()].abs() if not target.signed else x[~x.isnan()]).sort().values
    for saturate in overflows(target):
        rounded = rounding.to_grid(x, target, how, saturate)
        rounded = rounded[~rounded.isnan()]
        assert (rounded.diff()[~rounded.diff().isnan()] >= 0).all()  # Inf - Inf is NaN


def test_finite_amax_ignores_inf_and_nan() -> None:
    x = torch.tensor([1.0, -3.5, np.inf, np.nan, -np.inf, 2.0])
    assert cast_kernels.finite_amax(x.numpy()) == 3.5
    assert cast_kernels.finite_amax(x[2:5].numpy()) == 0.0
    assert cast_kernels.finite_amax(torch.tensor([-(2.0**-149)]).numpy()) == 2.0**-149
