"""A run that is cut short goes on as if it had not been: with the casts' own state too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_jobs_attempts import SPEC, CutShort, add_window_job, claimed, given_back

import advisor
from advisor.plan import LossScaling, Stored
from advisor.training import Trainer
from api.jobs.attempt import Attempt
from api.jobs.checkpoints import Checkpoints
from api.jobs.pace import Pace
from api.jobs.run import Arms
from api.schemas import AppliedRow, RunRequest
from db.session import Database

RECIPE = {
    "input": "e4m3fn/tensor/delayed(len=3,margin=0)/stochastic",
    "weight": "int8/tensor/delayed/nearest",
    "grad_output": "e5m2/tensor/current/stochastic",
}
STEPS = 6


NARROW = {"input": "e5m2/none/stochastic", "weight": "e5m2/none/stochastic", "grad_output": "e5m2/none/stochastic:inf"}


@pytest.fixture(scope="module", params=["casts", "storage and loss scaling"])
def plan(request: pytest.FixtureRequest) -> advisor.Plan:
    """One of casts with a state of their own, and one of everything else that has one (Mellempudi et al. 2019)."""
    trainer = Trainer(SPEC)
    with advisor.probe(trainer.model, trainer.optimizer, steps=1, curvature_steps=0) as window:
        trainer.step()
    if request.param == "casts":
        return advisor.uniform(window, **RECIPE)
    storage = [
        Stored(name=name, role=role, cast="fp16/none/stochastic", reason="a test's")
        for name, _ in trainer.model.named_parameters()
        for role in ("master", "exp_avg")
    ]
    # Small enough an interval, and large enough a start, that the scale moves both ways within a few steps.
    scaling = LossScaling(kind="dynamic", reason="a test's", scale=2.0**22, growth_interval=2, minimums=((4, 1024.0),))
    return advisor.uniform(window, storage=storage, loss_scaling=scaling, **NARROW)


def trained(attempt: Attempt, plan: advisor.Plan, folder: Path) -> Any:
    """The plan's arm, with a checkpoint after every step."""
    trainer = Trainer(SPEC)
    arms = Arms(attempt, Checkpoints(folder, 1e-9), RunRequest(steps=STEPS, evaluate_batches=2), Pace({"plan": STEPS}))

    def applying() -> advisor.apply:
        return advisor.apply(plan, trainer.model, trainer.optimizer)

    arm, applied = arms.train("plan", trainer, applying, must_be_finite=True)
    return arm.losses, applied, [parameter.detach().tolist() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("at", [2, 5, STEPS])
def test_delayed_and_stochastic_casts_go_on_where_they_were(
    database: Database, tmp_path: Path, plan: advisor.Plan, at: int
) -> None:
    job_id = add_window_job(database)
    undisturbed = trained(claimed(database), plan, tmp_path / "undisturbed")
    given_back(database, job_id)
    first = CutShort(database, job_id, claimed(database).number)
    first.at = ("plan", at)
    with pytest.raises(KeyboardInterrupt):
        trained(first, plan, tmp_path / "job")
    given_back(database, job_id)
    assert trained(claimed(database), plan, tmp_path / "job") == undisturbed
    if plan.storage:
        rows = {row["role"]: row for row in undisturbed[1]}
        assert 0 < rows["scale"]["skipped"] < STEPS
        done = STEPS - rows["scale"]["skipped"]
        assert [rows[role]["count"] for role in ("master", "exp_avg", "scale")] == [done + 1, done, STEPS]


def test_every_row_of_a_report_can_be_shown(plan: advisor.Plan) -> None:
    trainer = Trainer(SPEC)
    applied = advisor.apply(plan, trainer.model, trainer.optimizer)
    applied.unplanned["blocks.9"] = applied.unplaced = 1  # a product that the plan does not name, and one of no site
    rows = [AppliedRow.model_validate(row) for row in applied.report()]
    assert [row.how for row in rows if row.cast is None] == ["not in the plan", "not placed"]
