"""Stochastic rounding is fair: unbiased, without memory, and a function of seed, call and place alone.

Every claim about chance has a fixed seed and a bound of 4 sigma.
"""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same
from tensors import generator
from torch import Tensor

from probes import rounding
from probes.casts import Cast, CastState
from probes.formats import FORMATS

CPU = torch.device("cpu")
FRACTIONS = torch.arange(256) / 256
DRAWS = 4096  # of each fraction

# A value of the format, and the step from it to the next one.
STEPS = [
    ("e4m3fn/none", 1.0, 2.0**-3),
    ("e4m3fn/none", -1.0, -(2.0**-3)),
    ("e4m3fn/none", 0.0, 2.0**-9),  # subnormals: the first,
    ("e4m3fn/none", 7 * 2.0**-9, 2.0**-9),  # and from the last to the smallest normal number
    ("e4m3fn/none", 1.875, 2.0**-3),  # into the next octave
    ("e4m3fn/none", 416.0, 32.0),  # up to the largest value
    ("e4m3fn/none/:inf", 416.0, 32.0),
    ("e4m3fn/tensor/static=0.25", 104.0, 8.0),
    ("e5m2/none", 1.0, 2.0**-2),
    ("e5m2/none", 0.0, -(2.0**-16)),
    ("e5m2/none", 49152.0, 8192.0),
    ("e5m2fnuz/none", 0.0, -(2.0**-17)),
    ("bf16/none", 1.0, 2.0**-7),
    ("bf16/none", 0.0, 2.0**-133),
    ("bf16/none", 2.0**-126 - 2.0**-133, 2.0**-133),
    ("fp16/none", -65472.0, -32.0),
    ("int8/none", 3.0, 1.0),
    ("int8/none", -126.0, -1.0),
    ("int4/none", -7.0, -1.0),
    ("e2m1/none", 4.0, 2.0),
    ("e3m0/none", 2.0, 2.0),
    ("e8m0/none", 2.0, 2.0),
    ("e6m22/none", 1.0, 2.0**-22),
]


def stochastic(text: str) -> Cast:
    """A cast of STEPS, in which the rounding is left out."""
    body, inf = text.removesuffix("/:inf"), ":inf" * text.endswith(":inf")
    return Cast.parse(f"{body}/stochastic{inf}")


@pytest.mark.parametrize(("text", "base", "step"), STEPS)
def test_each_of_256_fractions_goes_up_as_often_as_it_should(text: str, base: float, step: float) -> None:
    x = (base + FRACTIONS.double() * step).repeat_interleave(DRAWS)
    cast, sigma = stochastic(text), (FRACTIONS * (1 - FRACTIONS) / DRAWS).sqrt()
    by_loops = cast(x.float(), CastState(1)) if (x.float() == x).all() else None
    by_specification = cast(x, CastState(1))
    for rounded in (by_loops, by_specification):
        if rounded is None:
            continue  # e6m22: float32 does not hold the fractions
        steps = (rounded.double() - base) / step
        assert ((steps == 0) | (steps == 1)).all()
        assert ((steps.view(256, DRAWS).mean(dim=1) - FRACTIONS).abs() <= 4 * sigma).all()
    if by_loops is not None:
        assert_same(by_loops, by_specification)  # the same draws


@pytest.mark.parametrize("text", ["e4m3fn/none", "e5m2/none", "int8/none", "fp16/none", "e2m1/none"])
def test_beyond_the_largest_value_all_saturates_or_its_share_overflows(text: str) -> None:
    cast, count = stochastic(text), 20_000
    largest, spacing = cast.format.largest, cast.format.largest_spacing
    for sign in (1.0, -1.0):
        x = torch.full((count,), sign * (largest + spacing / 16))
        assert (cast(x, CastState(2)) == sign * largest).all()
        assert (cast(x * 1e3, CastState(2)) == sign * largest).all()
        if cast.format.overflow is None:
            continue
        overflowing = stochastic(f"{text}/:inf")(x, CastState(2))
        beyond = ~overflowing.isfinite()
        assert abs(beyond.double().mean() - 1 / 16) < 4 * (15 / 256 / count) ** 0.5
        assert (overflowing[~beyond] == sign * largest).all()
        assert not stochastic(f"{text}/:inf")(x * 1e3, CastState(2)).isfinite().any()


