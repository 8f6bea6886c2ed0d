"""The site hook: one mechanism to see every matrix product of a model, and to act on it.

A TorchFunctionMode meets each torch function with its arguments in their positions, so the roles of a product's
operands are explicit, whichever module calls it and however. What a subclass does there is its own affair: the
window records, `advisor.apply` casts. Three things need care (true for torch 2.9 to 2.13):

- A composite Python function is one call to the mode and opaque within. The ones in `COMPOSITE` are called as copies
  whose `has_torch_function*` say no, with the mode entered again, so that their inner calls are met one by one.
- While a call is handled the mode is off. `backward` is such a composite, entered again for the same reason: what
  activation checkpointing recomputes inside it is met too.
- The mode is a thread's own. A module that is entered in a thread where the mode is not active (autograd's on CUDA)
  enters it, and leaves it on the way out.

A parametrized or quantized weight is no parameter by identity; in a linear layer or a convolution its position still
makes it the weight, and the site is then named by its place in the module that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from probes.names import ROOT, Frame, ModuleStack, ParameterOwners, in_backward
from probes.ops import OPERATIONS, Operation
from probes.records import Product

COMPOSITE = frozenset({F.multi_head_attention_forward, torch.Tensor.backward, torch.autograd.backward})


@dataclass
class ProductCall:
    """One matrix product as the hook meets it, before it is run.

    `operands` left to right, `roles` beside them; `recomputing`: met inside the backward pass, so it repeats a
    product that was met before. `run()` executes it, `run(operands)` with others in their place.
    """

    site: str
    operation: Operation
    roles: tuple[str, ...]
    operands: list[Tensor]
    parameter: str | None
    recomputing: bool
    function: Callable[..., Any]
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)

    def run(self, operands: Sequence[Tensor] | None = None) -> Tensor:
        """The product's result."""
        if operands is None:
            result: Tensor = self.function(*self.args, **self.kwargs)
        else:
            args, kwargs = self.operation.replace(self.args, self.kwargs, operands)
            result = self.function(*args, **kwargs)
        return result

    def plain(self, operands: Sequence[Tensor]) -> Tensor:
        """The product of other operands, without bias, addend or dropout."""
        return self.operation.plain(self.function, self.args, self.kwargs, operands)

    def products(self, result: Tensor) -> list[Product]:
        """The forward product and the backward products that autograd will ask for, with their FLOPs."""
        return self.operation.products(self.roles, self.operands, result, self.args)


class SiteHook(TorchFunctionMode, AbstractContextManager["SiteHook"]):
    """Meets every matrix product of `model` while entered; subclasses override the `on_` methods.

    Entering puts forward hooks on the model's modules and leaving takes them off, whatever happened in between.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.owners = ParameterOwners(model)
        self.stack = ModuleStack(model, self._entered)
        self._depth = 0
        self._nested = False

    # What subclasses override. Each must return what the call returns.

    def on_product(self, call: ProductCall) -> Tensor:
        """A matrix product inside the model's forward."""
        return call.run()

    def on_other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any other torch function, inside the model or around it."""
        return function(*args, **kwargs)

    def on_traced(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call inside a graph that torch.compile is making: only what can be traced may be done."""
        return function(*args, **kwargs)

    def on_unplaced(self, operation: Operation) -> None:
        """A product in the backward pass outside any module's forward: a checkpointed function's own, recomputed."""

    def on_backward(self, root: Any) -> None:
        """A backward pass starts, from a tensor or several."""

    def on_forward(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The root module's forward is entered, outside the backward pass."""

    # The mechanism.

    def __enter__(self) -> Any:
        if self._depth == 0:
            self.stack.attach()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._depth -= 1
        if self._depth == 0:
            self.stack.detach()
        return super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return self.on_traced(func, args, kwargs)
        operation = OPERATIONS.get(func)
        if operation is not None:
            if self.stack.frames:
                call = self._product_call(func, operation, args, kwargs)
                if call is not None:
                    return self.on_product(call)
            elif in_backward():
                self.on_unplaced(operation)
        if func in COMPOSITE:
            if func is not F.multi_head_attention_forward and not self._nested:
                self.on_backward(args[0] if args else kwargs.get("tensors"))
            with self, self._within():
                return _seen_inside(func)(*args, **kwargs)
        return self.on_other(func, args, kwargs)

    @contextmanager
    def _within(self) -> Iterator[None]:
        """`Tensor.backward` calls `torch.autograd.backward`: one backward pass, not two."""
        before, self._nested = self._nested, True
        try:
            yield
        finally:
            self._nested = before

    def _product_call(
        self, func: Callable[..., Any], operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ProductCall | None:
        operands = operation.read(args, kwargs)
        if operands is None or not all(map(_is_dense_floating, operands)):
            return None
        frame = self.stack.frames[-1]
        owners = [self.owners.of(operand, frame.path) for operand in operands]
        weights = [i for i, owned in enumerate(owners) if owned is not None]
        if operation.roles is not None:
            roles = operation.roles
            weights = [i for i in weights if roles[i] == "weight"]
        elif len(weights) == 1:
            roles = ("weight", "input") if weights[0] == 0 else ("input", "weight")
        else:
            roles = ("lhs", "rhs")
        owned = owners[weights[0]] if len(weights) == 1 else None
        if owned is None:
            site = f"{frame.path}/{operation.name}.{frame.met[operation.name]}"
            frame.met[operation.name] += 1
        else:
            site = owned.site
        return ProductCall(
            site=site,
            operation=operation,
            roles=roles,
            operands=operands,
            parameter=None if owned is None else owned.dotted,
            recomputing=in_backward(),
            function=func,
            args=args,
            kwargs=kwargs,
        )

    def _entered(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not any(mode is self for mode in _get_current_function_mode_stack()):
            TorchFunctionMode.__enter__(self)
            frame.leave = lambda: TorchFunctionMode.__exit__(self, None, None, None)
        if frame.path == ROOT and not in_backward():
            self.on_forward(frame, args, kwargs)


def _is_dense_floating(operand: Tensor) -> bool:
    return operand.is_floating_point() and operand.layout == torch.strided


_seen: dict[Callable[..., Any], Callable[..., Any]] = {}


def _seen_inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a Python function that does not ask for overrides itself, so that its inner calls are met."""
    if function not in _seen:
        original: Any = function
        silent = {name: _no for name in original.__globals__ if name.startswith("has_torch_function")}
        copy = FunctionType(
            original.__code__,
            {**original.__globals__, **silent},
            original.__name__,
            original.__defaults__,
            original.__closure__,
        )
        copy.__kwdefaults__ = original.__kwdefaults__
        _seen[function] = copy
    return _seen[function]


def _no(*_: Any) -> bool:
    return False
