"""What a cast of one tensor really does to the loss: ½[L(+δ) + L(−δ)] − L(0), and beside it ½[L(+δ) − L(−δ)].

At a fixed point the raw change of loss is mostly first order, g·δ of one particular rounding, which differs from batch
to batch; it cancels in the first expression, which is what ½·δᵀHδ predicts. The second is that first-order part, whose
mean over batches is what clipping and flushing to zero do systematically.

Weights are the checkpoint's. Batches are drawn as for training, at steps that no training has reached: damage is
predicted for the training loss, and a training of a few hundred steps has seen a batch's examples once at most. The
model is in training mode, so BatchNorm takes its statistics from the batch. The loss is computed from the model's
output in float64, because at 1e-7 of it float32 is too coarse.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.advice.data import Batch
from benchmarks.advice.ledger import Ledger
from benchmarks.advice.models import Trainable
from benchmarks.advice.moved import Moved, casting
from probes.casts import Cast
from probes.records import Slot

UNSEEN = 100_000  # the first step whose batch is measured on
ROUND = 8  # batches that a pair gets at a time
MOST_BATCHES = 256  # a pair
DECIDED = 0.1  # standard error over mean, below which a pair gets no more

Pair = tuple[Slot, str]


@dataclass(frozen=True)
class Truth:
    """One pair's: means over batches and their standard errors, in the loss's own units.

    second, second_se    ½[L(+δ) + L(−δ)] − L(0)
    first, first_se      ½[L(+δ) − L(−δ)]
    """

    second: float
    second_se: float
    first: float
    first_se: float
    batches: int

    @property
    def decided(self) -> bool:
        """The rise is more than twice its standard error."""
        return self.second > 2 * self.second_se


def measure_forward(
    trainable: Trainable,
    model: nn.Module,
    slots: Sequence[Slot],
    casts: Sequence[Cast],
    ledger: Ledger,
    seconds: float,
    progress: Callable[[str], object],
) -> None:
    """Add rounds of batches to the ledger until every pair is known to a tenth or the seconds are spent.

    Every pair gets its first two rounds whatever they take.
    """
    pairs = [(slot, str(cast)) for slot in slots for cast in casts]
    number = 0
    with torch.no_grad(), Moved(model) as hook:
        while number < MOST_BATCHES:
            done = _by_pair(ledger.of("forward"))
            wanted = pairs
            if number >= 2 * ROUND:
                in_time = ledger.seconds("forward") < seconds
                wanted = [pair for pair in pairs if in_time and not _is_exact(_truth(done[pair]))]
                if not wanted:
                    break
            left = [pair for pair in wanted if len(done.get(pair, ())) * ROUND <= number]
            batches = [trainable.batch(UNSEEN + number + index, 0) for index in range(ROUND)]
            base = _losses(trainable, model, batches)
            for count, (slot, cast) in enumerate(left):
                if number >= 2 * ROUND and ledger.seconds("forward") >= seconds:
                    return
                started = time.process_time()
                moved = []
                with casting(hook, slot, Cast.parse(cast)):
                    for hook.sign in (1, -1):
                        moved.append(_losses(trainable, model, batches) - base)
                ledger.add(
                    {
                        "kind": "forward",
                        **slot._asdict(),
                        "cast": cast,
                        "batch": number,
                        "up": [float(f"{value:.6g}") for value in moved[0]],
                        "down": [float(f"{value:.6g}") for value in moved[1]],
                        "seconds": round(time.process_time() - started, 4),
                    }
                )
                progress(
                    f"{trainable.name}: forward, batches {number} to {number + ROUND}, pair {count} of {len(left)}"
                )
            number += ROUND


def forward_truths(records: Sequence[Mapping[str, Any]]) -> dict[Pair, Truth]:
    """What a ledger's forward records come to, pair by pair."""
    return {pair: _truth(found) for pair, found in _by_pair(records).items()}


def losses(trainable: Trainable, model: nn.Module, batches: Sequence[Batch]) -> NDArray[np.float64]:
    """The loss of each batch, computed in float64 from the model's own output."""
    with torch.no_grad():
        return _losses(trainable, model, batches)


def _losses(trainable: Trainable, model: nn.Module, batches: Sequence[Batch]) -> NDArray[np.float64]:
    return np.array([float(trainable.loss(_InDouble(model), batch)) for batch in batches])


class _InDouble(nn.Module):
    """A model's output in float64; the model itself is no part of it, so that its hooks and names stay its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._call = [model]

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self._call[0](inputs)
        return output.double()


def _by_pair(records: Sequence[Mapping[str, Any]]) -> dict[Pair, list[Mapping[str, Any]]]:
    found: dict[Pair, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        found[Slot(record["site"], record["role"]), record["cast"]].append(record)
    return dict(found)


def _truth(records: Sequence[Mapping[str, Any]]) -> Truth:
    up, down = (np.concatenate([record[name] for record in records]) for name in ("up", "down"))
    second, first = (up + down) / 2, (up - down) / 2
    root = math.sqrt(len(up))
    return Truth(
        float(second.mean()),
        float(second.std(ddof=1)) / root,
        float(first.mean()),
        float(first.std(ddof=1)) / root,
        len(up),
    )


def _is_exact(truth: Truth) -> bool:
    return truth.second_se <= DECIDED * abs(truth.second)
