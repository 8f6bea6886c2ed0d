"""The small models of the suite. Each plants one cause and is otherwise an ordinary training.

Shape suffixes: B batch, T positions, D width, V vocabulary, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, HIDDEN, CLASSES, PIXELS = 96, 64, 128, 10, 64


class CharModel(nn.Module):
    """The next character from the two before: tokens int64 [B, T] to logits [B, T - 1, V]; healthy as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.out_norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def pairs(self, tokens_BT: Tensor) -> Tensor:
        """The embeddings of each character and the one before it, [B, T - 1, 2D]."""
        x_BTD = self.embed(tokens_BT)
        return torch.cat([x_BTD[:, :-1], x_BTD[:, 1:]], dim=-1)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = torch.tanh(self.mix(self.pairs(tokens_BT)))
        x_BTD = x_BTD + self.down(F.gelu(self.up(self.norm(x_BTD))))
        logits: Tensor = self.head(self.out_norm(x_BTD))
        return logits


class WideChannels(CharModel):
    """A norm whose gain is 300 times larger in three channels, as outlying channels of language models come about; the
    weights that read them are as much smaller, so that the function is that of the healthy model."""

    def __init__(self, channels: tuple[int, ...] = (5, 23, 41), times: float = 300.0) -> None:
        super().__init__()
        with torch.no_grad():
            self.norm.weight[list(channels)] *= times
            self.up.weight[:, list(channels)] /= times


class SquaredReLU(CharModel):
    """A squared ReLU on values that no norm has levelled: tokens have embeddings of log-normal lengths, which the
    square makes a tail. The norm comes after."""

    def __init__(self, sigma: float = 1.5) -> None:
        super().__init__()
        self.mix = nn.Linear(2 * WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        generator = torch.Generator().manual_seed(7)
        self.register_buffer("length", (sigma * torch.randn(VOCABULARY, 1, generator=generator)).exp())

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT) * self.length[tokens_BT]  # type: ignore[index]
        x_BTD = torch.cat([x_BTD[:, :-1], x_BTD[:, 1:]], dim=-1)
        logits: Tensor = self.head(self.out_norm(self.down(F.relu(self.mix(x_BTD)) ** 2)))
        return logits


class Tied(CharModel):
    """A head that is the embedding. Two channels of it hold one large constant, which the lookups use as a bias does,
    and which adds the same to all logits."""

    def __init__(self, constant: float = 60.0) -> None:
        super().__init__()
        with torch.no_grad():
            self.embed.weight *= 0.2
            self.embed.weight[:, :2] = constant
            self.mix.weight[:, [0, 1, WIDTH, WIDTH + 1]] /= constant
        self.head.weight = self.embed.weight


class DigitModel(nn.Module):
    """Images float32 [B, 1, 8, 8] to logits [B, C]; healthy as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(PIXELS, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.first(images.flatten(1)))
        logits: Tensor = self.head(F.relu(self.second(x)))
        return logits


class Sensor(DigitModel):
    """BatchNorm behind a layer that reads raw counts of a 16-bit sensor."""

    def __init__(self, counts: float = 4096.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)
        self.counts = counts

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(self.counts * images.flatten(1))))
        logits: Tensor = self.head(F.relu(self.second(x)))
        return logits


class Rising(DigitModel):
    """Features that double every third step for ten times, then start over; the head's result is divided by as much."""

    def __init__(self, every: int = 3, times: int = 10) -> None:
        super().__init__()
        self.every, self.times, self.step = every, times, 0

    def forward(self, images: Tensor) -> Tensor:
        factor = 2.0 ** (self.step // self.every % self.times)
        x = torch.tanh(4 * self.second(F.relu(self.first(images.flatten(1)))))
        logits: Tensor = self.head(factor * x) / factor
        return logits


class UnitLinear(nn.Linear):
    """Weights of variance 1, and the product divided by √inputs (as in unit scaling and the NTK parametrization)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None) / self.in_features**0.5 + self.bias


class UnitDigits(DigitModel):
    """Weights of variance 1, for which a usual learning rate makes very small updates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = UnitLinear(PIXELS, HIDDEN), UnitLinear(HIDDEN, HIDDEN)
        self.head = UnitLinear(HIDDEN, CLASSES)
