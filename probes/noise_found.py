"""What a window's scored steps find of casts' noise in gradients: measured in each, settled at its end, told at last.

What a cast's error is in a weight's gradient is kept beside the site of that weight: its own, or where a product has
none the nearest beneath it (`passing.py`), of which the one that is hit hardest counts.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from probes.casts import Cast
from probes.curvature import Met, Reached, is_weight
from probes.host import on_host
from probes.mean_error import MeanError, settled
from probes.noise import UPSTREAM, NoiseEnergies, noise_energies
from probes.passing import Passed, Passing
from probes.records import GRADIENT, Slot

LADDER = tuple(map(Cast.parse, ("int8", "e2m2/tensor/current/nearest", "e2m0/tensor/current/nearest")))
"""Casts of gradients that are measured whether they are candidates or not. They flush ever more, the last nearly all:
from how the noise grows from one to the next, that of any other cast is told (`advisor/estimates.py`)."""


@dataclass(frozen=True)
class Noise:
    """Of one slot, by cast, as `records.Evidence` has it: relative and systematic noise, and that one's error."""

    relative: dict[str, float] = field(default_factory=dict)
    systematic: dict[str, float] = field(default_factory=dict)
    systematic_se: dict[str, float] = field(default_factory=dict)


class _At(NamedTuple):
    """A cast of a slot, and the site of the weight in whose gradient its error is."""

    slot: Slot
    cast: str
    site: str


