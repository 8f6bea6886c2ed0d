"""A diagnosis names what was planted, the cause and the site, and says nothing of it where it was not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import advisor
from advisor.cli import window_report
from advisor.diagnosis import CAUSES, Finding, Remedy
from advisor.diagnosis.outliers import bulk_of, bulk_sqnr_db, scored_step
from advisor.diagnosis.tiles import tiles_at
from advisor.errors import CastNotScored
from advisor.training import Trainer
from advisor.watching import causes
from advisor.zoo.spec import ArchitectureSpec
from probes.casts import Cast
from probes.errors import MalformedWindow, WindowError
from probes.probing import probe
from probes.window import Window
from tests.architectures import build

STEPS = 12
Plant = Callable[[int, Tensor], Tensor]


class Net(nn.Module):
    """Two layers and a head; `between` is what happens to the values before the head."""

    def __init__(self, between: Plant, width: int = 64) -> None:
        super().__init__()
        self.up, self.middle, self.head = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.between, self.step = between, 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.up(x))))
        out: Tensor = self.head(self.between(self.step, x))
        return out


def watched(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    factor: float = 1.0,
    steps: int = STEPS,
    finer: tuple[str, ...] | None = None,
    inputs: Callable[[], Tensor] = lambda: torch.randn(96, 16),
) -> Window:
    """A window of a small classification."""
    teacher = torch.randn(16, 4)
    with probe(model, optimizer, steps=steps, finer=finer) as window:
        for step in range(steps):
            if isinstance(model, Net):
                model.step = step
            x = inputs()
            (F.cross_entropy(model(x), (x @ teacher).argmax(-1)) * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


@cache
def net_window(between: Plant = lambda step, x: x, factor: float = 1.0, **more: object) -> Window:
    torch.manual_seed(0)
    model = Net(between)
    return watched(model, torch.optim.Adam(model.parameters(), lr=1e-3), factor, **more)  # type: ignore[arg-type]


def of_cause(window: Window, cause: str, severe: bool | None = None) -> list[Finding]:
    return [one for one in advisor.diagnose(window) if one.cause == cause and severe in (None, one.severe)]


def places(found: list[Finding]) -> set[tuple[str, str]]:
    return {(one.site, one.role) for one in found}


def wide_channels(step: int, x: Tensor) -> Tensor:
    factors = torch.ones(x.shape[-1])
    factors[[5, 17, 40]] = 80.0
    return x * factors


def spiked(step: int, x: Tensor) -> Tensor:
    """A squared activation of gated values, whose gates have a tail."""
    generator = torch.Generator().manual_seed(step)
    return 0.01 * torch.relu(x * (2 * torch.randn(x.shape, generator=generator)).exp()) ** 2


def test_a_healthy_training_has_no_severe_finding_and_none_of_products() -> None:
    found = advisor.diagnose(net_window())
    assert not [one for one in found if one.severe]
    assert {one.cause for one in found} <= {"lost_updates", "small_gradients", "epsilon_vanishes"}


def test_outlying_channels_are_counted_and_told_apart_from_a_heavy_tail() -> None:
    (found,) = of_cause(net_window(wide_channels), "channel_outliers")
    assert (found.site, found.role, found.cast, found.severe) == ("head", "input", "int8/tensor/current/nearest", True)
    assert found.numbers["outlying"] == 3
    assert found.numbers["channels"] == 64
    assert found.numbers["ratio"] == pytest.approx(80, rel=0.3)
    assert "3 of 64 channels hold values" in found.sentence
    assert "e4m3fn/tensor/current/nearest" in found.remedy.casts
    assert "int8/column/current/nearest" in found.remedy.casts
    assert not of_cause(net_window(wide_channels), "heavy_tails")


def test_a_heavy_tail_is_told_and_is_not_that_of_channels() -> None:
    window = net_window(spiked)
    (found,) = [one for one in of_cause(window, "heavy_tails") if one.role == "input"]
    assert (found.site, found.cast) == ("head", "int8/tensor/current/nearest")
    assert not of_cause(window, "channel_outliers")


def test_few_large_rows_are_a_heavy_tail_that_scales_by_row_keep() -> None:
    def large_rows(step: int, x: Tensor) -> Tensor:
        return torch.cat([x[:2] * 100, x[2:]])

    (found,) = [one for one in of_cause(net_window(large_rows), "heavy_tails") if one.role == "input"]
    assert (found.site, found.numbers["outlying"], found.numbers["rows"]) == ("head", 2, 96)
    assert "int8/row/current/nearest" in found.remedy.casts


def test_without_sketches_by_row_outliers_are_told_with_a_word_on_what_is_missing() -> None:
    (found,) = of_cause(net_window(wide_channels, finer=()), "heavy_tails")
    assert (found.site, found.role) == ("head", "input")
    assert "finer=['row']" in found.sentence


def test_show_prints_the_cause_the_site_and_what_mends_it() -> None:
    with Path("/dev/null").open("w") as nowhere:
        console = Console(width=100, record=True, file=nowhere, markup=False, highlight=False)
        window_report.WindowReport(net_window(wide_channels)).print_on(console, "w")
    text = " ".join(console.export_text().split())
    assert "What would fail, and why head input: 3 of 64 channels hold values" in text
    assert "e4m3fn, e4m3fn/row or int8/column keep it" in text


def test_a_plan_s_notes_say_once_what_would_fail() -> None:
    window = net_window(factor=1e-5)
    found = of_cause(window, "small_gradients", severe=True)
    assert len(found) > 1
    told = f"a usual recipe would fail here: {found[0]} ({len(found) - 1} more of the cause small_gradients)"
    assert advisor.recommend(window, tolerance=1.0).notes.count(told) == 1
    assert not [note for note in advisor.recommend(net_window(), tolerance=1.0).notes if "would fail here" in note]
    gone = causes([advisor.diagnose(window), advisor.diagnose(net_window())])
    assert gone == [told.replace("fail here", "fail here, as an earlier window shows and the latest does not")]
    assert causes([advisor.diagnose(net_window()), advisor.diagnose(window)]) == [told]


def tail(site: str, size: float) -> Finding:
    cast = "int8/tensor/current/nearest"
    return Finding("heavy_tails", site, "input", cast, True, {}, f"{site} {size:.0f}", Remedy("cast", "x"), size)


def test_findings_count_grammatically() -> None:
    (found,) = of_cause(net_window(lambda step, x: x * torch.tensor([80.0, *[1.0] * 63])), "channel_outliers")
    assert ": 1 of 64 channels holds values" in found.sentence
    told = of_cause(net_window(factor=1e-3), "small_gradients", severe=False)
    alone = [one.sentence for one in told if "fp16" not in one.sentence]
    assert alone
    assert all(sentence.endswith("of it in e5m2 rounds to zero") for sentence in alone)


def test_of_several_windows_the_worst_that_the_latest_saw_is_told() -> None:
    (told,) = causes([[tail("a", 9), tail("b", 1), tail("c", 99)], [tail("b", 50), tail("a", 1)]])
    assert told == "a usual recipe would fail here: b 50; x (2 more of the cause heavy_tails)"


def test_a_plan_takes_findings_that_are_known() -> None:
    window = net_window()
    notes = advisor.recommend(window, tolerance=1.0, findings=[[tail("head", 3)]]).notes
    assert "a usual recipe would fail here: head 3; x" in notes
    with pytest.raises(WindowError, match="findings of 2 windows"):
        advisor.recommend(window, tolerance=1.0, findings=[[], []])


def test_what_a_later_version_says_beside_a_finding_is_left_out() -> None:
    (found, *_) = advisor.diagnose(net_window(wide_channels))
    told = json.loads(json.dumps(found.to_dict()))
    assert Finding.from_dict({**told, "new": 1, "remedy": {**told["remedy"], "new": 1}}) == found


@pytest.mark.parametrize("gain", [2.0**-126, 2.0**127])
def test_the_outermost_loss_scales_are_diagnosed_and_planned_for(gain: float) -> None:
    window = net_window()
    held = [window.history(*slot) for slot in window.slots]
    told = [replace(history, gain=np.full_like(history.gain, gain)).checked() for history in held]
    extreme = Window.from_parts(window.header(), told)
    assert all(math.isfinite(one.numbers["rms"]) for one in of_cause(extreme, "small_gradients"))
    assert advisor.recommend(extreme, tolerance=1.0).assignments


@pytest.mark.parametrize("gain", [1e305, 5e-324, 2.0**-127, 2.0**128, 0.0, -1.0, math.inf, math.nan])
def test_loss_scales_beyond_float32_are_malformed(gain: float) -> None:
    history = net_window().history("head", "grad_output")
    with pytest.raises(MalformedWindow, match="2\\^-126 to 2\\^127"):
        replace(history, gain=np.full_like(history.gain, gain)).checked()


@pytest.mark.parametrize("cast", ["int8", "e4m3fn", "e5m2", "fp16/none", "e4m3fn/tensor/current:pow2"])
@pytest.mark.parametrize("between", [wide_channels, spiked])
def test_the_bulks_of_all_tensors_at_once_are_those_of_each(between: Plant, cast: str) -> None:
    window = net_window(between)
    histories = [window.history(*slot) for slot in window.product_slots]
    steps = [scored_step(history) or 0 for history in histories]
    one_by_one = [bulk_of(*pair, Cast.parse(cast)).sqnr_db for pair in zip(histories, steps, strict=True)]
    assert bulk_sqnr_db(histories, steps, Cast.parse(cast)) == pytest.approx(one_by_one, rel=1e-9)


@pytest.mark.parametrize(
    "cast", ["e4m3fn/tensor/delayed", "e4m3fn/tensor/static=1", "e4m3fn/tensor/current/stochastic"]
)
def test_bulks_are_looked_at_one_by_one_where_they_have_no_like_by_row(cast: str) -> None:
    history = net_window().history("head", "input")
    assert math.isnan(bulk_sqnr_db([history], [int(history.steps[-1])], Cast.parse(cast))[0])


@pytest.mark.parametrize(("outlying", "of", "times"), [(1, 32, 20.0), (3, 256, 80.0), (12, 512, 14.0), (0, 64, 1.0)])
def test_tiles_are_read_back_from_the_sketch(outlying: int, of: int, times: float) -> None:
    torch.manual_seed(of)
    linear, factors = nn.Linear(of, 4), torch.ones(of)
    factors[:outlying] = times
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    x = torch.randn(512, of) * factors
    with probe(linear, optimizer, steps=1) as window:
        linear(x).square().mean().backward()
        optimizer.step()
    tiles = tiles_at(window.history("(root)", "input").finer["row/current across -1"], 0, 8.0)
    assert tiles is not None
    assert (tiles.count, tiles.outlying) == (of, outlying)
    assert tiles.typical == pytest.approx(float(x[:, outlying:].abs().amax(0).median()), rel=0.03)
    assert tiles.largest == pytest.approx(float(x.abs().max()) if outlying else tiles.typical, rel=0.02)


def test_small_gradients_are_told_at_every_site_with_the_loss_scale_that_lifts_them() -> None:
    window = net_window(factor=1e-5)
    found = of_cause(window, "small_gradients", severe=True)
    assert {"middle", "head"} <= {one.site for one in found}
    assert {one.role for one in found} == {"grad_output"}
    scale = found[0].remedy.loss_scale
    assert scale is not None
    assert math.log2(scale).is_integer()
    assert not of_cause(net_window(factor=1e-5 * scale), "small_gradients")
    largest = max(window.history(one.site, "grad_output").amax.max() for one in found)
    assert largest * scale < 65504


def test_a_growing_largest_value_is_told_with_its_doubling_time() -> None:
    (found,) = [
        one
        for one in of_cause(net_window(lambda step, x: x * 2.0 ** (step / 3)), "growing_amax")
        if one.role == "input"
    ]
    assert (found.site, found.cast) == ("head", "e4m3fn/tensor/delayed(len=16,margin=0)/nearest")
    assert found.numbers["doubling_steps"] == pytest.approx(3, rel=0.2)
    assert found.remedy.casts == ("e4m3fn/tensor/current/nearest",)
    assert not of_cause(net_window(), "growing_amax")


@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
def test_an_epsilon_that_is_zero_in_fp16_is_told_of_the_parameters_whose_moments_are_too(epsilon: float) -> None:
    torch.manual_seed(0)
    model = Net(lambda step, x: x)
    found = of_cause(watched(model, torch.optim.AdamW(model.parameters(), eps=epsilon), 1e-2), "epsilon_vanishes")
    told = {("up.weight", "exp_avg_sq"), ("middle.weight", "exp_avg_sq")}
    assert told <= places(found) if epsilon == 1e-8 else not found
    assert all(one.cast == "fp16/none/nearest" and not one.severe for one in found)


@pytest.mark.parametrize("factor", [1.0, 1e-6])
def test_an_epsilon_that_would_shorten_the_steps_is_not_told_as_a_remedy(factor: float) -> None:
    """A loss divided by a million has gradients of an epsilon's order."""
    found = of_cause(net_window(factor=factor), "epsilon_vanishes")
    assert found
    assert {"epsilon of 1e-07" in one.remedy.says for one in found if one.site == "middle.weight"} <= {factor == 1.0}
    assert all(one.remedy.says.startswith("keep this state in fp32 or bf16") for one in found)


