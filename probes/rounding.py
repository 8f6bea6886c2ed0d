"""Rounding to a format's grid, plainly: the specification that a reader can check by eye.

    spacing(x) = 2^(max(floor(log2|x|), emin) - mantissa_bits)

Nearest rounds x/spacing to an integer, a half to the even one. Stochastic takes the integer above with a
probability equal to the fraction. Toward zero drops the fraction. A value that rounds up into the next octave
lands on that octave's grid as well, so nothing is rounded twice. All divisions and products are by powers of
two, hence exact.

"The even one" is the even significand, as IEEE 754 says. Without mantissa bits a half lies between 1 and 2 times
a power of two and so goes up, as in torch's and ml_dtypes' e8m0. (gfloat takes the even code there.)

These functions run on any device and in float64. On the CPU, float32 goes through the compiled loops of
`cast_kernels.py`, and on CUDA through `cast_triton.py`; tests hold both equal to these, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probes.formats import Format

ROUNDINGS = ("nearest", "stochastic", "zero")

DITHER_BITS = 24  # what a float32 fraction can be compared with exactly

_MASK = 0xFFFFFFFF


def to_grid(
    x: Tensor,
    target: Format,
    rounding: str,
    saturate: bool,
    dither: Tensor | None = None,
    infinite: Tensor | None = None,
) -> Tensor:
    """Values of x (float32 or float64) in the target format, by one of ROUNDINGS. A NaN stays one in every format.

    saturate  whether what lies beyond the largest value, Inf included, becomes that value; otherwise Inf or NaN, as
              the format has it. Rounding toward zero then takes finite values to the largest all the same, for that
              is what lies toward zero (IEEE 754, 7.4), and only Inf stays beyond
    dither    for "stochastic": integers of x's shape, uniform in [0, 2^24)
    infinite  where x is a quotient: whether each value was Inf before the division, which may have overflowed
    """
    rounded = on_grid(x, target, rounding, dither)
    if rounding == "zero" and not saturate:
        infinite = x.isinf() if infinite is None else infinite
        rounded = torch.where(infinite, x, rounded.clamp(target.lowest, target.largest))
    return limit(rounded, target, saturate) if target.signed else _without_sign(x, rounded, target, rounding, saturate)


def on_grid(x: Tensor, target: Format, rounding: str, dither: Tensor | None = None) -> Tensor:
    """The same without an end to the grid."""
    if rounding == "nearest":
        return round_nearest(x, target)
    if rounding == "zero":
        return round_toward_zero(x, target)
    assert dither is not None
    return round_stochastic(x, target, dither)


def round_nearest(x: Tensor, target: Format) -> Tensor:
    """Values of x on the target's grid, ties to even; overflow is left to `limit`. NaN, Inf and -0 stay as they are."""
    spacing = grid_spacing(x, target)
    return torch.round(x / spacing) * spacing


def round_toward_zero(x: Tensor, target: Format) -> Tensor:
    """Values of x on the target's grid, none larger in magnitude than it was; overflow is left to `limit`."""
    spacing = grid_spacing(x, target)
    return torch.trunc(x / spacing) * spacing


def round_stochastic(x: Tensor, target: Format, dither: Tensor) -> Tensor:
    """Values of x on the target's grid, up or down at random; overflow is left to `limit`.

    dither  integers of x's shape, uniform in [0, 2^24)

    The mean is x, exactly so where the fraction has at most 24 bits: for every float32, but for values far below the
    smallest subnormal. There, and for float64, the mean is off by less than 2^-24 of the spacing. NaN, Inf and -0 stay
    what they are.
    """
    spacing = grid_spacing(x, target)
    steps = x / spacing
    toward_zero = torch.trunc(steps)
    fraction = (steps - toward_zero).abs()  # exact; NaN at Inf, which then compares as False
    away = dither < fraction * 2**DITHER_BITS
    return torch.where(away, toward_zero + torch.copysign(torch.ones_like(x), x), toward_zero) * spacing


def limit(rounded: Tensor, target: Format, saturate: bool) -> Tensor:
    """Rounded values, with all beyond the target's largest made that largest (Inf too), or Inf or NaN.

    -0 stays -0, in integers too, whose code for it is that of 0; in the fnuz formats, where that code is NaN's, it
    becomes +0.
    """
    if saturate:
        limited = rounded.clamp(target.lowest, target.largest)  # NaN passes through
    else:
        beyond = torch.full_like(rounded, target.overflow or 0.0).copysign(rounded)
        limited = torch.where(rounded.abs() > target.largest, beyond, rounded)
    return limited if target.keeps_negative_zero else limited + 0.0


def grid_spacing(x: Tensor, target: Format) -> Tensor:
    """Distance between neighbours of the target's grid at each element's magnitude."""
    _, exponent = torch.frexp(x)  # x = mantissa·2^exponent with the mantissa in [1/2, 1)
    power = torch.clamp(exponent - 1, min=target.emin) - target.mantissa_bits
    return torch.ldexp(torch.ones_like(x), power)


def dither(stream: int, count: int, device: torch.device) -> Tensor:
    """int64 [count]: the first `count` draws of a stream, uniform in [0, 2^24), the same on every device.

    stream  64 bits that name the stream

    A draw depends on the stream and its own index alone: two rounds of a 32-bit integer hash (the one of bias 0.107
    in C. Wellons' collection hash-prospector), each with half of the stream as its key. The indices of more than
    2^32 elements wrap around.
    """
    first, second = stream & _MASK, stream >> 32 & _MASK
    index = torch.arange(count, dtype=torch.int64, device=device)
    return _hash(_hash((index + first) & _MASK) ^ second) >> (32 - DITHER_BITS)


def _without_sign(x: Tensor, rounded: Tensor, target: Format, rounding: str, saturate: bool) -> Tensor:
    """e8m0, which has neither negative values nor zero.

    What is below the smallest value becomes that value. Negative values become NaN, and unless saturated so do zero
    and what overflows: ml_dtypes' rule. (torch's cast drops the sign, and gives a zero the smallest value.) Nearest
    takes all that lies between the two smallest values, where float32 is subnormal, to the upper one: torch's and
    ml_dtypes' rule, so that a scale here is the scale that they store.
    """
    smallest = target.smallest_subnormal
    within = rounded.clamp(smallest, target.largest)
    if rounding == "nearest":
        within = torch.where((x > smallest) & (x < 2 * smallest), 2 * smallest, within)
    if not saturate:
        within = torch.where((x == 0) | (rounded > target.largest), torch.nan, within)
    return torch.where(x < 0, torch.nan, within)


def _hash(z: Tensor) -> Tensor:
    z = (z ^ (z >> 16)) * 0x21F0AAAD & _MASK
    z = (z ^ (z >> 15)) * 0xD35A2D97 & _MASK
    return z ^ (z >> 15)
