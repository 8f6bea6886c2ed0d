"""The process of one attempt: `python -m api.jobs.execute JOB ATTEMPT PARENT_PID SETTINGS`.

It ends the job itself: succeeded, canceled, or failed with a problem that says what to do. If it dies
instead, by a signal or by the machine, the worker or the lease's end brings the job back.
"""

import json
import sys

import structlog

from advisor.errors import AdvisorError
from api import log
from api.jobs.attempt import Attempt, Canceled
from api.jobs.parent import die_with
from api.settings import Settings
from api.statuses import problem, problem_of
from db.errors import StaleAttempt
from db.session import Database
from probes.errors import ProbeError

STALE = 3  # exit status of an attempt that another one has replaced


def main(arguments: list[str]) -> int:
    """Carry out the attempt. The exit status is 0 if it brought the job to an end."""
    job_id, number, parent, settings_text = arguments
    die_with(int(parent))
    settings = Settings(**json.loads(settings_text))
    log.configure(settings.log_level)
    attempt = Attempt(Database(settings.url), job_id, int(number))
    try:
        see_through(attempt, settings)
    except StaleAttempt as error:
        structlog.get_logger("job").warning("attempt replaced", reason=str(error))
        return STALE
    return 0


def see_through(attempt: Attempt, settings: Settings) -> None:
    """Carry the job out and end it, one way or another. Raises StaleAttempt if another attempt owns it."""
    logger = structlog.get_logger("job").bind(job=attempt.job_id, attempt=attempt.number)
    try:
        _carry_out(attempt, settings)
    except Canceled:
        attempt.cancel()
    except StaleAttempt:
        raise
    except (AdvisorError, ProbeError) as error:
        logger.info("job failed", error=str(error), exc_info=error)
        attempt.fail(problem_of(error) or problem(422, str(error)))
    except Exception as error:  # whatever else a training can raise; running it again would raise it again
        logger.error("unexpected error", exc_info=error)
        detail = (
            f"the training stopped with an unexpected {type(error).__name__}; the worker's log has the details "
            f"under {attempt.job_id}, attempt {attempt.number}"
        )
        attempt.fail(problem(500, detail, title="The job stopped with an unexpected error"))


def _carry_out(attempt: Attempt, settings: Settings) -> None:
    # The training libraries take seconds to load: after the parent is watched, and inside what reports errors.
    from api.jobs import run, window

    carry_out = {"window": window.record, "run": run.train}
    carry_out[attempt.job().kind](attempt, settings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
