"""The app: routes, middleware and errors put together."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from fastapi_offline import FastAPIOffline

from api import problems
from api.context import Services
from api.hosts import LoopbackOnly, check_host
from api.idempotency import Replay, replayed
from api.limits import BodyLimit
from api.log import RequestLog
from api.routes import catalogue, events, exports, health, jobs, layers, models, plans, runs, scores, windows
from api.settings import Settings
from api.windowcache import WindowCache
from db import migrate
from db.session import Database
from db.store import idempotency

DESCRIPTION = """Measures a training run and advises which 8-bit and 16-bit formats it can use, layer by layer.

The way through: `POST /v1/models`, `POST /v1/models/{id}/windows` (a job), `GET /v1/models/{id}/scores`,
`POST /v1/models/{id}/plans`, `POST /v1/plans/{id}/runs` (a job), `GET /v1/runs/{id}`.

Every `{id}` of a model may be its name. Every POST takes an `Idempotency-Key`. Every error is a problem (RFC 9457).
NaN and the infinities are the strings "NaN", "Infinity" and "-Infinity". Lists come in pages: pass `next` back as
`?cursor=`."""


def create_app(settings: Settings) -> FastAPI:
    """The app on these settings. Upgrades the database when it starts. Raises HostRefused."""
    check_host(settings.host)
    database = Database(settings.url)
    services = Services(settings, database, WindowCache(database, settings.cached_windows))

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        migrate.upgrade(database)
        with database.writing() as session:
            idempotency.free_abandoned(session)
        shutil.rmtree(settings.uploads, ignore_errors=True)  # what a server that died was receiving
        yield
        services.stopping.set()
        database.close()

    # FastAPI's own page loads its script and style from elsewhere, and is blank on a machine that is off the network.
    app: FastAPI = FastAPIOffline(
        title="Numerics Advisor",
        version=version("numerics-advisor"),
        description=DESCRIPTION,
        lifespan=lifespan,
        responses=problems.RESPONSES,
    )
    app.state.services = services
    problems.install(app)
    app.add_exception_handler(Replay, replayed)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, settings.json_limit_bytes, settings.window_limit_bytes)
    app.add_middleware(LoopbackOnly)
    app.add_middleware(RequestLog)
    v1 = APIRouter(prefix="/v1")
    for routes in (models, windows, layers, scores, plans, exports, runs, jobs, events, catalogue):
        v1.include_router(routes.router)
    app.include_router(v1)
    app.include_router(health.router)
    return app
