"""Tensors that tests share: the awkward ones a sketch or a cast must not stumble over."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from probes.history import SlotHistory
from probes.relative_history import RelativeHistory


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_nonfinite() -> Tensor:
    """5,000 normal values with a NaN, both infinities, both zeros, and a subnormal."""
    x = torch.randn(5000, generator=generator(1))
    x[3], x[77], x[78] = float("nan"), float("inf"), -float("inf")
    x[100:300], x[5], x[6] = 0.0, 1e-44, -0.0
    return x


def same_history(a: SlotHistory, b: SlotHistory) -> bool:
    """Equal in every number, those of the finer sketches included."""
    whole = all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name != "finer")
    return whole and a.finer.keys() == b.finer.keys() and all(same_finer(a.finer[k], b.finer[k]) for k in a.finer)


def same_finer(a: RelativeHistory, b: RelativeHistory) -> bool:
    return all(np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))


AWKWARD: dict[str, Tensor] = {
    "rows": torch.randn(1000, 37, generator=generator(2)),
    "odd length": torch.randn(4099, generator=generator(3)),
    "subnormal": torch.randn(100, 37, generator=generator(4)) * 1e-41,
    "nonfinite": with_nonfinite(),
    "bf16": torch.randn(64, 64, generator=generator(5)).bfloat16(),
    "fp16 strided": torch.randn(64, 64, generator=generator(6)).half().t()[:, ::3],
    "fp64": torch.randn(300, generator=generator(7), dtype=torch.float64),
    "permuted": torch.randn(40, 20, 30, generator=generator(8)).permute(2, 0, 1),
    "expanded": torch.randn(10, 1, 30, generator=generator(9)).expand(10, 5, 30),
    "channels last": torch.randn(4, 3, 8, 8, generator=generator(10)).contiguous(memory_format=torch.channels_last),
    "few values": torch.arange(17.0) / 16,
    "all NaN": torch.full((5000,), float("nan")),
    "all zero": torch.zeros(7),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "any bits": torch.randint(0, 2**32, (100_003,), generator=generator(11)).to(torch.int32).view(torch.float32),
}
