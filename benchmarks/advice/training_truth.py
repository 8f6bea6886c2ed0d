"""The loss after some hundred steps with one gradient cast all the way, beside the same training without it.

Six pairs a model, spread over the noise that brute force has measured of them, from the strongest on; and five more
whose noise is small, those whose errors are most alike in all batches. Both trainings
of a seed start at the same weights and see the same batches; the gap is the mean difference of their losses over the
last steps. Seeds are added while the gap's interval holds zero and time is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import t as student
from torch import Tensor

from benchmarks.advice.ledger import Ledger
from benchmarks.advice.models import Trainable, fresh, train
from benchmarks.advice.moved import TrainedWith
from probes.casts import Cast
from probes.records import Slot

PAIRS = 6
SMALL, PAIRS_ALIKE = 0.1, 5  # noise over the minibatch's, up to which a pair's noise is small
STEPS = 200
LAST = 50  # steps whose losses are compared
FIRST_SEEDS, MOST_SEEDS = 3, 5
CONFIDENCE = 0.95

Pair = tuple[Slot, str]


def spread_out(ratios: Mapping[Pair, float]) -> list[Pair]:
    """Six pairs at even places of the ranking, the strongest first, ties by name."""
    ranked = sorted(ratios, key=lambda pair: (-ratios[pair], pair))
    if len(ranked) <= PAIRS:
        return ranked
    return [ranked[round(place)] for place in np.linspace(0, len(ranked) - 1, PAIRS)]


def most_alike(ratios: Mapping[Pair, float], shares: Mapping[Pair, float], without: Sequence[Pair]) -> list[Pair]:
    """Five of the pairs whose noise is small: those with most of their error alike in all batches, ties by name."""
    small = [pair for pair, ratio in ratios.items() if ratio <= SMALL and pair not in without]
    return sorted(small, key=lambda pair: (-shares[pair], pair))[:PAIRS_ALIKE]


def measure_trainings(
    trainable: Trainable, pairs: Sequence[Pair], ledger: Ledger, seconds: float, progress: Callable[[str], object]
) -> None:
    """Add runs to the ledger: three seeds a pair, then more where the gap is not decided and time is left."""

    def run(pair: Pair | None, seed: int) -> None:
        if seed not in runs(ledger).get(pair, {}):
            ledger.add(_run(trainable, pair, seed))
            what = "no cast" if pair is None else f"{pair[0].site} {pair[0].role} {pair[1]}"
            progress(f"{trainable.name}: training, seed {seed}, {what}")

    for seed in range(1, 1 + FIRST_SEEDS):
        for pair in (None, *pairs):
            run(pair, seed)
    for seed in range(1 + FIRST_SEEDS, 1 + MOST_SEEDS):
        found = gaps(ledger)
        for pair in (pair for pair in pairs if not is_decided(found[pair])):
            if ledger.seconds("training") >= seconds:
                return
            run(None, seed)
            run(pair, seed)


def runs(ledger: Ledger) -> dict[Pair | None, dict[int, list[float]]]:
    """Pair (None: without a cast) → seed → the losses of the last steps."""
    found: dict[Pair | None, dict[int, list[float]]] = {}
    for record in ledger.of("training"):
        pair = None if record["cast"] is None else (Slot(record["site"], record["role"]), record["cast"])
        found.setdefault(pair, {})[record["seed"]] = record["losses"]
    return found


def gaps(ledger: Ledger) -> dict[Pair, list[float]]:
    """Pair → each seed's mean difference of losses, for the seeds that both trainings have; Inf where it diverged."""
    known = runs(ledger)
    plain = known.get(None, {})
    found = {}
    for pair, by_seed in known.items():
        if pair is not None:
            both = sorted(by_seed.keys() & plain.keys())
            found[pair] = [float(np.mean(by_seed[seed]) - np.mean(plain[seed])) for seed in both]
    return found


def interval(gap: Sequence[float]) -> tuple[float, float]:
    """Mean of the gaps and the half width of their 95% interval (Student's t); Inf with fewer than two."""
    mean = float(np.mean(gap))
    if len(gap) < 2 or not math.isfinite(mean):
        return mean, math.inf
    width = student.ppf((1 + CONFIDENCE) / 2, len(gap) - 1) * np.std(gap, ddof=1) / math.sqrt(len(gap))
    return mean, float(width)


def is_decided(gap: Sequence[float]) -> bool:
    """The interval does not hold zero, or some seed diverged."""
    mean, width = interval(gap)
    return not math.isfinite(mean) or abs(mean) > width


def _run(trainable: Trainable, pair: Pair | None, seed: int) -> dict[str, object]:
    started = time.process_time()
    model, optimizer, _ = fresh(trainable, seed)
    found: list[float] = []

    def keep(step: int, loss: Tensor) -> None:
        if step >= STEPS - LAST:
            value = float(loss)
            found.append(value if math.isfinite(value) else math.inf)

    casts = {} if pair is None else {pair[0]: Cast.parse(pair[1])}
    with TrainedWith(model, casts):
        train(model, optimizer, trainable, seed, 0, STEPS, keep)
    slot = {"site": None, "role": None, "cast": None} if pair is None else {**pair[0]._asdict(), "cast": pair[1]}
    losses = [float(f"{loss:.6g}") for loss in found]
    return {
        "kind": "training",
        **slot,
        "seed": seed,
        "losses": losses,
        "seconds": round(time.process_time() - started, 3),
    }
