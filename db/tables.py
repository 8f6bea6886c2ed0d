"""The tables. Migrations create them (db/migrations); a test holds the two equal.

A model owns everything below it: deleting it deletes its windows, sketches, plans, runs, jobs and events.
What can be derived is not stored: a window's or a run's state is its job's, a curve is its job's step events.
"""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import CheckConstraint, ForeignKey, Index, LargeBinary, MetaData, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from db.types import Json, Number, Time


class Table(DeclarativeBase):
    # Every constraint has a name, so that a later migration can drop it.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {
        str: Text,
        bytes: LargeBinary,
        datetime: Time,
        float: Number,
        dict[str, Any]: Json,
        list[Any]: Json,
    }


class Model(Table):
    __tablename__ = "models"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]  # architecture, external
    spec: Mapped[dict[str, Any] | None]  # family, config, data, training; None for an external model
    parameters: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(index=True)


class Window(Table):
    """A window; `recorded_at` is null until its sketches are all stored, in the same transaction."""

    __tablename__ = "windows"
    __table_args__ = (Index(None, "model_id", "created_at"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    request: Mapped[dict[str, Any] | None]  # None where the window was pushed
    summary: Mapped[dict[str, Any] | None]  # what a list of windows shows, without the header
    header: Mapped[bytes | None] = mapped_column(deferred=True)  # all but the sketches, compressed
    checkpoint: Mapped[str | None]  # file with the training's state at the window's first step, in the data folder
    created_at: Mapped[datetime]
    recorded_at: Mapped[datetime | None]


class Sketch(Table):
    """One slot's history, all its steps in one compressed payload: a layer's history is one short read."""

    __tablename__ = "sketches"

    window_id: Mapped[str] = mapped_column(ForeignKey("windows.id", ondelete="CASCADE"), primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int]  # the slot's place in its window
    payload: Mapped[bytes]


class Plan(Table):
    __tablename__ = "plans"
    __table_args__ = (Index(None, "model_id", "created_at"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"))
    windows: Mapped[list[Any]]
    request: Mapped[dict[str, Any]]
    plan: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]


class Run(Table):
    """A run; `evaluations` holds the held-out losses of each arm as soon as the arm is through."""

    __tablename__ = "runs"

    id: Mapped[str] = mapped_column(primary_key=True)
    plan_id: Mapped[str] = mapped_column(ForeignKey("plans.id", ondelete="CASCADE"), index=True)
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"), index=True)
    request: Mapped[dict[str, Any]]
    evaluations: Mapped[dict[str, Any]]
    verdict: Mapped[dict[str, Any] | None]
    applied: Mapped[list[Any] | None]
    created_at: Mapped[datetime]


class Job(Table):
    """The only truth about a job. `attempt` fences its processes, `crashes` counts the ones that died."""

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint("(window_id IS NULL) <> (run_id IS NULL)", name="one_target"),
        CheckConstraint("state IN ('queued','running','succeeded','failed','canceled')", name="state"),
        Index(None, "state", "created_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str]  # window, run
    state: Mapped[str]
    model_id: Mapped[str] = mapped_column(ForeignKey("models.id", ondelete="CASCADE"), index=True)
    window_id: Mapped[str | None] = mapped_column(ForeignKey("windows.id", ondelete="CASCADE"), unique=True)
    run_id: Mapped[str | None] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), unique=True)
    attempt: Mapped[int]
    crashes: Mapped[int]
    cancel_requested_at: Mapped[datetime | None]
    worker: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]


class Event(Table):
    """What a job said. `seq` rises by one within a job; a step of a phase is there once, rerun or not."""

    __tablename__ = "events"
    # Phase and step are NULL in events that are not steps, and NULLs never collide.
    __table_args__ = (UniqueConstraint("job_id", "phase", "step"),)

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    kind: Mapped[str]  # state, step, log
    phase: Mapped[str | None]
    step: Mapped[int | None]
    loss: Mapped[float | None]
    data: Mapped[dict[str, Any]]
    at: Mapped[datetime]


class IdempotencyKey(Table):
    """A key a client sent; `status` is null while its first request is under way."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    status: Mapped[int | None]
    headers: Mapped[dict[str, Any] | None]
    body: Mapped[bytes | None]
    created_at: Mapped[datetime] = mapped_column(index=True)


class Worker(Table):
    """A worker process; alive while its heartbeat is fresh."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    pid: Mapped[int]
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime] = mapped_column(index=True)
