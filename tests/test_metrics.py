"""Metrics from sketches against casting the tensors themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advisor.errors import CastNotScored
from advisor.grid import Grid
from advisor.metrics import PooledMetrics, measure, scales
from probes import rounding
from probes.casts import Cast, CastState
from probes.formats import FORMATS
from probes.history import SlotHistory, history_of, sparse_row
from probes.sketch import SketchArray

INF, NAN = float("inf"), float("nan")
RATE, SQNR_DB = 0.005, 0.5
EVERY_CAST = [
    f"{name}/{scaling}/{way}"
    for name in ("e4m3fn", "e5m2", "int8", "fp16", "bf16")
    for scaling in ("none", "tensor/current")
    for way in ("nearest", "stochastic")
]


def history(*tensors: Tensor) -> SlotHistory:
    """One slot that met one tensor a step."""
    rows = []
    for step, tensor in enumerate(tensors):
        array = SketchArray(1)
        array.add(0, tensor)
        sums, extremes = array.drain()
        rows.append(sparse_row(step, sums[0].numpy(), extremes[0].numpy()))
    return history_of(rows)


def pooled(x: Tensor, cast: str) -> PooledMetrics:
    return measure(history(x), Cast.parse(cast), str(x.dtype).removeprefix("torch.")).pooled()


class Emulated:
    """What a cast does to tensors, by casting them; counts and energies of all tensors together."""

    def __init__(self, tensors: Sequence[Tensor], text: str) -> None:
        cast, state = Cast.parse(text), CastState(seed=9)
        target = cast.format
        self.nonzero = self.underflows = self.subnormals = self.overflows = 0
        self.signal = self.error = self.bias = 0.0
        for tensor in tensors:
            x = tensor.float()
            scale = cast.scale_for(float(x.abs().max()), tuple(state.history))
            units = (x / torch.tensor(scale)).double()
            draws = rounding.dither(1, x.numel(), x.device).view(x.shape)
            unlimited = rounding.on_grid(units, target, cast.rounding, draws)
            result = cast(x, state).double()
            written = result.abs() / scale
            self.nonzero += int((x != 0).sum())
            self.underflows += int(((x != 0) & (result == 0)).sum())
            self.subnormals += int(((result != 0) & (written < target.smallest_normal * (1 - 1e-6))).sum())
            self.overflows += int((unlimited.abs() > target.largest).sum())
            delta = result - x.double()
            self.signal += float(x.double().square().sum())
            self.error += float(delta.square().sum())
            self.bias += float((delta * x.double()).sum())

    @property
    def rates(self) -> tuple[float, float, float]:
        return self.underflows / self.nonzero, self.subnormals / self.nonzero, self.overflows / self.nonzero

    @property
    def sqnr_db(self) -> float:
        return 10 * math.log10(self.signal / self.error) if self.error else INF


def assert_as_emulated(metrics: PooledMetrics, emulated: Emulated) -> None:
    assert metrics.nonzero == emulated.nonzero
    for ours, theirs in zip((metrics.underflow, metrics.subnormal, metrics.overflow), emulated.rates, strict=True):
        assert abs(ours - theirs) < RATE
    assert_same_sqnr(metrics.sqnr_db, emulated.sqnr_db)


def assert_same_sqnr(ours: float, theirs: float) -> None:
    """Within 0.5 dB, all above 120 dB being the same: there float32's own rounding is heard."""
    assert abs(min(ours, 120.0) - min(theirs, 120.0)) < SQNR_DB


