"""Casts without scaling against ml_dtypes, gfloat and torch, and what casts do to all that is unusual."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import (
    ML_DTYPES,
    NARROW,
    TORCH,
    UP_TO_16_BITS,
    assert_same,
    by_gfloat,
    by_ml_dtypes,
    by_specification,
    by_torch,
    edge_cast,
    edges,
    every_pattern,
    overflows,
    saturated,
    strided_float32,
)
from tensors import generator
from torch import Tensor

from probes.casts import Cast, CastState
from probes.errors import InvalidCast, ProbeError, UnsupportedTensor
from probes.formats import FORMATS, Format

INF, NAN = float("inf"), float("nan")

SIXTEEN_BITS = {"fp16": every_pattern(torch.float16), "bf16": every_pattern(torch.bfloat16)}
WIDENED = {name: x.float() for name, x in SIXTEEN_BITS.items()}  # so that no result is rounded to 16 bits as well
FLOAT32 = {"bf16": WIDENED["bf16"], "fp16": WIDENED["fp16"], "fp32": strided_float32()}

MX = ("e3m2", "e2m3", "e2m1")  # formats with neither Inf nor NaN, which ml_dtypes saturates
OVERFLOWING = [name for name in ML_DTYPES if name not in MX]
SIGNED = [target for target in UP_TO_16_BITS if target.signed]


def inputs_for(name: str) -> Tensor:
    """Every bf16 and fp16 value, a prime stride over float32, and the edges of formats of 8 bits or less."""
    near = [edges(FORMATS[name])] if FORMATS[name].bits <= 8 else []
    return torch.cat([*FLOAT32.values(), *near])


def test_e8m0_takes_all_between_its_two_smallest_values_to_the_upper() -> None:
    """torch's and ml_dtypes' rule: float32 is subnormal there. gfloat rounds to nearest as anywhere."""
    x = torch.linspace(1, 2, 1001)[1:-1] * 2.0**-127
    for values in (x, x.double()):
        for saturate in (True, False):
            assert (edge_cast(FORMATS["e8m0"], saturate=saturate)(values) == 2.0**-126).all()
    assert (by_torch(x, "e8m0") == 2.0**-126).all()
    assert (by_ml_dtypes(x, "e8m0") == 2.0**-126).all()
    assert (by_gfloat(x, FORMATS["e8m0"])[x.numpy() < 1.5 * 2.0**-127] == 2.0**-127).all()


@pytest.mark.parametrize("name", OVERFLOWING)
def test_overflowing_to_inf_or_nan_is_what_ml_dtypes_does(name: str) -> None:
    x = inputs_for(name)
    assert_same(edge_cast(FORMATS[name], saturate=False)(x), by_ml_dtypes(x, name))
    assert_same(edge_cast(FORMATS[name], saturate=False)(x.double()), by_ml_dtypes(x, name))


@pytest.mark.parametrize("name", [name for name in OVERFLOWING if name != "e8m0"])
def test_saturating_makes_inf_and_whatever_overflows_the_largest_value(name: str) -> None:
    """gfloat's rule and, for e4m3fn, torch's; ml_dtypes overflows, and what overflows there is what saturates here."""
    x, target = inputs_for(name), FORMATS[name]
    assert_same(edge_cast(target)(x), saturated(by_ml_dtypes(x, name), x, target))
    assert_same(edge_cast(target)(x.double()), saturated(by_ml_dtypes(x, name), x, target))


@pytest.mark.parametrize("name", MX)
def test_nan_stays_nan_in_formats_without_one_and_all_else_is_what_ml_dtypes_does(name: str) -> None:
    """gfloat's rule. ml_dtypes makes a NaN -0 there, and saturates Inf, as we do."""
    x = inputs_for(name)
    expected = np.where(x.isnan(), np.nan, by_ml_dtypes(x, name))
    assert_same(edge_cast(FORMATS[name])(x), expected)
    assert_same(edge_cast(FORMATS[name])(x.double()), expected)


@pytest.mark.parametrize("name", [name for name in TORCH if name != "e8m0"])
def test_torchs_own_casts(name: str) -> None:
    """e4m3fn saturates there, Inf too; the others overflow."""
    x = inputs_for(name)
    assert_same(edge_cast(FORMATS[name], saturate=name == "e4m3fn")(x), by_torch(x, name))


