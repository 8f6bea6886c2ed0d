"""`advisor plan`: a precision plan from a model's recorded windows."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options, output
from advisor.cli.tables import plan_lines, plan_text


def _share_below_one(value: float | None) -> float | None:
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"{value:g} is not in the range 0<=x<1.")
    return value


def _number(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


class Objective(StrEnum):
    """What a plan is best at."""

    share_8bit = "share_8bit"
    time = "time"
    memory = "memory"
    damage = "damage"


def _budget(given: list[str] | None) -> dict[str, float] | None:
    """NAME=NUMBER pairs; the service says which names there are."""
    found = {}
    for name, text in options.pairs(given, "--budget").items():
        try:
            found[name] = float(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is no number.", param_hint="--budget") from error
    return found or None


def plan(
    model: options.Model,
    hardware: Annotated[str, typer.Option(help="What it will run on; GET /v1/hardware lists them.")] = "h100",
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0,
            callback=_number,
            help="Rise of the loss that is allowed; default: 0.1% of the mean loss.",
            show_default=False,
        ),
    ] = None,
    max_lost_batch: Annotated[
        float | None,
        typer.Option(
            callback=_share_below_one,
            help="Share of the batch that may be lost to rounding noise: 0 or more, below 1; default: 0.02.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        list[str] | None, typer.Option(help="Window id. May be repeated; default: the latest.", show_default=False)
    ] = None,
    cast: Annotated[
        list[str] | None, typer.Option(help="Candidate cast. May be repeated; default: the usual.", show_default=False)
    ] = None,
    objective: Annotated[
        Objective, typer.Option(help="What the plan is best at; damage: the least, within a budget.")
    ] = Objective.share_8bit,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="What it must reach: share_8bit=0.8, time_s=0.02 or memory_bytes=2e9. May be repeated.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Glob of modules or sites that stay as they are. May be repeated.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Glob of those that may be touched. May be repeated.", show_default=False),
    ] = None,
    first_last: Annotated[
        int | None,
        typer.Option(min=0, help="So many sites at the beginning and the end stay as they are.", show_default=False),
    ] = None,
    uniform_roles: Annotated[
        bool, typer.Option("--uniform-roles", help="One cast a role at every site that is cast.", show_default=False)
    ] = False,
    native_only: Annotated[
        bool,
        typer.Option("--native-only", help="8 bits only where native kernels run the whole site.", show_default=False),
    ] = False,
    master_weights: Annotated[
        str | None, typer.Option(help="as-is, auto or a cast such as bf16; default: as-is.", show_default=False)
    ] = None,
    optimizer_state: Annotated[
        str | None, typer.Option(help="as-is, auto or a cast such as bf16; default: as-is.", show_default=False)
    ] = None,
    uniform: Annotated[
        list[str] | None,
        typer.Option(
            help="The same recipe everywhere: ROLE=CAST, e.g. input=int8. May be repeated.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the plan file here.", show_default=False)
    ] = None,
    url: options.Url = options.DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Make a plan: a format for every tensor of every matrix product, with the reasons."""
    from advisor.client import connect

    asked: dict[str, Any] = {
        "hardware": hardware,
        "tolerance": tolerance,
        "windows": window,
        "casts": cast,
    }
    # What is not given is not sent: the service has the same defaults, and refuses demands beside a recipe.
    demands = {
        "max_lost_batch": max_lost_batch,
        "objective": None if objective is Objective.share_8bit else objective.value,
        "budget": _budget(budget),
        "keep": keep,
        "only": only,
        "first_last": first_last,
        "uniform_roles": uniform_roles or None,
        "native_only": native_only or None,
        "master_weights": master_weights,
        "optimizer_state": optimizer_state,
    }
    asked |= {name: value for name, value in demands.items() if value is not None}
    if recipe := options.pairs(uniform, "--uniform"):
        asked["uniform"] = recipe
    if out is not None:
        output.check_place(out)
    with connect(url) as client:
        made = client.plan(model, **asked)
    if out is not None:
        write_plan(made["plan"], out)
    if as_json:
        output.print_json(made)
        return
    console = output.console()
    console.print(plan_text(made["plan"], console.width))
    for line in plan_lines(made["plan"]):
        console.print(line)
    for note in made["plan"].get("notes", []):
        console.print(f"note: {note}")
    if out is not None:
        console.print(f"written to {out}: advisor.load_plan({str(out)!r}) reads it")
    console.print(f"next: advisor train {made['id']}")


def write_plan(plan: dict[str, Any], path: Path) -> None:
    """The plan as a plan file, checked on the way. Raises InvalidPlan, OSError."""
    from advisor.plan import Plan

    Plan.from_dict(plan, source="the service's plan").save(path)
