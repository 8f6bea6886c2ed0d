"""A plan for other libraries: what the files hold, what is told as not done, and the real libraries on them.

Each library that is installed is run in a process of its own, on the files as a user has them. (Those that CI does not
install are checked the same way where they are: `pip install megatron-core deepspeed`.)
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from importlib.util import find_spec
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

E4M3, E5M2 = "e4m3fn/tensor/current/nearest", "e5m2/tensor/current/nearest"
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, middle=nn.Linear):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(32, 64), middle(64, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))
"""


@pytest.fixture(scope="module")
def window() -> Window:
    space: dict[str, Any] = {}
    exec(MODEL, space)
    torch.manual_seed(0)
    model = space["Net"]()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with advisor.probe(model, optimizer, steps=2, curvature_steps=0) as seen:
        for _ in range(2):
            nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(16, (16,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return seen


def plan_of(window: Window, casts: dict[tuple[str, str], str], **changes: Any) -> Plan:
    data = advisor.uniform(window, input="fp32/none").to_dict() | changes
    for one in data["assignments"]:
        one["cast"] = casts.get((one["site"], one["role"]), one["cast"])
    return Plan.from_dict(data)


def layer(name: str, *casts: str) -> dict[tuple[str, str], str]:
    return {(name, role): cast for role, cast in zip(("input", "weight", "grad_output"), casts, strict=True)}


@pytest.fixture
def plan(window: Window) -> Plan:
    """The first layer in fp8 throughout, the second in its forward product and its input's gradient, the third not."""
    return plan_of(window, layer("first", E4M3, E4M3, E5M2) | layer("middle", "e4m3fn/row", "e4m3fn/row", "bf16/none"))


def data_of(made: Export, name: str) -> Any:
    text = made.files[name]
    return yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)


def run(folder: Path, code: str, package: str) -> subprocess.CompletedProcess[str]:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MODEL + code], cwd=folder, capture_output=True, text=True, timeout=300
    )


def says_done(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n"), done.stdout


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


def plan_for(model: nn.Module, classes: int) -> Plan:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with advisor.probe(model, optimizer, steps=1, curvature_steps=0) as seen:
        nn.functional.cross_entropy(model(torch.randn(16, 32)), torch.randint(classes, (16,))).backward()
        optimizer.step()
    return advisor.uniform(seen, input="e4m3fn", weight="e4m3fn", grad_output="e5m2")


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


# The libraries themselves.

STEP = """
x = torch.randn(16, 32)
nn.functional.cross_entropy(model(x), torch.randint(16, (16,))).backward()
print("done")
"""


def test_torchao_converts_what_was_asked_and_trains(plan: Plan, tmp_path: Path) -> None:
    export(plan, "torchao").save(tmp_path)
    says_done(run(tmp_path, "import torchao_plan\nmodel = torchao_plan.convert(Net(), emulate=True)" + STEP, "torchao"))


def test_torchao_does_not_pass_over_another_kind_of_layer(plan: Plan, tmp_path: Path) -> None:
    export(plan, "torchao").save(tmp_path)
    code = """
class Conv1D(nn.Module):  # as Hugging Face's: the weight the other way round
    def __init__(self, i, o):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(i, o))
    def forward(self, x):
        return x @ self.weight

import torchao_plan
torchao_plan.convert(Net(Conv1D), emulate=True)
"""
    failed = run(tmp_path, code, "torchao")
    assert failed.returncode == 1
    assert "middle: a __main__.Conv1D, which torchao does not convert" in failed.stderr


def test_torchao_finds_layers_in_wrappers_and_where_they_are_shared(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.submodule, self.module = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32))
            self.again = nn.ModuleList([self.module[0], self.module[0]])
            self.o = nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.o(self.again[1](self.module(self.submodule(x)))))

    export(plan_for(Model(), 16), "torchao").save(tmp_path)
    code = """
import torchao_plan

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.submodule, self.module = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32))
        self.again = nn.ModuleList([self.module[0], self.module[0]])
        self.o = nn.Linear(32, 16)

class Wrapper(nn.Module):  # as DistributedDataParallel
    def __init__(self, module):
        super().__init__()
        self.module = module

for wrap in (lambda model: model, Wrapper, torch.compile, lambda model: torch.compile(Wrapper(model))):
    model = Model()
    torchao_plan.convert(wrap(model), emulate=True)
    assert type(model.submodule[0]).__name__ == "Float8Linear"
    assert model.again[0] is model.again[1] is model.module[0]
    assert type(model.again[0]).__name__ == "Float8Linear"
print("done")
"""
    says_done(run(tmp_path, code, "torchao"))


