"""The scored steps of a window: curvature, gradient noise and backward errors, measured by work of our own.

A scored step is one of the user's training steps in which, beside the sketches, every product is kept until the
training's backward pass reaches the loss function's result. There the curvature backward runs (`curvature.py`), inside
a hook on that result: what the loss counts in the total is known then, number by number, and the graph below still
stands, because nothing of it can run before. When the training's own gradients arrive at the products, the candidate
casts' noise in them and the products' backward errors are measured. A backward pass in which no known loss is reached
leaves the training gradient in the curvature's place, marked as such: the empirical Fisher matrix, as if the loss were
a mean over the batch of the logarithms of probabilities. Whatever fails becomes a note: the training goes on.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from probes.casts import Cast
from probes.curvature import Met, Reached, Sums, curvature_sums, parts_of, total_of
from probes.distributed import is_sharded
from probes.edges import gradient_edge
from probes.host import on_host
from probes.losscall import LossCall
from probes.losses import WITHOUT_CURVATURE
from probes.names import Frame, in_backward
from probes.network_curvature import Beyond, network_curvature, share
from probes.noise_found import NoiseFound
from probes.product_errors import ProductError, pooled, site_backward_errors
from probes.records import Evidence, Slot
from probes.samples import crosses_samples, mixes_samples, picks_rows, told_batch
from probes.shrinking import Ratio, believed
from probes.sites import ProductCall
from probes.undisturbed import unchanged, undisturbed
from probes.vjp import vjp

ALONE = "damage is Gauss-Newton's alone, without the network's own curvature"
LONGEST = 200  # characters of an error that a note repeats
UNTOLD_SHARE = 0.01  # of the total that no known loss accounts for, from which on the window says so


class Scoring:
    """Measures in scored steps, and keeps what it found of each slot."""

    def __init__(self, model: nn.Module, casts: Sequence[Cast], adaptive: bool, seed: int, note: Callable[[str], None]):
        self.casts = tuple(casts)
        self.drawing = False
        self.tried = 0
        self.steps: list[int] = []
        self.knew_the_loss = False
        self.whole_batch: set[str] = set()
        self._model, self._seed, self._note = model, seed, note
        self._noise = NoiseFound(self.casts, adaptive, seed)
        self._sharded = is_sharded(model)
        self._found: dict[str, dict[Slot, list[Tensor]]] = {"loss": defaultdict(list), "gradient": defaultdict(list)}
        self._network: dict[Slot, list[Tensor]] = defaultdict(list)
        self._slopes: dict[Slot, list[Tensor]] = defaultdict(list)
        self._errors: list[ProductError] = []
        self._generation, self._numbers = 0, itertools.count()
        self._start_step()

    def _start_step(self) -> None:
        self._generation += 1  # a hook that outlives its step finds another
        # SyncBatchNorm calls no function that an override meets.
        self._synchronized = any(isinstance(m, nn.SyncBatchNorm) and m.training for m in self._model.modules())
        self._met: list[Reached] = []
        # Of losses, by number: kept here, because a hook on a result that held its node would be a ring.
        self._results: dict[int, GradientEdge] = {}
        self._spent = False
        self._declared: set[Any] = set()
        self._drawn: list[dict[Slot, Sums]] = []
        self._beyond: list[dict[Slot, Beyond]] = []
        self._gradients: list[dict[Slot, Sums]] = []
        self._slopes_met: dict[Slot, Tensor] = {}
        self._roots: list[Tensor] = []
        self._told: list[Tensor] = []
        self._reached_a_loss = False

    # What the recorder meets.

    def meet(self, call: ProductCall, results: Sequence[Tensor], batch: int | None, frames: Sequence[Frame]) -> Met:
        """Keep a product of this step, for the curvature backward."""
        if self._spent and not in_backward():
            self._begin_pass()
        met = Met.of(call, results, batch, copies=self._sharded)
        met.whole_batch = met.whole_batch or self._synchronized or any(frame.routed for frame in frames)
        self._met.append(Reached(met, tuple(map(gradient_edge, results))))
        if crosses_samples(call.operation.name, call.operands):
            self._mix()
        return met

    def _begin_pass(self) -> None:
        """A forward pass begins after a backward pass: what that one went through is let go.

        What it did not reach may be gone back through from here, as a generator's products are once its discriminator
        has learned from what they made: it is kept for one pass more.
        """
        self._met = [one for one in self._met if not (one.product.arrived or one.product.kept)]
        for one in self._met:
            one.product.kept = True
        self._results, self._spent = {}, False

    def batch_told_by(self, call: ProductCall, batch: int | None, after: int | None) -> int | None:
        """The batch's size: what it was taken for, or what this call tells of a model whose inputs have time first."""
        told = told_batch(call)
        if told is None or told != (after, batch) or batch == after:
            return batch
        for one in self._met:
            one.product.regroup(told[0])
        return told[0]

    def on_other(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        batch: int | None,
        frames: Sequence[Frame],
    ) -> None:
        """Any other call: does it mix samples?"""
        if function in WITHOUT_CURVATURE:
            self._note(f"{function.__name__} has no curvature (its second derivative is zero): it adds to no damage")
        if mixes_samples(function, args, kwargs):
            self._mix()
        elif frames and picks_rows(function, args, kwargs, batch):
            frames[-1].routed = True
            if len(frames) > 1:
                self._mix()

    def _mix(self) -> None:
        for one in self._met:
            one.product.whole_batch = True

    def on_loss(self, loss: LossCall, result: Tensor, step: int) -> None:
        """A loss function with a known curvature has returned: when its gradient comes, the curvature backward runs."""
        self.knew_the_loss = True
        outputs = {get_gradient_edge(output) for output in loss.outputs if output.requires_grad}
        if loss.name == "declared":
            self._declared |= outputs
        generation, value, number = self._generation, result.detach(), next(self._numbers)
        self._results[number] = get_gradient_edge(result)

        def reached(gradient: Tensor) -> None:
            if self.drawing or generation != self._generation:
                return
            self._spent = True
            if loss.name != "declared" and outputs <= self._declared:
                return
            with undisturbed():
                self._told.append((gradient.double() * value.double()).sum())
                self._draw(loss, gradient, self._results.get(number), step)

        result.register_hook(reached)

    def _draw(self, loss: LossCall, gradient: Tensor, result: GradientEdge | None, step: int) -> None:
        if not loss.intact:
            self._note(f"no curvature of a {loss.name}: what it took was changed in place afterwards")
            return
        self.drawing = True
        try:
            counts = loss.counts(gradient)
            largest, smallest = torch.stack([counts.max(), counts.min()]).tolist() if counts.numel() else (0.0, 0.0)
            if not (math.isfinite(largest) and math.isfinite(smallest)):
                return  # a loss scale that was too large: such a step is skipped
            if smallest < 0:
                self._note(f"some items of {loss.name} count negatively in the loss: their curvature is left out")
            if largest > 0:
                # Draws of the size of one, whatever the loss is divided by: nothing underflows in fp16.
                counts = counts.clamp(min=0) / largest
                seed = self._seed + 1_000_003 * step + len(self._drawn)
                with unchanged(self._model):
                    found = curvature_sums(loss, counts, self._met, self.casts, seed)
                    beyond = self._beyond_gauss_newton(loss, gradient / largest, result, found, seed)
                self._drawn.append({slot: sums.times(largest) for slot, sums in found.items()})
                self._beyond.append({slot: one.times(largest) for slot, one in beyond.items()})
                self.whole_batch |= {one.product.call.site for one in self._met if one.product.whole_batch}
            self._reached_a_loss = True
        except Exception as error:  # whatever it was, the user's training goes on, and the window says so
            self._note(f"no curvature: the extra backward pass failed with {type(error).__name__}: {error}")
        finally:
            self.drawing = False

    def _beyond_gauss_newton(
        self, loss: LossCall, gradient: Tensor, result: GradientEdge | None, known: dict[Slot, Sums], seed: int
    ) -> dict[Slot, Beyond]:
        """What Gauss-Newton leaves out; nothing, with a note, where the network has no second derivative to give."""
        if self._sharded:
            self._note(f"{ALONE}: the model is sharded")
        if self._sharded or result is None or not known:
            return {}
        outputs = [output for output in loss.outputs if output.requires_grad]
        try:
            slopes = torch.autograd.grad([result], outputs, [gradient], retain_graph=True)
            found = network_curvature(
                outputs, slopes, [one for one in self._met if one.product.intact], self.casts, known, seed
            )
        except Exception as error:  # an operation without a second derivative, or too little memory
            said = str(error).strip().partition("\n")[0][:LONGEST]
            self._note(f"{ALONE}: {type(error).__name__}: {said}")
            return {}
        return found

    def on_backward(self, root: Tensor) -> None:
        """A backward pass starts from this loss."""
        self._roots.append(root.detach())
        self._reached_a_loss = False

    def on_gradient(self, met: Met, gradient: Tensor, place: int = 0) -> None:
        """The training's gradient has arrived at a product of this step, at its result of this number."""
        self._spent = met.arrived = True
        if not met.intact:
            return
        with undisturbed():
            if len(met.shapes) > 1:
                joined = met.joined([gradient if at == place else None for at in range(len(met.shapes))])
                assert joined is not None
                gradient = joined
            self._noting(f"no gradient noise at {met.call.site}", self._measure_noise, met, gradient)
            self._noting(f"no gradient noise beneath {met.call.site}", self._measure_beneath, met, gradient)
            self._noting(f"no first-order part at {met.call.site}", self._measure_slopes, met, gradient)
            self._noting(f"no backward error at {met.call.site}", self._measure_errors, met, gradient)

    def _noting(self, what: str, measure: Callable[[Met, Tensor], None], met: Met, gradient: Tensor) -> None:
        try:
            measure(met, gradient)
        except Exception as error:  # as in `_draw`
            self._note(f"{what}: {type(error).__name__}: {error}")

    def _measure_noise(self, met: Met, gradient: Tensor) -> None:
        self._noise.measure(met, gradient)
        if not self._reached_a_loss:
            self._keep_gradient(met, gradient)

    def _measure_beneath(self, met: Met, gradient: Tensor) -> None:
        if self._sharded or not self._noise.has_beneath(met):
            return
        self.drawing = True
        try:
            with unchanged(self._model):
                self._noise.measure_beneath(met, gradient, self._met)
        finally:
            self.drawing = False

    def _measure_slopes(self, met: Met, gradient: Tensor) -> None:
        """⟨g, δ⟩ of each operand and cast, g the training's own gradient; products of a slot add up."""
        if not self.casts:
            return
        operands = [operand.detach().float() for operand in met.call.operands]
        at_operands = vjp(met.call, operands, gradient.detach().float(), range(len(operands)))
        for key, operand, slope in zip(met.keys, operands, at_operands, strict=True):
            found = torch.stack(
                [torch.sum(slope * (cast(operand) - operand), dtype=torch.float64) for cast in self.casts]
            )
            before = self._slopes_met.get(key.slot)
            self._slopes_met[key.slot] = found if before is None else before + found

    def _measure_errors(self, met: Met, gradient: Tensor) -> None:
        self._errors += site_backward_errors(met.call, gradient, seed=self._generation)

    def _keep_gradient(self, met: Met, gradient: Tensor) -> None:
        parts = parts_of(met, [gradient.detach()], self.casts)
        sums = {key.slot: part.sums(1).times(met.batch or 1) for key, part in zip(met.keys, parts, strict=True)}
        self._gradients.append(sums)

    # Steps.

    def end_step(self, step: int, loss_scale: float) -> None:
        """Settle a scored step: curvature in units of the loss without its scale."""
        self.tried += 1
        self._settle_network(loss_scale)
        drawn = self._settle("loss", total_of(self._drawn), loss_scale)
        passes = max(len(self._roots), 1)
        self._settle("gradient", total_of(self._gradients), loss_scale**2 / passes)
        self._noise.end_step(loss_scale)
        for slot, row in zip(self._slopes_met, on_host(list(self._slopes_met.values())), strict=True):
            if bool(row.isfinite().all()):
                self._slopes[slot].append(row / loss_scale)
        if drawn:
            self.steps.append(step)
            self._say_what_is_untold()
        elif self._gradients:
            self.steps.append(step)
        self.forget()

    def _settle(self, kind: str, sums: dict[Slot, Sums], divisor: float) -> bool:
        """Keep a step's sums. They are read here, all at once."""
        rows = on_host([found.times(1 / divisor).numbers() for found in sums.values()])
        if not rows or not all(bool(row.isfinite().all()) for row in rows):
            return False
        for slot, row in zip(sums, rows, strict=True):
            self._found[kind][slot].append(row)
        return True

    def _settle_network(self, loss_scale: float) -> None:
        """As `_settle`, slot by slot; where one of several losses has no second derivative, the step has none."""
        together: dict[Slot, Beyond] = {}
        for part in self._beyond if all(self._beyond) else ():
            for slot, one in part.items():
                together[slot] = together[slot].plus(one) if slot in together else one
        rows = on_host([one.times(1 / loss_scale).numbers() for one in together.values()])
        for slot, row in zip(together, rows, strict=True):
            if bool(row.isfinite().all()):
                self._network[slot].append(row)

    def _say_what_is_untold(self) -> None:
        if not self._roots:
            return
        total, told = (sum(float(part) for part in parts) for parts in (self._roots, self._told))
        if abs(total - told) > UNTOLD_SHARE * max(abs(total), abs(told)):
            self._note(
                "the training loss is no weighted sum of losses with a known curvature: "
                f"they account for {told:.4g} of {total:.4g}, and the rest is in no predicted damage"
            )

    def forget(self) -> None:
        """Let go of every tensor of the step."""
        self._start_step()
        self._noise.forget()

    # What was found.

    @property
    def curvature_from(self) -> str | None:
        """ "loss" where its curvature was known and reached the products; "gradient" where the training's stands."""
        return next((kind for kind, found in self._found.items() if found), None)

    @property
    def backward_errors(self) -> tuple[ProductError, ...]:
        """One record a site, product and cast, over all scored steps."""
        return tuple(pooled(self._errors))

    def evidence(self, slot: Slot, batch_noises: Mapping[str, float | None]) -> Evidence:
        """What was measured of a slot; `batch_noises`: of every site."""
        batch_noise, noise = batch_noises.get(slot.site), self._noise.of(slot, batch_noises)
        first_order, first_order_se = self._first_order(slot)
        mixed = slot.site in self.whole_batch
        measured = self._gauss_newton(slot)
        if measured is None:
            return Evidence(
                first_order=first_order,
                first_order_se=first_order_se,
                relative_noise=noise.relative,
                systematic_noise=noise.systematic,
                systematic_noise_se=noise.systematic_se,
                batch_noise=batch_noise,
                whole_batch=mixed,
            )
        names, (curvature, directional, variance) = [str(cast) for cast in self.casts], measured
        beyond: dict[str, float] = {}
        ratio = self._believed.get(slot)
        if ratio is not None:
            unit, energy = self._unit(slot)
            # What it adds goes with an error's energy; what it takes away is a share of what is there, cast by cast:
            # the difference of two noisy numbers could be anything.
            base = unit * energy if ratio.value > 0 else directional
            kept = 1.0 + min(ratio.value, 0.0)
            more = ratio.value * base
            directional, variance = directional + more, variance * kept**2 + ratio.variance * base.square()
            beyond = dict(zip(names, more.tolist(), strict=True))
        return Evidence(
            curvature=curvature,
            directional=dict(zip(names, directional.tolist(), strict=True)),
            directional_se=dict(zip(names, variance.sqrt().tolist(), strict=True)),
            beyond=beyond,
            first_order=first_order,
            first_order_se=first_order_se,
            relative_noise=noise.relative,
            systematic_noise=noise.systematic,
            systematic_noise_se=noise.systematic_se,
            batch_noise=batch_noise,
            whole_batch=mixed,
        )

    def _first_order(self, slot: Slot) -> tuple[dict[str, float], dict[str, float]]:
        """⟨g, δ⟩ by cast, mean over the scored steps, and that mean's standard error where there are two or more."""
        rows = self._slopes.get(slot)
        if not rows or not self.casts:
            return {}, {}
        names, found = [str(cast) for cast in self.casts], torch.stack(rows)
        means = dict(zip(names, found.mean(0).tolist(), strict=True))
        if len(rows) < 2:
            return means, {}
        return means, dict(zip(names, (found.std(0) / math.sqrt(len(rows))).tolist(), strict=True))

    def _gauss_newton(self, slot: Slot) -> tuple[float, Tensor, Tensor] | None:
        """Curvature, damage [casts] and that mean's variance [casts]; None where nothing reached the slot."""
        kind = self.curvature_from
        rows = self._found[kind].get(slot, []) if kind is not None else []
        if not rows:
            return None
        count = len(self.casts)
        curvature, directional, squares = torch.stack(rows).sum(0).split([1, count, count])
        # For a normal a, the variance of a² is two thirds of E[a⁴].
        return float(curvature) / len(rows), directional / len(rows), 2 / 3 * squares / len(rows) ** 2

    @cached_property
    def _believed(self) -> dict[Slot, Ratio]:
        """Of the network's own curvature to Gauss-Newton's, for slots that have both; asked once the window closes."""
        found: dict[Slot, list[Ratio]] = {}
        for slot, rows in self._network.items():
            unit = self._unit(slot)[0] if self.curvature_from == "loss" else 0.0
            if unit > 0:
                found[slot] = [Ratio(float(row[0]) / unit, float(row[1]) / unit**2) for row in rows]
        return believed(found)

    def _unit(self, slot: Slot) -> tuple[float, Tensor]:
        """Gauss-Newton's damage of an error of length one, and ‖δ‖² for each cast, both means over the steps."""
        found = self._gauss_newton(slot)
        energy = torch.stack([row[2:] for row in self._network[slot]]).mean(0)
        return 0.0 if found is None else float(share(found[1], energy)), energy
