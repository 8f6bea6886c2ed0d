"""Does a window foretell the next one? `python benchmarks/drift.py --json benchmarks/drift.json`

The built-in models are trained from several seeds, and at several points of the training two windows of the same length
follow each other. For every slot and cast, what window k says is set beside what window k+1 then measured:

    confidence    scores in groups of predicted confidence, and the share of them that stayed within a factor of two:
                  damage in forward roles, the energy of rounding noise over the signal's in gradients
    drift         rank correlation over slots and casts of the change between window k's halves with the change of its
                  error energy to window k+1, and of the two sizes
    ranking       rank correlation of the slots by damage (noise) in window k with window k+1, per cast, beside what the
                  halves of window k said it would be
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import advisor
from advisor.cli.demo import SHOWS
from advisor.confidence import SPREAD, halves_apart, log_error, scatter
from advisor.drifting import drift_between, drift_within, is_forward
from advisor.execution import Stepwise
from advisor.scores import DEFAULT_CASTS
from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from probes.records import Slot
from probes.window import Window

STARTS = (0, 30, 120)  # training steps before window k
GROUPS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.01)


def window_of(trainer: Trainer, steps: int) -> Window:
    """A window over the trainer's next steps."""
    with advisor.probe(trainer.model, trainer.optimizer, steps=steps) as window:
        while not window.done:
            trainer.step()
    return window


def paired(first: Window, second: Window) -> list[dict[str, Any]]:
    """Each score of the first window beside the second's: q, its change, what the first says of it."""
    casts = list(DEFAULT_CASTS)
    one, other = Stepwise(first, casts), Stepwise(second, casts)
    later = {(row["site"], row["role"], row["cast"]): row for row in advisor.score(second, casts).rows}
    found = []
    for row in advisor.score(first, casts).rows:
        slot = Slot(row["site"], row["role"])
        forward, after = is_forward(first, slot), later.get((*slot, row["cast"]))
        q = log_error(one.of(slot, row["cast"]), forward)
        q_after = log_error(other.of(slot, row["cast"]), forward)
        if after is None or not (np.isfinite(q).all() and np.isfinite(q_after).all() and len(q) and len(q_after)):
            continue
        if forward:
            if not (row["damage"] and after["damage"]):
                continue
            change = math.log2(after["damage"] / row["damage"])
        else:
            change = float(q_after.mean() - q.mean())
        found.append(
            {
                "forward": forward,
                "confidence": row["confidence"],
                "halves": halves_apart(q),
                "scatter": scatter(q),
                "steps": len(q),
                "error_change": float(q_after.mean() - q.mean()),
                "change": change,
                "relative_se": row["damage_se"] / row["damage"] if forward and row["damage_se"] else 0.0,
            }
        )
    return found


def calibration(pairs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups by predicted confidence: how many, the mean prediction, the share that stayed within a factor of two."""
    table = []
    for low, high in itertools.pairwise(GROUPS):
        inside = [pair for pair in pairs if low <= pair["confidence"] < high]
        if inside:
            stayed = float(np.mean([abs(pair["change"]) <= 1 for pair in inside]))
            told = float(np.mean([pair["confidence"] for pair in inside]))
            table.append({"from": low, "scores": len(inside), "predicted": told, "stayed": stayed})
    return table


def fitted(pairs: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The floor and trend under which the changes, taken to be normal, are likeliest, on a grid."""
    change = np.array([pair["change"] for pair in pairs])
    halves = np.array([pair["halves"] for pair in pairs])
    known = np.array([2 * p["scatter"] ** 2 / p["steps"] + (p["relative_se"] / math.log(2)) ** 2 for p in pairs])
    best = (math.inf, 0.0, 0.0)
    for floor in np.arange(0.02, 0.6, 0.02):
        for trend in np.arange(0.0, 3.01, 0.1):
            variance = floor**2 + (trend * halves) ** 2 + known
            best = min(best, (float((np.log(variance) + change**2 / variance).mean()), float(floor), float(trend)))
    return best[1], best[2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, probe twice in a row, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted(SHOWS), choices=sorted(SHOWS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20], help="lengths of a window")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args(arguments)
    result: dict[str, Any] = {"starts": STARTS, "seeds": asked.seeds, "spread": vars(SPREAD), "models": {}}
    everything: list[dict[str, Any]] = []
    for model in asked.models:
        told = {name: part for name, part in SHOWS[model].description.items() if name != "name"}
        pairs: list[dict[str, Any]] = []
        ranking = []
        for steps in asked.steps:
            for seed in range(asked.seeds):
                trainer = Trainer(ArchitectureSpec.parse(told), seed=seed)
                for start in STARTS:
                    while trainer.step_index < start:
                        trainer.step()
                    first, second = window_of(trainer, steps), window_of(trainer, steps)
                    pairs += paired(first, second)
                    one, other = Stepwise(first, DEFAULT_CASTS), Stepwise(second, DEFAULT_CASTS)
                    halves, windows = drift_within(one), drift_between(one, other)
                    ranking += [
                        (start, steps, cast, halves.error_ranks[cast], rank)
                        for cast, rank in windows.error_ranks.items()
                    ]
        everything += pairs
        result["models"][model] = summary(pairs, ranking)
        print(f"\n{model}\n{json.dumps(result['models'][model], indent=1)}")
    floor, trend = fitted(everything)
    result["all"] = {"calibration": calibration(everything), "fitted": {"floor": floor, "trend": trend}}
    print(f"\nall\n{json.dumps(result['all'], indent=1)}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1, default=list) + "\n")


def summary(pairs: Sequence[dict[str, Any]], ranking: Sequence[tuple[int, int, str, float, float]]) -> dict[str, Any]:
    """One model's figures."""
    floor, trend = fitted(pairs)
    halves = np.array([pair["halves"] for pair in pairs])
    error, change = (np.array([pair[name] for pair in pairs]) for name in ("error_change", "change"))
    return {
        "scores": len(pairs),
        "calibration": calibration(pairs),
        "fitted": {"floor": floor, "trend": trend},
        "spearman of halves' change and error's change to the next window": round(
            float(spearmanr(halves, error)[0]), 3
        ),
        "spearman of their sizes": round(float(spearmanr(abs(halves), abs(error))[0]), 3),
        "spearman of halves' change and the score's change": round(float(spearmanr(halves, change)[0]), 3),
        "spearman of confidence and the size of the score's change": round(
            float(spearmanr([pair["confidence"] for pair in pairs], abs(change))[0]), 3
        ),
        "ranking": {
            f"start {start}": {
                "halves": round(float(np.nanmean([r[3] for r in ranking if r[0] == start])), 4),
                "next window": round(float(np.nanmean([r[4] for r in ranking if r[0] == start])), 4),
            }
            for start in STARTS
        },
    }


if __name__ == "__main__":
    main()
