"""Outliers: values so far above the bulk of a tensor that one scale for all of them leaves the bulk too few steps.

The bulk is what remains without the largest tenth of the non-zero elements. A cast bites where it writes the bulk with
less than 20 dB, the scale being made for the largest value. Whose values those are, is told from tiles: where a few
channels' largest values are far above the median channel's, and such a channel is large throughout, they are
channel outliers; otherwise the tail is heavy, and a few rows (tokens, samples) or single elements hold it.

A bin of the sketch stands here for four magnitudes spread evenly in it, which the cast itself writes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from advisor.castnames import parse_cast, short_cast
from advisor.diagnosis.costs import cost_of
from advisor.diagnosis.findings import THRESHOLDS, Finding, Remedy, either, named, percent, times
from advisor.diagnosis.recipes import Recipes
from advisor.diagnosis.tiles import Tiles, ratios_at, tiles_at
from probes.casts import Cast
from probes.history import SlotHistory
from probes.records import GRADIENT, Slot
from probes.scaling import RULES
from probes.sketch import BIN_EDGES
from probes.tiles import Axis, Tiling, axes_of
from probes.window import Window

Array = NDArray[np.float64]

KEEPING = ("e4m3fn", "int8/row", "e4m3fn/row", "int8/column", "e5m2", "bf16")
"""Casts that may mend, in the order in which they are told: the narrowest, one scale a tensor first."""
AT_ONCE = 512  # slots whose bulks are written together: some tens of MB
_POINTS = (np.arange(4) + 0.5) / 4


@dataclass(frozen=True)
class Bulk:
    """What a cast does to the bulk of a tensor at one step: SQNR, dB, and the share that it flushes to zero."""

    sqnr_db: float
    flushed: float


@dataclass(frozen=True)
class _Place:
    """Whose values the outliers are: "channels", "rows" or "elements"; the tiles that say so; how many a tensor has."""

    kind: str
    word: str
    tiles: Tiles | None
    of: int


def outliers(window: Window, recipes: Recipes) -> Iterator[Finding]:
    """Channel outliers and heavy tails of the products' tensors: for each, the cast that writes the bulk worst."""
    for slot, step in _perhaps_bitten(window, recipes):
        history = window.history(*slot)
        casts = recipes.gradient if slot.role == GRADIENT else recipes.forward
        bulks = [(bulk_of(history, step, cast), cast) for cast in casts]
        bulk, cast = min(bulks, key=lambda pair: pair[0].sqnr_db, default=(Bulk(math.inf, 0.0), None))
        if cast is not None and bulk.sqnr_db <= THRESHOLDS.bulk_sqnr_db:
            yield _finding(window, slot, step, cast, bulk, recipes)


def _perhaps_bitten(window: Window, recipes: Recipes) -> Iterator[tuple[Slot, int]]:
    """Slots, and their steps, whose bulk one of the casts may write badly."""
    known = [(slot, step) for slot in window.product_slots if (step := scored_step(window.history(*slot))) is not None]
    bitten: set[Slot] = set()
    for is_gradient, casts in ((True, recipes.gradient), (False, recipes.forward)):
        some = [(slot, step) for slot, step in known if (slot.role == GRADIENT) == is_gradient]
        for cast, start in itertools.product(casts, range(0, len(some), AT_ONCE)):
            part = some[start : start + AT_ONCE]
            sqnr_db = bulk_sqnr_db([window.history(*slot) for slot, _ in part], [step for _, step in part], cast)
            bad = ~(sqnr_db > THRESHOLDS.bulk_sqnr_db + 1e-6)
            bitten.update(part[place][0] for place in np.flatnonzero(bad))
    return (pair for pair in known if pair[0] in bitten)


