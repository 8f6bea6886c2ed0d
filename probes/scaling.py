"""Scales: which elements share one, and how it is found. Plainly, as the specification of the compiled kernels.

A tensor is seen as a matrix: the named dimension (the last, unless a call says otherwise) runs along the rows, all
others are flattened. A granularity is a tile of that matrix whose elements share a scale; the last tile of a row or
column may be smaller. From a tile's largest finite magnitude `amax` the rule gives the scale, the factor from a
written value to the value itself:

    current   amax / largest, in float32: the largest magnitude is written as the format's largest value
    delayed   the same with the largest amax of the last `len` calls in place of this call's, times 2^margin. A call
              before which nothing but zeros was seen takes its own amax, so the first step is scaled currently
    static    a number given in advance
    e8m0      2^(floor(log2 amax) - emax), emax being the exponent of the format's largest value (OCP Microscaling
              Formats 1.0, section 6.3). What is above the largest value times the scale saturates: up to an eighth of
              the octave for e4m3fn
    e8m0up    2^ceil(log2(amax / largest)), the smallest power of two with which nothing saturates (Mishra et al. 2025,
              "Recipes for pre-training LLMs with MXFP8")
    nvfp4     q·g: g = amax of the whole tensor / (largest·448), in float32; q = (amax / largest) / g, rounded to e4m3fn
              and at least its smallest value 2^-9, so that no scale is zero (NVIDIA, "Pretraining large language models
              with NVFP4", 2025)

`:pow2` rounds a float32 scale up to a power of two: for current scaling exactly the rule of e8m0up, but with
float32's exponents. An e8m0 scale is within 2^-127 and 2^127. Limits for all of them: a tile that has nothing but
zeros, or nothing finite, has scale 1. NaN and Inf do not count for amax. A scale in float32 is never below 2^-126,
where float32 loses precision, and none is so large that the format's largest value times it would overflow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probes.errors import InvalidCast
from probes.formats import FORMATS, Format
from probes.near import refuse
from probes.rounding import to_grid

FLOAT32_LARGEST = float(np.finfo(np.float32).max)
FLOAT32_SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
SMALLEST_EXPONENT = -126  # of a float32 scale
E8M0_EXPONENTS = -127, 127
E4M3 = FORMATS["e4m3fn"]  # the format of nvfp4's block scales
NVFP4_LARGEST = FLOAT32_LARGEST / E4M3.largest  # of an element format: two levels of scales must fit below it


class Tile(NamedTuple):
    """Rows and columns of a tile; None for all there are."""

    rows: int | None
    columns: int | None


TILES: Mapping[str, Tile] = MappingProxyType(
    {
        "tensor": Tile(None, None),
        "row": Tile(1, None),
        "column": Tile(None, 1),
        "block32": Tile(1, 32),
        "block16": Tile(1, 16),
        "block1x128": Tile(1, 128),
        "block128x128": Tile(128, 128),
    }
)

RULES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "none": (),
        "tensor": ("current", "delayed", "static"),
        "row": ("current",),
        "column": ("current",),
        "block32": ("e8m0", "e8m0up", "current"),
        "block16": ("nvfp4", "e8m0", "e8m0up", "current"),
        "block1x128": ("current", "e8m0", "e8m0up"),
        "block128x128": ("current", "e8m0", "e8m0up"),
    }
)
"""Granularity → the rules that apply there; the first is its default."""

_IN_FLOAT32 = ("current", "delayed", "static")
_LENGTHS, _MARGINS = range(1, 65_537), range(-64, 65)


@dataclass(frozen=True)
class Scale:
    """How a scale is found.

    rule           current, delayed, static, e8m0, e8m0up or nvfp4
    power_of_two   of a float32 scale: rounded up to a power of two
    length         of delayed scaling: calls that the history holds
    margin         of delayed scaling: octaves kept free
    value          of a static scale: the factor from a written value to the value itself

    Raises InvalidCast.
    """

    rule: str
    power_of_two: bool = False
    length: int = 16  # of TransformerEngine's users, most keep 16 to 1024
    margin: int = 0
    value: float | None = None

    def __post_init__(self) -> None:
        rules = sorted({rule for rules in RULES.values() for rule in rules})
        if self.rule not in rules:
            refuse("scale", self.rule, rules)
        if self.power_of_two and self.rule not in _IN_FLOAT32:
            raise InvalidCast(f"a {self.rule} scale takes no ':pow2', which is for scales in float32")
        if self.rule != "delayed" and (self.length, self.margin) != (16, 0):
            raise InvalidCast(f"a length and a margin are for delayed scales, not for {self.rule}")
        whole = type(self.length) is int and type(self.margin) is int
        if not whole or self.length not in _LENGTHS or self.margin not in _MARGINS:
            raise InvalidCast(
                f"delayed(len={self.length},margin={self.margin}): the length is an integer from {_LENGTHS[0]} to "
                f"{_LENGTHS[-1]}, the margin one from {_MARGINS[0]} to {_MARGINS[-1]}"
            )
        if (self.value is not None) != (self.rule == "static"):
            raise InvalidCast("a static scale needs its value, as in static=0.013, and no other takes one")
        if self.value is not None:
            object.__setattr__(self, "value", float(self.value))  # so that 2 and 2.0 are written alike
            most = 2.0**127 if self.power_of_two else FLOAT32_LARGEST
            if not 2.0**SMALLEST_EXPONENT <= self.value <= most:
                raise InvalidCast(f"static={self.value!r}: a scale is a float32 from 2^-126 to {most:.8g}")

    @classmethod
    def parse(cls, text: str) -> Scale:
        """A scale from `rule`, `delayed(len=…,margin=…)` or `static=…`, with `:pow2` at the end. Raises InvalidCast."""
        body, power_of_two = text.removesuffix(":pow2"), text.endswith(":pow2")
        if body.startswith("static"):
            return cls("static", power_of_two, value=_static(body))
        if body.startswith("delayed"):
            return cls("delayed", power_of_two, **_delayed(body))
        return cls(body, power_of_two)

    def __str__(self) -> str:
        options = {"delayed": f"(len={self.length},margin={self.margin})", "static": f"={self.value!r}"}
        return self.rule + options.get(self.rule, "") + (":pow2" if self.power_of_two else "")


def as_matrix(x: Tensor, dimension: int) -> Tensor:
    """[rows, columns]: the named dimension along the rows, the others flattened in their order. A copy if need be."""
    moved = x.movedim(dimension, -1) if x.dim() else x.reshape(1)
    return moved.reshape(-1, moved.shape[-1])


def as_shaped(matrix: Tensor, like: Tensor, dimension: int) -> Tensor:
    """The matrix in the shape it came from."""
    if not like.dim():
        return matrix.reshape(())
    return matrix.reshape(like.movedim(dimension, -1).shape).movedim(-1, dimension)


def tile_amax(matrix: Tensor, tile: Tile) -> Tensor:
    """[tile rows, tile columns]: largest finite magnitude of each tile of [rows, columns]; 0 where there is none."""
    magnitude = matrix.abs()
    finite = magnitude.where(magnitude.isfinite(), 0.0)
    rows, columns = fitted(tile, (matrix.shape[0], matrix.shape[1]))
    padding = (-matrix.shape[1] % columns, -matrix.shape[0] % rows)
    padded = torch.nn.functional.pad(finite, (0, padding[0], 0, padding[1]))
    return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).amax(dim=(1, 3))


def over_tiles(scales: Tensor, matrix: Tensor, tile: Tile) -> Tensor:
    """Scales [tile rows, tile columns] at every element of [rows, columns], broadcast where they can be."""
    for dimension, (wanted, size) in enumerate(zip(tile, matrix.shape, strict=True)):
        if wanted is not None and wanted > 1:
            scales = scales.repeat_interleave(wanted, dim=dimension).narrow(dimension, 0, size)
    return scales


def fitted(tile: Tile, shape: tuple[int, int]) -> tuple[int, int]:
    """The tile's rows and columns on a matrix of this shape."""
    return tile.rows or shape[0], tile.columns or shape[1]


