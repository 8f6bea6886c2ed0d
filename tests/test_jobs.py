"""Jobs as real processes: windows and runs, streams that resume, cancel, kill -9."""

import math
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import TINY_GPT, Service, quick_settings, serving, wait_until, worker_process, working
from test_api_models import problem

from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from api.jobs.verdict import Arm, judge, paired_interval
from api.schemas import RunRequest

WINDOW = {"steps": 4, "warmup": 3, "curvature_steps": 1}
TERMINAL = ("succeeded", "failed", "canceled")


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server with a worker, and the model "tiny"."""
    settings = quick_settings(tmp_path_factory.mktemp("busy"))
    with serving(settings) as running, working(settings):
        running.post("/v1/models", TINY_GPT, status=201)
        yield running


@pytest.fixture(scope="module")
def recorded(busy: Service) -> dict[str, Any]:
    """A window of "tiny" that a job recorded, with its job's id."""
    response = busy.post("/v1/models/tiny/windows", WINDOW, status=202)
    created = response.json()
    assert response.headers["location"] == f"/v1/jobs/{created['job']['id']}"
    assert created["window"]["state"] == "pending"
    job = busy.finished(created["job"]["id"])
    assert job["state"] == "succeeded", job
    assert job["result"] == {"href": f"/v1/windows/{created['window']['id']}"}
    window: dict[str, Any] = busy.get(job["result"]["href"])
    return window


def steps_of(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(e["data"]["phase"], e["data"]["step"]) for e in events if e["event"] == "step"]


def check_history(events: list[dict[str, Any]], last_state: str) -> None:
    """Ids rise by one, no step is there twice, and the terminal state is last and alone."""
    assert [event["id"] for event in events] == list(range(events[0]["id"], events[0]["id"] + len(events)))
    assert max(Counter(steps_of(events)).values(), default=1) == 1
    states = [event["data"]["state"] for event in events if event["event"] == "state"]
    assert [state for state in states if state in TERMINAL] == [last_state]
    assert events[-1]["data"]["state"] == last_state


def test_a_window_job_records_real_training(busy: Service, recorded: dict[str, Any]) -> None:
    assert recorded["state"] == "recorded"
    assert recorded["steps"] == [0, 1, 2, 3]
    assert recorded["has_checkpoint"]
    assert all(math.isfinite(loss) for loss in recorded["losses"])
    assert recorded["coverage"]["share"] > 0.9
    sites = [row["site"] for row in busy.get("/v1/models/tiny/layers")["items"]]
    assert "blocks.0.mlp.up" in sites
    wait_until(lambda: not list(busy.settings.data_dir.glob("jobs/*")))  # its checkpoints go


