"""A plan on two ranks: they skip the same steps and round to the same values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import mlp
from ranks import on_ranks
from torch.nn.parallel import DistributedDataParallel

import advisor
from advisor.plan import LossScaling
from advisor.storage import storage_of


def trained(rank: int) -> dict[str, Any]:
    """Three steps under DistributedDataParallel; in the second the first rank's gradients alone overflow."""
    torch.manual_seed(0)
    model = mlp().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with advisor.probe(model, optimizer, steps=1, curvature_steps=0) as window:
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    plan = advisor.uniform(
        window,
        grad_output="fp16:inf",
        storage=storage_of(window, master="bf16/none/stochastic"),
        loss_scaling=LossScaling(kind="dynamic", reason="a test's", scale=1024.0, growth_interval=100),
    )
    wrapped = DistributedDataParallel(model)
    steps = []
    with advisor.apply(plan, wrapped, optimizer) as applied:
        for k in range(3):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * k + rank))
            factor = 1e6 if (rank, k) == (0, 1) else 1.0
            (factor * wrapped(x).square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append([parameter.detach().clone() for parameter in model.parameters()])
    return {"steps": steps, "skipped": applied.loss_scaler.skipped, "changes": applied.loss_scaler.changes}


@pytest.mark.slow
def test_ranks_skip_the_same_steps_and_round_alike(tmp_path: Path) -> None:
    first, second = on_ranks(2, trained, tmp_path)
    assert first["skipped"] == second["skipped"] == 1
    assert first["changes"] == second["changes"] == [(0, 1024.0), (2, 512.0)]
    for one, other in zip(first["steps"], second["steps"], strict=True):
        assert all(map(torch.equal, one, other))
    assert all(map(torch.equal, first["steps"][0], first["steps"][1]))
    assert not all(map(torch.equal, first["steps"][1], first["steps"][2]))
