"""Jobs as real processes: windows and runs, streams that resume, cancel, kill -9."""

import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from service import TINY_GPT, Service, check_history, quick_settings, serving, steps_of, wait_until, working
from test_api_models import problem

from api.jobs.verdict import Arm, judge, paired_interval
from api.schemas import RunRequest

STEPS = 100
WINDOW = {"steps": 4, "warmup": 3, "curvature_steps": 1, "finer": ["block16/nvfp4"]}


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


def test_a_window_job_records_real_training(busy: Service, recorded: dict[str, Any]) -> None:
    assert recorded["state"] == "recorded"
    assert recorded["steps"] == [0, 1, 2, 3]
    assert recorded["has_checkpoint"]
    assert all(math.isfinite(loss) for loss in recorded["losses"])
    assert recorded["coverage"]["share"] > 0.9
    sites = [row["site"] for row in busy.get("/v1/models/tiny/layers")["items"]]
    assert "blocks.0.mlp.up" in sites
    rows = busy.get("/v1/models/tiny/scores", cast=["e2m1/block16/nvfp4"], role="input")["items"]
    assert rows
    assert all(row["sqnr_db"] > 10 for row in rows)
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


def test_a_run_whose_process_is_killed_has_one_result_with_each_step_once(
    busy: Service, recorded: dict[str, Any]
) -> None:
    plan = busy.post("/v1/models/tiny/plans", {"tolerance": 0.5, "max_lost_batch": 0.5}, status=201).json()
    asked = {"steps": STEPS, "start_window": recorded["id"], "evaluate_batches": 3}
    created = busy.post(f"/v1/plans/{plan['id']}/runs", asked, status=202).json()
    job_id = created["job"]["id"]
    busy.when(job_id, lambda job: (job["progress"] or {}).get("phase") == "plan" and job["progress"]["step"] >= 20)
    os.kill(process_of(job_id), signal.SIGKILL)
    job = busy.finished(job_id)
    assert (job["state"], job["attempt"]) == ("succeeded", 2), job
    check_history(busy.events(job_id), "succeeded")
    run = busy.get(job["result"]["href"])
    for arm in ("baseline", "plan"):
        assert [point["step"] for point in run["curves"][arm]] == list(range(1, STEPS + 1))
    # The same start and the same first batch: the first fp32 loss is the one that the window saw first.
    assert run["curves"]["baseline"][0]["loss"] == pytest.approx(recorded["losses"][0], rel=1e-6)
    verdict = run["verdict"]
    assert verdict["gap"] == pytest.approx(verdict["plan_loss"] - verdict["baseline_loss"])
    assert verdict["gap_interval"][0] <= verdict["gap"] <= verdict["gap_interval"][1]
    assert verdict["tolerance"] == 0.5
    assert {row["how"] for row in run["applied"]} == {"emulated"}
    # Counted over both attempts: as often as there were steps.
    assert {row["count"] for row in run["applied"] if row["role"] == "input"} == {STEPS}


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
