"""Metrics as columns: those of every slot and cast of a window at once, arrays [slots, casts].

The sketches of some hundred slots at a time are laid one after another and go through the compiled kernel once
(`column_kernels.py`), on as many threads as torch has. Casts with scales by row, column or block are measured slot by
slot (`tile_metrics.py`) and put into the same arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from advisor import column_kernels as kernels
from advisor import region_kernels as regions
from advisor.bins import SMALLEST, SMALLEST_OF_DTYPE
from advisor.estimates import row_medians
from advisor.flags import FLAGS, THRESHOLDS, uncertain_of
from advisor.grid import Array
from advisor.metrics import Metrics, has_tiles, measure
from advisor.moments import Moments
from advisor.outcome_kernels import Target
from advisor.tensor_scales import scales_of
from probes.casts import Cast
from probes.history import SlotHistory
from probes.records import Slot
from probes.sketch import BIN_EDGES
from probes.tiles import Axis, axes_of, tiling_for
from probes.window import Window

Mask = NDArray[np.bool_]

AT_ONCE = 512  # slots whose sketches are laid one after another: some 14 MB


@dataclass(frozen=True, eq=False)
class MetricColumns:
    """What `PooledMetrics` has, for P slots and K casts: float64 arrays [P, K], NaN where a cast was not measured.

    nonzero, elements, underflows, subnormals, overflows, signal_energy, error_energy, bias_energy, amax, amin
               as in `metrics.Measured`, pooled over the steps
    flags      int64 [P, K]: bit i stands for FLAGS[i]
    moments    of the error energy from step to step, which the confidence is made of
    along      (slot, cast) → what the cast does along each of the tensor's axes, for scales by row, column or block
    """

    nonzero: Array
    elements: Array
    underflows: Array
    subnormals: Array
    overflows: Array
    signal_energy: Array
    error_energy: Array
    bias_energy: Array
    amax: Array
    amin: Array
    flags: NDArray[np.int64]
    moments: Moments
    along: dict[tuple[int, int], list[tuple[Axis, Metrics]]]

    @classmethod
    def joined(cls, parts: Sequence[MetricColumns]) -> MetricColumns:
        """Those of several groups of slots, one after another; of casts that `_put` has not put there yet."""
        if len(parts) == 1:
            return parts[0]
        arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in (*POOLED, "flags")}
        return cls(**arrays, moments=Moments.joined([part.moments for part in parts]), along={})


def measure_columns(
    window: Window, slots: Sequence[Slot], casts: Sequence[Cast], wanted: Mask, in_loss_units: Mask
) -> MetricColumns:
    """Measure casts on slots, where `wanted` [P, K] says so.

    in_loss_units  bool [P]: whether the error energy counts an element (of damages), or over the signal's

    Raises CastNotScored.
    """
    histories = window.histories(slots)
    dtypes = [window.dtype(slot) for slot in slots]
    tiled = np.array([has_tiles(cast) for cast in casts], dtype=np.bool_)

    def measured(some: slice) -> MetricColumns:
        return _measure_whole(histories[some], dtypes[some], casts, wanted[some] & ~tiled, in_loss_units[some])

    groups = [slice(at, at + AT_ONCE) for at in range(0, max(len(slots), 1), AT_ONCE)]
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(groups))) as pool:  # the kernel lets go of the GIL
        found = MetricColumns.joined(list(pool.map(measured, groups)))
    for p, k in np.argwhere(wanted & tiled).tolist():
        along = _measure_along(window, slots[p], histories[p], casts[k], dtypes[p])
        found.along[p, k] = along
        _put(found, p, k, along[0][1], bool(in_loss_units[p]))
    return found


def _measure_along(
    window: Window, slot: Slot, history: SlotHistory, cast: Cast, dtype: str | None
) -> list[tuple[Axis, Metrics]]:
    """Along each axis of the slot's tensor in its products, the forward product's first."""
    site = window.site(slot.site)
    dimensions = len(site.shapes[slot.role])
    axes = axes_of(site.op, site.roles, slot.role, dimensions)
    return [(axis, measure(history, cast, dtype, tiling_for(cast, axis, axes, dimensions))) for axis in axes]


def _put(columns: MetricColumns, p: int, k: int, metrics: Metrics, in_loss_units: bool) -> None:
    pooled = metrics.pooled()
    for name in POOLED:
        getattr(columns, name)[p, k] = getattr(pooled, name)
    columns.flags[p, k] = sum(1 << FLAGS.index(flag) for flag in pooled.flags)
    columns.moments.put(p, k, metrics, in_loss_units)


POOLED = (
    "nonzero",
    "elements",
    "underflows",
    "subnormals",
    "overflows",
    "signal_energy",
    "error_energy",
    "bias_energy",
    "amax",
    "amin",
)
"""What `MetricColumns` has of `PooledMetrics`, each an array [slots, casts] of that name."""


_ARRAYS: dict[str, Any] = {
    "offsets": np.int64,
    "bins": np.uint16,
    "counts": np.int64,
    "zeros": np.int64,
    "nans": np.int64,
    "positive_infs": np.int64,
    "negative_infs": np.int64,
    "sum_of_squares": np.float64,
    "amax": np.float64,
    "amin": np.float64,
    "gain": np.float64,
    "significant_bits": np.int64,
    "distinct": np.float64,
}
"""What is taken of a `SlotHistory`, and as what the kernels take it."""
_ARRAYS_OF = attrgetter(*_ARRAYS)


@dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of all slots one after another: [T] arrays; `starts` int64 [P + 1], each one's slot and place in it."""

    starts: NDArray[np.int64]
    slot: NDArray[np.int64]
    place: NDArray[np.int64]
    offsets: NDArray[np.int64]
    bins: NDArray[np.uint16]
    counts: NDArray[np.int64]
    nonfinite: Array
    nonzero: Array
    elements: Array
    squares: Array
    amax: Array
    amin: Array
    gain: Array
    bits: NDArray[np.int64]
    distinct: Array

    @classmethod
    def of(cls, histories: Sequence[SlotHistory]) -> _Steps:
        held = list(zip(*map(_ARRAYS_OF, histories), strict=True)) or [()] * len(_ARRAYS)
        joined: dict[str, Any] = {
            name: np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)
            for (name, dtype), arrays in zip(_ARRAYS.items(), held, strict=True)
        }
        lengths = np.fromiter(map(len, held[0]), np.int64, len(held[0])) - 1
        starts = np.append(0, np.cumsum(lengths))
        # Each history's offsets begin anew, one more than it has steps.
        a_step = np.delete(np.diff(joined["offsets"]), (starts[1:-1] + np.arange(len(lengths))[1:]) - 1)
        offsets, counts = np.append(0, np.cumsum(a_step)), joined["counts"]
        nonzero = np.zeros(len(a_step), np.int64)
        kernels.count_steps(offsets, counts, nonzero)
        nonfinite = joined["nans"] + joined["positive_infs"] + joined["negative_infs"]
        slot = np.repeat(np.arange(len(lengths)), lengths)
        return cls(
            starts=starts,
            slot=slot,
            place=np.arange(starts[-1]) - starts[slot],
            offsets=offsets,
            bins=joined["bins"],
            counts=counts,
            nonfinite=nonfinite.astype(np.float64),
            nonzero=nonzero.astype(np.float64),
            elements=(nonzero + joined["zeros"] + nonfinite).astype(np.float64),
            squares=joined["sum_of_squares"],
            amax=joined["amax"],
            amin=joined["amin"],
            gain=joined["gain"],
            bits=joined["significant_bits"],
            distinct=joined["distinct"],
        )

    def over_slots(self, each: Array, by: Any = np.add, empty: float = 0.0) -> Array:
        """Sum (or another reduction) of a quantity of the steps over each slot's, [P]."""
        found = np.full(len(self.starts) - 1, empty)
        some = np.diff(self.starts) > 0
        if some.any():
            found[some] = by.reduceat(each, self.starts[:-1][some])
        return found


