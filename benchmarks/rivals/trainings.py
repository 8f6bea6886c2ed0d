"""The trainings of the table: each contender goes on from one checkpoint, beside fp32 on the same batches.

A seed is a training of its own from the first step: weights, batches, checkpoint. For each the window is opened at the
checkpoint, on a copy, and every contender gets a plan from it. What is measured is the mean loss over held-out batches
at the end, with the plan in force (what was trained in 8 bits is used in 8 bits), minus that of fp32.

Results are appended to a file as they come, one line each, and are not made twice: a run that was killed goes on.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import advisor
from advisor.errors import InvalidPlan
from advisor.plan import Plan
from benchmarks.advice.models import MODELS, Trainable, train, trained
from benchmarks.rivals.recipes import RECIPES, Recipe, Setting, plan_of

BASELINE = "fp32"
CONTROL = "fp32-nudged"  # fp32 from weights moved by a millionth: what any change at all does to the loss, by chance
NUDGE = 1e-6
HARDWARE = "h100"
WINDOW_STEPS, SCORED_STEPS = 20, 4
GO_ON_STEPS = 120
HELD_OUT_BATCHES = 64
NO_LIMIT = 1e9  # of loss
LOST_BATCH = (0.02, 0.05, 0.1, 0.2, 0.5, 0.9, 0.99, 0.999)

# Contenders of ours: the plan at its defaults, and the one of least damage with at least the 8-bit share of a rival.
OURS: Mapping[str, str | None] = {
    "plan": None,
    "plan=te-hybrid": "te-hybrid",
    "plan=first-last": "first-last",
    "plan=modelopt": "modelopt",
    "plan=torchao": "torchao",
}


@dataclass(frozen=True)
class Start:
    """A seed's checkpoint, and what was seen there."""

    setting: Setting
    optimizer: torch.optim.Optimizer
    step: int
    seed: int

    def copied(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A model and an optimizer of one's own, at the checkpoint."""
        model = copy.deepcopy(self.setting.model)
        optimizer = self.setting.trainable.optimizer(model)
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return model, optimizer


def start(name: str, seed: int, hardware: str = HARDWARE) -> Start:
    """Train to the checkpoint (kept in a cache), and probe from there, on a copy."""
    trainable = MODELS[name]
    model, optimizer, step = trained(name, seed, trainable.steps - GO_ON_STEPS)
    at = Start(Setting(trainable, model, None, hardware), optimizer, step, seed)  # type: ignore[arg-type]
    watched, its_optimizer = at.copied()
    with advisor.probe(watched, its_optimizer, steps=WINDOW_STEPS, curvature_steps=SCORED_STEPS) as window:
        train(watched, its_optimizer, trainable, seed, step, WINDOW_STEPS)
    return Start(Setting(trainable, model, window, hardware), optimizer, step, seed)


def plans(at: Start, contenders: Sequence[str]) -> dict[str, Plan | None]:
    """A plan for each of these contenders; None for the baseline and the control, which have none."""

    @cache
    def given(recipe: str) -> Plan:
        return plan_of(at.setting, RECIPES[recipe](at.setting))

    found: dict[str, Plan | None] = {}
    for name in contenders:
        if name in RECIPES:
            found[name] = given(name)
        elif name in OURS:
            rival = OURS[name]
            found[name] = ours(at, None if rival is None else given(rival).predicted.share_8bit)
        else:
            found[name] = None
    return found


def ours(at: Start, share: float | None) -> Plan:
    """The recommended plan; with a share, that of least damage among those with at least so much in 8 bits.

    The limit on the lost batch is the first of LOST_BATCH that lets so much be in 8 bits. Where none does, the plan
    with the largest share; the table has each contender's.
    """
    window, hardware = at.setting.window, at.setting.hardware
    if share is None:
        return advisor.recommend(window, hardware=hardware)
    if share == 0:
        return plan_of(at.setting, Recipe({}))
    budget = {"share_8bit": share * (1 - 1e-9)}
    for limit in LOST_BATCH:
        with suppress(InvalidPlan):
            return advisor.recommend(window, hardware, objective="damage", budget=budget, max_lost_batch=limit)
    # Some site cannot be planned (no damage or noise is known of it): as much as there is.
    return advisor.recommend(window, hardware, tolerance=NO_LIMIT, max_lost_batch=LOST_BATCH[-1])


def run(at: Start, contender: str, plan: Plan | None) -> dict[str, Any]:
    """Go on from the checkpoint with a plan: the held-out loss at the end, NaN where training broke down."""
    trainable = at.setting.trainable
    model, optimizer = at.copied()
    if contender == CONTROL:
        nudge(model, at.seed)
    started = time.perf_counter()
    with nullcontext() if plan is None else advisor.apply(plan, model, optimizer, seed=at.seed):
        train(model, optimizer, trainable, at.seed, at.step, GO_ON_STEPS)
        held_out = held_out_loss(trainable, model)
    return {"held_out": held_out, "seconds": round(time.perf_counter() - started, 2)}


def nudge(model: nn.Module, seed: int) -> None:
    """Move every weight by a random part of NUDGE of itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))


def held_out_loss(trainable: Trainable, model: nn.Module) -> float:
    """Mean over the same held-out batches always, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        losses = [float(trainable.loss(model, trainable.held_out(index))) for index in range(HELD_OUT_BATCHES)]
    model.train()
    return math.fsum(losses) / len(losses)


class Results:
    """Lines of JSON in a file, one a finished training; what is there is not made again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            self.rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]

    def has(self, model: str, seed: int, contender: str) -> bool:
        """Whether this training is done."""
        return any((r["model"], r["seed"], r["contender"]) == (model, seed, contender) for r in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished training, on disk before anything else is begun."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
