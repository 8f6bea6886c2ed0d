"""Columns against the plain path, bin by bin in `metrics.measure`: the same counts, energies, flags and confidences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import advisor
from advisor.bins import SMALLEST
from advisor.columns import measure_columns
from advisor.confidence import confidence_of
from advisor.flags import FLAGS
from advisor.grid import Grid
from advisor.metrics import measure
from advisor.outcome_kernels import Target, at_point, in_bin, over_interval
from probes.casts import Cast
from probes.history import SlotHistory
from probes.records import Coverage, Site, Slot
from probes.window import Contents, Window
from tests.tensors import generator
from tests.test_metrics import history

CASTS = [
    *("e4m3fn", "e5m2", "int8", "bf16", "fp16", "int4", "e2m1", "e3m4", "fp32", "fp64", "tf32", "bf16/tensor"),
    *("e4m3fn/none", "int8/none", "e5m2/none/nearest:inf", "fp16/none/zero", "bf16/none/stochastic", "e8m20/none"),
    *("e4m3fn/tensor/current:pow2", "e4m3fn/tensor/current/zero", "int8/tensor/current/zero", "fp16/tensor", "e3m0"),
    *("e4m3fn/tensor/current/stochastic", "int8/tensor/current/stochastic", "e4m3fn/tensor/static=0.01"),
    *("e2m3/tensor/static=0.013/stochastic", "e4m3fn/tensor/delayed(len=2,margin=1)", "e8m3/none/zero"),
    *("e4m3fn/tensor/static=0.25/zero", "e5m2/tensor/delayed(len=3,margin=0)/stochastic"),
]
RATES = ("underflows", "subnormals", "overflows")
ENERGIES = ("signal_energy", "error_energy", "bias_energy", "amax", "amin")


def slots_of() -> dict[str, tuple[str, SlotHistory]]:
    g = generator(1)

    def x(n: int = 5000) -> torch.Tensor:
        return torch.randn(n, generator=g)

    steps = {
        "normal": [x(), 2 * x(), 0.3 * x(), 5 * x(), x()],
        "heavy": [x() ** 3, 1e-3 * x() ** 5],
        "bf16": [x().bfloat16(), (3 * x()).bfloat16()],
        "fp16": [(1e-3 * x()).half(), (1e-4 * x()).half()],
        "few": [torch.arange(17.0) / 16, torch.arange(-30.0, 31)],
        "large": [1000 * x()],
        "huge": [1e30 * x()],
        "small": [1e-8 * x()],
        "float32's subnormals": [1e-40 * x()],
        "across them": [1e-36 * x() ** 5],
        "one value": [torch.ones(4), torch.tensor([3.0])],
        "nothing": [torch.zeros(4), torch.empty(0), torch.tensor([float("nan"), 1.0, 2.0])],
        "no steps": [],
        "e4m3fn": [x().to(torch.float8_e4m3fn).float()],
        "few elements": [x(7), x(60), x(3)],
        "integers": [torch.randint(-100, 100, (5000,), generator=g).float()],
        "sparse": [torch.where(x() > 1, x(), 0.0)],
        "wide": [torch.exp(10 * x())],
        "clipped": [x().clamp(-1, 1), x().clamp(-1.5, 1.5)],
    }
    found = {}
    for name, tensors in steps.items():
        kind = str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32"
        found[name] = kind, history(*tensors)
    whole = history(x(), 2 * x())
    found["under a loss scale"] = "float32", replace(whole, gain=np.array([1024.0, 3.0]))
    return found


SLOTS = slots_of()


def window_of(slots: dict[str, tuple[str, SlotHistory]]) -> Window:
    sites = tuple(
        Site(name, "linear", ("input",), {"input": (1,)}, {"input": kind}, {"input": 1.0}, (), None, 1.0)
        for name, (kind, _) in slots.items()
    )
    histories = {Slot(name, "input"): held for name, (_, held) in slots.items()}
    return Window(Contents("", "", {}, (0,), (1.0,), sites, Coverage(1.0), histories, {}))


@pytest.mark.parametrize("text", CASTS)
def test_columns_are_what_the_plain_path_gives(text: str) -> None:
    window, cast = window_of(SLOTS), Cast.parse(text)
    everything = np.ones((len(SLOTS), 1), dtype=np.bool_)
    in_loss_units = np.arange(len(SLOTS)) % 2 == 0
    columns = measure_columns(window, window.slots, [cast], everything, in_loss_units)
    sure = columns.moments.confidence(in_loss_units, np.full((len(SLOTS), 1), 0.1))
    for p, (name, (kind, held)) in enumerate(SLOTS.items()):
        steps = measure(held, cast, kind)
        plain = steps.pooled()
        for what in (*RATES, "nonzero", "elements"):
            assert getattr(columns, what)[p, 0] == pytest.approx(getattr(plain, what), rel=1e-9, abs=1e-7), (name, what)
        for what in ENERGIES:
            expected = getattr(plain, what)
            assert getattr(columns, what)[p, 0] == pytest.approx(expected, rel=1e-9, abs=0), (name, what)
        assert tuple(flag for i, flag in enumerate(FLAGS) if columns.flags[p, 0] >> i & 1) == plain.flags, name
        expected = confidence_of(steps, bool(in_loss_units[p]), 0.1)
        assert np.isnan(sure[p, 0]) if expected is None else sure[p, 0] == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("text", CASTS)
def test_outcomes_of_a_bin_are_those_of_the_plain_grid(text: str) -> None:
    cast, random = Cast.parse(text), np.random.default_rng(0)
    target, grid = Target.of(cast), Grid(cast)
    bottom, top = np.log2(cast.format.smallest_subnormal) - 2, np.log2(cast.format.largest) + 1
    u = 2.0 ** random.uniform(max(bottom, -140), min(top, 120), 200)
    u = np.append(u, [cast.format.smallest_normal, min(cast.format.largest, 2.0**127)])
    for value, *expected in zip(u, *grid.at(u), strict=True):
        assert at_point(value, target) == pytest.approx(expected, rel=1e-12, abs=0)
    width = u * random.uniform(1e-3, 0.3, len(u))
    for low, high, *expected in zip(u, u + width, *grid.over(u, u + width), strict=True):
        found = over_interval(low, high, target)
        scale = np.array([1.0, 1.0, 1.0, high**2, high**4, high**2])  # antiderivatives of small parts of them cancel
        finite = np.isfinite(expected)
        assert (np.isfinite(found) == finite).all()
        assert (np.abs(np.array(found)[finite] - np.array(expected)[finite]) <= 1e-11 * scale[finite]).all()


def test_a_lattice_point_shows_where_it_is_coarse() -> None:
    """A bf16 value amid two values of e4m3fn is known exactly, a float32 one is spread over its bin."""
    target = Target.of(Cast.parse("e4m3fn/none"))
    exact = in_bin(1.0, 1.125, 1.0, 1.125, 3, SMALLEST, 1.0, target)
    spread = in_bin(1.0, 1.125, 1.0, 1.125, 23, SMALLEST, 1.0, target)
    assert exact[3] == 0
    assert spread[3] == pytest.approx(0.125**2 / 12)


def test_rows_and_columns_are_the_same_numbers() -> None:
    window = window_of(SLOTS)
    scores = advisor.score(window, CASTS[:3])
    assert len(scores.rows) == len(scores) == 3 * len(SLOTS)
    for name, column in scores.columns.items():
        for row, value in zip(scores.rows, column.tolist(), strict=True):
            if name.endswith(("_lower", "_upper")):
                ends = row[f"{name[:-6]}_interval"]
                assert np.isnan(value) if ends is None else ends[name.endswith("_upper")] == value
            elif row[name] is None:
                assert value is None or np.isnan(value), name
            else:
                assert row[name] == value or (np.isnan(row[name]) and np.isnan(value)), name


def test_what_a_reader_does_to_columns_does_not_reach_the_rows() -> None:
    scores = advisor.score(window_of(SLOTS), CASTS[:1])
    for name, column in scores.columns.items():
        with pytest.raises(ValueError, match="read-only"):
            column[:1] = column[-1:]
        assert len(column) == len(scores), name


def test_a_cast_that_is_named_twice_is_scored_once() -> None:
    window = window_of(SLOTS)
    twice = advisor.score(window, ["e4m3fn", "int8", "e4m3fn/tensor/current/nearest", Cast.parse("int8")])
    assert repr(twice.rows) == repr(advisor.score(window, ["e4m3fn", "int8"]).rows)


def test_a_slot_alone_scores_as_it_does_among_others() -> None:
    window = window_of(SLOTS)
    every = advisor.score(window, CASTS)
    for slot in window.slots[::3]:
        assert repr(advisor.score(window, CASTS, slots=[slot]).rows) == repr(every.of(*slot))
