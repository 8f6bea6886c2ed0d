"""Pushed windows over HTTP, and what is asked of them: layers, history, scores, plans, the file."""

import json
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from service import TINY_GPT, Service, quick_settings, serving, small_window, wait_until
from test_api_models import problem
from test_diagnosis import net_window, wide_channels

import advisor
from advisor.metrics import measure
from advisor.training import Trainer
from advisor.zoo.spec import ArchitectureSpec
from db.session import Database
from db.store import plans
from probes.windowfile import window_from_bytes

CASTS = ["e4m3fn/tensor/current/nearest", "e5m2/none/nearest"]


@pytest.fixture(scope="module")
def window() -> advisor.Window:
    return small_window()


@pytest.fixture(scope="module")
def pushed(service: Service, window: advisor.Window) -> dict[str, Any]:
    """A window in the external model "net"."""
    service.post("/v1/models", {"name": "net", "kind": "external"}, status=201)
    response = service.push("net", window.to_bytes())
    assert response.status_code == 201, response.text
    body: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/v1/windows/{body['id']}"
    return body


def test_a_pushed_window_is_shown(service: Service, pushed: dict[str, Any], window: advisor.Window) -> None:
    shown = service.get(f"/v1/windows/{pushed['id']}")
    assert shown == pushed
    assert (pushed["state"], pushed["origin"], pushed["job_id"]) == ("recorded", "pushed", None)
    assert pushed["steps"] == list(window.steps) == [0, 1, 2]
    assert pushed["losses"] == pytest.approx(window.losses)
    assert pushed["sites"] == len(window.sites) == 2
    assert pushed["slots"] == len(window.slots)
    assert len(window.product_slots) == 6
    assert 0 < pushed["bytes_per_sketch"] < 2040
    assert pushed["id"] in [row["id"] for row in service.get("/v1/models/net/windows")["items"]]


def test_a_planted_cause_is_found_with_its_place_and_remedy(service: Service) -> None:
    planted = net_window(wide_channels)
    service.post("/v1/models", {"name": "planted", "kind": "external"}, status=201)
    body = service.push("planted", planted.to_bytes()).json()
    listed = service.get(f"/v1/windows/{body['id']}/findings")
    findings = listed["items"]
    assert (listed["window"], listed["total"], listed["next"]) == (body["id"], len(findings), None)
    assert [(one["cause"], one["site"], one["role"]) for one in findings if one["severe"]] == [
        ("channel_outliers", "head", "input")
    ]
    assert findings == json.loads(json.dumps([one.to_dict() for one in advisor.diagnose(planted)]))
    assert service.get(f"/v1/windows/{body['id']}/findings", severe=True)["items"] == findings[:1]
    made = service.post("/v1/models/planted/plans", {"tolerance": 1.0}, status=201).json()
    assert f"a usual recipe would fail here: {advisor.diagnose(planted)[0]}" in made["plan"]["notes"]


def test_findings_come_in_pages(service: Service) -> None:
    """The gradients of a loss of 1e-6 are flushed at every site."""
    service.post("/v1/models", {"name": "flushed", "kind": "external"}, status=201)
    body = service.push("flushed", net_window(factor=1e-6).to_bytes()).json()
    path = f"/v1/windows/{body['id']}/findings"
    whole = service.get(path)
    assert whole["total"] == len(whole["items"]) > 1
    first = service.get(path, limit=1)
    assert (first["items"], first["total"]) == (whole["items"][:1], whole["total"])
    second = service.get(path, limit=1, cursor=first["next"])
    assert second["items"] == whole["items"][1:2]
    assert problem(service.client.get(path, params={"severe": True, "cursor": first["next"]}), 422)


