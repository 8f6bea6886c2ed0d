"""Small models and trainings that tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.ReLU(inplace=True), nn.Linear(32, 10))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 16, 10),
    )


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 10))


INPUTS: dict[Callable[[], nn.Module], tuple[int, ...]] = {mlp: (16,), convnet: (1, 8, 8), encoder: (7, 16)}


def batches(build: Callable[[], nn.Module], count: int, size: int = 24) -> Iterator[Batch]:
    """From the global random stream, as a careless training loop would."""
    for _ in range(count):
        x = torch.randn(size, *INPUTS[build])
        positions = x.shape[:2] if build is encoder else x.shape[:1]
        yield x, torch.randint(0, 10, positions)


def train(
    build: Callable[[], nn.Module],
    steps: int,
    watch: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> tuple[nn.Module, list[float], Any]:
    """A fresh model after some steps, its losses, and what `watch` gave (a context entered around the steps)."""
    torch.manual_seed(0)
    model = build()
    stepper = optimizer(model.parameters(), lr=1e-2)
    losses = []
    with nullcontext() if watch is None else watch(model, stepper) as watched:
        for x, target in batches(build, steps):
            loss = F.cross_entropy(model(x).flatten(0, -2), target.flatten())
            loss.backward()
            stepper.step()
            stepper.zero_grad()
            losses.append(loss.item())
    return model, losses, watched
