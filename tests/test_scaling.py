"""Each rule for a scale against a few lines of numpy, on every granularity, and all that has no scale of its own.

The oracle rounds with gfloat and finds scales with Python's floats and numpy's float32: it shares no code with the
casts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import gfloat
import numpy as np
import pytest
import torch
from oracles import assert_same, by_gfloat, by_specification, edge_cast, every_pattern, gfloat_format
from tensors import generator
from torch import Tensor

from probes.casts import Cast, CastState
from probes.errors import InvalidCast
from probes.formats import FORMATS, Format

INF, NAN = float("inf"), float("nan")
F32 = np.float32
FLOAT32_MAX = float(np.finfo(F32).max)

# OCP Microscaling 1.0: the largest power of two of each element format.
OCP_EMAX = {"e4m3fn": 8, "e5m2": 15, "e3m2": 4, "e2m3": 2, "e2m1": 2}
TILES = {
    "tensor": (None, None),
    "row": (1, None),
    "column": (None, 1),
    "block32": (1, 32),
    "block16": (1, 16),
    "block1x128": (1, 128),
    "block128x128": (128, 128),
}


def floor_log2(value: float) -> int:
    return math.frexp(value)[1] - 1


def ceil_log2(value: float) -> int:
    mantissa, exponent = math.frexp(value)
    return exponent - (mantissa == 0.5)


# The rules, for a largest magnitude above zero. A float32 scale is at least the smallest normal number.


def current(amax: float, target: Format) -> float:
    return max(2.0**-126, float(F32(amax) / F32(target.largest)))


def current_pow2(amax: float, target: Format) -> float:
    return 2.0 ** max(-126, ceil_log2(amax / target.largest))


def ocp(amax: float, target: Format) -> float:
    return 2.0 ** max(-127, floor_log2(amax) - OCP_EMAX[target.name])


def rounded_up(amax: float, target: Format) -> float:
    return 2.0 ** max(-127, ceil_log2(amax / target.largest))


RULES: dict[str, Callable[[float, Format], float]] = {
    "current": current,
    "current:pow2": current_pow2,
    "e8m0": ocp,
    "e8m0up": rounded_up,
}


def tiles(matrix: np.ndarray[Any, Any], granularity: str) -> Iterator[tuple[slice, slice]]:
    height, width = (wanted or size for wanted, size in zip(TILES[granularity], matrix.shape, strict=True))
    for top in range(0, matrix.shape[0], height):
        for left in range(0, matrix.shape[1], width):
            yield slice(top, top + height), slice(left, left + width)


def finite_amax(values: np.ndarray[Any, Any]) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def scaled(x: Tensor, target: Format, granularity: str, rule: str, dimension: int = -1) -> Tensor:
    """The oracle: float32, scale by scale."""
    moved = np.moveaxis(x.numpy(), dimension, -1) if x.dim() else x.numpy().reshape(1)
    matrix = moved.reshape(-1, moved.shape[-1])
    out = np.empty_like(matrix)
    for tile in tiles(matrix, granularity):
        amax = finite_amax(matrix[tile])
        scale = F32(RULES[rule](amax, target) if amax else 1.0)
        written = by_gfloat(torch.from_numpy(np.ascontiguousarray(matrix[tile] / scale)), target)
        out[tile] = written.astype(F32) * scale
    return torch.from_numpy(
        np.ascontiguousarray(np.moveaxis(out.reshape(moved.shape), -1, dimension if x.dim() else 0))
    )


def rows_of_sizes(*shape: int, seed: int = 0) -> Tensor:
    """Normal values whose size differs by powers of two, about every 20 elements and from row to row."""
    x = torch.randn(shape, generator=generator(seed))
    x[x == 0] = 1.0  # -0 and +0 are another test
    size = torch.randint(-20, 20, shape, generator=generator(seed + 1)).float()
    return x * 2.0 ** (size / 3).floor()


COMBINATIONS = [
    ("e4m3fn", "tensor", "current"),
    ("bf16", "tensor", "current"),
    ("fp16", "tensor", "current:pow2"),
    ("e4m3fn", "row", "current"),
    ("int4", "row", "current:pow2"),
    ("e5m2", "column", "current"),
    ("e3m4", "column", "current:pow2"),
    ("e5m2fnuz", "block1x128", "current"),
    ("e4m3fn", "block128x128", "current"),
    ("e4m3fn", "block128x128", "current:pow2"),
    ("e5m2", "block128x128", "e8m0"),
    ("int8", "block32", "current"),
    ("int8", "block16", "e8m0up"),
    *((name, "block32", rule) for name in OCP_EMAX for rule in ("e8m0", "e8m0up")),
]


@pytest.mark.parametrize(("name", "granularity", "rule"), COMBINATIONS)
def test_a_scale_for_every_tile(name: str, granularity: str, rule: str) -> None:
    cast, target = Cast.parse(f"{name}/{granularity}/{rule}"), FORMATS[name]
    for shape in ((3, 5, 40), (140, 70), (2, 3, 150), (70,), (1, 1)):
        x = rows_of_sizes(*shape)
        for dimension in range(-len(shape), 0):
            ours = cast(x, dimension=dimension)
            expected = scaled(x, target, granularity, rule, dimension)
            assert_same(ours + 0.0, expected + 0.0, f"{shape} {dimension}")  # of -0 gfloat's int8 knows nothing
            if rule != "current":  # a power of two: no division is rounded, so float64 must give the same
                assert_same(cast(x.double(), dimension=dimension), ours)
    scalar = torch.tensor(-2.7)
    assert_same(cast(scalar), scaled(scalar, target, granularity, rule).reshape(()))


@pytest.mark.parametrize("name", OCP_EMAX)
def test_the_ocp_rule_is_the_exponent_of_amax_less_that_of_the_format(name: str) -> None:
    """2^(floor(log2 amax) - emax), emax as the standard lists it; what is above the largest value then saturates."""
    target, cast = FORMATS[name], Cast.parse(f"{name}/block32/e8m0")
    assert target.emax == OCP_EMAX[name]
    for power in (-60, -1, 0, 3, 90):
        for amax in (1.0, 1.25, 1.99):
            x = torch.zeros(32)
            x[7], x[8] = -amax * 2.0**power, 2.0 ** (power - OCP_EMAX[name])  # the second is written as 1
            result = cast(x)
            assert_same(cast(x.double()), result)
            scale = 2.0 ** (power - OCP_EMAX[name])
            assert result[8] == scale
            assert -result[7] / scale == by_gfloat(torch.tensor([amax * 2.0 ** OCP_EMAX[name]]), target)[0]
            assert -result[7] / scale <= target.largest


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "int8"])
def test_the_rounded_up_rule_is_the_smallest_power_of_two_that_saturates_nothing(name: str) -> None:
    target, cast = FORMATS[name], Cast.parse(f"{name}/block32/e8m0up")
    largest = torch.tensor(target.largest)
    for amax, scale in (
        (largest, 1.0),
        (torch.nextafter(largest, torch.tensor(INF)), 2.0),
        (torch.nextafter(largest, torch.tensor(0.0)), 1.0),
        (largest / 2, 0.5),
    ):
        x = torch.zeros(32)
        x[3], x[4] = amax, scale / 4 if target.is_integer else target.smallest_subnormal * scale
        assert_same(cast(x), scaled(x, target, "block32", "e8m0up"))
        assert_same(cast(x.double()), cast(x))
        assert cast(x)[4] == (0.0 if target.is_integer else x[4])  # on that scale's grid, on no coarser one
        assert not Cast.parse(str(cast)).saturates(x).any()


def nvfp4(x: Tensor, target: Format) -> Tensor:
    """q·g: g = amax of all / (largest·448), q = (amax of 16 / largest) / g in e4m3fn and at least 2^-9."""
    matrix = x.numpy().reshape(-1, x.shape[-1])
    out, e4m3 = np.empty_like(matrix), gfloat_format(FORMATS["e4m3fn"])
    over_all = F32(finite_amax(matrix)) / F32(target.largest * 448)
    for tile in tiles(matrix, "block16"):
        amax = F32(finite_amax(matrix[tile]))
        block = gfloat.round_ndarray(e4m3, np.array([amax / F32(target.largest) / over_all]), sat=True)[0]
        scale = F32(max(block, 2.0**-9)) * over_all if amax else F32(1.0)
        out[tile] = by_gfloat(torch.from_numpy(matrix[tile] / scale), target).astype(F32) * scale
    return torch.from_numpy(out.reshape(x.shape))


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e4m3fn"])
def test_nvfp4_has_two_levels_of_scales(name: str) -> None:
    cast, target = Cast.parse(f"{name}/block16/nvfp4"), FORMATS[name]
    for seed, shape in enumerate([(4, 64), (3, 5, 40), (17,), (1, 1), (64, 160)]):
        x = rows_of_sizes(*shape, seed=seed) * 10.0 ** (seed * 3 - 6)
        assert_same(cast(x), nvfp4(x, target))
    assert Cast.parse("e2m1/block16").scale is not None
    assert str(Cast.parse("e2m1/block16")) == "e2m1/block16/nvfp4/nearest"


def test_nvfp4s_largest_block_has_the_scale_448_and_no_scale_is_zero() -> None:
    x = torch.zeros(3, 16)
    x[0, 0], x[1, 0], x[2, 0] = 6.0 * 448, 6.0 * 448 / 3, 1e-20
    result = Cast.parse("e2m1/block16")(x)  # the scale over all is 1
    assert result[0, 0] == 6.0 * 448
    assert result[1, 0] == 6.0 * 144  # 149.3 rounds to 144 in e4m3fn, and 896/144 = 6.2 saturates
    assert result[2, 0] == 0.0  # 2^-9, the smallest scale, is far above it
    assert Cast.parse("e2m1/block16")(torch.tensor([[2688.0] + [0.0] * 15 + [2.0**-9]]))[0, 16] == 2.0**-9


# Delayed scaling


def delayed(values: list[float], length: int, margin: int) -> list[float]:
    """Scales of e5m2 for calls with these largest magnitudes: from the calls before, or the first one's own."""
    found = []
    for call, own in enumerate(values):
        before = max(values[max(0, call - length) : call], default=0.0)
        found.append(float(F32((before or own) * 2.0**margin) / F32(57344)) if before or own else 1.0)
    return found


