"""Jobs: list, show, cancel."""

from fastapi import APIRouter, Response

from api.context import ServicesDep
from api.pages import Cursor, Limit, after_of, next_of
from api.schemas import JobView, Page
from api.views import job_view
from db.store import jobs

router = APIRouter(prefix="/jobs", tags=["jobs"])


@router.get("")
def list_jobs(services: ServicesDep, cursor: Cursor = None, limit: Limit = 50) -> Page[JobView]:
    """All jobs, newest first."""
    with services.database.reading() as session:
        rows, after = jobs.listed(session, after_of(cursor), limit)
        return Page(items=[job_view(session, row) for row in rows], next=next_of(after))


@router.get("/{job_id}")
def show(job_id: str, services: ServicesDep) -> JobView:
    """One job."""
    with services.database.reading() as session:
        return job_view(session, jobs.get(session, job_id))


@router.delete("/{job_id}", status_code=202, responses={200: {"model": JobView, "description": "Over already"}})
def cancel(job_id: str, services: ServicesDep, response: Response) -> JobView:
    """Ask a job to stop; it does within one training step. 200 if it is over already, and nothing changes."""
    with services.database.writing() as session:
        job = jobs.get(session, job_id)
        response.status_code = 202 if jobs.cancel(session, job) else 200
        return job_view(session, job)
