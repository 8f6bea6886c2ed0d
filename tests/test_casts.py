"""Casts against ml_dtypes, and what they do to all that is unusual."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from probes import rounding
from probes.casts import Cast, CastState
from probes.errors import InvalidCast, ProbeError, UnknownFormat, UnsupportedTensor
from probes.formats import FORMATS

ML_DTYPES = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
INF, NAN = float("inf"), float("nan")
PRIME = 4099  # stride over the 2^32 float32 patterns: about a million of them


def every_pattern(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def strided_float32() -> Tensor:
    bits = np.arange(0, 2**32, PRIME, dtype=np.uint64).astype(np.uint32)
    return torch.from_numpy(bits.view(np.float32).copy())


def assert_same(ours: Tensor, expected: np.ndarray, dtype: torch.dtype) -> None:
    """Equal bit for bit, any NaN being as good as another."""
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = torch.from_numpy(expected.astype(np.float64))
    assert ours.dtype == dtype
    assert torch.equal(ours.isnan(), theirs.isnan())
    number = ~theirs.isnan()
    assert torch.equal(ours[number].double(), theirs[number])
    assert torch.equal(ours[number].signbit(), theirs[number].signbit())


def by_ml_dtypes(x: Tensor, name: str) -> np.ndarray:
    """Without saturation, as ml_dtypes rounds; through float32, which holds every fp16 and bf16 value."""
    with np.errstate(invalid="ignore", over="ignore"):
        return x.float().numpy().astype(ML_DTYPES[name]).astype(np.float32)


def saturated(x: Tensor, rounded: np.ndarray, name: str) -> np.ndarray:
    largest = np.float32(FORMATS[name].largest)
    beyond = ~x.isnan().numpy() & ~(np.abs(rounded) <= largest)
    return np.where(beyond, np.copysign(largest, x.float().numpy()), rounded)


INPUTS = {
    "fp16": lambda: every_pattern(torch.float16),
    "bf16": lambda: every_pattern(torch.bfloat16),
    "fp32": strided_float32,
}


@pytest.mark.parametrize("source", INPUTS)
@pytest.mark.parametrize("name", ML_DTYPES)
def test_bit_exact_against_ml_dtypes(name: str, source: str) -> None:
    x = INPUTS[source]()
    rounded = by_ml_dtypes(x, name)
    wide = x.float()  # so that the result is not rounded to the input's dtype as well
    assert_same(Cast.parse(f"{name}/none/nearest:inf")(wide), rounded, torch.float32)
    assert_same(Cast.parse(f"{name}/none/nearest")(wide), saturated(x, rounded, name), torch.float32)
    assert_same(Cast.parse(f"{name}/none")(wide.double()), saturated(x, rounded, name), torch.float64)


@pytest.mark.parametrize("source", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ML_DTYPES)
def test_16_bit_tensors_come_back_in_their_own_dtype(name: str, source: str) -> None:
    x = INPUTS[source]()
    expected = torch.from_numpy(saturated(x, by_ml_dtypes(x, name), name))
    limit = torch.finfo(x.dtype).max
    expected = expected.clamp(-limit, limit).to(x.dtype)  # 65504 to bf16 is 65536, which fp16 does not hold
    assert_same(Cast.parse(f"{name}/none")(x), expected.float().numpy(), x.dtype)


def test_torch_agrees_where_it_does_not_saturate() -> None:
    x = strided_float32()
    e5m2 = x.to(torch.float8_e5m2).float().numpy()
    assert_same(Cast.parse("e5m2/none/nearest:inf")(x), e5m2, torch.float32)


def test_float64_is_rounded_once() -> None:
    x = torch.tensor([1 + 2.0**-4 + 2.0**-40], dtype=torch.float64)  # in float32 a tie, which goes down to 1
    assert Cast.parse("e4m3fn/none")(x).item() == 1.125
    assert Cast.parse("e4m3fn/none")(x.float()).item() == 1.0


def test_int8_is_round_and_clamp() -> None:
    x = torch.cat([torch.linspace(-300, 300, 48_001), torch.arange(-130, 130) + 0.5])
    assert torch.equal(Cast.parse("int8/none")(x), x.round().clamp(-127, 127))


def test_fp32_changes_nothing_but_inf() -> None:
    x = strided_float32()
    assert_same(Cast.parse("fp32/none/nearest:inf")(x), x.numpy(), torch.float32)
    largest = torch.finfo(torch.float32).max
    for cast in ("fp32", "fp32/none/stochastic", "fp32/tensor/current/nearest", "fp32/tensor/current/stochastic"):
        assert_same(Cast.parse(cast)(x), x.clamp(-largest, largest).numpy(), torch.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exponent", [-140, -120, -60, -7, 0, 9, 100, 127])
def test_current_scaling_writes_amax_as_the_largest_value(name: str, exponent: int) -> None:
    cast, generator = Cast.parse(f"{name}/tensor/current"), torch.Generator().manual_seed(exponent + 200)
    for amax in (1 + torch.rand(50, generator=generator)) * 2.0**exponent:
        if name == "fp32" or amax / cast.format.largest < 2.0**-126:
            continue  # there the scale is not amax / largest: see the tests below
        x = amax * torch.tensor([1.0, -0.3, 0.011, -1.0])
        as_written = torch.tensor(cast.format.largest) * torch.tensor(cast.scale_for(float(amax)))
        assert cast(x)[0] == as_written == -cast(x)[3]
        up, down = torch.nextafter(amax, torch.tensor(INF)), torch.nextafter(amax, torch.tensor(0.0))
        assert cast(x)[0] in (down, amax, up)
        assert cast(x)[0].isfinite()


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "int8", "fp16", "bf16"])
def test_current_scaling_is_divide_round_multiply(name: str) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * (1e3 if name == "bf16" else 1e-3)
    scale = x.abs().max() / torch.tensor(FORMATS[name].largest)
    unscaled = Cast.parse(f"{name}/none")
    assert torch.equal(Cast.parse(f"{name}/tensor")(x), unscaled(x / scale) * scale)
    assert Cast.parse(f"{name}/tensor").scale_for(float(x.abs().max())) == float(scale)
    assert unscaled.scale_for(float(x.abs().max())) == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_amax_comes_back_exactly(dtype: torch.dtype) -> None:
    x = every_pattern(dtype)
    amax = x[x.isfinite() & (x > 0) & (x.float() / FORMATS["e5m2"].largest > 2.0**-126)][::17]
    for name in ("e4m3fn", "e5m2", "int8"):
        cast = Cast.parse(name)
        assert all(cast(value[None]).item() == value.item() for value in amax)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_without_a_scale_of_their_own(name: str, dtype: torch.dtype) -> None:
    cast = Cast.parse(f"{name}/tensor/current")
    largest = cast.format.largest
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    assert torch.equal(cast(zeros).signbit(), zeros.signbit())
    assert torch.equal(cast(zeros), zeros)
    nothing_finite = cast(torch.tensor([INF, NAN, -INF], dtype=dtype))
    assert nothing_finite.tolist()[::2] == [largest, -largest]
    assert nothing_finite[1].isnan()
    assert cast(torch.empty(0, 3, dtype=dtype)).shape == (0, 3)
    assert cast.scale_for(0.0) == cast.scale_for(NAN) == 1.0


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "int8"])
def test_a_scale_is_never_subnormal(name: str) -> None:
    cast = Cast.parse(name)
    tiny = torch.tensor([2.0**-149, -(2.0**-130), 2.0**-140])
    assert cast.scale_for(2.0**-130) == 2.0**-126
    assert torch.equal(cast(tiny), Cast.parse(f"{name}/none")(tiny / 2.0**-126) * 2.0**-126)


def test_the_largest_float32_and_beyond_stay_finite() -> None:
    largest = torch.finfo(torch.float32).max
    for name in FORMATS:
        cast = Cast.parse(f"{name}/tensor/current")
        assert cast(torch.tensor([largest, -largest])).isfinite().all()
        assert cast(torch.tensor([1e300, 1.0], dtype=torch.float64)).isfinite().all()
        assert 0 < cast.scale_for(1e308) <= largest


def test_inf_does_not_spoil_the_scale() -> None:
    x = torch.tensor([INF, 3.5, -INF, NAN, -7.0])
    assert_same(Cast.parse("e4m3fn")(x), np.array([7.0, 3.5, -7.0, NAN, -7.0]), torch.float32)
    assert_same(Cast.parse("e5m2/tensor/current/nearest:inf")(x), np.array([INF, 3.5, -INF, NAN, -7]), torch.float32)
    assert_same(Cast.parse("e4m3fn/tensor/current/nearest:inf")(x), np.array([NAN, 3.5, NAN, NAN, -7]), torch.float32)


# The table in which libraries differ (464.1, Inf, NaN, 2^-10 to e4m3fn): we do what the cast's string says.
@pytest.mark.parametrize(
    ("cast", "expected"),
    [
        ("e4m3fn/none/nearest", [448.0, 448.0, NAN, 0.0]),
        ("e4m3fn/none/nearest:inf", [NAN, NAN, NAN, 0.0]),
        ("e5m2/none/nearest", [448.0, 57344.0, NAN, 2.0**-10]),
        ("e5m2/none/nearest:inf", [448.0, INF, NAN, 2.0**-10]),
        ("int8/none/nearest", [127.0, 127.0, NAN, 0.0]),
    ],
)
def test_overflow_and_non_finite(cast: str, expected: list[float]) -> None:
    x = torch.tensor([464.1, INF, NAN, 2.0**-10])
    for values in (x, x.double()):
        assert_same(Cast.parse(cast)(values), np.array(expected), values.dtype)
        assert_same(Cast.parse(cast)(-values), -np.array(expected), values.dtype)


def test_the_tie_at_the_top_goes_to_the_even_code() -> None:
    x = torch.tensor([464.0, torch.nextafter(torch.tensor(464.0), torch.tensor(INF)).item()])
    assert_same(Cast.parse("e4m3fn/none/nearest:inf")(x), np.array([448.0, NAN]), torch.float32)
    top = torch.tensor([61440.0, torch.nextafter(torch.tensor(61440.0), torch.tensor(0.0)).item()])
    assert_same(Cast.parse("e5m2/none/nearest:inf")(top), np.array([INF, 57344.0]), torch.float32)


@pytest.mark.parametrize("cast", ["e4m3fn", "e5m2/none", "bf16", "int8", "e4m3fn/tensor/current/stochastic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_strides_do_not_matter(cast: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, 10, 8, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    views = [x.permute(3, 1, 0, 2), x[:, ::3, 1:], x.flip(1), x[:1].expand(5, -1, -1, -1), x.mT, x[0, 0, 0, 0]]
    views.append(x.to(memory_format=torch.channels_last))
    for view in views:
        before = view.clone()
        result = Cast.parse(cast)(view, CastState(3))
        assert torch.equal(result, Cast.parse(cast)(before.contiguous(), CastState(3)))
        assert result.shape == view.shape
        assert result.dtype == dtype
        assert torch.equal(view, before)
        assert result.data_ptr() != view.data_ptr()


def test_a_dense_tensor_keeps_its_memory_format() -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert Cast.parse("e4m3fn")(x).stride() == x.stride()


@pytest.mark.parametrize("cast", ["e4m3fn", "bf16", "int8/none/stochastic", "e5m2/tensor/current/nearest:inf"])
def test_no_value_is_waited_for(cast: str) -> None:
    """On a device without values: what reads one back, as a synchronisation would, fails there."""
    x = torch.empty(3, 4, device="meta", dtype=torch.bfloat16)
    assert Cast.parse(cast)(x).shape == x.shape


def test_a_lazily_negated_tensor() -> None:
    z = torch.tensor([1 + 2.5j, 3 - 4.25j])
    assert torch.equal(Cast.parse("fp32")(z.conj().imag), torch.tensor([-2.5, 4.25]))


def test_the_autograd_graph_is_left_alone() -> None:
    x = torch.randn(8, requires_grad=True)
    parameter = torch.nn.Parameter(torch.randn(8))
    for cast in ("e4m3fn", "bf16", "fp32", "int8/none/stochastic"):
        assert not Cast.parse(cast)(x).requires_grad
        assert type(Cast.parse(cast)(parameter)) is Tensor
    with torch.inference_mode():
        assert Cast.parse("e4m3fn")(torch.randn(8)).shape == (8,)


@pytest.mark.parametrize("rounding_name", ["nearest", "stochastic"])
def test_the_users_random_stream_is_not_touched(rounding_name: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for name in FORMATS:
        Cast.parse(f"{name}/none/{rounding_name}")(torch.ones(64))
        Cast.parse(f"{name}/none/{rounding_name}")(torch.ones(64, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cast", ["e4m3fn/tensor/current/stochastic", "int8/none/stochastic", "bf16/none/stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stochastic_rounding_is_unbiased(cast: str, dtype: torch.dtype) -> None:
    cast_, state, calls = Cast.parse(cast), CastState(11), 400
    x = torch.randn(512, generator=torch.Generator().manual_seed(2)).to(dtype) * 3
    drawn = torch.stack([cast_(x, state).double() for _ in range(calls)])
    scale = cast_.scale_for(float(x.abs().max()))
    spacing = rounding.grid_spacing(x.double() / scale, cast_.format) * scale
    fraction = (x.double() / spacing).abs() % 1
    sigma = (fraction * (1 - fraction) / calls).sqrt() * spacing
    off = (drawn.mean(dim=0) - x.double()) / (sigma + 1e-7 * spacing)
    assert off.abs().max() < 4.5  # of 512 elements
    assert abs(off.mean()) < 4 / 512**0.5


def test_stochastic_rounding_follows_its_state() -> None:
    cast, x = Cast.parse("e5m2/none/stochastic"), torch.linspace(1, 2, 1000)
    first, again, other = CastState(1), CastState(1), CastState(2)
    one = [cast(x, first) for _ in range(3)]
    assert torch.equal(torch.stack(one), torch.stack([cast(x, again) for _ in range(3)]))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], cast(x, other))
    assert torch.equal(cast(x, CastState(1, calls=2)), one[2])
    assert not torch.equal(cast(x), cast(x))
    assert torch.equal(cast(x.double(), CastState(1)).float(), one[0])


def test_saturating_stochastic_rounding_stays_within() -> None:
    x = torch.full((10_000,), 450.0)
    assert (Cast.parse("e4m3fn/none/stochastic")(x) == 448).all()
    overflowing = Cast.parse("e4m3fn/none/stochastic:inf")(x)
    assert abs(overflowing.isnan().double().mean() - 2 / 32) < 4 * (2 / 32 * 30 / 32 / 10_000) ** 0.5
    assert (overflowing[~overflowing.isnan()] == 448).all()


def test_both_paths_are_one_cast() -> None:
    """A device without compiled loops goes by expressions: the same values, scale included."""
    x = torch.randn(5000, generator=torch.Generator().manual_seed(3)) * 1e-6
    for text in ("e4m3fn", "e5m2/none", "int8", "fp16/tensor", "bf16/tensor", "e4m3fn/tensor/current/stochastic"):
        cast = Cast.parse(text)
        assert torch.equal(cast(x, CastState(1)), cast._by_expressions(x, CastState(1).next_stream()))


CANONICAL = {
    "e4m3fn": "e4m3fn/tensor/current/nearest",
    "int8": "int8/tensor/current/nearest",
    "e5m2/tensor": "e5m2/tensor/current/nearest",
    "e5m2/tensor/current": "e5m2/tensor/current/nearest",
    "int8/none": "int8/none/nearest",
    "e5m2/none": "e5m2/none/nearest",
    "bf16": "bf16/none/nearest",
    "fp32": "fp32/none/nearest",
    "fp16/tensor": "fp16/tensor/current/nearest",
    "bf16/none/stochastic": "bf16/none/stochastic",
    "e5m2:inf": "e5m2/tensor/current/nearest:inf",
    "fp16/none/nearest:inf": "fp16/none/nearest:inf",
}


@pytest.mark.parametrize(("text", "canonical"), CANONICAL.items())
def test_a_cast_is_written_one_way(text: str, canonical: str) -> None:
    cast = Cast.parse(text)
    assert str(cast) == canonical
    assert Cast.parse(canonical) == cast
    assert hash(Cast.parse(canonical)) == hash(cast)
    assert cast.bits == FORMATS[text.split("/")[0].split(":")[0]].bits


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("e4m3fn/row/current/nearest", "none, tensor"),
        ("e4m3fn/tensr", "did you mean tensor"),
        ("e4m3fn/tensor/delayed/nearest", "current"),
        ("e4m3fn/tensor/stochastic", "current"),
        ("e4m3fn/tensor/current/nearst", "did you mean nearest"),
        ("e4m3fn/none/current/nearest", "nearest, stochastic"),
        ("e4m3fn/none/nearest/more", "nothing follows"),
        ("e4m3fn/", "none, tensor"),
        ("int8/none/nearest:inf", "neither Inf nor NaN"),
        ("bf16/none/nearest:sat", "nearest"),
    ],
)
def test_a_cast_that_means_nothing_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidCast, match=says) as caught:
        Cast.parse(text)
    assert text in str(caught.value)
    assert isinstance(caught.value, ProbeError)
    assert isinstance(caught.value, ValueError)


def test_a_cast_is_refused_however_it_is_made() -> None:
    with pytest.raises(InvalidCast):
        Cast(FORMATS["e4m3fn"], "tensor")
    with pytest.raises(InvalidCast):
        Cast(FORMATS["e4m3fn"], "none", "current")
    with pytest.raises(InvalidCast):
        Cast.parse(None)  # type: ignore[arg-type]
    with pytest.raises(UnknownFormat, match="e4m3fn"):
        Cast.parse("e4m3/tensor")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedTensor, match=str(dtype)):
        Cast.parse("bf16")(torch.zeros(3).to(dtype))


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(UnsupportedTensor, match="sparse"):
        Cast.parse("bf16")(torch.eye(3).to_sparse())