def gaussian(seed: int, count: int = 200_000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def student_t(degrees: int, seed: int) -> Tensor:
    squares = torch.stack([gaussian(seed + 1 + k).square() for k in range(degrees)])
    return gaussian(seed) / squares.mean(dim=0).sqrt()


def laplace(seed: int) -> Tensor:
    return gaussian(seed).sign() * -torch.rand(200_000, generator=torch.Generator().manual_seed(seed)).log()


def with_outlier(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[len(x) // 2] = value
    return x


ORDINARY = {
    "gaussian": lambda: gaussian(0),
    "wide gaussian": lambda: 300 * gaussian(1),  # some of it beyond e4m3fn's largest
    "laplace": lambda: laplace(2),
    "student t 5": lambda: student_t(5, 10),
    "student t 3": lambda: student_t(3, 20),
    "log-normal": lambda: gaussian(3).exp(),
    "relu": lambda: gaussian(4).relu(),
    "uniform": lambda: 2 * torch.rand(200_000, generator=torch.Generator().manual_seed(6)) - 1,
    "softmax": lambda: (4 * gaussian(7).view(-1, 64)).softmax(dim=-1),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_tensors_need_no_flag(name: str) -> None:
    x = ORDINARY[name]()
    for cast in EVERY_CAST:
        metrics = pooled(x, cast)
        assert metrics.flags == (), cast
        assert_as_emulated(metrics, Emulated([x], cast))


def test_a_fold_is_right_and_flagged_where_the_grid_is_as_coarse_as_bins() -> None:
    """A sixth of GELU's outputs lie just above its minimum, -0.17: unevenly within one bin."""
    x = F.gelu(gaussian(5))
    for cast in EVERY_CAST:
        metrics = pooled(x, cast)
        assert_as_emulated(metrics, Emulated([x], cast))
        assert metrics.flags == (("few_values",) if cast == "int8/tensor/current/nearest" else ()), cast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gaussian", "laplace", "log-normal", "wide gaussian", "softmax"])
def test_16_bit_tensors(name: str, dtype: torch.dtype) -> None:
    x = ORDINARY[name]().to(dtype)
    for cast in EVERY_CAST:
        metrics = pooled(x, cast)
        assert_as_emulated(metrics, Emulated([x], cast))
        # A bf16 tensor fits fp16 but for the few elements that are subnormal there: at 75 dB and more they alone err.
        assert metrics.flags == () or (cast.startswith("fp16/none") and metrics.sqnr_db > 75)


@pytest.mark.parametrize("name", ["student t 5", "gaussian", "laplace"])
def test_tensors_of_gradients_size(name: str) -> None:
    """Around 1e-7: all of it below what e4m3fn and e5m2 hold unscaled, some of it below fp16."""
    x = ORDINARY[name]() * 1e-7
    for cast in EVERY_CAST:
        metrics = pooled(x, cast)
        if "none/stochastic" in cast and not cast.startswith(("bf16", "fp16")):
            continue  # a handful of elements that happen to be rounded up: see the test on flags
        assert metrics.flags == (), cast
        assert_as_emulated(metrics, Emulated([x], cast))


@pytest.mark.parametrize("x", [student_t(2, 30), (2 * gaussian(8)).exp()], ids=["student t 2", "wide log-normal"])
def test_heavy_tails_are_right_or_flagged(x: Tensor) -> None:
    flagged = 0
    for cast in EVERY_CAST:
        metrics, emulated = pooled(x, cast), Emulated([x], cast)
        flagged += "few_elements" in metrics.flags
        if not metrics.flags:
            assert_as_emulated(metrics, emulated)
        else:  # what the flag speaks of is the energy; rates are sums over many
            assert metrics.flags == ("few_elements",)
            assert abs(metrics.underflow - emulated.rates[0]) < RATE
            assert abs(metrics.error_energy - emulated.error) < 5 * metrics.error_spread
    assert flagged > 0


@pytest.mark.parametrize("outlier", [30.0, 1000.0, 1e6])
def test_one_outlier_is_treated_exactly(outlier: float) -> None:
    x = with_outlier(gaussian(0), outlier)
    for cast in EVERY_CAST:
        metrics = pooled(x, cast)
        if metrics.flags:  # a single draw for the element with most of the energy
            assert "stochastic" in cast
            continue
        assert_as_emulated(metrics, Emulated([x], cast))
        assert_as_emulated(pooled(-x, cast), Emulated([x], cast))


def test_a_real_nets_activations_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 256), nn.ReLU())
    model.append(nn.Linear(256, 10))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    teacher = torch.randn(32, 10, generator=generator)
    seen: dict[str, list[Tensor]] = {}

    def record(name: str, tensor: Tensor) -> None:
        seen.setdefault(name, []).append(tensor.detach().clone())

    for step in range(30):
        x = torch.randn(512, 32, generator=generator)
        kept = []
        hidden = x
        for index, module in enumerate(model):
            if isinstance(module, nn.Linear) and step >= 27:
                record(f"{index}.input", hidden)
                record(f"{index}.weight", module.weight)
            hidden = module(hidden)
            if isinstance(module, nn.Linear):
                hidden.retain_grad()
                kept.append((index, hidden))
        loss = F.cross_entropy(hidden, (x @ teacher).argmax(dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 27:
            for index, output in kept:
                record(f"{index}.grad_output", output.grad)
    assert loss < 1.5
    unflagged = 0
    for tensors in seen.values():
        steps = history(*tensors)
        for cast in EVERY_CAST:
            metrics = measure(steps, Cast.parse(cast)).pooled()
            if not metrics.flags:
                unflagged += 1
                assert_as_emulated(metrics, Emulated(tensors, cast))
    assert unflagged >= 0.7 * len(seen) * len(EVERY_CAST)


def test_steps_keep_their_own_scale_and_add() -> None:
    tensors = [gaussian(k, 50_000) * 10.0**k for k in range(-2, 3)]
    for text in ("e4m3fn/tensor/current/nearest", "e4m3fn/none/nearest"):
        metrics = measure(history(*tensors), Cast.parse(text))
        for step, tensor in enumerate(tensors):
            alone = Emulated([tensor], text)
            assert_same_sqnr(metrics.sqnr_db[step], alone.sqnr_db)
            assert abs(metrics.underflow[step] - alone.rates[0]) < RATE
            assert abs(metrics.overflow[step] - alone.rates[2]) < RATE
        assert_as_emulated(metrics.pooled(), Emulated(tensors, text))
    assert metrics.pooled().amax == max(float(tensor.abs().max()) for tensor in tensors)
    assert metrics.pooled().underflows == pytest.approx(metrics.underflows.sum())


OTHER_FORMATS = [name for name in FORMATS if name not in ("e8m0", "e4m3fn", "e5m2", "int8", "fp16", "bf16")]


@pytest.mark.parametrize("name", [*OTHER_FORMATS, "e5m0", "e8m3", "e2m0"])
def test_every_format(name: str) -> None:
    for x in (gaussian(0, 100_000), laplace(2)[:100_000].bfloat16()):
        for rest in ("none/nearest", "tensor/current/nearest", "tensor/current:pow2/stochastic", "tensor/current/zero"):
            metrics = pooled(x, f"{name}/{rest}")
            if metrics.flags:
                assert (name, metrics.flags) == ("int4", ("no_signs",))
            else:
                assert_as_emulated(metrics, Emulated([x], f"{name}/{rest}"))


@pytest.mark.parametrize("name", ["wide gaussian", "laplace", "log-normal", "relu", "softmax"])
def test_toward_zero(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = ORDINARY[name]().to(dtype)
        for cast in ("e4m3fn/none/zero", "e5m2/tensor/current/zero", "int8/tensor/current/zero", "bf16/none/zero"):
            metrics, emulated = pooled(x, cast), Emulated([x], cast)
            assert metrics.flags == (), cast
            assert_as_emulated(metrics, emulated)
            assert abs(metrics.bias_energy / metrics.signal_energy - emulated.bias / emulated.signal) < 0.005


@pytest.mark.parametrize("amax", [0.3, 1.0, 5.1, 7e20])
def test_toward_zero_the_largest_element_may_lose_a_step(amax: float) -> None:
    """amax over its scale can end just below the largest value in float32, and is then cut to the value below."""
    x = torch.full((1000,), amax)
    casts = [f"{name}/tensor/current/zero" for name in ("e4m3fn", "e5m2", "e3m4", "e2m1", "int8", "fp16")]
    for cast in casts:
        assert pooled(x, cast).error_energy == pytest.approx(Emulated([x], cast).error, rel=1e-4, abs=1e-9 * amax**2)


def test_toward_zero_nothing_finite_overflows_to_inf() -> None:
    x = gaussian(0) * 300
    saturating, overflowing = pooled(x, "e4m3fn/none/zero"), pooled(x, "e4m3fn/none/zero:inf")
    assert overflowing.overflow == saturating.overflow > 0.1
    assert overflowing.sqnr_db == saturating.sqnr_db > 0


DELAYED = ("delayed", "delayed(len=1,margin=0)", "delayed(len=2,margin=1)", "delayed(len=3,margin=-1):pow2")


@pytest.mark.parametrize("scale", [*DELAYED, "current:pow2", "static=0.013", "static=0.013:pow2"])
def test_every_scale_is_the_steps_own(scale: str) -> None:
    growing = [gaussian(k, 50_000) * 1.5**k for k in range(5)]
    jumping = [gaussian(k, 50_000) * factor for k, factor in enumerate((0.0, 1.0, 0.0, 0.1, 3.0))]
    for steps in (growing, jumping):
        for cast in (f"e4m3fn/tensor/{scale}/nearest", f"int8/tensor/{scale}/zero", f"e5m2/tensor/{scale}/stochastic"):
            metrics = measure(history(*steps), Cast.parse(cast)).pooled()
            assert "few_values" not in metrics.flags
            if not metrics.flags:
                assert_as_emulated(metrics, Emulated(steps, cast))
    assert "few_elements" not in measure(history(*growing), Cast.parse(f"e4m3fn/tensor/{scale}")).pooled().flags


@pytest.mark.parametrize("scale", [*DELAYED, "delayed(len=100,margin=64)", "current", "current:pow2", "static=1e-30"])
@pytest.mark.parametrize("name", ["e4m3fn", "int8", "e3m0", "tf32", "fp32", "fp64"])
def test_scales_of_steps_are_those_of_the_cast(name: str, scale: str) -> None:
    cast = Cast.parse(f"{name}/tensor/{scale}")
    assert cast.scale is not None
    generator = np.random.default_rng(0)
    amax = np.append([0.0, 0.0, 448.0, 1.0, 0.0], np.float32(2.0 ** generator.uniform(-140, 127.9, 60))).astype(float)
    expected = [
        cast.scale_for(step, amax[max(0, i - cast.scale.length) : i].tolist()) for i, step in enumerate(amax.tolist())
    ]
    assert scales(amax, cast).tolist() == expected
    assert scales(amax[:0], cast).tolist() == []


@pytest.mark.parametrize("cast", ["e4m3fn/none/nearest", "e5m2/tensor/current/nearest", "int8/none/nearest"])
def test_bias_is_what_is_systematically_lost(cast: str) -> None:
    x = gaussian(0) * 0.02
    emulated = Emulated([x], cast)
    metrics = pooled(x, cast)
    assert abs(metrics.bias_energy / metrics.signal_energy - emulated.bias / emulated.signal) < 0.005


# ---- what the tensor's own precision makes certain


def test_a_tensor_loses_nothing_in_its_own_format() -> None:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "fp32")):
        for way in ("nearest", "stochastic"):
            metrics = pooled(gaussian(0).to(dtype), f"{name}/none/{way}")
            assert metrics.sqnr_db == INF
            assert metrics.error_energy == metrics.bias_energy == metrics.underflow == 0
            assert metrics.flags == ()
    assert pooled(gaussian(0).bfloat16(), "fp32/none").sqnr_db == INF


def test_fp16s_own_subnormals_are_known_where_the_dtype_is() -> None:
    x = (gaussian(0) * 1e-7).half()
    assert 0 < (x != 0).sum() < len(x)
    metrics = pooled(x, "fp16/none/nearest")
    assert metrics.sqnr_db == INF
    assert metrics.subnormal == 1.0
    assert metrics.flags == ()


@pytest.mark.parametrize(
    "cast", ["e5m2/none", "e5m2", "int8", "e5m2/none/stochastic", "e4m3fn/tensor/current/stochastic"]
)
def test_the_values_of_a_narrow_format_are_scored_one_by_one(cast: str) -> None:
    x = Cast.parse("e4m3fn/none")(gaussian(0))  # a bin holds one value of e4m3fn, so nothing is left open
    metrics = pooled(x, cast)
    emulated = Emulated([x], cast)
    assert metrics.flags == ()
    if "stochastic" in cast:
        assert_as_emulated(metrics, emulated)
    else:
        assert metrics.underflows == emulated.underflows
        assert metrics.subnormals == emulated.subnormals
        assert metrics.error_energy == pytest.approx(emulated.error, rel=1e-5)


@pytest.mark.parametrize("value", [1.0, 0.3, 1e-30, 3e38])
def test_a_constant_tensor_is_exact(value: float) -> None:
    x = torch.full((1000,), value)
    assert pooled(x, "e4m3fn").sqnr_db == INF
    assert pooled(x, "e4m3fn").flags == ()
    metrics, emulated = pooled(x, "e4m3fn/none"), Emulated([x], "e4m3fn/none")
    assert (metrics.underflow, metrics.subnormal, metrics.overflow) == emulated.rates
    assert metrics.error_energy == pytest.approx(emulated.error, rel=1e-6)


# ---- flags


def test_few_values_are_flagged() -> None:
    x = torch.tensor([0.1, 0.3, 0.7, 0.9])[torch.randint(4, (100_000,), generator=torch.Generator().manual_seed(0))]
    assert "few_values" in pooled(x, "e4m3fn").flags
    assert "few_values" in pooled(x, "int8/none").flags
    assert pooled(x, "fp32/none").flags == ()


def test_a_spike_where_an_outcome_changes_is_flagged() -> None:
    """5% of the elements at one value, in the bin where underflow ends."""
    x = with_outlier(gaussian(0).clamp(-9, 9), 10.0)
    boundary = 10 / 127 / 2
    spiked = torch.where(torch.arange(len(x)) % 20 == 1, torch.tensor(boundary * 0.995), x)
    metrics, emulated = pooled(spiked, "int8"), Emulated([spiked], "int8")
    assert abs(metrics.underflow - emulated.rates[0]) > 0.02  # the flag is there for a reason
    assert metrics.flags == ("few_values",)
    assert pooled(x, "int8").flags == ()


def test_a_spike_with_much_of_the_error_is_flagged() -> None:
    """A third of the elements at one value, on the grid or amid two values of it."""
    x = with_outlier(gaussian(0).clamp(-9, 9), 10.0)
    off = 0.0
    for value in (32 * 10 / 448, 34 * 10 / 448):
        spiked = torch.where(torch.arange(len(x)) % 3 == 0, torch.tensor(value), x)
        metrics = pooled(spiked, "e4m3fn")
        off = max(off, abs(metrics.sqnr_db - Emulated([spiked], "e4m3fn").sqnr_db))
        assert metrics.flags == ("few_values",)
    assert off > SQNR_DB


def test_few_elements_are_flagged() -> None:
    assert "few_elements" in pooled(gaussian(0, 60), "e4m3fn").flags
    assert "few_elements" not in pooled(gaussian(0, 20_000), "e4m3fn").flags


def test_error_made_by_few_elements_is_flagged() -> None:
    assert "few_elements" in pooled(gaussian(0) * 1e-7, "int8/none/stochastic").flags
    x = gaussian(0)
    x[:3] = torch.tensor([3000.0, 2500.0, 1700.0])
    assert "few_elements" in pooled(x, "e4m3fn").flags


def test_the_largest_float32_over_the_smallest_scale() -> None:
    x = gaussian(0, 20_000).abs().clamp(max=4) * 8e37
    for way in ("nearest", "stochastic", "zero"):
        metrics = pooled(x, f"e4m3fn/tensor/static={2.0**-126!r}/{way}")
        assert metrics.overflow == 1
        assert metrics.sqnr_db == pytest.approx(0, abs=0.1)  # all that is left is 448·2^-126
        assert metrics.bias_energy == pytest.approx(-metrics.signal_energy, rel=0.02)


def test_int4s_lowest_value_is_flagged_where_elements_go_there() -> None:
    assert pooled(gaussian(0), "int4").flags == ()
    assert pooled(gaussian(0), "int4/none").flags == ()
    metrics, emulated = pooled(3 * gaussian(0), "int4/none"), Emulated([3 * gaussian(0)], "int4/none")
    assert metrics.flags == ("no_signs",)
    assert metrics.sqnr_db < emulated.sqnr_db - SQNR_DB  # the flag is there for a reason


def test_the_predicted_spread_is_the_spread() -> None:
    """Error energies of 200 tensors of 500 elements scatter as each one's `error_spread` says."""
    for cast in ("bf16/none/nearest", "bf16/none/stochastic"):
        tensors = [gaussian(seed, 500) for seed in range(200)]
        metrics = measure(history(*tensors), Cast.parse(cast))
        errors = np.array([Emulated([tensor], cast).error for tensor in tensors])
        standardised = (errors - metrics.error_energy) / metrics.error_spread
        assert abs(standardised.mean()) < 4 / 200**0.5
        assert 0.75 < standardised.std() < 1.25


# ---- the unusual


def test_steps_without_values() -> None:
    steps = history(torch.zeros(5), torch.empty(0), torch.tensor([NAN, INF, -INF, 0.0]), torch.ones(4))
    for cast in EVERY_CAST:
        metrics = measure(steps, Cast.parse(cast))
        for rates in (metrics.underflow, metrics.subnormal, metrics.overflow, metrics.sqnr_db):
            assert np.isnan(rates[:3]).all()
            assert not np.isnan(rates[3])
        assert np.isnan(metrics.dynamic_range_bits[:3]).all()
        assert np.isnan(metrics.exponent_bits[:3]).all()
        assert metrics.nonfinite.tolist() == [0, 0, 3, 0]
        assert metrics.elements.tolist() == [5, 0, 4, 4]
        assert metrics.pooled().sqnr_db == INF
        assert metrics.pooled().nonzero == 4


@pytest.mark.parametrize("steps", [history(), history(torch.zeros(3))], ids=["no steps", "zeros"])
def test_nothing_at_all(steps: SlotHistory) -> None:
    metrics = measure(steps, Cast.parse("e4m3fn")).pooled()
    undefined = (metrics.underflow, metrics.sqnr_db, metrics.dynamic_range_bits, metrics.exponent_bits)
    assert all(math.isnan(value) for value in undefined)
    assert metrics.amax == 0.0
    assert metrics.flags == ()


def test_inf_and_nan_stay_out_of_rates() -> None:
    x = gaussian(0)
    spoiled = torch.cat([x, torch.tensor([INF, -INF, NAN])])
    clean, found = pooled(x, "e4m3fn"), pooled(spoiled, "e4m3fn")
    assert found.nonfinite == 3
    assert (found.nonzero, found.underflow, found.overflow) == (clean.nonzero, clean.underflow, clean.overflow)
    assert found.sqnr_db == pytest.approx(clean.sqnr_db)


def test_overflow_without_saturation_is_an_infinite_error() -> None:
    x = gaussian(0) * 300
    saturating, overflowing = pooled(x, "e4m3fn/none/nearest"), pooled(x, "e4m3fn/none/nearest:inf")
    assert overflowing.overflow == saturating.overflow > 0.1
    assert overflowing.sqnr_db == -INF
    assert pooled(x, "e5m2/none/nearest:inf").sqnr_db == pooled(x, "e5m2/none/nearest").sqnr_db


@pytest.mark.parametrize(
    ("cast", "says"),
    [
        ("e4m3fn/row", "a scale for every row, and the window has no sketch 'row/current'"),
        ("int8/column", "the columns of a tensor are the rows of another axis"),
        ("e4m3fn/block32", r"Open it with advisor.probe\(..., finer=\['block32/e8m0'\]\)"),
        ("bf16/row", "needs no scale finer than a tensor's: score bf16/none"),
        ("e8m0/none", "e8m0 is a format for scales, without a sign and without zero"),
    ],
)
def test_what_sketches_cannot_tell_is_refused(cast: str, says: str) -> None:
    with pytest.raises(CastNotScored, match=says):
        pooled(gaussian(0, 10), cast)


def test_int8_has_no_subnormal_results() -> None:
    for cast in EVERY_CAST:
        if cast.startswith("int8"):
            assert pooled(gaussian(0), cast).subnormal == 0


def test_range_and_exponent_bits() -> None:
    def of(*values: float) -> PooledMetrics:
        return pooled(torch.tensor(values), "e4m3fn")

    assert of(1.0, 1024.0, 0.0).dynamic_range_bits == 10.0
    assert of(3.0).dynamic_range_bits == 0.0
    assert of(3.0).exponent_bits == 1  # one octave and zero: two codes
    assert of(1.0, 1.99, 0.0).exponent_bits == 1
    assert of(1.0, 4.0).exponent_bits == 2  # three octaves and zero: four codes
    assert of(1.0, 8.0).exponent_bits == 3
    assert of(2.0**-149, 3e38).exponent_bits == 9  # fp32 with its subnormals as normals
    both = measure(history(torch.tensor([1.0]), torch.tensor([0.0, 2.0**20])), Cast.parse("bf16")).pooled()
    assert both.dynamic_range_bits == 20.0


# ---- the closed forms


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "int8", "fp16", "bf16", "e2m1", "e3m0"])
@pytest.mark.parametrize("way", ["nearest", "stochastic", "zero"])
def test_integrals_are_the_mean_over_points(name: str, way: str) -> None:
    grid = Grid(Cast.parse(f"{name}/none/{way}"))
    target, generator = grid.cast.format, np.random.default_rng(0)
    steps = 100_000
    middle = (np.arange(steps) + 0.5) / steps
    bottom = np.log2(target.smallest_subnormal) - 3
    top = np.log2(target.largest) + 1.5 if name != "bf16" else 40.0
    for low in 2.0 ** np.append(generator.uniform(bottom, top, 25), np.log2(target.smallest_normal) - 0.1):
        high = low * generator.choice([1.01, 1.125, 2.0, 30.0])
        points = grid.at(low + (high - low) * middle)
        for ours, at_points in zip(grid.over(np.array([low]), np.array([high])), points, strict=True):
            assert abs(ours[0] - at_points.mean()) <= 4e-3 * np.abs(at_points).mean() + 4 / steps * (
                at_points.max() <= 1
            )


@pytest.mark.parametrize("way", ["nearest", "zero"])
@pytest.mark.parametrize("name", [*FORMATS, "e3m0", "e8m7"])
def test_points_are_what_the_cast_does(name: str, way: str) -> None:
    cast = Cast.parse(f"{name}/none/{way}")
    x = torch.cat([2.0 ** torch.linspace(-30, 20, 50_000), torch.arange(1, 1000) / 2, torch.tensor([464.0, 61440.0])])
    expected = Grid(cast).at(x.double().numpy())
    result = cast(x).double()
    delta = (result - x.double()).numpy()
    np.testing.assert_array_equal(expected.squared, delta**2)
    np.testing.assert_array_equal(expected.product, delta * x.double().numpy())
    np.testing.assert_array_equal(expected.underflow, result == 0)
    np.testing.assert_array_equal(expected.subnormal, (result != 0) & (result < cast.format.smallest_normal))
    beyond = rounding.on_grid(x.double(), cast.format, way).numpy() > cast.format.largest
    np.testing.assert_array_equal(expected.overflow, beyond)


def test_stochastic_points_are_the_mean_of_draws() -> None:
    cast = Cast.parse("e4m3fn/none/stochastic")
    x, draws = torch.tensor([2.0**-10, 2.0**-9 * 1.3, 0.015, 1.3, 300.0, 440.0]), 20_000
    results = cast(x.expand(draws, -1), CastState(1)).double()
    delta = results - x.double()
    expected = Grid(cast).at(x.double().numpy())

    def agree(sampled: Tensor, mean: np.ndarray) -> None:
        sigma = sampled.std(dim=0).numpy() / draws**0.5
        assert (np.abs(sampled.mean(dim=0).numpy() - mean) <= 4.5 * sigma + 1e-12).all()

    agree(delta**2, expected.squared)
    agree(delta**4, expected.fourth)
    agree((results == 0).double(), expected.underflow)
    agree(((results != 0) & (results < 2.0**-6)).double(), expected.subnormal)
