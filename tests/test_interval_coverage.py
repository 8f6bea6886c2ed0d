"""On real trainings, damages lie in their intervals: the next window's, and what brute force measures at its end."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["perceptron", "autoencoder"])
def test_damages_lie_in_their_intervals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed that no constant was chosen on. Its slots share what they are off by, so the share is no binomial one."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("intervals")
    rows = benchmark.gathered(name, seed=30, steps=10, curvature_steps=2, brute_force=True)
    for what in ([row for row in rows if "total" not in row], [row for row in rows if "total" in row]):
        found = benchmark.coverage(what)
        assert found["next"]["inside"] >= 0.75
        assert found["truth"]["inside"] >= 0.75
        assert found["truth"]["median factor either way"] < 20