SCALED = ["tensor/current", "row/current", "column/current:pow2", "block32/e8m0up", "block16/nvfp4", "block128x128"]


@pytest.mark.parametrize("scale", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scaled_casts_have_the_value_as_their_mean(scale: str, dtype: torch.dtype) -> None:
    name = "e2m1" if "nvfp4" in scale else "e4m3fn"
    cast, state, calls = (
        Cast.parse(f"{name}/{scale}/stochastic".replace("128/st", "128/current/st")),
        CastState(11),
        400,
    )
    x = (torch.randn(8, 80, generator=generator(2)) * 3).to(dtype)
    if name == "e2m1":  # a block's scale is rounded, so its largest values may saturate: these do not
        x = torch.cat([x.view(-1, 16), torch.full((40, 1), 12.0, dtype=dtype)], dim=1)[:, 1:]
        x[:, :-1] = x[:, :-1].clamp(-9, 9)
    drawn = torch.stack([cast(x, state).double() for _ in range(calls)])
    step = drawn.amax(dim=0) - drawn.amin(dim=0)
    fraction = (x.double() - drawn.amin(dim=0)) / step.clamp(min=1e-30)
    sigma = (fraction * (1 - fraction) / calls).clamp(min=0).sqrt() * step
    often = (fraction > 0.02) & (fraction < 0.98)  # so that both neighbours were drawn
    off = (drawn.mean(dim=0) - x.double())[often] / sigma[often]
    assert often.double().mean() > 0.8
    assert off.abs().max() < 4.5  # of some 600 elements
    assert abs(off.mean()) < 4 / len(off) ** 0.5


def ups(cast: Cast, shape: tuple[int, ...], state: CastState) -> Tensor:
    """Which of many values midway between two neighbours go up, as ±1, flat."""
    return (cast(torch.full(shape, 1.0625), state) > 1.0).double().view(-1) * 2 - 1


@pytest.mark.parametrize(
    "text", ["e4m3fn/none/stochastic", "e4m3fn/tensor/static=1/stochastic", "e3m3/none/stochastic"]
)
def test_neighbours_and_calls_are_unrelated(text: str) -> None:
    cast, shape = Cast.parse(text), (1024, 512)
    count, state = 1024 * 512, CastState(3)
    calls = [ups(cast, shape, state) for _ in range(4)]
    seeds = [ups(cast, shape, CastState(seed)) for seed in (4, 5, 2**40, -1)]
    first = calls[0]
    lagged = [first.roll(lag) for lag in (1, 2, 3, 4, 8, 16, 31, 32, 64, 128, 512, 513, 1024, 65_536)]
    shifted = [one.roll(lag) for one in calls[1:] for lag in (1, -1)]
    for other in (*calls[1:], *seeds, *lagged, *shifted):
        assert abs((first * other).mean()) < 4 / count**0.5
    for one in (*calls, *seeds):
        assert abs(one.mean()) < 4 / count**0.5
    rows = first.view(shape)
    assert rows.mean(dim=0).abs().max() < 4.8 / 1024**0.5  # of 512 columns
    assert rows.mean(dim=1).abs().max() < 4.8 / 512**0.5  # of 1024 rows
    runs = (first[1:] != first[:-1]).double().mean()
    assert abs(runs - 0.5) < 4 * 0.5 / count**0.5


def test_an_element_draws_anew_in_each_call() -> None:
    """2,000 elements over 500 calls: each goes up about half the time, and no more often after it went up."""
    cast, state = Cast.parse("e4m3fn/none/stochastic"), CastState(8)
    over_calls = torch.stack([ups(cast, (2000,), state) for _ in range(500)])
    assert over_calls.mean(dim=0).abs().max() < 4.8 / 500**0.5
    assert abs((over_calls[1:] * over_calls[:-1]).mean()) < 4 / (499 * 2000) ** 0.5
    spread = over_calls.mean(dim=0).square().mean() * 500  # 1 for independent calls
    assert abs(spread - 1) < 4 * (2 / 2000) ** 0.5


def test_draws_are_uniform_and_unrelated_between_neighbours_and_streams() -> None:
    count = 1 << 20
    draws = rounding.dither(1, count, CPU)
    assert draws.min() >= 0
    assert draws.max() < 2**24
    for bit in range(24):  # each bit is set half the time
        assert abs((draws >> bit & 1).double().mean() - 0.5) < 4 * 0.5 / count**0.5
    uniform = draws.double() / 2**24 - 0.5
    others = [uniform.roll(lag) for lag in (1, 2, 3, 64, 4096)]
    others += [rounding.dither(stream, count, CPU).double() / 2**24 - 0.5 for stream in (2, 1 << 32, 1 + (1 << 32))]
    for other in others:
        assert abs((uniform * other).mean() * 12) < 4 / count**0.5
    pairs = torch.bincount((draws[1:] >> 18) * 64 + (draws[:-1] >> 18), minlength=4096).double()
    for cells in (torch.bincount(draws >> 12, minlength=4096).double(), pairs):
        expected = cells.sum() / 4096
        chi_squared = ((cells - expected) ** 2 / expected).sum()
        assert abs(chi_squared - 4095) < 4 * (2 * 4095) ** 0.5


def test_seed_and_calls_decide() -> None:
    cast, x = Cast.parse("e5m2/none/stochastic"), torch.linspace(1, 2, 1000)
    first, again, other = CastState(1), CastState(1), CastState(2)
    one = [cast(x, first) for _ in range(3)]
    assert_same(torch.stack(one), torch.stack([cast(x, again) for _ in range(3)]))
    assert first == again
    assert first.calls == 3
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], cast(x, other))
    assert_same(cast(x, CastState(1, calls=2)), one[2])
    assert_same(cast(x.double(), CastState(1)), one[0])


