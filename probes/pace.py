"""Which steps of a window are recorded, and which of those are looked at more closely."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from heapq import heapreplace


class Clock:
    """Which steps to record when the watching may take only a share of the time.

    The first step is left alone, to learn what a plain one takes. A recorded step's surplus is a debt, and every step
    pays it back by the allowed share of a plain one's time. A step is recorded when there is no debt, and when the
    steps that remain can pay what it is expected to take: the dearest surplus so far, but for that of the first
    recorded step, where coverage is counted too. What nothing is known of is tried, so one step is always recorded.

    A scored step's extra backward passes are not the sketches': it is charged as one without them is expected to be.
    """

    def __init__(self, overhead: float, steps: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.overhead = overhead
        self.debt = 0.0  # seconds
        self._left = steps
        self._now = now
        self._plain: list[float] = []
        self._surplus: list[float] = []
        self._started = 0.0

    def start(self) -> None:
        """The first step begins."""
        self._started = self._now()

    def lap(self, recorded: bool, scored: bool = False) -> bool:
        """A step has ended; whether the next may be recorded."""
        now = self._now()
        spent, self._started = now - self._started, now
        self._left -= 1
        if not recorded:
            self._plain.append(spent)
        plain = statistics.median_low(self._plain)
        if recorded and scored:
            self.debt += self._expected
        elif recorded:
            self._surplus.append(max(0.0, spent - plain))
            self.debt += self._surplus[-1]
        share = self.overhead * plain
        self.debt -= share
        return self.debt <= 0 and self.debt + self._expected <= share * self._left

    @property
    def _expected(self) -> float:
        """Seconds that recording one more step may take."""
        return max(self._surplus[1:] or self._surplus, default=0.0)


def steps_taken(recorded: int, steps: int, every: int, clock: Clock | None) -> tuple[str, ...]:
    """What to say of a window that did not record each of its steps; nothing where it did."""
    if recorded == steps:
        return ()
    why = "" if every == 1 else f", one in {every}"
    if clock is not None:
        why += f", to keep the watching under {100 * clock.overhead:g}% of the time"
    return (f"{recorded} of {steps} steps were recorded{why}",)


def spread(count: int, steps: range) -> list[int]:
    """`count` of these steps, evenly over the window."""
    count = min(count, len(steps))
    return [steps[(2 * i + 1) * len(steps) // (2 * count)] for i in range(count)]


class Rota:
    """Which of many things is looked at in which of these steps.

    Each has its turn `times` times, evenly over the steps, and those of one step weigh about as much as those of any
    other, so that no step takes much longer, or needs much more memory, than the rest. With fewer than twice as many
    steps as times, all have their turn together. One that has missed a step has its turn in the next.
    """

    def __init__(self, times: int, steps: range) -> None:
        turns = max(1, len(steps) // times)
        self._steps = steps
        self._first_turns = [steps.index(step) - turns // 2 for step in spread(times, steps)]  # of each round
        # A heap: the lightest turn first, of several the last, as a window's first step has enough to do.
        self._lightest = [(0, -turn) for turn in reversed(range(turns))]
        self._turns: dict[str, int] = {}
        self._had: Counter[str] = Counter()

    def due(self, step: int, weights: Mapping[str, int]) -> list[str]:
        """Those of these names whose turn it is. A name keeps its place, which its weight decides when it is new."""
        for name in sorted(weights.keys() - self._turns.keys(), key=lambda name: (-weights[name], name)):
            weight, place = self._lightest[0]
            heapreplace(self._lightest, (weight + max(weights[name], 1), place))
            self._turns[name] = -place
        return [name for name in weights if self._had[name] < self._come(self._turns[name], step)]

    def had(self, name: str) -> None:
        """It has had a turn."""
        self._had[name] += 1

    def _come(self, turn: int, step: int) -> int:
        """How many times this turn has come by a step, this one included."""
        return sum(self._steps[first + turn] <= step for first in self._first_turns)
