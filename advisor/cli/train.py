"""`advisor train`: train with a plan, beside the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from advisor.cli import options, output
from advisor.cli.tables import applied_line, verdict_lines
from advisor.errors import ServiceError

if TYPE_CHECKING:
    from advisor.client import Client


def train(
    what: Annotated[
        str, typer.Argument(help="Id of a plan, or a model's name or id: its latest plan.", show_default=False)
    ],
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each side.")] = 200,
    baseline: Annotated[bool, typer.Option(help="Train the fp32 baseline beside it.")] = True,
    baseline_run: Annotated[
        str | None, typer.Option(help="Run whose baseline is used again: same start, seed, steps.", show_default=False)
    ] = None,
    window: Annotated[
        str | None, typer.Option(help="Start from this window's checkpoint; default: from scratch.", show_default=False)
    ] = None,
    evaluate_batches: Annotated[int, typer.Option(min=2, help="Held-out batches of the verdict.")] = 8,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the model's own.", show_default=False)] = None,
    detach: options.Detach = False,
    url: options.Url = options.DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Train with a plan beside its fp32 baseline, from the same start and with the same data, and compare."""
    from advisor.cli.curves import Curve, panels
    from advisor.cli.progress import follow
    from advisor.client import connect

    with connect(url) as client:
        plan = plan_of(client, what)
        started = client.run(
            plan,
            steps=steps,
            seed=seed,
            baseline=baseline,
            baseline_run=baseline_run,
            start_window=window,
            evaluate_batches=evaluate_batches,
        )
        if detach:
            if as_json:
                output.print_json(started)
            else:
                output.console().print(f"started {started['job']['id']}, the job of {started['run']['id']} with {plan}")
            return
        follow(client, started["job"]["id"], quiet=as_json)
        run = client.saved_run(started["run"]["id"])
    if as_json:
        output.print_json(run)
        return
    console = output.console()
    curves = [
        Curve(name, [(point["step"], point["loss"]) for point in run["curves"][name]])
        for name in ("baseline", "plan")
        if run["curves"].get(name)
    ]
    console.print(panels(curves, min(console.width, 100)))
    console.print()
    for line in [*verdict_lines(run), applied_line(run["applied"])]:
        console.print(line)
    console.print(f"run {run['id']}, with the plan {plan}")


def plan_of(client: Client, what: str) -> str:
    """The id of the plan that `what` names: itself, or a model's latest. Raises ServiceError."""
    if options.kind_of_id(what) == "pln":
        return what
    model = client.find_model(what)
    if model is None:
        raise ServiceError(options.nothing_named(what))
    latest = client.latest_plan(model["id"])
    if latest is None:
        raise ServiceError(f"the model {model['name']!r} has no plan yet: `advisor plan {what}` makes one")
    return str(latest["id"])