def bulk_sqnr_db(histories: Sequence[SlotHistory], steps: Sequence[int], cast: Cast) -> Array:
    """`bulk_of(history, step, cast).sqnr_db` of many at once, [slots], up to the order of sums; NaN where the cast has
    a scale that has no like by row, or draws random numbers."""
    if cast.is_random or not (cast.scale is None or cast.scale.rule in RULES["row"]):
        return np.full(len(histories), math.nan)
    places = [int(np.searchsorted(history.steps, step)) for history, step in zip(histories, steps, strict=True)]
    held = [slice(*history.offsets[at : at + 2]) for history, at in zip(histories, places, strict=True)]
    lengths = np.array([part.stop - part.start for part in held])
    rows = np.repeat(np.arange(len(held)), lengths)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    bins = np.concatenate([history.bins[part] for history, part in zip(histories, held, strict=True)]).astype(np.int64)
    counts = np.concatenate([history.counts[part] for history, part in zip(histories, held, strict=True)])
    amax = np.array([history.amax[at] for history, at in zip(histories, places, strict=True)], dtype=np.float64)
    low, high = BIN_EDGES[bins], BIN_EDGES[bins + 1]
    magnitudes, weights = np.zeros((2, len(held), int(lengths.max(initial=0)), len(_POINTS)))
    magnitudes[rows, columns] = np.minimum(low[:, None] + (high - low)[:, None] * _POINTS, amax[rows, None])
    weights[rows, columns] = counts[:, None] / len(_POINTS)
    magnitudes, weights = magnitudes.reshape(len(held), -1), weights.reshape(len(held), -1)
    running = np.cumsum(weights, axis=1)
    last = (running < THRESHOLDS.bulk * running[:, -1:]).sum(axis=1)
    weights[np.arange(weights.shape[1]) > last[:, None]] = 0.0
    values = torch.from_numpy(np.append(np.where(weights > 0, magnitudes, 0.0), amax[:, None], axis=1)).float()
    # A scale for each row here is one for each slot's tensor.
    by_row = cast if cast.scale is None else replace(cast, granularity="row")
    given, written = values[:, :-1].double().numpy(), by_row(values)[:, :-1].double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (weights * given**2).sum(axis=1) / (weights * (written - given) ** 2).sum(axis=1)
        return np.asarray(10 * np.log10(ratio))


def bulk_of(history: SlotHistory, step: int, cast: Cast) -> Bulk:
    """What a cast with one scale a tensor does to the bulk of a slot at one of its steps."""
    (at,) = np.flatnonzero(history.steps == step)
    held = slice(history.offsets[at], history.offsets[at + 1])
    bins, counts = history.bins[held].astype(np.int64), history.counts[held].astype(np.float64)
    low, high = BIN_EDGES[bins], BIN_EDGES[bins + 1]
    amax = float(history.amax[at])
    magnitudes = np.minimum(low[:, None] + (high - low)[:, None] * _POINTS, amax)
    weights = np.repeat(counts / 4, 4)
    return _bulk(magnitudes.ravel(), weights, weights, amax, cast)


def by_tile(window: Window, slot: Slot, step: int, cast: Cast, axis: Axis) -> Bulk | None:
    """The same with a scale for each row along an axis; None where the window has no such sketch."""
    relative = window.history(*slot).finer.get(Tiling("row", "current", axis).key)
    found = None if relative is None else ratios_at(relative, step)
    return None if found is None else _bulk(*found, 1.0, cast)


def _bulk(magnitudes: Array, counts: Array, squares: Array, amax: float, cast: Cast) -> Bulk:
    """`squares`: what a squared magnitude, and a squared error, of each entry counts for."""
    order = np.argsort(magnitudes, kind="stable")
    running = np.cumsum(counts[order])
    # The largest tenth is cut off; where one magnitude is more than that, it stays.
    below = order[: int(np.searchsorted(running, THRESHOLDS.bulk * running[-1])) + 1]
    values = torch.from_numpy(np.append(magnitudes[below], amax)).float()
    written = cast(values)[:-1].double().numpy()
    given, weight, scale = values[:-1].double().numpy(), counts[below], squares[below]
    signal, error = float((scale * given**2).sum()), float((scale * (written - given) ** 2).sum())
    sqnr = math.inf if error == 0 else 10 * math.log10(signal / error) if signal > 0 else math.nan
    return Bulk(sqnr, float(weight[written == 0].sum() / weight.sum()))


def scored_step(history: SlotHistory) -> int | None:
    """The last step with sketches by row, else the last with anything."""
    tiled = [int(relative.steps[-1]) for relative in history.finer.values() if len(relative.steps)]
    held = history.steps[(history.nonzero > 0)]
    known = [step for step in tiled if step in held]
    return max(known) if known else int(held[-1]) if len(held) else None


