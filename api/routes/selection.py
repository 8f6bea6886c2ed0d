"""Which window a question about a model means: the one it names, or the one recorded last."""

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
