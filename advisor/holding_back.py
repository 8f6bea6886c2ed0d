"""A plan as a whole in sentences: what limits it, what holds it back, what would change it, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from advisor.candidates import Candidate
from advisor.castnames import short_cast
from advisor.cost import site_shares
from advisor.intervals import interval_of_sum
from advisor.menu import Limits, Menu, lost_share
from advisor.plan import FrontPoint
from advisor.shut_out import NEARLY, ShutOut
from advisor.site_names import joint_name, without_number
from probes.records import GRADIENT

NAMED = 3  # slots, or sites of repeated blocks, that a sentence names
ALIKE = "what is alike"

Slot = tuple[str, str]


@dataclass(frozen=True)
class Spent:
    """What a plan takes of its limits: the exact sums of damage, loss units, and of noise ratios."""

    damage: float
    noise_ratio: float


@dataclass(frozen=True)
class _Held:
    """A site that has fewer FLOPs in 8 bits than the hardware would take of it, and why.

    flops                    that it holds back
    damage, noise_ratio      of the site with all of them in 8 bits
    more_damage, more_noise  than it has
    cause                    "tolerance", "lost batch", ALIKE, several of them, or "the limits together"
    ratio                    the `systematic_ratio` that it takes, where that is over the limit
    """

    menu: Menu
    flops: float
    damage: float
    noise_ratio: float
    more_damage: float
    more_noise: float
    cause: str
    ratio: float | None = None


def plan_sentences(
    menus: Sequence[Menu],
    chosen: Mapping[Slot, Candidate],
    limits: Limits,
    spent: Spent,
    front: Sequence[FrontPoint],
    total_flops: float,
    alike: Mapping[str, ShutOut] = MappingProxyType({}),
) -> list[str]:
    """`alike`: the sites that the limit on what is alike in every batch keeps from 8 bits, by name.

    In this order: what limits the plan, what is held back, what more tolerance buys, what takes most, how sure.
    """
    if not menus or not total_flops:
        return []
    flops = [_flops(menu, {role: chosen[menu.site.name, role] for role in menu.site.roles}) for menu in menus]
    most = [menu.most_8bit(limits) for menu in menus]
    held = [
        found
        for menu, has, can in zip(menus, flops, most, strict=True)
        for found in _held(menu, has, can, alike.get(menu.site.name), chosen, limits, spent)
    ]
    reachable = math.fsum([*(reach for reach, _, _ in most), *(found.flops for found in alike.values())])
    return [
        *_limited_by(menus, held, reachable, limits, total_flops),
        *_held_back(held, limits, total_flops),
        *_all_in(held, limits, spent),
        *_bought(front, limits, math.fsum(flops) / total_flops),
        *_spenders(chosen, limits, spent),
        *_certainty(chosen, limits, spent),
    ]


def _held(
    menu: Menu,
    has: float,
    can: tuple[float, float, float],
    alike: ShutOut | None,
    chosen: Mapping[Slot, Candidate],
    limits: Limits,
    spent: Spent,
) -> Iterator[_Held]:
    """What the site holds back of what its menu reaches, then what the limit on what is alike holds back beyond.

    has  FLOPs in 8 bits
    can  the most that it can have, with their damage and noise
    """
    picked = [chosen[menu.site.name, role] for role in menu.site.roles]
    now = math.fsum(option.damage for option in picked), math.fsum(option.noise_ratio for option in picked)
    most, damage, noise = can
    missing = most - has
    before = now
    if missing > NEARLY * max(menu.site.flops, 1.0):
        over = _over(damage - now[0], noise - now[1], limits, spent)
        before = damage, noise
        cause = " and ".join(over) or "the limits together"
        yield _Held(menu, missing, damage, noise, damage - now[0], noise - now[1], cause)
    if alike is not None:
        _, damage, noise = alike.menu.most_8bit(limits)
        cause = " and ".join([ALIKE, *_over(damage - now[0], noise - now[1], limits, spent)])
        more = damage - before[0], noise - before[1]
        yield _Held(alike.menu, alike.flops, damage, noise, *more, cause, alike.ratio)


def _over(more_damage: float, more_noise: float, limits: Limits, spent: Spent) -> list[str]:
    """The limits that a plan would pass with so much more."""
    return [
        name
        for name, more, limit, used in (
            ("tolerance", more_damage, limits.tolerance, spent.damage),
            ("lost batch", more_noise, limits.noise, spent.noise_ratio),
        )
        if used + more > limit * (1 + NEARLY)
    ]


def _flops(menu: Menu, picked: Mapping[str, Candidate]) -> float:
    casts = {role: option.cast for role, option in picked.items()}
    return site_shares(menu.site, casts, menu.hardware).flops_8bit


def _limited_by(
    menus: Sequence[Menu], held: Sequence[_Held], reachable: float, limits: Limits, total: float
) -> list[str]:
    """How the FLOPs that are not in 8 bits divide over causes. `reachable`: what the menus reach in all."""
    parts = []
    causes = sorted({found.cause for found in held})
    by_cause = {cause: math.fsum(found.flops for found in held if found.cause == cause) for cause in causes}
    for cause, flops in sorted(by_cause.items(), key=lambda entry: (-entry[1], entry[0])):
        parts.append(f"{_share(flops, total)} by {_limit_named(cause, limits)}")
    seen = math.fsum(menu.site.flops for menu in menus)
    if seen - reachable > NEARLY * total:
        hardware = menus[0].hardware.name
        parts.append(f"{_share(seen - reachable, total)} because no cast of theirs gives {hardware} a pair of 8 bits")
    if total - seen > NEARLY * total:
        parts.append(f"{_share(total - seen, total)} because no site holds them")
    if not parts:
        return ["all matrix FLOPs are in 8 bits"]
    return [f"kept from 8 bits: {', '.join(parts)} (shares of the matrix FLOPs)"]


def _limit_named(cause: str, limits: Limits) -> str:
    told = {
        "tolerance": f"the tolerance of {limits.tolerance:.1e}",
        "lost batch": f"the limit of {100 * limits.max_lost_batch:.2g}% on lost batch",
        ALIKE: "the limit on what is alike in every batch",
    }
    return " and ".join(told.get(part, part) for part in cause.split(" and "))


def _held_back(held: Sequence[_Held], limits: Limits, total: float) -> list[str]:
    """The sites that keep most FLOPs from 8 bits, those of repeated blocks together, each with its dearest slot."""
    families: dict[tuple[str, str], list[_Held]] = {}
    for found in held:
        families.setdefault((without_number(found.menu.site.name)[0], found.cause), []).append(found)
    most = sorted(families.values(), key=lambda sites: (-_sum(sites, "flops"), _name(sites)))[:NAMED]
    return [
        f"{_name(sites)} {'holds' if len(sites) == 1 else 'hold'} back {_share(_sum(sites, 'flops'), total)}: in 8 "
        f"bits {'it' if len(sites) == 1 else 'they'} would cost "
        f"{_costs(_sum(sites, 'damage'), _sum(sites, 'noise_ratio'), limits)}{_dearest(sites, limits)}{_allowed(sites)}"
        for sites in most
    ]


def _allowed(sites: Sequence[_Held]) -> str:
    """The limit on lost batch that goes with what is alike in every batch in these sites' errors."""
    ratio = max((found.ratio for found in sites if found.ratio is not None), default=None)
    if ratio is None:
        return ""
    said = "; what errs the same way in every batch may do so under"
    if math.isinf(ratio):
        return f"{said} no limit"
    return f"{said} a limit of {_at_least(lost_share(Limits.noise_for(ratio)))} on lost batch (max_lost_batch)"


