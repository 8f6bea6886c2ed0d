"""Idempotency-Key on every POST: the same request again gets the same answer again, and has no second effect.

    with once:                                  # reserves the key, or answers: 409 under way, 422 another
    request's with services.database.writing() as session: … return once.answer(session, 201, view, location)
    # kept in the very transaction of the effect

A request that fails frees its key. Without the header all of this does nothing.
"""

import hashlib
from types import TracebackType
from typing import Annotated

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from api.bodies import require_json
from api.context import Services, ServicesDep
from api.problems import Refusal
from db.store import idempotency

REPLAYED = "Idempotent-Replayed"

KeyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        description="any text, new for each new request; a repeat with it has no second effect",
    ),
]


class Replay(Exception):
    """Carries the stored answer out of the route."""

    def __init__(self, answer: idempotency.Answer) -> None:
        super().__init__()
        self.answer = answer


class Once:
    """One POST and its key."""

    def __init__(self, services: Services, key: str | None, fingerprint: str) -> None:
        self.services = services
        self.key = key
        self.fingerprint = fingerprint
        self.answered = False

    def __enter__(self) -> "Once":
        if self.key is None:
            return self
        with self.services.database.writing() as session:
            found = idempotency.reserve(session, self.key, self.fingerprint)
        if isinstance(found, idempotency.Answer):
            raise Replay(found)
        if found == "differs":
            raise Refusal(
                422,
                f"the Idempotency-Key {self.key!r} was sent with another request; use a new key for this one",
            )
        if found == "busy":
            detail = f"the request with the Idempotency-Key {self.key!r} is under way; repeat it in a moment"
            raise Refusal(409, detail, headers={"Retry-After": "1"})
        return self

    def answer(self, session: Session, status: int, view: BaseModel, location: str) -> Response:
        """The response, kept under the key in this session's transaction."""
        body = view.model_dump_json().encode()
        headers = {"Location": location, "Content-Type": "application/json"}
        if self.key is not None:
            idempotency.answer(session, self.key, idempotency.Answer(status, headers, body))
        self.answered = True
        return Response(body, status, headers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.key is not None and (error is not None or not self.answered):
            with self.services.database.writing() as session:
                idempotency.free(session, self.key)


def replayed(_request: Request, error: Exception) -> Response:
    """The stored answer, marked as such."""
    assert isinstance(error, Replay)
    given = error.answer
    return Response(given.body, given.status, {**given.headers, REPLAYED: "true"})


async def once(request: Request, services: ServicesDep, key: KeyHeader = None) -> Once:
    """The Once of a request whose body is JSON. Refuses (415, 422) another body before its schema is asked."""
    await require_json(request)
    return Once(services, key, fingerprint(request, hashlib.sha256(await request.body()).digest()))


def fingerprint(request: Request, body_digest: bytes) -> str:
    """What makes two requests the same: method, path, query and the SHA-256 of the body."""
    digest = hashlib.sha256(f"{request.method} {request.url.path}?{request.url.query}\n".encode())
    digest.update(body_digest)
    return digest.hexdigest()


OnceDep = Annotated[Once, Depends(once)]
