"""Which matrix FLOPs passed beneath the hook unseen.

While the root module's forward runs once, a dispatch mode counts every operator that torch's FLOP table knows. Those
that run inside a product the hook has met are its own; the rest are listed, with the module they ran in. Only the
forward pass is counted: a backward product follows from its forward one. The mode calls each operator unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from probes.records import Coverage


def _rnn_layer_flops(input_shape: tuple[int, ...], *weights: tuple[int, ...], out_val: Any = None, **_: Any) -> int:
    """mkldnn_rnn_layer: at each position of [T, B, D], the product with the input's and the state's weights."""
    return 2 * prod(input_shape[:-1]) * (prod(weights[0]) + prod(weights[1]))


def _cudnn_rnn_flops(input_shape: tuple[int, ...], weights: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(input_shape[:-1]) * sum(prod(shape) for shape in weights if len(shape) == 2)


# torch's table has no fused recurrent operators (2.13).
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten.mkldnn_rnn_layer: shape_wrapper(_rnn_layer_flops),
    torch.ops.aten._cudnn_rnn: shape_wrapper(_cudnn_rnn_flops),
}


class FlopsUnseen(TorchDispatchMode):
    """Counts FLOPs of operators that run while `inside` is False, by (where, operator)."""

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where = where
        self.inside = False
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = None if self.inside else _FLOPS.get(func.overloadpacket)
        if count is not None and torch.is_grad_enabled():
            flops = count(*args, **(kwargs or {}), out_val=result)
            self.found[self.where(), str(func.overloadpacket)] += flops
        return result


def coverage_of(seen_flops: float, unseen: Counter[tuple[str, str]], forwards: float) -> Coverage:
    """The share of one forward pass's FLOPs that sites hold; `forwards` a step make the unseen ones a step's."""
    total = seen_flops + sum(unseen.values())
    entries = [
        {"where": where, "op": op, "flops": float(flops * forwards)} for (where, op), flops in unseen.most_common()
    ]
    return Coverage(seen_flops / total if total else float("nan"), tuple(entries))
