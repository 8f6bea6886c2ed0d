"""`api.serve` as a process of its own: the server, its worker, and an orderly end."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from service import TINY_GPT, Service, check_history, quick_settings, steps_of, wait_until

from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from api.hosts import HostRefused
from api.jobs.worker import settings_text
from api.serve import serve
from api.settings import Settings
from db.session import Database
from db.store import jobs

PROGRAM = """
import json, sys
from api.serve import serve
from api.settings import Settings
serve(Settings(**json.loads(sys.argv[1])), announce=lambda url: print(url, flush=True))
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Service, "subprocess.Popen[str]"]]:
    settings = quick_settings(tmp_path, port=0, shutdown_s=5)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, settings_text(settings)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        with httpx.Client(base_url=url, timeout=60) as client:
            yield Service(settings, client), process
    finally:
        process.kill()
        process.communicate()


def workers_of(parent: int) -> list[int]:
    """The worker processes of a server."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"api.jobs.worker" in arguments and str(parent).encode() in arguments:
            found.append(int(path.parent.name))
    return found


def test_a_worker_killed_in_mid_job_leads_to_one_result_and_the_end_is_orderly(server: tuple[Service, Any]) -> None:
    service, process = server
    wait_until(lambda: service.client.get("/readyz").status_code == 200)
    service.post("/v1/models", TINY_GPT, status=201)
    asked = {"steps": 12, "warmup": 60, "curvature_steps": 1}
    created = service.post("/v1/models/tiny/windows", asked, status=202).json()
    job_id = created["job"]["id"]
    with streaming(service, job_id) as streamed:
        service.when(job_id, lambda job: job["progress"] is not None and job["progress"]["step"] >= 20)
        (first,) = workers_of(process.pid)
        os.kill(first, signal.SIGKILL)
        job = service.finished(job_id)
    assert (job["state"], job["attempt"]) == ("succeeded", 2)
    check_history(streamed, "succeeded")
    assert steps_of(streamed) == [("warmup", s) for s in range(1, 61)] + [("window", s) for s in range(1, 13)]
    # An undisturbed training from the same seed goes the same way, loss for loss.
    trainer = Trainer(ArchitectureSpec.parse({k: v for k, v in TINY_GPT.items() if k not in ("name", "kind")}))
    undisturbed = [trainer.step() for _ in range(72)]
    assert [event["data"]["loss"] for event in streamed if event["event"] == "step"] == undisturbed
    assert service.get(job["result"]["href"])["losses"] == undisturbed[60:]
    assert len(service.get("/v1/models/tiny/windows")["items"]) == 1
    (second,) = workers_of(process.pid)
    assert second != first

    created = service.post("/v1/models/tiny/windows", {"steps": 1, "warmup": 1_000_000}, status=202).json()
    job_id = created["job"]["id"]
    with streaming(service, job_id) as streamed:
        service.when(job_id, lambda job: job["progress"] is not None)
        process.send_signal(signal.SIGTERM)
    assert streamed  # the open stream ended and did not hold the server
    assert process.wait(60) == 0
    assert workers_of(process.pid) == []
    database = Database(service.settings.url)
    with database.reading() as session:
        row = jobs.get(session, job_id)
    database.close()
    assert (row.state, row.crashes) == ("queued", 0)  # to be gone on with at the next start


@contextlib.contextmanager
def streaming(service: Service, job_id: str) -> Iterator[list[dict[str, Any]]]:
    """The job's events as they come; all of them after the block."""
    events: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: events.extend(service.events(job_id)))
    reader.start()
    try:
        yield events
    finally:
        reader.join()


def test_other_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HostRefused, match="does not bind"):
        serve(Settings(data_dir=tmp_path, host="0.0.0.0"))
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_says_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match="another port"):
            serve(Settings(data_dir=tmp_path, port=port))
    assert list(tmp_path.iterdir()) == []
