"""Tables of layers, plans and verdicts, at 100 columns and readable without colour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from advisor.clauses import told_once
from advisor.cli.numbers_text import count, decibels, loss, share, short_cast

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from advisor.cli.curves import Curve

# What is printed in bold: ours, where a format starts to be doubtful.
MUCH_UNDERFLOW = 0.01
LITTLE_SQNR_DB = 20.0


def plain_table(*columns: str, right: int = 0, **options: Any) -> Table:
    """A plain table; the last `right` columns are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), **options)
    for index, name in enumerate(columns):
        is_number = index >= len(columns) - right
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number)
    return table


def layers_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Score rows as one line a tensor under its site, one column a cast: underflow and SQNR over the window."""
    casts = list(dict.fromkeys(row["cast"] for row in rows))
    table = plain_table("tensor", *(short_cast(cast) for cast in casts), right=len(casts))
    by_site: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        by_site.setdefault(row["site"], {}).setdefault(row["role"], {})[row["cast"]] = row
    for site, by_role in by_site.items():
        table.add_row(site)
        for role, scored in by_role.items():
            table.add_row(f"  {role}", *(_cell(scored[cast]) if cast in scored else "-" for cast in casts))
    return table


def worst_table(rows: Sequence[dict[str, Any]]) -> Table:
    """For each role and cast, the largest underflow and the smallest SQNR of all sites, and where they are."""
    table = plain_table("role", "cast", "underflow", "at", "SQNR, dB", "at ")
    table.columns[2].justify = table.columns[4].justify = "right"
    by_role: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        by_role.setdefault(row["role"], {}).setdefault(row["cast"], []).append(row)
    for role, by_cast in by_role.items():
        for index, (cast, inside) in enumerate(by_cast.items()):
            lost = max(inside, key=lambda row: _or(row["underflow"], -1.0))
            noisy = min(inside, key=lambda row: _or(row["sqnr_db"], math.inf))
            table.add_row(
                "" if index else role,
                short_cast(cast),
                share(lost["underflow"]),
                lost["site"] if lost["underflow"] else "",
                decibels(noisy["sqnr_db"]),
                noisy["site"],
                end_section=index == len(by_cast) - 1,
            )
    return table


def _or(value: float | None, instead: float) -> float:
    return instead if value is None or math.isnan(value) else value


def _cell(row: dict[str, Any]) -> Any:
    from rich.text import Text

    doubtful = _or(row["underflow"], 0.0) > MUCH_UNDERFLOW or _or(row["sqnr_db"], math.inf) < LITTLE_SQNR_DB
    return Text(f"{share(row['underflow'])} {decibels(row['sqnr_db']):>3}", style="bold red" if doubtful else "")


def plan_text(plan: dict[str, Any], width: int) -> Text:
    """Every choice of a plan with its reason, under its site, in lines of at most `width` columns.

    What the reasons of several roles say of the whole site stands once, below the site's name.
    """
    from rich.text import Text

    flops = {site["site"]: site["flops"] for site in plan["sites"]}
    by_site: dict[str, list[dict[str, Any]]] = {site: [] for site in flops}
    for one in plan["assignments"]:
        by_site[one["site"]].append(one)
    total = sum(flops.values()) or 1.0
    roles = max((len(one["role"]) for one in plan["assignments"]), default=0)
    text = Text()
    for site, assigned in by_site.items():
        text.append(site, style="bold")
        text.append(f"  {share(flops[site] / total)} of FLOPs\n")
        of_site, own = told_once([one["reason"] for one in assigned])
        for clause in of_site:
            text.append(_hanging("  ", clause, width))
        for one, reason in zip(assigned, own, strict=True):
            text.append(_hanging(f"  {one['role']:<{roles}}  ", reason, width))
    return text


def _hanging(head: str, body: str, width: int) -> str:
    import textwrap

    rest = " " * len(head)
    told = textwrap.wrap(body, width, initial_indent=head, subsequent_indent=rest, break_on_hyphens=False)
    return "\n".join(told) + "\n"


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What a plan as a whole predicts, a line each."""
    predicted = plan["predicted"]
    lines = [f"8-bit share of matrix FLOPs   {share(predicted['share_8bit'])}"]
    if predicted.get("damage") is not None:
        limit = plan.get("tolerance")
        within = "" if limit is None else f"   (tolerance {limit:.2g})"
        ends = predicted.get("damage_interval")
        between = "" if ends is None else f", 95% between {_end(ends[0])} and {_end(ends[1])}"
        lines.append(f"predicted rise of the loss    {predicted['damage']:+.2g}{between}{within}")
    if predicted.get("lost_batch_share") is not None:
        limit = plan.get("max_lost_batch")
        within = "" if limit is None else f"   (limit {share(limit)})"
        lines.append(f"batch lost to rounding noise  {share(predicted['lost_batch_share'])}{within}")
    before, after = predicted.get("memory_bytes_before"), predicted.get("memory_bytes")
    if before and after is not None:
        lines.append(f"weights and activations       {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB")
    lines.append(f"hardware                      {plan['hardware']}")
    lines += plan.get("summary") or []
    lines += [f"watch {one['sentence']}" for one in plan.get("watch") or []]
    return lines


def _end(value: float | str) -> str:
    """An end of an interval; the service writes an infinite one as a string."""
    return value if isinstance(value, str) else f"{value:.2g}"


