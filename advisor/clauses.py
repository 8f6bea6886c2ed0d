"""Reasons as a reader meets them: what those of several roles say of their whole site is said once."""

from __future__ import annotations

import re
from collections.abc import Sequence


def told_once(reasons: Sequence[str]) -> tuple[list[str], list[str]]:
    """The clauses about "this site" that several of a site's reasons share, and the reasons without them.

    A reason is clauses between semicolons, and starts with the name of the cast: that one it keeps.
    """
    clauses = [reason.removesuffix(".").split("; ") for reason in reasons]
    rest = [clause for own in clauses for clause in own[1:] if "this site" in clause]
    shared = [clause for clause in dict.fromkeys(rest) if rest.count(clause) > 1]
    own = ["; ".join(clause for clause in parts if clause not in shared) + "." for parts in clauses]
    return [f"{clause}." for clause in shared], own


def merged(sentences: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Sentences that differ in their numbers alone as one, with the range of each number, and the places of its parts.

    "31.2 dB" and "31.6 dB" become "31.2–31.6 dB"; of "1 to 3" and "2 to 5" the outermost ends stay, "1 to 5". Digits
    inside words (e4m3fn, bf16) are no numbers.
    """
    found: dict[str, list[int]] = {}
    for place, sentence in enumerate(sentences):
        found.setdefault(_NUMBER.sub("\0", sentence), []).append(place)
    return [
        (_filled(shape, [_NUMBER.findall(sentences[place]) for place in places]), places)
        for shape, places in found.items()
    ]


_NUMBER = re.compile(r"(?<![\w.])[<+-]?\d+(?:\.\d+)?(?:e[+-]\d+)?(?:%|×)?(?!\w)")


def _filled(shape: str, rows: Sequence[Sequence[str]]) -> str:
    """The shape with each number, or its range, in its place."""
    parts = shape.split("\0")
    told = [parts[0]]
    for place, column in enumerate(zip(*rows, strict=True)):
        low, high = min(column, key=_value), max(column, key=_value)
        if low == high or parts[place + 1] == " to ":
            number = low
        elif parts[place] == " to ":
            number = high
        else:
            between = " to " if "e" in low + high else "–"
            number = f"{low.rstrip('%×')}{between}{high}"
        told += [number, parts[place + 1]]
    return "".join(told)


def _value(number: str) -> float:
    return float(number.rstrip("%×").lstrip("<"))
