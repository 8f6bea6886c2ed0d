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
from collections.abc import Mapping
from dataclasses import dataclass

from advisor.castnames import KEEP, parse_cast, short_cast
from advisor.cost import operand, own_operand, role_bytes, site_shares
from advisor.failures import OUTLIER_RATIO, cause, crest_of, outlier_clause
from advisor.hardware import Hardware
from advisor.intervals import interval_of, noise_interval
from advisor.menu import Candidate, Limits, Menu, Row, candidate, errs_alike, lost_share, may_err_alike
from advisor.settling import settling
from probes.casts import Cast
from probes.records import GRADIENT, Site

MOST_STEPS = 1_000_000  # that are counted
NEXT_TO_NOTHING = 0.001  # of the tolerance: an interval that ends below it is not written out. Ours


@dataclass(frozen=True)
class Case:
    """A slot whose choice is to be explained. `rows`: every score of the slot, by canonical cast."""

    menu: Menu
    role: str
    picked: Mapping[str, Candidate]
    rows: Mapping[str, Row]
    limits: Limits

    @property
    def site(self) -> Site:
        return self.menu.site

    @property
    def hardware(self) -> Hardware:
        return self.menu.hardware

    @property
    def chosen(self) -> Candidate:
        return self.picked[self.role]

    def gain_with(self, option: Candidate) -> tuple[float, float, float]:
        """What the site would save if this role had `option` and the others kept their casts.

        Shares of its FLOPs in at most 8 and at most 16 bits, and minus the bytes of this role.
        """
        casts = {role: pick.cast for role, pick in self.picked.items()} | {self.role: option.cast}
        narrow = site_shares(self.site, casts, self.hardware)
        flops = self.site.flops or 1.0
        held = role_bytes(self.site, self.role, option.cast)
        return narrow.flops_8bit / flops, narrow.flops_16bit / flops, -held


def reason(case: Case) -> str:
    """The sentence of a planned slot."""
    chosen = case.chosen
    if chosen.row is None:
        own = own_operand(case.site, case.role).format
        parts = [f"stays {own}"]
    else:
        parts = [f"{short_cast(chosen.cast)}: {_numbers(case, chosen.cast, chosen.row)}"]
        parts += _unsettled(case, chosen.row, "it")
        if may_err_alike(chosen.row, case.limits):
            parts.append(
                "not settled: it may err the same way in every batch by more than the limit; more scored steps "
                "(curvature_steps=8) tell this better"
            )
    parts += _rivals(case)
    if not case.rows:
        parts.append("no cast was scored for it")
    parts += _turning_point(case)
    parts += _remarks(case.rows, chosen, told="; ".join(parts))
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
        between = f" ({_between(row)})" if _between(row) else ""
        parts.append("damage unknown" if damage is None else f"predicted {_loss(damage)} loss{between}")
    return "; ".join([", ".join(parts), *_remarks({str(cast): row}, None, told="")]) + "."


def _numbers(case: Case, cast: Cast, row: Row) -> str:
    option = candidate(case.site, case.role, cast, row)
    assert option is not None
    parts = [_quality(row)]
    if case.role != GRADIENT:
        told = _of_tolerance(case, option.damage, row)
        parts.append(f"predicted {_loss(option.damage)} loss" + (f" ({told})" if told else ""))
    if case.role == GRADIENT or option.noise_ratio > 0.01 * case.limits.noise:
        parts.append(f"loses {_percent(lost_share(option.noise_ratio))} of the batch")
    return ", ".join(parts)


def _of_tolerance(case: Case, damage: float, row: Row) -> str:
    """A damage's interval and its share of the tolerance; one short clause where both are next to nothing."""
    tolerance, ends = case.limits.tolerance, interval_of(row)
    if tolerance > 0 and ends is not None and ends[1] <= NEXT_TO_NOTHING * tolerance:
        return f"under {_percent(NEXT_TO_NOTHING)} of the tolerance"
    of = f"{_percent(damage / tolerance)} of the tolerance" if tolerance else ""
    return ", ".join(part for part in (_between(row), of) if part)


