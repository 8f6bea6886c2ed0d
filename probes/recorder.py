"""The recorder: the site hook that fills a window while training goes on.

A step runs from one `optimizer.step()` to the next. In a recorded step each operand is sketched when its product is
met and each `grad_output` when a hook on the product's result receives it. Nothing that the training computes is
replaced: the product is run as it was called, and no random number is drawn from the user's stream.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probes.casts import Cast
from probes.compiled import CompiledParts, Laid, Traced, traced_product
from probes.coverage import FlopsUnseen
from probes.curvature import view_of
from probes.edges import await_gradient
from probes.loss_scale import LossScale, StepScale
from probes.losses import loss_call
from probes.names import Frame, in_backward
from probes.records import GRADIENT, Product, Slot
from probes.rows import SlotRows
from probes.scoring import Scoring
from probes.sites import ProductCall, SiteHook
from probes.tiles import Tiling, tilings_of


@dataclass
class SiteTally:
    """What has been met of one site over the window."""

    op: str
    roles: tuple[str, ...]
    parameter: str | None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    elements: Counter[str] = field(default_factory=Counter)
    products: dict[tuple[str, tuple[str, str]], float] = field(default_factory=lambda: defaultdict(float))
    calls: int = 0


@dataclass(frozen=True)
class Depth:
    """What a step is recorded with.

    `scored`: by extra backward passes; `followed`: the optimizer's step, too; `tiled`: with sketches by row and block.
    """

    recorded: bool = False
    scored: bool = False
    followed: bool = False
    tiled: bool = False


class Recorder(SiteHook):
    """Records to the `depth` that is set; `end_step` closes a step.

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
        self.depth = Depth()
        self.rows = SlotRows()
        self.scoring = Scoring(model, casts, adaptive, seed=0, note=self.note)
        self.loss_scale = loss_scale
        self.gradient_factor = 1.0
        self.step = 0
        self.recorded: list[int] = []
        self.losses: list[Tensor | None] = []
        self.loss_scales: list[StepScale] = []
        self.tallies: dict[str, SiteTally] = {}
        self.unseen: Counter[tuple[str, str]] | None = None
        self.seen_flops = 0.0
        self.forwards = 0
        self.began = False
        self.compiled = CompiledParts(outer, self)
        self.traced: list[Traced] = []
        self.traced_at = 0
        self.met_unlaid = False
        self._laying: list[Laid] | None = None
        self._finer = tuple(finer)
        self._counter: FlopsUnseen | None = None
        self._start_step()

    def _start_step(self) -> None:
        self._forward_sites: set[str] = set()
        self._weights_seen: dict[Slot, set[object]] = defaultdict(set)
        self._loss: list[Tensor] = []
        self._batch: int | None = None
        self.began = False

    def note(self, text: str) -> None:
        """Something could not be done as asked; said once."""
        self.notes[text] = None

    # What the hook meets.

    def on_traced(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call inside a graph that is being compiled."""
        if self.traced:
            return traced_product(self, function, args, kwargs)
        self.met_unlaid = True
        return function(*args, **kwargs)

    @contextmanager
    def laying_out(self) -> Iterator[list[Laid]]:
        """While entered, products are told and not recorded."""
        laid: list[Laid] = []
        self._laying = laid
        try:
            yield laid
        finally:
            self._laying = None

    def ran_compiled(self, laid: Sequence[Laid], is_root: bool) -> None:
        """A compiled part has run, and sketched what its graph can: the rest, and the tally, are done here."""
        self.forwards += is_root
        for one in laid:
            self._tally(one.call, one.products)
            for operand in one.operands:
                if operand.parameter is None:
                    self._note_tensor(operand.slot, operand.like)
                else:
                    self._sketch(operand.slot, operand.parameter, once=True)
            if one.result is not None:
                self._note_tensor(Slot(one.call.site, GRADIENT), one.result)

    def on_forward(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the batch size off the model's inputs; on the first recorded forward, count what is not seen."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        self._batch = tensors[0].shape[0] if tensors else None
        self.began = self.began or torch.is_grad_enabled()
        if self.depth.recorded and torch.is_grad_enabled():
            self.forwards += self._laying is None
            if self.unseen is None:
                self._count_unseen(frame)

    def on_product(self, call: ProductCall) -> Tensor:
        """Sketch the operands, run the product, and wait for its gradient."""
        if self._laying is not None:
            result = self._run_counted(call)
            self._laying.append(Laid.of(call, result))
            return result
        if not (self.depth.recorded and torch.is_grad_enabled()):
            return call.run()
        if not call.recomputing:
            self._forward_sites.add(call.site)
        elif call.site in self._forward_sites:
            return call.run()  # reentrant checkpointing runs its forward without a graph: there, this is the first
        result = self._run_counted(call)
        products = call.products(result)
        self._tally(call, products)
        for role, operand in zip(call.roles, call.operands, strict=True):
            tilings = self._tilings(call, role, operand.dim())
            self._sketch(Slot(call.site, role), operand, tilings, once=role == "weight" and call.parameter is not None)
        if result.requires_grad:
            self._await_gradient(call, result)
        return result

    def _run_counted(self, call: ProductCall) -> Tensor:
        """Run a product; while FLOPs are counted, its own are seen."""
        counter = self._counter
        if counter is None:
            return call.run()
        counter.inside = True
        try:
            result = call.run()
        finally:
            counter.inside = False
        self.seen_flops += sum(p.flops for p in call.products(result) if GRADIENT not in p.operands)
        return result

    def on_other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything else: losses are recognised, and normalisation over the batch."""
        if not self.depth.recorded or in_backward() or self._laying is not None:
            return function(*args, **kwargs)
        if self.depth.scored and function is F.batch_norm and _mixes(args, kwargs):
            self.scoring.mix_samples()
        result = function(*args, **kwargs)
        if torch.is_grad_enabled():
            loss = loss_call(function, args, kwargs)
            if loss is not None:
                self.loss_scale.met_loss(result)
                if self.depth.scored:
                    self.scoring.on_loss(loss, result, self.step)
        return result

    def on_backward(self, root: Any) -> None:
        """The training loss is what backward starts from; several in a step add up."""
        if self.depth.recorded and isinstance(root, Tensor) and root.numel() == 1:
            self._loss.append(root.detach())
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
        for product in products:
            tally.products[product.name, product.operands] += product.flops

    def _sketch(self, slot: Slot, values: Tensor, tilings: Sequence[Tiling] = (), once: bool = False) -> None:
        if once:
            view = view_of(values)
            if view in self._weights_seen[slot]:
                return
            self._weights_seen[slot].add(view)
        self._note_tensor(slot, values)
        try:
            self.rows.add(slot, values)
            for tiling in tilings:
                self.rows.add_tiles(slot, values, tiling)
        except Exception as error:  # a kind of tensor nobody thought of: the training goes on, and the window says so
            self.note(f"{slot.role} of {slot.site} could not be read: {type(error).__name__}: {error}")

    def _note_tensor(self, slot: Slot, values: Tensor) -> None:
        tally = self.tallies[slot.site]
        tally.shapes[slot.role] = tuple(values.shape)
        tally.dtypes[slot.role] = str(values.dtype).removeprefix("torch.")
        tally.elements[slot.role] += values.numel()

    def _tilings(self, call: ProductCall, role: str, dimensions: int) -> Sequence[Tiling]:
        if not (self.depth.tiled and self._finer):
            return ()
        return tilings_of(self._finer, call.operation.name, call.roles, role, dimensions)

    def _await_gradient(self, call: ProductCall, result: Tensor) -> None:
        step, slot, tilings = self.step, Slot(call.site, GRADIENT), self._tilings(call, GRADIENT, result.dim())
        met = self.scoring.meet(call, result, self._batch) if self.depth.scored else None

        def received(gradient: Tensor) -> None:
            if step != self.step or self.scoring.drawing:
                return
            with torch._C.DisableTorchFunction():
                factor = self.gradient_factor
                self._sketch(slot, gradient if factor == 1.0 else gradient * factor, tilings)
            if met is not None:
                self.scoring.on_gradient(met, gradient)

        await_gradient(result, received)

    def _count_unseen(self, frame: Frame) -> None:
        counter = FlopsUnseen(lambda: self.stack.frames[-1].path if self.stack.frames else "")
        self._counter, self.unseen = counter, counter.found
        counter.__enter__()
        leave = frame.leave

        def stop() -> None:
            counter.__exit__(None, None, None)
            self._counter = None
            if leave is not None:
                leave()

        frame.leave = stop


def _mixes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    training = args[5] if len(args) > 5 else kwargs.get("training", False)
    return bool(training)
