"""The run job: two arms from one start on the same data, the fp32 baseline and then the plan, and the verdict.

An arm's held-out losses are stored when it is through, so a later attempt does not train it again; within an
arm it goes on from the last checkpoint. The curves are the step events, in which each step is once. A
baseline that diverges fails the job, for then nothing can be compared; a plan that does is a finding, and the
job's result.

A resumed arm is bit-identical to one that was not cut short: the casts' own state, stochastic rounding's place in its
stream, delayed scaling's history and the loss scale, is in the checkpoint's notes; tensors that the plan stores in
another format are in the trainer's file as they were rounded.
"""

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy.orm import Session

import advisor
from advisor.emulation import LOSS_SCALE
from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from api import matching
from api.jobs.attempt import Attempt
from api.jobs.checkpoints import Checkpoints
from api.jobs.pace import Pace
from api.jobs.verdict import Arm, judge
from api.schemas import RunRequest
from api.settings import Settings
from db.store import events, jobs, models, plans, runs, windows

AppliedRows = list[dict[str, Any]]


def train(attempt: Attempt, settings: Settings) -> None:
    """Carry out a run job."""
    job = attempt.job()
    assert job.run_id is not None
    with attempt.database.reading() as session:
        run = runs.get(session, job.run_id)
        wanted = RunRequest.model_validate(run.request)
        plan = advisor.Plan.from_dict(plans.get(session, run.plan_id).plan)
        description = models.get(session, job.model_id).spec or {}
        spec = ArchitectureSpec.parse(description)
        evaluations = dict(run.evaluations)
        if wanted.baseline_run is not None:
            evaluations["baseline"] = runs.get(session, wanted.baseline_run).evaluations["baseline"]
        start = None
        if wanted.start_window is not None:
            checkpoint = windows.get(session, wanted.start_window).checkpoint
            assert checkpoint is not None
            start = settings.data_dir / checkpoint

    matching.require_plan(description, plan)  # before the baseline is trained in vain

    def fresh() -> Trainer:
        trainer = Trainer(spec, seed=wanted.seed)
        if start is not None:
            trainer.load(start)
        return trainer

    own_baseline = wanted.baseline and wanted.baseline_run is None
    phases = {"baseline": wanted.steps} if own_baseline else {}
    arms = Arms(
        attempt,
        Checkpoints(settings.job_folder(job.id), settings.checkpoint_s),
        wanted,
        Pace({**phases, "plan": wanted.steps, "evaluate": 0}),
    )
    if own_baseline and "baseline" not in evaluations:
        baseline, _ = arms.train("baseline", fresh(), _fp32, must_be_finite=True)
        evaluations["baseline"] = baseline.to_dict()
        attempt.write(_keep(run.id, "baseline", baseline))
    trainer = fresh()
    arm, applied = arms.train(
        "plan",
        trainer,
        lambda: advisor.apply(plan, trainer.model, trainer.optimizer),
        must_be_finite="baseline" not in evaluations,
    )
    baseline_arm = Arm(**evaluations["baseline"]) if "baseline" in evaluations else None
    verdict = judge(plan, baseline_arm, arm, wanted)

    def finish(session: Session) -> None:
        _keep(run.id, "plan", arm)(session)
        runs.finish(session, run.id, verdict=verdict, applied=applied)

    attempt.succeed(finish)


class Arms:
    """Trains the arms of one run."""

    def __init__(self, attempt: Attempt, checkpoints: Checkpoints, wanted: RunRequest, pace: Pace) -> None:
        self.attempt = attempt
        self.checkpoints = checkpoints
        self.wanted = wanted
        self.pace = pace

    def train(
        self,
        name: str,
        trainer: Trainer,
        precision: Callable[[], AbstractContextManager[Any]],
        must_be_finite: bool,
    ) -> tuple[Arm, AppliedRows]:
        """Train one arm from its last checkpoint, then evaluate it in the same precision.

        must_be_finite: a loss that is not finite at the first step is the model's own fault, an error rather
        than a finding; for the baseline at any step.
        """
        steps = self.wanted.steps
        done, notes = self.checkpoints.resume(trainer, name)
        counted: AppliedRows = notes["applied"] if notes else []
        given = precision()
        if isinstance(given, advisor.apply) and notes:
            given.load_state_dict(notes["casts"])  # before it is entered: stored tensors have been rounded
        with given as applied:

            def counts() -> AppliedRows:
                return [] if applied is None else _add(counted, applied.report())

            def noted() -> dict[str, Any]:
                return {"applied": counts(), "casts": [] if applied is None else applied.state_dict()}

            for step in range(done + 1, steps + 1):
                strict = must_be_finite and (name == "baseline" or step == 1)
                loss = trainer.step(require_finite=strict)
                self.attempt.step(name, step, steps, loss, self.pace)
                if not math.isfinite(loss):
                    return Arm(losses=[], diverged_at=step), counts()
                self.checkpoints.save_if_due(trainer, name, step, noted)
            self.checkpoints.save(trainer, name, steps, noted())
            report = counts()
            losses = trainer.evaluate(self.wanted.evaluate_batches)
        self.attempt.check()
        return Arm(losses=losses, diverged_at=None), report


def _fp32() -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def _keep(run_id: str, name: str, arm: Arm) -> Callable[[Session], None]:
    """Stores an arm's outcome, with an event that shows its mean held-out loss."""

    def store(session: Session) -> None:
        runs.evaluated(session, run_id, name, arm.to_dict())
        job = jobs.of_run(session, run_id)
        step = 1 if name == "baseline" else 2
        data = {"phase": "evaluate", "step": step, "steps": 2, "loss": arm.loss, "arm": name}
        events.add_step(session, job.id, job.attempt, phase="evaluate", step=step, loss=arm.loss, data=data)

    return store


def _add(before: AppliedRows, since: AppliedRows) -> AppliedRows:
    """How often each cast was carried out, over all attempts that led here; the loss scale counts by itself."""
    earlier = {(row["site"], row["role"]): int(row["count"]) for row in before if row["role"] != LOSS_SCALE.role}
    return [{**row, "count": int(row["count"]) + earlier.get((row["site"], row["role"]), 0)} for row in since]