def _between(row: Row) -> str:
    """The 95% interval of a damage, in words; the upper end alone where it cannot be told from zero."""
    ends = interval_of(row)
    if ends is None or ends[1] <= 0:
        return ""
    if not math.isfinite(ends[1]):
        return "not bounded by the window"
    return f"below {ends[1]:.1e}" if ends[0] <= 0 else f"{ends[0]:.1e} to {ends[1]:.1e}"


def _unsettled(case: Case, row: Row, name: str) -> list[str]:
    """Where the interval straddles the tolerance: that the window was too short, and what would settle it."""
    limit = case.limits.tolerance
    found = settling(row, limit) if case.role != GRADIENT and limit > 0 else None
    if found is None:
        return []
    return [
        (
            f"not settled: {name} may cost {found.lower:.1e} to {found.upper:.1e}, on either side of the tolerance; "
            f"{found.clause}"
        )
    ]


def _noise_unsettled(case: Case, row: Row) -> list[str]:
    """Where a gradient's noise may be on either side of the limit: that the window was too short."""
    ends = noise_interval(row)
    if ends is None or not ends[0] < case.limits.noise < ends[1]:
        return []
    low, high = (_percent(lost_share(end)) for end in ends)
    return [f"not settled: it may lose {low} to {high}; a longer window (steps=) narrows that"]


def _turning_point(case: Case) -> list[str]:
    """Below which limits this site could not keep its FLOPs in 8 bits, whatever the others do."""
    now = case.gain_with(case.chosen)[0] * case.site.flops
    if case.chosen.row is None or now <= 0:
        return []
    damage, noise = case.menu.least_for(now)
    parts = [f"a tolerance of {damage:.1e}"] if damage > 0 else []
    parts += [f"a limit of {_percent(lost_share(noise))} on lost batch"] if noise > 0 else []
    return [f"below {' or '.join(parts)} this site would go back to {_fallback(case)}"] if parts else []


def _fallback(case: Case) -> str:
    """What the site's roles have left without 8 bits: their 16-bit candidates, or their own formats."""
    own = {str(own_operand(case.site, role).format) for role in case.site.roles}
    wide = {
        operand(case.site, role, option.cast).bits for role in case.site.roles for option in case.menu.candidates[role]
    }
    return "16 bits" if 16 in wide else " and ".join(sorted(own))


def _rivals(case: Case) -> list[str]:
    """Why rivals lost: the closest 8-bit cast, and the worst that fails alone or the best of 16 bits."""
    width = operand(case.site, case.role, case.chosen.cast).bits
    own = own_operand(case.site, case.role).bits
    chosen_text = str(case.chosen.cast)
    eight = [text for text in case.rows if text != chosen_text and parse_cast(text).bits <= 8]
    sixteen = [text for text in case.rows if text != chosen_text and 8 < parse_cast(text).bits <= 16]
    eight.sort(key=lambda text: _pressure(case, text))
    sixteen.sort(key=lambda text: _pressure(case, text))
    told = eight[:1]
    if width <= 8:
        told += [text for text in eight[1:][-1:] if _fails_alone(case, text)]
    elif width == own and own > 16:
        told += sixteen[:1]
    return [_why_lost(case, text) for text in told]


def _pressure(case: Case, text: str) -> tuple[float, float, float, str]:
    """Sort key: how close a cast alone comes to a limit; unknown ones last."""
    option = candidate(case.site, case.role, parse_cast(text), case.rows[text])
    if option is None:
        return (math.inf, math.inf, math.inf, text)
    row, limits = case.rows[text], case.limits
    alike = _part(row.get("systematic_ratio") or 0.0, limits.systematic) if errs_alike(row, limits) else 0.0
    parts = (_part(option.damage, limits.tolerance), _part(option.noise_ratio, limits.noise), alike)
    return (max(parts), option.damage, option.noise_ratio, text)


def _part(value: float, limit: float) -> float:
    if limit > 0:
        return value / limit
    return math.inf if value > 0 else 0.0


def _fails_alone(case: Case, text: str) -> bool:
    row, limits = case.rows[text], case.limits
    option = candidate(case.site, case.role, parse_cast(text), row)
    if option is None or errs_alike(row, limits):
        return True
    return option.damage > limits.tolerance or option.noise_ratio > limits.noise


