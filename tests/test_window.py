"""The window: it sees everything, it disturbs nothing, it ends itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from probes.errors import MalformedWindow, WindowError
from probes.pace import Clock
from probes.probing import probe
from probes.recorder import Recorder
from probes.sites import ProductCall
from probes.sketch import SketchArray
from probes.window import Window
from probes.windowfile import load_window, window_from_bytes
from tests.models import INPUTS, convnet, encoder, mlp, train
from tests.tensors import same_history

MODELS = list(INPUTS)


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, momentum=0.9)])
def test_watching_changes_no_bit(build: Callable[[], nn.Module], optimizer: Any) -> None:
    plain, losses, _ = train(build, 8, optimizer=optimizer)
    watched, watched_losses, window = train(build, 8, partial(probe, steps=6, every=2), optimizer=optimizer)
    assert watched_losses == losses
    for name, value in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name
    assert window.steps == (0, 2, 4)


@pytest.mark.parametrize("build", MODELS)
def test_every_slot_has_every_step(build: Callable[[], nn.Module]) -> None:
    _, losses, window = train(build, 5, partial(probe, steps=4))
    assert window.done
    assert window.steps == (0, 1, 2, 3)
    assert window.losses == pytest.approx(losses[:4], rel=1e-6)
    assert window.coverage.share == 1
    assert window.notes == ()
    for site in window.sites:
        for role in site.roles:
            history = window.history(site.name, role)
            assert history.steps.tolist() == [0, 1, 2, 3]
            assert history.elements.tolist() == [math.prod(site.shapes[role])] * 4
        assert {slot.role for slot in window.slots if slot.site == site.name} == set(site.roles)
        assert "grad_output" in site.roles


class Projections(nn.Module):
    """Three layers that take one input; `between` may change it in place, or hand each of them a copy."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.query.requires_grad_(False)  # backward needs x as it was where it met a weight that is trained
        self.key.requires_grad_(False)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x)
        key = self.key(self.between(x))
        return query + key + self.value(self.between(x))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_tensor_that_several_sites_take_is_read_once_and_told_of_each(
    micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = []
    add = SketchArray.add
    monkeypatch.setattr(SketchArray, "add", lambda self, row, values: (reads.append(row), add(self, row, values))[1])

    def trained(between: Callable[[Tensor], Tensor]) -> tuple[Window, int]:
        reads.clear()
        model = Projections(between)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with probe(model, optimizer, steps=2, curvature_steps=0) as window:
            for step in range(2):
                for part in range(micro_batches):
                    generator = torch.Generator().manual_seed(10 * step + part)
                    model(torch.randn(1024, 8, generator=generator)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return window, len(reads)

    same, fewer = trained(lambda x: x)
    copied, all_of_them = trained(Tensor.clone)
    assert fewer < all_of_them
    for name in ("query", "key", "value"):
        assert same_history(same.history(name, "input"), copied.history(name, "input"))


def _doubled_in_numpy(x: Tensor) -> Tensor:
    x.numpy()[:] *= 2
    return x


def _doubled_as_data(x: Tensor) -> Tensor:
    x.data = 2 * x
    return x


@pytest.mark.parametrize(
    "double", [lambda x: x.mul_(2), lambda x: (x, x.data.mul_(2))[0], _doubled_in_numpy, _doubled_as_data]
)
def test_a_tensor_that_has_changed_is_read_again(double: Callable[[Tensor], Tensor]) -> None:
    model = Projections(double)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        model(torch.ones(1024, 8)).square().sum().backward()
        optimizer.step()
    assert [window.history(name, "input").amax.tolist() for name in ("query", "key", "value")] == [[1], [2], [4]]


def test_sketches_are_of_the_very_tensors() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.tensor([[1.0, -2.0, 0.0], [4.0, 0.5, float("inf")]])
    kept: list[Tensor] = []
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        result = model(x)
        result.register_hook(kept.append)
        result[0].sum().backward()
        optimizer.step()
    history = window.history("(root)", "input")
    assert history.amax.tolist() == [4.0]
    assert history.amin.tolist() == [0.5]
    assert history.zeros.tolist() == [1]
    assert history.positive_infs.tolist() == [1]
    assert history.sum_of_squares.tolist() == [1 + 4 + 16 + 0.25]
    assert window.history("(root)", "grad_output").sum_of_squares.tolist() == [float(kept[0].square().sum())]


def test_a_module_used_twice_adds_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = Twice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as window:
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    (site,) = window.sites
    assert site.calls == 2
    assert window.history("layer", "input").elements.tolist() == [40]
    assert window.history("layer", "grad_output").elements.tolist() == [40]
    assert window.history("layer", "weight").elements.tolist() == [16]  # one tensor, read once
    assert site.flops == 5 * (2 * 5 * 4 * 4)  # two forward, two weight gradients, one input gradient


def test_evaluation_inside_the_window_is_not_counted() -> None:
    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        with torch.no_grad():
            model(torch.randn(4, 16))
        return probe(model, optimizer, steps=3)

    _, _, window = train(mlp, 3, watch)
    model, optimizer = nn.Linear(4, 4), None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as evaluated:
        with torch.no_grad():
            model(torch.randn(100, 4))
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
    assert evaluated.history("(root)", "input").elements.tolist() == [20]
    assert window.history("0", "input").elements.tolist() == [24 * 16] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_counts_once(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        checkpoint(model, torch.randn(5, 4, requires_grad=True), use_reentrant=reentrant).sum().backward()
        optimizer.step()
    for slot in window.product_slots:
        assert window.history(*slot).elements.tolist() == [16 if slot.role == "weight" else 20], slot
    assert len(window.product_slots) == 6


def test_a_recomputed_batchnorm_keeps_its_statistics() -> None:
    from torch.utils.checkpoint import checkpoint

    def statistics(watch: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step() -> None:
            logits = checkpoint(model, torch.randn(8, 4), use_reentrant=False)
            F.cross_entropy(logits, torch.randint(0, 3, (8,))).backward()
            optimizer.step()
            optimizer.zero_grad()

        if watch:
            with probe(model, optimizer, steps=2) as window:
                step()
                step()
            assert window.evidence("0", "weight").directional
        else:
            step()
            step()
        return model.state_dict()

    plain = statistics(watch=False)
    for name, value in statistics(watch=True).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_empty_batch_does_not_stop_the_training(reduction: str) -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as window:
        F.cross_entropy(model(torch.randn(0, 4)), torch.zeros(0, dtype=torch.long), reduction=reduction).backward()
        optimizer.step()
    assert window.steps == (0,)


def test_a_fused_recurrent_layer_is_a_site_and_its_inside_is_listed() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(16, 64), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    model = Tagger()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as window:
        model(torch.randn(5, 8, 16)).sum().backward()
        optimizer.step()
    outer, inner = 2 * 40 * 256 * 16, 2 * 40 * 256 * 64
    assert window.site("lstm").flops == 2 * outer + 3 * inner  # nobody asks for the gradient of the data
    assert window.coverage.share == 1
    assert window.coverage.unseen == ({"where": "lstm", "op": "aten.lstm", "flops": outer + 3 * inner, "site": "lstm"},)


def test_the_parts_of_a_fused_weight_are_all_read() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w[:4]) + F.linear(x, self.w[4:])

    model = Fused()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as window:
        F.mse_loss(model(torch.randn(5, 4)), torch.zeros(5, 4)).backward()
        optimizer.step()
    assert window.history("(root)", "weight").elements.tolist() == [32]
    advisor.apply(advisor.recommend(window, tolerance=1.0), model)


def test_an_exception_inside_a_forward_leaves_the_thread_as_it_was() -> None:
    from torch.overrides import _get_current_function_mode_stack

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("inside")

    model = nn.Sequential(nn.Linear(4, 4), Broken())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def interrupted() -> None:
        with probe(model, optimizer, steps=1):
            model(torch.randn(2, 4))

    with pytest.raises(KeyError, match="inside"):
        interrupted()
    assert _get_current_function_mode_stack() == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_accumulated_micro_batches_are_one_step() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=2) as window:
        for _ in range(2):
            for _ in range(3):
                (F.mse_loss(model(torch.randn(5, 4)), torch.randn(5, 4)) / 3).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert window.history("(root)", "input").elements.tolist() == [60, 60]
    assert window.evidence("(root)", "weight").directional


def test_an_exception_leaves_no_hook_and_closes_the_window() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watching = probe(model, optimizer, steps=5)

    def interrupted() -> None:
        with watching:
            F.cross_entropy(model(torch.randn(4, 16)), torch.zeros(4, dtype=torch.long)).backward()
            optimizer.step()
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        interrupted()
    window = watching.window
    assert window.done
    assert window.steps == (0,)
    assert "cut short by RuntimeError" in window.notes[-1]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_the_window_ends_itself_and_leaves_the_rest_alone() -> None:
    _, _, window = train(mlp, 9, partial(probe, steps=2))
    assert window.steps == (0, 1)


def test_a_window_left_early_says_so() -> None:
    _, _, window = train(mlp, 2, partial(probe, steps=5))
    assert "2 of 5" in window.notes[0]


def test_an_open_window_cannot_be_asked() -> None:
    model = mlp()
    with probe(model, torch.optim.SGD(model.parameters()), steps=1) as window:
        assert not window.done
        with pytest.raises(WindowError, match="still open"):
            _ = window.sites


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"steps": 0}, "steps=1 or more"),
        ({"every": 0}, "at least 1"),
        ({"overhead": 0.0}, "above 0"),
        ({"curvature_steps": -1}, "turns it off"),
        ({"casts": ["e9m9x"]}, "e9m9x"),
        ({"model": "gpt2"}, "torch.nn.Module"),
        ({"optimizer": object()}, "step hooks"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments: dict[str, Any], says: str) -> None:
    model = mlp()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), **arguments}
    with pytest.raises(ValueError, match=says):
        probe(**given)


