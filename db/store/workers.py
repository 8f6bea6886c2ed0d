"""Workers: who is alive."""

import os
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from db.ids import new_id
from db.tables import Worker
from db.types import now

FORGET_AFTER = timedelta(hours=1)


def add(session: Session) -> str:
    """Register this process as a worker; forgets those that have been silent for long. Returns its id."""
    moment = now()
    session.execute(delete(Worker).where(Worker.heartbeat_at < moment - FORGET_AFTER))
    worker = Worker(id=new_id("wrk"), pid=os.getpid(), started_at=moment, heartbeat_at=moment)
    session.add(worker)
    session.flush()
    return worker.id


def beat(session: Session, worker_id: str) -> None:
    """Say that the worker is alive."""
    worker = session.get(Worker, worker_id)
    if worker is not None:
        worker.heartbeat_at = now()
        session.flush()


def remove(session: Session, worker_id: str) -> None:
    """Take an orderly leave."""
    session.execute(delete(Worker).where(Worker.id == worker_id))


def last_heartbeat(session: Session) -> datetime | None:
    """The newest heartbeat of any worker; None if none is registered."""
    return session.scalar(select(func.max(Worker.heartbeat_at)))
