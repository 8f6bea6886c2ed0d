"""`advisor export`: a plan as files for another library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from advisor.cli import options, output


def _target(value: str) -> str:
    from advisor.exports import TARGETS

    if value not in TARGETS:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(TARGETS)}.")
    return value


def export(
    plan: Annotated[str, typer.Argument(help="A plan file (.json), or a plan's id: pln_…", show_default=False)],
    target: Annotated[
        str,
        typer.Option(
            callback=_target, help="torchao, transformer-engine, deepspeed, megatron, accelerate or lightning."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for the files; default: one with the target's name."),
    ] = None,
    url: options.Url = options.DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Write a plan as files for another library, with a check to run there, and say what it cannot do of the plan."""
    import dataclasses

    from advisor.exports import export as exported
    from advisor.plan import Plan, load_plan

    if Path(plan).suffix == ".json":
        chosen = load_plan(plan)
    else:
        from advisor.client import connect

        with connect(url) as client:
            chosen = Plan.from_dict(client.saved_plan(plan)["plan"], source=plan)
    made = exported(chosen, target)
    paths = made.save(Path(target) if out is None else out)
    if as_json:
        output.print_json({**dataclasses.asdict(made), "written": [str(path) for path in paths]})
        return
    console = output.console()
    for path in paths:
        console.print(f"written: {path}")
    console.print(f"\n{made.use}")
    if not made.cannot:
        console.print(f"{target} does all of the plan.")
        return
    console.print(f"{len(made.cannot)} parts of the plan are not done by {target}:")
    for sentence in made.cannot:
        console.print(f"- {sentence}")
