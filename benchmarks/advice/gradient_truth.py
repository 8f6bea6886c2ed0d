"""What a cast in the backward pass really does to every parameter's gradient, beside the minibatch's own noise in it.

At the checkpoint's weights, for many batches b: the exact gradient G_b, and the gradient with one tensor cast, whose
error is E_b. Of each parameter, summed over its elements:

    energy      mean |G_b|²                        noise      Σ var_b(G_b): what the choice of the minibatch does
    error       mean |E_b|²                        scatter    Σ var_b(E_b): its part that is not alike in all
    shrinkage   −Σ⟨E_b, G_b⟩ / Σ|G_b|²: the share of the gradient that the cast takes away

An optimizer of Adam's kind divides each element by its own size, so the same sums are taken once more with each
element divided by the root of its mean square over the batches: `noise_each`, `error_each`, `scatter_each`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.advice.data import Batch
from benchmarks.advice.forward_truth import UNSEEN
from benchmarks.advice.ledger import Ledger
from benchmarks.advice.models import Trainable
from benchmarks.advice.moved import CastBackward, Met, casting
from probes.casts import Cast
from probes.records import GRADIENT, Slot

EXACT_BATCHES = 48  # for the minibatch's noise
BATCHES = 12  # a pair; the first of those

Pair = tuple[Slot, str]


@dataclass(frozen=True)
class GradientTruth:
    """One pair's, at one parameter.

    ratio, ratio_se   error over minibatch noise, and its standard error over batches
    alike, alike_se   the mean error over minibatch noise, over the whole gradient whatever the optimizer, without bias;
                      and the standard error that it has at most, were all of the error's scatter along one direction
    alike_share       of the error's energy that is the mean error's, 0 to 1 but for chance
    shrinkage         share of the gradient that is taken away
    """

    ratio: float
    ratio_se: float
    alike: float
    alike_se: float
    alike_share: float
    shrinkage: float

    @property
    def decided(self) -> bool:
        """The ratio is more than twice its standard error."""
        return self.ratio > 2 * self.ratio_se


NOTHING = GradientTruth(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class _Exact:
    """Gradients of many batches, [batches, numbers], and where each parameter stands in a row."""

    def __init__(self, trainable: Trainable, model: nn.Module) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.sizes = [parameter.numel() for _, parameter in model.named_parameters()]
        self.batches = [trainable.batch(UNSEEN + index, 0) for index in range(EXACT_BATCHES)]
        self.rows = torch.stack([gradient_of(trainable, model, batch) for batch in self.batches])
        self.size_of_each = self.rows.square().mean(0).sqrt()

    def each(self, rows: Tensor) -> Tensor:
        """Divided by each element's own size; zero where it has none."""
        return torch.where(self.size_of_each > 0, rows / self.size_of_each, 0.0)

    def by_parameter(self, values: Tensor) -> list[Tensor]:
        """Sums over each parameter, of [..., numbers]; float64."""
        return [part.double().sum(-1) for part in values.split(self.sizes, dim=-1)]


def measure_gradients(
    trainable: Trainable,
    model: nn.Module,
    slots: Sequence[Met],
    casts: Sequence[Cast],
    ledger: Ledger,
    progress: Callable[[str], object],
) -> None:
    """Add a record for each pair that the ledger has none of, and one for the exact gradients."""
    known = {(record["site"], record["role"], record["cast"]) for record in ledger.of("gradient")}
    wanted = [(met, cast) for met in slots for cast in casts if (*met.slot, str(cast)) not in known]
    if not wanted:
        return
    exact = _Exact(trainable, model)
    if not ledger.of("exact"):
        ledger.add(_exact_record(exact))
    with CastBackward(model) as hook:
        for count, (met, cast) in enumerate(wanted):
            started = time.process_time()
            with casting(hook, met.slot, cast):
                rows = [gradient_of(trainable, model, batch) for batch in exact.batches[:BATCHES]]
            errors = torch.stack(rows) - exact.rows[:BATCHES]
            ledger.add(
                {
                    "kind": "gradient",
                    **met.slot._asdict(),
                    "cast": str(cast),
                    "at": _at_each(exact, errors),
                    "seconds": round(time.process_time() - started, 4),
                }
            )
            progress(f"{trainable.name}: gradients, pair {count} of {len(wanted)}")


