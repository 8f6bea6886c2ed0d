"""One training of a case: the same batches and initial weights in every arm of a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.plan import Plan
from advisor.zoo import datasets
from benchmarks.trouble.cases import Case
from probes.window import Window

BATCH, LENGTH = 32, 33
WINDOW_SEED = 1000
HELD_OUT_BATCHES = 16


class Training:
    """A model, its optimizer and its data, a step at a time."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.seed, self.step_index = case, seed, 0
        torch.manual_seed(seed)
        self.model: nn.Module = case.build()
        self.optimizer = case.optimizer(self.model)

    def step(self) -> float:
        """One step; the loss before it, without the case's factor."""
        if hasattr(self.model, "step"):
            self.model.step = self.step_index
        loss = self._loss(data_of(self.case.text).batch(self.step_index, self.seed, BATCH))
        (loss * self.case.factor).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_index += 1
        return float(loss.detach())

    def held_out(self) -> float:
        """Mean loss of the held-out batches in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            losses = [
                float(self._loss(data_of(self.case.text).held_out_batch(index, BATCH)))
                for index in range(HELD_OUT_BATCHES)
            ]
        self.model.train()
        return math.fsum(losses) / len(losses)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        if self.case.text:
            targets = targets[:, 1:]
        logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@cache
def data_of(text: bool) -> Any:
    """Built-in data, which every machine has."""
    if text:
        return datasets.load(datasets.PythonTextConfig(length=LENGTH))
    return datasets.load(datasets.DigitsConfig())


def window_of(case: Case) -> Window:
    """The one short window, of a training that no arm uses."""
    training = Training(case, WINDOW_SEED)
    while training.step_index < case.start - case.window:
        training.step()
    with advisor.probe(training.model, training.optimizer, steps=case.window) as window:
        while not window.done:
            training.step()
    return window


def final_loss(case: Case, seed: int, plan: Plan | None) -> float:
    """What the case is judged by, after all steps; a plan is carried out from `start` on."""
    training = Training(case, seed)
    while training.step_index < case.start:
        training.step()
    applied = nullcontext() if plan is None else advisor.apply(plan, training.model, training.optimizer, seed=seed)
    with applied:
        losses = list(_rest(training))
        if case.held_out:
            return training.held_out()
    last = losses[-(len(losses) // 4) :]
    return math.fsum(last) / len(last)


def _rest(training: Training) -> Iterator[float]:
    while training.step_index < training.case.steps:
        yield training.step()
