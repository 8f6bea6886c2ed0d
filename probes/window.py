"""The window: a short stretch of real training, watched, and what it leaves to ask questions of.

    with probe(model, optimizer, steps=20) as window:
        for batch in loader:
            train_one_step(batch)
            if window.done:
                break

While it is open, a Recorder meets the model's products; when it closes, what was recorded becomes plain data: sites,
sketches by slot and step, and the evidence of the scored steps. A window that was loaded from a file holds the same.
"""

from __future__ import annotations

import difflib
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from probes.casts import Cast
from probes.coverage import coverage_of
from probes.errors import MalformedWindow, WindowError
from probes.history import SlotHistory, history_of
from probes.numbers import from_json, plain
from probes.recorder import Clock, Recorder
from probes.records import Coverage, Evidence, Product, Site, Slot, read_record

SCHEMA = "numerics-advisor/window/1"
USUAL_CASTS = ("e4m3fn", "e5m2", "int8", "bf16", "fp16")  # the candidates of the directional products


class Window:
    """What was recorded of a model's training. While it is being recorded, only `done` and `notes` can be asked.

    steps        optimizer steps recorded, counted from 0 at the window's start
    losses       the training loss of each recorded step: what backward started from, summed over a step's backward
                 calls; NaN where none was seen
    sites, slots the matrix products met, and their (site, role) rows
    coverage     share of the forward pass's matrix FLOPs that the sites hold, and what was met but not seen
    parameters   dotted name → shape, of the whole model
    notes        what could not be done as asked, in sentences
    """

    def __init__(self) -> None:
        self.done = False
        self.notes: tuple[str, ...] = ()
        self._closed = False

    def _fill(
        self,
        *,
        model_name: str,
        optimizer_name: str,
        parameters: Mapping[str, tuple[int, ...]],
        steps: Sequence[int],
        losses: Sequence[float],
        sites: Sequence[Site],
        coverage: Coverage,
        histories: Mapping[Slot, SlotHistory],
        evidence: Mapping[Slot, Evidence],
        notes: Sequence[str],
    ) -> None:
        self.model_name, self.optimizer_name = model_name, optimizer_name
        self.parameters = dict(parameters)
        self._steps, self._losses = tuple(steps), list(losses)
        self._sites = {site.name: site for site in sites}
        self._coverage = coverage
        self._histories, self._evidence = dict(histories), dict(evidence)
        self.notes = tuple(notes)
        self._closed = True

    def _require_closed(self) -> None:
        if not self._closed:
            raise WindowError("the window is still open: leave its `with` block before asking what it recorded")

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer steps recorded, from 0."""
        self._require_closed()
        return self._steps

    @property
    def losses(self) -> list[float]:
        """Training loss of each recorded step; NaN where no backward call was seen."""
        self._require_closed()
        return self._losses

    @property
    def sites(self) -> tuple[Site, ...]:
        """The matrix products, in the order in which they were met."""
        self._require_closed()
        return tuple(self._sites.values())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every (site, role) with a history."""
        self._require_closed()
        return tuple(self._histories)

    @property
    def coverage(self) -> Coverage:
        """What share of the forward pass's matrix FLOPs was seen."""
        self._require_closed()
        return self._coverage

    @property
    def total_flops(self) -> float:
        """All matrix FLOPs a step, forward and backward; what was not seen is taken to cost twice more in backward."""
        return sum(site.flops for site in self.sites) + 3 * self.coverage.unseen_flops

    def site(self, name: str) -> Site:
        """The site of this name. Raises WindowError with near matches."""
        self._require_closed()
        if name not in self._sites:
            raise WindowError(f"the window has no site {name!r}{_nearest(name, self._sites)}")
        return self._sites[name]

    def history(self, site: str, role: str) -> SlotHistory:
        """The sketches of one slot, step by step. Raises WindowError with near matches."""
        slot = self._slot(site, role)
        return self._histories[slot]

    def evidence(self, site: str, role: str) -> Evidence:
        """What the scored steps measured of one slot."""
        return self._evidence.get(self._slot(site, role), Evidence())

    def _slot(self, site: str, role: str) -> Slot:
        self.site(site)
        slot = Slot(site, role)
        if slot not in self._histories:
            roles = ", ".join(found.role for found in self._histories if found.site == site)
            raise WindowError(f"site {site!r} has no role {role!r}; it has {roles}")
        return slot

    def header(self) -> dict[str, Any]:
        """All but the sketches, as JSON holds it: non-finite numbers are "NaN", "Infinity" and "-Infinity"."""
        self._require_closed()
        header: dict[str, Any] = plain(
            {
                "schema": SCHEMA,
                "model": self.model_name,
                "optimizer": self.optimizer_name,
                "parameters": self.parameters,
                "steps": self._steps,
                "losses": self._losses,
                "coverage": self._coverage,
                "notes": self.notes,
                "sites": list(self._sites.values()),
                "slots": [
                    {
                        "site": slot.site,
                        "role": slot.role,
                        "dtype": self._sites[slot.site].dtypes.get(slot.role),
                        "shape": self._sites[slot.site].shapes.get(slot.role),
                        "evidence": self._evidence.get(slot, Evidence()),
                    }
                    for slot in self._histories
                ],
            }
        )
        return header

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], histories: Sequence[SlotHistory]) -> Window:
        """A window from its header and its slots' histories, in the header's order. Raises MalformedWindow."""
        schema = header.get("schema") if isinstance(header, Mapping) else None
        if schema != SCHEMA:
            raise MalformedWindow(f"this is no window of a known version: schema {schema!r}, expected {SCHEMA!r}")
        window = cls()
        try:
            slots = [Slot(str(entry["site"]), str(entry["role"])) for entry in header["slots"]]
            sites = [read_record(Site, entry) for entry in header["sites"]]
            evidence = [read_record(Evidence, entry["evidence"]) for entry in header["slots"]]
            steps = [int(step) for step in header["steps"]]
            losses = [float(from_json(loss)) for loss in header["losses"]]
            parameters = {str(name): tuple(int(n) for n in shape) for name, shape in header["parameters"].items()}
            notes = [str(note) for note in header["notes"]]
            names = str(header["model"]), str(header["optimizer"])
            coverage = read_record(Coverage, header["coverage"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, MalformedWindow):
                raise
            raise MalformedWindow(f"the window's header cannot be read: {error!r}") from error
        if len(losses) != len(steps):
            raise MalformedWindow(f"the window has {len(steps)} steps but {len(losses)} losses")
        if len(histories) != len(slots) or len(set(slots)) != len(slots):
            raise MalformedWindow(f"the window names {len(slots)} slots and holds {len(histories)} histories")
        roles = {site.name: site.roles for site in sites}
        for slot in slots:
            if slot.role not in roles.get(slot.site, ()):
                raise MalformedWindow(
                    f"the window has sketches of {slot.role!r} at {slot.site!r}, which it does not list"
                )
        window._fill(
            model_name=names[0],
            optimizer_name=names[1],
            parameters=parameters,
            steps=steps,
            losses=losses,
            sites=sites,
            coverage=coverage,
            histories=dict(zip(slots, (history.checked() for history in histories), strict=True)),
            evidence=dict(zip(slots, evidence, strict=True)),
            notes=notes,
        )
        window.done = True
        return window

    def to_bytes(self) -> bytes:
        """The window file's bytes (`windowfile.py`)."""
        from probes.windowfile import window_to_bytes

        return window_to_bytes(self)

    def save(self, path: str | Path) -> None:
        """Write the window file; an existing one is replaced whole or not at all."""
        from probes.windowfile import write_window

        write_window(self, Path(path))

    def __repr__(self) -> str:
        if not self._closed:
            return "<Window, still open>"
        share = f"{self._coverage.share:.1%} of matrix FLOPs"
        return f"<Window of {self.model_name}: {len(self._steps)} steps, {len(self._sites)} sites, {share}>"


class probe(AbstractContextManager[Window]):  # noqa: N801 - used as a function, like torch.no_grad
    """Watch a model's training for some optimizer steps; the Window it gives is filled when the block is left.

    model, optimizer   those that are being trained; any torch.optim.Optimizer
    steps              optimizer steps until the window ends itself, at least 1
    every              record each k-th step
    overhead           let the watching take this share of the time (0.05 is a twentieth), and record fewer steps
                       for it; None records as `every` says
    curvature_steps    recorded steps on which damage and gradient noise are measured by extra backward passes; 0: none
    casts              candidates for those measurements, as strings or Casts

    An exception inside leaves the model without a hook; the steps that were complete stay in the window. Raises
    WindowError for arguments that make no window.
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
    ) -> None:
        _check(model, optimizer, steps, every, overhead, curvature_steps)
        self._model, self._optimizer = model, optimizer
        self._total, self._every, self._overhead = steps, every, overhead
        chosen = [Cast.parse(cast) if isinstance(cast, str) else cast for cast in casts or USUAL_CASTS]
        self._recorder = Recorder(model, chosen)
        self._scored = _spread(curvature_steps, range(0, steps, every))
        self._clock: Clock | None = None
        self._window = Window()
        self._handles: list[Any] = []
        self._entered = False

    def __enter__(self) -> Window:
        if self._entered:
            raise WindowError("a window can be opened once; call probe(...) again for another")
        self._entered = True
        self._clock = None if self._overhead is None else Clock(self._overhead)
        self._recorder.__enter__()
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self._plan_step(allowed=self._clock is None)
        return self._window

    def __exit__(self, kind: Any, *error: Any) -> None:
        self._stop()
        self._recorder.__exit__(kind, *error)
        notes = list(self._recorder.notes)
        if self._recorder.step < self._total and kind is None:
            notes.append(f"the window was left after {self._recorder.step} of {self._total} optimizer steps")
        if kind is not None:
            notes.append(f"the window was cut short by {kind.__name__} in step {self._recorder.step}")
        self._window.done = True
        _close(self._window, self._recorder, self._model, self._optimizer, notes)

    def _before_step(self, *_: Any) -> None:
        self._recorder.follow_gradients()

    def _after_step(self, *_: Any) -> None:
        recorder = self._recorder
        recorded = recorder.recording
        recorder.end_step()
        if recorder.step >= self._total:
            self._stop()
            self._window.done = True
            return
        allowed = True if self._clock is None else self._clock.lap(recorded)
        self._plan_step(allowed)

    def _plan_step(self, allowed: bool) -> None:
        step = self._recorder.step
        self._recorder.recording = allowed and step % self._every == 0
        due = len([s for s in self._scored if s <= step])
        self._recorder.scoring = self._recorder.recording and len(self._recorder.scored) < due

    def _stop(self) -> None:
        """Stop watching: hooks off. The override mode itself is left when the `with` block is."""
        self._recorder.recording = self._recorder.scoring = False
        self._recorder.stack.detach()
        while self._handles:
            self._handles.pop().remove()


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


def _spread(count: int, steps: range) -> list[int]:
    """`count` of these steps, evenly over the window."""
    count = min(count, len(steps))
    return [steps[(2 * i + 1) * len(steps) // (2 * count)] for i in range(count)]


def _close(
    window: Window,
    recorder: Recorder,
    model: nn.Module,
    optimizer: Any,
    notes: list[str],
) -> None:
    steps = max(len(recorder.recorded), 1)
    rows = {slot: rows for slot, rows in recorder.rows.items() if rows}
    sites = [
        Site(
            name=name,
            op=tally.op,
            roles=(*tally.roles, *(["grad_output"] if Slot(name, "grad_output") in rows else [])),
            shapes=dict(tally.shapes),
            dtypes=dict(tally.dtypes),
            elements={role: count / steps for role, count in tally.elements.items()},
            products=tuple(
                Product(product, operands, flops / steps) for (product, operands), flops in tally.products.items()
            ),
            parameter=tally.parameter,
            parameter_shape=None if tally.parameter is None else tuple(model.get_parameter(tally.parameter).shape),
            calls=tally.calls / steps,
        )
        for name, tally in recorder.tallies.items()
        if any(slot.site == name for slot in rows)
    ]
    if recorder.tried and not recorder.scored:
        notes.append(
            "no loss function with a known curvature was met (F.cross_entropy, F.mse_loss), so damage is not predicted"
        )
    window._fill(
        model_name=type(model).__name__,
        optimizer_name=type(optimizer).__name__,
        parameters={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        steps=recorder.recorded,
        losses=recorder.losses,
        sites=sites,
        coverage=coverage_of(recorder.seen_flops, recorder.unseen or Counter()),
        histories={slot: history_of(found) for slot, found in rows.items()},
        evidence={slot: _evidence(slot, recorder) for slot in rows},
        notes=notes,
    )


def _evidence(slot: Slot, recorder: Recorder) -> Evidence:
    sums = recorder.curvature.get(slot, [])
    steps = len(sums)
    directional: dict[str, float] = {}
    spread: dict[str, float] = {}
    for cast in sums[0].directional if sums else ():
        directional[cast] = sum(part.directional[cast] for part in sums) / steps
        # For a normal a, the variance of a² is two thirds of E[a⁴].
        spread[cast] = (2 / 3 * sum(part.squares[cast] for part in sums)) ** 0.5 / steps
    parameter = recorder.tallies[slot.site].parameter
    return Evidence(
        curvature=sum(part.curvature for part in sums) / steps if sums else None,
        directional=directional,
        directional_se=spread,
        relative_noise={cast: statistics.fmean(ratios) for cast, ratios in recorder.noise_ratios.get(slot, {}).items()},
        batch_noise=_batch_noise(parameter, recorder),
        whole_batch=slot.site in recorder.whole_batch,
    )


def _batch_noise(parameter: str | None, recorder: Recorder) -> float | None:
    """Minibatch noise over gradient energy: of the site's parameter, or of all together where it has none."""
    followed = [recorder.gradient_noise[parameter]] if parameter in recorder.gradient_noise else []
    followed = followed or list(recorder.gradient_noise.values())
    energy = sum(noise.energy for noise in followed)
    return sum(noise.differences for noise in followed) / energy if energy else None


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; near: {', '.join(near)}" if near else ""
