"""Jobs: queued, claimed under a lease, fenced by their attempt, over.

A claim raises `attempt` by one. Every write of a job's process goes through `fence`, in the same transaction:
it succeeds only while that attempt is the current one of a running job. So a process that outlived its lease
can still compute, but changes nothing.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session

from db.errors import NotFound, StaleAttempt
from db.ids import new_id
from db.store import events
from db.store.pages import After, page
from db.tables import Job
from db.types import now

TERMINAL = frozenset({"succeeded", "failed", "canceled"})

# Runs once a training step, so it is built once (see db.store.events).
_OWNED = (
    select(Job)
    .where(Job.id == bindparam("job_id"), Job.attempt == bindparam("attempt"), Job.state == "running")
    .with_for_update()
)


def add(session: Session, *, kind: str, model_id: str, window_id: str | None = None, run_id: str | None = None) -> Job:
    """A queued job for one window or one run."""
    job = Job(
        id=new_id("job"),
        kind=kind,
        state="queued",
        model_id=model_id,
        window_id=window_id,
        run_id=run_id,
        attempt=0,
        crashes=0,
        cancel_requested_at=None,
        worker=None,
        lease_expires_at=None,
        error=None,
        created_at=now(),
        started_at=None,
        finished_at=None,
    )
    session.add(job)
    session.flush()
    events.add(session, job.id, 0, "state", {"state": "queued"})
    return job


def get(session: Session, job_id: str) -> Job:
    """The job of that id. Raises NotFound."""
    job = session.get(Job, job_id)
    if job is None:
        raise NotFound(f"there is no job {job_id!r}; GET /v1/jobs lists them")
    return job


def find(session: Session, job_id: str) -> Job | None:
    """The job of that id; None if it, or the model that owns it, was deleted."""
    return session.get(Job, job_id)


def of_windows(session: Session, window_ids: Iterable[str]) -> dict[str, Job]:
    """The job of each window that has one."""
    jobs = session.scalars(select(Job).where(Job.window_id.in_(list(window_ids))))
    return {job.window_id: job for job in jobs if job.window_id is not None}


def of_run(session: Session, run_id: str) -> Job:
    """The job of a run. Raises NotFound."""
    job = session.scalar(select(Job).where(Job.run_id == run_id))
    if job is None:
        raise NotFound(f"there is no job of run {run_id!r}")
    return job


def listed(session: Session, after: After | None, limit: int) -> tuple[list[Job], After | None]:
    """A page of jobs, newest first."""
    return page(session, select(Job), Job, after, limit)


# What a worker does


def any_queued(session: Session) -> bool:
    """Whether a job waits; a cheap look before `claim`, which takes the write lock."""
    return session.scalar(select(Job.id).where(Job.state == "queued").limit(1)) is not None


def claim(session: Session, worker: str, lease: timedelta) -> Job | None:
    """The oldest queued job, now running under this worker's lease and a new attempt; None if none waits."""
    job = session.scalar(
        select(Job).where(Job.state == "queued").order_by(Job.created_at, Job.id).limit(1).with_for_update()
    )
    if job is None:
        return None
    moment = now()
    job.state, job.worker, job.attempt = "running", worker, job.attempt + 1
    job.lease_expires_at, job.started_at = moment + lease, job.started_at or moment
    events.add(session, job.id, job.attempt, "state", {"state": "running", "attempt": job.attempt})
    session.flush()
    return job


def renew(session: Session, job_id: str, attempt: int, lease: timedelta) -> datetime | None:
    """Put off the lease's end. Returns when a cancel was asked for, if so. Raises StaleAttempt."""
    job = fence(session, job_id, attempt)
    job.lease_expires_at = now() + lease
    session.flush()
    return job.cancel_requested_at


def expired(session: Session) -> list[Job]:
    """Running jobs whose lease is over: their worker died, or its machine did."""
    return list(session.scalars(select(Job).where(Job.state == "running", Job.lease_expires_at < now())))


def give_back(session: Session, job: Job, why: str, *, crashed: bool, most_crashes: int) -> None:
    """End an attempt that reached no end of its own: queue the job again, or fail or cancel it for good."""
    job.crashes += int(crashed)
    if job.cancel_requested_at is not None:
        end(session, job, "canceled")
    elif job.crashes >= most_crashes:
        detail = (
            f"{why}, and that was crash {job.crashes} of at most {most_crashes}; the job is not tried again. "
            "The worker's log says more. If the machine ran out of memory, make the model or the batch smaller."
        )
        end(session, job, "failed", {"title": "The job's process died", "status": 500, "detail": detail})
    else:
        job.state, job.worker, job.lease_expires_at = "queued", None, None
        events.add(session, job.id, job.attempt, "state", {"state": "queued", "reason": why})
        session.flush()


# What a job's process does


def fence(session: Session, job_id: str, attempt: int) -> Job:
    """The job, if this attempt still owns it. Raises StaleAttempt, which rolls the transaction back."""
    job = session.scalar(_OWNED, {"job_id": job_id, "attempt": attempt})
    if job is None:
        raise StaleAttempt(f"attempt {attempt} of job {job_id} is over; another attempt owns the job")
    return job


def end(session: Session, job: Job, state: str, error: dict[str, Any] | None = None) -> None:
    """Bring a job to a terminal state, with the event that says so."""
    assert state in TERMINAL
    job.state, job.error, job.finished_at = state, error, now()
    job.worker, job.lease_expires_at = None, None
    data: dict[str, Any] = {"state": state}
    if error is not None:
        data["error"] = error
    events.add(session, job.id, job.attempt, "state", data)
    session.flush()


# What a client does


def cancel(session: Session, job: Job) -> bool:
    """Ask a job to stop: at once if it only waits. False if it is over already."""
    if job.state in TERMINAL:
        return False
    if job.cancel_requested_at is None:
        job.cancel_requested_at = now()
        if job.state == "queued":
            end(session, job, "canceled")
    session.flush()
    return True
