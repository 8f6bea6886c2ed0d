"""How fast a job goes and how long it will take."""

import time
from collections import deque
from collections.abc import Callable, Mapping

RECENT = 50  # steps that the rate is the mean of


class Pace:
    """Told of each step; knows the rate of the last ones and the time left for all phases at that rate.

    phases: steps of each phase, in order. The clock is given for tests.
    """

    def __init__(self, phases: Mapping[str, int], clock: Callable[[], float] = time.perf_counter) -> None:
        self._steps = dict(phases)
        self._clock = clock
        self._phase: str | None = None
        self._times: deque[float] = deque(maxlen=RECENT)

    def step(self, phase: str, step: int) -> dict[str, float | None]:
        """steps_per_s and seconds_left after that step (counted from 1); null until there are two to compare."""
        if phase != self._phase:
            self._phase = phase
            self._times.clear()
        self._times.append(self._clock())
        elapsed = self._times[-1] - self._times[0]
        rate = (len(self._times) - 1) / elapsed if elapsed > 0 else None
        left = None if rate is None else round(self._left(phase, step) / rate, 2)
        return {"steps_per_s": None if rate is None else round(rate, 3), "seconds_left": left}

    def _left(self, phase: str, step: int) -> int:
        names = list(self._steps)
        later = names[names.index(phase) + 1 :]
        return self._steps[phase] - step + sum(self._steps[name] for name in later)