def test_torchs_e8m0_for_positive_values() -> None:
    x = inputs_for("e8m0")
    x = x[(x > 0) | x.isnan()]
    assert_same(edge_cast(FORMATS["e8m0"], saturate=False)(x), by_torch(x, "e8m0"))


def test_e8m0_has_no_zero_and_no_sign() -> None:
    """Zero: 2^-127 when saturating, torch's rule; NaN with `:inf`, ml_dtypes' rule. Negative: NaN, ml_dtypes' rule."""
    x = torch.tensor([0.0, -0.0, 2.0**-149, 2.0**-126, -1.0, -(2.0**-149), -INF, NAN])
    lowest = 2.0**-127
    for values in (x, x.double()):
        saturating = edge_cast(FORMATS["e8m0"])(values)
        assert_same(saturating, np.array([lowest, lowest, lowest, 2.0**-126, NAN, NAN, NAN, NAN]))
        assert_same(saturating[:4], by_torch(x[:4], "e8m0"))
        overflowing = edge_cast(FORMATS["e8m0"], saturate=False)(values)
        assert_same(overflowing, np.array([NAN, NAN, lowest, 2.0**-126, NAN, NAN, NAN, NAN]))
        assert_same(overflowing, by_ml_dtypes(x, "e8m0"))


def test_e8m0_saturates_at_both_ends() -> None:
    x = torch.tensor([2.0**-149, 2.0**-128, 1.6 * 2.0**127, INF])
    assert edge_cast(FORMATS["e8m0"])(x).tolist() == [2.0**-127, 2.0**-127, 2.0**127, 2.0**127]
    assert_same(edge_cast(FORMATS["e8m0"], saturate=False)(x), np.array([2.0**-127, 2.0**-127, NAN, NAN]))


@pytest.mark.parametrize("name", ["e8m0", "e3m0", "e5m0", "e2m0", "e8m1"])
def test_a_tie_between_powers_of_two_goes_up(name: str) -> None:
    """torch's and ml_dtypes' rule for e8m0, and IEEE's even significand; gfloat takes the even code."""
    target = Cast.parse(f"{name}/none").format
    powers = 2.0 ** torch.arange(target.emin, target.emax, dtype=torch.float64)
    if target.mantissa_bits:  # with a mantissa bit a tie lies between 1 and 1.5 too, and goes down to the even one
        assert_same(edge_cast(target)(powers * 1.25), powers)
        assert_same(edge_cast(target)(powers * 1.75), powers * 2)
    else:
        assert_same(edge_cast(target)(powers * 1.5), powers * 2)
        assert_same(edge_cast(target)((powers * 1.5).float()), powers * 2)
    if name == "e8m0":
        ties = (powers * 1.5).float()
        assert_same(by_torch(ties, name), by_ml_dtypes(ties, name))
        assert_same(by_torch(ties, name), powers * 2)


def test_a_tie_with_zero_goes_to_zero() -> None:
    for name in ("e3m0", "e5m0", "e4m3fn", "e2m1"):
        target = Cast.parse(f"{name}/none").format
        tie = torch.tensor([target.smallest_subnormal / 2, -target.smallest_subnormal / 2])
        assert_same(edge_cast(target)(tie), np.array([0.0, -0.0]))


@pytest.mark.parametrize("target", SIGNED, ids=str)
def test_every_16_bit_value_in_every_narrower_format_as_gfloat_rounds(target: Format) -> None:
    """To nearest and toward zero. Toward zero with `:inf`, finite values stop at the largest and Inf goes beyond."""
    for source, x in WIDENED.items():
        if target.name == source:
            continue
        for rounding in ("nearest", "zero"):
            for saturate in overflows(target):
                ours = edge_cast(target, rounding, saturate)(x)
                if target.is_integer:
                    ours = ours + 0.0  # -0 has no code of its own there, but its sign is kept
                assert_same(ours, by_gfloat(x, target, rounding, saturate))