def test_without_a_state_every_call_draws_anew() -> None:
    cast, x = Cast.parse("e5m2/none/stochastic"), torch.linspace(1, 2, 1000)
    assert not torch.equal(cast(x), cast(x))


def test_a_draw_belongs_to_a_place_in_the_tensor() -> None:
    cast, x = Cast.parse("e5m2/none/stochastic"), torch.full((60, 50), 1.1)
    whole = cast(x, CastState(6))
    assert_same(cast(x.view(-1), CastState(6)).view(60, 50), whole)
    assert_same(cast(x.view(-1)[:777], CastState(6)), whole.view(-1)[:777])
    assert_same(cast(x.T.contiguous().T, CastState(6)), whole)


def test_only_stochastic_rounding_uses_up_calls() -> None:
    state = CastState(9)
    for text in ("e5m2", "int8/none/zero", "e4m3fn/block32", "e5m2/tensor/delayed"):
        Cast.parse(text)(torch.ones(3), state)
    assert state.calls == 0
    Cast.parse("e5m2/none/stochastic")(torch.empty(0), state)  # nothing is drawn for nothing
    assert state.calls == 0


@pytest.mark.parametrize("how", ["nearest", "stochastic"])
def test_torchs_random_stream_is_neither_used_nor_touched(how: str) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    x = torch.linspace(-2, 2, 640)
    results = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        results.append([Cast.parse(f"{name}/none/{how}")(x, CastState(1)) for name in FORMATS])
        results[-1] += [Cast.parse(f"{name}/none/{how}")(x.double(), CastState(1)) for name in FORMATS]
        torch.manual_seed(5)
        assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(*results, strict=True):
        assert_same(a, b)
    Cast.parse(f"e4m3fn/none/{how}")(x)
    assert torch.equal(torch.get_rng_state(), before)
