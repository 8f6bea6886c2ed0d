"""What to watch comes with thresholds from the window, and warnings show only where their cause does."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.cautions import growth_of
from advisor.plan import Plan, Watch
from advisor.watching import FURTHEST, LEAST, MOST
from probes.probing import probe
from probes.records import Slot
from probes.window import Window

STEPS = 10


def fed(inputs: Callable[[int, Tensor], Tensor], rate: Callable[[int], float] = lambda step: 0.0) -> Window:
    """A window of two layers whose inputs and learning rate are chosen step by step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with probe(model, optimizer, steps=STEPS, casts=["int8", "e4m3fn"]) as window:
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = rate(step)
            x = inputs(step, torch.randn(256, 16))
            F.cross_entropy(model(x), torch.randint(0, 8, (256,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


@pytest.fixture(scope="module")
def steady() -> Window:
    return fed(lambda step, x: x)


def watched(plan: Plan, site: str, role: str) -> Watch:
    (found,) = [one for one in plan.watch if (one.site, one.role) == (site, role)]
    return found


def notes(plan: Plan, having: str) -> list[str]:
    return [note for note in plan.notes if having in note]


def test_without_a_scale_the_format_is_the_threshold(steady: Window) -> None:
    one = watched(advisor.uniform(fed(lambda step, x: 20 * x), input="e4m3fn/none"), "0", "input")
    assert (one.metric, one.threshold) == ("amax", 448.0)
    far = advisor.uniform(steady, input="e4m3fn/none").watch  # a hundredth of the largest value: nothing to watch
    assert FURTHEST * float(steady.history("0", "input").amax.max()) < 448
    assert not [other for other in far if other.site == "0"]


def test_a_static_scale_clips_at_what_it_holds(steady: Window) -> None:
    one = watched(advisor.uniform(steady, input="e4m3fn/tensor/static=0.02"), "0", "input")
    assert one.metric == "amax"
    assert one.threshold == pytest.approx(448 * 0.02)
    assert "a largest value above 8.96 is clipped" in one.sentence


def test_a_delayed_scale_clips_beyond_its_margin(steady: Window) -> None:
    one = watched(advisor.uniform(steady, input="e4m3fn/tensor/delayed(len=16,margin=1)"), "0", "input")
    assert one.threshold == pytest.approx(2 * float(steady.history("0", "input").amax.max()))
    assert "until its delayed scale follows" in one.sentence


def test_a_float_with_a_current_scale_is_watched_for_underflow(steady: Window) -> None:
    one = watched(advisor.uniform(steady, input="e4m3fn"), "0", "input")
    assert (one.metric, one.threshold) == ("underflow", 0.01)


def test_an_integer_coarsens_up_to_what_the_tolerance_has_left(steady: Window) -> None:
    """The threshold is where the slot's damage, which grows with the square, uses up the rest."""
    worst = max(row["damage"] or 0.0 for row in advisor.score(steady, ["int8"]).rows)
    plan = advisor.recommend(steady, tolerance=6 * worst, max_lost_batch=0.9, casts=["int8"])
    found = [one for one in plan.watch if one.metric == "amax"]
    assert found
    for one in found:
        damage = next(a.damage for a in plan.assignments if (a.site, a.role) == (one.site, one.role)) or 0.0
        times = one.threshold / float(steady.history(one.site, one.role).amax.max())
        left = (plan.tolerance or 0) - (plan.predicted.damage or 0)
        assert times == pytest.approx(max(math.sqrt(1 + left / damage), LEAST))


def test_gradients_are_watched_by_their_crest(steady: Window) -> None:
    wide = advisor.recommend(steady, tolerance=1.0, max_lost_batch=0.9, casts=["int8"])
    lost = 2 * (wide.predicted.lost_batch_share or 0.0)
    plan = advisor.recommend(steady, tolerance=1.0, max_lost_batch=lost, casts=["int8"])
    found = [one for one in plan.watch if one.role == "grad_output"]
    assert found
    assert {one.metric for one in found} == {"crest"}
    history = steady.history(found[0].site, "grad_output")
    crest = float((history.amax / (history.sum_of_squares / history.elements) ** 0.5).max())
    assert found[0].threshold >= LEAST * crest * (1 - 1e-9)


def test_at_most_so_many_and_one_a_slot(steady: Window) -> None:
    plan = advisor.uniform(steady, input="e4m3fn", weight="e4m3fn", grad_output="e5m2")
    slots = [(one.site, one.role) for one in plan.watch]
    assert 0 < len(slots) <= MOST
    assert len(set(slots)) == len(slots)
    assert all(f"{one.site} {one.role}" in one.sentence for one in plan.watch)


def test_growth_is_carried_on() -> None:
    """A largest value that doubles every five steps reaches twice its size in five more."""
    growing = fed(lambda step, x: x * 2 ** (step / 5))
    growth = growth_of(growing, Slot("0", "input"))
    assert growth is not None
    assert growth.certain
    assert growth.steps_to(2) == pytest.approx(5, rel=0.2)
    plan = advisor.uniform(growing, input="e4m3fn/tensor/delayed(len=16,margin=1)")
    assert "growing as in the window it is there after about 5 steps" in watched(plan, "0", "input").sentence
    (note,) = notes(plan, "grow within the window")
    assert "0 input (about 5)" in note


def test_a_steady_window_warns_of_nothing_but_what_never_shows(steady: Window) -> None:
    plan = advisor.uniform(steady, input="e4m3fn")
    growth = growth_of(steady, Slot("0", "input"))
    assert growth is not None
    assert not growth.certain
    for having in ("grow within", "young", "updates become", "only some of", "are few to tell"):
        assert not notes(plan, having)
    assert len(notes(plan, "outliers can come after any")) == 1


def test_a_learning_rate_that_warms_up_is_seen_in_the_updates() -> None:
    rates: dict[str, Callable[[int], float]] = {
        "warms up": lambda step: 1e-3 * (step + 1),
        "falls": lambda step: 1e-3 / (step + 1),
    }
    for told, rate in rates.items():
        (note,) = notes(advisor.uniform(fed(lambda step, x: x, rate), input="e4m3fn"), "updates become")
        assert told in note


def test_tensors_that_are_not_always_there_are_named() -> None:
    (note,) = notes(advisor.uniform(fed(lambda step, x: x * (step % 2)), input="e4m3fn"), "only some of")
    assert "0 input (in 5)" in note


def test_outliers_that_stand_out_already_are_named() -> None:
    def planted(step: int, x: Tensor) -> Tensor:
        x[0, 0] = 100.0
        return x

    (note,) = notes(advisor.uniform(fed(planted), input="int8"), "outliers can come after any")
    assert "stand out already in 0 input" in note


def test_few_steps_are_few_for_the_noise() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with probe(model, optimizer, steps=4) as window:
        for _ in range(4):
            F.cross_entropy(model(torch.randn(64, 16)), torch.randint(0, 8, (64,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert notes(advisor.recommend(window, tolerance=1.0, max_lost_batch=0.9), "are few to tell")


def test_the_same_window_gives_the_same_bytes(steady: Window, tmp_path: Path) -> None:
    texts: list[Any] = []
    steady.save(tmp_path / "window")
    for window in (steady, steady, advisor.load_window(tmp_path / "window")):
        advisor.recommend(window).save(tmp_path / "plan.json")
        texts.append((tmp_path / "plan.json").read_bytes())
    assert texts[0] == texts[1] == texts[2]
