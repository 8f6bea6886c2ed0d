"""Do damages lie in their intervals? `python benchmarks/intervals.py --json benchmarks/intervals.json`

Models are trained from several seeds. At several points of the training a window is recorded, and a second one right
after it. Beside what the first window says of each forward slot and cast this puts

    next      the damage that the second window says
    truth     brute force at the end of the second window: ½[L(+δ) + L(−δ)] − L(0) over unseen batches, for the pairs
              whose value exceeds four times its own standard error
    total     the same two, of all slots of a role, and of all slots, in one cast: what a plan's total is made of

and reports the share of them that lie in the 95% intervals of `advisor/intervals.py`, how many lie below and above, and
how wide the intervals are. `--fit` prints what the constants there would be on this run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.cli.demo import SHOWS
from advisor.confidence import DAMAGE, halves_apart, log_error, loss_octaves, scatter
from advisor.drifting import is_forward
from advisor.execution import Stepwise
from advisor.intervals import interval_of_sum, kind_named
from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from probes.casts import Cast
from probes.records import Slot
from probes.sites import ProductCall, SiteHook
from probes.window import Window

STARTS = (20, 120)  # training steps before the first window
MEASURED = ("e4m3fn", "e5m2", "int8")  # candidates of the scored steps
SKETCHED = ("e4m2", "e2m3")  # scored from sketches alone
BATCHES = 8
SURE = 4  # standard errors that a measured damage must have to be compared
STEADY = 0.6  # octaves that a moving loss may add to σ where the calibration is taken
UNSEEN = 10_000  # a step far beyond those that are trained


class Training(Protocol):
    """A model that is being trained."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self) -> float:
        """One step of the training."""

    def unseen_loss(self, index: int) -> float:
        """The training loss of an unseen batch, without gradients."""


class BuiltIn(Trainer):
    """A built-in model, as the demo trains it."""

    def unseen_loss(self, index: int) -> float:
        batch = self.data.batch(UNSEEN + index, self.seed, self.spec.training.batch_size)
        return float(self._loss(*self._on_device(batch)))


class OnDigits:
    """A perceptron on images of handwritten digits: it names them, or (`mse`) draws them again."""

    def __init__(self, seed: int, mse: bool) -> None:
        told = {name: part for name, part in SHOWS["convnet"].description.items() if name != "name"}
        self.data, self.seed, self.mse, self.index = ArchitectureSpec.parse(told).load_data(), seed, mse, 0
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            widths = (64, 128, 16, 128, 64) if mse else (64, 128, 128, 128, 10)
            layers: list[nn.Module] = []
            for inputs, outputs in itertools.pairwise(widths):
                layers += [nn.Linear(inputs, outputs), nn.GELU()]
            self.model: nn.Module = nn.Sequential(*layers[:-1])
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self._loss(self.index)
        loss.backward()
        self.optimizer.step()
        self.index += 1
        return float(loss.detach())

    def unseen_loss(self, index: int) -> float:
        return float(self._loss(UNSEEN + index))

    def _loss(self, index: int) -> Tensor:
        images, labels = self.data.batch(index, self.seed, 32)
        pixels = images.flatten(1)
        found: Tensor = self.model(pixels)
        return F.mse_loss(found, pixels) if self.mse else F.cross_entropy(found, labels)


def training_of(name: str, seed: int) -> Training:
    """A new training of this name."""
    if name in SHOWS:
        told = {key: part for key, part in SHOWS[name].description.items() if key != "name"}
        return BuiltIn(ArchitectureSpec.parse(told), seed=seed)
    return OnDigits(seed, mse=name == "autoencoder")


NAMES = (*sorted(SHOWS), "autoencoder", "perceptron")


class Moved(SiteHook):
    """Moves the tensors of some slots by `sign` times the error of their cast."""

    casts: Mapping[Slot, Cast]
    sign: int

    def on_product(self, call: ProductCall) -> Tensor:
        """The product, of the moved operands where they are the slots'."""
        operands = list(call.operands)
        for at, role in enumerate(call.roles[: len(operands)]):
            cast = self.casts.get(Slot(call.site, role))
            if cast is not None:
                operands[at] = operands[at] + self.sign * (cast(operands[at]) - operands[at])
        return call.run(operands)