@pytest.mark.parametrize(("length", "margin"), [(1, 0), (3, 0), (16, 2), (2, -3), (1024, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_delayed_scaling_takes_the_largest_of_the_calls_before(length: int, margin: int, dtype: torch.dtype) -> None:
    cast, state = Cast.parse(f"e5m2/tensor/delayed(len={length},margin={margin})"), CastState()
    sizes = [0.0, 0.0, 3.0, 5.0, 1.0, 1.0, 0.25, 700.0, 2.0, 0.0, 0.0, 0.0, 4.0, 2.0**-10, 2.0**-10]
    for call, (size, scale) in enumerate(zip(sizes, delayed(sizes, length, margin), strict=True)):
        x = torch.linspace(-1, 1, 65, dtype=dtype) * size
        assert cast.scale_for(size, [float(one) for one in state.history]) == scale
        assert_same(cast(x, state), edge_cast(FORMATS["e5m2"])(x / scale) * scale, f"call {call}")
        assert [float(one) for one in state.history] == sizes[max(0, call + 1 - length) : call + 1]


def test_the_first_step_is_scaled_currently_and_so_is_every_step_without_a_state() -> None:
    x = torch.randn(100, generator=generator(1)) * 1e-5
    delayed_cast, current_cast = Cast.parse("e4m3fn/tensor/delayed"), Cast.parse("e4m3fn/tensor/current")
    assert_same(delayed_cast(x, CastState()), current_cast(x))
    assert_same(delayed_cast(x * 100), current_cast(x * 100))
    assert_same(delayed_cast(x), current_cast(x))


def test_what_delayed_scaling_did_not_foresee_saturates_or_overflows() -> None:
    saturating, state = Cast.parse("e5m2/tensor/delayed"), CastState()
    saturating(torch.tensor([1.0]), state)
    assert saturating(torch.tensor([100.0, -0.5, INF]), state).tolist() == [1.0, -0.5, 1.0]
    assert state.history[-1] == 100.0
    overflowing, state = Cast.parse("e5m2/tensor/delayed/nearest:inf"), CastState()
    overflowing(torch.tensor([1.0]), state)
    assert overflowing(torch.tensor([100.0, -0.5]), state).tolist() == [INF, -0.5]


def test_a_margin_leaves_octaves_free() -> None:
    cast, state = Cast.parse("e5m2/tensor/delayed(len=4,margin=1)"), CastState()
    cast(torch.tensor([1.0]), state)
    assert cast(torch.tensor([2.0]), state).tolist() == [2.0]
    assert cast(torch.tensor([8.0]), CastState(history=state.history)).tolist() == [4.0]


def test_the_history_leaves_out_inf_and_nan_and_counts_calls_without_values() -> None:
    cast, state = Cast.parse("e4m3fn/tensor/delayed(len=3)"), CastState()
    for x in ([INF, 2.0], [NAN, NAN], [-INF], [0.0]):
        cast(torch.tensor(x), state)
    assert list(state.history) == [0.0, 0.0, 0.0]
    cast(torch.empty(0), state)
    assert list(state.history) == [0.0, 0.0, 0.0]  # no elements are no call
    assert_same(cast(torch.tensor([3.0]), state), torch.tensor([3.0]))  # nothing but zeros was seen: its own


def test_other_casts_leave_the_history_alone() -> None:
    state = CastState()
    for text in ("e4m3fn", "e4m3fn/row", "bf16", "e4m3fn/tensor/static=2"):
        Cast.parse(text)(torch.ones(3), state)
    Cast.parse("e4m3fn/tensor/delayed").saturates(torch.ones(3), state)
    Cast.parse("e4m3fn/tensor/delayed").scale_for(1.0, [2.0])
    assert not state.history


# Static scaling


def test_a_static_scale_is_the_number_given() -> None:
    x = torch.tensor([1.0, 126.4, -200.0, 0.004])
    assert_same(Cast.parse("int8/tensor/static=0.5")(x), torch.tensor([1.0, 63.5, -63.5, 0.0]))
    scale = torch.tensor(0.013)
    expected = edge_cast(FORMATS["e4m3fn"])(x / scale) * scale
    assert_same(Cast.parse("e4m3fn/tensor/static=0.013")(x), expected)
    assert Cast.parse("e4m3fn/tensor/static=0.013").scale_for(1e9) == float(scale)
    assert Cast.parse("e4m3fn/tensor/static=0.013:pow2").scale_for(1e9) == 2.0**-6
    assert Cast.parse("e4m3fn/tensor/static=0.25:pow2").scale_for(0.0) == 0.25


@pytest.mark.parametrize("amax", [0.0, INF, NAN, 1e-45, 3e38])
def test_a_static_scale_does_not_ask_what_is_in_the_tensor(amax: float) -> None:
    assert Cast.parse("e4m3fn/tensor/static=2")(torch.tensor([amax, 3.1]))[1] == 3.0


# Current scaling of whole tensors


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("fp64", "fp32")])
@pytest.mark.parametrize("exponent", [-140, -120, -60, -7, 0, 9, 100, 127])
def test_current_scaling_writes_amax_as_the_largest_value(name: str, exponent: int) -> None:
    cast = Cast.parse(f"{name}/tensor/current")
    for amax in (1 + torch.rand(50, generator=generator(exponent + 200))) * 2.0**exponent:
        ends = amax / cast.format.largest < 2.0**-126 or (name == "int4" and amax > FLOAT32_MAX / 8 * 7)
        if ends or name == "e8m0":
            continue  # there the scale is not amax / largest: see below
        x = amax * torch.tensor([1.0, -0.3, 0.011, -1.0])
        as_written = torch.tensor(cast.format.largest) * torch.tensor(cast.scale_for(float(amax)))
        result = cast(x)
        assert result[0] == as_written
        assert result[0].isfinite()
        if name != "int4":  # -amax falls on a tie between -7 and -8 there where the division rounds up
            assert result[3] == -as_written
        up, down = torch.nextafter(amax, torch.tensor(INF)), torch.nextafter(amax, torch.tensor(0.0))
        assert result[0] in (down, amax, up)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_amax_comes_back_exactly(dtype: torch.dtype) -> None:
    x = every_pattern(dtype)
    amax = x[x.isfinite() & (x > 0) & (x.float() / FORMATS["e5m2"].largest > 2.0**-126)][::17]
    for name in ("e4m3fn", "e5m2", "int8"):
        cast = Cast.parse(f"{name}/row/current")
        assert_same(cast(amax[:, None]), amax[:, None])
        assert all(Cast.parse(name)(value[None]).item() == value.item() for value in amax[::40])


def test_one_scale_is_told_and_many_are_not() -> None:
    assert Cast.parse("e4m3fn").scale_for(896.0) == 2.0
    assert Cast.parse("e4m3fn/tensor/current:pow2").scale_for(897.0) == 4.0
    assert Cast.parse("e4m3fn/none").scale_for(896.0) == Cast.parse("fp32/tensor").scale_for(896.0) == 1.0
    for text in ("e4m3fn/row", "e4m3fn/block32", "fp32/block128x128"):
        with pytest.raises(InvalidCast, match="no one scale"):
            Cast.parse(text).scale_for(1.0)


# What has no scale of its own, and the ends of float32

GRANULAR = ["tensor/current", "row/current", "column/current:pow2", "block32/e8m0", "block32/e8m0up", "block16/nvfp4"]
GRANULAR += ["block1x128/current", "block128x128/current", "tensor/delayed"]


@pytest.mark.parametrize("scale", GRANULAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_of_zeros_or_of_nothing_finite_have_scale_1(scale: str, dtype: torch.dtype) -> None:
    for name in ("e4m3fn", "e2m1", "int8", "e5m2"):
        cast, largest = Cast.parse(f"{name}/{scale}"), FORMATS[name].largest
        zeros = torch.zeros(40, 50, dtype=dtype)
        zeros[::2] = -0.0
        assert_same(cast(zeros), zeros)
        nothing = torch.tensor([INF, NAN, -INF, INF], dtype=dtype).repeat(30, 20)
        expected = torch.tensor([largest, NAN, -largest, largest]).repeat(30, 20)
        assert_same(cast(nothing), expected)
        if cast.has_one_scale:
            assert cast.scale_for(0.0) == cast.scale_for(NAN) == 1.0


@pytest.mark.parametrize("scale", ["tensor/current", "row/current", "block32/e8m0", "block1x128/current:pow2"])
def test_inf_and_nan_do_not_spoil_the_scale(scale: str) -> None:
    x = torch.tensor([INF, 3.5, -INF, NAN, -7.0])
    assert_same(Cast.parse(f"e4m3fn/{scale}")(x), torch.tensor([7.0, 3.5, -7.0, NAN, -7.0]))
    assert_same(Cast.parse(f"e4m3fn/{scale}/nearest:inf")(x), torch.tensor([NAN, 3.5, NAN, NAN, -7.0]))
    assert_same(Cast.parse(f"e5m2/{scale}/nearest:inf")(x), torch.tensor([INF, 3.5, -INF, NAN, -7.0]))


def test_zero_blocks_beside_others() -> None:
    x = torch.cat([torch.zeros(32), torch.full((32,), 1e-6), torch.full((32,), INF), torch.full((5,), -3e5)])
    result = Cast.parse("e4m3fn/block32/e8m0up")(x)
    assert_same(result[:32], torch.zeros(32))
    assert ((result[32:64] - 1e-6).abs() <= 1e-6 / 16).all()
    assert (result[64:96] == 448).all()
    assert ((result[96:] + 3e5).abs() <= 3e5 / 16).all()


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "int8", "e2m1"])
def test_a_float32_scale_is_never_subnormal(name: str) -> None:
    tiny = torch.tensor([2.0**-149, -(2.0**-130), 2.0**-140])
    for scale in ("tensor/current", "tensor/current:pow2", "row/current"):
        cast = Cast.parse(f"{name}/{scale}")
        assert_same(cast(tiny), edge_cast(FORMATS[name])(tiny / 2.0**-126) * 2.0**-126)
    assert Cast.parse(name).scale_for(2.0**-130) == 2.0**-126


