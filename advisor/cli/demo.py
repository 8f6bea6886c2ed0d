"""`advisor demo`: the whole job on this machine, over HTTP, with its claims checked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from advisor.cli import numbers_text, options, output, tables

if TYPE_CHECKING:
    from rich.console import Console

    from advisor.cli.service_process import ServiceProcess
    from advisor.client import Client

CASTS = ("e4m3fn", "e5m2", "int8", "fp16", "bf16")
# Formats alone are no recipe: both lack a scale, so int8 inputs lose all below 0.5 and e5m2 gradients below
# 2^-17.
BAD_RECIPE: Mapping[str, str] = MappingProxyType({"input": "int8/none", "grad_output": "e5m2/none"})


@dataclass(frozen=True)
class Show:
    """What one demo trains, and for how long. Sizes are ours, chosen for three minutes on two cores."""

    told: str
    description: Mapping[str, Any]
    warmup: int
    window_steps: int
    run_steps: int
    evaluate_batches: int = 16


SHOWS: Mapping[str, Show] = MappingProxyType(
    {
        "gpt": Show(
            "a small GPT on the text of Python's standard library",
            {
                "name": "demo-gpt",
                "family": "gpt",
                "config": {"layers": 2, "heads": 4, "width": 128, "context": 64},
                "data": {"set": "python-text"},
                "training": {"batch_size": 16},
            },
            warmup=30,
            window_steps=20,
            run_steps=150,
        ),
        "convnet": Show(
            "a small residual net on images of handwritten digits",
            {
                "name": "demo-convnet",
                "family": "convnet",
                "config": {"widths": [16, 32]},
                "data": {"set": "digits"},
                "training": {"batch_size": 32, "learning_rate": 0.001},
            },
            warmup=30,
            window_steps=20,
            run_steps=150,
        ),
    }
)


class Story:
    """What the demo tells, under headings that carry the time since it began."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._started = time.monotonic()

    @property
    def elapsed(self) -> str:
        return numbers_text.seconds(time.monotonic() - self._started)

    def step(self, name: str, told: str) -> None:
        from rich.text import Text

        self.console.print(Text.assemble("\n", (f"{self.elapsed} {name:<8}", "bold"), told))

    def say(self, told: str) -> None:
        self.console.print(f"     {told}")


def demo(
    model: Annotated[Literal["gpt", "convnet"], typer.Option(help="What to train.")] = "gpt",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service running afterwards.")] = False,
    as_json: options.Json = False,
) -> None:
    """Do the whole job here, in about two minutes: submit, probe, plan, train beside fp32, and compare.

    Starts a service of its own (temporary database, free port) and speaks only HTTP to it. Exit status 0
    only if what it claims came out so.
    """
    from advisor.cli import service_process
    from advisor.client import connect

    story = Story(output.console(error=as_json))
    show, console = SHOWS[model], story.console
    console.print(f"Numerics Advisor: {show.told}, start to verdict, over HTTP")
    with service_process.running(keep) as service, connect(service.url) as client:
        story.step("service", "starting (a process of its own, an empty SQLite database)")
        service.wait_until_ready(client)
        story.say(f"ready at {service.url}")
        result = _job(client, show, story)
        failed = _conclude(result, service, story, keep)
        console.print(f"\n{story.elapsed} in all")
    if as_json:
        output.print_json(result)
    if failed:
        typer.echo(f"advisor: the demo's claim does not hold: {'; '.join(failed)}", err=True)
        raise typer.Exit(1)


