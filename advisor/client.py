"""The HTTP client: what the service can do, as Python calls that return plain dicts.

Every POST carries an Idempotency-Key, so it is safe to send again when the connection breaks before the
answer comes; the client does so by itself. Event streams go on where they broke off. Imports no torch: only
`push` and `download`, which handle windows, load it.

NaN and infinities are sent and arrive as floats (in JSON they are the strings "NaN", "Infinity", "-Infinity").
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from advisor.errors import ServiceError
from advisor.event_stream import Event, read_events
from probes.numbers import NON_FINITE, plain

if TYPE_CHECKING:
    from probes.window import Window

DEFAULT_URL = "http://127.0.0.1:8000"
# Ours: five tries over about eight seconds outlive a service's restart, and are soon enough told to the user.
TRIES = 5
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 8.0
PASSING_STATUSES = frozenset({429, 502, 503, 504})
OVER = frozenset({"succeeded", "failed", "canceled"})
WINDOW_FILE_TYPE = "application/vnd.safetensors"
TEXT_KEYS = frozenset({"name", "model_name", "site", "detail", "title"})  # free text: "NaN" stays a word there


def connect(url: str = DEFAULT_URL, timeout_s: float = 60.0) -> Client:
    """A client of the service at this URL. Nothing is sent yet."""
    return Client(url, timeout_s=timeout_s)


class Client:
    """One service. Use it in a `with`, or close it.

    Every method raises ServiceError where the service refuses or cannot be reached; its text says what to do.
    transport: where requests go instead of the network (an ASGI app in a test).
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = _address(url)
        self._sleep = sleep
        try:
            self._http = httpx.Client(base_url=self.url, timeout=timeout_s, transport=transport)
            if self._http.base_url.scheme not in ("http", "https") or not self._http.base_url.host:
                raise httpx.UnsupportedProtocol("no scheme or no host")
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise ServiceError(f"{url!r} is no URL of a service; one looks like {DEFAULT_URL}") from error

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ready(self) -> bool:
        """Whether the service answers that it is ready. One try; never raises."""
        try:
            return self._http.get("/readyz").is_success
        except httpx.TransportError:
            return False

    # Models

    def submit(self, description: dict[str, Any]) -> dict[str, Any]:
        """Create a model: name, family, config, data, training (`kind` may be left out).

        Returns the model.
        """
        return self.post("/v1/models", {"kind": "architecture", **description})

    def model(self, model: str) -> dict[str, Any]:
        """One model by id or name."""
        return self.get(f"/v1/models/{_segment(model)}")

    def find_model(self, model: str) -> dict[str, Any] | None:
        """One model by id or name; None where the service has none of either."""
        found: dict[str, Any] | None = self._find(f"/v1/models/{_segment(model)}")
        return found

    def models(self) -> Iterator[dict[str, Any]]:
        return self.pages("/v1/models")

    # Windows

    def push(self, window: Window | bytes | str | os.PathLike[str], model: str) -> dict[str, Any]:
        """Send a recorded window (or its file) to a model, which is created as external where there is none.

        Both happen or neither: a window that is refused leaves no model behind. Only sketches travel: no
        weights, no data, no code. Returns the stored window.
        """
        path = f"/v1/models/{_segment(model)}/windows?create=true"
        return self.post(path, content=_window_bytes(window), content_type=WINDOW_FILE_TYPE)

    def probe(self, model: str, **options: Any) -> dict[str, Any]:
        """Open a probing window as a job. Options: steps, warmup, every, curvature_steps, casts, finer, overhead,
        seed.

        Returns {"window": ..., "job": ...}; `wait(job["id"])` returns when it is over.
        """
        return self.post(f"/v1/models/{_segment(model)}/windows", options)

    def window(self, window: str) -> dict[str, Any]:
        return self.get(f"/v1/windows/{_segment(window)}")

    def windows(self, model: str) -> Iterator[dict[str, Any]]:
        return self.pages(f"/v1/models/{_segment(model)}/windows")

    def findings(self, window: str, severe: bool = False) -> Iterator[dict[str, Any]]:
        """Why usual recipes would fail on the window's training, severe ones first; `severe`: those alone."""
        return self.pages(f"/v1/windows/{_segment(window)}/findings", severe=severe)

    def download(self, window: str) -> bytes:
        """The window's file, for `Path.write_bytes` and `advisor.load_window`."""
        return self._send("GET", f"/v1/windows/{_segment(window)}/file").content

    # Advice

    def layers(self, model: str, window: str | None = None) -> list[dict[str, Any]]:
        return self.get(f"/v1/models/{_segment(model)}/layers", window=window)["items"]

    def history(
        self,
        model: str,
        site: str,
        role: str,
        cast: str,
        metrics: list[str] | None = None,
        window: str | None = None,
    ) -> dict[str, Any]:
        """One slot's metrics step by step, for any cast, whether or not it was scored before."""
        path = f"/v1/models/{_segment(model)}/layers/{quote(site, safe='/')}/history"
        return self.get(path, role=role, cast=cast, metric=metrics, window=window)

    def scores(self, model: str, **filters: Any) -> list[dict[str, Any]]:
        """Rows of site, role, cast, metrics, damage. Filters: window, cast (one or a list), site, role."""
        return list(self.pages(f"/v1/models/{_segment(model)}/scores", **filters))

    def plan(self, model: str, **options: Any) -> dict[str, Any]:
        """Make a plan.

        Options: windows, hardware, tolerance, max_lost_batch, casts, uniform. Returns it with its id.
        """
        return self.post(f"/v1/models/{_segment(model)}/plans", options)

    def saved_plan(self, plan: str) -> dict[str, Any]:
        return self.get(f"/v1/plans/{_segment(plan)}")

    def export(self, plan: str, target: str) -> dict[str, Any]:
        """A plan's files for another library: target, files (name → text), use, cannot."""
        return self.get(f"/v1/plans/{_segment(plan)}/export/{_segment(target)}")

    def plans(self, model: str) -> Iterator[dict[str, Any]]:
        return self.pages(f"/v1/models/{_segment(model)}/plans")

    def latest_plan(self, model: str) -> dict[str, Any] | None:
        """The plan that was made last for a model; None where it has none."""
        items = self.get(f"/v1/models/{_segment(model)}/plans", limit=1)["items"]
        return items[0] if items else None

    # Runs and jobs

    def run(self, plan: str, **options: Any) -> dict[str, Any]:
        """Train with a plan, as a job. Options: steps, seed, baseline, baseline_run, start_window,
        evaluate_batches.

        Returns {"run": ..., "job": ...}.
        """
        return self.post(f"/v1/plans/{_segment(plan)}/runs", options)

    def saved_run(self, run: str) -> dict[str, Any]:
        return self.get(f"/v1/runs/{_segment(run)}")

    def job(self, job: str) -> dict[str, Any]:
        return self.get(f"/v1/jobs/{_segment(job)}")

    def cancel(self, job: str) -> dict[str, Any]:
        """Ask a job to stop; it does within one training step. Returns the job."""
        return self._json(self._send("DELETE", f"/v1/jobs/{_segment(job)}"))

    def events(self, job: str, after: int | None = None) -> Iterator[Event]:
        """The job's events from the first one (or from the one after `after`) to its end, each once.

        A stream that breaks is opened again where it broke off; ServiceError after several tries with no
        event.
        """
        path = f"/v1/jobs/{_segment(job)}/events"
        last, failures = after, 0
        while True:
            headers = {
                "Accept": "text/event-stream",
                **({} if last is None else {"Last-Event-ID": str(last)}),
            }
            try:
                with self._http.stream("GET", path, headers=headers) as response:
                    if response.status_code != 200:
                        response.read()
                        self._raise_problem(response, passing_too=failures >= TRIES - 1)
                    else:
                        for event in read_events(response.iter_lines()):
                            if last is not None and event.id <= last:
                                continue
                            last, failures = event.id, 0
                            yield replace(event, data=_with_floats(event.data))
                            if event.kind == "state" and event.data.get("state") in OVER:
                                return
            except httpx.TransportError as error:
                if failures >= TRIES - 1:
                    raise self._unreachable(error) from error
            if self.job(job)["state"] in OVER and failures:
                return  # it ended before `after`, or nothing more is coming
            self._sleep(_pause_s(failures))
            failures += 1

    def wait(self, job: str, on_event: Callable[[Event], None] | None = None) -> dict[str, Any]:
        """Follow a job to its end and return it. Raises ServiceError if it failed or was canceled."""
        for event in self.events(job):
            if on_event is not None:
                on_event(event)
        ended = self.job(job)
        if ended["state"] == "failed":
            error = ended.get("error") or {}
            raise ServiceError(
                f"the {ended['kind']} job {job} failed: {_told(error) or 'the service does not say why'}"
            )
        if ended["state"] == "canceled":
            raise ServiceError(f"the {ended['kind']} job {job} was canceled")
        return ended

    # One call

    def get(self, path: str, **query: Any) -> Any:
        """GET; a query value may be a list (repeated) or None (left out). Returns the decoded body."""
        return self._json(self._send("GET", path, params={k: v for k, v in query.items() if v is not None}))

    def post(
        self, path: str, body: Any = None, *, content: bytes | None = None, content_type: str | None = None
    ) -> Any:
        """POST a JSON body, or bytes of a content type. Returns the decoded body."""
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        if content is not None:
            headers["Content-Type"] = content_type or "application/octet-stream"
            return self._json(self._send("POST", path, headers=headers, content=content))
        return self._json(self._send("POST", path, headers=headers, json=plain(body)))

    def pages(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """The items of all pages."""
        cursor: str | None = None
        while True:
            page = self.get(path, **query, cursor=cursor)
            yield from page["items"]
            cursor = page.get("next")
            if cursor is None:
                return

    def _find(self, path: str) -> Any:
        """GET, or None where the service says that there is no such thing."""
        response = self._send("GET", path, allow=404)
        if response.status_code != 404:
            return self._json(response)
        if _problem(response) is None:
            self._raise_problem(response, passing_too=True)  # it is not our service that answers
        return None

    def _send(self, method: str, path: str, *, allow: int | None = None, **parts: Any) -> httpx.Response:
        """One request; sent again, with pauses, while the connection fails or the service is busy."""
        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                response = self._http.request(method, path, **parts)
            except httpx.TransportError as error:
                if last:
                    raise self._unreachable(error) from error
                self._sleep(_pause_s(attempt))
                continue
            if response.is_success or response.status_code == allow:
                return response
            self._raise_problem(response, passing_too=last)
            self._sleep(_pause_s(attempt, response.headers.get("Retry-After")))
        raise AssertionError("the last attempt returns or raises")

    def _raise_problem(self, response: httpx.Response, passing_too: bool) -> None:
        """ServiceError with the problem's title and detail; not for what may pass, unless asked.

        A conflict that names a time to try again is one that passes: the first try of a POST, whose answer
        was lost, is still under way.
        """
        may_pass = response.status_code in PASSING_STATUSES or (
            response.status_code == 409 and "Retry-After" in response.headers
        )
        if may_pass and not passing_too:
            return
        problem = _problem(response)
        if problem is None:
            raise ServiceError(
                f"{response.request.method} {response.request.url} answered {response.status_code} "
                "without a reason: check that this is the address of a Numerics Advisor service"
            )
        raise ServiceError(_told(problem))

    def _json(self, response: httpx.Response) -> Any:
        try:
            return _with_floats(response.json())
        except ValueError as error:
            raise ServiceError(
                f"{response.request.url} answered something that is not JSON: "
                "check that this is the address of a Numerics Advisor service"
            ) from error

    def _unreachable(self, error: httpx.TransportError) -> ServiceError:
        if isinstance(error, httpx.TimeoutException):
            return ServiceError(f"{self.url} did not answer in time ({type(error).__name__}): look at its log")
        return ServiceError(
            f"no service answers at {self.url} ({error}): start one with `advisor serve`, "
            "or name another with --url or ADVISOR_URL"
        )


def _address(url: str) -> str:
    """The service's address without what calls add to it: a final slash, or the /v1 of its API."""
    return re.sub(r"(?<=[^/])/v1$", "", url.rstrip("/")).rstrip("/")


def _problem(response: httpx.Response) -> dict[str, Any] | None:
    """The problem (RFC 9457) that our service answered with; None where something else answered."""
    try:
        problem = response.json()
    except ValueError:
        return None
    return problem if isinstance(problem, dict) and "title" in problem else None


def _told(problem: dict[str, Any]) -> str:
    """A problem's title, detail and the places of its faults, as one line."""
    title, detail = str(problem.get("title") or ""), str(problem.get("detail") or "")
    text = ": ".join(part for part in (title, detail) if part)
    faults = [
        f"{'.'.join(str(part) for part in fault.get('loc', []))}: {fault.get('msg', '')}"
        for fault in problem.get("errors") or []
        if isinstance(fault, dict) and str(fault.get("msg", "")) not in text
    ]
    return "; ".join([text, *faults]) if faults else text


def _window_bytes(window: Window | bytes | str | os.PathLike[str]) -> bytes:
    if isinstance(window, bytes):
        return window
    if isinstance(window, str | os.PathLike):
        try:
            return Path(window).read_bytes()
        except OSError as error:
            raise ServiceError(f"the window file cannot be read: {error}") from error
    return window.to_bytes()


def _segment(name: str) -> str:
    """A name or id as one segment of a path."""
    if not name:
        raise ServiceError("an id or a name is needed, and it is empty")
    return quote(name, safe="")


def _pause_s(attempt: int, asked: str | None = None) -> float:
    """Seconds before the next try: twice as long each time, and no less than Retry-After asks for."""
    least = float(asked) if asked is not None and asked.isdigit() else 0.0
    return min(max(FIRST_PAUSE_S * 2.0**attempt, least), LONGEST_PAUSE_S)


def _with_floats(value: Any, key: str | None = None) -> Any:
    """The same JSON value with the words for NaN and infinities as floats, except in free text."""
    if isinstance(value, dict):
        return {name: _with_floats(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item, key) for item in value]
    if isinstance(value, str) and key not in TEXT_KEYS:
        return NON_FINITE.get(value, value)
    return value
