"""The HTTP client, against a tiny real server that breaks where the test wants it to."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from tiny_server import Server, hang_up, serving, stream

from advisor.client import TRIES, Client, connect
from advisor.errors import ServiceError
from advisor.event_stream import Event, read_events


@contextlib.contextmanager
def client_of(answers: dict[str, list[Any]]) -> Iterator[tuple[Client, Server, list[float]]]:
    pauses: list[float] = []
    with serving(answers) as server, Client(server.url, timeout_s=5, sleep=pauses.append) as client:
        yield client, server, pauses


PROBLEM = {
    "type": "about:blank",
    "title": "Data mismatch",
    "status": 422,
    "detail": "data.length 200 > context 64",
    "errors": [{"loc": ["config", "context"], "msg": "raise it"}],
}
RUNNING = {"id": "job_1", "kind": "window", "state": "running", "error": None}
DONE = {**RUNNING, "state": "succeeded"}


def test_a_post_is_sent_again_with_the_same_key_when_the_connection_breaks() -> None:
    with client_of({"POST /v1/models": [hang_up, hang_up, (201, {"id": "mdl_1"})]}) as (
        client,
        server,
        pauses,
    ):
        assert client.submit({"name": "a", "family": "gpt"}) == {"id": "mdl_1"}
        client.submit({"name": "b", "family": "gpt"})
    first, second, third, other = (seen.headers["idempotency-key"] for seen in server.seen)
    assert first == second == third != other
    assert json.loads(server.seen[0].body) == {"kind": "architecture", "name": "a", "family": "gpt"}
    assert pauses == [0.5, 1.0]


def test_a_busy_service_is_asked_again_after_the_time_it_names() -> None:
    def busy(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(503)
        handler.send_header("Retry-After", "3")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with client_of({"GET /v1/models/m": [busy, (200, {"id": "m"})]}) as (client, server, pauses):
        assert client.model("m") == {"id": "m"}
    assert pauses == [3.0]
    assert len(server.seen) == 2


def test_a_conflict_is_tried_again_only_where_it_names_a_time() -> None:
    def under_way(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(409)
        handler.send_header("Retry-After", "1")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with client_of({"POST /v1/models": [under_way, under_way, under_way, (201, {"id": "mdl_1"})]}) as (
        client,
        server,
        pauses,
    ):
        assert client.submit({"name": "m"}) == {"id": "mdl_1"}
    assert len({seen.headers["idempotency-key"] for seen in server.seen}) == 1
    assert pauses == [1.0, 1.0, 2.0]  # as asked, then longer

    taken = (409, {"title": "Conflict", "detail": "a model named 'm' exists"})
    with (
        client_of({"POST /v1/models": [taken]}) as (client, server, pauses),
        pytest.raises(ServiceError, match="a model named 'm' exists"),
    ):
        client.submit({"name": "m"})
    assert (len(server.seen), pauses) == (1, [])


def test_a_service_that_stays_busy_says_why_in_the_end() -> None:
    answers = {"GET /v1/models/m": [(503, {"title": "Not ready", "detail": "migrating"})]}
    with client_of(answers) as (client, server, _), pytest.raises(ServiceError, match="Not ready: migrating"):
        client.model("m")
    assert len(server.seen) == TRIES


def test_a_refusal_is_told_with_title_detail_and_places_and_not_repeated() -> None:
    answers = {"POST /v1/models": [(422, PROBLEM)]}
    with client_of(answers) as (client, server, _), pytest.raises(ServiceError) as refusal:
        client.submit({"name": "a"})
    assert str(refusal.value) == "Data mismatch: data.length 200 > context 64; config.context: raise it"
    assert len(server.seen) == 1


def test_no_service_at_all() -> None:
    with serving({}) as server:
        url = server.url
    client = Client(url, sleep=lambda _: None)
    with pytest.raises(ServiceError, match="start one with `advisor serve`"):
        client.model("m")
    assert not client.ready()
    client.close()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x", "http://", "no url at all"])
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(ServiceError, match="is no URL of a service"):
        connect(url)


@pytest.mark.parametrize("answer", [(200, b"<html>"), (404, b"<html>"), (404, {"message": "not here"})])
def test_some_other_server_at_the_address(answer: tuple[int, Any]) -> None:
    says = "address of a Numerics Advisor service"
    with client_of({"GET /v1/models/m": [answer]}) as (client, _, _), pytest.raises(ServiceError, match=says):
        client.model("m")


def test_words_for_nan_and_infinity_become_floats_but_names_stay() -> None:
    rows = [{"site": "NaN", "cast": "e5m2/none/nearest", "sqnr_db": "-Infinity", "losses": [1, "NaN"]}]
    with client_of({"GET /v1/models/m/scores?role=input": [(200, {"items": rows, "next": None})]}) as (
        client,
        _,
        _,
    ):
        (row,) = client.scores("m", role="input", window=None)
    assert row["site"] == "NaN"
    assert row["sqnr_db"] == -math.inf
    assert math.isnan(row["losses"][1])


def test_pages_are_followed_to_the_last() -> None:
    answers = {
        "GET /v1/models": [(200, {"items": [{"id": "a"}, {"id": "b"}], "next": "x/y"})],
        "GET /v1/models?cursor=x%2Fy": [(200, {"items": [{"id": "c"}], "next": None})],
    }
    with client_of(answers) as (client, _, _):
        assert [model["id"] for model in client.models()] == ["a", "b", "c"]


def test_site_names_travel_in_the_path() -> None:
    path = "/v1/models/my%20model/layers/%28root%29/sdpa.0%3F/history"
    path += "?role=query&cast=e5m2%2Fnone&metric=a&metric=b"
    with client_of({f"GET {path}": [(200, {"steps": []})]}) as (client, _, _):
        assert client.history("my model", "(root)/sdpa.0?", "query", "e5m2/none", ["a", "b"]) == {"steps": []}


def test_push_is_one_call_that_sends_only_the_file() -> None:
    with client_of({"POST /v1/models/m/windows?create=true": [hang_up, (201, {"id": "win_1"})]}) as (
        client,
        server,
        _,
    ):
        assert client.push(b"sketches", model="m") == {"id": "win_1"}
    first, again = server.seen
    assert first.body == again.body == b"sketches"
    assert first.headers["content-type"] == "application/vnd.safetensors"
    assert first.headers["idempotency-key"] == again.headers["idempotency-key"]


def test_a_refused_push_creates_no_model() -> None:
    refusal = (422, {"title": "Malformed window", "detail": "the file ends early"})
    with (
        client_of({"POST /v1/models/m/windows?create=true": [refusal]}) as (client, server, _),
        pytest.raises(ServiceError, match="Malformed window: the file ends early"),
    ):
        client.push(b"sket", model="m")
    assert len(server.seen) == 1


def test_a_model_is_found_or_not() -> None:
    missing = (404, {"title": "Not Found", "detail": "there is no model"})
    with client_of({"GET /v1/models/m": [missing, (200, {"id": "mdl_1"}), (404, b"<html>")]}) as (client, _, _):
        assert client.find_model("m") is None
        assert client.find_model("m") == {"id": "mdl_1"}
        with pytest.raises(ServiceError, match="address of a Numerics Advisor service"):
            client.find_model("m")


@pytest.mark.parametrize("added", ["", "/", "/v1", "/v1/", "//"])
def test_what_calls_add_to_the_address_is_left_off(added: str) -> None:
    with serving({"GET /v1/models/m": [(200, {"id": "mdl_1"})]}) as server, Client(server.url + added) as client:
        assert client.url == server.url
        assert client.model("m") == {"id": "mdl_1"}


def test_a_host_may_be_named_v1() -> None:
    with connect("http://v1") as client:
        assert client.url == "http://v1"


def test_numbers_that_json_lacks_are_sent_as_words() -> None:
    with client_of({"POST /v1/models/m/plans": [(201, {})]}) as (client, server, _):
        client.plan("m", tolerance=math.inf)
    assert json.loads(server.seen[0].body) == {"tolerance": "Infinity"}


def test_events_go_on_where_a_stream_broke_and_come_once() -> None:
    answers = {
        "GET /v1/jobs/job_1": [(200, RUNNING)],
        "GET /v1/jobs/job_1/events": [
            stream((1, "state", {"state": "running"}), (2, "step", {"step": 0, "loss": "NaN"}), cut=True),
            hang_up,
            stream((2, "step", {"step": 0}), (3, "step", {"step": 1})),
            stream((4, "state", {"state": "succeeded"})),
        ],
    }
    with client_of(answers) as (client, server, _):
        events = list(client.events("job_1"))
    assert [event.id for event in events] == [1, 2, 3, 4]
    assert math.isnan(events[1].data["loss"])
    asked = [seen.headers.get("last-event-id") for seen in server.seen if seen.path.endswith("/events")]
    assert asked == [None, "2", "2", "3"]


def test_following_a_job_that_is_over_ends() -> None:
    answers = {"GET /v1/jobs/job_1": [(200, DONE)], "GET /v1/jobs/job_1/events": [stream()]}
    with client_of(answers) as (client, _, _):
        assert list(client.events("job_1", after=10)) == []


def test_a_stream_that_never_comes_back_is_given_up() -> None:
    answers = {"GET /v1/jobs/job_1": [(200, RUNNING)], "GET /v1/jobs/job_1/events": [hang_up]}
    says = "no service answers at"
    with client_of(answers) as (client, server, _), pytest.raises(ServiceError, match=says):
        list(client.events("job_1"))
    assert sum(seen.path.endswith("/events") for seen in server.seen) == TRIES


def test_wait_returns_the_job_and_tells_a_failure() -> None:
    failed = {
        **RUNNING,
        "state": "failed",
        "error": {"title": "Training diverged", "detail": "the loss is nan"},
    }
    for job, ends in (
        (DONE, "succeeded"),
        (failed, "failed"),
        ({**RUNNING, "state": "canceled"}, "canceled"),
    ):
        answers = {
            "GET /v1/jobs/job_1": [(200, job)],
            "GET /v1/jobs/job_1/events": [stream((1, "log", {"text": "a"}), (2, "state", {"state": ends}))],
        }
        heard: list[Event] = []
        with client_of(answers) as (client, _, _):
            if ends == "succeeded":
                assert client.wait("job_1", heard.append) == job
            else:
                reason = "window job job_1 (failed: Training diverged: the loss is nan|was canceled)"
                with pytest.raises(ServiceError, match=reason):
                    client.wait("job_1", heard.append)
        assert [event.kind for event in heard] == ["log", "state"]


def test_event_lines_after_the_standard() -> None:
    lines = [":c", "id: 7", "event: log", "data: {", 'data:"text": 1}', "", "", "id: 8", "data: {}"]
    assert list(read_events(lines)) == [Event(7, "log", {"text": 1})]
    with pytest.raises(ServiceError, match="not an event of ours"):
        list(read_events(["data: hello", ""]))
