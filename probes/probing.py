"""Watching a stretch of real training.

    with probe(model, optimizer, steps=20) as window:
        for batch in loader:
            train_one_step(batch)
            if window.done:
                break

While the block runs, a Recorder meets the model's products; when it is left, what was recorded becomes the window.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from probes.buffers import BufferWatch
from probes.casts import Cast
from probes.closing import contents_of
from probes.distributed import Group, agreed, group_of, is_sharded, merged, ranks_of
from probes.errors import WindowError
from probes.loss_scale import LossScale
from probes.measurable import why_not_measurable
from probes.names import unwrapped
from probes.optimizer_states import innermost
from probes.pace import Clock, Rota, spread, steps_taken
from probes.parameters import ParameterWatch
from probes.recorder import Depth, Recorder
from probes.records import Coverage
from probes.relative import bytes_a_slot
from probes.sketch import BYTES_A_SLOT, ready
from probes.tiles import DEFAULT, checked_names
from probes.window import Contents, Window

USUAL_CASTS = ("e4m3fn", "e5m2", "int8", "bf16", "fp16")  # the candidates of the directional products
PARAMETER_STEPS = 4  # steps at which each parameter's update is sketched: it changes slowly, and each costs six reads

NAMED = 5  # modules that a note about the model's changes names

_watched: WeakSet[nn.Module] = WeakSet()
_lock = threading.Lock()


class probe(AbstractContextManager[Window]):  # noqa: N801 - used as a function, like torch.no_grad
    """Watch a model's training for some optimizer steps; the Window it gives is filled when the block is left.

    model, optimizer   those that are being trained; any torch.optim.Optimizer
    steps              optimizer steps until the window ends itself, at least 1
    every              record each k-th step
    overhead           let the watching take at most this share of the window's time (0.05 is a twentieth), and record
                       fewer steps for it, at least one; None records as `every` says. Two things are not in it: the
                       extra backward passes of `curvature_steps`, and loading the kernels, once a process, on entry
    curvature_steps    recorded steps on which damage and gradient noise are measured by extra backward passes; 0: none
    casts              candidates for those measurements, as strings or Casts, each with one scale a tensor or none; a
                       delayed one is measured with its own tensor's scale
    finer              scales finer than a tensor's to sketch for as well, as `"row"` or `"block32/e8m0"`, at every
                       recorded step; None: by row and block of 32 at the scored steps alone, which cost more anyway
    group              the torch.distributed group whose ranks have different parts of the batch; by itself that of
                       DistributedDataParallel or FSDP2. Their sketches are added up when the block is left
    loss_scale         the factor on the loss, where it has a constant one; None finds it, a GradScaler's too

    An exception inside leaves the model without a hook; the steps that were complete stay in the window. Raises
    WindowError for arguments that make no window, casts with scales by row, column or block among them, and for a
    model that another open window watches; UnknownFormat and InvalidCast for a cast that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int = 20,
        *,
        every: int = 1,
        overhead: float | None = None,
        curvature_steps: int = 2,
        casts: Sequence[str | Cast] | None = None,
        finer: Sequence[str] | None = None,
        loss_scale: float | None = None,
        group: Group | None = None,
    ) -> None:
        _check(model, optimizer, steps, every, overhead, curvature_steps)
        self._group = group_of(model, group)
        self._given, self._model = model, unwrapped(model)
        self._optimizer = optimizer = innermost(optimizer)
        self._total, self._every, self._tiled_where_scored = steps, every, finer is None
        self._finer = checked_names(DEFAULT if finer is None else finer)
        self._recorder = Recorder(
            self._model,
            model,
            candidates(casts or USUAL_CASTS),
            self._finer,
            adaptive=not isinstance(optimizer, torch.optim.SGD),
            loss_scale=LossScale(loss_scale),
        )
        self._recorder.gradient_factor = 1.0 / ranks_of(self._group)
        planned, rows, note = range(0, steps, every), self._recorder.rows, self._recorder.note
        self._parameters = ParameterWatch(self._model, optimizer, Rota(PARAMETER_STEPS, planned), rows, note)
        self._buffers = BufferWatch(self._model, Rota(PARAMETER_STEPS, planned), rows, note)
        self._scored = spread(curvature_steps, planned)
        self._clock = None if overhead is None else Clock(overhead, steps)
        self._open, self._hooks = ExitStack(), ExitStack()
        self._entered = self._stepped = False
        # Forwards met when each of the steps began that are under way, outermost first: an optimizer whose `step` calls
        # its parent's has both announced.
        self._within: list[int] = []
        self.window = Window()

    @property
    def bytes_a_slot(self) -> int:
        """What one slot's sketches take on its device while the window is open, however many steps it has.

        16 KiB and a little for the tensor-wide one; finer ones add most. Known before the window opens.
        """
        return BYTES_A_SLOT + bytes_a_slot(self._finer)

    def __repr__(self) -> str:
        size = f"{self.bytes_a_slot / 1024:.0f} KiB a slot, {BYTES_A_SLOT / 1024:.0f} of them for tensor-wide sketches"
        return f"<probe of {self._total} steps: {size}>"

    def __enter__(self) -> Window:
        if self._entered:
            raise WindowError("a window can be opened once; call probe(...) again for another")
        with _lock:
            _require_unwatched(self._model)
            _watched.add(self._model)
        self._entered = True
        self._open.callback(_watched.discard, self._model)
        try:
            self._attach()
        except BaseException:
            self._open.close()
            self._hooks.close()
            raise
        return self.window

    def _attach(self) -> None:
        if self._clock is not None:
            for device in {parameter.device for parameter in self._model.parameters()}:
                ready(device)
            self._clock.start()
        self._recorder.loss_scale.on_update = self._after_scaler
        self._open.enter_context(self._recorder.loss_scale.watching_scalers())
        # Hooks on the optimizer stay until the block is left: one of them ends the window, and torch is then going
        # through its hooks.
        self._hooks.callback(self._optimizer.register_step_pre_hook(self._before_step).remove)
        self._hooks.callback(self._optimizer.register_step_post_hook(self._after_step).remove)
        self._open.callback(self._recorder.stack.detach)
        self._recorder.compiled.attach()
        self._open.callback(self._recorder.compiled.detach)
        self._plan_step(allowed=self._clock is None)
        self._recorder.__enter__()

    def __exit__(self, kind: Any, *error: Any) -> None:
        recorder, parameters, buffers = self._recorder, self._parameters, self._buffers
        self._stop()
        self._hooks.close()
        recorder.__exit__(kind, *error)
        if recorder.step < self._total and kind is None:
            recorder.note(f"the window was left after {recorder.step} of {self._total} optimizer steps")
        if kind is not None:
            recorder.note(f"the window was cut short by {kind.__name__} in step {recorder.step}")
        self.window.done = True
        contents = self._closed(recorder, parameters, buffers)
        taken = steps_taken(len(contents.steps), recorder.step, self._every, self._clock)
        contents = replace(contents, sampled=(*taken, *contents.sampled))
        if self._group is not None and kind is None:
            contents = merged(contents, self._group, is_sharded(self._model))
        self.window.fill(contents)
        # This object may outlive its block, in a traceback too: it keeps nothing of the training alive.
        del self._recorder, self._parameters, self._buffers, self._given, self._model, self._optimizer

    def _closed(self, recorder: Recorder, parameters: ParameterWatch, buffers: BufferWatch) -> Contents:
        try:
            return contents_of(recorder, parameters, buffers, self._model, self._optimizer)
        except Exception as error:  # the training goes on, with a window that says why it holds nothing
            said = f"the window could not be closed, and holds nothing: {type(error).__name__}: {error}"
            warnings.warn(said, RuntimeWarning, stacklevel=3)
            return Contents(
                type(self._model).__name__,
                type(self._optimizer).__name__,
                *({}, (), (), (), Coverage(float("nan")), {}, {}),
                notes=(*recorder.notes, said),
            )

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder = self._recorder
        # torch 2.9 to 2.13 pass the optimizer itself as the first of `args`.
        closure = any(map(callable, (*args[1:], *kwargs.values())))
        if not closure:
            recorder.stop_counting()
        if not self.window.done:
            if self._within and not closure and self._within[-1] != recorder.forwards:
                self._within.clear()  # that step has raised
            self._within.append(recorder.forwards)
            if len(self._within) > 1:
                return
            depth = recorder.depth
            with self._noting("the parameters were not read before the optimizer's step"):
                self._parameters.before_step(recorder.step, depth.recorded, closure)
            if not closure and not torch.compiler.is_compiling():
                recorder.rest()

    def _after_step(self, *_: Any) -> None:
        recorder = self._recorder
        if self._within:
            self._within.pop()
        if self._within:
            return
        recorder.resume()
        recorder.stop_counting()
        if not self.window.done:
            with self._noting("the parameters were not read after the optimizer's step"):
                self._parameters.after_step(recorder.step, recorder.depth.recorded)
            with self._noting("the buffers were not read"):
                self._buffers.at_end(recorder.step)
            self._stepped = True
            self._end_step()

    def _after_scaler(self) -> None:
        """A GradScaler ended its step. If the optimizer did not step, it was skipped: it is a step all the same."""
        if not self._stepped and self._recorder.began:
            self._recorder.note(f"step {self._recorder.step} was skipped by the GradScaler: its gradients overflowed")
            self._end_step()
        self._stepped = False

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        """Whatever fails within, the training goes on, and the window says so."""
        try:
            yield
        except Exception as error:
            self._recorder.on_trouble(what, error)

    def _end_step(self) -> None:
        recorder = self._recorder
        try:
            self._turn_to_next()
        except Exception as error:
            recorder.on_trouble(f"the window ended in step {recorder.step}, which could not be closed", error)
            self._finish()

    def _finish(self) -> None:
        self._stop()
        self.window.done = True

    def _turn_to_next(self) -> None:
        recorder = self._recorder
        depth = recorder.depth
        recorder.end_step()
        if recorder.step >= self._total:
            self._finish()
            return
        if changed := recorder.stack.attach():
            recorder.note(
                f"modules came, went, moved or lost their hooks in step {recorder.step - 1}, which may have been "
                f"recorded in part: {', '.join(changed[:NAMED])}{', …' * (len(changed) > NAMED)}"
            )
        if recorder.met_unlaid:
            recorder.met_unlaid = False
            recorder.count_again()
            recorder.note(
                "something is compiled that is no module of this model (a function around it, say): the window goes on "
                f"uncompiled, and what ran compiled in step {recorder.step - 1} is missing"
            )
            self._open.enter_context(torch.compiler.set_stance("force_eager"))
        self._plan_step(
            allowed=self._clock is None or agreed(self._clock.lap(depth.recorded, depth.scored), self._group)
        )

    def _plan_step(self, allowed: bool) -> None:
        recorder = self._recorder
        recorded = allowed and recorder.step % self._every == 0
        # A step that was not recorded is made up for by a later one.
        come = len([step for step in self._scored if step <= recorder.step])
        scored = recorded and len(recorder.scoring.steps) < come and not self._is_ddp_starting()
        recorder.turn_to(
            Depth(
                recorded=recorded,
                scored=scored,
                tiled=scored if self._tiled_where_scored else recorded,
            )
        )
        with self._noting("the buffers were not read"):
            self._buffers.at_start(recorder.step, recorded)
        if recorded:
            recorder.count_beneath()

    def _is_ddp_starting(self) -> bool:
        """Static-graph DDP counts, in its first iteration, on the first backward pass: ours must not be that one."""
        starting = getattr(self._given, "static_graph", False) and not getattr(
            self._given, "_static_graph_delay_allreduce_enqueued", True
        )
        if starting and self._total == 1:
            self._recorder.note("no scored step: DistributedDataParallel's first one with static_graph is left alone")
        return bool(starting)

    def _stop(self) -> None:
        """Stop watching: hooks off. The override mode itself is left when the `with` block is."""
        self._recorder.turn_to(Depth())
        self._recorder.stop_counting()
        self._recorder.forget()
        self._parameters.forget()
        self._buffers.forget()
        self._open.close()


