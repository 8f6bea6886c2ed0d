"""A plan as text for a terminal of 100 columns: a summary, a table by site, then the reasons."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from advisor.castnames import KEEP, short_cast
from advisor.clauses import told_once
from advisor.plan import Assignment, Plan, PlannedSite
from probes.casts import Cast

WIDTH = 100
_SITE_WIDTH = 34


def text(plan: Plan) -> str:
    """The whole plan, lines of at most 100 columns (but for names that are longer themselves)."""
    casts: dict[str, list[Assignment]] = {site.site: [] for site in plan.sites}
    for one in plan.assignments:
        casts[one.site].append(one)
    lines = [*_summary(plan), "", *_table(plan, casts), "", "Reasons"]
    for site in plan.sites:
        lines.append(f"  {site.site}")
        of_site, own = told_once([one.reason for one in casts[site.site]])
        for clause in of_site:
            lines += _wrapped(clause, "    ")
        for one, reason in zip(casts[site.site], own, strict=True):
            lines += _wrapped(f"{one.role}: {reason}", "    ")
    if len(plan.front) > 1:
        lines += ["", "Tolerance → damage, 8-bit share"]
        lines += [
            f"  {point.tolerance:.1e} → {point.damage:+.1e} loss, {100 * point.share_8bit:.1f}%" for point in plan.front
        ]
    for title, told in (("Notes", plan.notes), ("Approximate", plan.approximations)):
        lines += ["", title, *(line for note in told for line in _wrapped(f"- {note}", "  "))]
    return "\n".join(lines)


def _summary(plan: Plan) -> Iterator[str]:
    found = plan.predicted
    what = "Precision plan" if plan.kind == "planned" else "Uniform recipe"
    yield (
        f"{what} for {plan.model} on {plan.hardware}: {100 * found.share_8bit:.1f}% of matrix FLOPs in 8 "
        f"bits, {100 * found.share_16bit:.1f}% in at most 16"
    )
    damage = "unknown" if found.damage is None else f"{found.damage:+.1e}"
    error = "" if found.damage_se is None else f" ± {found.damage_se:.1e}"
    limit = "" if plan.tolerance is None else f" (tolerance {plan.tolerance:.1e})"
    lost = "unknown" if found.lost_batch_share is None else f"{100 * found.lost_batch_share:.2g}%"
    most = "" if plan.max_lost_batch is None else f" (at most {100 * plan.max_lost_batch:.2g}%)"
    yield f"  predicted loss {damage}{error}{limit}; batch lost to noise {lost}{most}"
    yield (
        f"  weights and saved activations {_bytes(found.memory_bytes_before)} → {_bytes(found.memory_bytes)};"
        f" loss scaling {plan.loss_scaling.kind}; master weights {plan.master_weights}"
    )
    if found.optimal is False:
        yield "  the solver stopped before it could prove that no plan within the limits has more in 8 bits"


def _table(plan: Plan, casts: dict[str, list[Assignment]]) -> Iterator[str]:
    total = plan.predicted.flops
    yield f"{'site':<{_SITE_WIDTH}} {'FLOPs':>6}  casts"
    for site in plan.sites:
        share = f"{100 * site.flops / total:.1f}%" if total else "-"
        head = f"{_fitted(site.site):<{_SITE_WIDTH}} {share:>6}  "
        yield from _hanging(head, _cells(site, casts[site.site]))


def _cells(site: PlannedSite, assigned: Sequence[Assignment]) -> str:
    return " · ".join(
        f"{one.role} {'as is' if one.cast == KEEP else short_cast(Cast.parse(one.cast))}" for one in assigned
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