def cast_counts(plan: dict[str, Any]) -> Table:
    """How many slots of each role got which cast."""
    counts: dict[str, dict[str, int]] = {}
    for one in plan["assignments"]:
        of_role = counts.setdefault(one["role"], {})
        of_role[short_cast(one["cast"])] = of_role.get(short_cast(one["cast"]), 0) + 1
    casts = sorted({cast for of_role in counts.values() for cast in of_role})
    table = plain_table("role", *casts, right=len(casts))
    for role, of_role in counts.items():
        table.add_row(role, *(str(of_role.get(cast, "")) for cast in casts))
    return table


def sites_table(sites: Iterable[dict[str, Any]]) -> Table:
    """Sites with the shapes of their tensors and their share of all matrix FLOPs."""
    table = plain_table("site", "op", "role", "shape", "of FLOPs")
    table.columns[4].justify = "right"
    for site in sites:
        for index, role in enumerate(site["roles"]):
            shape = "×".join(str(side) for side in site["shapes"].get(role, []))
            first = ("" if index else site["site"], "" if index else site["op"])
            table.add_row(*first, role, shape, "" if index else share(site["share_of_flops"]))
    return table


def history_table(history: dict[str, Any], metrics: Sequence[str]) -> Table:
    """A line a step; each metric as a number with a bar over its own range."""
    from advisor.cli.curves import bar

    table = plain_table("step", *metrics)
    columns = [history["metrics"][metric] for metric in metrics]
    ranges = [_bar_range(metric, values) for metric, values in zip(metrics, columns, strict=True)]
    width = max(6, 60 // max(len(metrics), 1) - 10)
    for index, step in enumerate(history["steps"]):
        cells = []
        for metric, values, (low, high) in zip(metrics, columns, ranges, strict=True):
            cells.append(f"{_metric(metric, values[index]):>9} {bar(values[index], low, high, width)}")
        table.add_row(str(step), *cells)
    return table


def _bar_range(metric: str, values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return 0.0, 1.0
    return min(0.0, *finite, 0.0), max(finite)


def _metric(metric: str, value: float) -> str:
    if metric in ("underflow", "subnormal", "overflow"):
        return share(value)
    if metric.endswith("_db"):
        return f"{value:.1f}" if math.isfinite(value) else decibels(value)
    return f"{value:.4g}"


def verdict_lines(run: dict[str, Any]) -> list[str]:
    """What a run showed, a line each."""
    verdict = run.get("verdict")
    if verdict is None:
        return ["there is no verdict yet"]
    lines = [verdict["summary"]] if verdict.get("summary") else []
    if verdict.get("baseline_loss") is not None:
        lines.append(f"held-out loss, baseline       {loss(verdict['baseline_loss'])}")
    if verdict.get("plan_loss") is not None:
        lines.append(f"held-out loss, with the plan  {loss(verdict['plan_loss'])}")
    if verdict.get("gap") is not None:
        low, high = verdict.get("gap_interval") or (None, None)
        interval = "" if low is None else f"   (95% interval {loss(low, signed=True)} to {loss(high, signed=True)})"
        lines.append(f"gap                           {loss(verdict['gap'], signed=True)}{interval}")
    if verdict.get("share_8bit") is not None:
        lines.append(f"8-bit share of matrix FLOPs   {share(verdict['share_8bit'])}")
    return lines


def applied_line(applied: Sequence[dict[str, Any]]) -> str:
    """How the casts were carried out, in one line."""
    ways: dict[str, int] = {}
    for row in applied:
        if row["count"]:
            ways[row["how"]] = ways.get(row["how"], 0) + row["count"]
    told = ", ".join(f"{count(number)} {how}" for how, number in sorted(ways.items()))
    idle = sum(not row["count"] for row in applied)
    return f"casts carried out: {told or 'none'}" + (f"; {idle} slots never" if idle else "")


def curves_table(curves: Sequence[Curve]) -> Table:
    """Mean losses at the start, around the quarters and at the end of the training, a column a curve."""
    steps = [step for curve in curves for step, _ in curve.points]
    first, last = min(steps, default=0), max(steps, default=0)
    reach = max(last // 20, 1)
    table = plain_table("loss at steps", *(curve.title for curve in curves), right=len(curves))
    for quarter in range(5):
        middle = first + (last - first) * quarter // 4
        lower, upper = (first, first) if quarter == 0 else (max(middle - reach, first), min(middle + reach, last))
        cells = []
        for curve in curves:
            inside = [value for step, value in curve.points if lower <= step <= upper]
            cells.append(loss(sum(inside) / len(inside)) if inside else "-")
        table.add_row(str(lower) if lower == upper else f"{lower}-{upper}", *cells)
    return table


def gaps_table(runs: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """The verdicts of several runs on one baseline, a row each."""
    table = plain_table("", "held-out loss", "gap to fp32", "95% interval", "8-bit share of FLOPs", right=4)
    first = runs[0][1]["verdict"]
    table.add_row("fp32 baseline", loss(first["baseline_loss"]), "", "", "0")
    for name, run in runs:
        verdict = run["verdict"]
        low, high = verdict["gap_interval"] or (None, None)
        interval = "-" if low is None else f"{loss(low, signed=True)} to {loss(high, signed=True)}"
        gap = loss(verdict["gap"], signed=True)
        table.add_row(name, loss(verdict["plan_loss"]), gap, interval, share(verdict["share_8bit"]))
    return table