@pytest.mark.parametrize("name", OCP_EMAX)
def test_an_e8m0_scale_goes_down_to_its_smallest_value(name: str) -> None:
    for rule in ("e8m0", "e8m0up"):
        for amax in (2.0**-149, 2.0**-126, 2.0**-120, 2.0**-112):
            x = torch.tensor([amax, -amax / 2, 0.75 * amax, 2.0**-149])
            assert_same(Cast.parse(f"{name}/block32/{rule}")(x), scaled(x, FORMATS[name], "block32", rule))


@pytest.mark.parametrize("scale", GRANULAR)
@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_float32_and_beyond_stay_finite(name: str, scale: str) -> None:
    if "nvfp4" in scale and FORMATS[name].largest > 1e30:
        return
    cast = Cast.parse(f"{name}/{scale}")
    x = torch.tensor([FLOAT32_MAX, FLOAT32_MAX / 3, 1.0, INF])
    x = x if name == "e8m0" else torch.cat([x, -x])
    result = cast(x)
    assert result.isfinite().all()
    assert 0.4 < result[0] / FLOAT32_MAX <= 1  # 7·2^124, because int4's -8·2^125 would be too large
    assert cast(x[:3].double() * 1e250).isfinite().all()
    if cast.has_one_scale:
        assert 0 < cast.scale_for(1e308) <= FLOAT32_MAX


