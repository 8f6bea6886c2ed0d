"""Casts as plans name them: the one that changes nothing, and short names for tables and sentences."""

from __future__ import annotations

from functools import lru_cache

from probes.casts import Cast

KEEP = "fp32/none/nearest"
"""The cast that leaves a tensor in the user's own dtype, whichever that is: float64 too."""


@lru_cache(maxsize=4096)
def parse_cast(text: str) -> Cast:
    """`Cast.parse`, remembered: a window's scores name the same few casts thousands of times."""
    return Cast.parse(text)


def keeps(cast: Cast) -> bool:
    """Whether a cast leaves a tensor as it is."""
    return cast.format.name == "fp32" and cast.granularity == "none"


def short_cast(cast: Cast) -> str:
    """The format's name alone where the rest is its default, else the whole cast."""
    return cast.format.name if parse_cast(cast.format.name) == cast else str(cast)
