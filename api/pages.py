"""Cursors: opaque to clients, who send back what they got."""

import base64
import json
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import Query

from api.problems import Refusal

Cursor = Annotated[str | None, Query(description="`next` of the page before")]
Limit = Annotated[int, Query(ge=1, le=200, description="most items of a page")]
ManyLimit = Annotated[int, Query(ge=1, le=5_000, description="most items of a page")]

After = tuple[datetime, str]


def encode(place: list[Any]) -> str:
    """A cursor for a place."""
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode().rstrip("=")


def decode(cursor: str) -> list[Any]:
    """The place of a cursor. Raises Refusal (422) for anything this service did not write."""
    try:
        place = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _refused(cursor) from error
    if not isinstance(place, list):
        raise _refused(cursor)
    return place


def after_of(cursor: str | None) -> After | None:
    """The place in a list of rows, newest first."""
    if cursor is None:
        return None
    place = decode(cursor)
    try:
        moment, row_id = place
        moment = datetime.fromisoformat(moment)
        in_utc = moment.astimezone(UTC)  # out of range at the edges of the calendar
    except (TypeError, ValueError, OverflowError) as error:
        raise _refused(cursor) from error
    if moment.tzinfo is None or not isinstance(row_id, str) or not row_id.isascii():
        raise _refused(cursor)
    return in_utc, row_id


def next_of(after: After | None) -> str | None:
    """The cursor of the next page."""
    return None if after is None else encode([after[0].isoformat(), after[1]])


def offset_of(cursor: str | None, of: str) -> int:
    """The place in a computed list; `of` names the list, so that a cursor of another one is refused."""
    if cursor is None:
        return 0
    place = decode(cursor)
    if len(place) != 2 or place[0] != of or not isinstance(place[1], int) or place[1] < 0:
        raise _refused(cursor)
    return place[1]


def _refused(cursor: str) -> Refusal:
    return Refusal(422, f"the cursor {cursor[:80]!r} is not from this list; leave it out to start anew")