def _name(sites: Sequence[_Held]) -> str:
    return joint_name([found.menu.site.name for found in sites])


def _sum(sites: Sequence[_Held], what: str) -> float:
    return math.fsum(getattr(found, what) for found in sites)


def _all_in(held: Sequence[_Held], limits: Limits, spent: Spent) -> list[str]:
    """The limits at which all that is held back would be in 8 bits."""
    if not held:
        return []
    damage = spent.damage + _sum(held, "more_damage")
    ratios = [found.ratio for found in held if found.ratio is not None]
    noise = max(spent.noise_ratio + _sum(held, "more_noise"), *map(Limits.noise_for, ratios), 0.0)
    if math.isinf(noise):
        return []
    parts = [f"a tolerance of {damage:.1e}"] if damage > limits.tolerance else []
    parts += [f"a limit of {_at_least(lost_share(noise))} on lost batch"] if noise > limits.noise else []
    return [f"{' and '.join(parts)} would let all of it in"] if parts else []


def _costs(damage: float, noise: float, limits: Limits) -> str:
    of = f" ({_share(damage, limits.tolerance)} of the tolerance)" if limits.tolerance > 0 else ""
    parts = [f"{damage:+.1e} loss{of}"] if damage > 0 else []
    if noise > 0.01 * limits.noise:
        parts.append(f"{_share(lost_share(noise), 1)} of the batch")
    return " and ".join(parts) or "nothing"


