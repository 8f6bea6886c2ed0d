"""What the gradients of a few training steps would tell of the first-order part of a cast's effect: mean ⟨g, δ⟩.

g is the training's own gradient at the operand, by the product's vector-Jacobian product; δ the cast's real error. The
advisor does not predict this part. Here it stands beside brute force to show what could be predicted.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.advice.models import Start
from benchmarks.advice.truth import CASTS
from probes.edges import await_gradient
from probes.records import Slot
from probes.sites import ProductCall, SiteHook
from probes.vjp import vjp

STEPS = 8

Pair = tuple[Slot, str]


def first_orders(start: Start) -> dict[Pair, float]:
    """⟨g, δ⟩ in loss units, mean over training batches at the checkpoint's weights; recurrent layers are left out."""
    trainable, (model, _, step) = start.trainable, start.load()
    with _Sloped(model) as hook:
        for index in range(STEPS):
            trainable.loss(model, trainable.batch(step + index, start.seed)).backward()
    return {pair: fmean(values) for pair, values in hook.found.items()}


class _Sloped(SiteHook):
    """Takes ⟨g, δ⟩ of every cast at every operand when a product's gradient comes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.found: dict[Pair, list[float]] = defaultdict(list)

    def on_product(self, call: ProductCall) -> Any:
        """The product, as it is."""
        result = call.run()
        if call.replayable and isinstance(result, Tensor):
            for part in call.results(result):
                await_gradient(part, lambda gradient: self._take(call, gradient))
        return result

    def _take(self, call: ProductCall, gradient: Tensor) -> None:
        operands = [operand.detach() for operand in call.operands]
        with torch._C.DisableTorchFunction():
            slopes = vjp(call, operands, gradient, range(len(operands)))
            for role, x, slope in zip(call.roles, operands, slopes, strict=True):
                for cast in CASTS:
                    self.found[Slot(call.site, role), str(cast)].append(float((slope * (cast(x) - x)).sum()))
