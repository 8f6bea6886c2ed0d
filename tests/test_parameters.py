"""Parameters through the optimizer's steps: master weights, gradients, updates, state, against direct computation."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.lost_updates import epsilon_vanishes
from probes.formats import FORMATS
from probes.lost_updates import UpdateSketch, cells_of
from probes.parameter_records import ParameterRecord, joined_records
from probes.probing import probe
from probes.window import Window
from probes.windowfile import window_from_bytes
from tests.models import mlp, train
from tests.test_metrics import history

optim = torch.optim
OPTIMIZERS: dict[str, tuple[Callable[..., optim.Optimizer], set[str]]] = {
    "sgd": (partial(optim.SGD, lr=0.1), set()),
    "sgd momentum": (partial(optim.SGD, lr=0.1, momentum=0.9), {"momentum_buffer"}),
    "sgd fused": (partial(optim.SGD, lr=0.1, momentum=0.9, fused=True), {"momentum_buffer"}),
    "adam": (partial(optim.Adam, lr=1e-3), {"exp_avg", "exp_avg_sq"}),
    "adam amsgrad": (partial(optim.Adam, lr=1e-3, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "adamw foreach": (partial(optim.AdamW, lr=1e-3, foreach=True), {"exp_avg", "exp_avg_sq"}),
    "adamw fused": (partial(optim.AdamW, lr=1e-3, fused=True), {"exp_avg", "exp_avg_sq"}),
    "adafactor": (partial(optim.Adafactor, lr=1e-2), {"row_var", "col_var", "variance"}),
    "rmsprop": (partial(optim.RMSprop, lr=1e-3, centered=True), {"square_avg", "grad_avg"}),
    "adagrad": (partial(optim.Adagrad, lr=1e-2), {"sum"}),
    "adagrad fused": (partial(optim.Adagrad, lr=1e-2, fused=True), {"sum"}),
    "nadam": (partial(optim.NAdam, lr=1e-3), {"exp_avg", "exp_avg_sq"}),
    "radam": (partial(optim.RAdam, lr=1e-3), {"exp_avg", "exp_avg_sq"}),
    "adamax": (partial(optim.Adamax, lr=1e-3), {"exp_avg", "exp_inf"}),
    "adadelta": (partial(optim.Adadelta, lr=1.0), {"square_avg", "acc_delta"}),
    "asgd": (partial(optim.ASGD, lr=1e-2), {"ax"}),
    "rprop": (partial(optim.Rprop, lr=1e-3), {"prev", "step_size"}),
}


class Followed:
    """A small training, with every tensor that the window should have sketched kept beside it."""

    def __init__(self, build: Callable[..., optim.Optimizer], steps: int = 4, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))
        self.optimizer = build(self.model.parameters())
        self.kept: dict[tuple[str, str], list[Tensor]] = {}
        with probe(self.model, self.optimizer, steps=steps, curvature_steps=0, **options) as self.window:
            for _ in range(steps):
                x, target = torch.randn(32, 6), torch.randint(0, 3, (32,))
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(x), target).backward()
                before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
                for name, p in self.model.named_parameters():
                    self._keep(name, "weight_grad", p.grad)
                self.optimizer.step()
                for name, p in self.model.named_parameters():
                    self._keep(name, "master", before[name])
                    self._keep(name, "update", p.detach() - before[name])
                    for state, value in self.optimizer.state[p].items():
                        if isinstance(value, Tensor) and value.dim():
                            self._keep(name, state, value)

    def _keep(self, name: str, role: str, tensor: Tensor | None) -> None:
        assert tensor is not None
        self.kept.setdefault((name, role), []).append(tensor.detach().clone())


def assert_sketched(window: Window, site: str, role: str, tensors: list[Tensor]) -> None:
    """The slot's history is that of these tensors, one a step, exactly."""
    ours, theirs = window.history(site, role), history(*tensors)
    for name in ("offsets", "bins", "counts", "zeros", "amax", "amin", "significant_bits"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), (site, role, name)
    assert ours.sum_of_squares == pytest.approx(theirs.sum_of_squares, rel=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_tensor_of_every_optimizer(name: str) -> None:
    build, states = OPTIMIZERS[name]
    followed = Followed(build)
    window = followed.window
    assert window.notes == ()
    assert {role for _, role in followed.kept} == {"master", "weight_grad", "update"} | states
    for (site, role), tensors in followed.kept.items():
        assert_sketched(window, site, role, tensors)
    parameter_slots = {tuple(slot) for slot in window.slots if not window.is_product(slot)}
    assert parameter_slots == set(followed.kept)
    for record in window.parameter_records:
        assert set(record.roles) == {role for site, role in followed.kept if site == record.name}
        changed = [int((tensor != 0).sum()) for tensor in followed.kept[record.name, "update"]]
        assert {step: updates.total for step, updates in record.updates.items()} == dict(enumerate(changed))


def test_muon_where_torch_has_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False))
    optimizer = optim.Muon(model.parameters(), lr=1e-2)
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        F.cross_entropy(model(torch.randn(8, 6)), torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()
    assert set(window.parameter_records[0].roles) == {"master", "weight_grad", "update", "momentum_buffer"}
    assert_sketched(window, "0.weight", "momentum_buffer", [optimizer.state[model[0].weight]["momentum_buffer"]])


@pytest.mark.parametrize("name", ["sgd momentum", "adamw fused", "adafactor", "rmsprop"])
def test_following_changes_no_bit(name: str) -> None:
    build = OPTIMIZERS[name][0]

    def optimizer(parameters: Any, lr: float) -> optim.Optimizer:
        return build(parameters)

    plain, losses, _ = train(mlp, 6, optimizer=optimizer)
    watched, watched_losses, _ = train(mlp, 6, partial(probe, steps=5), optimizer=optimizer)
    assert watched_losses == losses
    for key, value in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[key], value), key


