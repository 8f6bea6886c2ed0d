"""Plans."""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.errors import NotFound
from db.ids import new_id
from db.store.pages import After, page
from db.tables import Plan
from db.types import now


def add(session: Session, *, model_id: str, windows: list[str], request: dict[str, Any], plan: dict[str, Any]) -> Plan:
    """A new plan."""
    row = Plan(id=new_id("pln"), model_id=model_id, windows=windows, request=request, plan=plan, created_at=now())
    session.add(row)
    session.flush()
    return row


def get(session: Session, plan_id: str) -> Plan:
    """The plan of that id. Raises NotFound."""
    plan = session.get(Plan, plan_id)
    if plan is None:
        raise NotFound(f"there is no plan {plan_id!r}; GET /v1/models/{{id}}/plans lists a model's")
    return plan


def listed(session: Session, model_id: str, after: After | None, limit: int) -> tuple[list[Plan], After | None]:
    """A page of a model's plans, newest first."""
    return page(session, select(Plan).where(Plan.model_id == model_id), Plan, after, limit)
