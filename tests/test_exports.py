"""A plan for other libraries: what the files hold, and what is told as not done."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import advisor
from advisor.cli import main
from advisor.errors import InvalidPlan
from advisor.exports import TARGETS, Export, export
from advisor.plan import LossScaling, Plan, Stored
from probes.window import Window
from tests.exported import E4M3, E5M2, layer, plan_for, plan_of, small_plan, small_window


@pytest.fixture
def window() -> Window:
    return small_window()


@pytest.fixture
def plan(window: Window) -> Plan:
    return small_plan(window)


def data_of(made: Export, name: str) -> Any:
    text = made.files[name]
    return yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_has_a_script_that_checks_and_says_how(plan: Plan, target: str, tmp_path: Path) -> None:
    made = export(plan, target)
    paths = made.save(tmp_path / "made")
    assert {path.name for path in paths} == made.files.keys()
    scripts = [name for name in made.files if name.endswith(".py")]
    assert any("def check(" in made.files[name] or "on_train_start" in made.files[name] for name in scripts)
    for name in scripts:
        compile(made.files[name], name, "exec")
    assert made.use
    assert export(plan, target) == made


def test_an_unknown_target_is_refused(plan: Plan) -> None:
    with pytest.raises(InvalidPlan, match="no export to 'jax'; there are torchao"):
        export(plan, "jax")


def test_torchao_has_each_product_of_a_layer(plan: Plan) -> None:
    data = data_of(export(plan, "torchao"), "plan_torchao.json")
    assert data["layers"] == {"first": 0, "middle": 1}
    assert data["unconverted"] == ["last"]
    whole, forward_only = data["configs"]
    assert whole["cast_config_grad_output"]["target_dtype"] == "float8_e5m2"
    assert forward_only["cast_config_input"]["scaling_granularity"] == "axiswise"
    assert forward_only["cast_config_input_for_grad_weight"]["scaling_type"] == "disabled"


@pytest.mark.parametrize(
    ("casts", "told"),
    [
        (layer("first", "int8", "int8", "int8"), "first input: int8; torchao casts to e4m3fn and e5m2"),
        (layer("first", E4M3, "bf16/none", E5M2), "first weight"),
        (layer("first", "e4m3fn/tensor/delayed", E4M3, E5M2), "scale of the tensor at hand"),
        (layer("first", "e4m3fn/tensor/current/stochastic", E4M3, E5M2), "first input: e4m3fn/tensor/current/stoch"),
        (layer("first", E5M2, E5M2, E5M2), "no kernel of torchao's multiplies the two"),
        (layer("first", "e4m3fn/tensor/current:pow2", E4M3, E5M2), "powers of two, or of none"),
    ],
)
def test_what_torchao_cannot_do_is_told(window: Window, casts: dict[tuple[str, str], str], told: str) -> None:
    made = export(plan_of(window, casts), "torchao")
    if told != "first weight":
        assert any(told in sentence for sentence in made.cannot), made.cannot
    else:  # a 16-bit weight: the forward product stays wide, and so does autocast's share
        assert any("takes all or none" in sentence for sentence in made.cannot), made.cannot


def test_formats_that_torchao_has_not_bring_the_way_to_a_plan_of_those_it_has(window: Window) -> None:
    mixed = layer("first", "int8", "int8", E5M2) | layer("middle", E4M3, E4M3, E5M2)
    (sentence,) = [one for one in export(plan_of(window, mixed), "torchao").cannot if "recommend" in one]
    assert sentence.startswith("2 of the linear layers' casts")
    own = advisor.recommend(window, casts=re.findall(r'"([^"]+)"', sentence))
    assert not any("recommend" in one for one in export(own, "torchao").cannot)


def test_stored_tensors_and_loss_scales_are_told(window: Window) -> None:
    storage = [Stored(name="first.weight", role="master", cast="bf16", reason="r").model_dump()]
    scaling = LossScaling(kind="static", scale=1024.0, reason="r").model_dump()
    told = plan_of(window, {}, storage=storage, loss_scaling=scaling)
    for target in TARGETS:
        sentences = " ".join(export(told, target).cannot)
        assert "master in bf16" in sentences, target
        assert "scale" in sentences, target


def test_deepspeed_scales_the_loss_in_fp16(window: Window) -> None:
    casts = {(site.name, role): "fp16/none" for site in window.sites for role in site.roles}
    scaling = LossScaling(kind="dynamic", scale=4096.0, growth_interval=100, minimums=((0, 2.0),), reason="r")
    config = data_of(export(plan_of(window, casts, loss_scaling=scaling.model_dump()), "deepspeed"), "ds_config.json")
    assert config["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 12,
        "hysteresis": 1,
        "loss_scale_window": 100,
        "min_loss_scale": 2,
    }


@pytest.mark.parametrize("target", TARGETS)
def test_a_loss_scale_without_a_start_is_that_of_apply(window: Window, target: str) -> None:
    casts = {(site.name, role): "fp16/none" for site in window.sites for role in site.roles}
    made = export(plan_of(window, casts, loss_scaling=LossScaling(kind="dynamic", reason="r").model_dump()), target)
    if target == "deepspeed":
        found = data_of(made, "ds_config.json")["fp16"]
        assert (found["initial_scale_power"], found["loss_scale_window"]) == (16, 2000)
    elif target in ("accelerate", "lightning"):
        found = data_of(made, f"plan_{target}.json")["loss_scale"]
        assert found == {"init_scale": 65536.0, "growth_interval": 2000}
    else:
        assert any("dynamic, 65536 at first" in sentence for sentence in made.cannot)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [0.0, 3.0, -4.0, float("nan"), float("inf")])
def test_a_loss_scale_that_cannot_be_is_refused(window: Window, target: str, scale: float) -> None:
    scaling = LossScaling(kind="dynamic", scale=scale, reason="r").model_dump()
    with pytest.raises(InvalidPlan, match="a loss scale is a power of two"):
        export(plan_of(window, {}, loss_scaling=scaling), target)


@pytest.mark.parametrize(
    ("roles", "names", "masters", "states", "told"),
    [
        (("master", "weight_grad", "exp_avg", "exp_avg_sq"), 3, True, True, None),
        (("master", "weight_grad"), 3, True, False, None),
        (("master",), 3, True, False, "keeps gradients in bf16"),
        (("master", "weight_grad", "exp_avg"), 3, True, False, "does not keep exp_avg in bf16"),
        (("master", "weight_grad"), 1, False, False, "does not keep master in bf16"),
        (("exp_avg", "exp_avg_sq"), 3, False, False, "does not keep exp_avg in bf16"),
    ],
)
def test_deepspeed_keeps_in_bf16_what_the_plan_does_and_no_more(
    window: Window, roles: tuple[str, ...], names: int, masters: bool, states: bool, told: str | None
) -> None:
    casts = {(site.name, role): "bf16/none" for site in window.sites for role in site.roles}
    storage = [
        Stored(name=f"{site.name}.weight", role=role, cast="bf16", reason="r").model_dump()
        for role in roles
        for site in window.sites[:names]
    ]
    made = export(plan_of(window, casts, storage=storage), "deepspeed")
    config = data_of(made, "ds_config.json")["bf16"]
    assert config == {"enabled": True, "bf16_master_weights_and_grads": masters, "bf16_optimizer_states": states}
    assert bool(made.cannot) == (told is not None)
    assert told is None or any(told in sentence for sentence in made.cannot)


class Odd(nn.Module):
    """Names that wrappers, globs and expressions have too, a weight beside others, and an odd head."""

    NAMES = ("mlp[1]", "a*b?", "submodule", "module")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Sequential(nn.Linear(32, 32)))
        self.attn = nn.MultiheadAttention(32, 2)
        self.head = nn.Linear(32, 17)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.NAMES:
            x = getattr(self, name)(x)
        return torch.as_tensor(self.head(self.attn(x, x, x)[0]))


def test_what_is_known_to_be_no_layer_for_fp8_is_told_and_left() -> None:
    told = plan_for(Odd(), 17)
    data = data_of(export(told, "torchao"), "plan_torchao.json")
    assert data["unconverted"] == ["head"]
    assert [*data["layers"]] == [*(f"{name}.0" for name in Odd.NAMES), "attn.out_proj"]
    assert "head" in data_of(export(told, "transformer-engine"), "plan_transformer_engine.json")["off"]
    for target in TARGETS:
        sentences = export(told, target).cannot
        assert any("attn/in_proj_weight weight: e4m3fn; its weight is one of several" in one for one in sentences)
        assert any("head input: e4m3fn; a weight of [17, 32] is not divisible by 16" in one for one in sentences)
    alone = export(plan_for(nn.Linear(32, 16), 16), "torchao")
    assert data_of(alone, "plan_torchao.json")["layers"] == {}
    assert "the model is itself the linear layer" in alone.cannot[0]


def test_yaml_holds_any_name(window: Window) -> None:
    name = "x\x7f\x85\u2028: '\"\\\n\U0001f600"
    text = json.dumps(plan_of(window, layer("first", E4M3, E4M3, E5M2)).to_dict())
    plan = Plan.from_dict(json.loads(text.replace('"site": "first"', f'"site": {json.dumps(name)}')))
    assert data_of(export(plan, "megatron"), "plan_megatron.yaml")["matchers"]["layer_0"]["pattern"] == name


def test_transformer_engine_turns_off_what_the_recipe_does_not_do(plan: Plan) -> None:
    made = export(plan, "transformer-engine")
    data = data_of(made, "plan_transformer_engine.json")
    assert data["recipe"] == {"class": "Float8CurrentScaling", "fp8_format": "HYBRID"}
    assert data["layers"] == {"first": ["fprop", "dgrad", "wgrad"]}
    assert data["off"] == ["last", "middle"]
    assert any("middle input" in sentence for sentence in made.cannot)


def test_megatron_matches_names_and_nothing_more(plan: Plan) -> None:
    data = data_of(export(plan, "megatron"), "plan_megatron.yaml")
    assert [matcher["pattern"] for matcher in data["matchers"].values()] == ["first", "middle", "last", "*"]
    assert data["matchers"]["layer_0"]["config"] == "tensorwise_hybrid"
    assert data["matchers"]["everything_else"]["config"] == "bf16"


def test_the_command_writes_files_and_says_what_is_not_done(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan.save(tmp_path / "plan.json")
    asked = ["export", str(tmp_path / "plan.json"), "--target", "torchao", "-o", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", ["advisor", *asked])
    with contextlib.suppress(SystemExit):
        main()
    out = capsys.readouterr().out
    assert (tmp_path / "made" / "torchao_plan.py").is_file()
    assert "torchao_plan.convert(model)" in out
    assert "middle grad_output" in out
