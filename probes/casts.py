"""Casts: format, scaling and rounding, all that is needed to write a tensor down.

A cast is called with a tensor and gives back what would be read after writing it: each value divided by the
scale, rounded to the format's grid, limited, and multiplied by the scale again. Calculation is in float32, as
on hardware that casts float32 accumulators; float64 tensors are calculated in float64, so that they are
rounded once; float16 and bfloat16 are widened first and the result is rounded to their dtype at the end.

Per-tensor current scaling: scale = largest finite magnitude / the format's largest value, in float32. The
largest magnitude is thereby written as the format's largest value; read back it differs by at most one
float32 rounding.

What the unusual becomes:

    NaN       NaN, also for int8, which has none: in an emulation a divergence must stay visible
    -0        -0
    ±Inf      the format's largest value times the scale; with `:inf`, Inf or NaN as the format has it
    nothing finite but zeros    scale 1, so that an Inf becomes the format's largest value
    a very small amax           the scale is never below 2^-126, where float32 loses precision; tensors that are
                                far below the format's largest value times that are flushed to zero
    no elements                 no elements
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes import cast_kernels, rounding
from probes.errors import InvalidCast, UnsupportedTensor
from probes.formats import Format, format_named
from probes.kernels import in_memory_order

_SCALES: dict[str, tuple[str, ...]] = {"none": (), "tensor": ("current",)}  # granularity → kinds of scale
_ROUNDINGS = ("nearest", "stochastic")
_TO_INF = ":inf"

_CALCULATED_IN = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}
_SMALLEST_SCALE = 2.0**-126
_FLOAT32_LARGEST = float(np.finfo(np.float32).max)


@dataclass
class CastState:
    """What a cast carries from call to call: the position in its stream of random numbers.

    The same seed and the same calls give the same values, on every device; torch's generators are never used.
    """

    seed: int = 0
    calls: int = 0

    def next_stream(self) -> int:
        """64 bits that name the stream of the next call."""
        self.calls += 1
        return _splitmix64(_splitmix64(self.seed) + self.calls)


@dataclass(frozen=True)
class Cast:
    """A format, a scaling and a rounding; a value, compared and hashed by its parts.

    granularity  "none" or "tensor"
    scale        how it is found: "current", from the tensor's own largest magnitude; None without scaling
    rounding     "nearest" (ties to even) or "stochastic" (up or down at random, unbiased)
    saturate     whether what lies beyond the format's largest value becomes that value, or Inf or NaN

    Raises InvalidCast for a combination that means nothing.
    """

    format: Format
    granularity: str = "none"
    scale: str | None = None
    rounding: str = "nearest"
    saturate: bool = True

    def __post_init__(self) -> None:
        if self.granularity not in _SCALES:
            _refuse("granularity", self.granularity, tuple(_SCALES))
        if self.scale is None and _SCALES[self.granularity]:
            needed = " or ".join(_SCALES[self.granularity])
            raise InvalidCast(f"granularity {self.granularity!r} needs a scale: {needed}")
        if self.scale is not None and self.scale not in _SCALES[self.granularity]:
            _refuse(f"scale at granularity {self.granularity!r}", self.scale, _SCALES[self.granularity])
        if self.rounding not in _ROUNDINGS:
            _refuse("rounding", self.rounding, _ROUNDINGS)
        if not self.saturate and self.format.overflow is None:
            raise InvalidCast(f"{self.format} has neither Inf nor NaN to overflow to; leave {_TO_INF!r} away")

    @classmethod
    def parse(cls, text: str) -> Cast:
        """A cast from `format/granularity/scale/rounding`, with `:inf` at the end for overflow to Inf or NaN.

        Without granularity `none` there is a scale, with it there is not. Trailing parts may be left out:
        formats of 8 bits or less default to `tensor/current/nearest`, others to `none/nearest`. Raises
        InvalidCast or UnknownFormat.
        """
        if not isinstance(text, str):
            raise InvalidCast(f"a cast is written as text like 'e4m3fn/tensor/current/nearest', got {text!r}")
        name, *rest = text.removesuffix(_TO_INF).split("/")
        target = format_named(name)
        granularity = rest.pop(0) if rest else "tensor" if target.bits <= 8 else "none"
        scale = None
        if _SCALES.get(granularity):
            scale = rest.pop(0) if rest else _SCALES[granularity][0]
        rounding = rest.pop(0) if rest else _ROUNDINGS[0]
        try:
            cast = cls(target, granularity, scale, rounding, saturate=not text.endswith(_TO_INF))
        except InvalidCast as error:
            raise InvalidCast(f"cast {text!r}: {error}") from error
        if rest:
            raise InvalidCast(f"cast {text!r}: nothing follows the rounding, got {'/'.join(rest)!r}")
        return cast

    def __str__(self) -> str:
        parts = (self.format.name, self.granularity, self.scale, self.rounding)
        return "/".join(part for part in parts if part is not None) + ("" if self.saturate else _TO_INF)

    @property
    def bits(self) -> int:
        """Width of an element, without its share of scales."""
        return self.format.bits

    def scale_for(self, amax: float) -> float:
        """The factor from a written value to the value itself, for a tensor of this largest finite magnitude.

        The same arithmetic as a call's. 1 without scaling, for amax 0, and for fp32, which holds every
        magnitude.
        """
        if self._needs_no_scale or not amax > 0:
            return 1.0
        return float(np.float32(min(max(amax / self.format.largest, _SMALLEST_SCALE), _largest_scale(self.format))))

    def __call__(self, x: Tensor, state: CastState | None = None) -> Tensor:
        """What is read back after writing x: a new tensor of its shape and dtype, outside the autograd graph.

        x      float16, bfloat16, float32 or float64; any shape, any strides, empty too
        state  the position in the random stream for stochastic rounding; without one, a stream of the
               process's own that goes on from call to call

        A value that x's own dtype cannot hold (fp16's largest, rounded up to bf16) becomes that dtype's
        largest under saturation. Raises UnsupportedTensor for any other dtype and for sparse layouts.
        """
        calculated_in = _CALCULATED_IN.get(x.dtype)
        if calculated_in is None or x.layout != torch.strided:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _CALCULATED_IN)
            raise UnsupportedTensor(f"a cast takes dense {allowed} tensors, not {x.dtype}, {x.layout}")
        x = x.detach().resolve_neg()
        if x.numel() == 0:
            return x.clone()
        stream = (_PROCESS_STATE if state is None else state).next_stream() if self._is_random else 0
        if self._is_random or not _is_dense(x):
            x = x.contiguous()  # so that a draw belongs to a position in the tensor, not in memory
        wide = x.to(calculated_in)
        if wide.dtype == torch.float32 and wide.device.type == "cpu":
            result = self._by_kernel(wide, stream, in_place=wide is not x)
        else:
            result = self._by_expressions(wide, stream)
        if x.dtype != result.dtype and self.saturate and torch.finfo(x.dtype).max < self.format.largest:
            result.clamp_(-torch.finfo(x.dtype).max, torch.finfo(x.dtype).max)
        return result.to(x.dtype)

    @property
    def _needs_no_scale(self) -> bool:
        return self.scale is None or self.format.largest >= _FLOAT32_LARGEST

    @property
    def _is_random(self) -> bool:
        return self.rounding == "stochastic"

    def _by_kernel(self, wide: Tensor, stream: int, in_place: bool) -> Tensor:
        result = wide if in_place else torch.empty_like(wide)
        values, out = _row(wide), _row(result)
        scale = 1.0 if self._needs_no_scale else self.scale_for(cast_kernels.finite_amax(values))
        if self._is_random:
            cast_kernels.round_stochastic(values, out, scale, self.format, self.saturate, stream)
        else:
            cast_kernels.round_nearest(values, out, scale, self.format, self.saturate)
        return result

    def _by_expressions(self, wide: Tensor, stream: int) -> Tensor:
        if self._needs_no_scale:
            return rounding.limit(self._round(wide, stream), self.format, self.saturate)
        magnitude = wide.abs()
        scale = self._scale(magnitude.where(magnitude.isfinite(), 0.0).amax())
        return rounding.limit(self._round(wide / scale, stream), self.format, self.saturate) * scale

    def _round(self, values: Tensor, stream: int) -> Tensor:
        if self._is_random:
            draws = rounding.dither(stream, values.numel(), values.device).view(values.shape)
            return rounding.round_stochastic(values, self.format, draws)
        return rounding.round_nearest(values, self.format)

    def _scale(self, amax: Tensor) -> Tensor:
        """`scale_for` in amax's own dtype, on its device and without waiting for it.

        The divisor is a tensor because CUDA turns a division by a number into a product with its reciprocal.
        """
        scale = amax / torch.full_like(amax, self.format.largest)
        scale = scale.clamp(_SMALLEST_SCALE, _largest_scale(self.format)).to(torch.float32)
        return torch.where(amax > 0, scale, 1.0).to(amax.dtype)


_PROCESS_STATE = CastState()


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in any order: only then does empty_like repeat the strides."""
    return x.is_contiguous() or torch.empty_like(x, device="meta").stride() == x.stride()


def _row(x: Tensor) -> NDArray[np.float32]:
    """The memory of a dense tensor."""
    return (x.view(-1) if x.is_contiguous() else in_memory_order(x)).numpy()


@cache
def _largest_scale(target: Format) -> float:
    """The largest float32 scale that times the format's largest value is finite."""
    scale = np.float32(_FLOAT32_LARGEST / target.largest)
    while float(scale) * target.largest > _FLOAT32_LARGEST:
        scale = np.nextafter(scale, np.float32(0))
    return float(scale)


def _splitmix64(value: int) -> int:
    """A 64-bit mix (Steele, Lea and Flood 2014): neighbouring seeds and calls get unrelated streams."""
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def _refuse(part: str, value: str, available: Sequence[str]) -> NoReturn:
    near = difflib.get_close_matches(value, available, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise InvalidCast(f"no {part} is called {value!r}{meant} (there is {', '.join(available) or 'none'})")