def test_its_events_tell_each_step_once_and_the_stream_resumes(busy: Service, recorded: dict[str, Any]) -> None:
    events = busy.events(recorded["job_id"])
    check_history(events, "succeeded")
    assert steps_of(events) == [("warmup", s) for s in (1, 2, 3)] + [("window", s) for s in (1, 2, 3, 4)]
    last = [event for event in events if event["event"] == "step"][-1]["data"]
    assert last["steps"] == 4
    assert last["steps_per_s"] > 0
    assert last["seconds_left"] == 0
    middle = events[len(events) // 2]["id"]
    assert busy.events(recorded["job_id"], last=middle) == [event for event in events if event["id"] > middle]
    assert busy.events(recorded["job_id"], last=events[-1]["id"]) == []
    bad = busy.client.get(f"/v1/jobs/{recorded['job_id']}/events", headers={"Last-Event-ID": "x"})
    problem(bad, 422)


def test_a_run_trains_both_arms_and_says_what_it_proved(busy: Service, recorded: dict[str, Any]) -> None:
    plan = busy.post("/v1/models/tiny/plans", {"tolerance": 0.5, "max_lost_batch": 0.5}, status=201).json()
    asked = {"steps": 5, "start_window": recorded["id"], "evaluate_batches": 3}
    created = busy.post(f"/v1/plans/{plan['id']}/runs", asked, status=202).json()
    job = busy.finished(created["job"]["id"])
    assert job["state"] == "succeeded", job
    run = busy.get(job["result"]["href"])
    for arm in ("baseline", "plan"):
        assert [point["step"] for point in run["curves"][arm]] == [1, 2, 3, 4, 5]
    # The same start and the same first batch: the first fp32 loss is the one that the window saw first.
    assert run["curves"]["baseline"][0]["loss"] == pytest.approx(recorded["losses"][0], rel=1e-6)
    verdict = run["verdict"]
    assert verdict["gap"] == pytest.approx(verdict["plan_loss"] - verdict["baseline_loss"])
    assert verdict["gap_interval"][0] <= verdict["gap"] <= verdict["gap_interval"][1]
    assert verdict["tolerance"] == 0.5
    assert {row["how"] for row in run["applied"]} == {"emulated"}
    assert all(row["count"] > 0 for row in run["applied"])
    check_history(busy.events(job["id"]), "succeeded")
    # A deliberately bad plan, beside the same baseline.
    bad = busy.post("/v1/models/tiny/plans", {"uniform": {"input": "int8/none"}}, status=201).json()
    borrowed = {**asked, "baseline_run": run["id"]}
    problem(busy.post(f"/v1/plans/{bad['id']}/runs", {**borrowed, "steps": 6}), 422)
    second = busy.post(f"/v1/plans/{bad['id']}/runs", borrowed, status=202).json()
    worse = busy.get(busy.finished(second["job"]["id"])["result"]["href"])
    assert worse["curves"]["baseline"] == run["curves"]["baseline"]
    assert worse["verdict"]["baseline_loss"] == verdict["baseline_loss"]
    assert worse["verdict"]["gap"] > verdict["gap"]
    assert {phase for phase, _ in steps_of(busy.events(second["job"]["id"]))} == {"plan", "evaluate"}


def test_a_training_that_diverges_at_once_fails_and_says_what_to_do(busy: Service) -> None:
    wild = {**TINY_GPT, "name": "wild"}
    wild["training"] = {"batch_size": 4, "learning_rate": 1000.0, "optimizer": "sgd", "warmup_steps": 0}
    busy.post("/v1/models", wild, status=201)
    created = busy.post("/v1/models/wild/windows", {"steps": 50, "warmup": 0}, status=202).json()
    job = busy.finished(created["job"]["id"])
    assert job["state"] == "failed", job
    assert job["attempt"] == 1
    assert job["error"]["status"] == 422
    assert "learning_rate" in job["error"]["detail"]
    assert "Traceback" not in str(job)
    assert busy.get(f"/v1/windows/{created['window']['id']}")["state"] == "failed"
    assert busy.events(job["id"])[-1]["data"]["error"]["detail"] == job["error"]["detail"]
    problem(busy.client.get(f"/v1/windows/{created['window']['id']}/file"), 404)


def test_cancel_takes_effect_within_one_step(busy: Service) -> None:
    created = busy.post("/v1/models/tiny/windows", {"steps": 1, "warmup": 1_000_000}, status=202).json()
    job_id = created["job"]["id"]
    busy.when(job_id, lambda job: job["progress"] is not None and job["progress"]["step"] >= 3)
    problem(busy.client.delete("/v1/models/tiny"), 409)
    canceled = busy.client.delete(f"/v1/jobs/{job_id}")
    assert canceled.status_code == 202
    at_cancel = canceled.json()["progress"]["step"]
    assert busy.finished(job_id)["state"] == "canceled"
    events = busy.events(job_id)
    check_history(events, "canceled")
    # No step is reported after the request was stored.
    assert max(step for _, step in steps_of(events)) == at_cancel
    assert busy.client.delete(f"/v1/jobs/{job_id}").status_code == 200
    assert busy.get(f"/v1/windows/{created['window']['id']}")["state"] == "failed"


def test_a_worker_killed_in_mid_job_leads_to_one_result_and_no_step_twice(tmp_path: Path) -> None:
    settings = quick_settings(tmp_path)
    with serving(settings) as service:
        service.post("/v1/models", TINY_GPT, status=201)
        asked = {"steps": 30, "warmup": 150, "curvature_steps": 1}
        created = service.post("/v1/models/tiny/windows", asked, status=202).json()
        job_id = created["job"]["id"]
        streamed: list[dict[str, Any]] = []
        reader = threading.Thread(target=lambda: streamed.extend(service.events(job_id)))
        reader.start()
        with worker_process(settings) as worker:
            service.when(job_id, lambda job: job["progress"] is not None and job["progress"]["step"] >= 40)
            os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
        assert service.get(f"/v1/jobs/{job_id}")["state"] == "running"
        with worker_process(settings):
            assert service.client.get("/v1/jobs").status_code == 200
            job = service.finished(job_id)
        reader.join()
        assert (job["state"], job["attempt"]) == ("succeeded", 2)
        check_history(streamed, "succeeded")
        assert steps_of(streamed) == [("warmup", s) for s in range(1, 151)] + [("window", s) for s in range(1, 31)]
        # An undisturbed training from the same seed goes the same way, loss for loss.
        spec = {name: part for name, part in TINY_GPT.items() if name not in ("name", "kind")}
        trainer = Trainer(ArchitectureSpec.parse(spec))
        undisturbed = [trainer.step() for _ in range(180)]
        assert [event["data"]["loss"] for event in streamed if event["event"] == "step"] == undisturbed
        window = service.get(job["result"]["href"])
        assert window["losses"] == undisturbed[150:]


def test_a_job_process_that_is_killed_is_run_again(busy: Service) -> None:
    plan = busy.post("/v1/models/tiny/plans", {"uniform": {"input": "e4m3fn"}}, status=201).json()
    run = {"steps": 60, "evaluate_batches": 2}
    created = busy.post(f"/v1/plans/{plan['id']}/runs", run, status=202).json()
    job_id = created["job"]["id"]
    busy.when(job_id, lambda job: (job["progress"] or {}).get("phase") == "plan" and job["progress"]["step"] >= 20)
    os.kill(process_of(job_id), signal.SIGKILL)
    job = busy.finished(job_id)
    assert (job["state"], job["attempt"]) == ("succeeded", 2), job
    check_history(busy.events(job_id), "succeeded")
    shown = busy.get(job["result"]["href"])
    for arm in ("baseline", "plan"):
        assert [point["step"] for point in shown["curves"][arm]] == list(range(1, 61))
    assert {row["count"] for row in shown["applied"] if row["role"] == "input"} == {60}


def process_of(job_id: str) -> int:
    """The process that carries out a job."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"api.jobs.execute" in arguments and job_id.encode() in arguments:
            return int(path.parent.name)
    raise AssertionError(f"no process carries out {job_id}")


# Verdicts


def test_the_paired_interval_is_the_one_of_student_s_t() -> None:
    from scipy import stats

    plan, baseline = [1.2, 1.1, 1.4, 1.0], [1.0, 1.0, 1.3, 1.05]
    gap, low, high = paired_interval(plan, baseline)
    expected = stats.ttest_rel(plan, baseline).confidence_interval(0.95)
    assert gap == pytest.approx(0.0875)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert all(math.isnan(value) for value in paired_interval([1.0, math.nan], [1.0, 1.0]))


@pytest.mark.parametrize(
    ("losses", "tolerance", "held"),
    [
        ([1.001, 1.002, 1.001], 0.1, True),
        ([1.5, 1.6, 1.5], 0.1, False),
        ([1.0, 1.3, 0.9], 0.1, None),
        ([1.0, 1.0, 1.0], None, None),
    ],
)
def test_a_plan_holds_its_tolerance_or_not_or_it_is_open(
    losses: list[float], tolerance: float | None, held: bool | None
) -> None:
    plan = tiny_plan(tolerance)
    verdict = judge(plan, Arm([1.0, 1.0, 1.0], None), Arm(losses, None), RunRequest(steps=2))
    assert verdict["held"] is held


def test_a_plan_that_diverges_is_a_finding() -> None:
    verdict = judge(tiny_plan(0.1), Arm([1.0, 1.0], None), Arm([], 7), RunRequest(steps=9))
    assert verdict["held"] is False
    assert verdict["diverged_at"] == 7
    assert "step 7" in verdict["summary"]


def tiny_plan(tolerance: float | None) -> Any:
    """Stands in for the four fields of a plan that a verdict reads."""
    from types import SimpleNamespace

    return SimpleNamespace(tolerance=tolerance, predicted=SimpleNamespace(share_8bit=0.5, damage=0.01))
