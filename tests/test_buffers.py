"""What a window says of buffers: those that a training moves, as they were, and how much of a move a format takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import advisor
from advisor.lost_updates import lost_by_size
from probes.casts import Cast
from probes.parameter_records import BUFFER, UPDATE
from probes.probing import PARAMETER_STEPS, probe
from probes.records import Slot
from probes.window import Window
from tests.ranks import on_ranks

STEPS = 4


class Masked(nn.Module):
    """A BatchNorm, a mask that holds -Inf, an average that stands still, and one that is moved in steps."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 6), nn.BatchNorm1d(6, momentum=0.01), nn.Linear(6, 2)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf))
        self.register_buffer("still", torch.ones(3))
        self.register_buffer("average", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.average += torch.tensor([1.0, 0.0])
        out: Tensor = self.down(self.norm(self.up(x)).relu())
        return out


def watched(model: nn.Module, steps: int = STEPS, every: int = 1) -> tuple[Window, list[dict[str, Tensor]]]:
    """The window, and the buffers as each step left them."""
    torch.manual_seed(0)
    optimizer, left = torch.optim.SGD(model.parameters(), lr=0.1), []
    with probe(model, optimizer, steps=steps, every=every, curvature_steps=0) as window:
        for _ in range(steps):
            model(3 * torch.randn(32, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            left.append({name: buffer.clone() for name, buffer in model.named_buffers()})
    return window, left


def test_buffers_that_move_are_recorded_as_each_step_left_them() -> None:
    window, left = watched(Masked())
    assert {slot.site for slot in window.slots if slot.role == BUFFER} == {
        "norm.running_mean",
        "norm.running_var",
        "average",
    }
    variance = window.history("norm.running_var", BUFFER)
    assert variance.amax.tolist() == [float(found["norm.running_var"].max()) for found in left]
    moves = window.history("average", UPDATE)
    assert moves.nonzero.tolist() == moves.zeros.tolist() == [1] * STEPS
    assert moves.amax.tolist() == [1.0] * STEPS
    assert window.dtype(Slot("average", BUFFER)) == "float32"


def test_steps_between_recorded_ones_are_not_in_a_move() -> None:
    window, _ = watched(Masked(), steps=9, every=2)
    moves = window.history("average", UPDATE)
    assert moves.steps.tolist() == window.history("up.weight", "master").steps.tolist()
    assert len(moves.steps) == PARAMETER_STEPS
    assert set(moves.amax.tolist()) == {1.0}


@pytest.mark.parametrize("cast", ["fp16", "bf16"])
def test_the_share_of_a_move_that_a_format_does_not_take_is_that_of_rounding_it(cast: str) -> None:
    torch.manual_seed(1)
    model = Masked()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    window, left = watched(model)
    rounded, lost, moved = Cast.parse(cast), 0.0, 0.0
    for earlier, later in zip([before, *left[:-1]], left, strict=True):
        was, change = earlier["norm.running_var"], later["norm.running_var"] - earlier["norm.running_var"]
        stays = rounded(rounded(was) + change) == rounded(was)
        lost, moved = lost + float(change.abs()[stays].sum()), moved + float(change.abs().sum())
    found = lost_by_size(window, "norm.running_var", rounded, role=BUFFER)
    assert found == pytest.approx(lost / moved, abs=0.05)


def test_a_window_file_keeps_buffers(tmp_path: Path) -> None:
    window, _ = watched(Masked())
    window.save(tmp_path / "w.safetensors")
    again = advisor.load_window(tmp_path / "w.safetensors")
    assert again.slots == window.slots
    record = again.parameter_record("norm.running_var")
    assert record is not None
    assert record.is_buffer
    assert record.updates.keys() == set(window.history("norm.running_var", UPDATE).steps.tolist())
    assert not again.parameter_record("up.weight").is_buffer  # type: ignore[union-attr]


def rank_window(rank: int) -> bytes:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Masked())
    return watched(model)[0].to_bytes()


@pytest.mark.slow
def test_buffers_of_several_processes_count_once(tmp_path: Path) -> None:
    from probes.windowfile import window_from_bytes

    first, second = (window_from_bytes(found) for found in on_ranks(2, rank_window, tmp_path))
    assert first.world_size == 2
    assert first.history("norm.running_var", BUFFER).elements.tolist() == [6] * STEPS
    assert first.history("average", UPDATE).elements.tolist() == [2] * STEPS
    assert first.to_bytes() == second.to_bytes()
