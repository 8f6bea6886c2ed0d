"""What to watch in a training with a plan: named slots with thresholds, computed from the windows.

A short window cannot certify a long run. What breaks a cast later is told by its kind of scale:

    no scale, static     the largest value passes what the format holds under that scale: it is clipped
    delayed              the largest value passes the past ones by more than the margin: it is clipped
    current, integer     the largest value grows, and with it the step: the error grows with its square. The threshold
                         is where this slot alone would use up what its limit has left: the largest value itself, or of
                         a gradient, whose size as a whole does not matter, that over the RMS (`crest`)
    current, float       the tensor's range widens: more of it underflows. The threshold is twice what the window's
                         worst step had, and at least SHARE

The slots that take most of a limit come first, then those whose largest value comes closest to its threshold. A largest
value that grew within the window is carried on in a straight line of its logarithm, to say when it would be there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from advisor.assemble import WATCH_NOTE
from advisor.castnames import KEEP, short_cast
from advisor.cautions import cautions, growth_of, in_steps
from advisor.diagnosis import diagnose
from advisor.diagnosis.findings import Finding, by_cause, worst_of_each_cause
from advisor.metrics import measure
from advisor.plan import Assignment, Plan, Watch
from advisor.tensor_scales import scales
from probes.casts import Cast
from probes.records import GRADIENT, Slot
from probes.window import Window

MOST = 8  # entries a plan names. Ours
SHARE = 0.01  # of the non-zero elements: an underflow below it is not worth watching. Ours
LEAST = 1.25  # times its present size: a threshold is no nearer, or chance would pass it. Ours
FURTHEST = 64.0  # times its present size: a largest value that must grow so far is not watched. Ours


def watched(plan: Plan, windows: Sequence[Window], findings: Sequence[Sequence[Finding]] | None = None) -> Plan:
    """The plan with what to watch and what its windows cannot have seen, the windows being those it was made from.

    findings  what `diagnose` says of each window, where that is known already
    """
    if findings is None:
        findings = [diagnose(window) for window in windows]
    warned = cautions(plan, windows)
    kept = [note for note in plan.notes if note != WATCH_NOTE or not warned]  # what is said of this plan stands for it
    notes = (*kept, *causes(findings), *warned)
    return plan.model_copy(update={"watch": tuple(watch_list(plan, windows)), "notes": notes})


def causes(findings: Sequence[Sequence[Finding]]) -> list[str]:
    """Why usual recipes would fail on this training, one sentence a cause, from the findings of each of its windows.

    Each place is told as the latest window saw it; a cause that the latest does not show is told as such.
    """
    now: dict[tuple[str, str, str], Finding] = {}
    before: dict[tuple[str, str, str], Finding] = {}
    for window, found in enumerate(reversed(findings)):
        for one in found:
            place = one.cause, one.site, one.role
            if one.severe and place not in now:
                (before if window else now).setdefault(place, one)
    shown = {one.cause for one in now.values()}
    latest, earlier = (sorted(part.values(), key=by_cause) for part in (now, before))
    here = [*latest, *(one for one in earlier if one.cause in shown)]
    gone = [one for one in earlier if one.cause not in shown]
    return [
        *(f"a usual recipe would fail here: {sentence}" for sentence in worst_of_each_cause(here)),
        *(
            f"a usual recipe would fail here, as an earlier window shows and the latest does not: {sentence}"
            for sentence in worst_of_each_cause(gone)
        ),
    ]


def watch_list(plan: Plan, windows: Sequence[Window]) -> list[Watch]:
    """At most MOST entries, the most telling first; one slot has one."""
    found, held = [], [(window, set(window.slots)) for window in windows]
    for one in plan.assignments:
        if one.cast == KEEP:
            continue
        entry = _watch(plan, one, [window for window, slots in held if Slot(one.site, one.role) in slots])
        if entry is not None:
            found.append((-_part(plan, one), *entry))
    found.sort(key=lambda entry: (entry[0], entry[1], entry[2].site, entry[2].role))
    by_limit = [entry for *_, entry in found[: MOST // 2]]
    closest = sorted(found[MOST // 2 :], key=lambda entry: (entry[1], entry[0], entry[2].site, entry[2].role))
    return by_limit + [entry for *_, entry in closest[: MOST - len(by_limit)]]


def _watch(plan: Plan, one: Assignment, windows: Sequence[Window]) -> tuple[float, Watch] | None:
    """How near its threshold a slot is (log2 of the factor left), and its entry."""
    cast, slot = Cast.parse(one.cast), Slot(one.site, one.role)
    if not windows:
        return None
    largest = max(
        float((window.history(*slot).amax / window.history(*slot).gain).max(initial=0.0)) for window in windows
    )
    if not 0 < largest < math.inf:
        return None
    if cast.scale is None or cast.scale.rule in ("static", "delayed"):
        return _clips(one, cast, largest, windows[-1])
    if cast.format.is_integer:
        return _coarsens(plan, one, largest, windows)
    return _flushes(one, cast, windows)


def _clips(one: Assignment, cast: Cast, largest: float, window: Window) -> tuple[float, Watch] | None:
    scale = float(scales(np.array([largest]), cast)[0])
    holds, why = cast.format.largest * scale, "is clipped"
    if cast.scale is not None and cast.scale.rule == "delayed":
        holds, why = largest * 2.0**cast.scale.margin, "is clipped until its delayed scale follows"
    if holds > FURTHEST * largest:
        return None
    return _of_amax(one, holds, largest, f"{why} in {short_cast(cast)}", window)


def _coarsens(plan: Plan, one: Assignment, largest: float, windows: Sequence[Window]) -> tuple[float, Watch] | None:
    is_gradient = one.role == GRADIENT
    most = plan.max_lost_batch
    own, total, limit = one.damage, plan.predicted.damage, plan.tolerance
    if is_gradient:
        own, total, limit = one.noise_ratio, plan.predicted.noise_ratio, None if most is None else most / (1 - most)
    if not own or own <= 0 or total is None or limit is None:
        return None
    factor = math.sqrt(1 + max(limit - total, 0.0) / own)
    if not factor <= FURTHEST:
        return None
    times = max(factor, LEAST)
    name = "the limit on lost batch" if is_gradient else "the tolerance"
    what = f"coarsens its step until it uses up what {name} has left"
    if not is_gradient:
        return _of_amax(one, times * largest, largest, what, windows[-1])
    crest = max(_crest(window, Slot(one.site, one.role)) for window in windows)
    above = f"a largest value above {times * crest:.3g}× the RMS {what}"
    told = f"{one.site} {one.role}: {above} (the window's is {crest:.3g}×)."
    return math.log2(times), Watch(site=one.site, role=one.role, metric="crest", threshold=times * crest, sentence=told)


def _crest(window: Window, slot: Slot) -> float:
    """The largest value over the RMS, at the step where that is largest."""
    history = window.history(*slot)
    kept = history.sum_of_squares > 0
    rms = np.sqrt(history.sum_of_squares[kept] / history.elements[kept])
    return float(np.max(history.amax[kept] / rms, initial=0.0))


def _of_amax(one: Assignment, threshold: float, largest: float, what: str, window: Window) -> tuple[float, Watch]:
    growth = growth_of(window, Slot(one.site, one.role))
    times = threshold / largest
    told = f"{one.site} {one.role}: a largest value above {threshold:.3g} {what} (the window's is {largest:.3g})"
    if growth is not None and growth.certain and times > 1:
        told += f"; growing as in the window it is there after {in_steps(growth.steps_to(times))} steps"
    return math.log2(times), Watch(
        site=one.site, role=one.role, metric="amax", threshold=threshold, sentence=f"{told}."
    )


def _flushes(one: Assignment, cast: Cast, windows: Sequence[Window]) -> tuple[float, Watch]:
    slot, worst = Slot(one.site, one.role), 0.0
    for window in windows:
        found = measure(window.history(*slot), cast, window.dtype(slot))
        rates = found.underflow[found.nonzero > 0]
        worst = max(worst, float(rates.max(initial=0.0)))
    threshold = min(max(SHARE, 2 * worst), 1.0)
    told = (
        f"{one.site} {one.role}: underflow in {short_cast(cast)} above {_share(threshold)} means a range that the "
        f"window did not see (its worst step had {_share(worst)})."
    )
    return math.log2(threshold / max(worst, SHARE / 16)), Watch(
        site=one.site, role=one.role, metric="underflow", threshold=threshold, sentence=told
    )


def _part(plan: Plan, one: Assignment) -> float:
    """The larger share that a slot takes of the plan's sums."""
    pairs = ((one.damage, plan.predicted.damage), (one.noise_ratio, plan.predicted.noise_ratio))
    return max((own / total for own, total in pairs if own and total), default=0.0)


def _share(value: float) -> str:
    return f"{100 * value:.2g}%"
