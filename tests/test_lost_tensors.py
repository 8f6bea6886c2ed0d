"""A cast that loses the whole tensor is dear, even where the loss is blind to its size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import advisor


def test_a_weight_that_is_flushed_before_a_batch_norm_costs_something() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert float(model[0].weight.detach().abs().max()) < 0.5  # int8 without a scale makes it all zero
    with advisor.probe(model, optimizer, steps=4, curvature_steps=4, casts=["e4m3fn", "e5m2", "int8/none"]) as window:
        for _ in range(4):
            x = torch.randn(64, 8)
            optimizer.zero_grad()
            F.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
    rows = {row["cast"]: row for row in advisor.score(window, ["e5m2", "int8/none"]).of("0", "weight")}
    small, lost = rows["e5m2/tensor/current/nearest"], rows["int8/none/nearest"]
    assert lost["underflow"] == 1
    assert window.evidence("0", "weight").directional["int8/none/nearest"] < 0.1 * lost["damage"]
    assert lost["damage"] > 30 * small["damage"] > 0
    assert (small["damage_from"], lost["damage_from"]) == ("directional", "sketch")
