"""Keyset paging, newest first: a page goes on after the (created_at, id) of the last row before it."""

from datetime import datetime
from typing import Any

from sqlalchemy import Select, tuple_
from sqlalchemy.orm import Session

After = tuple[datetime, str]


def page(
    session: Session, query: Select[Any], table: Any, after: After | None, limit: int
) -> tuple[list[Any], After | None]:
    """At most `limit` rows of the table after that place, and where to go on (None: that was all)."""
    if after is not None:
        query = query.where(tuple_(table.created_at, table.id) < after)
    query = query.order_by(table.created_at.desc(), table.id.desc()).limit(limit + 1)
    rows = list(session.scalars(query))
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    return rows[:limit], (last.created_at, last.id)
