"""Options and arguments that several commands share."""

from __future__ import annotations

import re
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


def kind_of_id(text: str) -> str | None:
    """mdl, win, pln, run or job where the text looks like an id of the service; else None."""
    found = re.fullmatch(r"(mdl|win|pln|run|job)_[0-9a-f]{16}", text)
    return None if found is None else found.group(1)


def nothing_named(text: str) -> str:
    """What to say where no model has this name or id and it is no other id either."""
    return (
        f"nothing here is called {text!r}: no model has that name or id, and the ids of models, windows, plans, runs "
        "and jobs are mdl_, win_, pln_, run_ or job_ and 16 hexadecimal digits"
    )


def pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    """`["a=1", "b=2"]` as a dict. A usage error where one has no `=`."""
    found = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint=option)
        found[name] = value
    return found