@pytest.mark.parametrize("target", [target for target in NARROW if target.signed], ids=str)
def test_every_boundary_of_8_bit_formats_and_its_neighbours_as_gfloat_rounds(target: Format) -> None:
    x = edges(target)
    for rounding in ("nearest", "zero"):
        for saturate in overflows(target):
            expected = by_gfloat(x, target, rounding, saturate)
            for values in (x, x.double()):
                ours = edge_cast(target, rounding, saturate)(values)
                assert_same(ours + 0.0 if target.is_integer else ours, expected)


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("fp64", "fp32", "e8m0")])
@pytest.mark.parametrize("rounding", ["nearest", "zero"])
def test_float32_on_a_prime_stride_as_gfloat_rounds(name: str, rounding: str) -> None:
    x, target = FLOAT32["fp32"], FORMATS[name]
    ours = edge_cast(target, rounding)(x)
    assert_same(ours + 0.0 if target.is_integer else ours, by_gfloat(x, target, rounding))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("fp64", "e8m0")])
@pytest.mark.parametrize("rounding", ["nearest", "zero"])
def test_float64_is_rounded_once_as_gfloat_rounds(name: str, rounding: str) -> None:
    target, generator = FORMATS[name], np.random.default_rng(5)
    exponent = generator.integers(max(target.emin - target.mantissa_bits - 3, -1040), target.emax + 3, 20_000)
    x = torch.from_numpy(np.ldexp(generator.uniform(-2, 2, 20_000), exponent))
    near_ties = by_gfloat(x, target) * 1.0 + target.smallest_subnormal * (0.5 + 2.0**-40)  # ties, but for their tail
    x = torch.cat([x, torch.from_numpy(near_ties)])
    for saturate in overflows(target):
        ours = edge_cast(target, rounding, saturate)(x)
        assert_same(ours + 0.0 if target.is_integer else ours, by_gfloat(x, target, rounding, saturate))


def test_e8m0_toward_zero_as_gfloat_rounds() -> None:
    x = inputs_for("e8m0")
    x = x[x >= 2.0**-127]
    for saturate in (True, False):
        assert_same(edge_cast(FORMATS["e8m0"], "zero", saturate)(x), by_gfloat(x, FORMATS["e8m0"], "zero", saturate))


def test_rounding_twice_is_not_rounding_once() -> None:
    x = torch.tensor([1 + 2.0**-4 + 2.0**-40], dtype=torch.float64)  # in float32 a tie, which goes down to 1
    assert Cast.parse("e4m3fn/none")(x).item() == 1.125
    assert Cast.parse("e4m3fn/none")(x.float()).item() == 1.0


@pytest.mark.parametrize("source", SIXTEEN_BITS)
@pytest.mark.parametrize("target", SIGNED, ids=str)
def test_16_bit_tensors_come_back_in_their_own_dtype(target: Format, source: str) -> None:
    x = SIXTEEN_BITS[source]
    result, limit = edge_cast(target)(x), torch.finfo(x.dtype).max
    expected = edge_cast(target)(x.float()).clamp(-limit, limit).to(x.dtype)  # bf16 makes 65504 65536: not in fp16
    assert result.dtype == x.dtype
    assert_same(result, expected)


def test_an_overflow_of_the_tensors_own_dtype_is_asked_for_too() -> None:
    x = torch.tensor([65504.0, -65504.0], dtype=torch.float16)
    assert Cast.parse("bf16")(x).tolist() == [65504.0, -65504.0]
    assert Cast.parse("bf16/none/nearest:inf")(x).tolist() == [INF, -INF]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "zero"])
def test_fp32_and_fp64_change_nothing_but_inf(rounding: str) -> None:
    x, largest = FLOAT32["fp32"], torch.finfo(torch.float32).max
    for name in ("fp32", "fp64"):
        assert_same(Cast.parse(f"{name}/none/{rounding}:inf")(x), x)
        for granularity in ("none", "tensor/current", "row/current", "block1x128/e8m0"):
            cast = Cast.parse(f"{name}/{granularity}/{rounding}")
            assert_same(cast(x.view(-1, 1)[: 1 << 17]), x.view(-1, 1)[: 1 << 17].clamp(-largest, largest))
    wide = x.double() * 1e200
    assert_same(Cast.parse(f"fp64/none/{rounding}:inf")(wide), wide)