def _job(client: Client, show: Show, story: Story) -> dict[str, Any]:
    """From submission to verdicts; everything that was measured."""
    from advisor.cli.progress import follow

    console = story.console
    story.step("model", show.told)
    model = client.submit(dict(show.description))
    story.say(f"{model['name']}: {numbers_text.count(model['parameters'])} parameters")

    story.step("probe", f"{show.window_steps} steps of real training, recorded after {show.warmup} ordinary ones")
    opened = client.probe(model["id"], steps=show.window_steps, warmup=show.warmup)
    follow(client, opened["job"]["id"], where=console)
    window = client.window(opened["window"]["id"])
    story.say(
        f"{window['sites']} matrix products, {window['slots']} tensors, "
        f"{numbers_text.share(window['coverage']['share'])} of the matrix FLOPs seen, "
        f"{window['bytes_stored'] / 1e3:,.0f} kB stored",
    )
    scores = client.scores(model["id"], cast=list(CASTS), window=window["id"])
    console.print("\nUnderflow (share of the non-zero elements) and SQNR in dB, for each tensor if it were cast to")
    console.print(tables.layers_table(scores))
    console.print("The worst of each role over all layers: most underflow, least SQNR, and where")
    console.print(tables.worst_table(scores))

    story.step("plan", "a format for every tensor, with the reason")
    plan = client.plan(model["id"])
    console.print(tables.plan_text(plan["plan"], min(console.width, 100)))
    for line in tables.plan_lines(plan["plan"]):
        story.say(line)

    story.step("train", f"{show.run_steps} steps with the plan, beside the fp32 baseline")
    asked = {"steps": show.run_steps, "evaluate_batches": show.evaluate_batches}
    run = client.run(plan["id"], **asked)
    follow(client, run["job"]["id"], where=console)

    story.step("compare", "the same with a deliberately bad recipe: " + _recipe(BAD_RECIPE))
    bad_plan = client.plan(model["id"], uniform=dict(BAD_RECIPE))
    bad_run = client.run(bad_plan["id"], **asked, baseline_run=run["run"]["id"])
    follow(client, bad_run["job"]["id"], where=console, names={"plan": "training, bad recipe"})
    return {
        "model": model,
        "window": window,
        "scores": scores,
        "plan": plan,
        "run": client.saved_run(run["run"]["id"]),
        "bad_plan": bad_plan,
        "bad_run": client.saved_run(bad_run["run"]["id"]),
    }


def _conclude(result: dict[str, Any], service: ServiceProcess, story: Story, keep: bool) -> list[str]:
    """Curves, gaps and claims; adds the claims to the result and returns those that do not hold."""
    from advisor.cli.curves import Curve, panels
    from advisor.cli.demo_claims import claims

    console = story.console
    run, bad_run = result["run"], result["bad_run"]
    curves = [
        Curve(title, [(point["step"], point["loss"]) for point in points], style)
        for title, points, style in (
            ("fp32 baseline", run["curves"]["baseline"], "cyan"),
            ("the plan", run["curves"]["plan"], "green"),
            ("the bad recipe", bad_run["curves"]["plan"], "red"),
        )
    ]
    story.step("result", "training loss by step")
    console.print(panels(curves, min(console.width, 100)))
    console.print(tables.curves_table(curves))
    console.print(tables.gaps_table([("the plan", run), ("the bad recipe", bad_run)]))
    story.say(tables.applied_line(run["applied"]))
    console.print()
    checked = claims(run, bad_run, result["window"])
    for claim in checked:
        console.print(f"  [{'ok' if claim.holds else 'FAILED'}] {claim.said}", style="" if claim.holds else "bold red")
    result["claims"] = [{"claim": claim.said, "holds": claim.holds} for claim in checked]
    console.print()
    if keep:
        result["service"] = {
            "url": service.url,
            "process_id": service.process.pid,
            "folder": str(service.folder),
        }
        console.print(f"The service goes on at {service.url}; its API docs: {service.url}/docs")
        console.print(f"Stop it with: kill {service.process.pid}; its files are in {service.folder}")
    else:
        console.print("To open the API's docs: `advisor serve`, then http://127.0.0.1:8000/docs in a browser,")
        console.print("or `advisor demo --keep`, which leaves this service running and says where.")
    return [claim.said for claim in checked if not claim.holds]


def _recipe(recipe: Mapping[str, str]) -> str:
    return ", ".join(f"{role} in {cast}" for role, cast in recipe.items())
