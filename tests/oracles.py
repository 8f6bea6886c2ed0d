"""What a cast must give, from outside: ml_dtypes, gfloat and torch's own casts; and inputs that leave nothing out.

Arrays here are float32 and mean values, not codes. Where the oracles disagree with each other, the function says whose
rule it follows; `test_casts.py` names the rule in a test of its own.
"""

from __future__ import annotations

from typing import Any

import gfloat
import ml_dtypes
import numpy as np
import torch
from gfloat import RoundMode
from torch import Tensor

from probes import codes
from probes.casting import Circumstances, by_expressions
from probes.casts import Cast, CastState
from probes.format_names import format_named
from probes.formats import FORMATS, Format, NonFinite

Array = np.ndarray[Any, np.dtype[Any]]

ML_DTYPES = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3": ml_dtypes.float8_e4m3,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e3m4": ml_dtypes.float8_e3m4,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
TORCH = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3fn": torch.float8_e4m3fn,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2": torch.float8_e5m2,
    "e5m2fnuz": torch.float8_e5m2fnuz,
    "e8m0": torch.float8_e8m0fnu,
}
PRIME = 4099  # stride over the 2^32 float32 patterns: about a million of them


def sized(bits: range) -> list[Format]:
    """The formats of so many bits: those of the table, and every eXmY."""
    named = [format_named(f"e{x}m{y}") for x in range(2, 9) for y in range(24)]
    return list(dict.fromkeys(one for one in (*FORMATS.values(), *named) if one.bits in bits))


NARROW = sized(range(9))
UP_TO_16_BITS = sized(range(17))


def overflows(target: Format) -> list[bool]:
    """Whether to saturate: the ways in which the format can overflow."""
    return [True] if target.overflow is None else [True, False]


def every_pattern(dtype: torch.dtype) -> Tensor:
    """All 65,536 values of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def strided_float32(stride: int = PRIME) -> Tensor:
    return torch.from_numpy(np.arange(0, 2**32, stride, dtype=np.uint32).view(np.float32))


def edges(target: Format) -> Tensor:
    """float32: every value of a format of 8 bits or less, every midpoint, what would come next beyond the largest
    value and below the smallest, and the neighbours of them all in float32."""
    value = codes.decode(np.arange(target.code_points), target)
    value = np.unique(np.abs(value[np.isfinite(value)]))
    beyond = target.largest + target.largest_spacing * np.array([1, 2])
    points = np.concatenate([value, beyond, [target.smallest_subnormal / 4]])
    points = np.sort(np.concatenate([points, target.smallest_subnormal * np.array([0.5, 0.75, 1.5])]))
    points = np.concatenate([points, (points[1:] + points[:-1]) / 2])
    with np.errstate(over="ignore"):
        points = np.concatenate([points, -points]).astype(np.float32)
        near = [np.nextafter(points, np.float32(to)) for to in (np.inf, -np.inf)]
    return torch.from_numpy(np.concatenate([points, *near, np.array([np.inf, -np.inf, np.nan], dtype=np.float32)]))


def by_ml_dtypes(x: Tensor, name: str) -> Array:
    """Nearest; overflow as the format has it, so never saturated but in the MX formats, which have nothing else."""
    with np.errstate(invalid="ignore", over="ignore"):
        return x.float().numpy().astype(ML_DTYPES[name]).astype(np.float32)


def by_torch(x: Tensor, name: str) -> Array:
    """Nearest; e4m3fn saturates, all others overflow."""
    return x.to(TORCH[name]).float().numpy()


def saturated(rounded: Array, x: Tensor, target: Format) -> Array:
    """An overflowing oracle's values with Inf and NaN made the largest value, except where x is a NaN."""
    beyond = ~x.isnan().numpy() & ~np.isfinite(rounded)
    return np.where(beyond, np.copysign(np.float32(target.largest), x.numpy()), rounded)


def by_gfloat(x: Tensor, target: Format, rounding: str = "nearest", saturate: bool = True) -> Array:
    """Of a format with a sign. gfloat saturates Inf as well, and a NaN stays one whatever the format has.

    gfloat differs in two things. Between powers of two, where there are no mantissa bits, it sends ties to the even
    code; here they go up, as in torch and ml_dtypes. And its integers go down to -2^7; int8 here is symmetric.
    """
    value = x.double().numpy()
    if target.mantissa_bits == 0 and rounding == "nearest":
        mantissa, _ = np.frexp(np.abs(value))
        tie = (mantissa == 0.75) & (np.abs(value) > 2.0**target.emin)
        value = np.where(tie, value * (1 + 2.0**-20), value)
    mode = {"nearest": RoundMode.TiesToEven, "zero": RoundMode.TowardZero}[rounding]
    with np.errstate(invalid="ignore", over="ignore"):
        rounded = gfloat.round_ndarray(gfloat_format(target), value, mode, saturate)
    return np.maximum(rounded, target.lowest) if target.is_integer else rounded


def gfloat_format(target: Format) -> gfloat.FormatInfo:
    """Our format in gfloat's words."""
    nonfinite, mantissas = target.nonfinite, 2**target.mantissa_bits
    return gfloat.FormatInfo(
        target.name,
        k=target.bits,
        precision=target.mantissa_bits + 1,
        bias=target.bias,
        is_signed=target.signed,
        domain=gfloat.Domain.Extended if target.overflow == np.inf else gfloat.Domain.Finite,
        has_nz=target.signed and not target.is_integer and nonfinite is not NonFinite.NAN_FOR_NEGATIVE_ZERO,
        num_high_nans={NonFinite.INF_AND_NAN: mantissas - 1, NonFinite.NAN: 1}.get(nonfinite, 0),
        has_subnormals=target.signed,
        is_twos_complement=target.is_integer,
    )


def assert_same(ours: Tensor | Array, theirs: Tensor | Array, what: str = "") -> None:
    """Equal bit for bit, any NaN being as good as another."""
    a, b = (torch.as_tensor(values) for values in (ours, theirs))
    if a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32)):
        return  # the usual case, quickly
    a, b = a.double(), b.double()
    nan = a.isnan()
    wrong = (a != b) & ~(nan & b.isnan()) | ~nan & (a.signbit() != b.signbit())
    assert a.shape == b.shape
    assert not wrong.any(), f"{what} {int(wrong.sum())} differ: {a[wrong][:4].tolist()}, not {b[wrong][:4].tolist()}"


def by_specification(cast: Cast, x: Tensor, state: CastState, dimension: int = -1) -> Tensor:
    """What the plain functions of `rounding.py` and `scaling.py` give for a float32 tensor. (A cast uses them itself
    wherever there is no compiled loop.) `state` moves on as in a call."""
    stream = state.next_stream() if cast.is_random else 0
    along = -1 if cast.has_one_scale else dimension  # draws are then those of the tensor's own order
    found = by_expressions(cast, x, Circumstances(tuple(state.history), stream, along))
    if cast.is_delayed:
        assert found.amax is not None
        assert cast.scale is not None
        state.remember(float(found.amax), cast.scale.length)
    return found.values


def edge_cast(target: Format, rounding: str = "nearest", saturate: bool = True) -> Cast:
    """Without scaling."""
    return Cast.parse(f"{target}/none/{rounding}{'' if saturate else ':inf'}")
