"""Brute force: what each cast of each tensor really does. `python -m benchmarks.advice.truth --data FOLDER`

For each of the six models, at one checkpoint: the rise of the loss, one forward slot and cast at a time
(`forward_truth.py`); the error in every parameter's gradient, one slot and cast at a time (`gradient_truth.py`); and
for eleven casts of gradients the loss of whole trainings (`training_truth.py`). Nothing here asks the advisor anything.

What is measured goes into a ledger a model under --cache at once. A run that is stopped goes on there, and a table can
be made from it at any time (`table.py`). The committed table is of 68 minutes of processor time, half an hour of it for
whole trainings: with --forward-seconds 20 to 200, of the ConvNets 650, and --training-seconds 0, which measures the
least. The defaults take up to two hours of one core. --quick takes some four minutes, measures less, in ledgers of its
own, and decides little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.advice import data
from benchmarks.advice.forward_truth import measure_forward
from benchmarks.advice.gradient_truth import gradient_truths, measure_gradients
from benchmarks.advice.ledger import Ledger, fingerprint
from benchmarks.advice.models import CACHE, MODELS, Start
from benchmarks.advice.moved import slots_of
from benchmarks.advice.training_truth import measure_trainings, most_alike, spread_out
from probes.casts import Cast
from probes.records import GRADIENT

VERSION = 1  # of what is measured and how
CASTS = tuple(map(Cast.parse, ("e4m3fn", "e5m2", "int8", "e3m2", "e2m3", "e2m1", "int4", "int8/none")))
"""The usual 8-bit casts, those of 6 and 4 bits, and int8 without a scale, which flushes what is small."""


@dataclass(frozen=True)
class Budget:
    """Seconds of processor time that a part may go on improving, a model; the least that is measured may take more."""

    forward_s: float
    training_s: float
    casts: tuple[Cast, ...]
    trainings: bool


FULL = Budget(forward_s=600, training_s=120, casts=CASTS, trainings=True)
QUICK = Budget(forward_s=5, training_s=0, casts=CASTS[1:3], trainings=False)


def measure(start: Start, budget: Budget, progress: Callable[[str], object]) -> Ledger:
    """Measure what the model's ledger lacks."""
    trainable, (model, optimizer, _) = start.trainable, start.load()
    ledger = open_ledger(start, quick=len(budget.casts) < len(CASTS))
    met = slots_of(model, trainable.batch(0, 0).inputs)
    forward = [one.slot for one in met if one.slot.role != GRADIENT]
    measure_forward(trainable, model, forward, budget.casts, ledger, budget.forward_s, progress)
    measure_gradients(trainable, model, met, budget.casts, ledger, progress)
    if budget.trainings and not start.seed:
        parameters = {one.slot.site: one.parameter for one in met}
        ratios = gradient_truths(ledger, model, parameters, is_adaptive(optimizer))
        noise = {pair: one.ratio for pair, one in ratios.items() if pair[0].role == GRADIENT}
        chosen = spread_out(noise)
        more = most_alike(noise, {pair: ratios[pair].alike_share for pair in noise}, chosen)
        measure_trainings(trainable, [*chosen, *more], ledger, budget.training_s, progress)
    return ledger


def open_ledger(start: Start, quick: bool = False) -> Ledger:
    """The ledger of a model's checkpoint, which is trained first where there is none."""
    weights = fingerprint(start.load().model)
    of: dict[str, Any] = {"model": start.name, "weights": weights, "version": VERSION}
    return Ledger(start.cache / f"truth-{start.label}{'-quick' if quick else ''}.jsonl", of)


def is_adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it divides each element by its own size."""
    return "Adam" in type(optimizer).__name__


def progress_on_terminal() -> Callable[[str], object]:
    """One line that is written over, at most ten times a second; nothing where stderr is no terminal."""
    last = 0.0

    def show(line: str) -> None:
        nonlocal last
        if sys.stderr.isatty() and time.monotonic() - last > 0.1:
            last = time.monotonic()
            print(f"\r{line[:110]:<110}", end="", file=sys.stderr, flush=True)

    return show


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --cache, --models, --quick, --threads."""
    parser.add_argument("--data", type=Path, default=None, help=f"folder of real data; default: {data.VARIABLE}")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of checkpoints and ledgers")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seed", type=int, default=0, help="of the checkpoint; whole trainings are run for 0 alone")
    parser.add_argument("--quick", action="store_true", help="some four minutes: few casts, few batches")
    parser.add_argument("--threads", type=int, default=1, help="of torch; other numbers round otherwise")


def begin(asked: argparse.Namespace) -> None:
    """What every script of this folder does first. Ends the script where the data is missing."""
    torch.set_num_threads(asked.threads)
    try:
        data.use(asked.data)
    except data.DataMissing as error:
        sys.exit(str(error))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that are asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument("--forward-seconds", type=float, default=None, help=f"default {FULL.forward_s:g}, a model")
    parser.add_argument("--training-seconds", type=float, default=None, help=f"default {FULL.training_s:g}, a model")
    asked = parser.parse_args(arguments)
    begin(asked)
    given = {"forward_s": asked.forward_seconds, "training_s": asked.training_seconds}
    budget = replace(
        QUICK if asked.quick else FULL, **{name: value for name, value in given.items() if value is not None}
    )
    for name in asked.models:
        started = time.monotonic()
        ledger = measure(Start(name, asked.seed, asked.cache), budget, progress_on_terminal())
        parts = ", ".join(f"{kind} {len(ledger.of(kind))}" for kind in ("forward", "gradient", "training"))
        print(f"{name}: {time.monotonic() - started:.0f} s; records: {parts}; {ledger.path}")


if __name__ == "__main__":
    main()
