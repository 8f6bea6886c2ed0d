"""`advisor worker`: one more worker process on a service's database."""

from __future__ import annotations

from pathlib import Path

from advisor.cli import options
from advisor.cli.serve import settings_of
from advisor.errors import ServiceError


def worker(data_dir: options.DataDir = Path("advisor-data")) -> None:
    """Carry out the jobs of the service that has this data directory. Ctrl-C stops it."""
    from api.jobs.worker import work
    from api.statuses import problem_of

    settings = settings_of(data_dir=data_dir)
    try:
        work(settings)
    except Exception as error:
        known = problem_of(error)  # a database of another version, say
        if known is None:
            raise
        raise ServiceError(known["detail"]) from error
