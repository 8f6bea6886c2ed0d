"""The devices by name, and how one is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from advisor.device import Hardware
from advisor.devices import ROWS
from advisor.errors import UnknownHardware

__all__ = ["HARDWARE", "Hardware", "hardware_named"]

HARDWARE: Mapping[str, Hardware] = MappingProxyType({row.name: row for row in sorted(ROWS, key=lambda row: row.name)})


def hardware_named(name: str | Hardware) -> Hardware:
    """The row of that name; a Hardware is given back as it is.

    Raises UnknownHardware, with near matches and the whole list.
    """
    if isinstance(name, Hardware):
        return name
    if name in HARDWARE:
        return HARDWARE[name]
    near = difflib.get_close_matches(str(name).lower(), HARDWARE, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UnknownHardware(f"unknown hardware {name!r}: {hint}Known: {', '.join(HARDWARE)}.")
