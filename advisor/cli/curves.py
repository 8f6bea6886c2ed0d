"""Loss curves in the terminal: panels side by side over one scale, drawn in braille dots (2 × 4 a character)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

ROWS = 10  # characters of height
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # Unicode braille: bit of each dot, [row][column]
BLANK = 0x2800
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Curve:
    """A panel. points: (step, loss); a loss that is not finite is left out of the line and told in words."""

    title: str
    points: Sequence[tuple[int, float]]
    style: str = ""

    @property
    def finite(self) -> list[tuple[int, float]]:
        return [(step, loss) for step, loss in self.points if math.isfinite(loss)]

    @property
    def first_not_finite(self) -> int | None:
        return next((step for step, loss in self.points if not math.isfinite(loss)), None)


def panels(curves: Sequence[Curve], width: int) -> Text:
    """The curves as text of at most `width` columns, all with the same axes.

    Empty where no loss is finite.
    """
    from rich.text import Text

    values = [loss for curve in curves for _, loss in curve.finite]
    if not values:
        return Text("no loss is finite: there is no curve to draw")
    start = min(curve.finite[0][1] for curve in curves if curve.finite)
    low, high = _range(values, start)
    first = min(step for curve in curves for step, _ in curve.points)
    last = max(step for curve in curves for step, _ in curve.points)
    labels = [f"{high - (high - low) * row / (ROWS - 1):7.2f}" for row in range(ROWS)]
    each = (width - len(labels[0]) - 2) // len(curves) - 2
    drawn = [_dots(curve.finite, each, (first, last), (low, high)) for curve in curves]
    text = Text(" " * 9, no_wrap=True)
    for curve in curves:
        text.append(f"{curve.title[:each]:<{each + 2}}", style=f"bold {curve.style}")
    for row in range(ROWS):
        text.append(f"\n{labels[row]} ")
        for curve, lines in zip(curves, drawn, strict=True):
            text.append("│")
            text.append(lines[row], style=curve.style)
            text.append(" ")
    text.append("\n" + " " * 8 + "".join("└" + "─" * each + " " for _ in curves))
    text.append("\n" + " " * 8 + "".join(_axis(curve, first, last, each) for curve in curves))
    return text


def bars(values: Sequence[float], low: float, high: float) -> str:
    """One block character a value, from `low` (empty) to `high` (full); a value that is not finite is `×`."""
    span = high - low
    drawn = []
    for value in values:
        if not math.isfinite(value):
            drawn.append("×")
            continue
        part = min(max((value - low) / span, 0.0), 1.0) if span > 0 else 0.0
        drawn.append(BARS[max(1, round(part * (len(BARS) - 1)))] if value > low else BARS[0])
    return "".join(drawn)


def bar(value: float, low: float, high: float, width: int) -> str:
    """A bar lying down, in eighths of a character; `×` where the value is not finite."""
    if not math.isfinite(value):
        return "×"
    part = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    eighths = round(part * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _range(values: Sequence[float], start: float) -> tuple[float, float]:
    """The scale: all values, but for those far above where the trainings began: they would flatten the rest."""
    low, high = min(values), max(values)
    if start > 0:
        high = min(high, 2 * start)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _dots(
    points: Sequence[tuple[int, float]], width: int, steps: tuple[int, int], losses: tuple[float, float]
) -> list[str]:
    """The rows of a panel: a column of dots shows the mean of its steps; columns are joined by strokes."""
    columns: dict[int, list[float]] = {}
    span = max(steps[1] - steps[0], 1)
    for step, loss in points:
        columns.setdefault(round((step - steps[0]) / span * (2 * width - 1)), []).append(loss)
    height = 4 * ROWS
    cells = [[BLANK] * width for _ in range(ROWS)]
    previous: tuple[int, int] | None = None
    for column, inside in sorted(columns.items()):
        part = (sum(inside) / len(inside) - losses[0]) / (losses[1] - losses[0])
        dot = min(max(round((1 - part) * (height - 1)), 0), height - 1)
        for x, y in _stroke(previous or (column, dot), (column, dot)):
            cells[y // 4][x // 2] |= DOTS[y % 4][x % 2]
        previous = (column, dot)
    return ["".join(map(chr, row)) for row in cells]


def _stroke(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots of a straight line."""
    (x0, y0), (x1, y1) = start, end
    length = max(abs(x1 - x0), abs(y1 - y0), 1)
    return [(x0 + round((x1 - x0) * k / length), y0 + round((y1 - y0) * k / length)) for k in range(length + 1)]


def _axis(curve: Curve, first: int, last: int, width: int) -> str:
    """What stands below a panel: the steps, or where the loss stopped being a number."""
    if curve.first_not_finite is not None:
        return f" {f'NaN or inf from step {curve.first_not_finite}'[:width]:<{width + 1}}"
    return f" {first}{last:>{width - len(str(first))}} "