def _require_unwatched(model: nn.Module) -> None:
    """Raises WindowError where a module of this model is another's that is being watched: both would count it."""
    modules = set(map(id, model.modules()))
    for other in _watched:
        if other is model:
            raise WindowError("another open window watches this model: leave its `with` block first")
        if any(id(module) in modules for module in other.modules()):
            raise WindowError(
                f"another open window watches {type(other).__name__}, which shares modules with this "
                f"{type(model).__name__}: leave its `with` block first, or watch the larger model alone"
            )


def candidates(casts: Sequence[str | Cast]) -> list[Cast]:
    """The casts, read. Raises UnknownFormat, InvalidCast, and WindowError for one that no window can measure."""
    chosen = [Cast.parse(cast) if isinstance(cast, str) else cast for cast in casts]
    for cast in chosen:
        if reason := why_not_measurable(cast):
            raise WindowError(reason)
    return chosen


def _check(model: Any, optimizer: Any, steps: int, every: int, overhead: float | None, curvature_steps: int) -> None:
    if not isinstance(model, nn.Module):
        raise WindowError(f"probe needs a torch.nn.Module, got {type(model).__name__}")
    if not hasattr(optimizer, "register_step_post_hook"):
        raise WindowError(
            f"probe needs an optimizer with step hooks (any torch.optim.Optimizer), got {type(optimizer).__name__}"
        )
    if steps < 1:
        raise WindowError(f"a window of {steps} steps records nothing; give steps=1 or more (20 is usual)")
    if every < 1:
        raise WindowError(f"every={every}: record each k-th step, k at least 1")
    if overhead is not None and not 0 < overhead <= 1:
        raise WindowError(f"overhead={overhead}: a share of the training time, above 0 and at most 1, or None")
    if curvature_steps < 0:
        raise WindowError(f"curvature_steps={curvature_steps}: 0 turns it off, 2 is usual")
