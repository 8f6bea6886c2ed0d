"""Windows and their sketches."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, undefer

from db.errors import NotFound
from db.ids import new_id
from db.store.pages import After, page
from db.tables import Sketch, Window
from db.types import now


@dataclass(frozen=True)
class PackedSketch:
    """One slot's history as bytes."""

    site: str
    role: str
    payload: bytes


@dataclass(frozen=True)
class Stored:
    """What a window's sketches take: `sketch_bytes` over `slots` payloads, and the header's bytes."""

    slots: int
    sketch_bytes: int
    header_bytes: int


def add(session: Session, *, model_id: str, request: dict[str, Any] | None) -> Window:
    """A window with nothing recorded yet."""
    window = Window(
        id=new_id("win"),
        model_id=model_id,
        request=request,
        summary=None,
        header=None,
        checkpoint=None,
        created_at=now(),
        recorded_at=None,
    )
    session.add(window)
    session.flush()
    return window


def record(
    session: Session,
    window_id: str,
    *,
    summary: dict[str, Any],
    header: bytes,
    sketches: Iterable[PackedSketch],
    checkpoint: str | None,
) -> None:
    """Store all that was recorded. Raises NotFound if the window is gone or has been recorded before."""
    recorded = session.scalar(
        update(Window)
        .where(Window.id == window_id, Window.recorded_at.is_(None))
        .values(summary=summary, header=zlib.compress(header), checkpoint=checkpoint, recorded_at=now())
        .returning(Window.id)
    )
    if recorded is None:
        raise NotFound(f"there is no window {window_id!r} that waits to be recorded")
    session.add_all(
        Sketch(window_id=window_id, site=s.site, role=s.role, position=position, payload=s.payload)
        for position, s in enumerate(sketches)
    )
    session.flush()


def get(session: Session, window_id: str) -> Window:
    """The window of that id. Raises NotFound."""
    window = session.get(Window, window_id)
    if window is None:
        raise NotFound(f"there is no window {window_id!r}; GET /v1/models/{{id}}/windows lists a model's")
    return window


def latest_recorded(session: Session, model_id: str) -> Window | None:
    """The model's window that was recorded last; None if there is none."""
    return session.scalar(
        select(Window)
        .where(Window.model_id == model_id, Window.recorded_at.is_not(None))
        .order_by(Window.recorded_at.desc(), Window.id.desc())
        .limit(1)
    )


def listed(session: Session, model_id: str, after: After | None, limit: int) -> tuple[list[Window], After | None]:
    """A page of a model's windows, newest first."""
    return page(session, select(Window).where(Window.model_id == model_id), Window, after, limit)


def header(session: Session, window_id: str) -> bytes:
    """The header as it was given to `record`. Raises NotFound if nothing is recorded."""
    window = session.get(Window, window_id, options=[undefer(Window.header)])
    if window is None or window.header is None:
        raise NotFound(f"nothing is recorded in window {window_id!r}; wait for its job to succeed")
    return zlib.decompress(window.header)


def sketches(session: Session, window_id: str) -> list[PackedSketch]:
    """All sketches of a window, in the order of its slots."""
    rows = session.execute(
        select(Sketch.site, Sketch.role, Sketch.payload).where(Sketch.window_id == window_id).order_by(Sketch.position)
    )
    return [PackedSketch(*row) for row in rows]


def sketch(session: Session, window_id: str, site: str, role: str) -> bytes | None:
    """One slot's payload, by its primary key; None if the window has no such slot."""
    return session.scalar(
        select(Sketch.payload).where(Sketch.window_id == window_id, Sketch.site == site, Sketch.role == role)
    )


def slots(session: Session, window_id: str) -> list[tuple[str, str]]:
    """The (site, role) pairs of a window, in order."""
    rows = session.execute(
        select(Sketch.site, Sketch.role).where(Sketch.window_id == window_id).order_by(Sketch.position)
    )
    return [(site, role) for site, role in rows]


def stored(session: Session, window_ids: Iterable[str]) -> dict[str, Stored]:
    """What each window takes; windows with nothing recorded are left out."""
    rows = session.execute(
        select(
            Window.id,
            func.count(Sketch.site),
            func.coalesce(func.sum(func.length(Sketch.payload)), 0),
            func.length(Window.header),
        )
        .join(Sketch, Sketch.window_id == Window.id, isouter=True)
        .where(Window.id.in_(list(window_ids)), Window.recorded_at.is_not(None))
        .group_by(Window.id)
    )
    return {row[0]: Stored(slots=row[1], sketch_bytes=row[2], header_bytes=row[3]) for row in rows}
