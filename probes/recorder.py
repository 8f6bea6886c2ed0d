"""The recorder: the site hook that fills a window while training goes on.

A step runs from one `optimizer.step()` to the next. In a recorded step each operand is sketched when its product is
met and each `grad_output` when a hook on the product's result receives it. Nothing that the training computes is
replaced: the product is run as it was called, and no random number is drawn from the user's stream.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probes.casts import Cast
from probes.contents import contents, outside_transforms, readable
from probes.coverage import FlopsBeneath
from probes.curvature import Met, Sums, curvature_sums, noise_ratios, unchanged, view_of
from probes.functions import FunctionProduct
from probes.history import SparseRow, sparse_row
from probes.losses import loss_call
from probes.names import Frame, in_backward
from probes.records import GRADIENT, Coverage, Product, Site, Slot
from probes.sites import ProductCall, SiteHook
from probes.sketch import SketchArray

NOISE_SAMPLE = 4096  # elements of each weight gradient that are followed from step to step


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


@dataclass
class GradientNoise:
    """Minibatch noise of one parameter's gradient, from successive differences, which a slow drift hardly moves."""

    last: Tensor | None = None
    differences: float = 0.0
    energy: float = 0.0

    def add(self, sample: Tensor) -> None:
        if self.last is not None:
            self.differences += float((sample - self.last).square().sum()) / 2
            self.energy += float(sample.square().sum() + self.last.square().sum()) / 2
        self.last = sample


@dataclass
class PendingCurvature:
    """One loss call's sums, waiting for the gradient that reaches the loss: d(total)/d(result) times its scale."""

    sums: dict[Slot, Sums]
    scale: float = 0.0