def _measure_whole(
    histories: Sequence[SlotHistory],
    dtypes: Sequence[str | None],
    casts: Sequence[Cast],
    wanted: Mask,
    in_loss_units: Mask,
) -> MetricColumns:
    """Casts with one scale or none."""
    steps = _Steps.of(histories)
    shape = len(histories), len(casts)
    sums, errors = np.zeros((*shape, regions.SUMS)), np.zeros((len(steps.amax), len(casts)))
    kernels.measure_slots(
        steps.starts,
        steps.offsets,
        steps.bins,
        steps.counts,
        steps.amax,
        steps.amin,
        steps.bits,
        np.array([SMALLEST_OF_DTYPE.get(dtype or "", SMALLEST) for dtype in dtypes], dtype=np.float64),
        steps.gain,
        _scales(steps, casts, wanted),
        np.array([Target.of(cast) for cast in casts], dtype=np.float64).reshape(-1, len(Target._fields)),
        wanted,
        BIN_EDGES,
        sums,
        errors,
    )

    def everywhere(of_slots: Array) -> Array:
        return np.where(wanted, of_slots[:, None], np.nan)

    def summed(which: int) -> Array:
        return np.where(wanted, sums[..., which], np.nan)

    nonzero = everywhere(steps.over_slots(steps.nonzero))
    few = _few_values(steps)
    smallest = np.where(steps.amin > 0, steps.amin / steps.gain, np.inf)
    amin = steps.over_slots(smallest, np.minimum, np.inf)
    finite = in_loss_units[steps.slot]
    whole = np.where(finite, steps.elements - steps.nonfinite, steps.squares / steps.gain**2)
    return MetricColumns(
        nonzero=nonzero,
        elements=everywhere(steps.over_slots(steps.elements)),
        underflows=summed(regions.UNDER),
        subnormals=summed(regions.SUB),
        overflows=summed(regions.OVER),
        signal_energy=everywhere(steps.over_slots(steps.squares / steps.gain**2)),
        error_energy=summed(regions.GAINED_ERROR),
        bias_energy=summed(regions.GAINED_BIAS),
        amax=everywhere(steps.over_slots(steps.amax / steps.gain, np.maximum)),
        amin=everywhere(np.where(np.isinf(amin), 0.0, amin)),
        flags=_flags(sums, nonzero, few, casts),
        moments=Moments.of(errors, whole, steps.nonzero, steps.starts, wanted),
        along={},
    )


