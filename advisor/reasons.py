"""One sentence for every choice, made of its numbers: what was chosen, which rival lost, and why.

    e4m3fn: 31.5 dB, 0.02% underflow, predicted +3.0e-05 loss (1.0e-05 to 1.1e-04, 0.3% of the tolerance);
    e5m2 would cost 4.1× the loss (coarse: e5m2 has 2 mantissa bits); int8 fails: 12.1 dB, +1.9e-02 loss is 190% of the
    tolerance (outliers: the largest value is 212× the RMS, which leaves the RMS 0.6 of int8's 127 steps); below a
    tolerance of 4.1e-05 this site would go back to bf16.

A sentence uses the slot's own scores, the limits and the site's other casts, and nothing that another site's
numbers could move. `failures.py` finds a rival's cause, `settling.py` says whether the window was long enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from advisor.candidates import Array, Candidate, Row, Slot, SlotScores
from advisor.castnames import KEEP, parse_cast, short_cast
from advisor.cost import Operand, operand, own_operand, role_bytes, shares_of_operands
from advisor.failures import OUTLIER_RATIO, cause, crest_of, outlier_clause
from advisor.hardware import Hardware
from advisor.intervals import interval_of, intervals_of, noise_interval
from advisor.menu import Limits, Menu, errs_alike, lost_share, may_err_alike
from advisor.settling import settling_within
from probes.casts import Cast
from probes.records import GRADIENT, Site

Ends = tuple[float, float] | None  # of an interval; None where it is unknown

MOST_STEPS = 1_000_000  # that are counted
NEXT_TO_NOTHING = 0.001  # of the tolerance: an interval that ends below it is not written out. Ours


@dataclass(frozen=True, eq=False)
class _SiteChoice:
    """The casts of a site, and what the sentences of its roles share."""

    menu: Menu
    picked: Mapping[str, Candidate]
    limits: Limits

    @property
    def site(self) -> Site:
        return self.menu.site

    @cached_property
    def operands(self) -> dict[str, Operand]:
        return {role: operand(self.site, role, option.cast) for role, option in self.picked.items()}

    @cached_property
    def shares(self) -> tuple[float, float]:
        """Of the site's FLOPs, in at most 8 and at most 16 bits."""
        return self.shares_of(self.operands)

    def shares_of(self, operands: Mapping[str, Operand]) -> tuple[float, float]:
        """The same with other operands."""
        narrow = shares_of_operands(self.site, operands, self.menu.hardware)
        flops = self.site.flops or 1.0
        return narrow.flops_8bit / flops, narrow.flops_16bit / flops

    @cached_property
    def most_8bit(self) -> tuple[float, float, float]:
        return self.menu.most_8bit(self.limits)

    @cached_property
    def least(self) -> tuple[float, float]:
        """The least damage and noise with which the site can have as many FLOPs in 8 bits as it has."""
        return self.menu.least_for(self.shares[0] * self.site.flops)

    @cached_property
    def fallback(self) -> str:
        """What the site's roles have left without 8 bits: their 16-bit candidates, or their own formats."""
        if any(16 in bits for bits in self.menu.bits.values()):
            return "16 bits"
        return " and ".join(sorted({str(own_operand(self.site, role).format) for role in self.site.roles}))