def test_a_scale_that_float64_needs_is_a_float32() -> None:
    """What is rounded is x/scale in float64, with the scale that float32 has."""
    x = torch.randn(60, generator=generator(4), dtype=torch.float64)
    scale = torch.tensor(float(F32(float(x.abs().max()) / 448)), dtype=torch.float64)
    assert_same(Cast.parse("e4m3fn")(x), edge_cast(FORMATS["e4m3fn"])(x / scale) * scale)


def test_a_power_of_two_scale_changes_exponents_alone() -> None:
    x = rows_of_sizes(40, 50)
    for scale in ("tensor/current:pow2", "row/current:pow2", "block32/e8m0up"):
        assert_same(Cast.parse(f"e4m3fn/{scale}")(x * 2.0**9), Cast.parse(f"e4m3fn/{scale}")(x) * 2.0**9)


def test_a_history_is_looked_back_on_no_further_than_its_length() -> None:
    cast, x = Cast.parse("e4m3fn/tensor/delayed(len=2)"), torch.tensor([1.0, 0.3])
    assert cast.scale_for(1.0, [100.0, 1.0, 1.0]) == cast.scale_for(1.0, [1.0, 1.0])
    assert torch.equal(cast(x, CastState(history=deque([100.0, 1.0, 1.0]))), cast(x, CastState(history=deque([1.0]))))


@pytest.mark.parametrize("text", ["e4m3fn/tensor/static=1e38", "int8/tensor/static=2e38", "bf16/tensor/static=2.5"])
def test_a_large_static_scale_saturates_at_float32s_end(text: str) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([3.4e38, -INF, 1e38, NAN])
    result = Cast.parse(text)(x)
    assert result[:3].isfinite().all()
    assert result[1] == -largest
    assert_same(result, by_specification(Cast.parse(text), x, CastState()))


def test_a_power_of_two_beyond_float32_is_refused() -> None:
    with pytest.raises(InvalidCast, match="a scale is a float32"):
        Cast.parse("e5m2/tensor/static=3e38:pow2")