def _scales(steps: _Steps, casts: Sequence[Cast], wanted: Mask) -> Array:
    """The scale of every step under every cast that any slot wants, for the recorded values: [K, T]."""
    asked = np.flatnonzero(wanted.any(axis=0)).tolist()
    found = np.ones((len(casts), len(steps.amax)))
    found[asked] = scales_of(steps.amax / steps.gain, [casts[k] for k in asked], steps.place) * steps.gain
    return found


def _few_values(steps: _Steps) -> Mask:
    """`flags.rounds_few_values` of each slot, [P]."""
    table = np.full((len(steps.starts) - 1, int(steps.place.max(initial=-1)) + 1), np.nan)
    uncertain = uncertain_of(steps.amin, steps.amax, steps.bits)
    table[steps.slot, steps.place] = np.where(uncertain, steps.distinct, np.nan)
    return np.asarray(row_medians(table) < THRESHOLDS.distinct)


def _flags(sums: Array, nonzero: Array, few: Mask, casts: Sequence[Cast]) -> NDArray[np.int64]:
    """`flags.flags_of`, for all slots and casts."""
    error = sums[..., regions.TOTAL_ERROR]
    spread = np.sqrt(sums[..., regions.TOTAL_VARIANCE])
    few_values = (
        (few[:, None] & (error != 0))
        | (sums[..., regions.RATE_SHIFT] > THRESHOLDS.rate_shift * nonzero)
        | (sums[..., regions.TOTAL_SHIFT] > THRESHOLDS.error_spread * error)
    )
    under, sub, over = (sums[..., which] for which in (regions.SPREAD_UNDER, regions.SPREAD_SUB, regions.SPREAD_OVER))
    rates = np.maximum(np.maximum(under, sub), over)
    few_elements = (spread > THRESHOLDS.error_spread * error) | (np.sqrt(rates) > THRESHOLDS.rate_spread * nonzero)
    asymmetric = np.array([not cast.format.symmetric for cast in casts], dtype=np.bool_)
    no_signs = asymmetric & (sums[..., regions.OVER] > 0)
    bits = few_values * 1 + few_elements * 2 + no_signs * 4
    return np.where(nonzero > 0, bits, 0).astype(np.int64)
