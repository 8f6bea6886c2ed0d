"""Scores: what each candidate cast would do to each slot."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

import advisor
from advisor import Cast
from api.context import ServicesDep
from api.pages import Cursor, ManyLimit, encode, offset_of
from api.problems import Refusal
from api.routes.selection import WindowQuery, no_slot, recorded_window
from api.schemas import ScorePage, ScoreRow
from probes.numbers import plain

router = APIRouter(tags=["scores"])


@router.get("/models/{model_id}/scores")
def scores(
    model_id: str,
    services: ServicesDep,
    window_id: WindowQuery = None,
    cast: Annotated[list[str] | None, Query(description="repeatable; default: the usual candidates")] = None,
    site: str | None = None,
    role: str | None = None,
    cursor: Cursor = None,
    limit: ManyLimit = 1_000,
) -> ScorePage:
    """Every slot's metrics and predicted damage for every candidate cast, pooled over the window."""
    casts = None if cast is None else tuple(dict.fromkeys(str(Cast.parse(text)) for text in cast))
    with services.database.reading() as session:
        chosen = recorded_window(session, model_id, window_id).id
    entry = services.windows.get(chosen)
    wanted = [slot for slot in entry.window.slots if site in (None, slot.site) and role in (None, slot.role)]
    if not wanted and (site, role) != (None, None):
        raise Refusal(404, no_slot(site, role, entry.window.slots))

    def compute() -> list[dict[str, Any]]:
        parsed = None if casts is None else [Cast.parse(text) for text in casts]
        rows: list[dict[str, Any]] = advisor.score(entry.window, casts=parsed).rows
        return rows

    rows = [
        row
        for row in entry.rows(casts, compute)
        if (site is None or row["site"] == site) and (role is None or row["role"] == role)
    ]
    listed = "|".join([chosen, *(casts or ()), site or "", role or ""])
    start = offset_of(cursor, listed)
    end = start + limit
    return ScorePage(
        window=chosen,
        # Columns that the schema does not name are to have the words for non-finite numbers too.
        items=[ScoreRow.model_validate(plain(row)) for row in rows[start:end]],
        next=encode([listed, end]) if end < len(rows) else None,
    )
