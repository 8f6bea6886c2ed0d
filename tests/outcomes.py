"""What a training leaves, bit for bit: losses, weights, buffers, gradients, optimizer state and random streams."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from probes.probing import probe

Outcome = dict[str, Tensor]
Watch = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[Any]]
Training = Callable[[Watch], Outcome]  # trains with the window entered around a part of its steps

BEFORE, WITHIN, AFTER = 1, 4, 1  # steps; the window is of 3, so that one step runs in a window that has ended itself

WINDOWS: dict[str, dict[str, Any]] = {
    "plain": {"curvature_steps": 0},
    "curvature": {"curvature_steps": 2},
    "every": {"every": 2, "curvature_steps": 1, "casts": ("e4m3fn",)},
    "overhead": {"overhead": 0.5, "curvature_steps": 1, "casts": ("e4m3fn",)},
}


def unwatched(*_: Any) -> AbstractContextManager[Any]:
    """No window."""
    return nullcontext()


def watched(**options: Any) -> Watch:
    """A window of 3 steps with these options."""
    return lambda model, optimizer: probe(model, optimizer, steps=WITHIN - 1, **options)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], Any], watch: Watch, steps: int = WITHIN
) -> Outcome:
    """Steps before, within and after the window; `step` gives its loss or several."""
    losses = [step() for _ in range(BEFORE)]
    with watch(model, optimizer):
        losses += [step() for _ in range(steps)]
    losses += [step() for _ in range(AFTER)]
    return outcome(losses, [model], [optimizer])


def outcome(
    losses: list[Any], models: list[nn.Module], optimizers: list[torch.optim.Optimizer], more: Mapping[str, Any] = {}
) -> Outcome:
    """Everything that a training could go on from, by name."""
    found = dict(_flat("losses", losses))
    for i, model in enumerate(models):
        found |= _flat(f"model{i}", dict(model.named_parameters(remove_duplicate=False)))
        found |= _flat(f"buffers{i}", dict(model.named_buffers(remove_duplicate=False)))
        found |= _flat(f"gradients{i}", {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        found |= _flat(f"requires_grad{i}", {name: p.requires_grad for name, p in model.named_parameters()})
    for i, optimizer in enumerate(optimizers):
        found |= _flat(f"optimizer{i}", optimizer.state_dict())
    found |= _flat("more", more)
    found["random.torch"] = torch.get_rng_state()
    found |= _flat("random.python", random.getstate())
    found |= _flat("random.numpy", np.random.get_state())  # noqa: NPY002 - the global stream is what is asked for
    return found


def differences(one: Outcome, other: Outcome) -> list[str]:
    """Names of what is not the same, bit for bit; NaNs of equal bits are equal."""
    names = [name for name in one if name not in other] + [name for name in other if name not in one]
    return names + [name for name, value in one.items() if name in other and not _same(value, other[name])]


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms on, and random streams from fixed seeds; all put back after."""
    before = torch.are_deterministic_algorithms_enabled()
    streams = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    torch.use_deterministic_algorithms(True)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        random.setstate(streams[0])
        np.random.set_state(streams[1])  # noqa: NPY002
        torch.set_rng_state(streams[2])


def changed_by(training: Training, options: Mapping[str, Any]) -> list[str]:
    """What a window with these options changes in a training: nothing, it should be."""
    with deterministic():
        plain = training(unwatched)
    with deterministic():
        return differences(plain, training(watched(**options)))


def _same(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.layout != other.layout:
        return False
    if one.layout != torch.strided:
        return torch.equal(one.to_dense(), other.to_dense())
    return torch.equal(_bytes(one), _bytes(other))


def _bytes(values: Tensor) -> Tensor:
    return values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _flat(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        value = getattr(value, "_local_tensor", value)  # of a DTensor
        yield name, value.detach().clone()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _flat(f"{name}.{i}", part)
    elif isinstance(value, np.ndarray):
        yield name, torch.from_numpy(value.astype(np.int64))
    elif isinstance(value, (bool, int, float)):
        yield name, torch.tensor(value, dtype=torch.float64)