def gradient_of(trainable: Trainable, model: nn.Module, batch: Batch) -> Tensor:
    """All parameters' gradients of one batch's loss in one row, float32."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(trainable.loss(model, batch), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)]
    )


def gradient_truths(
    ledger: Ledger, model: nn.Module, parameter_of: Mapping[str, str | None], adaptive: bool
) -> dict[Pair, GradientTruth]:
    """What a ledger's gradient records come to.

    A gradient and an input are judged at their site's own weight. A weight, and what enters a product without one, are
    judged at the matrix among the parameters that their error hits hardest: not at biases, because those of keys have
    no gradient but rounding's. `parameter_of` says which site has which parameter. `adaptive`: each element divided by
    its own size.
    """
    (exact,) = ledger.of("exact")
    kind = "_each" if adaptive else ""
    matrices = {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    found = {}
    for record in ledger.of("gradient"):
        slot = Slot(record["site"], record["role"])
        own = parameter_of.get(slot.site) if slot.role in (GRADIENT, "input") else None
        names = [own] if own in record["at"] else [name for name in record["at"] if name in matrices]
        each = [_at(exact["at"][name], record["at"][name], kind) for name in names]
        found[slot, record["cast"]] = max(each, key=lambda one: one.ratio, default=NOTHING)
    return found


def _at(exact: Mapping[str, Any], at: Mapping[str, Any], kind: str) -> GradientTruth:
    noise = exact[f"noise{kind}"]
    if not noise:
        return NOTHING
    errors = torch.tensor(at[f"error{kind}"], dtype=torch.float64)
    batches, scatter = len(errors), at["scatter"]
    energy = sum(at["error"]) / batches
    alike = energy - scatter
    alike_se = math.sqrt(2 / (batches * (batches - 1)) * scatter**2 + 4 / batches * scatter * max(alike, 0.0))
    return GradientTruth(
        float(errors.mean()) / noise,
        float(errors.std()) / batches**0.5 / noise,
        alike / exact["noise"],
        alike_se / exact["noise"],
        alike / energy,
        at["shrinkage"],
    )


def _exact_record(exact: _Exact) -> dict[str, Any]:
    each = exact.each(exact.rows)
    sums = {
        "energy": exact.rows.square().mean(0),
        "noise": exact.rows.var(0),
        "noise_each": each.var(0),
    }
    columns = {name: exact.by_parameter(values) for name, values in sums.items()}
    at = {
        name: {column: _short(values[index]) for column, values in columns.items()}
        for index, name in enumerate(exact.names)
    }
    return {"kind": "exact", "batches": EXACT_BATCHES, "at": at}


def _at_each(exact: _Exact, errors: Tensor) -> dict[str, Any]:
    """Sums at the parameters that the error reaches; errors by batch, the rest over them."""
    each, rows = exact.each(errors), exact.rows[: len(errors)]
    columns = {
        "error": exact.by_parameter(errors.square()),
        "error_each": exact.by_parameter(each.square()),
        "scatter": exact.by_parameter(errors.var(0)),
        "scatter_each": exact.by_parameter(each.var(0)),
    }
    along, energy = exact.by_parameter(errors * rows), exact.by_parameter(rows.square())
    found = {}
    for index, name in enumerate(exact.names):
        if not bool(columns["error"][index].any()):
            continue
        found[name] = {column: _short(values[index]) for column, values in columns.items()}
        found[name]["shrinkage"] = _short(-along[index].sum() / energy[index].sum())
    return found


def _short(values: Tensor) -> Any:
    return float(f"{float(values):.6g}") if values.dim() == 0 else [float(f"{value:.6g}") for value in values.tolist()]
