"""Gradient noise: what each candidate cast's error puts into the gradients of a scored step, beside those gradients.

In the training backward each cast's error enters the products that make the gradients, and its energy is compared with
theirs: over the whole gradient where the optimizer takes it as it is (SGD), and channel by channel, then averaged,
where it divides each element by its own size (Adam and its kin), because there a channel whose small gradients are
flushed to zero loses as much as any other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from probes.casts import Cast
from probes.records import GRADIENT, Slot
from probes.sites import ProductCall
from probes.vjp import vjp


def noise_ratios(
    call: ProductCall, gradient: Tensor, casts: Sequence[Cast], adaptive: bool
) -> dict[Slot, dict[str, Tensor]]:
    """For each role and cast: the energy of the cast's error in the gradients it enters, over those gradients' energy.

    Numbers on the device, float64, NaN where the gradients are zero. `adaptive`: the optimizer divides each element by
    its own size. `grad_output` enters the weight gradient (both gradients where neither operand is a parameter); an
    operand enters the other's gradient. Attention is not bilinear: there the error is the difference of two backward
    passes. Call it in `undisturbed()`.
    """
    operands = [operand.detach().float() for operand in call.operands]
    gradient = gradient.detach().float()
    trained = [i for i, operand in enumerate(call.operands) if operand.requires_grad]
    ratios: dict[Slot, dict[str, Tensor]] = defaultdict(dict)
    exact = dict(zip(trained, vjp(call, operands, gradient, trained), strict=True))
    by_channel = adaptive and call.parameter is not None
    for cast in casts:
        for i, role in enumerate([*call.roles, GRADIENT]):
            wanted = _enters(call, i, trained)
            if not wanted:
                continue
            if i == len(operands):
                errors = vjp(call, operands, cast(gradient) - gradient, wanted)
            elif not call.operation.multilinear:
                changed = [cast(operand) if j == i else operand for j, operand in enumerate(operands)]
                errors = [new - exact[j] for j, new in zip(wanted, vjp(call, changed, gradient, wanted), strict=True)]
            else:
                changed = [cast(operand) - operand if j == i else operand for j, operand in enumerate(operands)]
                errors = vjp(call, changed, gradient, wanted)
            pairs = [(error, exact[j]) for j, error in zip(wanted, errors, strict=True)]
            ratios[Slot(call.site, role)][str(cast)] = _relative(pairs, by_channel)
    return ratios


def _enters(call: ProductCall, i: int, trained: Sequence[int]) -> list[int]:
    """The operands whose gradients the tensor in role i enters; i == len(operands) is grad_output."""
    if i == len(call.operands):
        weights = [j for j in trained if call.roles[j] == "weight"]
        return weights or list(trained)
    if not call.operation.multilinear:
        return list(trained)
    return [j for j in trained if j != i]


def _relative(pairs: Sequence[tuple[Tensor, Tensor]], by_channel: bool) -> Tensor:
    """Energy of errors over that of exact values; by channel, the larger mean over the first two dimensions."""
    if not by_channel:
        noise = torch.stack([_energy(error) for error, _ in pairs]).sum()
        return noise / torch.stack([_energy(exact) for _, exact in pairs]).sum()
    found = []
    for error, exact in pairs:
        for dimension in range(min(exact.dim(), 2)):
            noise, signal = (_channel_energy(values, dimension) for values in (error, exact))
            found.append((noise / signal).where(signal > 0, torch.nan).nanmean())
    means = torch.stack(found)
    return means.nan_to_num(-torch.inf).max().where(~means.isnan().all(), torch.nan)


def _channel_energy(values: Tensor, dimension: int) -> Tensor:
    return torch.linalg.vector_norm(values.movedim(dimension, 0).flatten(1), dim=1).double().square()


def _energy(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values).double().square()