# The table in which libraries differ (464.1, Inf, NaN, 2^-10 to e4m3fn): we do what the cast's string says.
@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        ("e4m3fn/none/nearest", [448.0, 448.0, NAN, 0.0]),
        ("e4m3fn/none/nearest:inf", [NAN, NAN, NAN, 0.0]),
        ("e4m3fn/none/zero", [448.0, 448.0, NAN, 0.0]),
        ("e4m3fn/none/zero:inf", [448.0, NAN, NAN, 0.0]),
        ("e4m3/none/nearest:inf", [INF, INF, NAN, 0.0]),
        ("e5m2/none/nearest", [448.0, 57344.0, NAN, 2.0**-10]),
        ("e5m2/none/nearest:inf", [448.0, INF, NAN, 2.0**-10]),
        ("e2m1/none/nearest", [6.0, 6.0, NAN, 0.0]),
        ("int8/none/nearest", [127.0, 127.0, NAN, 0.0]),
        ("e3m0/none/nearest:inf", [INF, INF, NAN, 0.0]),
    ],
)
def test_overflow_and_non_finite(cast: str, expected: list[float]) -> None:
    x = torch.tensor([464.1, INF, NAN, 2.0**-10])
    for values in (x, x.double()):
        assert_same(Cast.parse(cast)(values), np.array(expected))
        assert_same(Cast.parse(cast)(-values), -np.array(expected))


def test_integers_end_where_their_codes_do() -> None:
    x = torch.tensor([126.5, 127.5, -127.5, -128.0, -INF, 7.5, -7.5, -8.5, -9.0])
    assert Cast.parse("int8/none")(x).tolist() == [126, 127, -127, -127, -127, 8, -8, -8, -9]
    assert Cast.parse("int4/none")(x).tolist() == [7, 7, -8, -8, -8, 7, -8, -8, -8]


def test_negative_zero_stays_but_in_fnuz() -> None:
    zeros = torch.tensor([0.0, -0.0, -1e-30])  # the last is flushed to -0
    for name, target in FORMATS.items():
        if name in ("e8m0", "fp64", "fp32", "tf32", "bf16"):
            continue
        expected = np.array([0.0, 0.0, 0.0]) if name.endswith("fnuz") else np.array([0.0, -0.0, -0.0])
        for values in (zeros, zeros.double()):
            assert_same(edge_cast(target)(values), expected)
            assert_same(edge_cast(target, "zero")(values), expected)


def test_the_tie_at_the_top_goes_to_the_even_code() -> None:
    x = torch.tensor([464.0, torch.nextafter(torch.tensor(464.0), torch.tensor(INF)).item()])
    assert_same(Cast.parse("e4m3fn/none/nearest:inf")(x), np.array([448.0, NAN]))
    top = torch.tensor([61440.0, torch.nextafter(torch.tensor(61440.0), torch.tensor(0.0)).item()])
    assert_same(Cast.parse("e5m2/none/nearest:inf")(top), np.array([INF, 57344.0]))


STRIDED = [
    "e4m3fn",
    "e5m2/none",
    "bf16",
    "e4m3fn/tensor/current/stochastic",
    "int8/row",
    "e5m2/column",
    "e2m1/block32",
    "e2m1/block16/nvfp4/stochastic",
    "e4m3fn/block128x128/current:pow2",
    "e5m2fnuz/none/zero",
    "e8m0/none",
]


