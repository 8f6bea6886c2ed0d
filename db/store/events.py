"""Events of jobs. `seq` rises by one within a job; a step of a phase enters once, whoever repeats it."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import bindparam, func, insert, select
from sqlalchemy.orm import Session

from db.tables import Event
from db.types import now

# These run once a training step. Building a statement anew each time took longer than everything else about it.
_STEP = select(Event.seq).where(
    Event.job_id == bindparam("job_id"), Event.phase == bindparam("phase"), Event.step == bindparam("step")
)
_NEWEST = select(func.max(Event.seq)).where(Event.job_id == bindparam("job_id"))
_INSERT = insert(Event.__table__)  # type: ignore[arg-type] # declared as FromClause, is a Table


@dataclass(frozen=True)
class Point:
    """One step of a curve."""

    step: int
    loss: float


def add(session: Session, job_id: str, attempt: int, kind: str, data: dict[str, Any]) -> None:
    """An event that is not a step: "state" or "log"."""
    _insert(session, job_id, attempt, kind, data)


def add_step(
    session: Session,
    job_id: str,
    attempt: int,
    *,
    phase: str,
    step: int,
    loss: float | None,
    data: dict[str, Any],
) -> bool:
    """A step event; False, and nothing is added, if this step of this phase is there already."""
    if session.scalar(_STEP, {"job_id": job_id, "phase": phase, "step": step}) is not None:
        return False
    _insert(session, job_id, attempt, "step", data, phase=phase, step=step, loss=loss)
    return True


def after(session: Session, job_id: str, seq: int, limit: int) -> list[Event]:
    """Up to `limit` events with a higher seq, in order."""
    return list(
        session.scalars(select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq).limit(limit))
    )


def last_step(session: Session, job_id: str) -> Event | None:
    """The newest step event; None if the job has made no step."""
    return session.scalar(
        select(Event).where(Event.job_id == job_id, Event.kind == "step").order_by(Event.seq.desc()).limit(1)
    )


def curve(session: Session, job_id: str, phase: str) -> list[Point]:
    """Loss by step of one phase, each step once, in order."""
    rows = session.execute(
        select(Event.step, Event.loss)
        .where(Event.job_id == job_id, Event.phase == phase, Event.loss.is_not(None))
        .order_by(Event.step)
    )
    return [Point(step, loss) for step, loss in rows if step is not None and loss is not None]


def _insert(session: Session, job_id: str, attempt: int, kind: str, data: dict[str, Any], **columns: Any) -> None:
    newest = session.scalar(_NEWEST, {"job_id": job_id}) or 0
    values = {"job_id": job_id, "seq": newest + 1, "attempt": attempt, "kind": kind, "data": data, "at": now()}
    session.execute(_INSERT, {"phase": None, "step": None, "loss": None, **values, **columns})