def test_an_optimizer_that_calls_its_parent_s_step_takes_one() -> None:
    class Twice(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise ArithmeticError
            return super().step(closure)

    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # only then does torch announce the parent's step as well
    model = mlp()
    optimizer = Twice(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=4, curvature_steps=0) as window:
        for step in range(4):
            model(torch.randn(4, 16)).sum().backward()
            optimizer.fails = step == 1
            with nullcontext() if step != 1 else pytest.raises(ArithmeticError):
                optimizer.step()
    assert window.steps == (0, 1, 2)


def test_an_optimizer_in_a_wrapper_is_found() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:  # as accelerate's: the parent's is not called
            self.optimizer = optimizer

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

    model = mlp()
    optimizer = Wrapper(torch.optim.Adam(model.parameters(), lr=0.1))
    with probe(model, optimizer, steps=2, curvature_steps=0) as window:
        for _ in range(2):
            model(torch.randn(4, 16)).sum().backward()
            optimizer.step()
    assert window.steps == (0, 1)
    assert window.optimizer_name == "Adam"


def test_memory_is_known_before_the_window_opens() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain, usual = probe(model, optimizer, finer=()), probe(model, optimizer)
    assert plain.bytes_a_slot * 5_000 < 256 * 2**20
    assert usual.bytes_a_slot > plain.bytes_a_slot
    assert "16 KiB a slot" in repr(plain)
    with probe(model, optimizer, steps=1000, finer=()) as window:
        for _ in range(3):
            model(torch.randn(4, 16)).sum().backward()
            optimizer.step()
    assert probe(model, optimizer, steps=1, finer=()).bytes_a_slot == plain.bytes_a_slot
    assert window.steps == (0, 1, 2)


def test_an_unknown_loss_is_said() -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as window:
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    assert "no loss function with a known curvature" in window.notes[0]
    assert window.curvature_from == "gradient"


def test_an_overhead_records_fewer_steps() -> None:
    _, _, window = train(mlp, 40, partial(probe, steps=40, overhead=1e-6, curvature_steps=0))
    assert 1 <= len(window.steps) <= 2
    assert window.steps[0] == 1  # the first step is left alone, to learn what a plain one takes


def test_a_window_says_which_steps_it_took() -> None:
    _, _, window = train(mlp, 40, partial(probe, steps=40, overhead=1e-6, curvature_steps=0))
    assert window.sampled[0] == "1 of 40 steps were recorded, to keep the watching under 0.0001% of the time"
    _, _, window = train(mlp, 7, partial(probe, steps=7, every=3, curvature_steps=0))
    assert window.sampled[0] == "3 of 7 steps were recorded, one in 3"
    _, _, window = train(mlp, 3, partial(probe, steps=3, curvature_steps=0))
    assert window.sampled == ()


def test_products_are_met_in_recorded_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[int] = []

    def on_product(recorder: Recorder, call: ProductCall) -> Any:
        met.append(recorder.step)
        return call.run()

    monkeypatch.setattr(Recorder, "on_product", on_product)
    train(mlp, 7, partial(probe, steps=7, every=3, curvature_steps=0))
    assert sorted(set(met)) == [0, 3, 6]


@pytest.mark.parametrize("overhead", [0.02, 0.05, 0.2, 1.0])
@pytest.mark.parametrize(("first", "later"), [(0.9, 0.12), (0.4, 0.15), (0.15, 0.15), (0.0, 0.0)])
def test_the_clock_keeps_the_share(overhead: float, first: float, later: float) -> None:
    """Surplus of the recorded steps, in plain steps, against what is allowed over the window of 20."""
    now, surplus, taken = 0.0, 0.0, 0
    clock = Clock(overhead, 20, now=lambda: now)
    clock.start()
    recorded = False
    for _ in range(20):
        extra = (later if taken else first) if recorded else 0.0
        surplus, taken = surplus + extra, taken + recorded
        now += 1.0 + extra
        recorded = clock.lap(recorded)
    assert taken >= 1
    assert surplus <= max(overhead * 20, first) + 1e-9
    if not first:
        assert taken == 19
    elif overhead == 1.0:
        assert taken >= 15
    elif first + later < overhead * 18:
        assert taken >= 2


def test_the_clock_does_not_charge_the_extra_backward_passes() -> None:
    now = 0.0
    clock = Clock(0.1, 20, now=lambda: now)
    clock.start()
    for extra, scored in ((0.0, None), (0.1, False), (16.0, True)):
        now += 1.0 + extra
        clock.lap(scored is not None, bool(scored))
    assert clock.debt == pytest.approx(0.1 + 0.1 - 3 * 0.1)


def test_what_is_not_seen_is_listed() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.linalg.matrix_power(x.t() @ x, 2)

    model = Hidden()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as window:
        model(torch.randn(4, 4)).sum().backward()
        optimizer.step()
    assert window.coverage.share == 3 / 4  # the layer and its weight's gradient, and one product of the data
    assert window.coverage.unseen == ({"where": "(root)", "op": "aten.mm", "flops": 128.0},)
    assert window.total_flops == sum(site.flops for site in window.sites) + 128


def test_file_round_trip(tmp_path: Path) -> None:
    _, _, window = train(encoder, 3, partial(probe, steps=3))
    window.save(tmp_path / "window.safetensors")
    again = advisor.load_window(tmp_path / "window.safetensors")
    assert again.header() == window.header()
    assert again.slots == window.slots
    assert all(same_history(again.history(*slot), window.history(*slot)) for slot in window.slots)
    assert again.sites == window.sites
    assert [path.name for path in tmp_path.iterdir()] == ["window.safetensors"]


def half(slot: dict[str, Any]) -> dict[str, Any]:
    return {**slot["evidence"], "directional_se": {}, "directional": {"e4m3fn/tensor/current/nearest": 1.0}}


def junk() -> dict[str, bytes]:
    from safetensors.numpy import save

    _, _, window = train(mlp, 2, partial(probe, steps=2))
    good = window.to_bytes()
    header = window.header()
    import json

    import numpy as np
    from safetensors.numpy import load

    arrays = load(good)

    def with_header(change: dict[str, Any]) -> bytes:
        return save(arrays, metadata={"window": json.dumps({**header, **change})})

    return {
        "nothing": b"",
        "text": b"hello, this is no window at all",
        "truncated": good[:-100],
        "huge header": b"\xff" * 8 + good[8:],
        "no metadata": save(arrays),
        "another schema": with_header({"schema": "numerics-advisor/window/999"}),
        "no slots": with_header({"slots": []}),
        "twice the slot": with_header({"slots": [header["slots"][0]] * len(header["slots"])}),
        "wrong type": with_header({"steps": "many"}),
        "other steps": with_header({"steps": [5, 6]}),
        "no name": with_header({"model": None}),
        "no text": with_header({"notes": ["\ud800"]}),
        "no list": with_header({"notes": {}}),
        "null site": with_header({"sites": [None]}),
        "endless work": with_header({"sites": [{**site, "calls": "Infinity"} for site in header["sites"]]}),
        "no tensor's shape": with_header(
            {"sites": [{**site, "shapes": {"input": [1e308]}} for site in header["sites"]]}
        ),
        "half the evidence": with_header({"slots": [{**slot, "evidence": half(slot)} for slot in header["slots"]]}),
        "array missing": save({"bins": arrays["bins"]}, metadata={"window": json.dumps(header)}),
        "negative length": save({**arrays, "lengths": -arrays["lengths"]}, metadata={"window": json.dumps(header)}),
        "bin out of range": save({**arrays, "bins": arrays["bins"] + 3000}, metadata={"window": json.dumps(header)}),
        "wrong dtype": save(
            {**arrays, "amax": arrays["amax"].astype(np.int64)}, metadata={"window": json.dumps(header)}
        ),
        "NaN amax": save({**arrays, "amax": arrays["amax"] * np.nan}, metadata={"window": json.dumps(header)}),
    }


def test_malformed_files_are_refused() -> None:
    for name, data in junk().items():
        with pytest.raises(MalformedWindow):
            pytest.fail(f"accepted: {name} {window_from_bytes(data)}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WindowError, match=r"nowhere\.safetensors"):
        load_window(tmp_path / "nowhere.safetensors")


def test_names_that_are_not_there() -> None:
    _, _, window = train(convnet, 2, partial(probe, steps=2))
    assert isinstance(window, Window)
    with pytest.raises(WindowError, match="no site '00'"):
        window.history("00", "input")
    with pytest.raises(WindowError, match="it has input, weight, grad_output"):
        window.history("0", "query")


class Scaled(nn.Module):
    """A layer, and beside it a product of fp8 operands that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        one, narrow = torch.tensor(1.0), torch.float8_e4m3fn
        first, second = y.detach().to(narrow), x.to(narrow).t()
        return y + torch._scaled_mm(first, second, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def test_operands_of_8_bits_are_read() -> None:
    torch.manual_seed(0)
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 16)
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        model(x).square().mean().backward()
        optimizer.step()
    found = window.history("(root)/scaled_mm.0", "rhs")
    assert found.elements.tolist() == [256]
    assert found.amax[0] == x.to(torch.float8_e4m3fn).float().abs().max()
    assert not any("could not be read" in note for note in window.notes)