def test_torchao_check_fails_loudly(plan: Plan, tmp_path: Path) -> None:
    export(plan, "torchao").save(tmp_path)
    code = """
import torchao_plan

def undo(model): model.first = nn.Linear(32, 64)
def too_much(model): model.last = type(model.first).from_float(model.last)
def other(model): model.middle.config = model.first.config

for change in (undo, too_much, other):
    model = torchao_plan.convert(Net(), emulate=True)
    change(model)
    try:
        torchao_plan.check(model)
    except torchao_plan.PlanNotCarriedOut as error:
        print(str(error).splitlines()[1])
"""
    told = run(tmp_path, code, "torchao").stdout.splitlines()
    assert told[:2] == ["  first: asked for, and not converted", "  last: converted, and not asked for"]
    assert told[2].startswith("  middle: cast_config_input is")


def test_accelerate_prepares_and_checks(plan: Plan, tmp_path: Path) -> None:
    export(plan, "accelerate").save(tmp_path)
    code = """
import accelerate_plan
accelerator = accelerate_plan.accelerator(cpu=True)
model = accelerate_plan.convert(Net(), emulate=True)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
accelerate_plan.check(accelerator, model)
other = accelerate_plan.PlanNotCarriedOut
try:
    accelerate_plan.check(accelerator, Net())
except other as error:
    assert "not converted" in str(error)
else:
    raise SystemExit("an unconverted model passed")
"""
    says_done(run(tmp_path, code + STEP, "accelerate"))


def test_lightning_trains_and_checks(plan: Plan, tmp_path: Path) -> None:
    export(plan, "lightning").save(tmp_path)
    code = """
import lightning, lightning_plan
class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()
    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
data = torch.utils.data.TensorDataset(torch.randn(32, 32), torch.randint(16, (32,)))
module = Module()
trainer = lightning.Trainer(
    accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    callbacks=[lightning_plan.PlanCallback(of="net", emulate=True)], **lightning_plan.precision("cpu"),
)
trainer.fit(module, torch.utils.data.DataLoader(data, 16))
assert type(module.net.first).__name__ == "Float8Linear"
print("done")
"""
    says_done(run(tmp_path, code, "lightning"))


# TransformerEngine's features by name alone: they need its compiled parts, which nvdlfw-inspect's reader does not.
FEATURES = """
from nvdlfw_inspect.base import BaseConfigAPIMapper, BaseNamespaceAPI
from nvdlfw_inspect.registry import Registry

@Registry.register_namespace_api(namespace="transformer_engine")
class API(BaseNamespaceAPI):
    def input_assertions_hook(self, api_name, **kwargs): ...
    def output_assertions_hook(self, api_name, ret, **kwargs): ...
    def is_multiple_feature_invocation_allowed(self, api_name): ...
    def routing_condition(self, api_name, config, layer_name, feature_obj, **kwargs): ...

@Registry.register_feature(namespace="transformer_engine")
class DisableQuantizationLayer(BaseConfigAPIMapper):
    def parse_config_and_api(self, config, **kwargs): ...

@Registry.register_feature(namespace="transformer_engine")
class DisableQuantizationGEMM(DisableQuantizationLayer): ...
"""


def test_nvdlfw_inspect_reads_the_yaml_layer_by_layer(plan: Plan, tmp_path: Path) -> None:
    export(plan, "transformer-engine").save(tmp_path)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "named.py").write_text(FEATURES)
    code = """
import nvdlfw_inspect.api as inspect_api
from nvdlfw_inspect.config_manager import ConfigManager
inspect_api.initialize(config_file="plan_transformer_engine.yaml", feature_dirs=["features"], log_dir=".")
found = {name: ConfigManager.get_config_for_layer("model." + name) for name in ("first", "middle", "last")}
assert found["first"] == {}, found
assert all(found[name]["transformer_engine"]["DisableQuantizationLayer"]["enabled"] for name in ("middle", "last"))
print("done")
"""
    says_done(run(tmp_path, code, "nvdlfw_inspect"))


