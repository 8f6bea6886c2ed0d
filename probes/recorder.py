"""The recorder: the site hook that fills a window while training goes on.

A step runs from one `optimizer.step()` to the next. In a recorded step each operand is sketched when its product is
met and each `grad_output` when a hook on the product's result receives it. Nothing that the training computes is
replaced: the product is run as it was called, and no random number is drawn from the user's stream.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probes import lookups, losses
from probes.autocast import multiplied_dtype
from probes.casts import Cast
from probes.compiled import CompiledParts, Laid
from probes.contents import contents, outside_transforms, readable
from probes.coverage import FlopsBeneath
from probes.curvature import view_of
from probes.edges import await_gradient
from probes.functions import FunctionProduct
from probes.lookups import table_looked_up
from probes.loss_scale import LossScale, StepScale
from probes.losses import loss_call
from probes.names import Frame, in_backward
from probes.records import GRADIENT, Coverage, Product, Site, Slot
from probes.rows import SlotRows
from probes.samples import leading_sizes
from probes.scoring import Scoring
from probes.sites import UNREAD, ProductCall, SiteHook
from probes.tiles import Tiling, tilings_of

_TELLING = losses.FUNCTIONS | lookups.FUNCTIONS
_GIVING_ACCESS = frozenset(
    {
        Tensor.data.__get__,  # type: ignore[attr-defined]
        Tensor.data.__set__,  # type: ignore[attr-defined]
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.data_ptr,
        Tensor.untyped_storage,
    }
)
"""What lets values change without a new version; a Triton kernel's launch asks for `data_ptr`. A collective of
torch.distributed changes them too, and is not seen."""

_HEEDED = _TELLING | _GIVING_ACCESS

LONGEST = 200  # characters of an error that a note repeats


@dataclass
class SiteTally:
    """What has been met of one site over the window."""

    op: str
    roles: tuple[str, ...]
    parameter: str | None
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    elements: Counter[str] = field(default_factory=Counter)
    products: dict[tuple[str, tuple[str, str]], float] = field(default_factory=lambda: defaultdict(float))
    calls: int = 0


@dataclass(frozen=True)
class Depth:
    """What a step is recorded with.

    `scored`: by extra backward passes; `tiled`: with sketches by row and block.
    """

    recorded: bool = False
    scored: bool = False
    tiled: bool = False


class Recorder(SiteHook):
    """Records to the depth that `turn_to` has set; `end_step` closes a step.

    `gradient_factor` multiplies every gradient before it is sketched: one over the number of ranks that average theirs.
    """

    def __init__(
        self,
        model: nn.Module,
        outer: nn.Module,
        casts: Sequence[Cast],
        finer: Sequence[str],
        adaptive: bool,
        loss_scale: LossScale,
    ) -> None:
        super().__init__(model)
        self.notes: dict[str, None] = {}
        self.rows = SlotRows()
        self.scoring = Scoring(model, casts, adaptive, seed=0, note=self.note)
        self.loss_scale = loss_scale
        self.gradient_factor = 1.0
        self.step = 0
        self.forwards = 0
        self.recorded: list[int] = []
        self.losses: list[Tensor | None] = []
        self.loss_scales: list[StepScale] = []
        self.tallies: dict[str, SiteTally] = {}
        self.lookups: dict[str, dict[str, None]] = defaultdict(dict)  # parameter → modules that look its rows up
        self.flops: FlopsBeneath | None = None
        self.seen_flops = 0.0
        self.began = False
        self.compiled = CompiledParts(outer, self)
        self.met_unlaid = False
        self._laying: list[Laid] | None = None
        self._finer = tuple(finer)
        self._recording = threading.RLock()
        self.turn_to(Depth())
        self._start_step()

    def _start_step(self) -> None:
        self._forward_sites: set[str] = set()
        self._weights_seen: dict[Slot, set[object]] = defaultdict(set)
        self._loss: list[Tensor] = []
        self._batch: int | None = None
        self._after_batch: int | None = None
        self.began = False

    def turn_to(self, depth: Depth) -> None:
        """What the step that begins is recorded with."""
        self.depth = depth
        self.attends = depth.recorded
        self.heeded = None if depth.scored else _HEEDED

    def note(self, text: str) -> None:
        """Something could not be done as asked; said once."""
        self.notes[text] = None

    # What the hook meets.

    def on_traced(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call inside a graph that is being compiled, and that nothing was laid out for."""
        self.met_unlaid = True
        return function(*args, **kwargs)

    @contextmanager
    def laying_out(self) -> Iterator[list[Laid]]:
        """While entered, products are told and not recorded."""
        laid: list[Laid] = []
        self._laying, attended = laid, self.attends
        self.attends = True
        try:
            yield laid
        finally:
            self._laying, self.attends = None, attended

    def ran_compiled(self, laid: Sequence[Laid]) -> None:
        """A compiled part has run, and sketched what its graph can: the rest, and the tally, are done here."""
        self.began = True
        for one in laid:
            self._tally(one.call, one.products)
            for operand in one.operands:
                if operand.parameter is None:
                    self._note_tensor(operand.slot, operand.like)
                else:
                    self._sketch(operand.slot, operand.parameter, once=True, dtype=operand.like.dtype)
            for result in one.results:
                self._note_tensor(Slot(one.call.site, GRADIENT), result)

    def on_forward(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the batch size off the model's inputs."""
        self._batch, self._after_batch = leading_sizes(*args, *kwargs.values())
        self.began = self.began or torch.is_grad_enabled()
        self.forwards += 1

    def on_product(self, call: ProductCall) -> Any:
        """Sketch the operands, run the product, and wait for its gradient."""
        if self._laying is not None:
            result = call.run()
            self._laying.append(Laid.of(call, result))
            return result
        if not (torch.is_grad_enabled() or call.opaque):
            return call.run()
        if not call.recomputing:
            self._forward_sites.add(call.site)
        elif call.site in self._forward_sites:
            return call.run()  # reentrant checkpointing runs its forward without a graph: there, this is the first
        result = call.run()
        self._tried(f"{call.site} could not be recorded", self._locked, self._record, call, result)
        return result

    def on_trouble(self, what: str, error: Exception) -> None:
        """Whatever fails beside the user's calls, the training goes on, and the window says so."""
        said = str(error).strip().partition("\n")[0][:LONGEST]
        self.note(f"{what}: {type(error).__name__}: {said}")

    def _locked(self, record: Callable[..., None], *args: Any) -> None:
        """Parts of a model may be run in several threads at once; the rows and tallies are one."""
        with self._recording:
            record(*args)

    def _record(self, call: ProductCall, result: Any) -> None:
        products = call.products(result)
        self._tally(call, [product for product in products if not product.backward])
        for role, operand in zip(call.roles, call.operands, strict=True):
            tilings, dtype = self._tilings(call, role, operand.dim()), multiplied_dtype(call.operation.name, operand)
            self._sketch(Slot(call.site, role), operand, tilings, once=role in call.weights, dtype=dtype)
        self._await_gradient(call, result, [product for product in products if product.backward])

    def on_function_gradient(self, product: FunctionProduct, role: str, gradient: Tensor) -> None:
        """A custom function's backward multiplies: what its product's result would have told."""
        if self.depth.recorded and product.site in self.tallies:
            self._count(product.site, [product.gradient_of(role)])
            if product.first_time(gradient):
                self._sketch(Slot(product.site, GRADIENT), self._at_joined_scale(gradient))

    def on_other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything else: losses are recognised, and what mixes samples."""
        if function in _GIVING_ACCESS:
            self.rows.expect_changes()
        told = self.depth.scored or function in _TELLING
        if not (self.depth.recorded and told) or in_backward() or self._laying is not None:
            return function(*args, **kwargs)
        if self.depth.scored and torch.is_grad_enabled():
            self._tried(UNREAD, self.scoring.on_other, function, args, kwargs, self._batch, self.stack.frames)
        self._tried(UNREAD, self._meet_lookup, function, args, kwargs)
        result = function(*args, **kwargs)
        if torch.is_grad_enabled():
            self._tried("a loss could not be read", self._meet_loss, function, args, kwargs, result)
        return result

    def _meet_lookup(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        table = table_looked_up(function, args, kwargs)
        owned = self.owners.of(table, self.stack.frames[-1]) if table is not None and self.stack.frames else None
        if owned is not None and owned.dotted is not None:
            self.lookups[owned.dotted][self.stack.frames[-1].path] = None

    def _meet_loss(self, function: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
        loss = loss_call(function, args, kwargs)
        if loss is not None:
            self.loss_scale.met_loss(result)
            if self.depth.scored:
                self.scoring.on_loss(loss, result, self.step)

    def on_backward(self, root: Any) -> None:
        """The training loss is what backward starts from; several in a step add up."""
        if self.depth.recorded and isinstance(root, Tensor) and root.numel() == 1 and not root.is_meta:
            self._loss.append(root.detach())
            if self.depth.scored:
                self.scoring.on_backward(root)
            self.loss_scale.backward_from(root)

    # Steps.

    def end_step(self) -> None:
        """Close the step: its sketches are handed over, and what waited for its gradient is settled."""
        scale = self.loss_scale.end_step()
        if self.depth.recorded:
            self.recorded.append(self.step)
            self.losses.append(torch.stack([loss.double() for loss in self._loss]).sum() if self._loss else None)
            self.loss_scales.append(scale)
            self.compiled.end_step()
            self.rows.end_step(self.step, lambda slot: scale.value if slot.role == GRADIENT else 1.0)
        if self.depth.scored:
            self.scoring.end_step(self.step, scale.value)
        self.step += 1
        self._start_step()

    def forget(self) -> None:
        """Let go of every tensor of the step that is under way."""
        self.scoring.forget()
        self._start_step()

    # What is made of it.

    def _tally(self, call: ProductCall, products: Sequence[Product]) -> None:
        tally = self.tallies.get(call.site)
        if tally is None:
            tally = SiteTally(call.operation.name, call.roles, call.parameter)
            self.tallies[call.site] = tally
        tally.calls += 1
        self._count(call.site, products)

    def _count(self, site: str, products: Sequence[Product]) -> None:
        """A backward product counts when its gradient arrives: what the loss does not reach is never multiplied."""
        tally = self.tallies[site]
        for product in products:
            tally.products[product.name, product.operands] += product.flops
        if self.beneath is not None:
            self.seen_flops += sum(product.flops for product in products)

    def _sketch(
        self,
        slot: Slot,
        values: Tensor,
        tilings: Sequence[Tiling] = (),
        once: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        if once:
            view = view_of(values)
            if view in self._weights_seen[slot]:
                return
            self._weights_seen[slot].add(view)
        source = values if type(values) is Tensor and not (once or values.is_inference()) else None
        try:
            with outside_transforms():
                values = readable(values)
                if dtype is not None and dtype is not values.dtype and dtype.itemsize > 1:
                    values = values.detach().to(dtype)
                self._note_tensor(slot, values)
                self.rows.add(slot, values, source)
                for tiling in tilings:
                    self.rows.add_tiles(slot, values.detach(), tiling)
        except Exception as error:  # a kind of tensor nobody thought of: the training goes on, and the window says so
            self.note(f"{slot.role} of {slot.site} could not be read: {type(error).__name__}: {error}")

    def _note_tensor(self, slot: Slot, values: Tensor) -> None:
        tally = self.tallies[slot.site]
        tally.shapes[slot.role] = values.shape
        tally.dtypes[slot.role] = values.dtype
        tally.elements[slot.role] += values.numel()

    def _tilings(self, call: ProductCall, role: str, dimensions: int) -> Sequence[Tiling]:
        if not (self.depth.tiled and self._finer):
            return ()
        return tilings_of(self._finer, call.operation.name, call.roles, role, dimensions)

    def _at_joined_scale(self, gradient: Tensor) -> Tensor:
        return gradient if self.gradient_factor == 1.0 else gradient * self.gradient_factor

    def _await_gradient(self, call: ProductCall, result: Any, products: Sequence[Product]) -> None:
        step, slot, met = self.step, Slot(call.site, GRADIENT), None
        results, leaves = call.results(result), call.leaves()
        tilings = self._tilings(call, GRADIENT, results[0].dim()) if results else ()
        if self.depth.scored and (results or call.opaque):
            if call.replayable:
                self._batch = self.scoring.batch_told_by(call, self._batch, self._after_batch)
                met = self.scoring.meet(call, results, self._batch, self.stack.frames)
            else:
                why = "in a custom autograd function " * call.opaque
                self.note(f"{call.site}: {call.operation.name} {why}is recorded, and its damage is not predicted")
        backward = -1

        def received(place: int, gradient: Tensor | None) -> None:
            self._tried(f"{slot.role} of {slot.site} could not be recorded", self._locked, recorded, place, gradient)

        def recorded(place: int, gradient: Tensor | None) -> None:
            nonlocal backward
            if gradient is None or step != self.step or self.scoring.drawing:  # None: the loss does not use this result
                return
            with torch._C.DisableTorchFunction():
                self._sketch(slot, self._at_joined_scale(contents(gradient)), tilings)
            if backward != (backward := torch._C._current_graph_task_id()):  # once, however many results it arrives at
                self._count(slot.site, self.reached(products, leaves))
            if met is not None:
                self.scoring.on_gradient(met, gradient, place)

        for place, part in enumerate(results):
            await_gradient(part, partial(received, place))

    # Coverage.

    def count_beneath(self) -> None:
        """A recorded step begins: in the first one, count what passes beneath the hook."""
        if self.flops is None:
            self.flops = self.beneath = FlopsBeneath(lambda: self.stack.frames[-1] if self.stack.frames else None)

    def count_again(self) -> None:
        """The step that is under way cannot be counted: a later one is."""
        self.stop_counting()
        self.flops, self.seen_flops = None, 0.0

    def coverage(self, sites: Sequence[Site]) -> Coverage:
        """The share that these sites, the window's, have of the matrix FLOPs of the step that was counted."""
        return Coverage(float("nan")) if self.flops is None else self.flops.coverage(self.seen_flops, sites)

    def stop_counting(self) -> None:
        """The optimizer's own products are not the model's."""
        self.beneath = None
