"""Numbers as a reader wants them in a table: short, aligned, never more digits than are known."""

from __future__ import annotations

import math


def share(value: float | None) -> str:
    """0 to 1 as a percentage in at most five characters: 0, 0.03%, 1.2%, 47%; a trace is <.01%."""
    if value is None or math.isnan(value):
        return "-"
    percent = 100 * value
    if percent == 0:
        return "0"
    if percent < 0.01:
        return "<.01%"
    if percent < 1:
        return f"{percent:.2f}%"
    return f"{percent:.1f}%" if percent < 9.95 else f"{percent:.0f}%"


def decibels(value: float | None) -> str:
    """A whole number of dB; `exact` where nothing is lost, `-` where there is nothing to measure."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "exact" if value > 0 else "lost"
    return f"{value:.0f}"


def loss(value: float | None, signed: bool = False) -> str:
    """A loss with four decimals (a huge one with three digits); signed for differences."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    digits = ".4f" if abs(value) < 1e4 else ".3g"
    return f"{value:{'+' if signed else ''}{digits}}"


def count(value: float) -> str:
    """1,234 as it is; from ten thousand on as 12.3k, 4.56M, 7.89G."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            scaled = value / (1e3 if letter == "k" else size)
            return f"{scaled:.3g}{letter}"
    return f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """m:ss, or h:mm:ss from an hour on; `-:--` where unknown."""
    if value is None or not math.isfinite(value):
        return "-:--"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short_cast(text: str) -> str:
    """A canonical cast without the parts that are defaults: e4m3fn, bf16, e5m2/none, e4m3fn/row. It parses back.

    A format that only a newer service knows is left with all its parts.
    """
    from probes.errors import UnknownFormat
    from probes.format_names import format_named

    name, _, rest = text.partition("/")
    try:
        narrow = format_named(name).bits <= 8
    except UnknownFormat:
        return text
    if rest == ("tensor/current/nearest" if narrow else "none/nearest"):
        return name
    text = text.removesuffix("/nearest")
    # Blocks of 16 and 32 have other scales where none is named (probes.scaling.RULES, which imports too much for here).
    return text if rest.startswith(("block16/", "block32/")) else text.removesuffix("/current")
