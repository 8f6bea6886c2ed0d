"""A cast of a gradient is scored by what it does to the gradient that is passed on, not to the weight's alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from probes.probing import probe


@pytest.mark.parametrize("constant", [0.0, 50.0])
def test_a_constant_column_of_a_head_makes_a_rounded_gradient_noisy(constant: float) -> None:
    """The gradient of cross-entropy sums to zero over classes, so the column passes nothing on until it is rounded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 40))
    with torch.no_grad():
        model[2].weight[:, 0] = constant
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=4) as window:
        for _ in range(4):
            F.cross_entropy(model(torch.randn(64, 16)), torch.randint(0, 40, (64,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    noise = window.evidence("2", "grad_output").relative_noise["e4m3fn/tensor/current/nearest"]
    assert noise > 0.1 if constant else noise < 0.01
