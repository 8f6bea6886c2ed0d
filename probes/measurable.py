"""Which casts a window can tell the effect of, and of which it can measure the damage directly."""

from __future__ import annotations

import math

from probes.casts import Cast
from probes.relative_layout import OCTAVES


def why_not_sketched(cast: Cast) -> str | None:
    """Why no sketch can tell what a cast does; None where one can.

    Scales by row, column or block need the sketch relative to these tiles, which a window has if it was asked to.
    """
    if not cast.format.signed:
        return (
            f"{cast}: {cast.format} is a format for scales, without a sign and without zero, so no tensor of a product "
            "can be written in it. Name the format of the elements"
        )
    if not (cast.has_one_scale or cast.needs_no_scale) and _octaves(cast) >= OCTAVES:
        return (
            f"{cast}: {cast.format} spans {_octaves(cast)} octaves, and a sketch relative to the largest value of each "
            f"{cast.granularity} goes {OCTAVES} down. A format of that range needs no scale finer than a tensor's: "
            f"score {cast.format}/none or {cast.format}/tensor"
        )
    return None


def why_not_measurable(cast: Cast) -> str | None:
    """Why the scored steps of a window cannot measure what a cast does; None where they can.

    There one error a tensor is put into all of its products, and scales by row or block run along another axis in each.
    """
    if not cast.has_one_scale:
        return (
            f"{cast} has a scale for every {cast.granularity}, along another axis in each product that the tensor "
            "enters, and the measured candidates are cast once for all of them. Give `casts` those of granularity "
            "'none' and 'tensor'; this one is scored from sketches, if the window is opened with `finer`"
        )
    return why_not_sketched(cast)


def _octaves(cast: Cast) -> int:
    """From half the smallest non-zero value to the largest, rounded up."""
    target = cast.format
    return math.ceil(math.log2(target.largest / target.smallest_subnormal)) + 1
