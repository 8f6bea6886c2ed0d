"""Plans: made from recorded windows, listed, shown."""

from fastapi import APIRouter, Response

import advisor
from advisor import Cast
from api.context import Services, ServicesDep
from api.idempotency import OnceDep
from api.pages import Cursor, Limit, after_of, next_of
from api.problems import Refusal
from api.routes.selection import latest, recorded
from api.schemas import Page, PlanRequest, PlanView
from api.views import plan_view
from db.store import models, plans, windows

router = APIRouter(tags=["plans"])


@router.post("/models/{model_id}/plans", status_code=201, response_model=PlanView)
def make(model_id: str, wanted: PlanRequest, services: ServicesDep, once: OnceDep) -> Response:
    """Make a plan: a cast for every slot with reasons and predicted damage, or one recipe everywhere."""
    with once:
        chosen = _windows(services, model_id, wanted.windows)
        plan = _plan(services, chosen, wanted).to_dict()
        with services.database.writing() as session:
            model = models.get(session, model_id)
            row = plans.add(
                session,
                model_id=model.id,
                windows=chosen,
                request=wanted.model_dump(mode="json"),
                plan=plan,
            )
            return once.answer(session, 201, plan_view(row), f"/v1/plans/{row.id}")


@router.get("/models/{model_id}/plans")
def list_plans(model_id: str, services: ServicesDep, cursor: Cursor = None, limit: Limit = 50) -> Page[PlanView]:
    """A model's plans, newest first."""
    with services.database.reading() as session:
        model = models.get(session, model_id)
        rows, after = plans.listed(session, model.id, after_of(cursor), limit)
        return Page(items=[plan_view(row) for row in rows], next=next_of(after))


@router.get("/plans/{plan_id}")
def show(plan_id: str, services: ServicesDep) -> PlanView:
    """One plan."""
    with services.database.reading() as session:
        return plan_view(plans.get(session, plan_id))


def _windows(services: Services, model_id: str, wanted: list[str] | None) -> list[str]:
    with services.database.reading() as session:
        model = models.get(session, model_id)
        if wanted is None:
            return [latest(session, model).id]
        return [recorded(windows.get(session, window_id), model).id for window_id in wanted]


def _plan(services: Services, chosen: list[str], wanted: PlanRequest) -> advisor.Plan:
    entries = [services.windows.get(window_id) for window_id in chosen]
    recorded_windows = [entry.window for entry in entries]
    if wanted.uniform is not None:
        if taken := {"window", "hardware"} & wanted.uniform.keys():
            raise Refusal(422, f"{min(taken)!r} is no role; uniform maps roles such as input to casts")
        return advisor.uniform(recorded_windows[0], hardware=wanted.hardware, **wanted.uniform)
    return advisor.recommend(
        recorded_windows,
        hardware=wanted.hardware,
        tolerance=wanted.tolerance,
        max_lost_batch=wanted.max_lost_batch,
        casts=None if wanted.casts is None else [Cast.parse(text) for text in wanted.casts],
        objective=wanted.objective,
        budget=None if wanted.budget is None else wanted.budget.model_dump(exclude_none=True),
        uniform_roles=wanted.uniform_roles,
        keep=wanted.keep,
        only=wanted.only,
        first_last=wanted.first_last,
        native_only=wanted.native_only,
        master_weights=wanted.master_weights,
        optimizer_state=wanted.optimizer_state,
        findings=[entry.findings for entry in entries],
    )
