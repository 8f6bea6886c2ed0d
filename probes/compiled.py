"""Models under torch.compile: recording inside compiled graphs, without a graph break.

The hook is traced with the model. What it does there must be plain: it counts products, and for each tensor it calls
one operator of our own, `numerics_advisor::sketch`, that adds to arrays given as inputs of the graph. Which products
there are, and what they are called, it cannot find out there (hooks, module names and the identity of parameters are
lost to a graph). So each compiled part of a model is laid out before it first runs in a window: an extra forward,
uncompiled, its result thrown away, random streams and buffers put back, tells the products in their order, and the
traced hook takes them one by one. A count that differs afterwards means that the graph is not what was laid out: then
that part is run eagerly for the rest of the window, and the window says so.

Parameters do not change within a step, so they are read outside the graph, once a step. Steps that are not recorded,
and evaluation, run the graph that the model had before: the hook is put aside for them. Scored steps need autograd's
graph of single operations and run uncompiled.

What is compiled but no module of this model (a function that does the whole step, say) cannot be laid out. The hook
notices it; the rest of the window then runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily

from probes.autocast import multiplied_dtype
from probes.layout import SUMS
from probes.names import written
from probes.ops import OPERATIONS
from probes.records import GRADIENT, Product, Slot
from probes.sites import ProductCall
from probes.sketch import add, empty_extremes
from probes.undisturbed import unchanged

if TYPE_CHECKING:
    from probes.recorder import Recorder

Pair = tuple[Tensor, Tensor]  # one slot's sums [SUMS] and extremes [EXTREMES]


@torch.library.custom_op("numerics_advisor::sketch", mutates_args=("sums", "extremes"))
def sketch(sums: Tensor, extremes: Tensor, values: Tensor, factor: float) -> None:
    """Add a tensor, each value times `factor`, to one slot's arrays: the operator that compiled graphs call."""
    add(sums, extremes, values if factor == 1.0 else values * factor)


@sketch.register_fake
def _(sums: Tensor, extremes: Tensor, values: Tensor, factor: float) -> None:
    return None


class Watched(torch.autograd.Function):
    """The identity, whose gradient is sketched. A copy, because a view made here could not be changed in place."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, sums: Tensor, extremes: Tensor, factor: float) -> Tensor:
        ctx.slot, ctx.factor = (sums, extremes), factor
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        torch.ops.numerics_advisor.sketch(*ctx.slot, gradient, ctx.factor)
        return gradient, None, None, None


@dataclass(frozen=True)
class Traced:
    """One product in a graph: where its operands are added (None: they are read elsewhere), and its gradient."""

    operands: tuple[tuple[Tensor, Tensor, torch.dtype] | None, ...]  # a pair, and the dtype that is multiplied
    gradient: Pair | None
    factor: float


@dataclass(frozen=True)
class Operand:
    """One operand of a product as the layout found it; `parameter`: the tensor itself, where it is one or a view."""

    slot: Slot
    like: Tensor
    parameter: Tensor | None


@dataclass(frozen=True)
class Laid:
    """One product as the layout found it. `results`: empty tensors like those to which a gradient comes back."""

    call: ProductCall
    operands: tuple[Operand, ...]
    products: tuple[Product, ...]
    results: tuple[Tensor, ...]

    @classmethod
    def of(cls, call: ProductCall, result: Any) -> Laid:
        """Keeps names, sizes and parameters, and nothing of the step's own tensors."""
        operands = tuple(
            Operand(
                Slot(call.site, role),
                _like(operand, multiplied_dtype(call.operation.name, operand)),
                operand.detach() if role in call.weights else None,
            )
            for role, operand in zip(call.roles, call.operands, strict=True)
        )
        bare = replace(call, operands=[], given=[], function=_gone, args=(), kwargs={})
        return cls(bare, operands, tuple(call.products(result)), tuple(map(_like, call.results(result))))


@dataclass
class Part:
    """A compiled part of the model: how it is called, and its layouts by what it was called with."""

    name: str
    eager: bool = False
    layouts: dict[Any, tuple[list[Laid], list[Traced]]] = field(default_factory=dict)