def test_transformer_engine_script_names_their_layers_alone(plan: Plan, tmp_path: Path) -> None:
    export(plan, "transformer-engine").save(tmp_path)
    code = """
import transformer_engine_plan

class Linear(nn.Linear):  # as TransformerEngine's, which needs a GPU
    __module__ = "transformer_engine.pytorch.module.linear"
    fp8_meta = None

class Own(Linear):
    __module__ = "__main__"

class Named(nn.Linear):
    name = property(lambda self: "mine")  # which cannot be set

model = Net(Own)
model.first, model.last = Linear(32, 64), Linear(64, 16)
model.other = Named(2, 2)
try:
    transformer_engine_plan.check(model)
except transformer_engine_plan.PlanNotCarriedOut as error:
    assert "first: its name for nvdlfw-inspect is None" in str(error), error
transformer_engine_plan.give_names(model)
transformer_engine_plan.check(model)
assert (model.middle.name, model.other.name) == ("model.middle", "mine")
model.last = nn.Linear(64, 16)  # wide in the plan, and wide
transformer_engine_plan.check(model)
model.first = nn.Linear(32, 64)
try:
    transformer_engine_plan.check(model)
except transformer_engine_plan.PlanNotCarriedOut as error:
    assert "first: asked for in FP8, and no layer of TransformerEngine" in str(error), error
    print("done")
"""
    says_done(run(tmp_path, code, "torch"))


def test_megatron_reads_the_recipe_and_the_check_runs(plan: Plan, tmp_path: Path) -> None:
    export(plan, "megatron").save(tmp_path)
    code = """
import megatron_plan
megatron_plan.check(Net())
from megatron.core.quantization.quant_config import MatchContext, RecipeConfig
recipe = RecipeConfig.from_yaml_file("plan_megatron.yaml")
found = recipe.match(MatchContext(module_path="first", layer_number=None)).config
assert found["training_recipe"]["fp8_quantization_recipe"] == "tensorwise", found
model = Net(); model.first = nn.Identity()
try:
    megatron_plan.check(model)
except megatron_plan.PlanNotCarriedOut as error:
    assert "first" in str(error)
else:
    raise SystemExit("a model without the layer passed")
print("done")
"""
    says_done(run(tmp_path, code, "megatron"))


def test_deepspeed_reads_its_configuration(plan: Plan, tmp_path: Path) -> None:
    export(plan, "deepspeed").save(tmp_path)
    code = """
import json
from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
config = json.load(open("ds_config.json"))
assert get_bfloat16_config(config).enabled == config["bf16"]["enabled"]
assert get_float16_config(config).enabled == config["fp16"]["enabled"]
print("done")
"""
    says_done(run(tmp_path, code, "deepspeed"))


def test_deepspeed_check_compares_every_setting(window: Window, tmp_path: Path) -> None:
    casts = {(site.name, role): "fp16/none" for site in window.sites for role in site.roles}
    scaling = LossScaling(kind="dynamic", scale=4096.0, reason="r").model_dump()
    export(plan_of(window, casts, loss_scaling=scaling), "deepspeed").save(tmp_path)
    code = """
import json
import deepspeed_plan
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config

class Config:
    def __init__(self, config):
        self.bfloat16_config, self.float16_config = get_bfloat16_config(config), get_float16_config(config)

def engine(**changes):  # DeepSpeed's own, as far as it tells of its configuration
    config = json.load(open("ds_config.json"))
    for name, value in changes.items():
        config["bf16" if name.startswith("bf16") else "fp16"][name] = value
    made = DeepSpeedEngine.__new__(DeepSpeedEngine)
    nn.Module.__init__(made)
    made.module, made._config = Net(), Config(config)
    return made

deepspeed_plan.check(engine())
for change, told in (
    ({"loss_scale": 128.0}, "the loss scale is 128.0 (0: dynamic), asked for was 0"),
    ({"initial_scale_power": 4}, "the loss scale starts at 16, asked for was 4096"),
    ({"bf16_master_weights_and_grads": True}, "bf16_master_weights_and_grads is on"),
    ({"bf16_optimizer_states": True}, "bf16_optimizer_states is on"),
    ({"enabled": False}, "fp16 is off"),
):
    try:
        deepspeed_plan.check(engine(**change))
    except deepspeed_plan.PlanNotCarriedOut as error:
        assert told in str(error), error
    else:
        raise SystemExit(f"{change} passed")
print("done")
"""
    says_done(run(tmp_path, code, "deepspeed"))
