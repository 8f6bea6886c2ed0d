"""The compiled loops and the plain expressions agree bit for bit; stochastic rounding is fair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from probes import cast_kernels, rounding
from probes.formats import FORMATS, Format

EVERY_FORMAT = list(FORMATS.values())
CPU = torch.device("cpu")


def any_bits(count: int, seed: int) -> Tensor:
    """float32 values from random bits, so every magnitude, NaN and Inf; and what sits at edges."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(seed))
    edges = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 2.0**-149, -(2.0**-126), 3.4028234663852886e38]
    return torch.cat([bits.to(torch.int32).view(torch.float32), torch.tensor(edges)])


def boundaries(target: Format) -> Tensor:
    """Every value of an 8-bit format, every midpoint, and their neighbours in float32."""
    steps = torch.arange(2 ** (target.bits + 1), dtype=torch.float64)
    exponent = torch.div(steps, 2 ** (target.mantissa_bits + 1), rounding_mode="floor")
    mantissa = steps % 2 ** (target.mantissa_bits + 1) / 2 ** (target.mantissa_bits + 1)
    points = torch.where(exponent == 0, mantissa, 1 + mantissa) * 2.0 ** (exponent.clamp(min=1) - target.bias)
    points = torch.cat([points, -points]).float()
    up, down = torch.full_like(points, np.inf), torch.full_like(points, -np.inf)
    return torch.cat([points, torch.nextafter(points, up), torch.nextafter(points, down)])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    nan = a.isnan()
    assert torch.equal(nan, b.isnan())
    assert torch.equal(a[~nan], b[~nan])
    assert torch.equal(a[~nan].signbit(), b[~nan].signbit())


def saturations(target: Format) -> list[bool]:
    return [True] if target.overflow is None else [True, False]


@pytest.mark.parametrize("target", EVERY_FORMAT, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-126])
def test_nearest_kernel_equals_the_expressions(target: Format, scale: float) -> None:
    x = torch.cat([any_bits(200_000, seed=1), boundaries(target) if target.bits == 8 else torch.ones(3)])
    x = torch.cat([x, x * scale])
    for saturate in saturations(target):
        out = torch.empty_like(x)
        cast_kernels.round_nearest(x.numpy(), out.numpy(), scale, target, saturate)
        divisor = torch.tensor(scale)
        expected = rounding.limit(rounding.round_nearest(x / divisor, target), target, saturate) * divisor
        assert_same_bits(out, expected)


@pytest.mark.parametrize("target", EVERY_FORMAT, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-126])
def test_stochastic_kernel_equals_the_expressions(target: Format, scale: float) -> None:
    x = any_bits(200_000, seed=2)
    x = torch.cat([x, x * scale])
    stream = 0xFEDCBA9876543210
    draws = rounding.dither(stream, len(x), CPU)
    for saturate in saturations(target):
        out = torch.empty_like(x)
        cast_kernels.round_stochastic(x.numpy(), out.numpy(), scale, target, saturate, stream)
        divisor = torch.tensor(scale)
        rounded = rounding.round_stochastic(x / divisor, target, draws)
        assert_same_bits(out, rounding.limit(rounded, target, saturate) * divisor)


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


@pytest.mark.parametrize("target", EVERY_FORMAT, ids=str)
def test_rounding_is_idempotent(target: Format) -> None:
    x = rounding.limit(rounding.round_nearest(any_bits(50_000, seed=4), target), target, saturate=True)
    assert_same_bits(rounding.round_nearest(x, target), x)
    assert_same_bits(rounding.round_stochastic(x, target, torch.zeros_like(x)), x)


def test_finite_amax_ignores_inf_and_nan() -> None:
    x = torch.tensor([1.0, -3.5, np.inf, np.nan, -np.inf, 2.0])
    assert cast_kernels.finite_amax(x.numpy()) == 3.5
    assert cast_kernels.finite_amax(x[2:5].numpy()) == 0.0
    assert cast_kernels.finite_amax(torch.tensor([-(2.0**-149)]).numpy()) == 2.0**-149


def test_dither_is_uniform_and_unrelated_between_neighbours_and_streams() -> None:
    count = 1 << 20
    draws = rounding.dither(1, count, CPU)
    assert draws.min() >= 0
    assert draws.max() < 2**24
    for bit in range(24):  # each bit is set half the time, within 4 sigma
        assert abs((draws >> bit & 1).double().mean() - 0.5) < 4 * 0.5 / count**0.5
    uniform = draws.double() / 2**24 - 0.5
    others = [uniform.roll(lag) for lag in (1, 2, 3, 64, 4096)]
    others += [rounding.dither(stream, count, CPU).double() / 2**24 - 0.5 for stream in (2, 1 << 32, 1 + (1 << 32))]
    for other in others:
        assert abs((uniform * other).mean() * 12) < 4 / count**0.5
    cells = torch.bincount(draws >> 12, minlength=4096).double()
    chi_squared = ((cells - count / 4096) ** 2 / (count / 4096)).sum()
    assert abs(chi_squared - 4095) < 4 * (2 * 4095) ** 0.5


@pytest.mark.parametrize("base", [1.0, 2.0**-9, 448.0 - 32, 2.0**-6])
def test_every_fraction_rounds_up_as_often_as_it_should(base: float) -> None:
    """256 fractions between two neighbours of e4m3fn, 4096 draws each: the mean is the value, within 4 sigma."""
    target, draws = FORMATS["e4m3fn"], 4096
    spacing = float(rounding.grid_spacing(torch.tensor(base), target))
    fractions = torch.arange(256) / 256
    x = (base + fractions * spacing).repeat_interleave(draws)
    rounded = rounding.round_stochastic(x, target, rounding.dither(7, len(x), CPU))
    share = ((rounded - base) / spacing).view(256, draws).double().mean(dim=1)
    sigma = (fractions * (1 - fractions) / draws).sqrt()
    assert ((share - fractions).abs() <= 4 * sigma).all()