class CompiledParts:
    """The compiled parts of a model while a window is open."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._model, self._recorder = model, recorder
        self._pairs: dict[Slot, Pair] = {}
        self._restore = ExitStack()

    def attach(self) -> None:
        """Stand before every compiled part: modules that torch.compile wrapped, and those compiled in place."""
        for path, module in self._model.named_modules():
            if isinstance(module, torch._dynamo.OptimizedModule):
                self._stand_before(module, "forward", Part(written(path)))
            elif module._compiled_call_impl is not None:
                self._stand_before(module, "_compiled_call_impl", Part(written(path)))

    def detach(self) -> None:
        """Take everything back."""
        self._restore.close()

    def _stand_before(self, module: nn.Module, attribute: str, part: Part) -> None:
        original = getattr(module, attribute)

        def called(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # a part of a part that is being traced
                return original(*args, **kwargs)
            return self._run(part, original, args, kwargs)

        setattr(module, attribute, called)
        self._restore.callback(setattr, module, attribute, original)

    def _run(self, part: Part, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        recorder = self._recorder
        if not (recorder.depth.recorded and torch.is_grad_enabled()):
            with put_aside(recorder):
                return original(*args, **kwargs)
        if recorder.depth.scored:
            recorder.note("scored steps, which need the gradients of single operations, ran uncompiled")
        if recorder.depth.scored or part.eager:
            with torch.compiler.set_stance("force_eager"):
                return original(*args, **kwargs)
        called_with = (_signature(args), _signature(kwargs), _surroundings())
        is_first = called_with not in part.layouts
        if is_first:
            laid = self._lay_out(original, args, kwargs)
            part.layouts[called_with] = laid, [self._traced(one) for one in laid]
        laid, traced = part.layouts[called_with]
        hook = _hooks.setdefault(self._model, TracedHook())
        hook.traced, hook.at = traced, 0
        # What the layout has counted beneath the hook is not counted again.
        counted = nullcontext() if recorder.beneath is None else recorder.beneath.seen()
        unhooked = recorder.stack.put_aside() if is_first else nullcontext()
        try:
            with counted, unhooked, put_aside(recorder), hook:
                result = original(*args, **kwargs)
        finally:
            hook.traced = []
        if hook.at != len(laid):
            self._give_up(part, hook.at, laid)
        else:
            recorder.ran_compiled(laid)
        return result

    def _lay_out(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Laid]:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with (
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices=list(devices)),
            unchanged(self._model),
            self._recorder.laying_out() as laid,
        ):
            original(*args, **kwargs)
        return laid

    def _traced(self, laid: Laid) -> Traced:
        operands = tuple(
            None
            if operand.parameter is not None
            else (*self._pair(operand.slot, operand.like.device), operand.like.dtype)
            for operand in laid.operands
        )
        gradient = self._pair(Slot(laid.call.site, GRADIENT), laid.results[0].device) if laid.results else None
        return Traced(operands, gradient, self._recorder.gradient_factor)

    def _pair(self, slot: Slot, device: torch.device) -> Pair:
        if slot not in self._pairs:
            sums = torch.zeros(SUMS, dtype=torch.float64, device=device)
            self._pairs[slot] = sums, empty_extremes(1, device)[0]
        return self._pairs[slot]

    def _give_up(self, part: Part, met: int, laid: Sequence[Laid]) -> None:
        part.eager = True
        self._recorder.count_again()
        for one in laid:
            for operand in one.operands:
                if operand.slot in self._pairs:
                    _clear(self._pairs[operand.slot])
        self._recorder.note(
            f"{part.name} runs uncompiled in this window: its graph has {met} matrix products where its "
            f"forward has {len(laid)}; what it did compiled in step {self._recorder.step} is missing"
        )

    def end_step(self) -> None:
        """Hand what the graphs have added to the window's rows."""
        for slot, pair in self._pairs.items():
            self._recorder.rows.add_sketch(slot, *pair)
            _clear(pair)


class TracedHook(TorchFunctionMode):
    """What is traced in the recorder's place: takes the products that were laid out, one by one.

    A graph remembers the very hook it was made with. So a model has one of these for good, and its second window runs
    the graphs of its first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traced: list[Traced] = []
        self.at = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not torch.compiler.is_compiling():
            return func(*args, **kwargs)  # the operators that a graph is made of
        operation = OPERATIONS.get(func)
        operands = None if operation is None else operation.read(args, kwargs)
        if operands is None or not all(operand.is_floating_point() for operand in operands):
            return func(*args, **kwargs)
        at = self.at
        self.at = at + 1
        if at >= len(self.traced):
            return func(*args, **kwargs)
        traced = self.traced[at]
        for operand, added in zip(operands, traced.operands, strict=False):
            if added is not None:
                torch.ops.numerics_advisor.sketch(added[0], added[1], operand.detach().to(added[2]), 1.0)
        result = func(*args, **kwargs)
        if traced.gradient is not None and isinstance(result, Tensor) and result.requires_grad:
            return Watched.apply(result, traced.gradient[0], traced.gradient[1], traced.factor)
        return result


_hooks: WeakKeyDictionary[nn.Module, TracedHook] = WeakKeyDictionary()


@contextmanager
def put_aside(hook: Recorder) -> Iterator[None]:
    """Without the hook, if it is the innermost mode: the model then runs the graph that it has without it."""
    if _get_current_function_mode() is hook:
        with _pop_mode_temporarily():
            yield
    else:
        yield


def _like(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape and device that holds nothing, of its dtype or another."""
    return torch.empty(1, dtype=dtype or values.dtype, device=values.device).expand(values.shape)


def _clear(pair: Pair) -> None:
    pair[0].zero_()
    pair[1].copy_(empty_extremes(1, pair[1].device)[0])


def _gone(*_: Any, **__: Any) -> Any:
    raise AssertionError("a product that was laid out is not run again")


def _signature(value: Any) -> Any:
    """What a call depends on that decides which products it makes: shapes and dtypes of tensors, other values."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.requires_grad
    if isinstance(value, dict):
        return tuple((name, _signature(part)) for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_signature, value))
    return value if isinstance(value, (bool, int, str, type(None))) else type(value)


def _surroundings() -> Any:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
