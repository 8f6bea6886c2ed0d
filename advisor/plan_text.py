"""A plan as text for a terminal of 100 columns: a summary, what to watch, a table by site, then the reasons.

Sites that differ in a number of their name alone ("blocks.0.mlp.up", "blocks.1.mlp.up") and have the same casts are
shown together, as "blocks.0-1.mlp.up"; of reasons that differ in their numbers alone one is shown, with the range of
each number. Nothing is left out: a clause that only some of them have makes a reason of its own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from advisor.castnames import KEEP, briefest_cast
from advisor.clauses import merged, told_once
from advisor.plan import Assignment, Plan, PlannedSite, Predicted
from advisor.site_names import joint_name, ranges, without_number
from probes.casts import Cast

WIDTH = 100
_SITE_WIDTH = 34


def text(plan: Plan) -> str:
    """The whole plan, lines of at most 100 columns (but for names that are longer themselves)."""
    groups = _groups(plan)
    lines = [*_summary(plan)]
    lines += [line for told in plan.summary for line in _wrapped(f"- {told}", "  ")]
    if plan.watch:
        lines += ["", "What to watch", *(line for one in plan.watch for line in _wrapped(f"- {one.sentence}", "  "))]
    lines += ["", *_table(plan, groups), "", "Reasons"]
    for group in groups:
        lines.append(f"  {group.name}")
        lines += _reasons(group)
    if len(plan.front) > 1:
        lines += ["", "Tolerance → damage, 8-bit share"]
        lines += [
            f"  {point.tolerance:.1e} → {point.damage:+.1e} loss, {100 * point.share_8bit:.1f}%" for point in plan.front
        ]
    for title, told in (("Notes", plan.notes), ("Approximate", plan.approximations)):
        lines += ["", title, *(line for note in told for line in _wrapped(f"- {note}", "  "))]
    return "\n".join(lines)


@dataclass(frozen=True)
class _Group:
    """Sites whose names differ in one number, with the same roles and casts; `numbers` are those, in order."""

    name: str
    sites: tuple[PlannedSite, ...]
    assigned: tuple[tuple[Assignment, ...], ...]
    numbers: tuple[str, ...]


def _groups(plan: Plan) -> list[_Group]:
    """Every site in one group, groups in the order of their first sites."""
    casts: dict[str, list[Assignment]] = {site.site: [] for site in plan.sites}
    for one in plan.assignments:
        casts[one.site].append(one)
    found: dict[object, list[PlannedSite]] = {}
    for site in plan.sites:
        kind = tuple((one.role, one.cast) for one in casts[site.site])
        found.setdefault((without_number(site.site)[0], site.op, kind), []).append(site)
    return [
        _Group(
            name=joint_name([site.site for site in sites]),
            sites=tuple(sites),
            assigned=tuple(tuple(casts[site.site]) for site in sites),
            numbers=tuple(without_number(site.site)[1] for site in sites),
        )
        for sites in found.values()
    ]


def _reasons(group: _Group) -> Iterator[str]:
    """What the sites say, each sentence once with the range of its numbers; with their numbers where not all say it."""
    of_sites, own = zip(*(told_once([one.reason for one in assigned]) for assigned in group.assigned), strict=True)
    clauses = list(dict.fromkeys(len(told) for told in of_sites))
    for index in range(max(clauses)):
        having = [at for at, told in enumerate(of_sites) if index < len(told)]
        yield from _told(group, having, [of_sites[at][index] for at in having], "")
    for index, one in enumerate(group.assigned[0]):
        yield from _told(group, range(len(own)), [told[index] for told in own], one.role)


def _told(group: _Group, at: Sequence[int], sentences: Sequence[str], role: str) -> Iterator[str]:
    for sentence, which in merged(sentences):
        some = [group.numbers[at[place]] for place in which]
        whose = "" if len(some) == len(group.sites) else f"({ranges(some)})"
        head = " ".join(part for part in (role, whose) if part)
        yield from _wrapped(f"{head}: {sentence}" if head else sentence, "    ")


def _summary(plan: Plan) -> Iterator[str]:
    found = plan.predicted
    what = "Precision plan" if plan.kind == "planned" else "Uniform recipe"
    yield (
        f"{what} for {plan.model} on {plan.hardware}: {100 * found.share_8bit:.1f}% of matrix FLOPs in 8 "
        f"bits, {100 * found.share_16bit:.1f}% in at most 16"
    )
    limit = "" if plan.tolerance is None else f" (tolerance {plan.tolerance:.1e})"
    lost = "unknown" if found.lost_batch_share is None else f"{100 * found.lost_batch_share:.2g}%"
    most = "" if plan.max_lost_batch is None else f" (at most {100 * plan.max_lost_batch:.2g}%)"
    yield f"  predicted loss {_damage(found)}{limit}"
    yield (
        f"  batch lost to noise {lost}{most}; weights and saved activations {_bytes(found.memory_bytes_before)} → "
        f"{_bytes(found.memory_bytes)}"
    )
    yield f"  loss scaling {plan.loss_scaling.kind}; master weights {plan.master_weights}"
    if found.speedup is not None:
        slower = " (casts cost more than they gain at these sizes: see the notes)" if found.speedup < 1 else ""
        yield f"  matrix products {found.speedup:.2f} times as fast{slower}"
    if found.optimal is False:
        yield "  the solver stopped before it could prove that no plan within the limits has more in 8 bits"


def _damage(found: Predicted) -> str:
    """The total, and where it lies with 95% probability."""
    if found.damage is None:
        return "unknown"
    if found.damage_interval is None:
        error = "" if found.damage_se is None else f" ± {found.damage_se:.1e}"
        return f"{found.damage:+.1e}{error}"
    lower, upper = found.damage_interval
    return f"{found.damage:+.1e}" if upper == 0 else f"{found.damage:+.1e}, 95% between {lower:.1e} and {upper:.1e}"


def _table(plan: Plan, groups: Sequence[_Group]) -> Iterator[str]:
    total = plan.predicted.flops
    yield f"{'site':<{_SITE_WIDTH}} {'FLOPs':>6}  casts"
    for group in groups:
        flops = sum(site.flops for site in group.sites)
        share = f"{100 * flops / total:.1f}%" if total else "-"
        head = f"{_fitted(group.name):<{_SITE_WIDTH}} {share:>6}  "
        yield from _hanging(head, _cells(group.assigned[0]))


def _cells(assigned: Sequence[Assignment]) -> str:
    return " · ".join(
        f"{one.role} {'as is' if one.cast == KEEP else briefest_cast(Cast.parse(one.cast))}" for one in assigned
    )


def _hanging(head: str, body: str) -> list[str]:
    return textwrap.wrap(
        body,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _wrapped(line: str, indent: str) -> list[str]:
    return textwrap.wrap(
        line,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _fitted(name: str) -> str:
    """The name, its middle left out where it is too long for the table; the reasons have it whole."""
    if len(name) <= _SITE_WIDTH:
        return name
    half = (_SITE_WIDTH - 1) // 2
    return f"{name[: _SITE_WIDTH - 1 - half]}…{name[-half:]}"


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
