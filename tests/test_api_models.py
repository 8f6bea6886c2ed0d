"""Models over HTTP, and what every route has in common: problems, hosts, pages, limits, keys, health."""

import asyncio
import base64
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from service import TINY_GPT, Service, quick_settings, serving_app
from structlog.testing import capture_logs

from api import log
from api.app import create_app
from api.hosts import HostRefused, check_host
from api.settings import Settings
from probes.format_names import ALIASES
from probes.formats import FORMATS

EXTERNAL = {"name": "away", "kind": "external"}


def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The problem of a response, which is one and shows no traceback."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert "Traceback" not in response.text
    assert ".py" not in response.text
    return body


def test_a_model_is_submitted_listed_shown_and_deleted(service: Service) -> None:
    created = service.post("/v1/models", TINY_GPT, status=201)
    model = created.json()
    assert created.headers["location"] == f"/v1/models/{model['id']}"
    assert model["parameters"] > 1000
    assert model["config"]["width"] == 16
    assert model["training"]["optimizer"] == "adamw"  # defaults are filled in
    assert service.get("/v1/models/tiny") == service.get(f"/v1/models/{model['id']}") == model
    assert model in service.get("/v1/models")["items"]
    assert service.client.delete("/v1/models/tiny").status_code == 204
    problem(service.client.get("/v1/models/tiny"), 404)


def test_a_taken_name_is_a_conflict(service: Service) -> None:
    service.post("/v1/models", {**EXTERNAL, "name": "twice"}, status=201)
    assert "choose another name" in problem(service.post("/v1/models", {**EXTERNAL, "name": "twice"}), 409)["detail"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"family": "rnn"}, "gpt"),
        ({"config": {"width": 7}}, "width"),
        ({"config": {"widht": 16}}, "widht"),
        ({"data": {"set": "digits"}}, "reads tokens"),
        ({"training": {"learning_rate": -1}}, "learning_rate"),
        ({"name": "a/b"}, "A-Z a-z 0-9 . _ -"),
        ({"name": "a\n"}, "A-Z a-z 0-9 . _ -"),
        ({"name": "mdl_0123456789abcdef"}, "how ids begin"),
        ({"name": "run_3"}, "how ids begin"),
        ({"kind": "code"}, "kind"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_bad_model_is_refused_with_its_fault(service: Service, change: dict[str, Any], says: str) -> None:
    before = service.get("/v1/models")["items"]
    body = problem(service.post("/v1/models", {**TINY_GPT, "name": "bad", **change}), 422)
    assert says in body["detail"]
    assert service.get("/v1/models")["items"] == before


def test_pages_hold_every_model_once(service: Service) -> None:
    names = {f"page-{i}" for i in range(5)}
    for name in sorted(names):
        service.post("/v1/models", {"name": name, "kind": "external"}, status=201)
    seen, cursor = [], None
    while True:
        page = service.get("/v1/models", limit=2, **({} if cursor is None else {"cursor": cursor}))
        assert len(page["items"]) <= 2
        seen += [model["name"] for model in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert len(seen) == len(set(seen))
    assert names <= set(seen)


PLACES = [
    "[" * 3000,
    '["0001-01-01T00:00:00+14:00","mdl_1"]',
    '["9999-12-31T23:59:59-14:00","mdl_1"]',
    '["2026-01-01T00:00:00+00:00","\\ud800"]',
    '["2026-01-01T00:00:00","mdl_1"]',
    "[" + "1" * 5000 + "]",
]
CURSORS = [base64.urlsafe_b64encode(place.encode()).decode() for place in PLACES]


@pytest.mark.parametrize(
    "cursor",
    [
        "x",
        "bnVsbA",
        "W10",
        "WyJhIiwiYiJd",
        "é",
        *(base64.urlsafe_b64encode(place.encode()).decode() for place in PLACES),
    ],
)
def test_a_cursor_of_nothing_is_refused(service: Service, cursor: str) -> None:
    assert "cursor" in problem(service.client.get("/v1/models", params={"cursor": cursor}), 422)["detail"]


# Problems


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/models/none", 404),
        ("GET", "/v1/windows/none", 404),
        ("GET", "/v1/plans/none", 404),
        ("GET", "/v1/runs/none", 404),
        ("GET", "/v1/jobs/none", 404),
        ("GET", "/v1/jobs/none/events", 404),
        ("DELETE", "/v1/jobs/none", 404),
        ("PUT", "/v1/models", 405),
        ("GET", "/v1/models?limit=0", 422),
    ],
)
def test_every_error_is_a_problem(service: Service, method: str, path: str, status: int) -> None:
    body = problem(service.client.request(method, path), status)
    assert body["instance"] == path.partition("?")[0]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b"", b'{"name": NaN}'])
