"""Which steps of a window are recorded, and which of those are looked at more closely."""

from __future__ import annotations

import statistics
import time


class Clock:
    """Which steps to record when the watching may take only a share of the time.

    The first step is left alone, to learn what a plain one takes. A recorded step's surplus is a debt, and each plain
    step pays the allowed share of its own time.
    """

    def __init__(self, overhead: float) -> None:
        self.overhead = overhead
        self.debt = 0.0
        self._plain: list[float] = []
        self._started = 0.0

    def start(self) -> None:
        """The first step begins."""
        self._started = time.perf_counter()

    def lap(self, recorded: bool) -> bool:
        """A step has ended; whether the next may be recorded."""
        now = time.perf_counter()
        spent, self._started = now - self._started, now
        if recorded:
            self.debt += max(0.0, spent - statistics.median_low(self._plain))
        else:
            self._plain.append(spent)
            self.debt -= self.overhead * spent
        return self.debt <= 0


def spread(count: int, steps: range) -> list[int]:
    """`count` of these steps, evenly over the window."""
    count = min(count, len(steps))
    return [steps[(2 * i + 1) * len(steps) // (2 * count)] for i in range(count)]
