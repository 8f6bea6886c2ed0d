"""Does a window foretell the next one? `python benchmarks/drift.py --json benchmarks/drift.json`

The built-in models are trained from several seeds, and at several points of the training two windows of the same length
follow each other. For every slot and cast, what window k says is set beside what window k+1 then measured:

    confidence    scores in groups of predicted confidence, and the share of them that stayed within a factor of two:
                  damage in forward roles, the energy of rounding noise over the signal's in gradients
    drift         rank correlation over slots and casts of the change between window k's halves with the change of its
                  error energy to window k+1, and of the two sizes
    ranking       rank correlation of the forward slots by damage in window k with window k+1, per cast, beside what the
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
from scipy.special import erf
from scipy.stats import spearmanr

import advisor
from advisor.cli.demo import SHOWS
from advisor.confidence import DAMAGE, NOISE, halves_apart, log_error, scatter
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
            table.append({"from": low, "scores": len(inside), "predicted": _rounded(told), "stayed": _rounded(stayed)})
    return table


def fitted(pairs: Sequence[dict[str, Any]], doubts: Sequence[float]) -> dict[str, float]:
    """The constants under which it is likeliest which scores stayed within a factor of two, on a grid."""
    stayed = np.array([abs(pair["change"]) <= 1 for pair in pairs])
    halves = np.array([pair["halves"] for pair in pairs])
    scattered = np.array([2 * pair["scatter"] ** 2 / pair["steps"] for pair in pairs])
    error = np.array([pair["relative_se"] / math.log(2) for pair in pairs])
    best: tuple[float, dict[str, float]] = (math.inf, {})
    for floor, trend, doubt in itertools.product(np.arange(1, 13) / 10, np.arange(7) / 2, doubts):
        variance = floor**2 + (trend * halves) ** 2 + scattered + (doubt * error) ** 2
        chance = np.clip(erf(1 / np.sqrt(2 * variance)), 1e-4, 1 - 1e-4)
        surprise = -float(np.where(stayed, np.log(chance), np.log(1 - chance)).mean())
        if surprise < best[0]:
            best = surprise, {"floor": float(floor), "trend": float(trend), "doubt": float(doubt)}
    return best[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, probe twice in a row, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted(SHOWS), choices=sorted(SHOWS))
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each model")
    parser.add_argument("--first-seed", type=int, default=0, help="0 is what the constants were chosen on")
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20], help="lengths of a window")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args(arguments)
    result: dict[str, Any] = {"starts": STARTS, "seeds": [], "damage": vars(DAMAGE), "noise": vars(NOISE), "models": {}}
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    result["seeds"] = list(seeds)
    everything: list[dict[str, Any]] = []
    for model in asked.models:
        told = {name: part for name, part in SHOWS[model].description.items() if name != "name"}
        pairs: list[dict[str, Any]] = []
        ranking = []
        for steps in asked.steps:
            for seed in seeds:
                trainer = Trainer(ArchitectureSpec.parse(told), seed=seed)
                for start in STARTS:
                    while trainer.step_index < start:
                        trainer.step()
                    first, second = window_of(trainer, steps), window_of(trainer, steps)
                    pairs += paired(first, second)
                    one, other = Stepwise(first, DEFAULT_CASTS), Stepwise(second, DEFAULT_CASTS)
                    halves, windows = drift_within(one), drift_between(one, other)
                    ranking += [
                        (start, steps, cast, halves.damage_ranks[cast], rank)
                        for cast, rank in windows.damage_ranks.items()
                    ]
        everything += pairs
        result["models"][model] = summary(pairs, ranking)
        print(f"\n{model}\n{json.dumps(result['models'][model], indent=1)}")
    result["all"] = {}
    for kind, doubts in (("damage", (0.0, 1.0, 2.0, 3.0)), ("noise", (0.0,))):
        pairs = [pair for pair in everything if pair["forward"] == (kind == "damage")]
        result["all"][kind] = {"calibration": calibration(pairs), "fitted to these": fitted(pairs, doubts)}
    print(f"\nall\n{json.dumps(result['all'], indent=1)}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1, default=list) + "\n")


def summary(pairs: Sequence[dict[str, Any]], ranking: Sequence[tuple[int, int, str, float, float]]) -> dict[str, Any]:
    """One model's figures."""
    told: dict[str, Any] = {}
    for kind in ("damage", "noise"):
        chosen = [pair for pair in pairs if pair["forward"] == (kind == "damage")]
        halves, error, change, sure = (
            np.array([pair[name] for pair in chosen]) for name in ("halves", "error_change", "change", "confidence")
        )
        told[kind] = {
            "scores": len(chosen),
            "error within a factor of two": _rounded((abs(error) <= 1).mean()),
            "score within a factor of two": _rounded((abs(change) <= 1).mean()),
            "mean confidence": _rounded(sure.mean()),
            "calibration": calibration(chosen),
            "spearman of halves' change with the error's to the next window": _rounded(spearmanr(halves, error)[0]),
            "spearman of their sizes": _rounded(spearmanr(abs(halves), abs(error))[0]),
            "spearman of confidence with the size of the score's change": _rounded(spearmanr(sure, abs(change))[0]),
        }
    told["rank correlation of slots by damage"] = {
        f"after {start} steps": {
            "between halves": _rounded(np.nanmean([between for at, _, _, between, _ in ranking if at == start])),
            "with next window": _rounded(np.nanmean([after for at, _, _, _, after in ranking if at == start])),
        }
        for start in STARTS
    }
    return told


def _rounded(value: Any) -> float:
    return round(float(value), 3)


if __name__ == "__main__":
    main()
