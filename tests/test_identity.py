"""A window changes no bit of a training: losses, weights, buffers, gradients, optimizer state, random streams.

By default a few cells of the matrix; all of it with `-m slow`, and with `benchmarks/identity.py`, which writes down
what it found.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.architectures import ARCHITECTURES
from tests.outcomes import WINDOWS, changed_by, deterministic, differences, outcome, watched
from tests.ranks import on_ranks
from tests.situations import RANKS, SITUATIONS, architecture, ranks_changed

# What makes torch.compile warn of its own doing (2.13), see test_compiled.py; and torch.export.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]

SLOW_TO_TRAIN = {"compiled", "compiled-in-place"}  # test_compiled.py has theirs
QUICK_ARCHITECTURES = {"resnet", "lstm", "dlrm"}
QUICK_SCORED = {"ordinary", "scaler-skips", "checkpoint-reentrant", "users-hooks", "towards-leaves", "adversaries-both"}


def cells(names: Any, quick: Any) -> list[Any]:
    """Every name with every window; all but the quick ones are slow."""
    return [
        pytest.param(name, window, id=f"{name}-{window}", marks=() if quick(name, window) else pytest.mark.slow)
        for name in names
        for window in WINDOWS
    ]


def quick_situation(name: str, window: str) -> bool:
    return name not in SLOW_TO_TRAIN and window == ("every" if name in QUICK_SCORED else "plain")


@pytest.mark.parametrize(("name", "window"), cells(SITUATIONS, quick_situation))
def test_no_situation_is_changed(name: str, window: str) -> None:
    assert changed_by(SITUATIONS[name], WINDOWS[window]) == []


@pytest.mark.parametrize(
    ("name", "window"), cells(ARCHITECTURES, lambda name, window: name in QUICK_ARCHITECTURES and window == "every")
)
def test_no_architecture_is_changed(name: str, window: str) -> None:
    assert changed_by(partial(architecture, name=name), WINDOWS[window]) == []


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "data-parallel" else pytest.mark.slow) for name in RANKS],
)
def test_two_processes_are_not_changed(name: str, tmp_path: Path) -> None:
    assert on_ranks(2, ranks_changed, tmp_path, name, tuple(WINDOWS) if name != "data-parallel" else ("every",)) == [
        [],
        [],
    ]


def test_a_difference_would_be_found() -> None:
    """Of one bit in a weight, one draw from a random stream, or a gradient that is left behind."""

    def training(disturb: Any) -> Any:
        model = nn.Linear(3, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
        disturb(model)
        return outcome([0.0], [model], [optimizer])

    def bit(model: nn.Module) -> None:
        model.weight.data.view(torch.int32)[0, 0] ^= 1  # type: ignore[operator, union-attr]

    def gradient(model: nn.Module) -> None:
        model.bias.grad = None  # type: ignore[union-attr]

    found = []
    for disturb in (lambda model: None, bit, gradient, lambda model: torch.rand(1)):
        with deterministic():
            found.append(training(disturb))
    assert [differences(found[0], other) for other in found] == [
        [],
        ["model0.weight"],
        ["gradients0.bias"],
        ["random.torch"],
    ]


def test_the_windows_do_record() -> None:
    """What is compared is a training with a window that met its steps, not one that gave up."""
    windows = []

    def keeping(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        watching = watched(**WINDOWS["curvature"])(model, optimizer)
        windows.append(watching.window)
        return watching

    for name in ("scaler-skips", "checkpoint", "dispatch-mode-inside"):
        with deterministic():
            SITUATIONS[name](keeping)
        assert windows[-1].steps == (0, 1, 2), name
        assert windows[-1].coverage.share == 1, name
        assert {"blocks.0.up", "blocks.1.down", "head"} <= {site.name for site in windows[-1].sites}, name
        assert windows[-1].evidence("head", "weight").curvature, name