class NoiseFound:
    """Measures, and keeps what it found."""

    def __init__(self, casts: Sequence[Cast], adaptive: bool, seed: int) -> None:
        """`adaptive`: the optimizer divides each element by its own size."""
        self._casts, self._adaptive, self._seed = tuple(casts), adaptive, seed
        self._also = [cast for cast in LADDER if cast not in casts] if casts else []
        self._energies: dict[Slot, dict[str, NoiseEnergies]] = defaultdict(dict)
        self._passed: dict[Slot, dict[_At, Tensor]] = defaultdict(dict)
        self._means: dict[Slot, dict[_At, MeanError]] = defaultdict(dict)
        self.forget()

    def forget(self) -> None:
        """Let go of every tensor of the step."""
        self._step: list[tuple[Slot, str, NoiseEnergies]] = []
        self._step_passed: list[Passed] = []
        self._step_sketches: dict[_At, Tensor] = {}

    def measure(self, met: Met, gradient: Tensor) -> None:
        """The training's gradient has arrived at a product's result. Call it in `undisturbed()`."""
        found = noise_energies(
            met.call, gradient, self._casts, self._adaptive, self._seed_at(met.call.site), self._also
        )
        for slot, energies in found.items():
            for cast, one in energies.items():
                self._step.append((slot, cast, replace(one, sketch=None)))
                self._add_sketch(_At(slot, cast, slot.site), one.sketch)

    def measure_beneath(self, met: Met, gradient: Tensor, others: Sequence[Reached]) -> None:
        """The same of a product without a weight, in the gradients of those beneath; `others`: all products met.

        Call it in `undisturbed()`, with hooks of our own asleep.
        """
        passing = Passing(met, others, self._adaptive, self._seed_at)
        for one in passing.passed(gradient.detach().float(), self._casts, self._also):
            self._step_passed.append(replace(one, sketch=None))
            self._add_sketch(_At(one.slot, one.cast, one.site), one.sketch)

    def has_beneath(self, met: Met) -> bool:
        """Whether a product's noise is to be looked for beneath it."""
        return bool(self._casts) and not any(map(is_weight, met.call.roles))

    def _seed_at(self, site: str) -> int:
        """The same parts of a gradient are calculated in every step, so that their energies add."""
        return self._seed + zlib.crc32(site.encode())

    def _add_sketch(self, at: _At, sketch: Tensor | None) -> None:
        if sketch is not None:
            before = self._step_sketches.get(at)
            self._step_sketches[at] = sketch if before is None else before + sketch

    # Steps.

    def end_step(self, loss_scale: float) -> None:
        """Add the step's energies to the slots'; a gradient that is not finite says nothing.

        Where a product's shape is another than before (shorter sequences), it has other channels: the latest stay.
        """
        for (slot, cast, found), row in zip(
            self._step, on_host([found.values.flatten() for *_, found in self._step]), strict=True
        ):
            values = row.reshape(2, -1) / loss_scale**2
            if values.isnan().any() or not values[1].isfinite().all():
                continue
            before = self._energies[slot].get(cast)
            if before is not None and before.groups == found.groups:
                values = before.values + values
            self._energies[slot][cast] = NoiseEnergies(values, found.groups)
        for one, row in zip(self._step_passed, on_host([one.energies for one in self._step_passed]), strict=True):
            at, energies = _At(one.slot, one.cast, one.site), row / loss_scale**2
            if bool(row.isfinite().all()):
                earlier = self._passed[one.slot].get(at)
                if earlier is not None and earlier.shape == energies.shape:
                    energies = earlier + energies
                self._passed[one.slot][at] = energies
        self._settle_means(loss_scale)

    def _settle_means(self, loss_scale: float) -> None:
        read = dict(zip(self._step_sketches, on_host(list(self._step_sketches.values())), strict=True))
        finite = {at: row for at, row in read.items() if bool(row.isfinite().all())}
        energies: dict[str, float] = {}  # of the weights' gradients, by site: only a site's own sketches hold them
        for at, row in finite.items():
            if at.site == at.slot.site:
                sketch, energies[at.site] = settled(row, loss_scale)
                self._means[at.slot].setdefault(at, MeanError()).add(sketch, energies[at.site])
        for at, row in finite.items():
            if at.site != at.slot.site and at.site in energies:
                self._means[at.slot].setdefault(at, MeanError()).add(row / loss_scale, energies[at.site])

    # What was found.

    def of(self, slot: Slot, batch_noises: Mapping[str, float | None]) -> Noise:
        """A slot's; `batch_noises`: of every site."""
        batch_noise = batch_noises.get(slot.site)
        ratios = {cast: found.ratio for cast, found in self._energies.get(slot, {}).items()}
        noise = {cast: ratio for cast, ratio in ratios.items() if not math.isnan(ratio)}
        places = {cast: (_At(slot, cast, slot.site), 1.0) for cast in ratios}
        if batch_noise is not None:
            for at, ratio, factor in self._beneath(slot, batch_noise, batch_noises):
                noise[at.cast], places[at.cast] = ratio, (at, factor)
        if slot.role == GRADIENT and batch_noise is not None:
            # Error over gradient, sample by sample, is the ratio to the batch's noise itself; `noise` is over the mean
            # gradient. At the head of a classifier the gradient sums to zero over classes, and a rounded one does not.
            for cast, upstream in self._energies.get(Slot(slot.site, UPSTREAM), {}).items():
                if cast in noise and not math.isnan(upstream.ratio):
                    noise[cast] = max(noise[cast], upstream.ratio * batch_noise)
        means = {
            cast: (self._means[slot][at], f) for cast, (at, f) in places.items() if at in self._means.get(slot, {})
        }
        known = {cast: (mean, factor) for cast, (mean, factor) in means.items() if not math.isnan(mean.ratio)}
        return Noise(
            noise,
            {cast: factor * mean.ratio for cast, (mean, factor) in known.items()},
            {cast: factor * mean.ratio_se for cast, (mean, factor) in known.items()},
        )

    def _beneath(
        self, slot: Slot, batch_noise: float, batch_noises: Mapping[str, float | None]
    ) -> list[tuple[_At, float, float]]:
        """Of what entered no weight's gradient by itself, for each cast the weight that it hits hardest, and its noise.

        Noise and mean error are to be over the batch's noise there, and will be taken over that of the slot: the noise
        is told times their quotient, and beside it what the mean error's is to be multiplied by.
        """
        hardest: dict[str, tuple[_At, float, float]] = {}
        for at, energies in self._passed.get(slot, {}).items():
            there, own = batch_noises.get(at.site), self._energies.get(Slot(at.site, GRADIENT), {})
            signal = next(iter(own.values()), None)
            if not there or signal is None or signal.values.shape[1] != len(energies):
                continue
            factor = batch_noise / there
            ratio = factor * replace(signal, values=torch.stack([energies, signal.values[1]])).ratio
            if not math.isnan(ratio) and (at.cast not in hardest or ratio > hardest[at.cast][1]):
                hardest[at.cast] = (at, ratio, factor)
        return list(hardest.values())
