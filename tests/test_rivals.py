"""The table of the rivals: its arithmetic, on made-up runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.rivals.table import interval, model_table, verdict


def rows(contender: str, share: float, *losses: float) -> list[dict[str, Any]]:
    return [
        {"model": "m", "seed": seed, "contender": contender, "held_out": loss, "share_8bit": share}
        for seed, loss in enumerate(losses)
    ]


def test_the_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 2 degrees of freedom, 97.5%


@pytest.mark.parametrize(
    ("differences", "ours"),
    [([-1.0, -1.1, -0.9], "better"), ([1.0, 1.1, 0.9], "worse"), ([-1.0, 1.2, 0.1], "tied")],
)
def test_the_verdict_asks_whether_the_interval_has_zero(differences: list[float], ours: str) -> None:
    assert verdict(differences)["ours"] == ours


def test_a_training_that_broke_down_beats_nothing() -> None:
    assert verdict([math.nan, 0.1])["ours"].startswith("undecided")
    found = model_table([*rows("fp32", 0.0, 1.0, 1.1), *rows("int8", 0.9, math.nan, 1.1)], "m")
    assert not found["contenders"]["int8"]["keeps_the_loss"]


def test_gaps_are_paired_by_seed() -> None:
    runs = [*rows("fp32", 0.0, 1.0, 2.0), *rows("te-hybrid", 0.8, 1.5, 2.5), *rows("plan=te-hybrid", 0.8, 1.25, 2.25)]
    found = model_table(runs, "m")
    assert found["contenders"]["te-hybrid"]["gap"] == 0.5
    assert found["contenders"]["te-hybrid"]["half_width"] == 0.0
    assert found["at_equal_share"]["te-hybrid"] == {
        "difference": -0.25,
        "half_width": 0.0,
        "ours": "better",
        "shares_8bit": [0.8, 0.8],
    }
