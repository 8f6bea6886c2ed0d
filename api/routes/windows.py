"""Windows: opened as a job, pushed as a file, shown, handed out as a file."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api import matching, recording
from api.bodies import JSON_TYPE, media_type
from api.context import Services, ServicesDep
from api.idempotency import KeyHeader, Once, fingerprint
from api.limits import WINDOW_TYPES
from api.pages import Cursor, Limit, after_of, encode, next_of, offset_of
from api.problems import Refusal, validation_response
from api.routes.selection import recorded
from api.schemas import FindingPage, FindingView, Page, WindowCreated, WindowRequest, WindowView, checked_name
from api.views import job_view, window_view, window_views
from api.windowcache import decode
from db.store import jobs, models, windows
from db.tables import Model
from probes.probing import candidates
from probes.tiles import checked_names
from probes.window import Window
from probes.windowfile import load_window

router = APIRouter(tags=["windows"])

FILE_TYPE = "application/vnd.safetensors"

# The route reads its body itself, so it describes it itself.
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            JSON_TYPE: {
                "schema": WindowRequest.model_json_schema(),
            },
            **{kind: {"schema": {"type": "string", "format": "binary"}} for kind in sorted(WINDOW_TYPES)},
        },
    }
}

Create = Annotated[
    bool,
    Query(
        description="with a window file: where no model has this name, make an external model of that name together "
        "with the window; a window that is refused leaves no model"
    ),
]


@router.post(
    "/models/{model_id}/windows",
    status_code=202,
    response_model=WindowCreated,
    responses={201: {"model": WindowView, "description": "The pushed window"}},
    openapi_extra=BODY,
)
async def open_or_push(
    model_id: str, request: Request, services: ServicesDep, create: Create = False, key: KeyHeader = None
) -> Response:
    """Open a probing window as a job (JSON, 202), or push a window file that was recorded elsewhere (201).

    A window pushed to a model that the service trains must be of that model: its parameters are compared.
    """
    kind = media_type(request)
    if kind == JSON_TYPE:
        if create:
            raise Refusal(422, "create=true goes with a window file; a window is opened of a model that is there")
        body = await request.body()
        try:
            wanted = WindowRequest.model_validate_json(body)
        except ValidationError as error:
            return validation_response(request.url.path, error.errors())
        once = Once(services, key, fingerprint(request, hashlib.sha256(body).digest()))
        return await run_in_threadpool(_open, services, once, model_id, wanted)
    if kind in WINDOW_TYPES:
        path, digest = await _receive(request, services.settings.uploads)
        try:
            once = Once(services, key, fingerprint(request, digest))
            return await run_in_threadpool(_push, services, once, model_id, path, create)
        finally:
            path.unlink()
    raise Refusal(
        415,
        f"the Content-Type {kind!r} is not taken here; {JSON_TYPE} opens a window as a job, "
        f"{' or '.join(sorted(WINDOW_TYPES))} pushes a window file",
    )


@router.get("/models/{model_id}/windows")
def list_windows(model_id: str, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50) -> Page[WindowView]:
    """A model's windows, newest first."""
    with services.database.reading() as session:
        model = models.get(session, model_id)
        rows, after = windows.listed(session, model.id, after_of(cursor), limit)
        return Page(items=window_views(session, rows), next=next_of(after))


@router.get("/windows/{window_id}")
def show(window_id: str, services: ServicesDep) -> WindowView:
    """One window."""
    with services.database.reading() as session:
        return window_view(session, windows.get(session, window_id))


@router.get("/windows/{window_id}/findings")
def findings(
    window_id: str,
    services: ServicesDep,
    severe: Annotated[bool, Query(description="only the severe ones")] = False,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> FindingPage:
    """Why usual recipes would fail on this training, where they would: severe findings first."""
    with services.database.reading() as session:
        window = windows.get(session, window_id)
        recorded(window, models.get(session, window.model_id))
    listed = f"{window_id}|findings|{severe}"
    start = offset_of(cursor, listed)
    entry = services.windows.get(window_id)
    found = [finding for finding in entry.findings if finding.severe or not severe]
    end = start + limit
    return FindingPage(
        window=window_id,
        total=len(found),
        items=[FindingView.model_validate(finding.to_dict()) for finding in found[start:end]],
        next=encode([listed, end]) if end < len(found) else None,
    )


@router.get(
    "/windows/{window_id}/file",
    response_class=Response,
    responses={200: {"content": {FILE_TYPE: {"schema": {"type": "string", "format": "binary"}}}}},
)
def file(window_id: str, services: ServicesDep) -> Response:
    """The window as a safetensors file, which `advisor.load_window` reads."""
    content = decode(services.database, window_id).to_bytes()
    disposition = f'attachment; filename="{window_id}.safetensors"'
    return Response(content, media_type=FILE_TYPE, headers={"Content-Disposition": disposition})


def _open(services: Services, once: Once, model_id: str, wanted: WindowRequest) -> Response:
    candidates(wanted.casts or [])
    checked_names(wanted.finer or [])
    with once, services.database.writing() as session:
        model = models.get(session, model_id)
        if model.kind == "external":
            raise Refusal(
                409,
                f"the model {model.name!r} is external: it is not here to be trained. Record a window where it "
                "trains (with advisor.probe(model, optimizer) as window: …) and push it: "
                f"advisor.connect(<this service>).push(window, model={model.name!r})",
            )
        window = windows.add(session, model_id=model.id, request=wanted.model_dump(mode="json"))
        job = jobs.add(session, kind="window", model_id=model.id, window_id=window.id)
        created = WindowCreated(window=window_view(session, window), job=job_view(session, job))
        return once.answer(session, 202, created, f"/v1/jobs/{job.id}")


def _push(services: Services, once: Once, model_id: str, path: Path, create: bool) -> Response:
    with once:
        with services.database.reading() as session:
            if not create:
                models.get(session, model_id)
            elif models.find(session, model_id) is None:
                _new_name(model_id)
        window = load_window(path)
        if not window.steps:
            raise Refusal(
                422,
                "the window has 0 recorded steps; leave the `with advisor.probe(…)` block after at least one",
            )
        packed = recording.pack(window)
        with services.database.writing() as session:
            model = _owner(session, model_id, window, create)
            row = windows.add(session, model_id=model.id, request=None)
            packed.store(session, row.id, checkpoint=None)
            session.refresh(row)
            return once.answer(session, 201, window_view(session, row), f"/v1/windows/{row.id}")


def _owner(session: Session, model_id: str, window: Window, create: bool) -> Model:
    """The model that a pushed window is of: found, or made in this transaction. Raises NotFound, WindowError."""
    if create and models.find(session, model_id) is None:
        return models.add(session, name=_new_name(model_id), kind="external", spec=None, parameters=None)
    model = models.get(session, model_id)
    if model.spec is not None:
        matching.require_window(model.spec, window, model.name)
    return model


def _new_name(name: str) -> str:
    try:
        return checked_name(name)
    except ValueError as error:
        raise Refusal(422, f"no model is named {name!r}, and none can be: {error}") from error


async def _receive(request: Request, folder: Path) -> tuple[Path, bytes]:
    """The body as a file of its own, and its SHA-256. Nothing is left behind if it does not arrive whole."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".safetensors")
    digest = hashlib.sha256()
    try:
        with os.fdopen(descriptor, "wb") as target:
            async for chunk in request.stream():
                digest.update(chunk)
                target.write(chunk)
    except BaseException:
        Path(name).unlink()
        raise
    return Path(name), digest.digest()