def test_a_window_is_shown_without_being_decoded(
    service: Service, window: advisor.Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.post("/v1/models", {"name": "undecoded", "kind": "external"}, status=201)
    body = service.push("undecoded", window.to_bytes()).json()
    decoded: list[str] = []
    monkeypatch.setattr("api.windowcache.decode", lambda database, window_id: decoded.append(window_id))
    assert service.get(f"/v1/windows/{body['id']}") == body
    assert decoded == []


def test_the_file_is_the_window_again(service: Service, pushed: dict[str, Any], window: advisor.Window) -> None:
    response = service.client.get(f"/v1/windows/{pushed['id']}/file")
    assert response.headers["content-type"] == "application/vnd.safetensors"
    back = window_from_bytes(response.content)
    assert back.header() == window.header()
    for slot in window.slots:
        assert back.history(*slot).pack() == window.history(*slot).pack()


def test_layers_share_the_flops(service: Service, pushed: dict[str, Any], window: advisor.Window) -> None:
    body = service.get("/v1/models/net/layers")
    assert body["window"] == pushed["id"]
    assert [row["site"] for row in body["items"]] == [site.name for site in window.sites] == ["0", "2"]
    assert sum(row["share_of_flops"] for row in body["items"]) == pytest.approx(1)
    first = body["items"][0]
    assert first["shapes"]["weight"] == [16, 8]
    assert first["parameter"] == "0.weight"


def test_history_of_any_cast_is_computed_from_sketches(
    service: Service, pushed: dict[str, Any], window: advisor.Window
) -> None:
    body = service.get("/v1/models/net/layers/2/history", role="grad_output", cast="e5m2/none")
    assert body["cast"] == "e5m2/none/nearest"
    assert body["steps"] == [0, 1, 2]
    expected = measure(window.history("2", "grad_output"), advisor.Cast.parse("e5m2/none"))
    for name in ("underflow", "sqnr_db", "amax"):
        assert body["metrics"][name] == pytest.approx([float(value) for value in getattr(expected, name)])
    only = service.get("/v1/models/net/layers/2/history", role="input", metric=["overflow", "amax"])
    assert set(only["metrics"]) == {"overflow", "amax"}


@pytest.mark.parametrize(
    ("site", "query", "status", "says"),
    [
        ("22", {"role": "input"}, 404, "near it: 2"),
        ("0", {"role": "key"}, 404, "input, weight, grad_output"),
        ("0", {}, 422, "role"),
        ("0", {"role": "input", "cast": "e9m9"}, 422, "e9m9"),
        ("0", {"role": "input", "cast": "e4m3fn/block128x128"}, 422, "block128x128"),
        ("0", {"role": "input", "metric": "speed"}, 422, "underflow"),
        ("0", {"role": "input", "window": "win_none"}, 404, "win_none"),
    ],
)
def test_a_history_of_nothing_says_what_there_is(
    service: Service, pushed: dict[str, Any], site: str, query: dict[str, str], status: int, says: str
) -> None:
    response = service.client.get(f"/v1/models/net/layers/{site}/history", params=query)
    assert says in problem(response, status)["detail"]


@pytest.mark.parametrize("encoded", [True, False])
def test_site_names_with_slashes_and_brackets_work_in_paths(service: Service, encoded: bool) -> None:
    import torch
    from torch import nn

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            product: torch.Tensor = y @ y.transpose(0, 1)
            return product

    name = f"sites-{encoded}"
    service.post("/v1/models", {"name": name, "kind": "external"}, status=201)
    model = Product()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with advisor.probe(model, optimizer, steps=1) as window:
        torch.nn.functional.mse_loss(model(torch.ones(3, 4)), torch.zeros(3, 3)).backward()
        optimizer.step()
    assert service.push(name, window.to_bytes()).status_code == 201
    sites = [row["site"] for row in service.get(f"/v1/models/{name}/layers")["items"]]
    assert any("/" in site and "(root)" in site for site in sites)
    for site in sites:
        path = quote(site, safe="" if encoded else "/()")
        role = window.site(site).roles[0]
        assert service.get(f"/v1/models/{name}/layers/{path}/history", role=role)["site"] == site


# Scores


def test_scores_are_the_library_s(service: Service, pushed: dict[str, Any], window: advisor.Window) -> None:
    body = service.get("/v1/models/net/scores")
    expected = advisor.score(window).rows
    assert body["window"] == pushed["id"]
    assert len(body["items"]) == len(expected)
    for row, wanted in zip(body["items"], expected, strict=True):
        assert (row["site"], row["role"], row["cast"]) == (wanted["site"], wanted["role"], wanted["cast"])
        assert row["underflow"] == pytest.approx(wanted["underflow"])
        assert row["damage"] == (None if wanted["damage"] is None else pytest.approx(wanted["damage"]))


def test_scales_by_row_or_block_are_scored_where_they_were_sketched(
    service: Service, pushed: dict[str, Any], own: str
) -> None:
    rows = service.get("/v1/models/net/scores", cast=["e4m3fn/block32"], role="input")["items"]
    assert {row["axis"] for row in rows} == {"along -1"}
    assert {other["axis"] for row in rows for other in row["other_axes"]} == {"across -1"}
    asked = service.client.get("/v1/models/net/scores", params={"cast": ["int8", "e4m3fn/block128x128"]})
    assert "finer=" in problem(asked, 422)["detail"]
    jobs = service.get("/v1/jobs")["items"]
    finer = service.post("/v1/models/own/windows", {"steps": 2, "finer": ["block33"]})
    assert "block33" in problem(finer, 422)["detail"]
    opened = service.post("/v1/models/own/windows", {"steps": 2, "casts": ["e4m3fn/block32"]})
    assert "e4m3fn/block32/e8m0/nearest has a scale for every block32" in problem(opened, 422)["detail"]
    assert service.get("/v1/jobs")["items"] == jobs


def test_scores_follow_a_delayed_scale(service: Service, pushed: dict[str, Any], window: advisor.Window) -> None:
    cast = "e4m3fn/tensor/delayed(len=2,margin=0)/nearest"
    rows = service.get("/v1/models/net/scores", cast=["e4m3fn/tensor/delayed(len=2)"])["items"]
    assert [row["sqnr_db"] for row in rows] == pytest.approx(
        [row["sqnr_db"] for row in advisor.score(window, [cast]).rows]
    )
    assert {row["cast"] for row in rows} == {cast}


def test_scores_are_filtered_and_paged(service: Service, pushed: dict[str, Any]) -> None:
    one = service.get("/v1/models/net/scores", site="0", role="weight", cast=CASTS)["items"]
    assert [(row["site"], row["role"], row["cast"]) for row in one] == [("0", "weight", cast) for cast in CASTS]
    everything = service.get("/v1/models/net/scores")
    first = service.get("/v1/models/net/scores", limit=4)
    rest = service.get("/v1/models/net/scores", cursor=first["next"])
    assert first["items"] + rest["items"] == everything["items"]
    assert everything["next"] is None
    foreign = service.client.get("/v1/models/net/scores", params={"cursor": first["next"], "site": "0"})
    assert "cursor" in problem(foreign, 422)["detail"]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"site": "22"}, "near it: 2"),
        ({"site": "0", "role": "key"}, "input, weight, grad_output"),
        ({"role": "key"}, "input, weight, grad_output"),
    ],
)
def test_scores_of_nothing_say_what_there_is(
    service: Service, pushed: dict[str, Any], query: dict[str, str], says: str
) -> None:
    assert says in problem(service.client.get("/v1/models/net/scores", params=query), 404)["detail"]


