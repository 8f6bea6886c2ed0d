"""`advisor worker`: one more worker process on a service's database."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from advisor.cli import options, output
from advisor.cli.serve import settings_of
from advisor.errors import ServiceError

AsJson = Annotated[
    bool, typer.Option("--json", help='Print {"worker": its process id, "data_dir": …} on stdout, on one line.')
]


def worker(data_dir: options.DataDir = Path("advisor-data"), as_json: AsJson = False) -> None:
    """Carry out the jobs of the service that has this data directory. Ctrl-C stops it."""
    from api.jobs.worker import SchemaMismatch, work

    settings = settings_of(data_dir=data_dir)
    if as_json:
        output.print_json_line({"worker": os.getpid(), "data_dir": str(settings.data_dir.resolve())})
    try:
        work(settings)
    except SchemaMismatch as error:
        raise ServiceError(str(error)) from error
