"""Trainer: one deterministic training of an ArchitectureSpec.

Everything random is a pure function of (seed, step): the batch comes from a generator of its own, and
dropout from torch's, seeded anew at each step and put back after it. So a training that stops and resumes
is bit-identical to one that does not, two trainings from one checkpoint see the same batches and the same
dropout masks, and the random stream of the process that calls is left as it was. (Bit-identical on one
machine with one number of threads: torch's sums depend on both.)
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advisor.errors import InvalidModel, TrainingDiverged
from advisor.zoo.spec import ArchitectureSpec, TrainingConfig

STATE_SCHEMA = "numerics-advisor/training/1"
INIT_STREAM, STEP_STREAM = 2, 3  # third word of a seed; the data sets use 0 and 1
ADAM_BETAS = (0.9, 0.99)  # the second one shorter than Adam's 0.999: short trainings


class Trainer:
    """A model, its optimizer and its data, a step at a time.

    seed: replaces the spec's; it decides initial weights, batches and dropout.
    """

    def __init__(self, spec: ArchitectureSpec, seed: int | None = None, device: str = "cpu") -> None:
        self.spec = spec
        self.seed = spec.training.seed if seed is None else seed
        self.device = torch.device(device)
        self.data = spec.load_data()
        with self._seeded(0, INIT_STREAM):
            self.model: nn.Module = spec.build().to(self.device)
        self.optimizer = build_optimizer(self.model, spec.training)
        self.step_index = 0

    def step(self, require_finite: bool = True) -> float:
        """One training step: forward, loss, backward, update. Returns the loss before the update.

        Raises TrainingDiverged, before anything is updated, where require_finite and the loss is NaN or
        infinite.
        """
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step_index, self.spec.training)
        inputs, targets = self._on_device(self.data.batch(self.step_index, self.seed, self.spec.training.batch_size))
        with self._seeded(self.step_index, STEP_STREAM):
            loss = self._loss(inputs, targets)
            value = float(loss.detach())
            if require_finite and not math.isfinite(value):
                self.optimizer.zero_grad(set_to_none=True)
                raise TrainingDiverged(
                    f"the loss is {value} at step {self.step_index}: lower training.learning_rate "
                    f"(now {self.spec.training.learning_rate}) or raise training.warmup_steps "
                    f"(now {self.spec.training.warmup_steps})"
                )
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_index += 1
        return value

    def evaluate(self, batches: int) -> list[float]:
        """Held-out losses, one a batch, of the same batches always. Leaves the model in training mode."""
        self.model.eval()
        try:
            with torch.no_grad():
                return [float(self._loss(*self._held_out(index))) for index in range(batches)]
        finally:
            self.model.train()

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, in tensors and plain values.

        The tensors are the live ones: save or copy.
        """
        return {
            "schema": STATE_SCHEMA,
            "spec": self.spec.to_dict(),
            "seed": self.seed,
            "step_index": self.step_index,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from that state.

        Raises InvalidModel where it belongs to another model; its seed is taken over.
        """
        if not isinstance(state, dict) or state.get("schema") != STATE_SCHEMA:
            raise InvalidModel(f"this is no training state of the schema {STATE_SCHEMA}")
        saved, own = state["spec"], self.spec.to_dict()
        differing = [part for part in ("family", "config", "data", "training") if saved.get(part) != own[part]]
        if differing:
            raise InvalidModel(
                f"the saved training differs from this one in: {', '.join(differing)}; "
                "restore it into a Trainer of its own spec"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.seed = int(state["seed"])
        self.step_index = int(state["step_index"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as one file that is whole or not there, even if the machine stops in between."""
        target = Path(path)
        descriptor, written = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                torch.save(self.state(), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(written, target)
        except BaseException:
            Path(written).unlink(missing_ok=True)
            raise
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the new name is only durable once its directory is
        finally:
            os.close(directory)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restore from a file of `save`.

        Nothing in the file can run. Raises InvalidModel, FileNotFoundError.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch.load raises whatever its unpickler met: RuntimeError, EOFError, KeyError…
            raise InvalidModel(f"{os.fspath(path)} is not a file that Trainer.save wrote: {error}") from error
        self.restore(state)

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def _held_out(self, index: int) -> tuple[Tensor, Tensor]:
        return self._on_device(self.data.held_out_batch(index, self.spec.training.batch_size))

    def _on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return batch[0].to(self.device), batch[1].to(self.device)

    @contextlib.contextmanager
    def _seeded(self, step: int, stream: int) -> Iterator[None]:
        """torch's global generators, seeded by (seed, step, stream) inside and as they were outside."""
        devices = [self.device] if self.device.type == "cuda" else []
        (seed,) = np.random.SeedSequence([self.seed, step, stream]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(seed))
            yield


def learning_rate_at(step: int, training: TrainingConfig) -> float:
    """Rises in a straight line over the warm-up, then stays."""
    if step >= training.warmup_steps:
        return training.learning_rate
    return training.learning_rate * (step + 1) / (training.warmup_steps + 1)


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """The optimizer of a config. Weight decay is for matrices only, as usual: not for biases and norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.learning_rate, betas=ADAM_BETAS)
    return torch.optim.SGD(groups, lr=training.learning_rate, momentum=training.momentum)
