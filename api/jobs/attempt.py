"""One attempt at a job, as its process sees it: every write is fenced by the attempt, in the same transaction.

A process whose lease ran out, so that another attempt took over, gets StaleAttempt at its next write and has
changed nothing. A cancel that was asked for shows at the next step, as Canceled.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy.orm import Session

from api.jobs.pace import Pace
from db.session import Database
from db.store import events, jobs
from db.tables import Job


class Canceled(Exception):
    """The job was asked to stop."""


class Attempt:
    """Events, checks and the end of one attempt."""

    def __init__(self, database: Database, job_id: str, number: int) -> None:
        self.database = database
        self.job_id = job_id
        self.number = number

    def job(self) -> Job:
        """The job's row. Raises StaleAttempt."""
        with self.database.writing() as session:
            return jobs.fence(session, self.job_id, self.number)

    def step(self, phase: str, step: int, steps: int, loss: float | None, pace: Pace) -> None:
        """Say that a step is done. A step said before is not said again. Raises Canceled, StaleAttempt."""
        data = {"phase": phase, "step": step, "steps": steps, "loss": loss, **pace.step(phase, step)}
        with self.database.writing() as session:
            job = self._fence(session)
            events.add_step(session, job.id, self.number, phase=phase, step=step, loss=loss, data=data)

    def check(self) -> None:
        """Raises Canceled, StaleAttempt."""
        with self.database.writing() as session:
            self._fence(session)

    def write(self, store: Callable[[Session], None]) -> None:
        """Store something on the way, under the fence. Raises Canceled, StaleAttempt."""
        with self.database.writing() as session:
            self._fence(session)
            store(session)

    def log(self, message: str) -> None:
        """Say something in words."""
        with self.database.writing() as session:
            jobs.fence(session, self.job_id, self.number)
            events.add(session, self.job_id, self.number, "log", {"message": message})

    def succeed(self, store: Callable[[Session], None]) -> None:
        """Store the result and end the job, in one transaction: there is one result, never half of one or two."""
        with self.database.writing() as session:
            job = self._fence(session)
            store(session)
            jobs.end(session, job, "succeeded")

    def fail(self, problem: dict[str, Any]) -> None:
        """End the job with an error that running it again would not cure."""
        with self.database.writing() as session:
            jobs.end(session, jobs.fence(session, self.job_id, self.number), "failed", problem)

    def cancel(self) -> None:
        """End the job as its client wished."""
        with self.database.writing() as session:
            jobs.end(session, jobs.fence(session, self.job_id, self.number), "canceled")

    def _fence(self, session: Session) -> Job:
        job = jobs.fence(session, self.job_id, self.number)
        if job.cancel_requested_at is not None:
            raise Canceled
        return job