@dataclass(frozen=True, eq=False)
class _Case:
    """A slot whose choice is to be explained.

    chosen_at  the place of its cast's score, None where it is left as it is
    ranked     the places of all its scores, the one that comes closest to no limit first
    """

    of: _SiteChoice
    role: str
    scores: SlotScores
    chosen_at: int | None
    ranked: Sequence[int]

    @property
    def slot(self) -> Slot:
        return (self.of.site.name, self.role)

    @property
    def limits(self) -> Limits:
        return self.of.limits

    @property
    def hardware(self) -> Hardware:
        return self.of.menu.hardware

    @property
    def chosen(self) -> Candidate:
        return self.of.picked[self.role]

    @cached_property
    def rivals(self) -> list[int]:
        """The closest 8-bit cast, and the worst that fails alone or the best of 16 bits."""
        width, own = self.of.operands[self.role].bits, own_operand(self.of.site, self.role).bits
        bits = self.scores.bits
        others = [place for place in self.ranked if place != self.chosen_at]
        eight = [place for place in others if bits[place] <= 8]
        told = eight[:1]
        if width <= 8:
            told += [place for place in eight[1:][-1:] if self.fails_alone(place)]
        elif width == own and own > 16:
            told += [place for place in others if 8 < bits[place] <= 16][:1]
        return told

    def fails_alone(self, place: int) -> bool:
        option, limits = self.scores.candidate(place), self.limits
        if option is None or errs_alike(self.scores.rows[place], limits):
            return True
        return option.damage > limits.tolerance or option.noise_ratio > limits.noise

    def gain_with(self, option: Candidate) -> tuple[float, float, float]:
        """What the site would save if this role had `option` and the others kept their casts.

        Shares of its FLOPs in at most 8 and at most 16 bits, and minus the bytes of this role.
        """
        site, role = self.of.site, self.role
        held = role_bytes(site, role, option.cast)
        if option is self.chosen:
            return *self.of.shares, -held
        return *self.of.shares_of({**self.of.operands, role: operand(site, role, option.cast)}), -held


def reasons(
    menus: Sequence[Menu], chosen: Mapping[Slot, Candidate], scores: SlotScores, limits: Limits
) -> dict[Slot, str]:
    """The sentence of every slot of the menus' sites."""
    ranked = _by_pressure(scores, limits)
    cases = []
    for menu in menus:
        picked = {role: chosen[menu.site.name, role] for role in menu.site.roles}
        of = _SiteChoice(menu, picked, limits)
        for role, option in picked.items():
            span = scores.span((menu.site.name, role))
            at = None if option.row is None else scores.texts.index(str(option.cast), span.start, span.stop)
            cases.append(_Case(of, role, scores, at, ranked[span.start : span.stop]))
    told = [place for case in cases for place in (case.chosen_at, *case.rivals) if place is not None]
    ends = dict(zip(told, intervals_of([scores.rows[place] for place in told]), strict=True))
    return {case.slot: _reason(case, ends) for case in cases}


def _by_pressure(scores: SlotScores, limits: Limits) -> list[int]:
    """The places of all scores: slot after slot, those first that come less close to a limit; unknown ones last."""
    (damage, noise), alike = scores.costs[:, :-1], scores.systematic_ratio
    alike = np.where(alike > limits.systematic, alike, 0.0)
    costs = ((damage, limits.tolerance), (noise, limits.noise), (alike, limits.systematic))
    parts = np.max([_parts(cost, limit) for cost, limit in costs], axis=0)
    unknown = ~scores.can_be
    keys = [np.where(unknown, np.inf, key) for key in (noise, damage, parts)]
    order: list[int] = np.lexsort((*keys, scores.slot_of)).tolist()
    return order


def _parts(costs: Array, limit: float) -> Array:
    """`menu.part_of`, of many."""
    return costs / limit if limit > 0 else np.where(costs > 0, np.inf, 0.0)


def _reason(case: _Case, ends: Mapping[int, Ends]) -> str:
    """The sentence of a planned slot. `ends`: the intervals of the scores that it tells of."""
    chosen = case.chosen
    if chosen.row is None or case.chosen_at is None:
        own = own_operand(case.of.site, case.role).format
        parts = [f"stays {own}"]
    else:
        interval = ends[case.chosen_at]
        parts = [f"{short_cast(chosen.cast)}: {_numbers(case, chosen, chosen.row, interval)}"]
        parts += _unsettled(case, chosen.row, "it", interval)
        if may_err_alike(chosen.row, case.limits):
            parts.append(
                "not settled: it may err the same way in every batch by more than the limit; more scored steps "
                "(curvature_steps=8) tell this better"
            )
    parts += [_why_lost(case, place, ends[place]) for place in case.rivals]
    if not case.ranked:
        parts.append("no cast was scored for it")
    parts += _turning_point(case)
    far = case.scores.first_outlier.get(case.slot)
    rows = case.scores.rows
    flagged = [rows[place] for place in case.ranked] if chosen.row is None else [chosen.row]
    parts += _remarks(None if far is None else rows[far], flagged, told="; ".join(parts))
    return "; ".join(parts) + "."