def _dearest(sites: Sequence[_Held], limits: Limits) -> str:
    """The slot that takes the most of a limit in what the sites would cost."""
    site, role, option = max(
        ((found.menu.site.name, role, pick) for found in sites for role, pick in found.menu.fullest(limits).items()),
        key=lambda entry: (_part(entry[2], limits), *entry[:2]),
    )
    costs = _costs(option.damage, option.noise_ratio, limits)
    return f"; {site} {role} takes most ({short_cast(option.cast)}: {costs})"


def _part(option: Candidate, limits: Limits) -> float:
    """The larger share that a cast takes of the two limits."""
    parts = ((option.damage, limits.tolerance), (option.noise_ratio, limits.noise))
    return max(cost / limit if limit > 0 else math.inf * (cost > 0) if cost > 0 else 0.0 for cost, limit in parts)


def _bought(front: Sequence[FrontPoint], limits: Limits, share: float) -> list[str]:
    """What more tolerance buys, from the front: at twice as much, else the next point that has more in 8 bits."""
    more = [point for point in front if point.share_8bit > share + NEARLY]
    if not more:
        return ["no tolerance on the front brings more into 8 bits"] if len(front) > 1 else []
    doubled = [point for point in more if limits.tolerance < point.tolerance <= 2 * limits.tolerance]
    point = doubled[-1] if doubled else more[0]
    times = "twice the tolerance" if doubled else f"a tolerance of {point.tolerance:.1e}"
    if not doubled and limits.tolerance > 0:
        times += f", {point.tolerance / limits.tolerance:.2g} times this one,"
    return [
        (
            f"{times} would bring {100 * point.share_8bit:.1f}% into 8 bits instead of {100 * share:.1f}%, "
            f"at {point.damage:+.1e} loss"
        )
    ]


def _spenders(chosen: Mapping[Slot, Candidate], limits: Limits, spent: Spent) -> list[str]:
    """The slots that take most of what the plan spends of each limit."""
    told = []
    for what, total, cost in (
        ("predicted loss", spent.damage, lambda option: option.damage),
        ("noise in the gradients", spent.noise_ratio, lambda option: option.noise_ratio),
    ):
        most = sorted(chosen.items(), key=lambda entry: (-cost(entry[1]), entry[0]))[:NAMED]
        named = [f"{slot[0]} {slot[1]} {_share(cost(option), total)}" for slot, option in most if cost(option) > 0]
        if total > 0 and named:
            told.append(f"most of the {what} comes from {', '.join(named)}")
    return told


def _certainty(chosen: Mapping[Slot, Candidate], limits: Limits, spent: Spent) -> list[str]:
    """Whether the interval of the total keeps the tolerance."""
    cast = [option.row for (_, role), option in chosen.items() if option.row is not None and role != GRADIENT]
    ends = interval_of_sum(cast) if cast else None
    if ends is None or limits.tolerance <= 0 or ends[1] <= limits.tolerance:
        return []
    said = f"the window does not settle whether the plan keeps its tolerance of {limits.tolerance:.1e}"
    if not math.isfinite(ends[1]):
        return [f"{said}: some tensors change so much within it that nothing bounds the loss. Record a later window"]
    room = limits.tolerance * spent.damage / ends[1]
    return [
        (
            f"{said}: its loss may come to {ends[1]:.1e}. More scored steps (curvature_steps) narrow the part that "
            f"comes from draws; a tolerance of {room:.1e} would leave room for the rest; a paired run settles it"
        )
    ]


def _share(part: float, whole: float) -> str:
    value = 100 * part / whole
    return f"{value:.0f}%" if value >= 10 else f"{value:.2g}%"


def _at_least(share: float) -> str:
    """A share that is no smaller, in two digits, or in as many as keep it below the whole."""
    for digits in range(1, 16):
        unit = 10.0 ** (math.floor(math.log10(100 * share)) - digits)
        value = math.ceil(100 * share / unit - NEARLY) * unit
        if value < 100:
            return f"{value:.{digits + 1}g}%"
    return "100%"
