"""Under autocast the rounded tensors are recorded, which are those that are multiplied."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probes.probing import probe
from probes.window import Window


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.convolution, self.down = nn.Linear(8, 16), nn.Conv1d(6, 6, 3), nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        h = F.scaled_dot_product_attention(h, h, h) + (h @ h.transpose(1, 2)) @ h
        return self.down(self.convolution(h))


def watched(dtype: torch.dtype | None) -> tuple[Window, nn.Module, list[float]]:
    torch.manual_seed(0)
    model, losses = Attending(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with probe(model, optimizer, steps=2, curvature_steps=1) as window:
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                loss = F.cross_entropy(model(torch.randn(3, 6, 8)).flatten(0, 1).float(), torch.arange(18) % 4)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return window, model, losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_multiplied_is_recorded(dtype: torch.dtype) -> None:
    window, _, _ = watched(dtype)
    bits = {torch.bfloat16: 7, torch.float16: 10}[dtype]
    for slot in window.slots:
        if window.is_product(slot):
            assert window.dtype(slot) == str(dtype).removeprefix("torch."), slot
            assert window.history(*slot).significant_bits.max() <= bits, slot


def test_without_autocast_tensors_are_as_they_are() -> None:
    window, _, _ = watched(None)
    assert {window.dtype(slot) for slot in window.product_slots} == {"float32"}


def test_a_weight_is_rounded_as_autocast_rounds_it() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    largest = model.weight.detach().bfloat16().abs().max()
    with probe(model, optimizer, steps=1, curvature_steps=0) as window, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(3, 16)).sum().backward()
        optimizer.step()
    assert window.history("(root)", "weight").amax[0] == largest
