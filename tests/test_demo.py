"""The demo: its claims are checked and can fail, its service is a process that is gone afterwards."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from advisor.cli import demo, main, service_process
from advisor.cli.demo_claims import claims
from advisor.client import connect
from advisor.errors import ServiceError

WINDOW = {"coverage": {"share": 1.0}}


def run_of(
    gap: float | None, interval: tuple[float, float] | None, plan_loss: float, share: float = 0.8
) -> dict[str, Any]:
    verdict = {"baseline_loss": 2.4, "plan_loss": plan_loss, "gap": gap, "gap_interval": interval, "share_8bit": share}
    curve = [{"step": step, "loss": 4.6 - 2.2 * step / 100} for step in range(1, 101)]
    return {"verdict": verdict, "curves": {"baseline": curve, "plan": curve}}


GOOD = run_of(0.003, (-0.002, 0.008), 2.403)
BAD = run_of(0.8, (0.7, 0.9), 3.2)


def failing(good: dict[str, Any], bad: dict[str, Any], window: dict[str, Any] = WINDOW) -> list[str]:
    return [claim.said for claim in claims(good, bad, window) if not claim.holds]


def test_claims_hold_on_what_they_claim() -> None:
    assert failing(GOOD, BAD) == []
    assert failing(GOOD, run_of(None, None, float("nan"))) == []  # a bad recipe that diverges is bad enough
    assert failing(GOOD, run_of(float("nan"), (float("nan"), float("nan")), float("nan"))) == []


def test_each_claim_can_fail() -> None:
    flat = copy.deepcopy(GOOD)
    flat["curves"]["baseline"] = [{"step": step, "loss": 4.6 - step / 100} for step in range(1, 101)]
    none = copy.deepcopy(GOOD)
    none["curves"]["baseline"] = []
    for good, bad, window, says in (
        (flat, BAD, WINDOW, "falls by at least a third (4.59 -> 3.64)"),
        (none, BAD, WINDOW, "falls by at least a third (nan -> nan)"),
        (GOOD, BAD, {"coverage": {"share": 0.9}}, "every matrix product was seen (90.0%"),
        (run_of(0.003, (-0.002, 0.008), 2.403, share=0.0), BAD, WINDOW, "puts products in 8 bits"),
        (run_of(0.3, (0.2, 0.4), 2.7), BAD, WINDOW, "the plan costs little: gap +0.3000"),
        (run_of(None, None, float("nan")), BAD, WINDOW, "the plan costs little: gap unknown"),
        (
            GOOD,
            run_of(0.1, (0.05, 0.15), 2.5),
            WINDOW,
            "the bad recipe costs much: gap +0.1000, at least 5% of it (0.1089)",
        ),
    ):
        assert any(says in said for said in failing(good, bad, window)), says
    hidden = run_of(0.3, (-0.1, 0.7), 2.7)  # large, but no more certain than the plan's
    assert any("intervals apart" in said for said in failing(GOOD, hidden))


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_service_is_gone_with_its_folder_after_the_block() -> None:
    with service_process.running() as service, connect(service.url) as client:
        service.wait_until_ready(client)
        assert client.get("/healthz") == {"status": "ok"}
    assert service.process.poll() is not None
    assert not service.folder.exists()


def test_a_service_that_cannot_start_shows_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = (sys.executable, "-c", "import sys; sys.exit('no such database')")
    monkeypatch.setattr(service_process, "SERVE", broken)
    with (
        pytest.raises(ServiceError, match=r"ended with status 1:\nno such database"),
        service_process.running(keep=True) as service,
        connect(service.url) as client,
    ):
        service.wait_until_ready(client)
    assert not service.folder.exists()  # --keep keeps what works


def test_termination_in_the_middle_cleans_up(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from advisor.cli import service_process\n"
        "with service_process.running() as service:\n"
        "    print(service.process.pid, service.folder, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as outer:
        assert outer.stdout is not None
        process_id, folder = outer.stdout.readline().split()
        assert alive(int(process_id))
        outer.send_signal(signal.SIGTERM)
        _, err = outer.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert not alive(int(process_id))
    assert not Path(folder).exists()


def test_a_demo_too_short_to_learn_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way over HTTP with a service of its own, on a training of four steps."""
    short = replace(demo.SHOWS["gpt"], warmup=2, window_steps=2, run_steps=4, evaluate_batches=2)
    config = {"layers": 1, "heads": 2, "width": 16, "context": 16}
    monkeypatch.setattr(demo, "SHOWS", {"gpt": replace(short, description={**short.description, "config": config})})
    monkeypatch.setattr(sys, "argv", ["advisor", "demo", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert "advisor: the demo's claim does not hold: the fp32 baseline learns" in err
    result = json.loads(out)
    assert len(result["run"]["curves"]["baseline"]) == len(result["run"]["curves"]["plan"]) == 4
    assert [row["cast"] for row in result["bad_plan"]["plan"]["assignments"] if row["role"] == "input"] == [
        "int8/none/nearest"
    ] * sum(row["role"] == "input" for row in result["bad_plan"]["plan"]["assignments"])
    assert result["bad_run"]["verdict"]["baseline_loss"] == result["run"]["verdict"]["baseline_loss"]
    for shown in (
        "blocks.0.mlp.up",  # the table by layer
        "Underflow (share of the non-zero elements) and SQNR in dB",
        result["plan"]["plan"]["assignments"][0]["reason"].split()[0],
        "the bad recipe",
        "gap to fp32",
        "8-bit share of FLOPs",
        "[FAILED] the fp32 baseline learns",
        "To open the API's docs",
    ):
        assert shown in err, shown


@pytest.mark.slow
@pytest.mark.parametrize("model", list(demo.SHOWS))
def test_the_demo_itself(model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "advisor.cli", "demo", "--model", model], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
