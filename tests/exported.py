"""A small model, its window, and plans of given casts: what the tests of exports share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

import advisor
from advisor.plan import Plan
from probes.window import Window

E4M3, E5M2 = "e4m3fn/tensor/current/nearest", "e5m2/tensor/current/nearest"
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, middle=nn.Linear):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(32, 64), middle(64, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))
"""


@cache
def small_window() -> Window:
    """Two steps of Net."""
    space: dict[str, Any] = {}
    exec(MODEL, space)
    torch.manual_seed(0)
    model = space["Net"]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with advisor.probe(model, optimizer, steps=2, curvature_steps=0) as seen:
        for _ in range(2):
            nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(16, (16,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen


def plan_of(window: Window, casts: dict[tuple[str, str], str], **changes: Any) -> Plan:
    data = advisor.uniform(window, input="fp32/none").to_dict() | changes
    for one in data["assignments"]:
        one["cast"] = casts.get((one["site"], one["role"]), one["cast"])
    return Plan.from_dict(data)


def layer(name: str, *casts: str) -> dict[tuple[str, str], str]:
    return {(name, role): cast for role, cast in zip(("input", "weight", "grad_output"), casts, strict=True)}


def plan_for(model: nn.Module, classes: int) -> Plan:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with advisor.probe(model, optimizer, steps=1, curvature_steps=0) as seen:
        nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(classes, (16,))).backward()
        optimizer.step()
    return advisor.uniform(seen, input="e4m3fn", weight="e4m3fn", grad_output="e5m2")


def small_plan(window: Window) -> Plan:
    """The first layer in fp8 throughout, the second in its forward product and its input's gradient, the third not."""
    return plan_of(window, layer("first", E4M3, E4M3, E5M2) | layer("middle", "e4m3fn/row", "e4m3fn/row", "bf16/none"))
