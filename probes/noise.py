"""Gradient noise: what each candidate cast's error puts into the gradients of a scored step, beside those gradients.

In the training backward each cast's error enters the products that make the gradients, and its energy is compared with
theirs: over the whole gradient where the optimizer takes it as it is (SGD), and channel by channel, then averaged,
where it divides each element by its own size (Adam and its kin), because there a channel whose small gradients are
flushed to zero loses as much as any other.

Of a large gradient a part is calculated: some channels, some positions, some entries of a batch of products, each
element of it exactly, its whole inner sum included (`cuts.py`). A ratio of energies, or a mean of ratios over channels,
is then a sample's.

Energies are added over steps before they are divided, channel by channel. A rare token's channel has next to no
gradient in most batches, all of which a cast flushes, and a large one in a few: the optimizer divides by what is usual
over many steps, and a mean of each step's ratios was 2 to 4 times too high for the heads of three language models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probes.casts import Cast
from probes.curvature import is_weight
from probes.cuts import Cut, cuts_of
from probes.mean_error import Signs, Sketches
from probes.records import GRADIENT, Slot
from probes.recurrent import STATES
from probes.sites import ProductCall
from probes.vjp import Pullback, vjp

UPSTREAM = "(upstream)"
"""Role of what a weight's site passes on: its grad_output's noise in the gradient of its input."""

_Pair = tuple[Tensor, Tensor, tuple[int, ...]]  # an error, the gradient that it is in, and that gradient's channels


@dataclass(frozen=True)
class NoiseEnergies:
    """Of a cast's error in the gradients that it enters, and of those gradients: `values` float64 [2, channels].

    groups   how many of the channels, one after another, are one dimension's; a single channel is the whole gradient
    sketch   of the error of a cast of `grad_output` in a weight's gradient, beside that gradient's (`mean_error.py`):
             float32 [2·NUMBERS + 1]; None of others
    """

    values: Tensor
    groups: tuple[int, ...]
    sketch: Tensor | None = None

    @property
    def ratio(self) -> float:
        """Error over gradient, the mean over a group's channels that have a gradient, of the group where it is largest.

        NaN where no channel has one.
        """
        noise, signal = self.values
        ratios = (noise / signal).where(signal > 0, torch.nan)
        means = torch.stack([group.nanmean() for group in ratios.split(self.groups)])
        return float("nan") if bool(means.isnan().all()) else float(means[~means.isnan()].max())


def noise_energies(
    call: ProductCall,
    gradient: Tensor,
    casts: Sequence[Cast],
    adaptive: bool,
    seed: int = 0,
    also: Sequence[Cast] = (),
) -> dict[Slot, dict[str, NoiseEnergies]]:
    """For each role and cast: the energy of the cast's error in the gradients it enters, beside those gradients' own.

    Numbers on the device. Those of calls with the same shapes and seed add up. `adaptive`: the optimizer divides each
    element by its own size. `grad_output` enters the weight gradient (both gradients where neither operand is a
    parameter); an operand enters the other's gradient. Attention and recurrent layers are not bilinear: an operand's
    error is there the difference of two backward passes, in all gradients that the call makes. What `grad_output`'s
    error puts into the input's gradient, and so into all that lies upstream, is beside it under the role UPSTREAM, over
    all samples together. Nothing is said of a recurrent layer's first state where that is zero, as no cast moves it.
    `also`: casts of `grad_output` alone. `seed`: of the parts that are calculated and of the signs of sketches. Call it
    in `undisturbed()`.
    """
    tensors = [*(operand.detach().float() for operand in call.operands), gradient.detach().float()]
    trained = [i for i, operand in enumerate(call.operands) if operand.requires_grad]
    by_channel = _goes_by_channel(call, adaptive)
    products = _Products.of(call, tensors, trained, seed)
    energies: dict[Slot, dict[str, NoiseEnergies]] = defaultdict(dict)
    for i, role in enumerate([*call.roles, GRADIENT]):
        entered = _enters(call, i, trained)
        if not entered or (role in STATES and not bool(tensors[i].any())):
            continue
        is_gradient = i == len(call.operands)
        beneath = [j for j in trained if j not in entered] if is_gradient else []
        # Only of a parameter is there a mean over batches: activations' gradients are of other samples each time.
        of_weights = is_gradient and all(is_weight(call.roles[j]) for j in entered)
        sketches = Sketches(products.gradients(entered), seed) if of_weights else None
        for cast in (*casts, *also) if is_gradient else casts:
            found = products.errors(i, cast(tensors[i]), [*entered, *beneath])
            energies[Slot(call.site, role)][str(cast)] = _energies(_of(entered, found), by_channel, sketches)
            if beneath:
                energies[Slot(call.site, UPSTREAM)][str(cast)] = _energies(_of(beneath, found), by_channel=False)
    return energies


class WeightNoise:
    """Energies of errors at one product's result in its weight's gradient, channel by channel as in `noise_energies`.

    Of the same parts of that gradient, for the same seed, and with the same signs of sketches. For errors that come
    from elsewhere (`passing.py`).
    """

    def __init__(self, call: ProductCall, like: Tensor, adaptive: bool, seed: int = 0) -> None:
        """`like`: any tensor of the result's shape."""
        tensors = [*(operand.detach().float() for operand in call.operands), like]
        trained = [i for i, o in enumerate(call.operands) if o.requires_grad and is_weight(call.roles[i])]
        self._by_channel = _goes_by_channel(call, adaptive)
        self._cuts = cuts_of(call, tensors, trained, seed)
        self._pullbacks = [Pullback(call, cut.of_all(tensors)[:-1], cut.targets) for cut in self._cuts]
        self._place, self._signs = len(call.operands), Signs(seed)

    def of(self, error: Tensor, sketched: bool) -> tuple[Tensor, Tensor | None]:
        """float64 [channels]; and, where asked for, the error's sketch, float32 [NUMBERS]."""
        pairs = [
            (found, found, cut.channels)
            for cut, pullback in zip(self._cuts, self._pullbacks, strict=True)
            for found in pullback.of(cut.of(self._place, error))
        ]
        sketch = self._signs.sketched([found for found, *_ in pairs]) if sketched else None
        return _energies(pairs, self._by_channel).values[0], sketch


