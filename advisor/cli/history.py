"""`advisor history`: one tensor, step by step, in any cast."""

from __future__ import annotations

from typing import Annotated

import typer

from advisor.cli import options, output
from advisor.cli.tables import history_table
from advisor.errors import ServiceError

METRICS = ("underflow", "overflow", "sqnr_db", "amax")


def history(
    model: options.Model,
    site: Annotated[str, typer.Argument(help="Name of a site; `advisor show MODEL` lists them.", show_default=False)],
    role: Annotated[str, typer.Argument(help="Tensor of the site: input, weight, grad_output, …")] = "input",
    cast: Annotated[str, typer.Option(help="Any cast, scored before or not.")] = "e4m3fn",
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metric to show. May be repeated; default: " + ", ".join(METRICS) + ".", show_default=False),
    ] = None,
    window: Annotated[str | None, typer.Option(help="Window id; default: the latest.", show_default=False)] = None,
    url: options.Url = options.DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Show what a cast would have done to one tensor at every recorded step."""
    from advisor.client import connect

    with connect(url) as client:
        found = client.history(model, site, role, cast, metrics=metric, window=window)
    if as_json:
        output.print_json(found)
        return
    shown = metric or [name for name in METRICS if name in found["metrics"]]
    missing = [name for name in shown if name not in found["metrics"]]
    if missing:
        raise ServiceError(f"no metric {missing[0]!r}; there are: {', '.join(found['metrics'])}")
    console = output.console()
    console.print(f"{found['site']} {found['role']} as {found['cast']}, window {found['window']}")
    console.print(history_table(found, shown))
    for flag in found.get("flags", []):
        console.print(f"flag: {flag}")
