"""Rows as the REST calls show them."""

from sqlalchemy.orm import Session

from api.schemas import (
    AppliedRow,
    CurvePoint,
    Curves,
    JobResult,
    JobView,
    ModelView,
    PlanView,
    Problem,
    Progress,
    RunView,
    Verdict,
    WindowState,
    WindowView,
)
from db.store import events, jobs, windows
from db.tables import Job, Model, Plan, Run, Window


def model_view(model: Model) -> ModelView:
    return ModelView.model_validate(
        {
            **(model.spec or {}),
            "id": model.id,
            "name": model.name,
            "kind": model.kind,
            "parameters": model.parameters,
            "created_at": model.created_at,
        }
    )


def window_views(session: Session, rows: list[Window]) -> list[WindowView]:
    """Windows with their jobs' states and what they take, in two queries for all of them."""
    ids = [row.id for row in rows]
    by_window, stored = jobs.of_windows(session, ids), windows.stored(session, ids)
    return [_window_view(row, by_window.get(row.id), stored.get(row.id)) for row in rows]


def window_view(session: Session, row: Window) -> WindowView:
    return window_views(session, [row])[0]


def _window_view(row: Window, job: Job | None, stored: windows.Stored | None) -> WindowView:
    view = WindowView(
        id=row.id,
        model_id=row.model_id,
        state=_window_state(row, job),
        origin="pushed" if job is None else "job",
        job_id=None if job is None else job.id,
        created_at=row.created_at,
        request=row.request,
        has_checkpoint=row.checkpoint is not None,
    )
    if row.summary is None or stored is None:
        return view
    sketches = stored.slots * len(row.summary["steps"])
    recorded = {
        **row.summary,
        "slots": stored.slots,
        "bytes_stored": stored.sketch_bytes + stored.header_bytes,
        "bytes_per_sketch": stored.sketch_bytes / sketches if sketches else None,
    }
    return view.model_copy(update=recorded)


def _window_state(row: Window, job: Job | None) -> WindowState:
    if row.recorded_at is not None:
        return "recorded"
    return "failed" if job is None or job.state in jobs.TERMINAL else "pending"


def plan_view(plan: Plan) -> PlanView:
    return PlanView(
        id=plan.id,
        model_id=plan.model_id,
        windows=plan.windows,
        created_at=plan.created_at,
        request=plan.request,
        plan=plan.plan,
    )


def run_view(session: Session, run: Run) -> RunView:
    """A run with its curves: the step events of its job, and of the job that trained its baseline."""
    job = jobs.of_run(session, run.id)
    lender = run.request.get("baseline_run")
    baseline_job = job if lender is None else jobs.of_run(session, lender)
    return RunView.model_validate(
        {
            "id": run.id,
            "plan_id": run.plan_id,
            "model_id": run.model_id,
            "state": job.state,
            "job_id": job.id,
            "created_at": run.created_at,
            "request": run.request,
            "steps": run.request["steps"],
            "curves": Curves(
                baseline=_curve(session, baseline_job.id, "baseline"), plan=_curve(session, job.id, "plan")
            ),
            "verdict": None if run.verdict is None else Verdict.model_validate(run.verdict),
            "applied": [AppliedRow.model_validate(row) for row in run.applied or []],
        }
    )


def _curve(session: Session, job_id: str, phase: str) -> list[CurvePoint]:
    return [CurvePoint(step=point.step, loss=point.loss) for point in events.curve(session, job_id, phase)]


def job_view(session: Session, job: Job) -> JobView:
    target = job.window_id or job.run_id
    newest = events.last_step(session, job.id)
    return JobView.model_validate(
        {
            "id": job.id,
            "kind": job.kind,
            "state": job.state,
            "attempt": job.attempt,
            "cancel_requested": job.cancel_requested_at is not None,
            "model_id": job.model_id,
            "target": target,
            "created_at": job.created_at,
            "started_at": job.started_at,
            "finished_at": job.finished_at,
            "progress": None if newest is None else Progress.model_validate(newest.data),
            "error": None if job.error is None else Problem.model_validate(job.error),
            "result": JobResult(href=f"/v1/{job.kind}s/{target}") if job.state == "succeeded" else None,
        }
    )
