"""Runs: training with a plan, beside its fp32 baseline."""

from fastapi import APIRouter, Response
from sqlalchemy.orm import Session

import advisor
from api import matching
from api.context import ServicesDep
from api.idempotency import OnceDep
from api.problems import Refusal
from api.routes.selection import recorded
from api.schemas import Page, RunCreated, RunRequest, RunView
from api.views import job_view, run_view
from db.store import jobs, models, plans, runs, windows
from db.tables import Model, Plan

router = APIRouter(tags=["runs"])

# Two runs may share a baseline if these parts of their requests are equal.
SAME_BASELINE = ("steps", "seed", "start_window", "evaluate_batches")


@router.post("/plans/{plan_id}/runs", status_code=202, response_model=RunCreated)
def start(plan_id: str, wanted: RunRequest, services: ServicesDep, once: OnceDep) -> Response:
    """Train with a plan as a job, beside an fp32 baseline from the same start on the same data."""
    with once, services.database.writing() as session:
        plan = plans.get(session, plan_id)
        model = models.get(session, plan.model_id)
        if model.kind == "external":
            raise Refusal(
                409,
                f"the model {model.name!r} is external: it is not here to be trained. Train it where it is, with "
                f"the plan of GET /v1/plans/{plan.id}: with advisor.apply(plan, model, optimizer): train()",
            )
        matching.require_plan(model.spec or {}, advisor.Plan.from_dict(plan.plan))
        wanted = _checked(session, model, plan, wanted)
        run = runs.add(session, plan=plan, request=wanted.model_dump(mode="json"))
        job = jobs.add(session, kind="run", model_id=plan.model_id, run_id=run.id)
        created = RunCreated(run=run_view(session, run), job=job_view(session, job))
        return once.answer(session, 202, created, f"/v1/jobs/{job.id}")


@router.get("/plans/{plan_id}/runs")
def list_runs(plan_id: str, services: ServicesDep) -> Page[RunView]:
    """The runs of a plan, oldest first, on one page."""
    with services.database.reading() as session:
        plan = plans.get(session, plan_id)
        return Page(items=[run_view(session, run) for run in runs.of_plan(session, plan.id)])


@router.get("/runs/{run_id}")
def show(run_id: str, services: ServicesDep) -> RunView:
    """One run: its curves so far, and its verdict once it is over."""
    with services.database.reading() as session:
        return run_view(session, runs.get(session, run_id))


def _checked(session: Session, model: Model, plan: Plan, wanted: RunRequest) -> RunRequest:
    """The request with a borrowed baseline traced to the run that trained it. Raises NotFound, Refusal."""
    if wanted.start_window is not None:
        window = recorded(windows.get(session, wanted.start_window), model)
        if window.checkpoint is None:
            raise Refusal(409, f"the window {window.id} was pushed: there is no training state to start from")
        if wanted.seed is not None:
            raise Refusal(422, "a run from a window's state goes on with its seed; leave out seed or start_window")
    if wanted.baseline_run is None:
        return wanted
    if not wanted.baseline:
        raise Refusal(422, "baseline is false and baseline_run names one; leave one of them out")
    lender = runs.get(session, wanted.baseline_run)
    root = lender.request.get("baseline_run")
    if root is not None:
        lender = runs.get(session, root)
    if lender.model_id != plan.model_id:
        raise Refusal(422, f"the run {wanted.baseline_run} is of another model")
    asked = wanted.model_dump(mode="json")
    if differing := [part for part in SAME_BASELINE if asked[part] != lender.request[part]]:
        raise Refusal(
            422,
            f"the baseline of run {lender.id} differs in {', '.join(differing)} and compares with nothing here; "
            "ask for the same, or leave out baseline_run",
        )
    if "baseline" not in lender.evaluations:
        raise Refusal(409, f"the run {lender.id} has no finished baseline; wait for it, or leave out baseline_run")
    return wanted.model_copy(update={"baseline_run": lender.id})
