"""A real service for tests: the app under uvicorn on a free port, workers where asked, and httpx as the client."""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from fastapi import FastAPI
from torch import nn

import advisor
from api import log
from api.app import create_app
from api.jobs.worker import work
from api.settings import Settings

TINY_GPT: dict[str, Any] = {
    "name": "tiny",
    "kind": "architecture",
    "family": "gpt",
    "config": {"layers": 1, "heads": 2, "width": 16, "context": 16},
    "data": {"set": "python-text"},
    "training": {"batch_size": 4, "learning_rate": 0.003, "seed": 3},
}
TERMINAL = ("succeeded", "failed", "canceled")
WAIT_S = 120.0  # for a job on a busy machine; nothing asserts on it


@dataclass
class Service:
    """A running server. Calls go through `client`, whose base URL is the server's."""

    settings: Settings
    client: httpx.Client

    def post(self, path: str, body: Any, key: str | None = None, status: int | None = None) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        response = self.client.post(path, json=body, headers=headers)
        assert status is None or response.status_code == status, response.text
        return response

    def get(self, path: str, **query: Any) -> Any:
        response = self.client.get(path, params=query)
        assert response.status_code == 200, response.text
        return response.json()

    def push(self, model: str, window: bytes, **headers: str) -> httpx.Response:
        content_type = {"Content-Type": "application/vnd.safetensors"}
        return self.client.post(f"/v1/models/{model}/windows", content=window, headers=content_type | headers)

    def finished(self, job_id: str) -> dict[str, Any]:
        """The job, once it is over."""
        return self.when(job_id, lambda job: job["state"] in TERMINAL)

    def when(self, job_id: str, condition: Any) -> dict[str, Any]:
        """The job, once the condition holds."""
        job: dict[str, Any] = {}

        def reached() -> bool:
            nonlocal job
            job = self.get(f"/v1/jobs/{job_id}")
            return bool(condition(job))

        wait_until(reached, lambda: job)
        return job

    def events(self, job_id: str, last: int | None = None) -> list[dict[str, Any]]:
        """The job's stream to its end, as {"id", "event", "data"}."""
        headers = {} if last is None else {"Last-Event-ID": str(last)}
        with self.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers, timeout=WAIT_S) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            return list(frames(response.iter_lines()))


def wait_until(condition: Callable[[], bool], describe: Callable[[], Any] = str) -> None:
    """Returns when the condition holds; fails if it never does."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until, describe()
        time.sleep(0.05)


def frames(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Server-sent events, comments left out."""
    frame: dict[str, Any] = {}
    for line in lines:
        name, _, value = line.partition(": ")
        if line and name:
            frame[name] = value
        elif frame and not line:
            if "id" in frame:
                yield {"id": int(frame["id"]), "event": frame["event"], "data": json.loads(frame["data"])}
            frame = {}


def quick_settings(folder: Path, **changes: Any) -> Settings:
    """Settings with short waits."""
    quick: dict[str, Any] = {
        "lease_s": 1.0,
        "heartbeat_s": 0.3,
        "poll_s": 0.05,
        "checkpoint_s": 0.05,
        "log_level": "error",
    }
    return Settings(data_dir=folder, **(quick | changes))


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[Service]:
    """A service on these settings, without a worker."""
    with serving_app(create_app(settings)) as client:
        yield Service(settings, client)


@contextlib.contextmanager
def serving_app(app: FastAPI) -> Iterator[httpx.Client]:
    """An app on a free port, in a thread."""
    log.configure("error")
    config = uvicorn.Config(app, port=0, log_config=None, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def working(settings: Settings) -> Iterator[None]:
    """A worker in a thread; its jobs are real processes."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(settings, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def steps_of(events: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(e["data"]["phase"], e["data"]["step"]) for e in events if e["event"] == "step"]


def check_history(events: list[dict[str, Any]], last_state: str) -> None:
    """Ids rise by one, no step is there twice, and the terminal state is last and alone."""
    assert [event["id"] for event in events] == list(range(events[0]["id"], events[0]["id"] + len(events)))
    assert max(Counter(steps_of(events)).values(), default=1) == 1
    states = [event["data"]["state"] for event in events if event["event"] == "state"]
    assert [state for state in states if state in TERMINAL] == [last_state]
    assert events[-1]["data"]["state"] == last_state


def small_window(steps: int = 3, zero_weights: bool = False, seed: int = 0) -> advisor.Window:
    """A window of a small net on random data."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    if zero_weights:
        nn.init.zeros_(model[2].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0 if zero_weights else 0.1)
    with advisor.probe(model, optimizer, steps=max(steps, 1)) as window:
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(torch.randn(12, 8)), torch.randint(4, (12,)))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return window
