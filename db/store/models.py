"""Models: submitted, found by id or name, listed, deleted with everything they own."""

from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from db.errors import NameTaken, NotFound, StillRunning
from db.ids import new_id
from db.store.pages import After, page
from db.tables import Job, Model
from db.types import now


def add(session: Session, *, name: str, kind: str, spec: dict[str, Any] | None, parameters: int | None) -> Model:
    """A new model. Raises NameTaken."""
    if session.scalar(select(Model.id).where(Model.name == name)) is not None:
        raise NameTaken(f"a model named {name!r} exists; choose another name, or delete that one first")
    model = Model(id=new_id("mdl"), name=name, kind=kind, spec=spec, parameters=parameters, created_at=now())
    session.add(model)
    session.flush()
    return model


def get(session: Session, id_or_name: str) -> Model:
    """The model of that id or name. Raises NotFound."""
    model = find(session, id_or_name)
    if model is None:
        raise NotFound(f"there is no model with the id or name {id_or_name!r}; GET /v1/models lists them")
    return model


def find(session: Session, id_or_name: str) -> Model | None:
    """The model of that id or name; None if there is none."""
    return session.scalar(select(Model).where(or_(Model.id == id_or_name, Model.name == id_or_name)))


def listed(session: Session, after: After | None, limit: int) -> tuple[list[Model], After | None]:
    """A page of models, newest first."""
    return page(session, select(Model), Model, after, limit)


def delete(session: Session, model: Model) -> None:
    """Delete the model and all it owns. Raises StillRunning while a job of it is not over."""
    open_job = session.scalar(
        select(Job.id).where(Job.model_id == model.id, Job.state.in_(["queued", "running"])).limit(1)
    )
    if open_job is not None:
        raise StillRunning(
            f"the job {open_job} of model {model.name!r} is not over; "
            f"cancel it with DELETE /v1/jobs/{open_job} and wait for its end"
        )
    session.delete(model)
    session.flush()
