"""`advisor show`: what a plan file, a window file, or anything in the service holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from advisor.cli import numbers_text, options, output, tables
from advisor.errors import ServiceError

if TYPE_CHECKING:
    from rich.console import Console

    from advisor.client import Client


def show(
    what: Annotated[
        str | None,
        typer.Argument(
            help="A plan file (.json), a window file (.safetensors), a model's name, or an id: mdl_… win_… pln_… "
            "run_… job_…",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Another window file: show where the numerics of the two first differ.", show_default=False),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option(help="Also write a window file's statistics, a line a tensor and step.", show_default=False),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(help="Also write a TensorBoard event file of a window into this folder.", show_default=False),
    ] = None,
    self_check: Annotated[
        bool,
        typer.Option(
            "--self-check",
            help="Check the backward error on matrices of which it is known: int8 against e4m3fn, Student-t values.",
        ),
    ] = False,
    url: options.Url = options.DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Show a plan file, a window file, or a model, window, plan, run or job of the service."""
    console = output.console()
    if self_check:
        _check_itself(console, as_json)
        return
    if what is None:
        raise typer.BadParameter("name what to show: a file, a model or an id; or give --self-check")
    path, asked = Path(what), _Asked(against, parquet, tensorboard)
    if path.suffix != ".safetensors" and asked != _Asked():
        raise typer.BadParameter("--against, --parquet and --tensorboard are for window files (.safetensors)")
    if path.suffix == ".json":
        _show_plan(_plan_in(path), console, as_json)
    elif path.suffix == ".safetensors":
        _show_window_file(path, asked, console, as_json)
    else:
        from advisor.client import connect

        with connect(url) as client:
            kind, found = _find(client, what)
            if as_json:
                output.print_json(found)
                return
            _show_found(client, kind, found, console)


def _check_itself(console: Console, as_json: bool) -> None:
    """Exit status 1 where the measured errors are not those that are known."""
    import dataclasses

    from probes import self_check

    with console.status("multiplying matrices of Student-t values"):
        records = self_check.self_check()
    wrong = self_check.disagreements(records)
    if as_json:
        output.print_json({"records": [dataclasses.asdict(record) for record in records], "disagreements": wrong})
    else:
        for line in (*self_check.lines(records), *wrong):
            console.print(line, highlight=False)
        console.print("It disagrees with what is known." if wrong else "It agrees with what is known.")
    if wrong:
        raise typer.Exit(1)


class _Asked(NamedTuple):
    """What a window file is to be compared with and written to."""

    against: Path | None = None
    parquet: Path | None = None
    tensorboard: Path | None = None


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


def _show_window_file(path: Path, asked: _Asked, console: Console, as_json: bool) -> None:
    from advisor.cli.window_report import WindowReport, comparison_json, print_comparison
    from probes import load_window

    window = load_window(path)
    if asked.parquet is not None:
        window.to_parquet(asked.parquet)
    if asked.tensorboard is not None:
        window.to_tensorboard(asked.tensorboard)
    if asked.against is not None:
        from advisor.comparing import compare

        comparison = compare(window, load_window(asked.against))
        if as_json:
            output.print_json(comparison_json(comparison))
        else:
            console.print(f"{path} against {asked.against}, {len(comparison.steps)} common steps")
            print_comparison(console, comparison)
        return
    report = WindowReport(window)
    if as_json:
        output.print_json(report.to_json())
    else:
        report.print_on(console, str(path))
    for written in (asked.parquet, asked.tensorboard):
        if written is not None and not as_json:
            console.print(f"\nwritten: {written}")


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