@pytest.mark.parametrize("cast", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_strides_do_not_matter(cast: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 10, 8, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    views = [
        x.permute(3, 1, 0, 2),
        x[:, ::3, 1:],
        x.flip(1),
        x[:1].expand(5, -1, -1, -1),
        x.mT,
        x[0, 0, 0, 0],
        x[0, 0, 0],
    ]
    views += [x.to(memory_format=torch.channels_last), x[:0], x[:, :, :, :0], x[0, 0, 0, :1].expand(40)]
    for view in views:
        for dimension in {-1, 0, view.dim() // 2} if view.dim() else {-1, 0}:
            before = view.clone()
            result = Cast.parse(cast)(view, CastState(3), dimension)
            assert_same(result, Cast.parse(cast)(before.contiguous(), CastState(3), dimension))
            assert (result.shape, result.dtype) == (view.shape, dtype)
            assert_same(view, before)
            assert not result.numel() or result.data_ptr() != view.data_ptr()


def test_a_dense_tensor_keeps_its_memory_format() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for cast in ("e4m3fn", "bf16", "e8m0/none", "e4m3fn/block32", "int8/row", "e5m2/column", "e5m2/none/stochastic"):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for dimension in range(4):
                assert Cast.parse(cast)(x.to(dtype), dimension=dimension).stride() == x.stride()


@pytest.mark.parametrize("cast", [*STRIDED, "e5m2/tensor/current/nearest:inf", "e5m2/tensor/delayed"])
def test_no_value_is_waited_for(cast: str) -> None:
    """On a device without values: what reads one back, as a synchronisation would, fails there."""
    x = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
    assert Cast.parse(cast)(x, CastState()).shape == x.shape


def test_a_lazily_negated_tensor() -> None:
    z = torch.tensor([1 + 2.5j, 3 - 4.25j])
    assert torch.equal(Cast.parse("fp32")(z.conj().imag), torch.tensor([-2.5, 4.25]))


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.complex128]
)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedTensor, match=f"float16, bfloat16, float32, float64 tensors, not {dtype}") as caught:
        Cast.parse("bf16")(torch.zeros(3).to(dtype))
    assert isinstance(caught.value, ProbeError)
    assert isinstance(caught.value, TypeError)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_are_refused(layout: torch.layout) -> None:
    with pytest.raises(UnsupportedTensor, match=str(layout)):
        Cast.parse("bf16")(torch.eye(3).to_sparse(layout=layout))


@pytest.mark.parametrize("cast", ["bf16", "e4m3fn/tensor", "e4m3fn/row", "e8m0/none"])
def test_a_dimension_that_is_not_there_is_refused(cast: str) -> None:
    for x, dimension in ((torch.ones(2, 3), 2), (torch.ones(2, 3), -3), (torch.tensor(1.0), 1), (torch.ones(0, 3), 5)):
        with pytest.raises(IndexError, match=rf"dimension {dimension} .*{list(x.shape)}".replace("[", r"\[")):
            Cast.parse(cast)(x, dimension=dimension)
        with pytest.raises(IndexError, match="dimension"):
            Cast.parse(cast).saturates(x, dimension=dimension)


@pytest.mark.parametrize("text", ["e5m2/tensor/static=1e-10/zero:inf", "e4m3/tensor/delayed/zero:inf"])
def test_toward_zero_no_finite_value_becomes_inf_even_if_its_quotient_overflows(text: str) -> None:
    x = torch.tensor([1e38, -1e38, INF, 1.0])
    cast = Cast.parse(text)
    result = cast(x, CastState(history=deque([1e-30])))
    assert result.isinf().tolist() == [False, False, True, False]
    assert_same(by_specification(cast, x, CastState(history=deque([1e-30]))), result)


@pytest.mark.parametrize("shape", [(700, 1), (1, 700), (300, 3), (5, 3, 3, 3), (130, 2), (2, 600)])
@pytest.mark.parametrize("text", ["block32", "block16", "column", "row", "block1x128", "block128x128"])
def test_narrow_and_long_tensors(text: str, shape: tuple[int, ...]) -> None:
    cast, x = Cast.parse(f"e4m3fn/{text}"), torch.randn(shape, generator=generator(len(shape)))
    for dimension in range(-len(shape), len(shape)):
        assert_same(cast(x, dimension=dimension), by_specification(cast, x, CastState(), dimension))


def test_what_is_no_tensor_and_no_format_is_refused() -> None:
    with pytest.raises(UnsupportedTensor, match="ndarray"):
        Cast.parse("bf16")(np.ones(3))  # type: ignore[arg-type]
    with pytest.raises(InvalidCast, match="made of a Format"):
        Cast("e4m3fn")  # type: ignore[arg-type]
    with pytest.raises(InvalidCast, match="made of a Format"):
        Cast(FORMATS["e4m3fn"], "tensor", "current")  # type: ignore[arg-type]
    with pytest.raises(InvalidCast, match="would not read back"):
        Cast(replace(FORMATS["e4m3fn"], bias=200))
    with pytest.raises(TypeError, match="integers"):
        CastState(seed=1.5)  # type: ignore[arg-type]