def test_lbfgs_calls_its_closure_several_times_in_a_step() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x, target = torch.randn(16, 4), torch.randn(16, 2)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        return loss

    kept: dict[str, list[Tensor]] = {"master": [], "update": [], "weight_grad": []}
    with probe(model, optimizer, steps=2, curvature_steps=0) as window:
        for _ in range(2):
            before = model.weight.detach().clone()
            optimizer.step(closure)
            kept["master"].append(before)
            kept["update"].append(model.weight.detach() - before)
            kept["weight_grad"].append(model.weight.grad.clone())  # type: ignore[union-attr]
    assert calls > 2
    assert window.steps == (0, 1)
    for role, tensors in kept.items():
        assert_sketched(window, "weight", role, tensors)
    state = optimizer.state[model.weight]
    directions = window.history("weight", "old_dirs").elements.tolist()
    assert directions[-1] == sum(direction.numel() for direction in state["old_dirs"])
    assert window.history("weight", "d").elements.tolist() == [10, 10]  # of both parameters, which it keeps as one


def test_a_closure_of_adam_gives_the_gradient_that_was_used() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = optim.Adam(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        return loss

    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        optimizer.step(closure=closure)
    assert_sketched(window, "weight", "weight_grad", [model.weight.grad])


# Parts of a model


def one_step(model: nn.Module, optimizer: optim.Optimizer, *inputs: Tensor) -> Window:
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        model(*inputs).square().mean().backward()
        optimizer.step()
    return window


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    model[0].weight.requires_grad_(False)
    window = one_step(model, optim.AdamW(model.parameters()), torch.randn(8, 4))
    assert [record.name for record in window.parameter_records] == ["0.bias", "1.weight", "1.bias"]
    assert not any(slot.site == "0.weight" for slot in window.slots)
    assert window.history("0", "weight").elements.tolist() == [20]  # of the product it is seen all the same


def test_what_the_optimizer_does_not_hold() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    window = one_step(model, optim.AdamW(model[1].parameters()), torch.randn(8, 4))
    records = {record.name: record for record in window.parameter_records}
    assert set(records["0.weight"].roles) == {"master", "weight_grad"}
    assert records["0.weight"].updates == {}
    assert records["0.weight"].epsilon is None
    assert "update" in records["1.weight"].roles


def test_what_no_module_owns() -> None:
    model, loose = nn.Linear(4, 2), nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([{"params": list(model.parameters())}, {"params": [loose]}], lr=0.1)
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        (model(torch.randn(8, 4)).square().mean() * loose.prod()).backward()
        optimizer.step()
    assert [record.name for record in window.parameter_records] == ["weight", "bias", "optimizer.group1.param0"]
    assert window.history("optimizer.group1.param0", "master").amax.tolist() == [1.0]


def test_shared_weights_are_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    model = Tied()
    window = one_step(model, optim.Adam(model.parameters()), torch.tensor([1, 2, 3]))
    assert [record.name for record in window.parameter_records] == ["embed.weight"]
    assert window.history("embed.weight", "update").elements.tolist() == [40]


def test_a_sparse_gradient_counts_the_rows_that_it_has() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4, sparse=True))
    window = one_step(model, optim.SparseAdam(model.parameters()), torch.tensor([3, 7, 3, 9]))
    assert not any("could not" in note for note in window.notes)
    (record,) = window.parameter_records
    assert record.sparse
    assert window.history("0.weight", "weight_grad").elements.tolist() == [12]
    assert_sketched(window, "0.weight", "weight_grad", [model[0].weight.grad.coalesce().values()])
    assert window.history("0.weight", "update").zeros.tolist() == [47 * 4]
    assert record.updates[0].total == 12
    assert window.history("0.weight", "exp_avg").elements.tolist() == [200]


