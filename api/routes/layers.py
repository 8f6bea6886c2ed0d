"""Layers: the sites of a model, and the metrics of one of them step by step."""

from typing import Annotated

from fastapi import APIRouter, Query

from advisor import Cast
from advisor.metrics import measure, scored_steps
from api.context import ServicesDep
from api.problems import Refusal
from api.routes.selection import WindowQuery, no_slot, recorded_window
from api.schemas import HistoryView, Layers, LayerView
from db.store import windows
from probes.history import SlotHistory

router = APIRouter(prefix="/models/{model_id}/layers", tags=["layers"])

# Attributes of advisor.metrics.Metrics that have one value a step.
METRICS = (
    "underflow",
    "subnormal",
    "overflow",
    "sqnr_db",
    "dynamic_range_bits",
    "exponent_bits",
    "amax",
    "nonfinite",
)


@router.get("")
def layers(model_id: str, services: ServicesDep, window_id: WindowQuery = None) -> Layers:
    """The model's sites, in the order in which they were met, with their shares of all matrix FLOPs."""
    with services.database.reading() as session:
        chosen = recorded_window(session, model_id, window_id).id
    window = services.windows.get(chosen).window
    total = sum(site.flops for site in window.sites)
    items = [
        LayerView(
            site=site.name,
            op=site.op,
            roles=list(site.roles),
            shapes={role: list(shape) for role, shape in site.shapes.items()},
            dtypes=dict(site.dtypes),
            flops=site.flops,
            share_of_flops=site.flops / total if total else 0.0,
            parameter=site.parameter,
        )
        for site in window.sites
    ]
    return Layers(window=chosen, items=items)


@router.get("/{site:path}/history")
def history(
    model_id: str,
    site: str,
    services: ServicesDep,
    role: Annotated[str, Query(description="input, weight, grad_output, …")],
    cast: Annotated[str, Query(description="any cast, scored before or not")] = "e4m3fn/tensor/current/nearest",
    metric: Annotated[list[str] | None, Query(description="repeatable; default: all")] = None,
    window_id: WindowQuery = None,
) -> HistoryView:
    """One slot's metrics step by step for any cast, computed from its stored sketches."""
    wanted = tuple(metric or METRICS)
    if unknown := [name for name in wanted if name not in METRICS]:
        raise Refusal(422, f"the metric {unknown[0]!r} is not one of: {', '.join(METRICS)}")
    chosen_cast = Cast.parse(cast)
    with services.database.reading() as session:
        window = recorded_window(session, model_id, window_id)
        payload = windows.sketch(session, window.id, site, role)
        if payload is None:
            raise Refusal(404, no_slot(site, role, windows.slots(session, window.id)))
    slot = SlotHistory.unpack(payload)
    measured = measure(slot, chosen_cast)
    return HistoryView(
        site=site,
        role=role,
        cast=str(chosen_cast),
        window=window.id,
        steps=[int(step) for step in scored_steps(slot, chosen_cast)],
        metrics={name: [float(value) for value in getattr(measured, name)] for name in wanted},
        flags=list(measured.flags),
    )