def _why_lost(case: Case, text: str) -> str:
    cast, row = parse_cast(text), case.rows[text]
    name, limits = short_cast(cast), case.limits
    option = candidate(case.site, case.role, cast, row)
    if option is None:
        what = "damage" if case.role != GRADIENT and not _known(row.get("damage")) else "noise in the gradients"
        return f"{name} was no candidate: its {what} is unknown"
    if option.damage > limits.tolerance:
        said = f"{name} fails: {_quality(row)}, {_loss(option.damage)} loss"
        if not limits.tolerance:
            return f"{said}, and the tolerance is 0"
        verdict = f"{said} is {_percent(option.damage / limits.tolerance)} of the tolerance{_because(row)}"
        return "; ".join([verdict, *_unsettled(case, row, name)])
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
    if cast.bits <= 8 < operand(case.site, case.role, case.chosen.cast).bits:
        return _site_verdict(case, name, option)
    if then > now:
        return f"{name} fits alone ({_cost(case, option)}), but the limits are spent where they save more"
    return _compared(case, name, option, same=then == now)


def _errs_alike(case: Case, row: Row, name: str) -> str:
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


def _unpaired(case: Case, text: str) -> str | None:
    """Why a cast that the hardware multiplies only with its like lost: what it would cost at all of the site's roles.

    None where some role of the site has no such candidate, or where it would cost less.
    """
    alike = [option for role in case.site.roles for option in case.menu.candidates[role] if str(option.cast) == text]
    if len(alike) < len(case.site.roles):
        return None
    damage, noise = sum(option.damage for option in alike), sum(option.noise_ratio for option in alike)
    mine = [math.fsum(getattr(pick, cost) for pick in case.picked.values()) for cost in ("damage", "noise_ratio")]
    name, chosen = short_cast(parse_cast(text)), short_cast(case.chosen.cast)
    said = f"{name} throughout this site ({case.hardware.name} does not multiply it with {chosen}) would"
    if damage > case.limits.tolerance:
        of = f", {_percent(damage / case.limits.tolerance)} of the tolerance" if case.limits.tolerance else ""
        return f"{said} cost {_loss(damage)} loss{of}"
    if noise > case.limits.noise:
        limit = _percent(case.limits.max_lost_batch)
        return f"{said} lose {_percent(lost_share(noise))} of the batch and the limit is {limit}"
    costs = [(damage, mine[0], "loss"), (noise, mine[1], "noise")]
    dearer = [f"{_times(rival / own)} the {kind}" for rival, own, kind in costs if rival > own > 0]
    return f"{said} cost {' and '.join(dearer)}" if dearer else None


def _compared(case: Case, name: str, option: Candidate, same: bool) -> str:
    """Two casts that both keep the limits alone; `same`: and save the same."""
    chosen = case.chosen
    pairs = [(option.damage, chosen.damage, "loss"), (option.noise_ratio, chosen.noise_ratio, "noise")]
    for rival, mine, kind in pairs if case.role != GRADIENT else reversed(pairs):
        if rival > mine > 0:
            return f"{name} would cost {_times(rival / mine)} the {kind}{_because(option.row)}"
        if rival > mine:
            return f"{name} would cost {_cost(case, option)} and save no more"
    if not same:
        return f"{name} would save less"
    return f"{name} would do as well"


def _site_verdict(case: Case, name: str, option: Candidate) -> str:
    """Why a narrow cast that keeps the limits by itself was not taken: the site as a whole decides."""
    flops, damage, noise = case.menu.most_8bit(case.limits)
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


def _cost(case: Case, option: Candidate) -> str:
    if case.role == GRADIENT:
        return f"{_percent(lost_share(option.noise_ratio))} of the batch"
    return f"{_loss(option.damage)} loss"


def _remarks(rows: Mapping[str, Row], chosen: Candidate | None, told: str) -> list[str]:
    """Facts about the tensor: a largest value far above the RMS, and the flags of the scores in question."""
    remarks = []
    for row in rows.values():
        crest = crest_of(row)
        if crest is not None and crest > OUTLIER_RATIO:
            clause = outlier_clause(row)
            remarks += [] if clause in told else [clause]
            break
    flagged = rows.values() if chosen is None or chosen.row is None else [chosen.row]
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


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 100 else f"{ratio:.0f}×"
