"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Url = Annotated[
    str,
    typer.Option("--url", envvar="ADVISOR_URL", help="Address of the service.", show_default=True),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")]
Detach = Annotated[bool, typer.Option("--detach", help="Start the job and return at once.")]
Model = Annotated[str, typer.Argument(help="Name or id of a model.", show_default=False)]
DataDir = Annotated[
    Path, typer.Option("--data-dir", envvar="ADVISOR_DATA_DIR", help="Where the database and checkpoints lie.")
]

DEFAULT_URL = "http://127.0.0.1:8000"


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """`["a=1", "b=2"]` as a dict. A usage error where one has no `=`."""
    found = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint=option)
        found[name] = value
    return found
