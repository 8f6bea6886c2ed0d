"""What has its turn in which step of a window."""

from __future__ import annotations

from collections import Counter

import pytest

from probes.pace import Rota

WEIGHTS = {f"layer{i}": 1000 // (i + 1) for i in range(12)}


def kept(rota: Rota, steps: range, weights: dict[str, int]) -> dict[int, list[str]]:
    """Who has had a turn in which step, if none is missed."""
    found = {}
    for step in steps:
        found[step] = rota.due(step, weights)
        for name in found[step]:
            rota.had(name)
    return found


@pytest.mark.parametrize("steps", [range(1), range(4), range(7), range(8), range(18), range(20), range(0, 40, 3)])
def test_each_has_its_turns_once_they_fit(steps: range) -> None:
    found = kept(Rota(4, steps), steps, WEIGHTS)
    assert Counter(name for names in found.values() for name in names) == dict.fromkeys(WEIGHTS, min(4, len(steps)))
    assert sum(1 for names in found.values() if names) == min(len(steps), max(1, len(steps) // 4) * 4)


def test_the_steps_of_a_round_weigh_about_the_same() -> None:
    found = kept(Rota(4, range(20)), range(20), WEIGHTS)
    weighed = [sum(WEIGHTS[name] for name in names) for names in found.values()]
    assert weighed[:5] * 4 == weighed
    least, *others, most = sorted(weighed[:5])
    assert most == WEIGHTS["layer0"]  # more than a fifth of all, so it is alone
    assert max(others) < 1.2 * least


def test_a_turn_that_was_missed_is_made_up_for() -> None:
    rota = Rota(4, range(20))
    taken = kept(rota, range(0, 20, 6), WEIGHTS)  # 0, 6, 12 and 18
    turns = Counter(name for names in taken.values() for name in names)
    assert set(turns) == set(WEIGHTS)
    assert min(turns.values()) >= 3


def test_a_name_that_comes_later_joins_the_lightest_turn() -> None:
    rota = Rota(2, range(4))
    assert rota.due(0, {"large": 10, "small": 1}) == ["small"]
    rota.had("small")
    assert rota.due(1, {"large": 10, "small": 1, "new": 3}) == ["large", "new"]
    assert rota.due(1, {"large": 10, "small": 1}) == ["large"]  # one that has gone is not asked for


def test_all_ranks_agree_whatever_the_order() -> None:
    one, other = Rota(4, range(20)), Rota(4, range(20))
    backwards = dict(reversed(WEIGHTS.items()))
    for step in range(20):
        assert set(one.due(step, WEIGHTS)) == set(other.due(step, backwards))
