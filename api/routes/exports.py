"""Exports: a plan as files for another library."""

from fastapi import APIRouter

import advisor
from advisor.exports import TARGETS
from advisor.plan import Plan
from api.context import ServicesDep
from api.problems import Refusal
from api.schemas import ExportView
from db.store import plans

router = APIRouter(tags=["plans"])


@router.get("/plans/{plan_id}/export/{target}")
def export(plan_id: str, target: str, services: ServicesDep) -> ExportView:
    """A plan's files for torchao, transformer-engine, deepspeed, megatron, accelerate or lightning.

    Each holds a check to run after the conversion; `cannot` says what the target does not do of the plan.
    """
    if target not in TARGETS:
        raise Refusal(404, f"there is no export to {target!r}; there are {', '.join(TARGETS)}")
    with services.database.reading() as session:
        plan = Plan.from_dict(plans.get(session, plan_id).plan, source=plan_id)
    made = advisor.export(plan, target)
    return ExportView(plan=plan_id, target=target, files=made.files, use=made.use, cannot=list(made.cannot))
