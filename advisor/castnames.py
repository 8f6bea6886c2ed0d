"""Casts as plans name them: the one that changes nothing, and short names for tables and sentences."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from advisor.errors import InvalidPlan
from probes.casts import Cast
from probes.errors import InvalidCast

KEEP = "fp32/none/nearest"
"""The cast that leaves a tensor in the user's own dtype, whichever that is: float64 too."""


@lru_cache(maxsize=4096)
def parse_cast(text: str) -> Cast:
    """`Cast.parse`, remembered: a window's scores name the same few casts thousands of times."""
    return Cast.parse(text)


def keeps(cast: Cast) -> bool:
    """Whether a cast leaves a tensor as it is."""
    return cast.format.name == "fp32" and cast.granularity == "none"


def require_plannable(casts: Iterable[Cast]) -> None:
    """Raises InvalidPlan for the first cast that no plan can be made with: one with scales by column.

    Scales by row and block run along the inner dimension of each product by itself; those by column along none.
    """
    for cast in casts:
        if cast.granularity == "column":
            raise InvalidPlan(
                f"{cast} has a scale for every column, and products want scales along their inner dimension: along a "
                "row. Granularity 'none', 'tensor', 'row' and blocks can be planned with"
            )


def short_cast(cast: Cast) -> str:
    """The format's name alone where the rest is its default, else the whole cast."""
    return cast.format.name if parse_cast(cast.format.name) == cast else str(cast)


@lru_cache(maxsize=4096)
def briefest_cast(cast: Cast) -> str:
    """The fewest leading parts of a cast that read back as it: e4m3fn, e4m3fn/row, int8/tensor/current/stochastic."""
    overflow = "" if cast.saturate else ":inf"
    parts = str(cast).removesuffix(overflow).split("/")
    texts = ["/".join(parts[:count]) + overflow for count in range(1, len(parts))]
    return next((text for text in texts if _reads_as(text, cast)), str(cast))


def _reads_as(text: str, cast: Cast) -> bool:
    try:
        return parse_cast(text) == cast
    except InvalidCast:
        return False
