"""Fused recurrent layers in scored steps: damage of what enters them, whatever their layout, and noise of gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probes import curvature, network_curvature
from probes.casts import Cast
from probes.probing import probe
from probes.window import Window

CAST = Cast.parse("e5m2")
BATCH, LENGTH = 6, 5


class Reader(nn.Module):
    """A recurrent layer between two linear ones; reads its last state, or all results."""

    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, last: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        layers = 2 if dropout else 1
        self.recurrent = kind(4, 5, batch_first=batch_first, num_layers=layers, dropout=dropout)
        self.head, self.last = nn.Linear(5, 3), last

    def forward(self, x: Tensor) -> Tensor:
        results, state = self.recurrent(self.first(x))
        state = state[0] if isinstance(state, tuple) else state
        found: Tensor = self.head(state[0] if self.last else results)
        return found


def data(model: Reader) -> Tensor:
    sizes = (BATCH, LENGTH) if model.recurrent.batch_first else (LENGTH, BATCH)
    return torch.randn(*sizes, 4, generator=torch.Generator().manual_seed(1))


def watched(model: Reader, x: Tensor, goal: Tensor | None = None) -> Window:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=2, curvature_steps=2, casts=[CAST]) as window:
        for _ in range(2):
            loss(model, x, goal).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window


def loss(model: Reader, x: Tensor, goal: Tensor | None = None) -> Tensor:
    """Of a model that is nearly there, or of one that is to give zeros."""
    z = model(x)
    return F.mse_loss(z, torch.zeros_like(z) if goal is None else goal.to(z.dtype))


LAYERS = [
    (nn.LSTM, True, False),
    (nn.LSTM, False, False),
    (nn.LSTM, True, True),
    (nn.GRU, False, True),
    (nn.RNN, True, False),
]


@pytest.mark.parametrize(("kind", "batch_first", "last"), LAYERS)
def test_damage_of_a_recurrent_weight_is_the_rise_of_the_loss(
    kind: type[nn.RNNBase], batch_first: bool, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature, "DRAWS", 50)
    monkeypatch.setattr(network_curvature, "DRAWS", 20)
    torch.manual_seed(0)
    model = Reader(kind, batch_first, last)
    x = data(model)
    goal = model(x).detach() + 0.002
    window = watched(model, x, goal)
    assert not any("not predicted" in note or "no curvature" in note for note in window.notes)
    for role in ("weight_ih_l0", "weight_hh_l0"):
        evidence = window.evidence("recurrent", role)
        assert not evidence.whole_batch
        (measured,), (spread,) = evidence.directional.values(), evidence.directional_se.values()
        exact = symmetric_rise(model, x, goal, f"recurrent.{role}")
        assert exact > 0
        assert abs(measured - exact) < 5 * spread + 0.2 * exact
        assert spread < 0.4 * exact
    assert window.evidence("recurrent", "input").directional[str(CAST)] > 0
    noise = window.evidence("recurrent", "grad_output").relative_noise[str(CAST)]
    assert 0 < noise < 0.1


def symmetric_rise(model: Reader, x: Tensor, goal: Tensor, name: str) -> float:
    """½[L(+δ) + L(−δ)] − L(0), in float64."""
    exactly = Reader(type(model.recurrent), model.recurrent.batch_first, model.last).double()
    exactly.load_state_dict(model.state_dict())
    weight = exactly.get_parameter(name)
    delta, losses = (CAST(weight.detach().float()) - weight.detach().float()).double(), []
    with torch.no_grad():
        for step in (0, 1, -2):
            weight += step * delta
            losses.append(float(loss(exactly, x.double(), goal)))
    return (losses[1] + losses[2]) / 2 - losses[0]


def test_time_before_the_batch_is_found_out() -> None:
    """The linear layer in front is grouped by the batch that the recurrent layer tells of."""
    torch.manual_seed(0)
    one, other = Reader(nn.LSTM, True, False), Reader(nn.LSTM, False, False)
    other.load_state_dict(one.state_dict())
    x = data(one)
    found = [watched(model, inputs) for model, inputs in ((one, x), (other, x.transpose(0, 1).contiguous()))]
    for role in ("input", "weight"):
        values = [window.evidence("first", role).directional[str(CAST)] for window in found]
        assert values[0] == pytest.approx(values[1], rel=0.6)
        assert not any(window.evidence("first", role).whole_batch for window in found)


def test_with_dropout_inside_it_is_recorded_and_said() -> None:
    torch.manual_seed(0)
    model = Reader(nn.LSTM, True, False, dropout=0.2)
    window = watched(model, data(model))
    assert any("not predicted" in note for note in window.notes)
    assert window.evidence("recurrent", "weight_ih_l0").directional == {}
