"""Damage measured through whole windows, against the exact ½δᵀHδ of the total that is trained."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian, jvp
from torch.func import functional_call

import advisor
from probes import curvature
from probes.casts import Cast
from probes.losses import curvature_of
from probes.probing import probe
from probes.window import Window
from tests.tensors import generator

CAST = Cast.parse("e5m2")
BATCH = 6


@pytest.fixture(autouse=True)
def many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DRAWS", "DRAWS_WHOLE_BATCH"):
        monkeypatch.setattr(curvature, name, 200)


def watched(model: nn.Module, step: Callable[[], None], **options: Any) -> Window:
    """One scored step, after which the weights are as before."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=1, curvature_steps=1, casts=[CAST], **options) as window:
        step()
        optimizer.step()
    return window


def gauss_newton(model: nn.Module, x: Tensor, name: str, loss: Callable[[Tensor], Tensor]) -> float:
    """½·δᵀJᵀHJδ, δ the cast's error in a parameter, or in the input where there is no name."""
    tensor = x if not name else model.get_parameter(name).detach()
    others = {key: value.detach() for key, value in [*model.named_parameters(), *model.named_buffers()]}

    def outputs(moved: Tensor) -> Tensor:
        found: Tensor = functional_call(model, {**others, name: moved} if name else others, x if name else moved)
        return found

    z, change = jvp(outputs, tensor, CAST(tensor) - tensor)
    matrix = hessian(loss, z).reshape(z.numel(), z.numel())
    return float(0.5 * change.flatten() @ matrix @ change.flatten())


def close(window: Window, site: str, role: str, exact: float) -> None:
    evidence = window.evidence(site, role)
    (whole,), (spread,) = evidence.directional.values(), evidence.directional_se.values()
    measured = whole - sum(evidence.beyond.values())
    assert exact > 0
    assert abs(measured - exact) < 5 * spread + 0.02 * exact
    assert spread < 0.4 * exact


def targets(z: Tensor) -> Tensor:
    return torch.arange(z.flatten(0, -2).shape[0]) % z.shape[-1]


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), targets(z))


def test_accumulation_auxiliary_losses_and_a_loss_scale_are_in_the_factor() -> None:
    torch.manual_seed(0)
    model, batches = nn.Linear(5, 4), [torch.randn(BATCH, 5) for _ in range(2)]

    def total(z: Tensor) -> Tensor:
        summed = F.cross_entropy(z, targets(z), reduction="sum") / BATCH
        return (summed + 0.3 * F.mse_loss(z, torch.zeros_like(z))) / len(batches)

    def step() -> None:
        for x in batches:
            (1024 * total(model(x))).backward()

    window = watched(model, step, loss_scale=1024.0)
    assert window.notes == ()
    close(window, "(root)", "weight", sum(gauss_newton(model, x, "weight", total) for x in batches))
    close(window, "(root)", "input", sum(gauss_newton(model, x, "", total) for x in batches))


def test_two_backward_passes_through_one_graph_both_count() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4), torch.randn(BATCH, 5)

    def step() -> None:
        z = model(x)
        cross_entropy(z).backward(retain_graph=True)
        F.mse_loss(z, torch.zeros_like(z)).backward()

    exact = gauss_newton(model, x, "weight", lambda z: cross_entropy(z) + F.mse_loss(z, torch.zeros_like(z)))
    close(watched(model, step), "(root)", "weight", exact)


