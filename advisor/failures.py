"""What makes a cast harmful, in the tensor's own numbers: clipping, outliers, flushing to zero, or a coarse grid.

In this order, because each explains what comes after it: a scale that makes room for an outlier is what pushes the
rest below the smallest step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from advisor.castnames import parse_cast
from probes.casts import Cast

Row = Mapping[str, Any]

OUTLIER_RATIO = 20.0
"""Largest value over RMS from which on it is told as an outlier. Ours: among 10^9 Gaussian values it is about 6."""
CLIPPED = 0.001  # ours: share of overflow from which on it is the cause
FLUSHED = 0.01  # ours: the same of underflow


def cause(row: Row) -> str:
    """A clause on what makes this score's cast harmful; the empty string where its numbers do not tell."""
    cast = parse_cast(row["cast"])
    if (row.get("overflow") or 0.0) >= CLIPPED:
        return _clipped(cast, row)
    flushed = (row.get("underflow") or 0.0) >= FLUSHED
    crest = crest_of(row)
    if crest is not None and crest > OUTLIER_RATIO and _is_scaled(cast) and (flushed or cast.format.is_integer):
        return f"outliers: {outlier_clause(row)}{_left_for_the_rest(cast, crest)}"
    if flushed:
        return _flushed(cast, row)
    sqnr = row.get("sqnr_db")
    if sqnr is None or not math.isfinite(sqnr) or cast.format.is_integer:
        return ""
    return f"coarse: {cast.format.name} has {_bits(cast.format.mantissa_bits)}"


def crest_of(row: Row) -> float | None:
    """Largest value over RMS; None where it is unknown or the tensor is zero."""
    rms, amax = row.get("rms"), row.get("amax")
    if rms is None or amax is None or not (math.isfinite(amax) and math.isfinite(rms)) or rms <= 0:
        return None
    return float(amax / rms)


def outlier_clause(row: Row) -> str:
    """The largest value beside the RMS, in words."""
    crest = crest_of(row)
    assert crest is not None
    return f"the largest value is {crest:.0f}× the RMS"


def _left_for_the_rest(cast: Cast, crest: float) -> str:
    """Under one scale for a uniform grid, the RMS in steps of it."""
    if not cast.format.is_integer:
        return ""
    steps = cast.format.largest
    return f", which leaves the RMS {steps / crest:.2g} of {cast.format.name}'s {steps:g} steps"


def _clipped(cast: Cast, row: Row) -> str:
    if cast.scale is None:
        return (
            f"clipping: the largest value, {row['amax']:.2g}, is beyond {cast.format.name}'s {cast.format.largest:.3g}"
        )
    return "clipping: its scale does not follow the largest value"


def _flushed(cast: Cast, row: Row) -> str:
    rms = row.get("rms")
    smallest = cast.format.smallest_subnormal
    if cast.scale is None and rms is not None and math.isfinite(rms):
        return f"flushing to zero: without a scale the smallest step is {smallest:.1e}, and the RMS is {rms:.1e}"
    return f"flushing to zero: its values span more than {cast.format.name} holds beside the largest"


def _is_scaled(cast: Cast) -> bool:
    return cast.scale is not None and cast.granularity == "tensor"


def _bits(mantissa_bits: int) -> str:
    return f"{mantissa_bits} mantissa bit" + ("" if mantissa_bits == 1 else "s")
