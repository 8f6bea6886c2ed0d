"""The worker: claims a job, starts a process for it, keeps its lease alive, and looks what became of it.

One job at a time. Each attempt is a fresh process in a process group of its own: its memory is certainly
released, and everything it started can be killed with it. The worker says nothing to it and hears nothing
from it but its exit.

What can happen, and who mends it:
- the job's process dies: the worker gives the job back to the queue; after `most_crashes` it has failed.
- the worker dies: its job's process dies with it (parent.py), the lease runs out, the next worker gives the job back.
- the worker is stopped in an orderly way: it kills the process and gives the job back without counting a crash.
- the job is canceled and does not stop: the worker kills it after the grace period.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import structlog
from sqlalchemy.orm import Session

from api import log
from api.jobs.parent import die_with
from api.settings import Settings
from db import migrate
from db.errors import SchemaMismatch, StaleAttempt
from db.session import Database
from db.store import jobs, workers
from db.tables import Job
from db.types import now

__all__ = ["Left", "SchemaMismatch", "Worker", "kill_group", "main", "settings_text", "work"]

LOOK_S = 0.05  # how often a running process is looked at


@dataclass(frozen=True)
class Left:
    """How an attempt was left, in words; whether that counts as a crash of the job."""

    why: str
    crashed: bool


def work(settings: Settings, stopping: threading.Event | None = None) -> None:
    """Work until SIGTERM or SIGINT (or `stopping`).

    Raises SchemaMismatch if there is no database yet (none is created) or it is not upgraded.
    """
    log.configure(settings.log_level)
    database = migrate.opened(settings.url)
    stop = stopping or _stop_on_signals()
    with database.writing() as session:
        worker_id = workers.add(session)
    worker = Worker(settings, database, worker_id, stop)
    try:
        while not stop.is_set():
            worker.beat()
            worker.reclaim()
            if not worker.run_one():
                stop.wait(settings.poll_s)
    finally:
        with database.writing() as session:
            workers.remove(session, worker_id)
        database.close()


class Worker:
    """One worker process."""

    def __init__(self, settings: Settings, database: Database, worker_id: str, stop: threading.Event) -> None:
        self.settings = settings
        self.database = database
        self.id = worker_id
        self.stop = stop
        self.logger = structlog.get_logger("worker").bind(worker=worker_id)
        self._last_beat = 0.0

    def beat(self) -> None:
        """Say that the worker is alive, as often as the settings want."""
        if time.monotonic() - self._last_beat >= self.settings.heartbeat_s:
            with self.database.writing() as session:
                workers.beat(session, self.id)
            self._last_beat = time.monotonic()

    def reclaim(self) -> None:
        """Give back the jobs whose lease ran out."""
        with self.database.reading() as session:
            if not jobs.expired(session):
                return
        with self.database.writing() as session:
            given_back = jobs.expired(session)
            for job in given_back:
                self.logger.warning("lease ran out", job=job.id, attempt=job.attempt)
                self._give_back(session, job, Left("its worker died", crashed=True))
        for job in given_back:
            self._clean(job)

    def run_one(self) -> bool:
        """Claim a job and see it through. False if none waits."""
        with self.database.reading() as session:
            if not jobs.any_queued(session):
                return False
        with self.database.writing() as session:
            job = jobs.claim(session, self.id, self.settings.lease)
        if job is None:
            return False
        self.logger.info("job started", job=job.id, kind=job.kind, attempt=job.attempt)
        process = self._start(job)
        left = Left("the worker failed", crashed=True)
        try:
            left = self._watch(job, process)
        finally:
            kill_group(process)
            self.settle(job, left)
        return True

    def _start(self, job: Job) -> "subprocess.Popen[bytes]":
        arguments = [job.id, str(job.attempt), str(os.getpid()), settings_text(self.settings)]
        # -P: a folder `api` where the service was started must not stand in for ours.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "api.jobs.execute", *arguments],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _watch(self, job: Job, process: "subprocess.Popen[bytes]") -> Left:
        """Wait until the process has ended or must end; renew the lease meanwhile."""
        renewed = looked = time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return _left_with(process.wait(LOOK_S))
            if self.stop.is_set():
                return Left("the worker was stopped", crashed=False)
            moment = time.monotonic()
            if moment - looked >= self.settings.poll_s:
                looked = moment
                if self.overdue(job):
                    return Left("it did not stop when it was canceled", crashed=False)
            if moment - renewed >= self.settings.heartbeat_s:
                renewed = moment
                self.beat()
                try:
                    with self.database.writing() as session:
                        jobs.renew(session, job.id, job.attempt, self.settings.lease)
                except StaleAttempt:
                    # The process has ended the job and is about to exit, or another attempt owns the job.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(self.settings.cancel_grace_s)
                    return Left("another attempt owns the job", crashed=False)

    def overdue(self, job: Job) -> bool:
        """Whether the job was asked to stop longer ago than the grace period."""
        with self.database.reading() as session:
            row = jobs.find(session, job.id)
        if row is None or row.cancel_requested_at is None:
            return False
        return (now() - row.cancel_requested_at).total_seconds() > self.settings.cancel_grace_s

    def settle(self, job: Job, left: Left) -> None:
        """Give the job back if the attempt has not ended it."""
        with self.database.writing() as session:
            row = jobs.find(session, job.id)
            if row is None:  # its model was deleted as soon as it was over, with the files
                return
            if row.state == "running" and row.attempt == job.attempt:
                self._give_back(session, row, left)
        self.logger.info("attempt over", job=job.id, attempt=job.attempt, state=row.state, left=left.why)
        self._clean(row)

    def _give_back(self, session: Session, job: Job, left: Left) -> None:
        jobs.give_back(session, job, left.why, crashed=left.crashed, most_crashes=self.settings.most_crashes)

    def _clean(self, job: Job) -> None:
        """Remove what a job that is over no longer needs."""
        if job.state in jobs.TERMINAL:
            shutil.rmtree(self.settings.job_folder(job.id), ignore_errors=True)
        if job.state in ("failed", "canceled") and job.window_id is not None:
            shutil.rmtree(self.settings.window_folder(job.window_id), ignore_errors=True)


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill the process and everything in its group, if any of it is left."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def settings_text(settings: Settings) -> str:
    """The settings as an argument of a process."""
    return settings.model_dump_json()


def _left_with(status: int) -> Left:
    if status < 0:
        return Left(f"its process was killed by {signal.Signals(-status).name}", crashed=True)
    return Left(f"its process ended with status {status}", crashed=True)


def _stop_on_signals() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def main(arguments: list[str]) -> None:
    """The worker process of `advisor serve`: `python -m api.jobs.worker PARENT_PID SETTINGS`."""
    parent, settings = arguments
    die_with(int(parent), signal.SIGTERM)
    work(Settings(**json.loads(settings)))


if __name__ == "__main__":
    main(sys.argv[1:])