def scale_of(amax: Tensor, scale: Scale, target: Format, tensor_amax: Tensor | None = None) -> Tensor:
    """The scale for each largest magnitude, of amax's shape and dtype (float32 or float64), on its device.

    tensor_amax  for nvfp4: the largest magnitude of the whole tensor
    """
    if scale.value is not None:
        return torch.full_like(amax, static_value(scale))
    if scale.rule == "e8m0":
        found = _power_of_two(torch.frexp(amax).exponent - 1 - target.emax, E8M0_EXPONENTS, target, amax)
    elif scale.rule == "e8m0up":
        found = _power_of_two(_exponent_up(amax, target), E8M0_EXPONENTS, target, amax)
    elif scale.power_of_two:
        exponents = SMALLEST_EXPONENT, E8M0_EXPONENTS[1]
        found = _power_of_two(_exponent_up(amax, target), exponents, target, amax)
    elif scale.rule == "nvfp4":
        assert tensor_amax is not None
        found = _nvfp4(amax, tensor_amax, target)
    else:
        found = _in_float32(amax, target.largest, target.largest_magnitude)
    return torch.where(amax > 0, found, 1.0)


def scale_over_all(tensor_amax: Tensor, target: Format) -> Tensor:
    """nvfp4's second scale, of the whole tensor: with it the largest block's own scale is e4m3fn's largest value."""
    return _in_float32(tensor_amax, target.largest * E4M3.largest, target.largest_magnitude * E4M3.largest)


