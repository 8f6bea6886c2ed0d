"""Models: submit, list, show, delete."""

import shutil
from typing import Annotated

from fastapi import APIRouter, Body, Response
from fastapi.openapi.models import Example
from sqlalchemy import select

from advisor.zoo.spec import ArchitectureSpec
from api.context import Services, ServicesDep
from api.idempotency import OnceDep
from api.pages import Cursor, Limit, after_of, next_of
from api.schemas import ArchitectureSubmission, ModelSubmission, ModelView, Page
from api.views import model_view
from db.store import models
from db.tables import Job, Window

router = APIRouter(prefix="/models", tags=["models"])

EXAMPLES: dict[str, Example] = {
    "a small GPT": {
        "value": {
            "name": "my-gpt",
            "kind": "architecture",
            "family": "gpt",
            "config": {"layers": 2, "heads": 4, "width": 64, "context": 64},
            "data": {"set": "python-text"},
            "training": {"batch_size": 16, "learning_rate": 0.003, "optimizer": "adamw", "seed": 0},
        }
    },
    "a convolutional net": {
        "value": {
            "name": "my-convnet",
            "kind": "architecture",
            "family": "convnet",
            "data": {"set": "digits"},
            "training": {"batch_size": 32, "learning_rate": 0.002},
        }
    },
    "a model that stays where it is": {"value": {"name": "their-model", "kind": "external"}},
}


@router.post("", status_code=201, response_model=ModelView)
def submit(
    submission: Annotated[ModelSubmission, Body(openapi_examples=EXAMPLES)],
    services: ServicesDep,
    once: OnceDep,
) -> Response:
    """Submit a model: an architecture that the service trains, or the name of one that stays where it is."""
    with once:
        spec = None
        if isinstance(submission, ArchitectureSubmission):
            spec = ArchitectureSpec.parse(submission.model_dump(exclude={"name", "kind"}))
        with services.database.writing() as session:
            model = models.add(
                session,
                name=submission.name,
                kind=submission.kind,
                spec=None if spec is None else spec.to_dict(),
                parameters=None if spec is None else spec.parameters,
            )
            return once.answer(session, 201, model_view(model), f"/v1/models/{model.id}")


@router.get("")
def list_models(services: ServicesDep, cursor: Cursor = None, limit: Limit = 50) -> Page[ModelView]:
    """All models, newest first."""
    with services.database.reading() as session:
        rows, after = models.listed(session, after_of(cursor), limit)
        return Page(items=[model_view(row) for row in rows], next=next_of(after))


@router.get("/{model_id}")
def show(model_id: str, services: ServicesDep) -> ModelView:
    """One model, by id or name."""
    with services.database.reading() as session:
        return model_view(models.get(session, model_id))


@router.delete("/{model_id}", status_code=204)
def delete(model_id: str, services: ServicesDep) -> None:
    """Delete a model and all that belongs to it. Refused (409) while a job of it is not over."""
    with services.database.writing() as session:
        model = models.get(session, model_id)
        windows = list(session.scalars(select(Window.id).where(Window.model_id == model.id)))
        jobs = list(session.scalars(select(Job.id).where(Job.model_id == model.id)))
        models.delete(session, model)
    _remove_files(services, windows, jobs)


def _remove_files(services: Services, windows: list[str], jobs: list[str]) -> None:
    services.windows.forget(windows)
    folders = [services.settings.window_folder(window) for window in windows]
    folders += [services.settings.job_folder(job) for job in jobs]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
