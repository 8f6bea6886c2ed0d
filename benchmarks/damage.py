"""Predicted damage against brute force, on the built-in models: `python benchmarks/damage.py gpt`.

For every forward slot and cast the loss is measured with the tensor moved by +δ and by −δ, δ the cast's rounding
error: ½[L(+δ) + L(−δ)] − L(0), in which the first-order part cancels, over held-in batches that the window did not
see. Printed beside the directional prediction, with the rank correlation and the median ratio a role, over the pairs
whose measured value exceeds twice its own standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

import advisor
from advisor.cli.demo import SHOWS
from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from probes.casts import Cast
from probes.records import Slot
from probes.sites import ProductCall, SiteHook

BATCHES = 8
UNSEEN = 10_000  # a step far beyond those that are trained


class Moved(SiteHook):
    """Moves one slot's tensor by `sign` times the cast's error."""

    slot: Slot
    cast: Cast
    sign: int

    def on_product(self, call: ProductCall) -> Tensor:
        """The product, of the moved operand where it is the slot's."""
        if call.site != self.slot.site:
            return call.run()
        at = call.roles.index(self.slot.role)
        operands = list(call.operands)
        operands[at] = operands[at] + self.sign * (self.cast(operands[at]) - operands[at])
        return call.run(operands)


def losses(trainer: Trainer) -> Any:
    """Training-mode losses of the same unseen batches, float64 [BATCHES]."""
    found = []
    with torch.no_grad():
        for index in range(BATCHES):
            batch = trainer.data.batch(UNSEEN + index, trainer.seed, trainer.spec.training.batch_size)
            found.append(float(trainer._loss(*trainer._on_device(batch))))
    return np.array(found)


def measured(trainer: Trainer, row: dict[str, Any], base: Any) -> tuple[float, float]:
    """The symmetric rise of the loss and its standard error over batches."""
    total = np.zeros(BATCHES)
    hook = Moved(trainer.model)
    hook.slot, hook.cast = Slot(row["site"], row["role"]), Cast.parse(row["cast"])
    with hook:
        for hook.sign in (1, -1):
            total += losses(trainer) / 2
    rise = total - base
    return float(rise.mean()), float(rise.std(ddof=1) / BATCHES**0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, probe, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(SHOWS), help="a built-in model, as the demo trains it")
    parser.add_argument("--warmup", type=int, default=100, help="training steps before the window")
    parser.add_argument("--scored", type=int, default=4, help="curvature steps of the window")
    parser.add_argument("--casts", nargs="+", default=["e4m3fn", "e5m2", "int8", "int8/none"])
    asked = parser.parse_args(arguments)
    told = {name: part for name, part in SHOWS[asked.model].description.items() if name != "name"}
    trainer = Trainer(ArchitectureSpec.parse(told))
    for _ in range(asked.warmup):
        trainer.step()
    with advisor.probe(
        trainer.model, trainer.optimizer, steps=2 * asked.scored, curvature_steps=asked.scored, casts=asked.casts
    ) as window:
        while not window.done:
            trainer.step()
    base, pairs = losses(trainer), []
    print(f"{asked.model}, mean loss on the unseen batches {base.mean():.2f}")
    print(f"{'slot':<32}{'cast':<30}{'predicted':>11}{'measured':>11}{'±':>9}{'ratio':>8}")
    for row in advisor.score(window, asked.casts).rows:
        if row["damage"] is None:
            continue
        rise, error = measured(trainer, row, base)
        pairs.append((row["role"], row["damage"], rise, error))
        slot = f"{row['site']} {row['role']}"
        ratio = row["damage"] / rise if rise else float("nan")
        print(f"{slot:<32}{row['cast']:<30}{row['damage']:>11.2e}{rise:>11.2e}{error:>9.0e}{ratio:>8.2f}")
    for role in dict.fromkeys(role for role, *_ in pairs):
        sure = [(p, m) for r, p, m, e in pairs if r == role and m > 2 * e]
        if len(sure) > 3:
            predicted, rises = map(np.array, zip(*sure, strict=True))
            rank, ratio = spearmanr(predicted, rises)[0], np.median(predicted / rises)
            print(f"{role}: {len(sure)} pairs, Spearman {rank:.3f}, median predicted/measured {ratio:.2f}")


if __name__ == "__main__":
    main()