class Recorder(SiteHook):
    """Records while `recording`; `end_step` closes a step."""

    def __init__(self, model: nn.Module, casts: Sequence[Cast], adaptive: bool, seed: int = 0) -> None:
        super().__init__(model)
        self.adaptive = adaptive
        self.casts = tuple(casts)
        self.seed = seed
        self.recording = False
        self.scoring = False
        self.step = 0
        self.recorded: list[int] = []
        self.losses: list[float] = []
        self.rows: dict[Slot, list[SparseRow]] = defaultdict(list)
        self.tallies: dict[str, SiteTally] = {}
        self.curvature: dict[Slot, list[Sums]] = defaultdict(list)
        self.scored: list[int] = []
        self.tried = 0
        self.knew_the_loss = False
        self.noise_ratios: dict[Slot, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.gradient_noise: dict[str, GradientNoise] = defaultdict(GradientNoise)
        self.whole_batch: set[str] = set()
        self.notes: dict[str, None] = {}
        self.flops: FlopsBeneath | None = None
        self.seen_flops = 0.0
        self._drawing = False
        self._arrays: dict[torch.device, SketchArray] = {}
        self._slots: dict[torch.device, dict[Slot, int]] = defaultdict(dict)
        self._start_step()

    def _start_step(self) -> None:
        self._forward_sites: set[str] = set()
        self._weights_seen: dict[Slot, set[object]] = defaultdict(set)
        self._met: list[Met] = []
        self._pending: list[PendingCurvature] = []
        self._loss: list[Tensor] = []
        self._batch: int | None = None

    # What the hook meets.

    def on_forward(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the batch size off the model's inputs."""
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        self._batch = tensors[0].shape[0] if tensors else None

    def on_product(self, call: ProductCall) -> Any:
        """Sketch the operands, run the product, and wait for its gradient."""
        if not (self.recording and (torch.is_grad_enabled() or call.opaque)):
            return call.run()
        if not call.recomputing:
            self._forward_sites.add(call.site)
        elif call.site in self._forward_sites:
            return call.run()  # reentrant checkpointing runs its forward without a graph: there, this is the first
        result = call.run()
        products = call.products(result)
        self._tally(call, [product for product in products if not product.backward])
        for role, operand in zip(call.roles, call.operands, strict=True):
            self._sketch(Slot(call.site, role), operand, once=role in call.weights)
        self._await_gradient(call, result, [product for product in products if product.backward])
        return result

    def on_function_gradient(self, product: FunctionProduct, role: str, gradient: Tensor) -> None:
        """A custom function's backward multiplies: what its product's result would have told."""
        if self.recording and product.site in self.tallies:
            self._count(product.site, [product.gradient_of(role)])
            if product.first_time(gradient):
                self._sketch(Slot(product.site, GRADIENT), gradient)

    def on_other(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Everything else: losses are recognised, and normalisation over the batch."""
        if not self.recording or in_backward():
            return function(*args, **kwargs)
        if function is F.batch_norm and self._mixes(args, kwargs):
            for met in self._met:
                met.whole_batch = True
                self.whole_batch.add(met.call.site)
        result = function(*args, **kwargs)
        if self.scoring and torch.is_grad_enabled():
            self._score(function, args, kwargs, result)
        return result

    def on_backward(self, root: Any) -> None:
        """The training loss is what backward starts from; several in a step add up."""
        if self.recording and isinstance(root, Tensor) and root.numel() == 1:
            self._loss.append(root.detach())

    # Steps.

    def follow_gradients(self) -> None:
        """Before the optimizer's step: keep a strided sample of each weight gradient."""
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad
            if gradient is None or gradient.layout != torch.strided or parameter.dim() < 2:
                continue
            flat = gradient.detach().reshape(-1)
            stride = max(1, -(-flat.numel() // NOISE_SAMPLE))
            self.gradient_noise[name].add(flat[::stride].float().clone())

    def end_step(self) -> None:
        """Close the step: recorded sketches become sparse rows, and what waited for its gradient is settled."""
        if self.recording:
            self.recorded.append(self.step)
            self.losses.append(float(sum(loss.double() for loss in self._loss)) if self._loss else float("nan"))
            for device, array in self._arrays.items():
                sums, extremes = (part.numpy() for part in array.drain())
                for slot, row in self._slots[device].items():
                    if sums[row].any():
                        self.rows[slot].append(sparse_row(self.step, sums[row], extremes[row]))
        if self.scoring:
            self.tried += 1
            self._settle()
        self.step += 1
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

    def _sketch(self, slot: Slot, values: Tensor, once: bool = False) -> None:
        if once:
            view = view_of(values)
            if view in self._weights_seen[slot]:
                return
            self._weights_seen[slot].add(view)
        tally = self.tallies[slot.site]
        tally.shapes[slot.role] = tuple(values.shape)
        tally.dtypes[slot.role] = str(values.dtype).removeprefix("torch.")
        tally.elements[slot.role] += values.numel()
        rows = self._slots[values.device]
        row = rows.setdefault(slot, len(rows))
        array = self._arrays.get(values.device)
        if array is None:
            array = self._arrays[values.device] = SketchArray(device=values.device)
        array.reserve(row + 1)
        try:
            with outside_transforms():
                array.add(row, readable(values))
        except Exception as error:  # a kind of tensor nobody thought of: the training goes on, and the window says so
            self.notes[f"{slot.role} of {slot.site} could not be read: {type(error).__name__}: {error}"] = None

    def _await_gradient(self, call: ProductCall, result: Any, products: Sequence[Product]) -> None:
        step, slot = self.step, Slot(call.site, GRADIENT)
        results = call.results(result)
        met = None
        if self.scoring and (results or call.opaque):
            if call.replayable:
                self._met.append(met := Met.of(call, results[0], self._batch))
            else:
                why = "in a custom autograd function " * call.opaque
                text = f"{call.site}: {call.operation.name} {why}is recorded, and its damage is not predicted"
                self.notes[text] = None
        backward = -1

        def received(gradient: Tensor | None) -> None:
            nonlocal backward
            if gradient is None or step != self.step or self._drawing:  # None: of a result that the loss does not use
                return
            with torch._C.DisableTorchFunction():
                self._sketch(slot, contents(gradient))
            if backward != (backward := torch._C._current_graph_task_id()):  # once, however many results it arrives at
                self._count(call.site, products)
            if met is not None and met.intact:
                self._score_noise(call, gradient)

        for part in results:
            part.register_hook(received)

    def _score_noise(self, call: ProductCall, gradient: Tensor) -> None:
        try:
            found = noise_ratios(call, gradient, self.casts, self.adaptive)
        except Exception as error:  # as in `_score`
            self.notes[f"no gradient noise at {call.site}: {type(error).__name__}: {error}"] = None
            return
        for slot, ratios in found.items():
            for cast, ratio in ratios.items():
                self.noise_ratios[slot][cast].append(ratio)

    def _score(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        loss = loss_call(function, args, kwargs)
        self.knew_the_loss |= loss is not None
        if loss is None or not self._met:
            return
        self._drawing = True
        try:
            draw = self.seed + 1_000_003 * self.step + len(self._pending)
            with unchanged(self.model):
                sums = curvature_sums(loss, self._met, self.casts, seed=draw)
        except Exception as error:  # whatever it was, the user's training goes on, and the window says so
            self.notes[f"no curvature: the extra backward pass failed with {type(error).__name__}: {error}"] = None
            return
        finally:
            self._drawing = False
        pending = PendingCurvature(sums)
        self._pending.append(pending)

        def reached(gradient: Tensor) -> None:
            pending.scale += float(gradient) * loss.scale
            self._met = []  # the graph is about to be freed, and the operands with it

        result.register_hook(reached)

    def _settle(self) -> None:
        total: dict[Slot, Sums] = defaultdict(Sums)
        for pending in self._pending:
            if pending.scale > 0:
                for slot, sums in pending.sums.items():
                    total[slot].add(sums, pending.scale)
        for slot, sums in total.items():
            self.curvature[slot].append(sums)
        if total:
            self.scored.append(self.step)

    def _mixes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        training = args[5] if len(args) > 5 else kwargs.get("training", False)
        return bool(training)

    def count_beneath(self) -> None:
        """A recorded step begins: in the first one, count what passes beneath the hook."""
        if self.flops is None:
            self.flops = self.beneath = FlopsBeneath(lambda: self.stack.frames[-1] if self.stack.frames else None)

    def coverage(self, sites: Sequence[Site]) -> Coverage:
        """The share that these sites, the window's, have of the matrix FLOPs of the step that was counted."""
        return Coverage(float("nan")) if self.flops is None else self.flops.coverage(self.seen_flops, sites)

    def stop_counting(self) -> None:
        """The optimizer's own products are not the model's."""
        self.beneath = None


class Clock:
    """Which steps to record when the watching may take only a share of the time.

    The first step is left alone, to learn what a plain one takes. A recorded step's surplus is a debt, and each plain
    step pays the allowed share of its own time.
    """

    def __init__(self, overhead: float) -> None:
        self.overhead = overhead
        self.debt = 0.0
        self.plain: list[float] = []
        self._started = time.perf_counter()

    def lap(self, recorded: bool) -> bool:
        """A step has ended; whether the next may be recorded."""
        now = time.perf_counter()
        spent, self._started = now - self._started, now
        if recorded:
            usual = sorted(self.plain)[len(self.plain) // 2]
            self.debt += max(0.0, spent - usual)
        else:
            self.plain.append(spent)
            self.debt -= self.overhead * spent
        return self.debt <= 0