def test_nan_and_infinity_come_through(service: Service) -> None:
    service.post("/v1/models", {"name": "zeros", "kind": "external"}, status=201)
    window = small_window(zero_weights=True)
    assert service.push("zeros", window.to_bytes()).status_code == 201
    expected = advisor.score(window).rows
    words = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    found = set()
    for row, wanted in zip(service.get("/v1/models/zeros/scores")["items"], expected, strict=True):
        for name, value in wanted.items():
            if isinstance(value, float) and str(value) in words:
                assert row[name] == words[str(value)], name
                found.add(row[name])
    assert found  # weights that are all zero have no SQNR or an infinite one
    history = service.get("/v1/models/zeros/layers/2/history", role="weight")
    assert {"NaN", "Infinity"} & {value for values in history["metrics"].values() for value in values}


# Plans


def test_a_plan_is_made_and_shown(service: Service, pushed: dict[str, Any], window: advisor.Window) -> None:
    response = service.post("/v1/models/net/plans", {"tolerance": 0.5, "max_lost_batch": 0.9}, status=201)
    body = response.json()
    assert response.headers["location"] == f"/v1/plans/{body['id']}"
    assert body["windows"] == [pushed["id"]]
    assert advisor.Plan.from_dict(body["plan"]).to_dict() == body["plan"]
    assert body["plan"] == advisor.recommend(window, tolerance=0.5, max_lost_batch=0.9).to_dict()
    assert service.get(f"/v1/plans/{body['id']}") == body
    assert body["id"] in [row["id"] for row in service.get("/v1/models/net/plans")["items"]]
    made = service.get(f"/v1/plans/{body['id']}/export/torchao")
    assert made["files"].keys() == {"plan_torchao.json", "torchao_plan.py"}
    assert "convert(model)" in made["use"]
    assert "no export to 'jax'" in problem(service.client.get(f"/v1/plans/{body['id']}/export/jax"), 404)["detail"]