def losses(training: Training) -> Any:
    """Losses of the same unseen batches, float64 [BATCHES]."""
    with torch.no_grad():
        return np.array([training.unseen_loss(index) for index in range(BATCHES)])


def truth(training: Training, casts: Mapping[Slot, Cast], base: Any) -> tuple[float, float]:
    """The symmetric rise of the loss and its standard error over batches."""
    hook, total = Moved(training.model), np.zeros(BATCHES)
    hook.casts = casts
    with hook:
        for hook.sign in (1, -1):
            total += losses(training) / 2
    rise = total - base
    return float(rise.mean()), float(rise.std(ddof=1) / BATCHES**0.5)


def window_of(training: Training, steps: int, curvature_steps: int) -> Window:
    """A window over the next steps."""
    with advisor.probe(
        training.model, training.optimizer, steps=steps, curvature_steps=curvature_steps, casts=MEASURED
    ) as window:
        while not window.done:
            training.step()
    return window


def gathered(name: str, seed: int, steps: int, curvature_steps: int, brute_force: bool) -> list[dict[str, Any]]:
    """What two windows in a row and brute force say of each forward slot and cast, at each start."""
    training, found, done = training_of(name, seed), [], 0
    for start in STARTS:
        while done < start:
            training.step()
            done += 1
        first, second = (window_of(training, steps, curvature_steps) for _ in range(2))
        done += 2 * steps
        casts = [*MEASURED, *SKETCHED]
        stepwise = Stepwise(first, casts)
        later = {(row["site"], row["role"], row["cast"]): row for row in advisor.score(second, casts).rows}
        base, here = losses(training), []
        for row in advisor.score(first, casts).rows:
            slot, after = Slot(row["site"], row["role"]), later.get((row["site"], row["role"], row["cast"]))
            if not (row["damage"] and after and after["damage"] and is_forward(first, slot)):
                continue
            q = log_error(stepwise.of(slot, row["cast"]), forward=True)
            if not (len(q) and np.isfinite(q).all()):
                continue
            rise, error = truth(training, {slot: Cast.parse(row["cast"])}, base) if brute_force else (math.nan,) * 2
            here.append(
                {
                    **{key: row[key] for key in ("site", "role", "cast", "damage", "damage_se", "damage_from")},
                    **{key: row[key] for key in ("whole_batch", "confidence", "damage_interval")},
                    "halves": halves_apart(q),
                    "scatter": scatter(q),
                    "steps": len(q),
                    "moves": loss_octaves(first.losses),
                    "next": after["damage"],
                    "next_se": after["damage_se"],
                    "truth": rise,
                    "truth_se": error,
                    "place": f"{name} seed {seed} after {start}",
                }
            )
        found += here + totals(training, here, base, brute_force)
    return found


def totals(training: Training, rows: Sequence[dict[str, Any]], base: Any, brute_force: bool) -> list[dict[str, Any]]:
    """One cast in all slots at once, by role and of all: the sums of both windows, their interval, and brute force."""
    found = []
    for cast in sorted({row["cast"] for row in rows}):
        of_cast = [row for row in rows if row["cast"] == cast]
        for role in (*sorted({row["role"] for row in of_cast}), None):
            chosen = [row for row in of_cast if role in (None, row["role"])]
            slots = {Slot(row["site"], row["role"]): Cast.parse(cast) for row in chosen}
            rise, error = truth(training, slots, base) if brute_force else (math.nan,) * 2
            found.append(
                {
                    "total": role or "all",
                    "cast": cast,
                    "place": rows[0]["place"],
                    "damage": math.fsum(row["damage"] for row in chosen),
                    "damage_interval": interval_of_sum(chosen),
                    "next": math.fsum(row["next"] for row in chosen),
                    "truth": rise,
                    "truth_se": error,
                }
            )
    return found