def test_gradients_are_seen_clipped() -> None:
    model = nn.Linear(4, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        (1e6 * model(torch.randn(8, 4))).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    energy = (
        window.history("weight", "weight_grad").sum_of_squares + window.history("bias", "weight_grad").sum_of_squares
    )
    assert energy == pytest.approx([1.0], rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_seen_unscaled(fused: bool) -> None:
    """A fused optimizer gets scaled gradients and the scale; any other, gradients that the GradScaler unscaled."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = optim.Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    wanted = []
    with probe(model, optimizer, steps=3, curvature_steps=0) as window:
        for _ in range(3):
            loss = model(torch.randn(8, 4)).square().mean()
            wanted.append(torch.autograd.grad(loss, model.weight, retain_graph=True)[0])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_sketched(window, "weight", "weight_grad", wanted)
    assert window.loss_scales == (1024.0,) * 3
    assert window.history("(root)", "grad_output").gain.tolist() == [1024.0] * 3
    assert window.history("weight", "weight_grad").gain.tolist() == [1.0] * 3


class Eightbit(optim.Optimizer):
    """Stands for the libraries' optimizers whose state is uint8 codes and a float scale."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = {"step": 1, "state1": p.grad.sign().byte(), "absmax1": p.grad.abs().amax()[None]}
                    p.sub_(0.01 * p.grad)


def test_state_that_is_not_floating_is_listed() -> None:
    model = nn.Linear(4, 2)
    window = one_step(model, Eightbit(model.parameters()), torch.randn(8, 4))
    record = window.parameter_records[0]
    assert record.states == {"state1": "uint8", "absmax1": "float32"}
    assert set(record.roles) == {"master", "weight_grad", "update", "absmax1"}
    assert window.notes == ()


def test_16_bit_and_scalar_and_complex_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow = nn.Parameter(torch.randn(4, 2, dtype=torch.bfloat16))
            self.scalar = nn.Parameter(torch.tensor(2.0))
            self.complex = nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.bfloat16() @ self.narrow).float().sum() * self.scalar + (self.complex.abs() * x).sum()

    torch.manual_seed(0)
    model = Odd()
    window = one_step(model, optim.Adam(model.parameters()), torch.randn(8, 4))
    assert window.notes == ()
    records = {record.name: record for record in window.parameter_records}
    assert records["narrow"].dtype == "bfloat16"
    assert window.dtype(next(slot for slot in window.slots if slot.site == "narrow")) == "bfloat16"
    assert "exp_avg" in records["scalar"].roles
    assert "step" not in records["scalar"].roles
    assert window.history("complex", "master").elements.tolist() == [8]


def test_parameters_take_turns_that_are_evenly_spread() -> None:
    followed = Followed(partial(optim.AdamW, lr=1e-3), steps=16)
    elements = [0] * 16
    for (site, role), tensors in followed.kept.items():
        steps = followed.window.history(site, role).steps.tolist()
        assert steps == list(range(steps[0], 16, 4))
        assert steps == followed.window.history(site, "master").steps.tolist()
        assert_sketched(followed.window, site, role, [tensors[step] for step in steps])
        for step in steps:
            elements[step] += tensors[step].numel() if role == "master" else 0
    assert elements == [11, 16, 24, 48] * 4  # of 48, 24, 8, 8, 8 and 3
    assert followed.window.history("0", "weight").steps.tolist() == list(range(16))


def test_a_parameter_that_cannot_be_read_is_noted_and_the_training_goes_on() -> None:
    model = nn.Linear(4, 2)
    model.register_parameter("eight", nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False))
    model.eight.requires_grad_(True)
    window = one_step(model, optim.SGD([model.weight, model.bias], lr=0.1), torch.randn(8, 4))
    assert any("parameter eight could not be followed" in note for note in window.notes)
    assert window.history("weight", "update").elements.tolist() == [8]