def uniform_reason(role: str, cast: Cast, row: Row | None) -> str:
    """The sentence of a slot whose cast was given and not chosen."""
    if str(cast) == KEEP:
        return "left as it is: the recipe does not name this role."
    said = f"{short_cast(cast)} as asked for every {role}"
    if row is None:
        return f"{said}; not scored."
    parts = [f"{said}: {_quality(row)}"]
    if role == GRADIENT:
        noise = row.get("noise_ratio")
        parts.append("noise unknown" if noise is None else f"loses {_percent(lost_share(noise))} of the batch")
    else:
        damage = row.get("damage")
        told = _between(interval_of(row))
        between = f" ({told})" if told else ""
        parts.append("damage unknown" if damage is None else f"predicted {_loss(damage)} loss{between}")
    crest = crest_of(row)
    far = row if crest is not None and crest > OUTLIER_RATIO else None
    return "; ".join([", ".join(parts), *_remarks(far, [row], told="")]) + "."


def _numbers(case: _Case, option: Candidate, row: Row, interval: Ends) -> str:
    parts = [_quality(row)]
    if case.role != GRADIENT:
        told = _of_tolerance(case, option.damage, interval)
        parts.append(f"predicted {_loss(option.damage)} loss" + (f" ({told})" if told else ""))
    if case.role == GRADIENT or option.noise_ratio > 0.01 * case.limits.noise:
        parts.append(f"loses {_percent(lost_share(option.noise_ratio))} of the batch")
    return ", ".join(parts)


def _of_tolerance(case: _Case, damage: float, ends: Ends) -> str:
    """A damage's interval and its share of the tolerance; one short clause where both are next to nothing."""
    tolerance = case.limits.tolerance
    if tolerance > 0 and ends is not None and ends[1] <= NEXT_TO_NOTHING * tolerance:
        return f"under {_percent(NEXT_TO_NOTHING)} of the tolerance"
    of = f"{_percent(damage / tolerance)} of the tolerance" if tolerance else ""
    return ", ".join(part for part in (_between(ends), of) if part)


def _between(ends: Ends) -> str:
    """The 95% interval of a damage, in words; the upper end alone where it cannot be told from zero."""
    if ends is None or ends[1] <= 0:
        return ""
    if not math.isfinite(ends[1]):
        return "not bounded by the window"
    return f"below {ends[1]:.1e}" if ends[0] <= 0 else f"{ends[0]:.1e} to {ends[1]:.1e}"


def _unsettled(case: _Case, row: Row, name: str, ends: Ends) -> list[str]:
    """Where the interval straddles the tolerance: that the window was too short, and what would settle it."""
    limit = case.limits.tolerance
    found = settling_within(row, ends, limit) if case.role != GRADIENT and limit > 0 else None
    if found is None:
        return []
    return [
        (
            f"not settled: {name} may cost {found.lower:.1e} to {found.upper:.1e}, on either side of the tolerance; "
            f"{found.clause}"
        )
    ]


def _noise_unsettled(case: _Case, row: Row) -> list[str]:
    """Where a gradient's noise may be on either side of the limit: that the window was too short."""
    ends = noise_interval(row)
    if ends is None or not ends[0] < case.limits.noise < ends[1]:
        return []
    low, high = (_percent(lost_share(end)) for end in ends)
    return [f"not settled: it may lose {low} to {high}; a longer window (steps=) narrows that"]


def _turning_point(case: _Case) -> list[str]:
    """Below which limits this site could not keep its FLOPs in 8 bits, whatever the others do."""
    if case.chosen.row is None or case.of.shares[0] * case.of.site.flops <= 0:
        return []
    damage, noise = case.of.least
    parts = [f"a tolerance of {damage:.1e}"] if damage > 0 else []
    parts += [f"a limit of {_percent(lost_share(noise))} on lost batch"] if noise > 0 else []
    return [f"below {' or '.join(parts)} this site would go back to {case.of.fallback}"] if parts else []


