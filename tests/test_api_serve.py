"""`api.serve` as a process of its own: the server, its worker, and an orderly end."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from service import TINY_GPT, Service, quick_settings, wait_until

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


def test_a_killed_worker_is_replaced_and_the_end_is_orderly(server: tuple[Service, Any]) -> None:
    service, process = server
    wait_until(lambda: service.client.get("/readyz").status_code == 200)
    (first,) = workers_of(process.pid)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: [pid for pid in workers_of(process.pid) if pid != first] != [])

    service.post("/v1/models", TINY_GPT, status=201)
    created = service.post("/v1/models/tiny/windows", {"steps": 1, "warmup": 1_000_000}, status=202).json()
    job_id = created["job"]["id"]
    streamed: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: streamed.extend(service.events(job_id)))
    reader.start()
    service.when(job_id, lambda job: job["progress"] is not None)
    process.send_signal(signal.SIGTERM)
    reader.join()  # the open stream does not hold the server
    assert process.wait(60) == 0
    assert streamed
    assert workers_of(process.pid) == []
    database = Database(service.settings.url)
    with database.reading() as session:
        job = jobs.get(session, job_id)
    database.close()
    assert (job.state, job.crashes) == ("queued", 0)  # to be gone on with at the next start


def test_other_addresses_are_refused(tmp_path: Path) -> None:
    with pytest.raises(HostRefused, match="does not bind"):
        serve(Settings(data_dir=tmp_path, host="0.0.0.0"))
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use_says_what_to_do(server: tuple[Service, Any], tmp_path: Path) -> None:
    service, _ = server
    port = service.client.base_url.port
    assert port is not None
    with pytest.raises(OSError, match="another port"):
        serve(Settings(data_dir=tmp_path / "second", port=port))
