"""Which matrix FLOPs pass beneath the hook unseen, in the forward pass and in the backward one.

In one recorded step a dispatch mode counts every operator that torch's FLOP table knows, wherever the hook leads to:
in the model's forward, in what the loss does outside of it, and in the backward passes. Those that run inside a product
the hook has met are its own, and so are those of the nodes that it left in the graph, known by their sequence numbers.
The rest are listed, with the module in whose forward they, or the nodes they belong to, were made. The mode calls each
operator unchanged.

Not counted, as in the sites: what runs without gradients, the optimizer's own products, and what activation
checkpointing recomputes. Sequence numbers are a thread's own: reentrant checkpointing on CUDA makes nodes in another
one, and then an operator of the backward may be laid to the wrong place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from probes.functions import in_custom_forward
from probes.names import in_backward
from probes.records import Coverage, Site
from probes.recurrent import HIDDEN

OUTSIDE = "(outside)"


def _rnn_layer_flops(input_shape: tuple[int, ...], *weights: tuple[int, ...], out_val: Any = None, **_: Any) -> int:
    """mkldnn_rnn_layer: at each position of [T, B, D], the product with the input's and the state's weights."""
    return 2 * prod(input_shape[:-1]) * (prod(weights[0]) + prod(weights[1]))


def _cudnn_rnn_flops(input_shape: tuple[int, ...], weights: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(input_shape[:-1]) * sum(prod(shape) for shape in weights if len(shape) == 2)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _grouped_flops(first: tuple[int, ...], second: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * prod(first[-2:]) * second[-1]


def _twice(count: Callable[..., int]) -> Callable[..., int]:
    """A backward pass has the two gradients of each product."""
    return lambda *args, **kwargs: 2 * count(*args, **kwargs)


# Operators that torch's table lacks (2.13).
_aten = torch.ops.aten
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _aten.mkldnn_rnn_layer: shape_wrapper(_rnn_layer_flops),
    _aten.mkldnn_rnn_layer_backward: shape_wrapper(_twice(_rnn_layer_flops)),
    _aten._cudnn_rnn: shape_wrapper(_cudnn_rnn_flops),
    _aten._cudnn_rnn_backward: shape_wrapper(_twice(_cudnn_rnn_flops)),
    _aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flops),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward_flops),
    _aten._grouped_mm: shape_wrapper(_grouped_flops),
}


class FlopsBeneath(TorchDispatchMode):
    """Counts the FLOPs of one step that no site holds, by (where, operator).

    It is entered where the model's forward or a backward pass starts, and left where that ends.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self._where = where
        self._inside = 0
        self._starts: list[int] = []  # of the nodes that a product has left, half-open spans in ascending order
        self._ends: list[int] = []
        self._made: list[tuple[int, str]] = []  # the node of an operator that was not seen, and where it was made
        self._forward: set[tuple[str, str]] = set()

    @contextmanager
    def seen(self) -> Iterator[None]:
        """What runs within is a site's, and so are the nodes that it leaves in the graph."""
        start = _next_node()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if _next_node() > start:
                self._starts.append(start)
                self._ends.append(_next_node())

    @contextmanager
    def outside(self) -> Iterator[_Outside]:
        """A call outside the model: it counts if the gradient goes through it, as the loss's own products do."""
        before, call = self.found.copy(), _Outside()
        with self:
            yield call
        if not call.trains:
            self.found = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = None if self._inside else _FLOPS.get(func.overloadpacket)
        if count is not None:
            name = str(func.overloadpacket)
            where = self._of_nobody(name)
            if where is not None:
                self.found[where, name] += int(count(*args, **(kwargs or {}), out_val=result))
        return result

    def coverage(self, seen_flops: float, sites: Iterable[Site]) -> Coverage:
        """Given the FLOPs that sites had in the same step; `sites` are those of the window."""
        unseen = sum(self.found.values())
        total = seen_flops + unseen
        entries: list[dict[str, Any]] = [
            {"where": where, "op": op, "flops": float(flops)} for (where, op), flops in self.found.most_common() if flops
        ]
        for site in sites:
            hidden = sum(product.flops for product in site.products if HIDDEN in product.operands)
            if hidden:
                entries.append({"where": site.name, "op": f"aten.{site.op}", "flops": hidden, "site": site.name})
        return Coverage(seen_flops / total if total else float("nan"), tuple(entries))

    def _of_nobody(self, op: str) -> str | None:
        """Where an operator that just ran belongs; None if a site has it, or if it is not counted."""
        where = self._where()
        if not in_backward():
            if not (torch.is_grad_enabled() or in_custom_forward()):
                return None
            self._made.append((_next_node() - 1, where))
            self._forward.add((where, op))
            return where
        if where != OUTSIDE:  # inside a module's forward: recomputed
            return None if (where, op) in self._forward else where
        node = torch._C._current_autograd_node()
        number = None if node is None else node._sequence_nr()
        if number is None:
            return OUTSIDE
        at = bisect_right(self._starts, number) - 1
        if at >= 0 and number < self._ends[at]:
            return None
        at = bisect_right(self._made, number, key=lambda made: made[0]) - 1
        return self._made[at][1] if at >= 0 else OUTSIDE


class _Outside:
    """Whether a call's result has a gradient."""

    trains = False

    def keep(self, result: Any) -> None:
        parts = result if isinstance(result, (tuple, list)) else (result,)
        self.trains = any(isinstance(part, Tensor) and part.requires_grad for part in parts)


def _next_node() -> int:
    """The sequence number that this thread's next node of the graph will have."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number
