"""A plan for other libraries, in these libraries: each that is installed runs on the files as a user has them.

Each runs in a process of its own. (Those that CI does not install are checked the same way where they are:
`pip install megatron-core deepspeed`.)
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from advisor.exports import export
from advisor.plan import LossScaling, Plan
from probes.window import Window
from tests.exported import MODEL, plan_for, plan_of, small_plan, small_window


@pytest.fixture
def window() -> Window:
    return small_window()


@pytest.fixture
def plan(window: Window) -> Plan:
    return small_plan(window)


def run(folder: Path, code: str, package: str) -> subprocess.CompletedProcess[str]:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MODEL + code], cwd=folder, capture_output=True, text=True, timeout=300
    )


def says_done(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n"), done.stdout


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