class Stop(Exception):
    pass


def stop(*_: Any) -> None:
    raise Stop


def test_a_window_left_by_an_exception_keeps_no_tensor() -> None:
    watched: list[Any] = []

    def interrupted() -> list[weakref.ref[Any]]:
        model = nn.Linear(4, 2)
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        watched.append(probe(model, optimizer, steps=3, curvature_steps=0))
        try:
            with watched[0]:
                optimizer.register_step_pre_hook(stop)  # after the window's own hook, before the step
                model(torch.randn(8, 4)).sum().backward()
                optimizer.step()
        except Stop:
            pass
        return [weakref.ref(held) for held in (model, model.weight, model.weight.grad)]

    references = interrupted()
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
    assert watched[0].window.done


# What is made of it


def test_a_window_file_keeps_the_records() -> None:
    window = Followed(partial(optim.AdamW, lr=1e-3)).window
    read = window_from_bytes(window.to_bytes())
    assert read.parameter_records == window.parameter_records
    assert read.parameter_records[0].updates[0].total > 0
    assert read.parameter_record("nothing") is None


def test_records_of_ranks_are_joined() -> None:
    """Shards add up; copies count once."""
    torch.manual_seed(1)
    weight, update = torch.randn(60), 1e-3 * torch.randn(60)

    def record(part: slice, noise: float) -> ParameterRecord:
        packed = UpdateSketch.of(cells_of(weight[part], update[part]).numpy()).pack()
        elements = len(weight[part])
        return ParameterRecord(
            "w", "float32", ("master",), (60,), elements, gradient_noise=noise, packed_updates={3: packed}
        )

    whole = record(slice(None), 0.5)
    shards = [[record(slice(20), 0.2)], [record(slice(20, 60), 0.65)]]
    (joined,) = joined_records(shards, sharded=True)
    assert joined.gradient_noise == pytest.approx(whole.gradient_noise)
    assert replace(joined, gradient_noise=0.5) == whole
    assert joined_records([[whole], [whole]], sharded=False) == (whole,)
    assert joined_records([[whole], []], sharded=True) == (whole,)


def test_epsilon_is_told() -> None:
    window = Followed(partial(optim.AdamW, lr=1e-3)).window
    record = window.parameter_records[0]
    assert record.epsilon == 1e-8
    assert epsilon_vanishes(record, FORMATS["fp16"]) is True
    assert torch.tensor(1e-8).half() == 0
    assert epsilon_vanishes(record, FORMATS["bf16"]) is False
    rows = {row["cast"]: row for row in advisor.score(window).of("0.weight", "exp_avg_sq")}
    assert rows["fp16/none/nearest"]["epsilon_vanishes"] is True
    assert rows["bf16/none/nearest"]["epsilon_vanishes"] is False
    assert Followed(partial(optim.SGD, lr=0.1)).window.parameter_records[0].epsilon is None


def test_rows_of_parameters() -> None:
    window = Followed(partial(optim.AdamW, lr=1e-3), steps=8).window
    scores = advisor.score(window)
    (bf16,) = (row for row in scores.of("0.weight", "master") if row["cast"].startswith("bf16"))
    assert 0 < bf16["lost_updates"] < 1
    (gradient,) = (row for row in scores.of("0.weight", "weight_grad") if row["cast"].startswith("e4m3fn"))
    assert 0 < gradient["lost_batch_share"] < 0.1
    assert all(row["lost_updates"] is None for row in scores.of("0"))


def test_loss_noise_is_that_of_neighbours() -> None:
    torch.manual_seed(0)
    window = train(mlp, 21, partial(probe, steps=20))[2]
    apart = np.abs(np.diff(window.losses))
    assert window.loss_noise == pytest.approx(1.4826 * np.median(apart) / 2**0.5)