def _finding(window: Window, slot: Slot, step: int, cast: Cast, bulk: Bulk, recipes: Recipes) -> Finding:
    place = _place(window, slot, step, cast, bulk)
    cost, harmless = cost_of(window, slot, cast)
    is_channel = place.kind == "channels"
    keeping = casts_that_keep(window, slot, step, cast)
    predicted = f" (predicted {cost['damage']:+.1e} loss)" if "damage" in cost else ""
    numbers = {"bulk_sqnr_db": bulk.sqnr_db, "flushed": bulk.flushed, **cost}
    name = short_cast(cast)
    scale = "one scale a tensor" if cast.scale is not None else "no scale"
    if place.tiles is not None:
        count = max(1, round(place.tiles.outlying * place.of / max(place.tiles.count, 1)))
        numbers |= {place.word: float(place.of), "outlying": float(count), "ratio": place.tiles.ratio}
        held = f"{count} of {place.of} {place.word} {'holds' if count == 1 else 'hold'} values "
        held += f"{times(place.tiles.ratio)} the others'"
    else:
        ratio = _over_median(window.history(*slot), step)
        numbers["ratio"] = ratio
        held = f"single elements reach {times(ratio)} the median magnitude"
        if place.kind == "unknown":
            held += " (whether they are a few channels' was not recorded: open the window with finer=['row'])"
        else:
            held += ", in no few channels or rows"
    harm = (
        f"flushes {percent(bulk.flushed)} of the rest to zero"
        if bulk.flushed >= THRESHOLDS.flushed
        else f"writes the rest with {bulk.sqnr_db:.0f} dB"
    )
    shown = tuple(map(named, keeping))
    mends = f"{either(shown)} keep{'s' * (len(shown[:3]) == 1)} it" if shown else "leave it in its own format"
    return Finding(
        cause="channel_outliers" if is_channel else "heavy_tails",
        site=slot.site,
        role=slot.role,
        cast=str(cast),
        # Channels that are large stay so, whatever they cost now; a tail may be all that matters of a tensor.
        severe=recipes.asked or is_channel or not harmless,
        numbers=numbers,
        sentence=f"{slot.site} {slot.role}: {held}, so {name} with {scale} {harm}{predicted}",
        remedy=Remedy("cast", mends, keeping),
        size=THRESHOLDS.bulk_sqnr_db - bulk.sqnr_db,
    )


def _place(window: Window, slot: Slot, step: int, cast: Cast, whole: Bulk) -> _Place:
    """The cut of which a few tiles are large throughout, and a scale for each of which mends; of several, the best."""
    history, known, found = window.history(*slot), False, []
    for axis, kind, word, of in _cuts(window, slot):
        relative = history.finer.get(Tiling("row", "current", axis).key)
        tiles = None if relative is None else tiles_at(relative, step, THRESHOLDS.channel_ratio)
        if tiles is None:
            continue
        known = True
        few = 0 < tiles.outlying <= THRESHOLDS.channel_share * tiles.count
        if few and tiles.effective >= THRESHOLDS.effective:
            bulk = by_tile(window, slot, step, cast, axis)
            if bulk is not None and bulk.sqnr_db >= min(THRESHOLDS.kept_sqnr_db, whole.sqnr_db + THRESHOLDS.gain_db):
                found.append((bulk.sqnr_db, _Place(kind, word, tiles, of)))
    if found:
        return max(found, key=lambda one: one[0])[1]
    return _Place("elements" if known else "unknown", "", None, 0)


def _cuts(window: Window, slot: Slot) -> list[tuple[Axis, str, str, int]]:
    """Ways of cutting a slot's tensor into tiles: along which axis, what they are called, how many a tensor has."""
    site = window.site(slot.site)
    shape = site.shapes[slot.role]
    axes = axes_of(site.op, site.roles, slot.role, len(shape))
    total = math.prod(shape)
    found = []
    for axis in axes:
        size = shape[axis.dimension] if len(shape) >= -axis.dimension else 1
        of = size if axis.across else total // max(size, 1)
        if "weight" in slot.role:
            # Of a weight [out, in] a row along the last dimension is an output's; of any shape both count as channels.
            found.append((axis, "channels", _weight_word(site.op, axis), of))
        else:
            is_row = axis == axes[0] if site.op.startswith("conv") else axis == Axis(-1)
            found.append((axis, "rows" if is_row else "channels", "rows" if is_row else "channels", of))
    return sorted(found, key=lambda cut: cut[1] != "channels")


def _weight_word(op: str, axis: Axis) -> str:
    if op.startswith("conv"):
        return "output channels" if axis.across and axis.dimension == -4 else "channels"
    return "rows" if axis == Axis(-1) else "columns"


def casts_that_keep(window: Window, slot: Slot, step: int, failing: Cast) -> tuple[str, ...]:
    """Casts that write the bulk well, canonical."""
    site, history = window.site(slot.site), window.history(*slot)
    axes = axes_of(site.op, site.roles, slot.role, len(site.shapes[slot.role]))
    found = []
    for name in KEEPING:
        cast = parse_cast(name)
        if cast == failing:
            continue
        if cast.has_one_scale:
            bulk: Bulk | None = bulk_of(history, step, cast)
        else:
            axis = axes[0] if cast.granularity == "row" else axes[0].other
            bulk = by_tile(window, slot, step, parse_cast(cast.format.name), axis)
        if bulk is not None and bulk.sqnr_db >= THRESHOLDS.kept_sqnr_db:
            found.append(str(cast))
    return tuple(found)


def _over_median(history: SlotHistory, step: int) -> float:
    (at,) = np.flatnonzero(history.steps == step)
    held = slice(history.offsets[at], history.offsets[at + 1])
    running = np.cumsum(history.counts[held])
    middle = int(history.bins[held][np.searchsorted(running, running[-1] / 2)])
    return float(history.amax[at] / ((BIN_EDGES[middle] + BIN_EDGES[middle + 1]) / 2))
