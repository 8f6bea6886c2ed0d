"""The six networks, in a few lines each: what the benchmark's trainings train.

Shape suffixes: B batch, T positions, D width, H heads, K width of a head, V letters, C channels, N classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CharGPT(nn.Module):
    """GPT-2's form: learned positions, LayerNorm, one matrix for query, key and value, GELU. [B, T] to [B, T, V]."""

    def __init__(self, letters: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, letters, bias=False)

    def forward(self, x_BT: Tensor) -> Tensor:
        h_BTD = self.letters(x_BT) + self.places.weight[: x_BT.shape[1]]
        for block in self.blocks:
            h_BTD = block(h_BTD)
        return self.head(self.norm(h_BTD))


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a shortcut. [B, T, D] to the same."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        qkv = self.qkv(self.norm1(x_BTD)).view(b, t, 3, self.heads, d // self.heads)
        q_BHTK, k_BHTK, v_BHTK = qkv.permute(2, 0, 3, 1, 4)
        seen_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=self.causal)
        x_BTD = x_BTD + self.out(seen_BHTK.transpose(1, 2).reshape(b, t, d))
        return x_BTD + self.down(F.gelu(self.up(self.norm2(x_BTD))))


class Llama(nn.Module):
    """Llama's form: RMSNorm, rotary positions, SwiGLU, no biases; attention by two matmuls. [B, T] to [B, T, V]."""

    def __init__(self, letters: int, length: int, width: int, heads: int, layers: int, hidden: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.layers = nn.ModuleList(LlamaLayer(length, width, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, letters, bias=False)

    def forward(self, x_BT: Tensor) -> Tensor:
        h_BTD = self.letters(x_BT)
        for layer in self.layers:
            h_BTD = layer(h_BTD)
        return self.head(self.norm(h_BTD))


class LlamaLayer(nn.Module):
    """One layer of it. [B, T, D] to the same."""

    def __init__(self, length: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        half = width // heads // 2
        angles = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("ahead", torch.ones(length, length, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        y_BTD = self.norm1(x_BTD)
        q, k, v = (part(y_BTD).view(b, t, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        q_BHTK, k_BHTK = self._turned(q), self._turned(k)
        scores_BHTT = torch.matmul(q_BHTK, k_BHTK.transpose(2, 3)) / q.shape[-1] ** 0.5
        shares_BHTT = scores_BHTT.masked_fill(self.ahead[:t, :t], -torch.inf).softmax(-1)
        x_BTD = x_BTD + self.o(torch.matmul(shares_BHTT, v).transpose(1, 2).reshape(b, t, d))
        y_BTD = self.norm2(x_BTD)
        return x_BTD + self.down(F.silu(self.gate(y_BTD)) * self.up(y_BTD))

    def _turned(self, x_BHTK: Tensor) -> Tensor:
        one, other = x_BHTK.chunk(2, dim=-1)
        cos, sin = self.cos[: x_BHTK.shape[2]], self.sin[: x_BHTK.shape[2]]
        return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


class ConvNet(nn.Module):
    """A residual network with BatchNorm. [B, 1, 28, 28] to [B, N]."""

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        before = (widths[0], *widths)
        self.blocks = nn.ModuleList(Residual(b, w) for b, w in zip(before, widths, strict=False))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.relu(self.norm(self.stem(x_BCHW)))
        for block in self.blocks:
            h_BCHW = block(h_BCHW)
        return self.head(h_BCHW.mean(dim=(2, 3)))


class Residual(nn.Module):
    """Two 3×3 convolutions beside a shortcut; halves the image where it gets wider."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        return F.relu(self.norm2(self.conv2(y_BCHW)) + self.shortcut(x_BCHW))


class ViT(nn.Module):
    """Patches of 7×7 by a convolution, a token for the class, the blocks of the GPT. [B, 1, 28, 28] to [B, N]."""

    def __init__(self, width: int, heads: int, layers: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BTD = self.patches(x_BCHW).flatten(2).transpose(1, 2)
        h_BTD = torch.cat([self.token.expand(len(h_BTD), -1, -1), h_BTD], dim=1) + self.places
        for block in self.blocks:
            h_BTD = block(h_BTD)
        return self.head(self.norm(h_BTD[:, 0]))


class CharLSTM(nn.Module):
    """Letters, two layers of torch's fused LSTM, a linear head. [B, T] to [B, T, V]."""

    def __init__(self, letters: int, width: int, hidden: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(letters, width)
        self.lstm = nn.LSTM(width, hidden, num_layers=2, batch_first=True)
        self.mix = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, letters)

    def forward(self, x_BT: Tensor) -> Tensor:
        h_BTD, _ = self.lstm(self.letters(x_BT))
        return self.head(F.gelu(self.mix(h_BTD)))


class Completion(nn.Module):
    """The lower half of an image from its upper half, [B, 392] to [B, 392]: layers beside shortcuts, GELU."""

    def __init__(self, pixels: int, width: int, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(pixels, width)
        self.middle = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.last = nn.Linear(width, pixels)

    def forward(self, x_BD: Tensor) -> Tensor:
        h_BD = F.gelu(self.first(x_BD))
        for linear, norm in zip(self.middle, self.norms, strict=True):
            h_BD = h_BD + F.gelu(linear(norm(h_BD)))
        return self.last(h_BD)