def _why_lost(case: _Case, place: int, ends: Ends) -> str:
    text, row = case.scores.texts[place], case.scores.rows[place]
    cast, limits = parse_cast(text), case.limits
    name, option = short_cast(cast), case.scores.candidate(place)
    if option is None:
        what = "damage" if case.role != GRADIENT and not _known(row.get("damage")) else "noise in the gradients"
        return f"{name} was no candidate: its {what} is unknown"
    if option.damage > limits.tolerance:
        said = f"{name} fails: {_quality(row)}, {_loss(option.damage)} loss"
        if not limits.tolerance:
            return f"{said}, and the tolerance is 0"
        verdict = f"{said} is {_percent(option.damage / limits.tolerance)} of the tolerance{_because(row)}"
        return "; ".join([verdict, *_unsettled(case, row, name, ends)])
    if errs_alike(row, limits):
        return _errs_alike(case, row, name)
    if option.noise_ratio > limits.noise:
        verdict = (
            f"{name} fails: {_quality(row)}, it loses {_percent(lost_share(option.noise_ratio))} of the "
            f"batch and the limit is {_percent(limits.max_lost_batch)}{_because(row)}"
        )
        return "; ".join([verdict, *_noise_unsettled(case, row)])
    now, then = case.gain_with(case.chosen), case.gain_with(option)
    if then[0] < now[0]:
        return _unpaired(case, text) or (
            f"{name} would leave {_percent(then[0])} of the site's FLOPs in 8 bits instead of "
            f"{_percent(now[0])}, because {case.hardware.name} does not multiply every pair of formats"
        )
    if cast.bits <= 8 < case.of.operands[case.role].bits:
        return _site_verdict(case, name, option)
    if then > now:
        return f"{name} fits alone ({_cost(case, option)}), but the limits are spent where they save more"
    return _compared(case, name, option, same=then == now)


def _errs_alike(case: _Case, row: Row, name: str) -> str:
    """That a cast of a gradient errs the same way in every batch, from which step on that counts most, and how sure."""
    ratio, error, most = row["systematic_ratio"], row.get("systematic_ratio_se"), case.limits.systematic
    said = (
        f"{name} fails: {_quality(row)}, it errs the same way in every batch, which does not average out: after "
        f"{_steps(ratio)} that outweighs the minibatch's noise"
    )
    if most > 0:
        said += f", and the limit is {_steps(most)}"
    if error is None or ratio - 2 * error > most:
        return said
    return f"{said}; not settled: more scored steps (curvature_steps=) tell this better"


def _steps(ratio: float) -> str:
    """How long it takes a systematic error of that ratio, above 0, to outweigh noise."""
    if ratio < 1 / MOST_STEPS:
        return "more than a million steps"
    count = max(1, round(1 / ratio))
    return "1 step" if count == 1 else f"{count} steps"


def _unpaired(case: _Case, text: str) -> str | None:
    """Why a cast that the hardware multiplies only with its like lost: what it would cost at all of the site's roles.

    None where some role of the site has no such candidate, or where it would cost less.
    """
    menu = case.of.menu
    alike = [menu.candidates[role][texts.index(text)] for role, texts in menu.texts.items() if text in texts]
    if len(alike) < len(case.of.site.roles):
        return None
    damage, noise = sum(option.damage for option in alike), sum(option.noise_ratio for option in alike)
    mine = [math.fsum(getattr(pick, cost) for pick in case.of.picked.values()) for cost in ("damage", "noise_ratio")]
    name, chosen = short_cast(parse_cast(text)), short_cast(case.chosen.cast)
    said = f"{name} throughout this site ({case.hardware.name} does not multiply it with {chosen}) would"
    if damage > case.limits.tolerance:
        of = f", {_percent(damage / case.limits.tolerance)} of the tolerance" if case.limits.tolerance else ""
        return f"{said} cost {_loss(damage)} loss{of}"
    if noise > case.limits.noise:
        limit = _percent(case.limits.max_lost_batch)
        return f"{said} lose {_percent(lost_share(noise))} of the batch and the limit is {limit}"
    costs = [(damage, mine[0], "loss"), (noise, mine[1], "noise")]
    dearer = [_dearer(rival / own, kind) for rival, own, kind in costs if rival > own > 0]
    return f"{said} cost {' and '.join(dearer)}" if dearer else None


