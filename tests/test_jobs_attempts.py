"""What attempts do, in this process: fences, resuming, divergence, checkpoints, pace."""

import contextlib
import math
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from service import TINY_GPT, Service, quick_settings, steps_of

import advisor
from advisor.errors import TrainingDiverged
from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from api.jobs.attempt import Attempt, Canceled
from api.jobs.checkpoints import Checkpoints
from api.jobs.execute import see_through
from api.jobs.pace import Pace
from api.jobs.run import Arms
from api.jobs.window import record
from api.jobs.worker import Left, SchemaMismatch, Worker, work
from api.schemas import RunRequest
from db.errors import StaleAttempt
from db.session import Database
from db.store import events, jobs, models, plans, runs, windows

LEASE = timedelta(seconds=60)
SPEC = ArchitectureSpec.parse({name: part for name, part in TINY_GPT.items() if name not in ("name", "kind")})


def add_window_job(database: Database, **request: Any) -> str:
    """A queued window job of the tiny model."""
    with database.writing() as session:
        model = models.add(session, name="m", kind="architecture", spec=SPEC.to_dict(), parameters=1)
        window = windows.add(session, model_id=model.id, request=request)
        return jobs.add(session, kind="window", model_id=model.id, window_id=window.id).id


def claimed(database: Database) -> Attempt:
    with database.writing() as session:
        job = jobs.claim(session, "wrk_1", LEASE)
    assert job is not None
    return Attempt(database, job.id, job.attempt)


def given_back(database: Database, job_id: str) -> None:
    with database.writing() as session:
        jobs.give_back(session, jobs.get(session, job_id), "its worker died", crashed=True, most_crashes=9)


def reported(database: Database, job_id: str) -> list[tuple[str | None, int | None]]:
    with database.reading() as session:
        rows = events.after(session, job_id, 0, 1000)
    return [(row.phase, row.step) for row in rows if row.kind == "step"]


def test_a_replaced_attempt_changes_nothing(database: Database) -> None:
    job_id = add_window_job(database)
    stale = claimed(database)
    given_back(database, job_id)
    current = claimed(database)
    pace = Pace({"warmup": 2})
    stored = []
    for write in (
        lambda: stale.step("warmup", 1, 2, 1.0, pace),
        lambda: stale.log("hello"),
        lambda: stale.write(lambda session: stored.append("written")),
        lambda: stale.succeed(lambda session: stored.append("succeeded")),
        lambda: stale.fail({}),
        stale.cancel,
        stale.check,
        stale.job,
    ):
        with pytest.raises(StaleAttempt):
            write()
    assert stored == []
    assert reported(database, job_id) == []
    current.step("warmup", 1, 2, 1.0, pace)
    assert reported(database, job_id) == [("warmup", 1)]


def test_a_result_that_cannot_be_stored_leaves_the_job_running(database: Database) -> None:
    job_id = add_window_job(database)
    attempt = claimed(database)

    def fail(session: Any) -> None:
        events.add(session, job_id, 1, "log", {"message": "half"})
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        attempt.succeed(fail)
    assert attempt.job().state == "running"
    with database.reading() as session:
        assert "log" not in [row.kind for row in events.after(session, job_id, 0, 100)]


def test_a_cancel_shows_at_the_next_step_and_before_a_result(database: Database) -> None:
    job_id = add_window_job(database)
    attempt = claimed(database)
    with database.writing() as session:
        jobs.cancel(session, jobs.get(session, job_id))
    with pytest.raises(Canceled):
        attempt.step("warmup", 1, 2, 1.0, Pace({"warmup": 2}))
    with pytest.raises(Canceled):
        attempt.succeed(lambda session: None)
    assert reported(database, job_id) == []


class CutShort(Attempt):
    """Dies before it reports a certain step."""

    at: tuple[str, int]

    def step(self, phase: str, step: int, *rest: Any) -> None:
        if (phase, step) == self.at:
            raise KeyboardInterrupt
        super().step(phase, step, *rest)