class Sequences(nn.Module):
    """Tokens of a sequence through layers that see them flattened, or turned around."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.how = nn.Linear(4, 5), nn.Linear(5, 3), how

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.how == "flattened":
            return self.second(torch.tanh(self.first(x.flatten(0, 1)))).unflatten(0, (batch, length))
        if self.how == "turned around":
            return self.second(torch.tanh(self.first(x.transpose(0, 1)))).transpose(0, 1)
        return self.second(torch.tanh(self.first(x)).mean(1, keepdim=True).expand(-1, length, -1))


@pytest.mark.parametrize("how", ["flattened", "turned around", "pooled"])
def test_flattened_inputs_are_grouped_into_samples(how: str) -> None:
    torch.manual_seed(0)
    model, x = Sequences(how), torch.randn(BATCH, 8, 4)
    window = watched(model, lambda: cross_entropy(model(x)).backward())
    assert not window.evidence("first", "weight").whole_batch
    close(window, "first", "weight", gauss_newton(model, x, "first.weight", cross_entropy))
    close(window, "first", "input", gauss_newton(model, x, "", cross_entropy))
    close(window, "second", "weight", gauss_newton(model, x, "second.weight", cross_entropy))


class Routed(nn.Module):
    """A mixture of experts: rows are sent to one of two experts each, and added back in their places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.experts = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        rows, result = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        chosen = torch.randint(0, 2, (len(rows),), generator=generator(1))
        for number in range(2):
            (places,) = torch.where(chosen == number)
            result = result.index_add(0, places, F.linear(rows[places], self.experts[number]))
        found: Tensor = self.last(torch.tanh(result).unflatten(0, x.shape[:2]) + x)
        return found


class Normalized(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def test_a_training_that_calls_the_models_parts_alone_has_samples() -> None:
    model = nn.ModuleDict({"body": nn.Linear(6, 5), "head": nn.Linear(5, 3)})
    x, target = torch.randn(4, 7, 6), torch.arange(28) % 3
    window = watched(
        model, lambda: F.cross_entropy(model["head"](model["body"](x).flatten(0, 1).tanh()), target).backward()
    )
    assert not any(window.evidence(slot.site, slot.role).whole_batch for slot in window.product_slots)


def test_a_generator_behind_a_discriminator_that_has_learned_first_has_damage() -> None:
    made, judged = nn.Linear(3, 6), nn.Linear(6, 1)
    model, noise = nn.ModuleDict({"made": made, "judged": judged}), torch.randn(5, 3)
    labels = torch.ones(5, 1)

    def step() -> None:
        fake = made(noise)
        F.binary_cross_entropy_with_logits(judged(fake.detach()), 0 * labels).backward()
        F.binary_cross_entropy_with_logits(judged(fake), labels).backward()

    def outputs(weight: Tensor) -> Tensor:
        return judged(F.linear(noise, weight, made.bias))

    window, weight = watched(model, step), made.weight.detach()
    z, moved = jvp(outputs, weight, CAST(weight) - weight)
    exact = float((0.5 * moved.square() * z.sigmoid() * (-z).sigmoid()).mean())
    close(window, "made", "weight", exact)


def test_behind_batch_norm_the_batch_is_one_sample() -> None:
    torch.manual_seed(0)
    model, x = Normalized(), torch.randn(BATCH, 4)
    window = watched(model, lambda: cross_entropy(model(x)).backward())
    assert window.evidence("0", "weight").whole_batch
    assert not window.evidence("3", "weight").whole_batch
    close(window, "0", "weight", gauss_newton(model, x, "0.weight", cross_entropy))
    close(window, "0", "input", gauss_newton(model, x, "", cross_entropy))


def test_routed_rows_are_of_no_sample() -> None:
    torch.manual_seed(0)
    model, x = Routed(), torch.randn(BATCH, 4, 4)
    window = watched(model, lambda: cross_entropy(model(x)).backward())
    experts = [site.name for site in window.sites if site.name not in ("first", "last")]
    assert experts
    assert all(window.evidence(site, "weight").whole_batch for site in experts)
    close(window, "first", "weight", gauss_newton(model, x, "first.weight", cross_entropy))


class Passing(nn.Module):
    """Every row hears of the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        messages = self.first(x)
        found: Tensor = self.last(torch.tanh(messages.index_add(0, torch.arange(1, len(x)), messages[:-1])))
        return found


def test_rows_that_hear_of_each_other_are_one_sample() -> None:
    torch.manual_seed(0)
    model, x = Passing(), torch.randn(BATCH, 4)
    window = watched(model, lambda: cross_entropy(model(x)).backward())
    assert window.evidence("first", "weight").whole_batch
    assert not window.evidence("last", "weight").whole_batch
    close(window, "first", "weight", gauss_newton(model, x, "first.weight", cross_entropy))


class Compared(nn.Module):
    """Every entry of a batch against every other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.first(x)
        return rows @ rows.T


def test_a_batch_compared_with_itself_is_one_sample() -> None:
    torch.manual_seed(0)
    model, x = Compared(), torch.randn(BATCH, 4)
    window = watched(model, lambda: cross_entropy(model(x)).backward())
    assert window.evidence("first", "weight").whole_batch
    close(window, "first", "weight", gauss_newton(model, x, "first.weight", cross_entropy))


def test_under_autocast_the_measured_is_that_of_float32() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(32, 4), torch.randn(64, 32)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x)
        cross_entropy(z.float()).backward()

    window = watched(model, step)
    exact = gauss_newton(model, x, "weight", cross_entropy)
    assert list(window.evidence("(root)", "weight").directional.values()) == [pytest.approx(exact, rel=0.2)]