@pytest.mark.parametrize(("rate", "lost"), [(1e-5, True), (3e-2, False)])
def test_updates_below_half_a_step_of_bf16_are_told(rate: float, lost: bool) -> None:
    torch.manual_seed(0)
    model = Net(lambda step, x: x)
    found = of_cause(watched(model, torch.optim.AdamW(model.parameters(), lr=rate)), "lost_updates", severe=True)
    assert places(found) == ({(f"{name}.weight", "master") for name in ("up", "middle", "head")} if lost else set())


def test_a_bf16_weight_that_stands_still_is_told_as_severe() -> None:
    torch.manual_seed(0)
    model = Net(lambda step, x: x).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    teacher = torch.randn(16, 4)
    with probe(model, optimizer, steps=4) as window:
        for _ in range(4):
            x = torch.randn(96, 16)
            F.cross_entropy(model(x.bfloat16()), (x @ teacher).argmax(-1)).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = of_cause(window, "lost_updates", severe=True)
    assert ("middle.weight", "master") in places(found)
    assert {one.cast for one in found} == {"bf16/none/nearest"}


class Normed(nn.Module):
    def __init__(self, factor: float, momentum: float) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(16, 32), nn.BatchNorm1d(32, momentum=momentum), nn.Linear(32, 4)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.factor * self.up(x))))
        return out


