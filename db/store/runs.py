"""Runs. Their curves are the step events of their jobs (db.store.events)."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.errors import NotFound
from db.ids import new_id
from db.tables import Plan, Run
from db.types import now


def add(session: Session, *, plan: Plan, request: dict[str, Any]) -> Run:
    """A new run of a plan."""
    run = Run(
        id=new_id("run"),
        plan_id=plan.id,
        model_id=plan.model_id,
        request=request,
        evaluations={},
        verdict=None,
        applied=None,
        created_at=now(),
    )
    session.add(run)
    session.flush()
    return run


def get(session: Session, run_id: str) -> Run:
    """The run of that id. Raises NotFound."""
    run = session.get(Run, run_id)
    if run is None:
        raise NotFound(f"there is no run {run_id!r}; POST /v1/plans/{{id}}/runs starts one")
    return run


def of_plan(session: Session, plan_id: str) -> list[Run]:
    """The runs of a plan, oldest first."""
    return list(session.scalars(select(Run).where(Run.plan_id == plan_id).order_by(Run.created_at, Run.id)))


def evaluated(session: Session, run_id: str, arm: str, outcome: dict[str, Any]) -> None:
    """Keep what an arm ("baseline", "plan") came to."""
    run = get(session, run_id)
    run.evaluations = {**run.evaluations, arm: outcome}
    session.flush()


def finish(session: Session, run_id: str, *, verdict: dict[str, Any], applied: list[dict[str, Any]]) -> None:
    """Keep the verdict, and how each cast was carried out."""
    run = get(session, run_id)
    run.verdict = verdict
    run.applied = applied
    session.flush()
