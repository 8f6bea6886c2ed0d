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

import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

from probes.functions import in_custom_forward
from probes.names import Frame, in_backward
from probes.records import Coverage, Site
from probes.recurrent import INSIDE

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

    It is entered where the model's forward or a backward pass starts, and left where that ends. `frame`: the module
    that is being run, if one is.
    """

    supports_higher_order_operators = True

    def __init__(self, frame: Callable[[], Frame | None]) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.trouble: str | None = None
        self._frame = frame
        self._local = threading.local()
        self._inside = 0
        self._made: list[_Made] = []  # in ascending order
        self._forward: set[tuple[str, str]] = set()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Off while torch.compile compiles, on when the result runs; else it would not compile at all (2.13)."""
        return True

    def __enter__(self) -> Any:
        """Again is harmless: the mode is entered once a thread, and autograd's threads inherit it."""
        entered = not any(mode is self for mode in _get_current_dispatch_mode_stack())
        self._local.__dict__.setdefault("entered", []).append(entered)
        return super().__enter__() if entered else self

    def __exit__(self, *error: Any) -> None:
        if self._local.entered.pop():
            super().__exit__(*error)

    @contextmanager
    def seen(self) -> Iterator[None]:
        """What runs within is a site's, and so are the nodes that it leaves in the graph."""
        start, where = _next_node(), self._where()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            if _next_node() > start:
                self._made.append(_Made(start, _next_node(), where))

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
        operator = func.overloadpacket if isinstance(func, torch._ops.OpOverload) else func
        count = None if self._inside else _FLOPS.get(operator)
        if count is not None:
            name = str(operator)
            try:
                where = self._of_nobody(name)
                if where is not None:
                    self.found[where, name] += int(count(*args, **(kwargs or {}), out_val=result))
            except Exception as error:  # the user's own work is done: it goes on, and the window says so
                self.trouble = f"FLOPs of {name} were not counted: {type(error).__name__}: {error}"
        return result

    def coverage(self, seen_flops: float, sites: Iterable[Site]) -> Coverage:
        """Given the FLOPs that sites had in the same step; `sites` are those of the window."""
        unseen = sum(self.found.values())
        total = seen_flops + unseen
        entries: list[dict[str, Any]] = [
            {"where": where, "op": op, "flops": float(flops)}
            for (where, op), flops in self.found.most_common()
            if flops
        ]
        for site in sites:
            hidden = sum(product.flops for product in site.products if INSIDE & {*product.operands})
            if hidden:
                entries.append({"where": site.name, "op": f"aten.{site.op}", "flops": hidden, "site": site.name})
        return Coverage(seen_flops / total if total else float("nan"), tuple(entries))

    def _where(self) -> str:
        frame = self._frame()
        return OUTSIDE if frame is None else frame.path

    def _of_nobody(self, op: str) -> str | None:
        """Where an operator that just ran belongs; None if a site has it, or if it is not counted."""
        frame = self._frame()
        if not in_backward():
            if not (torch.is_grad_enabled() or (frame is not None and frame.trains and in_custom_forward())):
                return None
            where = self._where()
            self._note_node(where)
            self._forward.add((where, op))
            return where
        if frame is not None and frame.recomputes:
            return None if (frame.path, op) in self._forward else frame.path
        made = self._made_before(torch._C._current_autograd_node())
        if torch.is_grad_enabled():  # the backward pass is kept, to be differentiated itself
            self._note_node(OUTSIDE if made is None else made.where)
        return OUTSIDE if made is None else None if made.of_a_site else made.where

    def _note_node(self, where: str) -> None:
        """The latest node is that of the operator that is running, unless a product left it: then this one has none."""
        latest = _next_node() - 1
        if not self._made or self._made[-1].end is None or latest >= self._made[-1].end:
            self._made.append(_Made(latest, None, where))

    def _made_before(self, node: Any) -> _Made | None:
        """What left this node in the graph: a site's product, or else the operator that was met latest before."""
        number = -1 if node is None else node._sequence_nr()
        at = bisect_right(self._made, number, key=lambda made: made.start) - 1
        if at < 0:
            return None
        made = self._made[at]
        return made if made.end is None or number < made.end else made._replace(end=None)


class _Made(NamedTuple):
    """Nodes of the graph from `start` to before `end`, left by a site; without an end, by what no site has."""

    start: int
    end: int | None
    where: str

    @property
    def of_a_site(self) -> bool:
        return self.end is not None


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