def unknown(z: Tensor) -> Tensor:
    return z.pow(4).sum(-1).mean()


def test_an_unknown_loss_leaves_the_training_gradient_and_no_damage() -> None:
    """The empirical Fisher matrix of the whole step, in the loss's own units: of two half batches, scaled, as well."""
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4), torch.randn(BATCH, 5)

    def step() -> None:
        for half in x.chunk(2):
            (1024 * unknown(model(half)) / 2).backward()

    window = watched(model, step, loss_scale=1024.0)
    assert window.curvature_from == "gradient"
    assert "kept in its place" in window.notes[0]
    leaf = model.weight.detach().requires_grad_()
    gradients = torch.stack([torch.autograd.grad(unknown(F.linear(row, leaf, model.bias)), leaf)[0] for row in x])
    delta = CAST(leaf.detach()) - leaf.detach()
    evidence = window.evidence("(root)", "weight")
    assert evidence.directional[str(CAST)] == pytest.approx(
        float(0.5 * (gradients * delta).sum((1, 2)).square().mean()), rel=1e-4
    )
    rows = advisor.score(window, [CAST]).rows
    assert {(row["damage"], row["damage_from"]) for row in rows} == {(None, None)}
    assert any(row["noise_ratio"] is None or row["noise_ratio"] > 0 for row in rows)


def test_a_declared_loss_is_known() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4), torch.randn(BATCH, 5)

    def step() -> None:
        z = model(x)
        curvature_of(unknown(z), z, (12 * z.detach().square() / BATCH).sqrt()).backward()

    window = watched(model, step)
    assert window.curvature_from == "loss"
    assert window.notes == ()
    close(window, "(root)", "weight", gauss_newton(model, x, "weight", unknown))


def test_a_declaration_stands_for_known_losses_of_the_same_outputs() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4), torch.randn(BATCH, 5)

    def squared(z: Tensor) -> Tensor:
        return F.mse_loss(z, torch.zeros_like(z), reduction="sum")

    def step() -> None:
        z = model(x)
        curvature_of(squared(z), z, torch.full_like(z, 2**0.5)).backward()

    close(watched(model, step), "(root)", "weight", gauss_newton(model, x, "weight", squared))


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda z: cross_entropy(z) + 3 * z.square().mean(), "no weighted sum of losses"),
        (
            lambda z: (F.mse_loss(z, 0 * z.detach(), reduction="none") * torch.tensor([1, -1, 1, 1])).mean(),
            "negatively",
        ),
        (lambda z: F.l1_loss(z, torch.zeros_like(z)), "l1_loss has no curvature"),
        (lambda z: curvature_of(unknown(z), z, lambda _: torch.ones(3)), "the factor gave"),
    ],
)
def test_what_is_left_out_is_said(loss: Callable[[Tensor], Tensor], says: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4), torch.randn(BATCH, 5)
    window = watched(model, lambda: loss(model(x)).backward())
    assert any(says in note for note in window.notes)


