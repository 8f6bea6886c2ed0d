"""A job's events as server-sent events that resume.

Events come from the database alone, so a stream can be picked up at any server and after any restart: `id` is
the event's seq, and a client that sends it back as Last-Event-ID gets what came after. The stream ends by
itself after the event of the job's end, when the job is deleted, or when the server stops.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from api.context import Services, ServicesDep
from api.problems import Refusal
from db.errors import NotFound
from db.store import events, jobs
from db.tables import Event
from probes.numbers import plain

router = APIRouter(prefix="/jobs", tags=["jobs"])

BATCH = 500  # events read at once
KEEP_ALIVE_S = 15.0  # below the 30 s after which proxies commonly close a silent connection


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}},
)
def stream(
    job_id: str,
    services: ServicesDep,
    last_event_id: Annotated[str | None, Header(description="the last id that was seen")] = None,
) -> StreamingResponse:
    """The job's events (state, step, log) as they come; all from the start without Last-Event-ID."""
    seen = last_event_id or "0"
    if not (seen.isascii() and seen.isdigit() and len(seen) <= 15):
        raise Refusal(422, f"the Last-Event-ID {seen[:40]!r} is none of this stream; leave it out to start anew")
    with services.database.reading() as session:
        jobs.get(session, job_id)
    return StreamingResponse(
        _stream(services, job_id, int(seen)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(services: Services, job_id: str, seen: int) -> AsyncIterator[str]:
    last_sent = time.monotonic()
    yield ": events of " + job_id + "\n\n"
    while not services.stopping.is_set():
        batch, over = await run_in_threadpool(_read, services, job_id, seen)
        for event in batch:
            yield _frame(event)
            seen, last_sent = event.seq, time.monotonic()
        if over and len(batch) < BATCH:
            return
        if not batch:
            if time.monotonic() - last_sent > KEEP_ALIVE_S:
                yield ": still here\n\n"
                last_sent = time.monotonic()
            await asyncio.sleep(services.settings.poll_s)


def _read(services: Services, job_id: str, seen: int) -> tuple[list[Event], bool]:
    """The next events, and whether the job was over in the same snapshot (then no more will come)."""
    with services.database.reading() as session:
        try:
            over = jobs.get(session, job_id).state in jobs.TERMINAL
        except NotFound:
            return [], True
        return events.after(session, job_id, seen, BATCH), over


def _frame(event: Event) -> str:
    data = {**plain(event.data), "at": event.at.isoformat()}
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {json.dumps(data, allow_nan=False)}\n\n"
