"""`advisor probe`: record a window of a model's training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import numbers_text, options, output


def probe(
    model: options.Model,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps to record.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Ordinary training steps before them.")] = 50,
    every: Annotated[int, typer.Option(min=1, help="Record each k-th step.")] = 1,
    curvature_steps: Annotated[int, typer.Option(min=0, help="Steps with a curvature pass; 0: none.")] = 2,
    cast: Annotated[
        list[str] | None,
        typer.Option(help="A cast to score by direct products, e.g. e4m3fn. May be repeated; default: the usual."),
    ] = None,
    finer: Annotated[
        list[str] | None,
        typer.Option(help="Scales by row or block to sketch for, e.g. block16/nvfp4. May be repeated."),
    ] = None,
    overhead: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the time that watching may take; default: all it takes."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the model's own.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the window file here.", show_default=False)
    ] = None,
    detach: options.Detach = False,
    url: options.Url = options.DEFAULT_URL,
    as_json: options.Json = False,
) -> None:
    """Train the model for a while and record a window of it: every tensor that enters a matrix product."""
    from advisor.cli.progress import follow
    from advisor.client import connect

    if detach and out is not None:
        raise typer.BadParameter("with --detach there is no window yet to write", param_hint="--output")
    if out is not None:
        output.check_place(out)
    with connect(url) as client:
        opened = client.probe(
            model,
            steps=steps,
            warmup=warmup,
            every=every,
            curvature_steps=curvature_steps,
            casts=cast,
            finer=finer,
            overhead=overhead,
            seed=seed,
        )
        if detach:
            if as_json:
                output.print_json(opened)
            else:
                output.console().print(f"started {opened['job']['id']}, which records {opened['window']['id']}")
            return
        follow(client, opened["job"]["id"], quiet=as_json)
        window = client.window(opened["window"]["id"])
        severe = [] if as_json else list(client.findings(window["id"], severe=True))
        if out is not None:
            out.write_bytes(client.download(window["id"]))
    if as_json:
        output.print_json(window)
        return
    console = output.console()
    console.print(
        f"{window['id']}: {len(window['steps'])} steps, {window['sites']} sites, "
        f"{numbers_text.share(window['coverage']['share'])} of the matrix FLOPs seen, "
        f"{window['bytes_stored'] / 1e3:,.0f} kB stored"
    )
    for note in window["notes"]:
        console.print(f"note: {note}")
    for sentence in _failures(severe):
        console.print(f"a usual recipe would fail here: {sentence}")
    if out is not None:
        console.print(f"written to {out}")
    console.print(f"next: advisor plan {model}")


def _failures(findings: list[dict[str, Any]]) -> list[str]:
    from advisor.diagnosis.findings import Finding, worst_of_each_cause

    return worst_of_each_cause(map(Finding.from_dict, findings))
