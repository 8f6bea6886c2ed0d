"""A small GPT: a pre-norm decoder-only transformer over tokens.

Shape suffixes: B batch, T positions, V vocabulary, D width, H heads, K width of a head.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

INIT_STD = 0.02  # GPT-2 (Radford et al. 2019); layers that write to the residual stream are scaled down below


class GPTConfig(BaseModel):
    """Sizes of a GPT. `vocabulary` null: as many tokens as the data has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: Annotated[int, Field(ge=1, le=24)] = 4
    heads: Annotated[int, Field(ge=1, le=32)] = 4
    width: Annotated[int, Field(ge=8, le=1024)] = 128
    context: Annotated[int, Field(ge=2, le=1024, description="longest sequence, in tokens")] = 64
    vocabulary: Annotated[int, Field(ge=2, le=65_536)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    tied: Annotated[bool, Field(description="the head shares the embedding's weight")] = False

    @model_validator(mode="after")
    def _heads_divide_width(self) -> GPTConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class Attention(nn.Module):
    """Causal self-attention, [B, T, D] to [B, T, D]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed_BHTK = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(mixed_BHTK.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Two layers with a GELU between, [B, T, D] to [B, T, D]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD)))


class Block(nn.Module):
    """Attention, then an MLP, each read through a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attn = nn.LayerNorm(config.width)
        self.attn = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attn(self.norm_attn(x_BTD)))
        return x_BTD + self.dropout(self.mlp(self.norm_mlp(x_BTD)))


class GPT(nn.Module):
    """Tokens int64 [B, T] to logits [B, T, V].

    A sequence longer than the context is an error of the caller.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocabulary is None:
            raise ValueError("GPT needs a vocabulary size; ArchitectureSpec.fitted_config fills it in from the data")
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self._initialise(config)
        if config.tied:
            self.head.weight = self.embed.weight

    def _initialise(self, config: GPTConfig) -> None:
        residual_std = INIT_STD / math.sqrt(2 * config.layers)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes_to_residual = name.endswith(("attn.out", "mlp.down"))
                nn.init.normal_(module.weight, std=residual_std if writes_to_residual else INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.dropout(self.embed(tokens_BT) + self.position(positions_T))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))