def test_a_plan_s_demands_are_the_library_s(service: Service, pushed: dict[str, Any], window: advisor.Window) -> None:
    demands: dict[str, Any] = {
        "objective": "damage",
        "budget": {"share_8bit": 0.3},
        "uniform_roles": True,
        "keep": ["2"],
        "master_weights": "bf16",
        "optimizer_state": "auto",
    }
    plan = service.post("/v1/models/net/plans", demands, status=201).json()["plan"]
    assert plan == advisor.recommend(window, **demands).to_dict()
    assert plan["objective"] == "damage"
    assert {row["cast"] for row in plan["assignments"] if row["site"] == "2"} == {"fp32/none/nearest"}
    assert plan["predicted"]["share_8bit"] >= 0.3


def test_a_uniform_plan_is_the_recipe(service: Service, pushed: dict[str, Any]) -> None:
    recipe = {"input": "int8/none", "grad_output": "e5m2/none"}
    asked = {"uniform": recipe, "tolerance": None, "casts": None, "windows": [pushed["id"]]}
    plan = service.post("/v1/models/net/plans", asked, status=201).json()["plan"]
    casts = {row["role"]: row["cast"] for row in plan["assignments"]}
    assert casts["input"] == "int8/none/nearest"
    assert casts["grad_output"] == "e5m2/none/nearest"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"hardware": "h1000"}, "h100"),
        ({"casts": ["fp8"]}, "e4m3fn"),
        ({"casts": ["e4m3fn/block128x128"]}, "a scale for every block128x128"),
        ({"uniform": {"input": "e4m3fn/column"}}, "a scale for every column"),
        ({"objective": "speed"}, "objective"),
        ({"objective": "damage"}, "unless it has a budget"),
        ({"budget": {"share_8bit": 2}}, "share_8bit"),
        ({"budget": {"share8": 0.5}}, "share8"),
        ({"budget": {"time_s": 0.0}}, "time_s can be at least"),
        ({"keep": ["tail"]}, "no site or module of the window matches"),
        ({"first_last": -1}, "first_last"),
        ({"master_weights": "bf17"}, "master_weights"),
        ({"uniform": {"input": "int8"}, "keep": ["0"]}, "no keep"),
        ({"tolerance": -1}, "tolerance"),
        ({"tolerance": "NaN"}, "tolerance"),
        ({"max_lost_batch": 2}, "max_lost_batch"),
        ({"uniform": {"inputs": "int8"}}, "input"),
        ({"uniform": {"hardware": "int8"}}, "no role"),
        ({"uniform": {"input": "int9"}}, "int8"),
        ({"windows": []}, "windows"),
        ({"windows": ["win_1", "win_1"]}, "twice"),
        ({"uniform": {"input": "int8"}, "tolerance": 0.1}, "no tolerance"),
        ({"uniform": {"input": "int8"}, "max_lost_batch": 0.02}, "no max_lost_batch"),
        ({"uniform": {"input": "int8"}, "casts": ["int8"]}, "no casts"),
        ({"uniform": {"input": "int8"}, "windows": ["win_1", "win_2"]}, "one window"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(
    service: Service, pushed: dict[str, Any], body: dict[str, Any], says: str
) -> None:
    before = service.get("/v1/models/net/plans")["items"]
    assert says in problem(service.post("/v1/models/net/plans", body), 422)["detail"]
    assert service.get("/v1/models/net/plans")["items"] == before


def test_a_window_of_another_model_makes_no_plan(service: Service, pushed: dict[str, Any]) -> None:
    service.post("/v1/models", {"name": "stranger", "kind": "external"}, status=201)
    assert "no recorded window" in problem(service.post("/v1/models/stranger/plans", {}), 409)["detail"]
    body = {"windows": [pushed["id"]]}
    assert "another model" in problem(service.post("/v1/models/stranger/plans", body), 422)["detail"]


def test_a_plan_repeated_under_its_key_is_made_once(service: Service, pushed: dict[str, Any]) -> None:
    answers: list[Any] = []

    def post() -> None:
        answers.append(service.post("/v1/models/net/plans", {"tolerance": 0.25}, key="plan-key"))

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.append(service.post("/v1/models/net/plans", {"tolerance": 0.25}, key="plan-key"))
    assert {answer.status_code for answer in answers} <= {201, 409}
    assert len({answer.json()["id"] for answer in answers if answer.status_code == 201}) == 1


# External models


def test_an_external_model_is_not_trained_here(service: Service, pushed: dict[str, Any]) -> None:
    assert ".push(window" in problem(service.post("/v1/models/net/windows", {"steps": 2}), 409)["detail"]
    plan = service.post("/v1/models/net/plans", {}, status=201).json()
    assert "advisor.apply" in problem(service.post(f"/v1/plans/{plan['id']}/runs", {"steps": 2}), 409)["detail"]
    assert service.get(f"/v1/plans/{plan['id']}/runs")["items"] == []


# Windows and plans of other models


def recorded_elsewhere(**config: int) -> advisor.Window:
    """A window of the service's "own" model, with another config where one is given."""
    described: dict[str, Any] = {name: part for name, part in TINY_GPT.items() if name not in ("name", "kind")}
    trainer = Trainer(ArchitectureSpec.parse({**described, "config": {**described["config"], **config}}))
    with advisor.probe(trainer.model, trainer.optimizer, steps=1, curvature_steps=0) as window:
        trainer.step()
    return window


@pytest.fixture(scope="module")
def own(service: Service) -> str:
    return str(service.post("/v1/models", {**TINY_GPT, "name": "own"}, status=201).json()["id"])


def test_a_window_of_this_architecture_is_taken(service: Service, own: str) -> None:
    response = service.push("own", recorded_elsewhere().to_bytes())
    assert response.status_code == 201, response.text
    plan = service.post("/v1/models/own/plans", {"uniform": {"input": "bf16/none"}}, status=201).json()
    service.post(f"/v1/plans/{plan['id']}/runs", {"steps": 2}, status=202)


def test_a_window_of_another_model_is_refused_with_the_difference(
    service: Service, own: str, window: advisor.Window
) -> None:
    before = service.get("/v1/models/own/windows")["items"]
    for create in (False, True):
        path = f"/v1/models/{own}/windows?create={str(create).lower()}"
        headers = {"Content-Type": "application/octet-stream"}
        wider = service.client.post(path, content=recorded_elsewhere(width=32).to_bytes(), headers=headers)
        told = problem(wider, 422)["detail"]
        assert re.search(r"is \[\d+, 16\] in the model and \[\d+, 32\] in the window; .* and \d+ more", told), told
    deeper = problem(service.push("own", recorded_elsewhere(layers=2).to_bytes()), 422)["detail"]
    assert "the model has no blocks.1." in deeper
    assert "the window lacks" in problem(service.push("own", window.to_bytes()), 422)["detail"]
    assert service.get("/v1/models/own/windows")["items"] == before


def test_a_plan_that_is_not_the_model_s_is_not_run(service: Service, own: str) -> None:
    plan_id = stored_plan(service, own, advisor.uniform(recorded_elsewhere(width=32), input="bf16/none"))
    told = problem(service.post(f"/v1/plans/{plan_id}/runs", {"steps": 2}), 422)
    assert told["type"].endswith("PlanMismatch")
    assert "blocks.0.mlp.up" in told["detail"]
    assert service.get(f"/v1/plans/{plan_id}/runs")["items"] == []


def stored_plan(service: Service, model_id: str, plan: advisor.Plan) -> str:
    """A plan's id; stored past the check of windows, as by an older version."""
    database = Database(service.settings.url)
    with database.writing() as session:
        row = plans.add(session, model_id=model_id, windows=[], request={}, plan=plan.to_dict())
    database.close()
    return row.id


# Pushing to a new model


def create(service: Service, name: str, body: bytes, **headers: str) -> Any:
    sent = {"Content-Type": "application/octet-stream"} | headers
    return service.client.post(f"/v1/models/{name}/windows", params={"create": "true"}, content=body, headers=sent)


def test_a_push_makes_its_model(service: Service, window: advisor.Window) -> None:
    problem(service.push("fresh", window.to_bytes()), 404)
    first = create(service, "fresh", window.to_bytes(), **{"Idempotency-Key": "c1"})
    assert first.status_code == 201, first.text
    assert create(service, "fresh", window.to_bytes(), **{"Idempotency-Key": "c1"}).json() == first.json()
    model = service.get("/v1/models/fresh")
    assert (model["kind"], model["id"]) == ("external", first.json()["model_id"])
    assert create(service, "fresh", window.to_bytes()).json()["model_id"] == model["id"]
    assert len(service.get("/v1/models/fresh/windows")["items"]) == 2


def test_a_push_that_is_refused_leaves_no_model(service: Service, window: advisor.Window) -> None:
    good = window.to_bytes()
    for body in (good[: len(good) // 2], b"", small_window(steps=0).to_bytes()):
        problem(create(service, "never", body), 422)
    problem(service.client.get("/v1/models/never"), 404)
    for name in ("mdl_1234", "a%20b", "-x", "x" * 101):
        problem(create(service, name, good), 422)
    opened = service.client.post("/v1/models/never/windows?create=true", json={"steps": 1})
    assert "window file" in problem(opened, 422)["detail"]
    assert list(service.settings.uploads.iterdir()) == []


def test_create_is_in_the_document(service: Service) -> None:
    call = service.get("/openapi.json")["paths"]["/v1/models/{model_id}/windows"]["post"]
    (parameter,) = [parameter for parameter in call["parameters"] if parameter["name"] == "create"]
    assert "external model" in parameter["description"]


# Bad windows


def hostile(window: advisor.Window) -> Iterator[tuple[str, bytes]]:
    """Bodies that are no window."""
    good = window.to_bytes()
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    yield "empty", b""
    yield "noise", bytes(range(256)) * 8
    yield "cut", good[: len(good) // 2]
    yield "a huge header", struct.pack("<Q", 2**60) + good[8:]
    yield "zip", b"PK\x03\x04" + bytes(100)
    for name, change in {
        "no metadata": {"__metadata__": {}},
        "no object": {"__metadata__": {"window": "[]"}},
        "another schema": {"__metadata__": {"window": '{"schema": "other/1"}'}},
        "deep": {"__metadata__": {"window": "[" * 100_000}},
    }.items():
        changed = json.dumps({**header, **change}).encode()
        yield name, struct.pack("<Q", len(changed)) + changed + good[8 + size :]
    told = json.loads(header["__metadata__"]["window"])
    for name, part in {"no steps": {"steps": None}, "foreign slot": {"slots": told["slots"][::-1][1:]}}.items():
        changed = json.dumps({**header, "__metadata__": {"window": json.dumps({**told, **part})}}).encode()
        yield name, struct.pack("<Q", len(changed)) + changed + good[8 + size :]


@pytest.mark.parametrize("gain", [1e305, 5e-324])
def test_a_window_with_an_impossible_loss_scale_is_malformed(
    service: Service, window: advisor.Window, gain: float
) -> None:
    good = window.to_bytes()
    size = 8 + int.from_bytes(good[:8], "little")
    start, end = (size + place for place in json.loads(good[8:size])["gain"]["data_offsets"])
    body = good[:start] + np.full((end - start) // 8, gain).tobytes() + good[end:]
    name = "too-large" if gain > 1 else "too-small"
    service.post("/v1/models", {"name": name, "kind": "external"}, status=201)
    told = problem(service.push(name, body), 422)
    assert told["type"].endswith("MalformedWindow")
    assert "2^-126 to 2^127" in told["detail"]


def test_a_malformed_window_is_refused_and_leaves_nothing(service: Service, window: advisor.Window) -> None:
    service.post("/v1/models", {"name": "clean", "kind": "external"}, status=201)
    for name, body in hostile(window):
        response = service.push("clean", body, **{"Idempotency-Key": f"hostile {name}"})
        assert problem(response, 422)["type"].endswith("MalformedWindow"), name
    assert service.get("/v1/models/clean/windows")["items"] == []
    assert list(service.settings.uploads.iterdir()) == []


def test_a_window_of_no_steps_is_refused(service: Service) -> None:
    service.post("/v1/models", {"name": "none", "kind": "external"}, status=201)
    assert "0 recorded steps" in problem(service.push("none", small_window(steps=0).to_bytes()), 422)["detail"]
    assert service.get("/v1/models/none/windows")["items"] == []


@pytest.mark.parametrize(
    "body",
    [
        {"steps": 0},
        {"steps": "many"},
        {"warmup": -1},
        {"casts": ["fp8"]},
        {"casts": ["int8/row"]},
        {"casts": []},
        {"step": 1},
    ],
)
def test_a_window_that_cannot_be_opened_is_refused(service: Service, body: dict[str, Any]) -> None:
    problem(service.post("/v1/models/net/windows", body), 422)


def test_another_type_of_body_is_refused(service: Service, pushed: dict[str, Any]) -> None:
    response = service.client.post("/v1/models/net/windows", content=b"x", headers={"Content-Type": "text/csv"})
    assert "application/vnd.safetensors" in problem(response, 415)["detail"]


def test_a_pushed_window_repeated_under_its_key_is_stored_once(service: Service, window: advisor.Window) -> None:
    service.post("/v1/models", {"name": "twice-pushed", "kind": "external"}, status=201)
    first = service.push("twice-pushed", window.to_bytes(), **{"Idempotency-Key": "p1"})
    again = service.push("twice-pushed", window.to_bytes(), **{"Idempotency-Key": "p1"})
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.headers["idempotent-replayed"] == "true"
    assert len(service.get("/v1/models/twice-pushed/windows")["items"]) == 1
    other = service.push("twice-pushed", small_window(seed=1).to_bytes(), **{"Idempotency-Key": "p1"})
    problem(other, 422)


def test_a_window_over_the_limit_is_refused_while_it_streams(tmp_path: Path, window: advisor.Window) -> None:
    with serving(quick_settings(tmp_path, window_limit_bytes=10_000)) as small:
        small.post("/v1/models", {"name": "m", "kind": "external"}, status=201)

        def chunks() -> Iterator[bytes]:
            for _ in range(40):
                yield bytes(1_000)

        headers = {"Content-Type": "application/octet-stream"}
        response = small.client.post("/v1/models/m/windows", content=chunks(), headers=headers)
        assert "10,000" in problem(response, 413)["detail"]
        problem(small.push("m", bytes(10_001)), 413)
        assert small.get("/v1/models/m/windows")["items"] == []
        wait_until(lambda: not list(small.settings.uploads.iterdir()))