def _compared(case: _Case, name: str, option: Candidate, same: bool) -> str:
    """Two casts that both keep the limits alone; `same`: and save the same."""
    chosen = case.chosen
    pairs = [(option.damage, chosen.damage, "loss"), (option.noise_ratio, chosen.noise_ratio, "noise")]
    for rival, mine, kind in pairs if case.role != GRADIENT else reversed(pairs):
        if rival > mine > 0:
            return f"{name} would cost {_dearer(rival / mine, kind)}{_because(option.row)}"
        if rival > mine:
            return f"{name} would cost {_cost(case, option)} and save no more"
    if not same:
        return f"{name} would save less"
    return f"{name} would do as well"


def _site_verdict(case: _Case, name: str, option: Candidate) -> str:
    """Why a narrow cast that keeps the limits by itself was not taken: the site as a whole decides."""
    flops, damage, noise = case.of.most_8bit
    if flops == 0:
        return f"{name} would gain nothing: no product here can run in 8 bits on {case.hardware.name}"
    alone = f"{name} fits alone ({_cost(case, option)}), but"
    if damage > case.limits.tolerance:
        of = _percent(damage / case.limits.tolerance) if case.limits.tolerance else ""
        said = f"{of} of the tolerance" if of else "and the tolerance is 0"
        return f"{alone} this site's products in 8 bits would cost {_loss(damage)} loss, {said}"
    if noise > case.limits.noise:
        return (
            f"{alone} this site's products in 8 bits would lose {_percent(lost_share(noise))} of the "
            f"batch and the limit is {_percent(case.limits.max_lost_batch)}"
        )
    return f"{alone} the limits buy more 8-bit FLOPs elsewhere"


def _because(row: Row | None) -> str:
    found = "" if row is None else cause(row)
    return f" ({found})" if found else ""


def _cost(case: _Case, option: Candidate) -> str:
    if case.role == GRADIENT:
        return f"{_percent(lost_share(option.noise_ratio))} of the batch"
    return f"{_loss(option.damage)} loss"


def _remarks(far: Row | None, flagged: Sequence[Row], told: str) -> list[str]:
    """Facts about the tensor: a largest value `far` above the RMS, and the flags of the scores in question."""
    clause = "" if far is None else outlier_clause(far)
    remarks = [clause] if clause and clause not in told else []
    flags = sorted({str(flag).replace("_", " ") for row in flagged for flag in row.get("flags") or ()})
    return remarks + ([f"flagged: {', '.join(flags)}"] if flags else [])


def _quality(row: Row) -> str:
    """SQNR, and underflow and overflow where there is any."""
    sqnr = row.get("sqnr_db")
    if sqnr is None or math.isnan(sqnr):
        parts = ["SQNR unknown"]
    else:
        parts = ["exact"] if sqnr == math.inf else [f"{sqnr:.1f} dB"]
    for name in ("underflow", "overflow"):
        share = row.get(name)
        if share is not None and share > 0:
            parts.append(f"{_percent(share)} {name}")
    return ", ".join(parts)


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _loss(damage: float) -> str:
    return f"{damage:+.1e}" if damage else "+0"


def _percent(share: float) -> str:
    """0.0002 → 0.02%; two significant digits, whole numbers from 10% on."""
    value = 100 * share
    if math.isnan(value) or math.isinf(value):
        return f"{value}%"
    if 0 < abs(value) < 1e-4:
        return "<0.0001%"
    return f"{value:.0f}%" if abs(value) >= 10 or value == 0 else f"{value:.2g}%"


def _dearer(ratio: float, kind: str) -> str:
    """How much more something costs, for a ratio above 1: one that would read as 1.0× is told as a difference."""
    if ratio < 1.05:
        return f"{_percent(ratio - 1)} more {kind}"
    return f"{ratio:.1f}× the {kind}" if ratio < 100 else f"{ratio:.0f}× the {kind}"