def test_a_body_that_is_no_such_json_is_refused(service: Service, content: bytes) -> None:
    response = service.client.post("/v1/models", content=content, headers={"Content-Type": "application/json"})
    assert problem(response, 422)["errors"]


JSON_POSTS = ["/v1/models", "/v1/models/x/plans", "/v1/plans/x/runs"]


@pytest.mark.parametrize("path", JSON_POSTS)
@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/octet-stream"])
def test_json_is_to_be_declared_as_such(service: Service, path: str, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = service.client.post(path, content=b'{"name": "typed", "kind": "external"}', headers=headers)
    assert "send Content-Type: application/json" in problem(response, 415)["detail"]
    problem(service.client.get("/v1/models/typed"), 404)


@pytest.mark.parametrize("path", [*JSON_POSTS, "/v1/models/x/windows"])
@pytest.mark.parametrize(
    "content",
    [
        b'{"name": "\\ud800"}',
        b'{"\\ud800": 1}',
        b'{"windows": ["\\udfff"]}',
        b'{"kind": "external", "name": "\xed\xa0\x80"}',
        b'{"uniform": {"\\ud800": "int8"}}',
        b'{"seed": ' + b"1" * 5000 + b"}",
        *(b'{"config": ' + b"[" * depth + b"]" * depth + b"}" for depth in (40, 500, 900, 960, 5000)),
    ],
)
def test_json_that_no_database_holds_is_refused(service: Service, path: str, content: bytes) -> None:
    response = service.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422)
    problem(response, response.status_code)


def test_half_of_a_surrogate_pair_is_named(service: Service) -> None:
    response = service.client.post(
        "/v1/models/x/plans", content=b'{"windows": ["\\ud800"]}', headers={"Content-Type": "application/json"}
    )
    assert "surrogate" in problem(response, 422)["detail"]


