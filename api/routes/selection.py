"""Which window a question about a model means: the one it names, or the one recorded last. And which slots it has."""

import difflib
from collections.abc import Sequence
from typing import Annotated

from fastapi import Query
from sqlalchemy.orm import Session

from api.problems import Refusal
from db.store import models, windows
from db.tables import Model, Window

WindowQuery = Annotated[str | None, Query(alias="window", description="default: the one recorded last")]


def recorded_window(session: Session, model_id: str, window_id: str | None) -> Window:
    """A recorded window of that model. Raises NotFound, Refusal."""
    model = models.get(session, model_id)
    if window_id is None:
        return latest(session, model)
    return recorded(windows.get(session, window_id), model)


def latest(session: Session, model: Model) -> Window:
    """The model's window that was recorded last. Raises Refusal (409) if it has none."""
    window = windows.latest_recorded(session, model.id)
    if window is None:
        raise Refusal(
            409,
            f"the model {model.name!r} has no recorded window yet; POST /v1/models/{model.name}/windows opens "
            "one, or takes one that was recorded elsewhere",
        )
    return window


def recorded(window: Window, model: Model) -> Window:
    """The window, if it is the model's and recorded. Raises Refusal."""
    if window.model_id != model.id:
        raise Refusal(422, f"the window {window.id} is of another model than {model.name!r}")
    if window.recorded_at is None:
        raise Refusal(409, f"the window {window.id} is not recorded yet, or its job failed; see its job")
    return window


def no_slot(site: str | None, role: str | None, slots: Sequence[tuple[str, str]]) -> str:
    """The sentence for a site or role that is not among a window's slots: what there is near it."""
    if site is None:
        return f"no site has the role {role!r}; their roles: {', '.join(dict.fromkeys(r for _, r in slots))}"
    roles = [r for s, r in slots if s == site]
    if roles:
        return f"the site {site!r} has no role {role!r}; it has: {', '.join(roles)}"
    near = difflib.get_close_matches(site, sorted({s for s, _ in slots}), n=3, cutoff=0.4)
    return f"there is no site {site!r}; " + (f"near it: {', '.join(near)}" if near else "GET …/layers lists them")
