"""What a plan is to be best at, and the budgets that it must keep."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal

from advisor.errors import InvalidPlan

# Objective → measures of a site's combination, the most important first. Each is served as far as those before it
# allow. FLOPs are to be large, all else small.
Objective = Literal["share_8bit", "time", "memory", "damage"]
OBJECTIVES: Mapping[Objective, tuple[str, ...]] = MappingProxyType(
    {
        "share_8bit": ("flops_8bit", "flops_16bit", "bytes", "damage"),
        "time": ("time_s", "flops_8bit", "bytes", "damage"),
        "memory": ("bytes", "flops_8bit", "flops_16bit", "damage"),
        "damage": ("damage", "flops_8bit", "flops_16bit", "bytes"),
    }
)
LARGER_IS_BETTER = frozenset({"flops_8bit", "flops_16bit"})


@dataclass(frozen=True)
class Budget:
    """What a plan must reach beside its limits on damage and lost batch; None: whatever comes.

    share_8bit    at least this share of all matrix FLOPs in 8 bits, from 0 to 1
    time_s        at most these seconds a step for matrix products and casts
    memory_bytes  at most these bytes, counted as in `Predicted.memory_bytes`
    """

    share_8bit: float | None = None
    time_s: float | None = None
    memory_bytes: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.given:
            if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise InvalidPlan(f"budget {name}={value!r} is not possible: give a finite number, 0 or more")
        if self.share_8bit is not None and self.share_8bit > 1:
            raise InvalidPlan(f"budget share_8bit={self.share_8bit!r} is not possible: give a share from 0 to 1")

    @property
    def given(self) -> list[tuple[str, float]]:
        """The names and values that are not None."""
        return [(one.name, value) for one in fields(self) if (value := getattr(self, one.name)) is not None]

    @classmethod
    def of(cls, given: Mapping[str, float] | None) -> Budget:
        """From names and values. Raises InvalidPlan for a name that is none."""
        names = [one.name for one in fields(cls)]
        for name in given or {}:
            if name not in names:
                raise InvalidPlan(f"no budget is called {name!r}: {_near(name, names)}Budgets: {', '.join(names)}")
        return cls(**dict(given or {}))

    def __str__(self) -> str:
        said = {
            "share_8bit": "at least {:.4g} of the matrix FLOPs in 8 bits",
            "time_s": "at most {:.4g} s a step",
            "memory_bytes": "at most {:.6g} bytes",
        }
        return ", ".join(said[name].format(value) for name, value in self.given)


@dataclass(frozen=True)
class Task:
    """What a plan is made for: an objective and the budgets beside it. Raises InvalidPlan."""

    objective: Objective = "share_8bit"
    budget: Budget = Budget()

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            near = _near(self.objective, OBJECTIVES)
            raise InvalidPlan(f"no objective is called {self.objective!r}: {near}Objectives: {', '.join(OBJECTIVES)}")
        if self.objective == "damage" and not self.budget.given:
            raise InvalidPlan(
                "the plan of least damage casts nothing, unless it has a budget to keep: give budget, for example "
                "{'share_8bit': 0.8}, {'time_s': 0.02} or {'memory_bytes': 2e9}"
            )

    @property
    def goals(self) -> tuple[str, ...]:
        """The measures to be best at, the most important first."""
        return OBJECTIVES[self.objective]

    @property
    def is_timed(self) -> bool:
        """Whether seconds matter, which only devices with known rates have."""
        return self.objective == "time" or self.budget.time_s is not None


def _near(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
