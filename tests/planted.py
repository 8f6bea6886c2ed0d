"""A small net into which a test plants the cause of what is to be found."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Plant = Callable[[int, Tensor], Tensor]


def unchanged(step: int, x: Tensor) -> Tensor:
    return x


class Net(nn.Module):
    """Three layers; `between` is what happens to the values between the second's result and the third's input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.down = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.between: Plant = unchanged
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.up(x))))
        return self.down(self.between(self.step, x))