@pytest.mark.parametrize(
    ("factor", "momentum", "told"),
    [
        (1e4, 0.1, {"norm.running_var"}),  # overflows
        (1.0, 1e-4, {"norm.running_var"}),  # stands still, from 1 on
        (1.0, 0.1, set()),
    ],
)
def test_batch_norm_statistics_that_fp16_does_not_hold_are_told(factor: float, momentum: float, told: set[str]) -> None:
    torch.manual_seed(0)
    model = Normed(factor, momentum)
    found = of_cause(watched(model, torch.optim.SGD(model.parameters(), lr=0.05)), "narrow_buffer")
    assert {one.site for one in found if one.cast.startswith("fp16")} >= told
    assert all((one.site in told) or not one.cast.startswith("fp16") for one in found)
    assert all(one.role == "buffer" and not one.severe for one in found)


@pytest.mark.parametrize(("momentum", "told"), [(1e-3, True), (0.3, False)])
def test_statistics_that_bf16_holds_back_are_told_as_severe(momentum: float, told: bool) -> None:
    """What a step moved is what bf16 took of it: that most did not move at all is what is left to see."""
    torch.manual_seed(0)
    model = Normed(1.0, momentum).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with probe(model, optimizer, steps=STEPS, curvature_steps=0) as window:
        for _ in range(STEPS):
            F.cross_entropy(model(torch.randn(96, 16).bfloat16()), torch.randint(0, 4, (96,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    found = of_cause(window, "narrow_buffer", severe=True)
    assert ("norm.running_var" in {one.site for one in found}) is told
    assert {one.cast for one in found} <= {"bf16/none/nearest"}


def test_statistics_that_have_overflowed_before_the_window_are_told_as_severe() -> None:
    torch.manual_seed(0)
    model = Normed(1e3, 0.1).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        model(torch.randn(96, 16).half()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    with probe(model, optimizer, steps=3) as window:
        while not window.done:
            step()
    (found,) = of_cause(window, "narrow_buffer", severe=True)
    assert (found.site, found.cast) == ("norm.running_var", "fp16/none/nearest")
    assert found.numbers["overflow"] > 0.9


class Tied(nn.Module):
    """A language model whose head is the embedding: by assignment, or by using its weight."""

    def __init__(self, by_use: bool, wide: float, tied: bool = True) -> None:
        super().__init__()
        self.embed, self.mix, self.by_use = nn.Embedding(40, 32), nn.Linear(32, 32), by_use
        self.norm = nn.LayerNorm(32)
        with torch.no_grad():
            self.embed.weight.mul_(0.1)
            self.embed.weight[:, :2] *= wide
        if not by_use:
            self.head = nn.Linear(32, 40, bias=False)
            if tied:
                self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.mix(self.embed(tokens))))
        out: Tensor = F.linear(x, self.embed.weight) if self.by_use else self.head(x)
        return out


def language_window(model: nn.Module) -> Window:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with probe(model, optimizer, steps=4) as window:
        for _ in range(4):
            tokens = torch.randint(0, 40, (8, 12))
            F.cross_entropy(model(tokens).flatten(0, 1), (tokens.flatten() * 3 + 1) % 40).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


@pytest.mark.parametrize(("by_use", "site"), [(False, "head"), (True, "embed")])
@pytest.mark.parametrize("wide", [1.0, 200.0])
def test_a_head_that_is_the_embedding_is_told_and_is_severe_where_a_scale_for_all_of_it_fails(
    by_use: bool, site: str, wide: float
) -> None:
    torch.manual_seed(0)
    (found,) = of_cause(language_window(Tied(by_use, wide)), "tied_parameter")
    assert (found.site, found.role, found.severe) == (site, "weight", wide > 1)
    assert "embed looks its rows up" in found.sentence
    assert "embed.weight" in found.remedy.says


def test_a_head_of_its_own_is_not_told_as_tied() -> None:
    torch.manual_seed(0)
    assert not of_cause(language_window(Tied(False, 200.0, tied=False)), "tied_parameter")


def test_casts_that_are_asked_for_are_looked_at_and_others_refused() -> None:
    window = net_window(wide_channels)
    assert {one.cause for one in advisor.diagnose(window, ["bf16"])} <= {"lost_updates"}
    (found,) = [one for one in advisor.diagnose(window, ["int4"]) if (one.site, one.role) == ("head", "input")]
    assert (found.cause, found.cast) == ("channel_outliers", "int4/tensor/current/nearest")
    with pytest.raises(CastNotScored, match="one scale a tensor"):
        advisor.diagnose(window, ["int8/row"])


def test_the_same_window_from_a_file_gives_the_same_findings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    window = language_window(Tied(False, 200.0))
    window.save(tmp_path / "window.safetensors")
    again = advisor.load_window(tmp_path / "window.safetensors")
    assert advisor.diagnose(again) == advisor.diagnose(window)
    assert [record.lookups for record in again.parameter_records if record.name == "embed.weight"] == [("embed",)]


def every_finding() -> Iterator[Finding]:
    yield from advisor.diagnose(net_window(wide_channels))
    yield from advisor.diagnose(net_window(spiked, factor=1e-5))
    torch.manual_seed(0)
    yield from advisor.diagnose(language_window(Tied(True, 200.0)))


def test_findings_have_known_causes_numbers_and_a_remedy_and_severe_ones_come_first() -> None:
    for one in every_finding():
        assert one.cause in CAUSES
        assert one.numbers
        assert np.isfinite(list(one.numbers.values())).all()
        assert one.remedy.kind in ("cast", "loss_scale", "storage")
        assert one.site in one.sentence
        assert str(one) == f"{one.sentence}; {one.remedy.says}"
    severe = [one.severe for one in advisor.diagnose(net_window(wide_channels))]
    assert severe == sorted(severe, reverse=True)


HEALTHY = (
    "gpt2-eager",
    "llama-eager",
    "bert-eager",
    "t5-eager",
    "vit-eager",
    "whisper-eager",
    "unet",
    "resnet",
    "lstm",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*HEALTHY, "mamba", "dlrm"])
def test_real_architectures_in_healthy_training_have_no_severe_finding(name: str) -> None:
    torch.manual_seed(0)
    model, loss = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(20):
        step()
    with probe(model, optimizer, steps=10) as window:
        while not window.done:
            step()
    assert not [one for one in advisor.diagnose(window) if one.severe]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "convnet"])
@pytest.mark.parametrize("start", [0, 40])
def test_the_zoo_s_healthy_trainings_have_no_severe_finding(family: str, start: int) -> None:
    trainer = Trainer(ArchitectureSpec.model_validate({"family": family}))
    while trainer.step_index < start:
        trainer.step()
    with advisor.probe(trainer.model, trainer.optimizer, steps=20) as window:
        for _ in range(20):
            trainer.step()
    assert not [one for one in advisor.diagnose(window) if one.severe]