@pytest.mark.parametrize("at", [("warmup", 3), ("window", 2)])
def test_an_attempt_goes_on_where_the_one_before_was_cut_short(
    database: Database, tmp_path: Path, at: tuple[str, int]
) -> None:
    job_id = add_window_job(database, steps=3, warmup=4, curvature_steps=0)
    settings = quick_settings(tmp_path, checkpoint_s=1e-9)
    first = CutShort(database, job_id, claimed(database).number)
    first.at = at
    with pytest.raises(KeyboardInterrupt):
        record(first, settings)
    given_back(database, job_id)
    second = claimed(database)
    record(second, settings)
    assert reported(database, job_id) == [("warmup", s) for s in (1, 2, 3, 4)] + [("window", s) for s in (1, 2, 3)]
    trainer = Trainer(SPEC)
    undisturbed = [trainer.step() for _ in range(7)]
    with database.reading() as session:
        job = jobs.get(session, job_id)
        assert job.window_id is not None
        curve = events.curve(session, job_id, "warmup") + events.curve(session, job_id, "window")
        window = windows.get(session, job.window_id)
    assert job.state == "succeeded"
    assert [point.loss for point in curve] == undisturbed
    assert window.summary is not None
    assert window.summary["losses"] == undisturbed[4:]
    assert window.checkpoint is not None
    start = Trainer(SPEC)
    start.load(settings.data_dir / window.checkpoint)
    assert start.step_index == 4


@contextlib.contextmanager
def poisoned(trainer: Trainer) -> Iterator[None]:
    """A precision in which the model's weights become NaN."""
    for parameter in trainer.model.parameters():
        parameter.data.fill_(math.nan)
    yield


@pytest.mark.parametrize("beside_a_baseline", [True, False])
def test_a_plan_that_diverges_is_a_finding_beside_a_baseline(
    database: Database, tmp_path: Path, beside_a_baseline: bool
) -> None:
    job_id = add_window_job(database)
    checkpoints = Checkpoints(tmp_path / "job", 1.0)
    arms = Arms(claimed(database), checkpoints, RunRequest(steps=3), Pace({"baseline": 3, "plan": 3}))
    trainer = Trainer(SPEC)
    if not beside_a_baseline:
        with pytest.raises(TrainingDiverged, match="learning_rate"):
            arms.train("plan", trainer, lambda: poisoned(trainer), must_be_finite=True)
        return
    arm, _ = arms.train("plan", trainer, lambda: poisoned(trainer), must_be_finite=False)
    assert (arm.diverged_at, arm.losses) == (1, [])
    with database.reading() as session:
        (point,) = events.curve(session, job_id, "plan")
    assert point.step == 1
    assert math.isnan(point.loss)


def test_a_training_that_diverges_at_once_fails_and_says_what_to_do(service: Service) -> None:
    wild = {**TINY_GPT, "name": "wild"}
    wild["training"] = {"batch_size": 4, "learning_rate": 1000.0, "optimizer": "sgd", "warmup_steps": 0}
    service.post("/v1/models", wild, status=201)
    created = service.post("/v1/models/wild/windows", {"steps": 50, "warmup": 0}, status=202).json()
    carried_out(service)
    job = service.get(f"/v1/jobs/{created['job']['id']}")
    assert (job["state"], job["attempt"]) == ("failed", 1)
    assert job["error"]["status"] == 422
    assert "learning_rate" in job["error"]["detail"]
    assert "Traceback" not in str(job)
    assert service.events(job["id"])[-1]["data"]["error"]["detail"] == job["error"]["detail"]
    window = f"/v1/windows/{created['window']['id']}"
    assert service.get(window)["state"] == "failed"
    assert service.client.get(f"{window}/file").status_code == 404


def test_a_fault_of_ours_fails_the_job_without_its_traceback(service: Service) -> None:
    service.post("/v1/models", {**TINY_GPT, "name": "fault"}, status=201)
    created = service.post("/v1/models/fault/windows", {"steps": 1, "warmup": 0}, status=202).json()
    service.settings.window_folder(created["window"]["id"]).parent.mkdir(parents=True, exist_ok=True)
    service.settings.window_folder(created["window"]["id"]).write_text("a file where a folder belongs")
    carried_out(service)
    job = service.get(f"/v1/jobs/{created['job']['id']}")
    assert (job["state"], job["error"]["status"]) == ("failed", 500)
    assert "Traceback" not in str(job)
    assert "folder belongs" not in str(job)


def test_a_plan_of_another_model_fails_before_anything_is_trained(service: Service) -> None:
    service.post("/v1/models", {**TINY_GPT, "name": "mine"}, status=201)
    database = Database(service.settings.url)
    wider = Trainer(SPEC.model_copy(update={"config": SPEC.config.model_copy(update={"width": 32})}))
    with advisor.probe(wider.model, wider.optimizer, steps=1, curvature_steps=0) as window:
        wider.step()
    with database.writing() as session:  # past the check of POST …/runs, as by an older version
        plan = plans.add(
            session,
            model_id=models.get(session, "mine").id,
            windows=[],
            request={},
            plan=advisor.uniform(window, input="bf16/none").to_dict(),
        )
        run = runs.add(session, plan=plan, request=RunRequest(steps=3).model_dump(mode="json"))
        job_id = jobs.add(session, kind="run", model_id=plan.model_id, run_id=run.id).id
    database.close()
    carried_out(service)
    job = service.get(f"/v1/jobs/{job_id}")
    assert job["state"] == "failed"
    assert job["error"]["type"].endswith("PlanMismatch")
    assert steps_of(service.events(job_id)) == []


