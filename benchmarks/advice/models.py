"""Six small trainings on real data: what every table of the advice is measured on.

    chargpt      character GPT, tiny Shakespeare        convnet      BatchNorm, Fashion-MNIST
    llama        SwiGLU and RMSNorm, the same text      vit          small vision transformer, Fashion-MNIST
    lstm         character language model, nn.LSTM      regression   an image's lower half from the upper, squared error

A training is a pure function of (model, seed, steps), on one machine with one number of threads: weights are drawn
from the seed and each batch from (seed, step). `trained` keeps a checkpoint, so that every script starts at the same
weights.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.advice.data import Batch, halves_batch, image_batch, text_batch
from benchmarks.advice.networks import CharGPT, CharLSTM, Completion, ConvNet, Llama, ViT

LETTERS = 65  # of tiny Shakespeare
LENGTH = 64  # characters a sequence
CLASSES = 10
WARM_UP_STEPS = 20
CACHE = Path("advisor-data") / "advice"  # git ignores it

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Trainable:
    """One training: what is trained, how, and on what.

    steps           after which it counts as trained
    build()         a new model, its weights from torch's global generator
    optimizer(m)    its optimizer, at `learning_rate`
    batch(step, seed), held_out(index)   a training batch; one of examples that no training sees
    loss(m, batch)  the mean loss, a tensor without dimensions; the model must be in training mode already
    """

    name: str
    steps: int
    learning_rate: float
    build: Build
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batch: Callable[[int, int], Batch]
    held_out: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]


class Trained(NamedTuple):
    """A model in training mode, its optimizer, and the step that comes next."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int


class Start(NamedTuple):
    """Where measuring starts: a model's checkpoint after its own number of steps, of a seed, kept in a folder."""

    name: str
    seed: int
    cache: Path

    @property
    def label(self) -> str:
        """What tables and files call it."""
        return f"{self.name}-seed{self.seed}" if self.seed else self.name

    @property
    def trainable(self) -> Trainable:
        """How it was trained."""
        return MODELS[self.name]

    def load(self) -> Trained:
        """The model there, trained first where there is no checkpoint."""
        return trained(self.name, self.seed, cache=self.cache)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainable: Trainable,
    seed: int,
    start: int,
    steps: int,
    each_step: Callable[[int, Tensor], object] | None = None,
) -> None:
    """Train for `steps` steps, the first of which is `start`; `each_step` gets the step and its loss (detached).

    It is called when the optimizer has stepped and the gradients still stand.
    """
    for step in range(start, start + steps):
        for group in optimizer.param_groups:
            group["lr"] = trainable.learning_rate * min(1.0, (step + 1) / WARM_UP_STEPS)
        optimizer.zero_grad()
        loss = trainable.loss(model, trainable.batch(step, seed))
        loss.backward()
        optimizer.step()
        if each_step is not None:
            each_step(step, loss.detach())


def fresh(trainable: Trainable, seed: int) -> Trained:
    """A new model, its weights drawn from the seed; the caller's generator is left where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = trainable.build().train()
    return Trained(model, trainable.optimizer(model), 0)


def trained(name: str, seed: int = 0, steps: int | None = None, cache: Path | None = CACHE) -> Trained:
    """The model of that name after `steps` (None: its own number) of training, from its checkpoint if there is one.

    cache: the folder of checkpoints; None neither reads nor writes one. A file there that is not whole is an error.
    """
    trainable = MODELS[name]
    steps = trainable.steps if steps is None else steps
    found = fresh(trainable, seed)
    path = None if cache is None else cache / f"{name}-seed{seed}-step{steps}.pt"
    if path is not None and path.is_file():
        state = torch.load(path, weights_only=True)
        found.model.load_state_dict(state["model"])
        found.optimizer.load_state_dict(state["optimizer"])
        return found._replace(step=steps)
    train(found.model, found.optimizer, trainable, seed, 0, steps)
    found.optimizer.zero_grad()
    if path is not None:
        _save({"model": found.model.state_dict(), "optimizer": found.optimizer.state_dict()}, path)
    return found._replace(step=steps)


def _save(state: dict[str, object], path: Path) -> None:
    """The whole file or none, whoever else writes it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, written = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        torch.save(state, file)
    os.replace(written, path)


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over all targets, whatever dimensions they have."""
    return F.cross_entropy(model(batch.inputs).flatten(0, -2), batch.targets.flatten())


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over all numbers."""
    return F.mse_loss(model(batch.inputs), batch.targets)


def _adamw(rate: float, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)


def _sgd(rate: float, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)


def _of_text(name: str, steps: int, rate: float, build: Build, size: int = 16) -> Trainable:
    def held_out(index: int) -> Batch:
        return text_batch(index, 0, size, LENGTH, held_out=True)

    batch = partial(text_batch, size=size, length=LENGTH)
    return Trainable(name, steps, rate, build, partial(_adamw, rate), batch, held_out, cross_entropy)


def _of_images(name: str, steps: int, rate: float, build: Build, adam: bool = True, halves: bool = False) -> Trainable:
    draw, size = (halves_batch, 128) if halves else (image_batch, 64)

    def held_out(index: int) -> Batch:
        return draw(index, 0, size, held_out=True)

    optimizer = partial(_adamw if adam else _sgd, rate)
    loss = squared_error if halves else cross_entropy
    return Trainable(name, steps, rate, build, optimizer, partial(draw, size=size), held_out, loss)


_ALL = (
    _of_text("chargpt", 400, 3e-3, partial(CharGPT, LETTERS, LENGTH, width=64, heads=4, layers=2)),
    _of_text("llama", 400, 3e-3, partial(Llama, LETTERS, LENGTH, width=64, heads=4, layers=2, hidden=160)),
    _of_images("convnet", 300, 0.05, partial(ConvNet, (16, 32, 64), CLASSES), adam=False),
    _of_images("vit", 300, 2e-3, partial(ViT, width=64, heads=4, layers=2, classes=CLASSES)),
    _of_text("lstm", 300, 5e-3, partial(CharLSTM, LETTERS, width=64, hidden=96)),
    _of_images("regression", 400, 1e-3, partial(Completion, 392, width=192, layers=3), halves=True),
)
MODELS: Mapping[str, Trainable] = MappingProxyType({one.name: one for one in _ALL})
