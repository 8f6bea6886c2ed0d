"""`advisor serve`: the HTTP service and its worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options, output
from advisor.errors import ServiceError

AsJson = Annotated[bool, typer.Option("--json", help='Print {"url": …} on stdout, on one line, as soon as it answers.')]


def serve(
    host: Annotated[
        str, typer.Option(envvar="ADVISOR_HOST", help="A loopback address; any other is refused.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="ADVISOR_PORT", min=0, max=65535, help="0: any free one.")] = 8000,
    data_dir: options.DataDir = Path("advisor-data"),
    as_json: AsJson = False,
) -> None:
    """Start the service and one worker. The API's docs are at /docs. Ctrl-C stops both."""
    from api.hosts import HostRefused
    from api.serve import serve as serve_until_stopped

    settings = settings_of(host=host, port=port, data_dir=data_dir)
    try:
        serve_until_stopped(settings, _announce_as_json if as_json else _announce)
    except HostRefused as error:
        raise ServiceError(str(error)) from error


def settings_of(**chosen: Any) -> Any:
    """The service's settings: what is chosen here, then the environment. Raises ServiceError on a bad value."""
    from pydantic import ValidationError

    from api.settings import Settings

    try:
        return Settings(**chosen)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ServiceError(f"the settings cannot be used: {faults}") from error


def _announce(url: str) -> None:
    typer.echo(f"Numerics Advisor answers at {url}; API docs: {url}/docs", err=True)


def _announce_as_json(url: str) -> None:
    output.print_json_line({"url": url})
