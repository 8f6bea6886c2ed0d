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

- A custom autograd function multiplies in its own `forward` and `backward`, without a graph between them. A product in
  its forward is a site like any other (`opaque`). A product in its backward, in the same thread, is that site's if one
  of its operands is an operand of the forward product: the other is the site's `grad_output` (`functions.py`).

A parametrized or quantized weight is no parameter by identity; in a linear layer or a convolution its position still
makes it the weight, and the site is then named by its place in the module that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _get_function_stack_at, _len_torch_function_stack
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from probes.contents import contents, copies, hookable, is_batch, is_readable, with_contents
from probes.coverage import FlopsBeneath
from probes.functions import CustomFunctions, FunctionProduct, in_custom_forward
from probes.names import ROOT, Frame, ModuleStack, Owned, ParameterOwners, in_backward
from probes.operation import Arguments, Operation, argument, replaced
from probes.ops import COMPILED, operation_of
from probes.records import Product

BACKWARD = frozenset({torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad})
UNREAD = "something of this step could not be read"
COMPOSITE = BACKWARD | {F.multi_head_attention_forward, *filter(None, [getattr(F, "linear_cross_entropy", None)])}


@dataclass
class ProductCall:
    """One matrix product as the hook meets it, before it is run.

    `operands` left to right, `roles` beside them; a sparse or jagged operand is given by its stored values.
    `weights`: the roles that are parameters or views of one. `parameter`: the dotted name of the one that is.
    `recomputing`: met inside the backward pass, so it repeats a product that was met before. `opaque`: met in the
    forward of a custom autograd function, so that no gradient will reach the result. `run()` executes it,
    `run(operands)` with others in their place.
    """

    site: str
    operation: Operation
    roles: tuple[str, ...]
    operands: list[Tensor]
    weights: frozenset[str]
    parameter: str | None
    recomputing: bool
    opaque: bool
    function: Callable[..., Any]
    args: tuple[Any, ...] = field(repr=False)
    kwargs: dict[str, Any] = field(repr=False)
    given: list[Tensor] = field(repr=False)  # the operands as they were passed, in their own layouts

    def run(self, operands: Sequence[Tensor] | None = None) -> Any:
        """The call's result: a tensor, or what the function returns (a recurrent layer's is a tuple)."""
        if operands is None:
            return self.function(*self.args, **self.kwargs)
        args, kwargs = self.operation.replace(self.args, self.kwargs, self._laid_out(operands))
        return self.function(*args, **kwargs)

    def plain(self, operands: Sequence[Tensor]) -> Tensor:
        """The product of other operands, without bias, addend or dropout; where `operation.replayable`."""
        return self.operation.plain(self.function, self.args, self.kwargs, self._laid_out(operands))

    def joined(self, results: Sequence[Tensor]) -> Tensor:
        """The call's results as one tensor of the shape that `plain` gives."""
        return self.operation.joined(results, self.args)

    def apart(self, joined: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """The results of these shapes that `joined` made one tensor."""
        return self.operation.apart(joined, shapes, self.args)

    def results(self, result: Any) -> list[Tensor]:
        """The tensors of the result that have a gradient: the site's grad_output."""
        parts = (hookable(part) for part in self.operation.results(result))
        return [part for part in parts if part is not None]

    def leaves(self) -> dict[str, int]:
        """For the backward products that make the gradient of a leaf of the graph: the leaf's id."""
        sources = [operand if operand._base is None else operand._base for operand in self.given]
        return {f"{role}_grad": id(source) for role, source in zip(self.roles, sources, strict=True) if source.is_leaf}

    @property
    def replayable(self) -> bool:
        """Whether `plain` works and a gradient reaches the result, as the measurements of scored steps need."""
        replayable = self.operation.can_replay(self.args, self.kwargs)
        return replayable and not self.opaque and not any(map(is_batch, self.given))

    def products(self, result: Any) -> list[Product]:
        """The forward product and the backward products that autograd will ask for, with their FLOPs."""
        found = self.operation.products(self.roles, self.given, result, self.args, self.kwargs)
        times = copies(self.given)
        return found if times == 1 else [replace(product, flops=times * product.flops) for product in found]

    def _laid_out(self, operands: Sequence[Tensor]) -> list[Tensor]:
        return [with_contents(given, values) for given, values in zip(self.given, operands, strict=True)]


class SiteHook(TorchFunctionMode, AbstractContextManager["SiteHook"]):
    """Meets every matrix product of `model` while entered; subclasses override the `on_` methods.

    Entering puts forward hooks on the model's modules and leaving takes them off, whatever happened in between.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.owners = ParameterOwners(model)
        self.stack = ModuleStack(model, self._entered)
        self.functions = CustomFunctions()
        self.beneath: FlopsBeneath | None = None  # counts what passes beneath the hook, while a subclass sets it
        self.leaves: frozenset[int] | None = None  # ids of those that the backward pass goes to; None: all
        self.heeded: frozenset[Callable[..., Any]] | None = None  # what `on_other` has to meet; None: everything
        self.attends = True  # whether products have to be met; else they run as if nobody were there
        self._depth = 0
        self._resting = False
        self._nested = False
        self._begun = False  # a forward pass, since the latest backward pass

    # What subclasses override. Each must return what the call returns.

    def on_product(self, call: ProductCall) -> Any:
        """A matrix product inside the model's forward."""
        return call.run()

    def on_function_gradient(self, product: FunctionProduct, role: str, gradient: Tensor) -> None:
        """The backward of a custom function makes the gradient of `role` at a product of its forward, from `gradient`
        at that product's result."""

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
        """The root module's forward is entered, outside the backward pass; where a training calls its parts alone, the
        first of them."""

    def reached(self, products: Sequence[Product], leaves: Mapping[str, int]) -> list[Product]:
        """Of a call's backward products those that the backward pass that is running makes; `leaves` are the call's."""
        goal = self.leaves
        return [one for one in products if goal is None or one.name not in leaves or leaves[one.name] in goal]

    def on_trouble(self, what: str, error: Exception) -> None:
        """Work of our own beside a user's call has failed. Unless a subclass knows better, nobody is left in doubt."""
        raise error

    # The mechanism.

    def __enter__(self) -> Any:
        if self._depth == 0:
            self.stack.attach()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._depth -= 1
        if self._depth == 0:
            self.stack.unwind()
            self.stack.detach()
            leave_mode(self)
            self._resting = False
            return None
        return super().__exit__(*error)

    def rest(self) -> None:
        """Meet nothing in this thread until `resume`: the optimizer's step calls hundreds of functions, no product.

        Does nothing where another mode lies above this one.
        """
        modes = _get_current_function_mode_stack()
        if modes and modes[-1] is self:
            TorchFunctionMode.__exit__(self, None, None, None)
            self._resting = True

    def resume(self) -> None:
        """End the rest, if there is one."""
        if self._resting:
            self._resting = False
            TorchFunctionMode.__enter__(self)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_compiling():
            return self.on_traced(func, args, kwargs)
        if func in _ORDINARY and self.heeded is not None and func not in self.heeded and self.beneath is None:
            return func(*args, **kwargs)
        operation = operation_of(func)
        if operation is not None:
            if not self.attends:
                return func(*args, **kwargs)
            if self.stack.frames and in_backward() == self.stack.frames[-1].recomputes:
                call = self._tried(UNREAD, self._product_call, func, operation, args, kwargs)
                if call is not None:
                    return self._product(call)
            elif not self.stack.frames and not in_backward() and torch.is_grad_enabled():
                call = self._tried(UNREAD, self._outer_call, func, operation, args, kwargs)
                if call is not None:
                    return self._product(call)
            elif in_backward() and self._tried(UNREAD, self._of_custom_function, operation, args, kwargs):
                with nullcontext() if self.beneath is None else self.beneath.seen():
                    return self.on_other(func, args, kwargs)
        if func in COMPOSITE:
            args, kwargs = _told(func, args, kwargs)
            if func in BACKWARD and func is not torch.autograd.grad and not self._nested:
                self._begun = False
                self._tried(UNREAD, self.on_backward, args[0] if args else kwargs.get("tensors"))
            counted = self.beneath if func in BACKWARD and self.beneath is not None else nullcontext()
            with self, self._within(self._tried(UNREAD, _leaves, func, args, kwargs)), counted:
                return _seen_inside(func)(*args, **kwargs)
        if operation is None and _is_lasting(func):
            _ORDINARY.add(func)
        if self.beneath is not None and not self.stack.frames and not in_backward():
            with self.beneath.outside() as outside:
                result = self.on_other(func, args, kwargs)
                outside.keep(result)
                return result
        return self.on_other(func, args, kwargs)

    def _product(self, call: ProductCall) -> Any:
        with nullcontext() if self.beneath is None else self.beneath.seen():
            result = self.on_product(call)
        if call.opaque:
            self._tried(UNREAD, self.functions.remember, call, result)
        return result

    def _tried(self, trouble: str, work: Callable[..., Any], *args: Any) -> Any:
        """What our own work gives; None where it failed and `on_trouble` let that be."""
        try:
            return work(*args)
        except Exception as error:
            self.on_trouble(trouble, error)
            return None

    def _of_custom_function(self, operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        operands = operation.read(args, kwargs)
        found = None if operands is None else self.functions.find(operands)
        if found is None:
            self.on_unplaced(operation)
            return False
        self.on_function_gradient(*found)
        return True

    @contextmanager
    def _within(self, leaves: frozenset[int] | None) -> Iterator[None]:
        """`Tensor.backward` calls `torch.autograd.backward`: one backward pass, not two."""
        before = self._nested, self.leaves
        self._nested, self.leaves = True, leaves
        try:
            yield
        finally:
            self._nested, self.leaves = before

    def _outer_call(
        self, func: Callable[..., Any], operation: Operation, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ProductCall | None:
        """A product around the model with a parameter of its own: that makes it the module's that owns it, as where a
        loss takes the head's weight, or a method multiplies that is no `forward`."""
        around = Frame(ROOT, self.model, trains=True, recomputes=False)
        call = self._product_call(func, operation, args, kwargs, around)
        return None if call is None or call.parameter is None else call

    def _product_call(
        self,
        func: Callable[..., Any],
        operation: Operation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: Frame | None = None,
    ) -> ProductCall | None:
        given = operation.read(args, kwargs)
        if given is None or not all(map(is_readable, given)):
            return None
        frame = self.stack.frames[-1] if frame is None else frame
        owners = tuple(self.owners.of(operand, frame) for operand in given)
        roles, owned, weights = _roles_and_owner(operation.fixed_roles(args, kwargs), owners)
        if owned is None:
            met = frame.met.get(operation.name, 0)
            site = f"{frame.path}/{operation.name}.{met}"
            frame.met[operation.name] = met + 1
        else:
            site = owned.site
        return ProductCall(
            site=site,
            operation=operation,
            roles=roles,
            operands=[contents(operand) for operand in given],
            weights=weights,
            parameter=None if owned is None else owned.dotted,
            recomputing=frame.recomputes,
            opaque=frame.trains and not torch.is_grad_enabled() and in_custom_forward(),
            function=func,
            args=args,
            kwargs=kwargs,
            given=given,
        )

    def _entered(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _is_active(self):
            TorchFunctionMode.__enter__(self)
            frame.leave = lambda: TorchFunctionMode.__exit__(self, None, None, None)
        if frame.path == ROOT and len(self.stack.frames) > 1:
            self.stack.unwind(keep=frame)
        if not frame.recomputes and (frame.path == ROOT or self._is_first_without_root(frame)):
            self._begun = True
            self._tried(UNREAD, self.on_forward, frame, args, kwargs)
        if self.beneath is not None and len(self.stack.frames) == 1 and not frame.recomputes:
            self.beneath.__enter__()
            frame.leave = _both(partial(self.beneath.__exit__, None, None, None), frame.leave)

    def _is_first_without_root(self, frame: Frame) -> bool:
        """Whether a training calls the model's parts and not the model, and this is the first since a backward pass."""
        return not self._begun and frame.trains and len(self.stack.frames) == 1


_ORDINARY: set[Callable[..., Any]] = set()
"""Functions that have been met, and are neither products nor composite: most calls are of these."""


def _is_lasting(function: Callable[..., Any]) -> bool:
    """Whether it is torch's own and there for good: what a user has defined is not kept alive."""
    if isinstance(function, FunctionType):
        return function.__module__ in ("torch.functional", "torch.nn.functional", "torch._tensor")
    return type(function) in COMPILED


def leave_mode(mode: TorchFunctionMode) -> None:
    """Take a mode off this thread's stack, from the middle too, if a mode that was entered later has not been left."""
    above = []
    if not _is_active(mode):
        return
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for other in reversed(above):
        _push_mode(other)


@lru_cache(maxsize=4096)
def _roles_and_owner(
    fixed: tuple[str, ...] | None, owners: tuple[Owned | None, ...]
) -> tuple[tuple[str, ...], Owned | None, frozenset[str]]:
    """The operands' roles, the owner of the weight whose place names the site (if there is one), those of weights."""
    roles, owned = _named(fixed, owners)
    weights = (role for role, owner in zip(roles, owners, strict=True) if owner and role.startswith("weight"))
    return roles, owned, frozenset(weights)


def _named(fixed: tuple[str, ...] | None, owners: Sequence[Owned | None]) -> tuple[tuple[str, ...], Owned | None]:
    places = [i for i, owned in enumerate(owners) if owned is not None]
    if fixed is not None:
        named = [i for i in places if fixed[i].startswith("weight")]
        paths = {owned.path for i in named if (owned := owners[i]) is not None}
        if len(named) > 1 and len(paths) == 1:  # a recurrent layer: the site is the module
            owned = next(owned for i in named if (owned := owners[i]) is not None)
            return fixed, Owned(owned.path, owned.path, None)
        return fixed, owners[named[0]] if len(named) == 1 else None
    rest = len(owners) - 1
    if len(places) != 1:
        return ("lhs", "rhs") if rest == 1 else tuple(f"operand{i}" for i in range(len(owners))), None
    others = iter(("input",) if rest == 1 else ("lhs", "rhs") if rest == 2 else [f"operand{i}" for i in range(rest)])
    return tuple("weight" if i == places[0] else next(others) for i in range(len(owners))), owners[places[0]]


def _told(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The same call with what iterators of inputs give (`model.parameters()`), which can be asked once only."""
    at = _INPUTS.get(func)
    inputs = None if at is None else argument(args, kwargs, at, "inputs")
    if at is None or not isinstance(inputs, Iterator):
        return args, kwargs
    return replaced(args, kwargs, {(at, "inputs"): tuple(inputs)})


def _leaves(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> frozenset[int] | None:
    at = _INPUTS.get(func)
    inputs = None if at is None else argument(args, kwargs, at, "inputs")
    if inputs is None:
        return None
    if isinstance(inputs, dict):
        inputs = inputs.values()
    return frozenset(map(id, (inputs,) if isinstance(inputs, Tensor) else inputs))


_INPUTS = {torch.autograd.grad: 1, torch.autograd.backward: 5, torch.Tensor.backward: 4}  # where `inputs` stands


def _is_active(mode: TorchFunctionMode) -> bool:
    """Whether this thread has entered the mode; most often it was entered last."""
    entered = _len_torch_function_stack()
    return any(_get_function_stack_at(place) is mode for place in range(entered - 1, -1, -1))


def _both(first: Callable[[], Any], second: Callable[[], Any] | None) -> Callable[[], None]:
    def leave() -> None:
        first()
        if second is not None:
            second()

    return leave


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
