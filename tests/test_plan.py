"""A plan is a value and a file: it comes back as it was, and a file that is none says why."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from advisor import plan as plan_module
from advisor.errors import InvalidPlan
from advisor.hardware import hardware_named
from advisor.numbers import FiniteNumber, Number
from advisor.plan import Plan, load_plan, plan_schema
from advisor.planner import plan_from_rows
from tests.planned import attention, flops, linear, scores

PUBLISHED = Path(__file__).parent.parent / "docs" / "plan-1.schema.json"


@pytest.fixture
def plan() -> Plan:
    sites = [linear("blocks.0.mlp.up"), attention("blocks.0.attn/sdpa.0"), linear("head")]
    rows = scores(sites, seed=2)
    rows[0] |= {"sqnr_db": math.inf, "bias": math.nan}
    return plan_from_rows(
        sites,
        rows,
        hardware=hardware_named("h100"),
        tolerance=1e-3,
        max_lost_batch=0.02,
        total_flops=1.1 * flops(sites),
        mean_loss=2.3,
        model_name="GPT",
        notes=["a note"],
    )


def broken(plan: Plan, tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_dict() | changes))
    return path


def test_a_plan_comes_back_as_it_was(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = load_plan(path)
    assert loaded.to_dict() == plan.to_dict()
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob(".*")), "no part of a file is left behind"


def test_the_contract(plan: Plan) -> None:
    data = plan.to_dict()
    assert data["schema"] == "numerics-advisor/plan/1"
    assert {"site", "role", "cast", "damage", "reason"} <= set(data["assignments"][0])
    assert {"damage", "share_8bit", "speedup", "memory_bytes"} <= set(data["predicted"])
    assert {"loss_scaling", "master_weights", "optimizer_state", "hardware", "front"} <= set(data)
    predicted = data["predicted"]
    assert predicted["speedup"] == pytest.approx(predicted["time_before_s"] / predicted["time_s"])
    assert data["objective"] == "share_8bit"
    assert data["constraints"] == []
    assert (data["master_weights"], data["optimizer_state"]) == ("fp32", "fp32")
    assert len(data["assignments"]) == 3 + 4 + 3


def test_numbers_that_are_not_finite_survive(plan: Plan, tmp_path: Path) -> None:
    first = plan.assignments[0].model_copy(update={"bias": math.nan, "sqnr_db": math.inf, "amax": -math.inf})
    changed = plan.model_copy(update={"assignments": (first, *plan.assignments[1:])})
    changed.save(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["assignments"][0]["bias"] == "NaN"
    loaded = load_plan(tmp_path / "plan.json").assignments[0]
    assert math.isnan(loaded.bias or 0)
    assert (loaded.sqnr_db, loaded.amax) == (math.inf, -math.inf)


def test_the_published_schema_is_the_plans() -> None:
    assert json.loads(PUBLISHED.read_text()) == plan_schema()


def test_a_plan_is_frozen(plan: Plan) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        plan.hardware = "a100"


@pytest.mark.parametrize("text", ["", "not json", "\x00\x01"])
def test_what_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InvalidPlan, match=r"plan\.json is not a plan: it is not JSON"):
        load_plan(path)


@pytest.mark.parametrize(("text", "why"), [("[]", "not list"), ("{}", "it has no field 'schema'"), ("3", "not int")])
def test_json_that_is_no_plan_is_refused(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(InvalidPlan, match=why):
        load_plan(path)


def test_another_schema_is_refused_with_what_to_do(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidPlan, match=r"plan/9'; this release reads 'numerics-advisor/plan/1'\. Make the plan anew"
    ):
        load_plan(broken(plan, tmp_path, schema="numerics-advisor/plan/9"))


def test_a_missing_field_is_named(plan: Plan, tmp_path: Path) -> None:
    data = plan.to_dict()
    del data["predicted"]["share_8bit"]
    with pytest.raises(InvalidPlan, match=r"predicted\.share_8bit: Field required"):
        load_plan(broken(plan, tmp_path, predicted=data["predicted"]))


def test_an_unknown_field_is_named(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InvalidPlan, match="asignments: Extra inputs"):
        load_plan(broken(plan, tmp_path, asignments=[]))


def test_an_unknown_cast_is_named(plan: Plan, tmp_path: Path) -> None:
    assignments = plan.to_dict()["assignments"]
    assignments[1]["cast"] = "e4m3fm"
    with pytest.raises(InvalidPlan, match=r"assignments\.1\.cast: .*e4m3fm"):
        load_plan(broken(plan, tmp_path, assignments=assignments))


def test_a_cast_is_canonical_once_it_is_read(plan: Plan, tmp_path: Path) -> None:
    assignments = plan.to_dict()["assignments"]
    assignments[1]["cast"] = "e5m2"
    assert (
        load_plan(broken(plan, tmp_path, assignments=assignments)).assignments[1].cast == "e5m2/tensor/current/nearest"
    )


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda given: given[1:], "assignments lacks blocks.0.mlp.up input"),
        (lambda given: [*given, given[0]], "assignments repeats blocks.0.mlp.up input"),
        (lambda given: [*given, given[0] | {"site": "tail"}], "a slot that sites does not name: tail input"),
    ],
)
def test_every_slot_has_exactly_one_cast(spoil: Any, why: str, plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(InvalidPlan, match=why):
        load_plan(broken(plan, tmp_path, assignments=spoil(plan.to_dict()["assignments"])))


def test_an_older_schema_is_lifted(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lift(data: dict[str, Any]) -> dict[str, Any]:
        return {("model" if key == "model_class" else key): value for key, value in data.items()} | {
            "schema": "numerics-advisor/plan/1"
        }

    monkeypatch.setattr(plan_module, "UPGRADES", {"numerics-advisor/plan/0": lift})
    data = plan.to_dict()
    data["model_class"] = data.pop("model")
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data | {"schema": "numerics-advisor/plan/0"}))
    assert load_plan(path) == load_plan(broken(plan, tmp_path))


def test_a_failed_save_leaves_the_old_file(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    path.write_text("the old one")

    def refuse(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        plan.save(path)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_the_text_fits_a_terminal_and_says_everything(plan: Plan) -> None:
    text = str(plan)
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    assert "of matrix FLOPs in 8 bits" in flat
    for one in plan.assignments:
        for clause in one.reason.removesuffix(".").split("; "):
            assert clause in flat
    for note in (*plan.notes, *plan.approximations):
        assert note in flat
    assert "nan" not in text.lower()


def test_a_cast_of_a_slot(plan: Plan) -> None:
    one = plan.assignments[0]
    assert str(plan.cast(one.site, one.role)) == one.cast
    with pytest.raises(KeyError):
        plan.cast("tail", "input")


class Holder(BaseModel):
    value: Number
    limit: FiniteNumber = 0.0


@pytest.mark.parametrize(
    ("value", "written"), [(1.5, "1.5"), (math.nan, '"NaN"'), (math.inf, '"Infinity"'), (-math.inf, '"-Infinity"')]
)
def test_number_survives_json(value: float, written: str) -> None:
    text = Holder(value=value).model_dump_json()
    assert f'"value":{written}' in text
    back = Holder.model_validate_json(text).value
    assert back == value or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize("value", ["1.5", "nan", "inf", "", None, [1]])
def test_number_takes_no_other_words(value: Any) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Number).validate_python(value)


def test_an_input_that_must_be_finite_is() -> None:
    with pytest.raises(ValidationError, match="finite"):
        Holder(value=0.0, limit=math.inf)
