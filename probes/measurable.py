"""Which casts a window can tell the effect of."""

from __future__ import annotations

from probes.casts import Cast


def why_not_measurable(cast: Cast) -> str | None:
    """Why neither a window's sketches nor its scored steps can tell what a cast does; None where they can.

    Scales by row or block would have to run along a product's inner dimension, which is another one for each of the
    three products that a tensor may enter; and a sketch knows the largest magnitude of a whole tensor alone.
    """
    if not cast.has_one_scale:
        return (
            f"{cast} has a scale for every {cast.granularity}, and a window knows the largest magnitude of a whole "
            "tensor alone, so it cannot tell what this cast would do. Granularity 'none' and 'tensor' can be measured "
            "and scored; what this cast does to a tensor at hand is seen by calling it"
        )
    if not cast.format.signed:
        return (
            f"{cast}: {cast.format} is a format for scales, without a sign and without zero, so no tensor of a product "
            "can be written in it. Name the format of the elements"
        )
    return None
