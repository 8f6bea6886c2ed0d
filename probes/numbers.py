"""Numbers that JSON has no word for: NaN and the infinities, as the strings "NaN", "Infinity" and "-Infinity".

Left alone, a writer turns them into null, and a reader cannot tell "not a number" from "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

NON_FINITE: Mapping[str, float] = MappingProxyType({"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf})


def as_json(value: float) -> float | str:
    """A float as JSON can hold it: itself, or "NaN", "Infinity", "-Infinity"."""
    if math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def from_json(value: Any) -> Any:
    """The float that `as_json` wrote; anything but a string passes as it is. Raises ValueError on other strings."""
    if not isinstance(value, str):
        return value
    if value not in NON_FINITE:
        raise ValueError(f"{value!r} is no number; a number, or one of the strings {', '.join(NON_FINITE)}")
    return NON_FINITE[value]


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as JSON holds them, whatever numbers are in them."""
    if isinstance(value, float):
        return as_json(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return value