def coverage(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares of the cases inside, below and above their intervals, by what they are compared with."""
    told: dict[str, Any] = {}
    for what in ("next", "truth"):
        known = [row for row in rows if what == "next" or row["truth"] > SURE * row["truth_se"]]
        if not known:
            continue
        low, high = np.array([row["damage_interval"] for row in known]).T
        value = np.array([row[what] for row in known])
        with np.errstate(divide="ignore"):
            wide = np.sqrt(high / low)
        told[what] = {
            "cases": len(known),
            "inside": _rounded(((low <= value) & (value <= high)).mean()),
            "below": _rounded((value < low).mean()),
            "above": _rounded((value > high).mean()),
            "median factor either way": _rounded(np.median(wide)),
            f"median {what} over predicted": _rounded(np.median(value / np.array([row["damage"] for row in known]))),
        }
    return told


def fitted(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Calibration by kind: ratio, common and own, over the places where the loss moves little."""
    table: dict[str, Any] = {}
    sure = [row for row in rows if row["truth"] > SURE * row["truth_se"] and row["moves"] < STEADY]
    for kind in sorted({_kind(row) for row in sure}):
        chosen = [row for row in sure if _kind(row) == kind]
        off = np.array([math.log2(row["truth"] / row["damage"]) for row in chosen])
        places = [row["place"] for row in chosen]
        medians = {place: float(np.median(off[[at == place for at in places]])) for place in set(places)}
        models: dict[str, list[float]] = {}
        for place, median in medians.items():
            models.setdefault(place.split()[0], []).append(median)
        middles = {model: float(np.mean(found)) for model, found in sorted(models.items())}
        left = off - np.array([medians[place] for place in places])
        window = np.mean([_window_variance(row) for row in chosen])
        table[kind] = {
            "pairs": len(chosen),
            "ratio": _rounded(2 ** np.median(list(middles.values()))),
            "by model": {model: _rounded(2**middle) for model, middle in middles.items()},
            "common": _rounded(np.std(list(medians.values()))),
            "own": _rounded(math.sqrt(max(float(np.mean(left**2)) - window, 0.0))),
        }
    return table


def _window_variance(row: dict[str, Any]) -> float:
    """Of what a slot's window says of its own: its drift and draws, half of the floor."""
    draws = DAMAGE.doubt * row["damage_se"] / row["damage"] / math.log(2)
    drift = (DAMAGE.trend * row["halves"]) ** 2 + 2 * row["scatter"] ** 2 / row["steps"]
    return float(DAMAGE.floor**2 / 2 + drift + draws**2)


def _kind(row: dict[str, Any]) -> str:
    return " ".join(kind_named(row["role"], row["damage_from"], row["whole_batch"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, probe twice in a row, measure, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each model")
    parser.add_argument("--first-seed", type=int, default=12, help="0 to 11 are what the constants were chosen on")
    parser.add_argument("--steps", type=int, default=10, help="length of a window")
    parser.add_argument("--curvature-steps", type=int, default=2)
    parser.add_argument("--no-truth", action="store_true", help="compare with the next window alone")
    parser.add_argument("--fit", action="store_true", help="print the constants on this run")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args(arguments)
    seeds = list(range(asked.first_seed, asked.first_seed + asked.seeds))
    result: dict[str, Any] = {"seeds": seeds, "steps": asked.steps, "starts": STARTS, "models": {}}
    everything: list[dict[str, Any]] = []
    for name in asked.models:
        rows = [
            row
            for seed in seeds
            for row in gathered(name, seed, asked.steps, asked.curvature_steps, not asked.no_truth)
        ]
        everything += rows
        result["models"][name] = _both(rows)
        print(f"\n{name}\n{json.dumps(result['models'][name], indent=1)}", flush=True)
    result["all"] = _both(everything)
    print(f"\nall\n{json.dumps(result['all'], indent=1)}")
    if asked.fit:
        print(f"\ncalibration\n{json.dumps(fitted([row for row in everything if 'total' not in row]), indent=1)}")
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=1) + "\n")


def _both(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "slots": coverage([row for row in rows if "total" not in row]),
        "totals": coverage([row for row in rows if "total" in row]),
    }


def _rounded(value: Any) -> float:
    return round(float(value), 3)


if __name__ == "__main__":
    main()