class Neighbours(nn.Module):
    """Its first product is of data alone; its second of what was learned."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        found: Tensor = self.outer(adjacency @ self.inner(adjacency @ x))
        return found


def test_products_with_nothing_trained_beneath_are_named() -> None:
    torch.manual_seed(0)
    model, adjacency, x = Neighbours(), torch.rand(5, 5), torch.randn(BATCH, 5, 3)
    window = watched(model, lambda: cross_entropy(model(adjacency, x)).backward())
    (note,) = window.notes
    assert "(root)/matmul.0" in note
    assert "not predicted" in note
    assert window.evidence("(root)/matmul.0", "lhs").curvature is None
    assert window.evidence("(root)/matmul.1", "lhs").curvature is not None


def test_tensors_of_a_batch_are_let_go_when_the_next_is_begun() -> None:
    """Under accumulation the operands of one part of the batch alone are held."""
    model, alive = nn.Linear(5, 4), []

    def step() -> None:
        held: list[weakref.ref[Tensor]] = []
        for _ in range(3):
            x = torch.randn(BATCH, 5)
            held.append(weakref.ref(x))
            cross_entropy(model(x)).backward()
            alive.append(sum(each() is not None for each in held))

    watched(model, step)
    assert alive == [1, 1, 1]


def test_outputs_changed_in_place_are_said() -> None:
    model, x = nn.Linear(5, 4), torch.randn(BATCH, 5)

    def step() -> None:
        z = model(x)
        loss = cross_entropy(z)
        with torch.no_grad():
            z.add_(1)
        loss.backward()

    assert any("changed in place" in note for note in watched(model, step).notes)


def test_an_overflowing_loss_scale_measures_nothing() -> None:
    model, x = nn.Linear(5, 4), torch.randn(BATCH, 5)
    window = watched(model, lambda: (cross_entropy(model(x)) * 1e38 * 1e3).backward())
    assert window.evidence("(root)", "weight").curvature is None


def test_the_users_random_stream_and_gradients_are_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout behind non-reentrant checkpointing, masks, two losses: one scored step as one that is not watched."""
    from torch.utils.checkpoint import checkpoint

    monkeypatch.setattr(curvature, "DRAWS_WHOLE_BATCH", 4)

    def run(curvature_steps: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(inplace=True))
        model = nn.Sequential(nn.Linear(5, 8), block, nn.Linear(8, 4))
        block_forward = block.forward
        block.forward = lambda x: checkpoint(block_forward, x, use_reentrant=False)  # type: ignore[method-assign]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

        def steps() -> None:
            for _ in range(3):
                for _ in range(2):
                    z = model(torch.randn(BATCH, 5))
                    losses = F.cross_entropy(z, targets(z), reduction="none")
                    ((losses * torch.rand(BATCH)).mean() + 0.1 * F.mse_loss(z, torch.zeros_like(z))).backward()
                optimizer.step()
                optimizer.zero_grad()

        if curvature_steps is None:
            steps()
        else:
            with probe(model, optimizer, steps=3, curvature_steps=curvature_steps) as window:
                steps()
            assert window.curvature_from == "loss"
        return [*model.state_dict().values(), torch.rand(3)]

    assert all(map(torch.equal, run(None), run(3)))


def test_the_first_order_part_is_the_gradient_along_the_error() -> None:
    """⟨g, δ⟩ of a weight is what autograd's own gradient gives, and it follows the sign of a cast that shrinks."""
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    shrinking = Cast.parse("e4m3fn/tensor/current/zero")
    x, target = torch.randn(16, 8), torch.randint(4, (16,))
    with advisor.probe(model, optimizer, steps=2, casts=[shrinking]) as window:
        for _ in range(2):
            nn.functional.cross_entropy(model(x), target).backward()
            gradient = model.weight.grad.clone()
            optimizer.step()
            optimizer.zero_grad()
    exact = float((gradient * (shrinking(model.weight.detach()) - model.weight.detach())).sum())
    (row,) = advisor.score(window, [shrinking]).of("(root)", "weight")
    assert row["bias_damage"] == pytest.approx(exact, rel=1e-5)
    assert row["bias_damage_se"] == pytest.approx(0.0, abs=1e-9)  # the same batch and weights twice
    assert advisor.score(window, ["int8"]).of("(root)", "weight")[0]["bias_damage"] is None