@pytest.mark.parametrize("content", [None, b""])
def test_a_worker_makes_no_database(tmp_path: Path, content: bytes | None) -> None:
    settings = quick_settings(tmp_path / "data")
    file = tmp_path / "data" / "advisor.sqlite"
    if content is not None:
        file.parent.mkdir()
        file.write_bytes(content)
    with pytest.raises(SchemaMismatch, match="advisor serve"):
        work(settings, threading.Event())
    assert file.exists() == (content is not None)
    assert (tmp_path / "data").exists() == (content is not None)


def test_a_second_plan_is_set_beside_the_first_one_s_baseline(service: Service) -> None:
    service.post("/v1/models", {**TINY_GPT, "name": "two"}, status=201)
    service.post("/v1/models/two/windows", {"steps": 2, "warmup": 1, "curvature_steps": 1}, status=202)
    carried_out(service)
    results = []
    asked: dict[str, Any] = {"steps": 4, "evaluate_batches": 3}
    for recipe in ({"input": "bf16/none"}, {"input": "int8/none"}):
        plan = service.post("/v1/models/two/plans", {"uniform": recipe}, status=201).json()
        run = service.post(f"/v1/plans/{plan['id']}/runs", asked, status=202).json()["run"]
        carried_out(service)
        results.append(service.get(f"/v1/runs/{run['id']}"))
        asked["baseline_run"] = results[0]["id"]
    first, second = results
    assert second["curves"]["baseline"] == first["curves"]["baseline"]
    assert second["verdict"]["baseline_loss"] == first["verdict"]["baseline_loss"]
    assert abs(second["verdict"]["gap"]) > abs(first["verdict"]["gap"])
    assert {phase for phase, _ in steps_of(service.events(second["job_id"]))} == {"plan", "evaluate"}
    third = service.post(f"/v1/plans/{second['plan_id']}/runs", {**asked, "steps": 5})
    assert third.status_code == 422
    assert "steps" in third.json()["detail"]


def carried_out(service: Service) -> None:
    """Carry out the oldest waiting job, in this process."""
    database = Database(service.settings.url)
    see_through(claimed(database), service.settings)
    database.close()


def test_a_job_that_is_deleted_as_soon_as_it_is_over_does_not_trouble_its_worker(
    database: Database, tmp_path: Path
) -> None:
    job_id = add_window_job(database)
    attempt = claimed(database)
    job = attempt.job()
    attempt.fail({"title": "x", "status": 422, "detail": "x"})
    with database.writing() as session:
        models.delete(session, models.get(session, "m"))
    worker = Worker(quick_settings(tmp_path), database, "wrk_1", threading.Event())
    assert not worker.overdue(job)
    worker.settle(job, Left("its process ended with status 0", crashed=True))
    with database.reading() as session:
        assert jobs.find(session, job_id) is None


def test_checkpoints_resume_at_the_newest_with_its_notes(tmp_path: Path) -> None:
    checkpoints, trainer = Checkpoints(tmp_path, 1e-9), Trainer(SPEC)
    assert checkpoints.resume(trainer, "plan") == (0, None)
    losses = []
    for step in (1, 2, 3):
        losses.append(trainer.step())
        if step < 3:
            checkpoints.save(trainer, "plan", step, {"step": step})
    assert len(list(tmp_path.iterdir())) == 2
    later = Trainer(SPEC)
    assert Checkpoints(tmp_path, 1.0).resume(later, "plan") == (2, {"step": 2})
    assert later.step() == losses[2]
    assert Checkpoints(tmp_path, 1.0).resume(later, "baseline") == (0, None)


def test_pace_counts_all_phases() -> None:
    times = iter([0.0, 0.5, 1.0, 10.0, 12.0])
    pace = Pace({"warmup": 3, "window": 2}, clock=lambda: next(times))
    assert pace.step("warmup", 1) == {"steps_per_s": None, "seconds_left": None}
    assert pace.step("warmup", 2) == {"steps_per_s": 2.0, "seconds_left": 1.5}
    assert pace.step("warmup", 3) == {"steps_per_s": 2.0, "seconds_left": 1.0}
    assert pace.step("window", 1) == {"steps_per_s": None, "seconds_left": None}
    assert pace.step("window", 2) == {"steps_per_s": 0.5, "seconds_left": 0.0}
