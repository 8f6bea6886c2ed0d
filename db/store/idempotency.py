"""Idempotency keys: reserved before a request is worked on, answered in the very transaction of its effect.

So there is no moment at which the effect is stored and the answer is not. A request that fails frees its key:
it had no effect, and the client may try again.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from sqlalchemy import delete
from sqlalchemy.orm import Session

from db.tables import IdempotencyKey
from db.types import now

KEEP = timedelta(hours=24)  # ours; long enough for any client's retries


@dataclass(frozen=True)
class Answer:
    """A response to give again."""

    status: int
    headers: dict[str, str]
    body: bytes


def reserve(session: Session, key: str, fingerprint: str) -> Answer | Literal["reserved", "busy", "differs"]:
    """Take the key for a request. Or why not: its answer, it is under way, or it is another request's."""
    session.execute(
        delete(IdempotencyKey).where(IdempotencyKey.created_at < now() - KEEP, IdempotencyKey.status.is_not(None))
    )
    row = session.get(IdempotencyKey, key)
    if row is None:
        session.add(IdempotencyKey(key=key, fingerprint=fingerprint, created_at=now()))
        session.flush()
        return "reserved"
    if row.fingerprint != fingerprint:
        return "differs"
    if row.status is None:
        return "busy"
    return Answer(row.status, dict(row.headers or {}), row.body or b"")


def answer(session: Session, key: str, given: Answer) -> None:
    """Keep the answer to the key's request."""
    row = session.get(IdempotencyKey, key)
    assert row is not None
    row.status, row.headers, row.body = given.status, dict(given.headers), given.body
    session.flush()


def free(session: Session, key: str) -> None:
    """Let go of a key whose request had no effect."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.key == key, IdempotencyKey.status.is_(None)))


def free_abandoned(session: Session) -> None:
    """Let go of every key under way: only right when the server starts, since its requests died with it."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.status.is_(None)))