def test_a_client_that_breaks_off_is_no_fault_of_ours(tmp_path: Any) -> None:
    app = create_app(quick_settings(tmp_path))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/models/m/windows",
        "raw_path": b"/v1/models/m/windows",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/octet-stream")],
    }
    messages = iter([{"type": "http.request", "body": b"half", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(_message: Any) -> None:
        pass

    log.configure("info")
    with capture_logs() as logged:
        asyncio.run(app(scope, receive, send))
    log.configure("error")
    assert ("client left", "info") in [(entry["event"], entry["log_level"]) for entry in logged]
    assert {entry["log_level"] for entry in logged} == {"info"}
    assert not any("exc_info" in entry for entry in logged)
    assert list((tmp_path / "uploads").iterdir()) == []


def test_a_fault_of_ours_shows_a_number_and_nothing_else(tmp_path: Any) -> None:
    app = create_app(quick_settings(tmp_path))

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("secret detail")

    with serving_app(app) as client:
        response = client.get("/broken")
    body = problem(response, 500)
    assert "secret" not in response.text
    assert body["number"] in body["detail"]


# Hosts


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_addresses_are_not_bound(host: str) -> None:
    with pytest.raises(HostRefused, match="does not bind"):
        check_host(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_is_bound(host: str) -> None:
    assert check_host(host) == host


@pytest.mark.parametrize(
    "host",
    ["example.org", "10.0.0.1:8000", "", "127.evil.com", "127.0.0.1.evil.com:8000", "localhost.evil.com", "[::2]"],
)
def test_a_foreign_host_is_refused(service: Service, host: str) -> None:
    problem(service.client.get("/v1/models", headers={"Host": host}), 421)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.2:8000", "[::1]:8000", "[::1]"])
def test_this_machine_s_names_are_answered(service: Service, host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert service.client.get("/v1/models", headers=headers).status_code == 200


def test_a_foreign_page_is_refused(service: Service) -> None:
    for origin in ("https://example.org", "http://127.evil.com", "null"):
        problem(service.client.get("/v1/models", headers={"Origin": origin}), 403)
    assert service.client.get("/v1/models", headers={"Origin": "http://localhost:8000"}).status_code == 200


# Limits


def test_a_json_body_over_the_limit_is_refused_by_its_length(service: Service) -> None:
    body = {**EXTERNAL, "name": "large", "padding": "x" * 30_000}
    assert "20,000" in problem(service.post("/v1/models", body), 413)["detail"]
    headers = {"Content-Type": "application/octet-stream"}  # has the large limit where windows are pushed, only there
    problem(service.client.post("/v1/models", content=bytes(30_000), headers=headers), 413)


def test_a_json_body_over_the_limit_is_refused_while_it_streams(service: Service) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(200):
            sent += 1_000
            yield b" " * 1_000

    response = service.client.post("/v1/models", content=chunks(), headers={"Content-Type": "application/json"})
    assert "transfer-encoding" in response.request.headers
    problem(response, 413)


# Idempotency


def test_a_repeat_gets_the_same_answer_and_has_no_second_effect(service: Service) -> None:
    body = {"name": "once", "kind": "external"}
    first = service.post("/v1/models", body, key="k1", status=201)
    again = service.post("/v1/models", body, key="k1", status=201)
    assert again.content == first.content
    assert again.headers["location"] == first.headers["location"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert "another request" in problem(service.post("/v1/models", {**body, "name": "o2"}, key="k1"), 422)["detail"]


def test_a_request_that_failed_frees_its_key(service: Service) -> None:
    problem(service.post("/v1/models", {**TINY_GPT, "name": "f", "family": "rnn"}, key="k2"), 422)
    service.post("/v1/models", {"name": "f", "kind": "external"}, key="k2", status=201)


def test_the_same_key_at_the_same_time_has_one_effect(service: Service) -> None:
    body, answers = {"name": "race", "kind": "external"}, []

    def post() -> None:
        answers.append(service.post("/v1/models", body, key="k3"))

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One did it; the others came after it (201, replayed) or meanwhile (409).
    assert sum(a.status_code == 201 and "idempotent-replayed" not in a.headers for a in answers) == 1
    assert {a.status_code for a in answers} <= {201, 409}
    assert len({a.json()["id"] for a in answers if a.status_code == 201}) == 1


def test_two_clients_at_once_both_get_through(service: Service) -> None:
    failures = []

    def client(name: str) -> None:
        with httpx.Client(base_url=service.client.base_url) as own:
            for i in range(10):
                response = own.post("/v1/models", json={"name": f"{name}-{i}", "kind": "external"})
                if response.status_code != 201 or own.get(f"/v1/models/{name}-{i}").status_code != 200:
                    failures.append(response.text)

    threads = [threading.Thread(target=client, args=(name,)) for name in ("left", "right")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# Catalogue, health, documentation


def test_the_catalogue_is_the_tables(service: Service) -> None:
    formats = {row["name"]: row for row in service.get("/v1/formats")["items"]}
    assert list(formats) == list(FORMATS)
    for name, row in formats.items():
        assert row["aliases"] == {library: list(names) for library, names in ALIASES[name].items() if names}
        assert row["nonfinite"] == FORMATS[name].nonfinite.value
        figures = row.keys() - {"aliases", "nonfinite"}
        assert {figure: row[figure] for figure in figures} == {
            figure: getattr(FORMATS[name], figure) for figure in figures
        }
    assert formats["e4m3fn"]["largest"] == 448
    assert formats["e5m2"]["smallest_subnormal"] == 2.0**-16
    assert formats["fp64"]["largest"] == sys.float_info.max
    assert (formats["int4"]["lowest"], formats["e8m0"]["signed"], formats["tf32"]["stored_bits"]) == (-8, False, 32)
    assert "any eXmY" in service.get("/openapi.json")["paths"]["/v1/formats"]["get"]["description"]
    hardware = {row["name"]: row for row in service.get("/v1/hardware")["items"]}
    assert ["e4m3fn", "e5m2"] in hardware["h100"]["pairs"]
    assert ["e5m2", "e5m2"] not in hardware["h100"]["pairs"]
    assert ["e4m3fnuz", "e5m2fnuz"] in hardware["mi300x"]["pairs"]


def test_alive_but_not_ready_without_a_worker(service: Service) -> None:
    assert service.get("/healthz") == {"status": "ok"}
    response = service.client.get("/readyz")
    assert response.status_code == 503
    assert response.json()["database"] == response.json()["migrations"] == "ok"
    assert "advisor worker" in response.json()["worker"]


def test_every_post_has_an_example_body(service: Service) -> None:
    document = service.get("/openapi.json")
    posts = {path: calls["post"] for path, calls in document["paths"].items() if "post" in calls}
    assert len(posts) == 4
    for path, call in posts.items():
        content = call["requestBody"]["content"]["application/json"]
        schema = content["schema"]
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert "examples" in content or "example" in content or "example" in schema, path
        assert any(parameter["name"] == "Idempotency-Key" for parameter in call["parameters"]), path
    assert "Problem" in document["components"]["schemas"]
    assert json.dumps(document)


def test_the_calls_are_the_contract_s(service: Service) -> None:
    paths = service.get("/openapi.json")["paths"]
    calls = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert calls == {
        "POST /v1/models",
        "GET /v1/models",
        "GET /v1/models/{model_id}",
        "DELETE /v1/models/{model_id}",
        "POST /v1/models/{model_id}/windows",
        "GET /v1/models/{model_id}/windows",
        "GET /v1/windows/{window_id}",
        "GET /v1/windows/{window_id}/findings",
        "GET /v1/windows/{window_id}/file",
        "GET /v1/models/{model_id}/layers",
        "GET /v1/models/{model_id}/layers/{site}/history",
        "GET /v1/models/{model_id}/scores",
        "POST /v1/models/{model_id}/plans",
        "GET /v1/models/{model_id}/plans",
        "GET /v1/plans/{plan_id}",
        "GET /v1/plans/{plan_id}/export/{target}",
        "POST /v1/plans/{plan_id}/runs",
        "GET /v1/plans/{plan_id}/runs",
        "GET /v1/runs/{run_id}",
        "GET /v1/jobs",
        "GET /v1/jobs/{job_id}",
        "DELETE /v1/jobs/{job_id}",
        "GET /v1/jobs/{job_id}/events",
        "GET /v1/formats",
        "GET /v1/hardware",
        "GET /healthz",
        "GET /readyz",
    }


def test_the_settings_are_these() -> None:
    assert set(Settings.model_fields) == {
        "data_dir",
        "database_url",
        "host",
        "port",
        "json_limit_bytes",
        "window_limit_bytes",
        "cached_windows",
        "lease_s",
        "heartbeat_s",
        "poll_s",
        "cancel_grace_s",
        "checkpoint_s",
        "most_crashes",
        "shutdown_s",
        "log_level",
    }


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVISOR_WINDOW_LIMIT_BYTES", "5000")
    assert Settings().window_limit_bytes == 5000
    assert Settings(window_limit_bytes=7).window_limit_bytes == 7
    monkeypatch.setenv("ADVISOR_LEASE_S", "nan")
    with pytest.raises(ValidationError, match="lease_s"):
        Settings()


def test_the_examples_of_models_are_accepted(service: Service) -> None:
    document = service.get("/openapi.json")
    examples = document["paths"]["/v1/models"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for example in examples.values():
        service.post("/v1/models", {**example["value"], "name": f"ex-{example['value']['name']}"}, status=201)
