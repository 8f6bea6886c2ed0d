"""Names of sites that differ in one number, told together: "blocks.0-11.mlp.up"."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<=\.)\d+(?=[./]|$)|^\d+(?=[./])")  # a whole part of the path


def without_number(name: str) -> tuple[str, str]:
    """The name with `#` for the first number that is a whole part of it, and that number; "" where there is none."""
    found = _NUMBER.search(name)
    return (name, "") if found is None else (f"{name[: found.start()]}#{name[found.end() :]}", found.group())


def joint_name(names: Sequence[str]) -> str:
    """One name for several that differ in that number alone; the name itself for one."""
    if len(names) == 1:
        return names[0]
    return without_number(names[0])[0].replace("#", ranges([without_number(name)[1] for name in names]), 1)


def ranges(numbers: Sequence[str]) -> str:
    """ "0-3,5" for 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in sorted(map(int, numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs)
