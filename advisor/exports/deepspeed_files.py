"""DeepSpeed: its JSON configuration for the 16-bit part; FP8 layers are torchao's, converted before `initialize`.

DeepSpeed's own configuration knows bf16 and fp16 for a whole model, loss scaling for fp16 (static or dynamic), and
16-bit master weights and optimizer states for bf16. It has no FP8 and no layers. (DeepSpeed 0.19,
runtime/precision_config.py.)
"""

from __future__ import annotations

import math
from typing import Any

from advisor.castnames import parse_cast, short_cast
from advisor.exports.layers import half_sentences, kept_with
from advisor.exports.parts import Parts, as_json, script
from advisor.exports.torchao_files import DATA, SCRIPT, torchao_layers
from advisor.loss_scaling import GROWTH_INTERVAL, first_scale
from advisor.plan import Plan
from probes.parameter_records import MASTER, WEIGHT_GRADIENT

CONFIG, CHECK = "ds_config.json", "deepspeed_plan.py"
USE = (
    "import deepspeed_plan\n"
    "deepspeed_plan.convert(model)                  # the FP8 layers, before deepspeed.initialize\n"
    "# ds_config.json has the precision; batch sizes and ZeRO are yours to add\n"
    "engine, *_ = deepspeed.initialize(model=model, config='ds_config.json', ...)\n"
    "deepspeed_plan.check(engine)                   # raises where the engine or a layer is not what was asked\n"
)
PLAIN_16 = "bf16/none/nearest"
ADAM_STATES = ("exp_avg", "exp_avg_sq")  # of the optimizers that its switch for states is for


def deepspeed_export(plan: Plan) -> Parts:
    """ds_config.json, torchao's files for the FP8 layers, and the script that checks both."""
    layers, cannot = torchao_layers(plan)
    config, told = _config(plan)
    cannot += told + half_sentences(plan, "DeepSpeed")
    files = {CONFIG: as_json(config), DATA: as_json(layers), SCRIPT: script(SCRIPT), CHECK: script(CHECK)}
    return Parts(files, USE, cannot)


def _config(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    wide, told = kept_with(plan), []
    config: dict[str, Any] = {"bf16": {"enabled": wide == "bf16"}, "fp16": {"enabled": wide == "fp16"}}
    done: set[str] = set()
    if wide == "bf16":
        masters = _has_all(plan, MASTER)
        states = masters and all(_has_all(plan, role) for role in ADAM_STATES)
        config["bf16"]["bf16_master_weights_and_grads"] = masters
        config["bf16"]["bf16_optimizer_states"] = states
        done = ({MASTER, WEIGHT_GRADIENT} if masters else set()) | (set(ADAM_STATES) if states else set())
    told += sorted(
        {
            f"DeepSpeed does not keep {one.role} in {short_cast(parse_cast(one.cast))}"
            for one in plan.storage
            if one.role not in done or one.cast != PLAIN_16
        }
    )
    if WEIGHT_GRADIENT in done and not _has_all(plan, WEIGHT_GRADIENT):
        told.append(
            "DeepSpeed keeps gradients in bf16 where it keeps master weights so, which the plan does not ask for"
        )
    told += _scaled(plan, wide, config)
    return config, told


def _has_all(plan: Plan, role: str) -> bool:
    """Whether the plan keeps this role in bf16 for every weight that it knows: DeepSpeed has a switch for all."""
    rows = [one for one in plan.storage if one.role == role]
    weights = {site.parameter for site in plan.sites if site.parameter is not None}
    return bool(rows) and {one.cast for one in rows} == {PLAIN_16} and weights <= {one.name for one in rows}


def _scaled(plan: Plan, wide: str, config: dict[str, Any]) -> list[str]:
    """Put loss scaling in, which DeepSpeed has for fp16 alone."""
    scaling = plan.loss_scaling
    if scaling.kind == "none":
        return []
    if wide != "fp16":
        return [f"DeepSpeed scales the loss ({scaling.kind}) with fp16 only, and the other products are in {wide}"]
    if scaling.kind == "static":
        config["fp16"]["loss_scale"] = scaling.scale
        return []
    config["fp16"] |= {
        "loss_scale": 0,
        "initial_scale_power": round(math.log2(first_scale(scaling))),
        "hysteresis": 1,  # halved at every overflow, as the plan has it
        "loss_scale_window": scaling.growth_interval or GROWTH_INTERVAL,
        "min_loss_scale": int(min((minimum for _, minimum in scaling.minimums), default=1)),
    }
    told = [
        "DeepSpeed ends the training where a gradient overflows at the smallest loss scale, and skips no step there"
    ]
    if len(scaling.minimums) > 1:
        told.append("DeepSpeed's smallest loss scale does not rise with the steps: the least of the minimums is used")
    return told
