"""`advisor show`: what a plan file, a window file, or anything in the service holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advisor.cli import numbers_text, options, output, tables
from advisor.errors import ServiceError

if TYPE_CHECKING:
    from rich.console import Console

    from advisor.client import Client


def show(
    what: Annotated[
        str,
        typer.Argument(
            help="A plan file (.json), a window file (.safetensors), a model's name, or an id: mdl_… win_… pln_… "
            "run_… job_…",
            show_default=False,
        ),
    ],
    url: options.Url = options.DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Show a plan file, a window file, or a model, window, plan, run or job of the service."""
    console = output.console()
    path = Path(what)
    if path.suffix == ".json":
        _show_plan(_plan_in(path), console, as_json)
    elif path.suffix == ".safetensors":
        _show_window_file(path, console, as_json)
    else:
        from advisor.client import connect

        with connect(url) as client:
            kind, found = _find(client, what)
            if as_json:
                output.print_json(found)
                return
            _show_found(client, kind, found, console)


def _plan_in(path: Path) -> dict[str, Any]:
    from advisor.plan import load_plan

    return load_plan(path).model_dump(mode="python", by_alias=True)


def _show_plan(plan: dict[str, Any], console: Console, as_json: bool) -> None:
    if as_json:
        output.print_json(plan)
        return
    console.print(tables.plan_text(plan, console.width))
    for line in tables.plan_lines(plan):
        console.print(line)
    for note in plan.get("notes", []):
        console.print(f"note: {note}")


def _show_window_file(path: Path, console: Console, as_json: bool) -> None:
    from probes import load_window

    window = load_window(path)
    if as_json:
        output.print_json(window.header())
        return
    console.print(f"{path}: {window.model_name}, {len(window.steps)} steps, {len(window.slots)} tensors")
    console.print(f"matrix FLOPs seen: {numbers_text.share(window.coverage.share)}")
    for unseen in window.coverage.unseen:
        console.print(f"not seen: {', '.join(f'{name} {value}' for name, value in unseen.items())}")
    for note in window.notes:
        console.print(f"note: {note}")
    total = sum(site.flops for site in window.sites) or 1.0
    console.print(
        tables.sites_table(
            {
                "site": site.name,
                "op": site.op,
                "roles": site.roles,
                "shapes": site.shapes,
                "share_of_flops": site.flops / total,
            }
            for site in window.sites
        )
    )


def _find(client: Client, what: str) -> tuple[str, dict[str, Any]]:
    """What an id names, and its kind; whatever does not look like one of our ids is a model's name or id."""
    calls = {"win": client.window, "pln": client.saved_plan, "run": client.saved_run, "job": client.job}
    kind = options.kind_of_id(what)
    if kind in calls:
        return kind, calls[kind](what)
    model = client.find_model(what)
    if model is None:
        raise ServiceError(options.nothing_named(what))
    return "mdl", model


def _show_found(client: Client, kind: str, found: dict[str, Any], console: Console) -> None:
    if kind == "pln":
        _show_plan(found["plan"], console, as_json=False)
    elif kind == "run":
        console.print(f"{found['id']}: {found['state']}, {found['steps']} steps with {found['plan_id']}")
        for line in tables.verdict_lines(found):
            console.print(line)
    elif kind == "win":
        console.print(f"{found['id']}: {found['state']}, {len(found['steps'])} steps, {found['sites']} sites")
        if found["coverage"]:
            console.print(f"matrix FLOPs seen: {numbers_text.share(found['coverage']['share'])}")
        for note in found["notes"]:
            console.print(f"note: {note}")
    elif kind == "job":
        console.print(f"{found['id']}: {found['kind']} of {found['target']}, {found['state']}")
        if found.get("error"):
            console.print(f"{found['error']['title']}: {found['error']['detail']}")
    else:
        _show_model(client, found, console)


def _show_model(client: Client, model: dict[str, Any], console: Console) -> None:
    size = "" if model["parameters"] is None else f", {numbers_text.count(model['parameters'])} parameters"
    console.print(f"{model['name']} ({model['id']}): {model['family'] or model['kind']}{size}")
    windows = list(client.windows(model["id"]))
    for window in windows:
        console.print(f"{window['id']}: {window['state']}, {len(window['steps'])} steps")
    for plan in client.plans(model["id"]):
        console.print(f"{plan['id']}: {numbers_text.share(plan['plan']['predicted']['share_8bit'])} of FLOPs in 8 bits")
    if any(window["state"] == "recorded" for window in windows):
        console.print(tables.sites_table(client.layers(model["id"])))
