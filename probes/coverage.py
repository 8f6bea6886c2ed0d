"""Which matrix FLOPs passed beneath the hook unseen.

While the root module's forward runs once, a dispatch mode counts every operator that torch's FLOP table knows. Those
that run inside a product the hook has met are its own; the rest are listed, with the module they ran in. Only the
forward pass is counted: a backward product follows from its forward one. The mode calls each operator unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from probes.records import Coverage


class FlopsUnseen(TorchDispatchMode):
    """Counts FLOPs of operators that run while `inside` is False, by (where, operator)."""

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where = where
        self.inside = False
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = None if self.inside else flop_registry.get(func.overloadpacket)
        if count is not None and torch.is_grad_enabled():
            flops = count(*args, **(kwargs or {}), out_val=result)
            self.found[self.where(), str(func.overloadpacket)] += flops
        return result


def coverage_of(seen_flops: float, unseen: Counter[tuple[str, str]]) -> Coverage:
    """The share of forward FLOPs that sites hold."""
    total = seen_flops + sum(unseen.values())
    entries = [{"where": where, "op": op, "flops": float(flops)} for (where, op), flops in unseen.most_common()]
    return Coverage(seen_flops / total if total else float("nan"), tuple(entries))