@dataclass(frozen=True)
class _Products:
    """The gradient products of a call, of which some parts are calculated: for each part its tensors and gradients."""

    call: ProductCall
    cuts: Sequence[Cut]
    parts: Sequence[Sequence[Tensor]]
    pullbacks: Sequence[Pullback]
    exact: Sequence[dict[int, Tensor]]

    @classmethod
    def of(cls, call: ProductCall, tensors: Sequence[Tensor], trained: Sequence[int], seed: int) -> _Products:
        """`tensors`: the operands and the gradient at the result, float32."""
        cuts = cuts_of(call, tensors, trained, seed)
        parts = [cut.of_all(tensors) for cut in cuts]
        pullbacks = [Pullback(call, part[:-1], cut.targets) for cut, part in zip(cuts, parts, strict=True)]
        gradients = [
            dict(zip(cut.targets, pullback.of(part[-1]), strict=True))
            for cut, pullback, part in zip(cuts, pullbacks, parts, strict=True)
        ]
        return cls(call, cuts, parts, pullbacks, gradients)

    def gradients(self, wanted: Sequence[int]) -> list[Tensor]:
        """The exact gradients of these operands, part by part as in `errors`."""
        return [whole[j] for cut, whole in zip(self.cuts, self.exact, strict=True) for j in cut.targets if j in wanted]

    def errors(self, i: int, moved: Tensor, wanted: Sequence[int]) -> list[tuple[int, _Pair]]:
        """What replacing tensor i changes in the gradients of these operands: the operand and a pair, cut by cut."""
        pairs: list[tuple[int, _Pair]] = []
        for at, (cut, part, whole) in enumerate(zip(self.cuts, self.parts, self.exact, strict=True)):
            targets = [j for j in cut.targets if j in wanted]
            if not targets:
                continue
            there = cut.of(i, moved)
            if i == len(self.call.operands):
                found = dict(zip(cut.targets, self.pullbacks[at].of(there - part[i]), strict=True))
            else:
                linear = self.call.operation.multilinear
                changed = [(there - one if linear else there) if k == i else one for k, one in enumerate(part[:-1])]
                found = dict(zip(targets, vjp(self.call, changed, part[-1], targets), strict=True))
                if not linear:
                    found = {j: one - whole[j] for j, one in found.items()}
            pairs += [(j, (found[j], whole[j], cut.channels)) for j in targets]
        return pairs


def _of(wanted: Sequence[int], pairs: Sequence[tuple[int, _Pair]]) -> list[_Pair]:
    return [pair for j, pair in pairs if j in wanted]


def _enters(call: ProductCall, i: int, trained: Sequence[int]) -> list[int]:
    """The operands whose gradients the tensor in role i enters; i == len(operands) is grad_output."""
    if i == len(call.operands):
        weights = [j for j in trained if is_weight(call.roles[j])]
        return weights or list(trained)
    if not call.operation.multilinear:
        return list(trained)
    return [j for j in trained if j != i]


def _goes_by_channel(call: ProductCall, adaptive: bool) -> bool:
    return adaptive and (call.parameter is not None or _is_recurrent(call))


def _is_recurrent(call: ProductCall) -> bool:
    return not call.operation.multilinear and any(map(is_weight, call.roles))


def _energies(pairs: Sequence[_Pair], by_channel: bool, sketches: Sketches | None = None) -> NoiseEnergies:
    """Of pairs of an error and what it is the error of; by channel, along each of the named dimensions.

    `sketches`: with a sketch of the error.
    """
    whole = torch.stack([torch.stack([_energy(error), _energy(exact)]) for error, exact, _ in pairs]).sum(0)
    sketch = None if sketches is None else sketches.of([error for error, *_ in pairs])
    if not by_channel:
        return NoiseEnergies(whole[:, None], (1,), sketch)
    found = [
        torch.stack([_channel_energy(values, dimension) for values in (error, exact)])
        for error, exact, channels in pairs
        for dimension in channels[: exact.dim()]
    ]
    return NoiseEnergies(torch.cat(found, dim=1), tuple(each.shape[1] for each in found), sketch)


def _channel_energy(values: Tensor, dimension: int) -> Tensor:
    return torch.linalg.vector_norm(values.movedim(dimension, 0).flatten(1), dim=1).double().square()


def _energy(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values).double().square()
