"""Health: alive, and ready for work."""

from fastapi import APIRouter, Response
from sqlalchemy.exc import SQLAlchemyError

from api.context import Services, ServicesDep
from api.schemas import Health, Readiness
from db import migrate
from db.errors import SchemaMismatch
from db.store import workers
from db.types import now

router = APIRouter(tags=["operations"])

HEARTBEATS_MISSED = 3  # a worker silent for so many heartbeats is taken for gone


@router.get("/healthz")
def healthz() -> Health:
    """The server answers."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Not ready, and why"}})
def readyz(services: ServicesDep, response: Response) -> Readiness:
    """The database answers, its migrations are at head, and a worker is alive. 503 otherwise."""
    database, migrations = _database(services)
    worker = _worker(services) if database == migrations == "ok" else "unknown"
    ready = database == migrations == worker == "ok"
    if not ready:
        response.status_code = 503
    return Readiness(status="ready" if ready else "not ready", database=database, migrations=migrations, worker=worker)


def _database(services: Services) -> tuple[str, str]:
    try:
        services.database.ping()
        migrate.check(services.database)
    except SchemaMismatch as error:
        return "ok", str(error)
    except SQLAlchemyError as error:
        return f"does not answer ({type(error).__name__})", "unknown"
    return "ok", "ok"


def _worker(services: Services) -> str:
    with services.database.reading() as session:
        heartbeat = workers.last_heartbeat(session)
    if heartbeat is None:
        return "no worker has started; `advisor serve` starts one, `advisor worker` another"
    silent_s = (now() - heartbeat).total_seconds()
    if silent_s > HEARTBEATS_MISSED * services.settings.heartbeat_s:
        return f"the last heartbeat is {silent_s:.0f} s old"
    return "ok"