def delayed_amax(own: Tensor, history: Sequence[Tensor | float], margin: int) -> Tensor:
    """0-dim: what delayed scaling takes for this call's largest magnitude."""
    earlier = [torch.as_tensor(one, dtype=own.dtype, device=own.device) for one in history]
    largest = torch.stack([torch.zeros_like(own), *earlier]).amax()
    taken = torch.where(largest > 0, largest, own)
    return torch.where(taken > 0, (taken * 2.0**margin).clamp(FLOAT32_SMALLEST, FLOAT32_LARGEST), taken)


def with_margin(amax: float, margin: int) -> float:
    """The same for one number: octaves kept free above a largest magnitude, within float32."""
    return min(max(amax * 2.0**margin, FLOAT32_SMALLEST), FLOAT32_LARGEST) if amax > 0 else amax


def largest_exponent(target: Format) -> int:
    """Exponent of the largest power of two that times the format's largest magnitude is finite in float32."""
    return 128 - math.frexp(target.largest_magnitude)[1]


@cache
def largest_scale(largest: float) -> float:
    """The largest float32 scale that times this value is finite in float32."""
    scale = np.float32(FLOAT32_LARGEST / max(largest, 1.0))
    while float(scale) * largest > FLOAT32_LARGEST:
        scale = np.nextafter(scale, np.float32(0))
    return float(scale)


def static_value(scale: Scale) -> float:
    """A static scale as a float32, or the smallest power of two that is not below it."""
    assert scale.value is not None
    value = np.float32(scale.value)
    mantissa, exponent = math.frexp(value)
    return 2.0 ** (exponent - (mantissa == 0.5)) if scale.power_of_two else float(value)


def _in_float32(amax: Tensor, largest: float, beyond: float) -> Tensor:
    """amax / largest in float32, within limits, `beyond` being what must not overflow. The divisor is a tensor because
    CUDA turns a division by a number into a product with its reciprocal."""
    scale = amax / torch.full_like(amax, largest)
    return scale.clamp(2.0**SMALLEST_EXPONENT, largest_scale(beyond)).to(torch.float32).to(amax.dtype)


def _exponent_up(amax: Tensor, target: Format) -> Tensor:
    """ceil(log2(amax / largest)), exact: from mantissas and exponents."""
    mantissa, exponent = torch.frexp(amax)
    largest_mantissa, largest_exponent = math.frexp(target.largest)
    return exponent - largest_exponent + (mantissa > largest_mantissa).to(exponent.dtype)


def _power_of_two(exponent: Tensor, within: tuple[int, int], target: Format, like: Tensor) -> Tensor:
    return torch.ldexp(torch.ones_like(like), exponent.clamp(within[0], min(within[1], largest_exponent(target))))


def _nvfp4(amax: Tensor, tensor_amax: Tensor, target: Format) -> Tensor:
    over_all = scale_over_all(tensor_amax, target)
    block = (amax / torch.full_like(amax, target.largest)).to(torch.float32).to(amax.dtype) / over_all
    block = to_grid(block.to(torch.float32), E4M3, "nearest", saturate=True).clamp(min=E4M3.smallest_subnormal)
    scale = block * over_all.to(torch.float32)
    return scale.clamp(max=largest_scale(target.largest_magnitude)).to(amax.dtype)


def _static(body: str) -> float:
    given = re.fullmatch(r"static=([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)", body)
    if not given:
        raise InvalidCast(f"a static scale is written static=0.013, got {body!r}")
    return float(given[1])


def _delayed(body: str) -> dict[str, int]:
    given = re.fullmatch(r"delayed(?:\(([^()]*)\))?", body)
    options = {}
    for part in (given[1] or "").split(",") if given else ():
        option = re.fullmatch(r"\s*(len|margin)\s*=\s*(-?\d{1,9})\s*", part)
        if option and option[1] not in options:
            options[option[1]] = int(option[2])
        elif part.strip():
            given = None
    if given is None:
        raise InvalidCast(f"delayed scaling is written delayed(len=16,margin=0), either part optional, got {body!r}")
    return {{"len": "length"}.get(name, name): value for name, value in options.items()}
