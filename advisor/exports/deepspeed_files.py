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
from advisor.plan import Plan, Stored
from probes.parameter_records import MASTER

CONFIG, CHECK = "ds_config.json", "deepspeed_plan.py"
USE = (
    "import deepspeed_plan\n"
    "deepspeed_plan.convert(model)                  # the FP8 layers, before deepspeed.initialize\n"
    "# ds_config.json has the precision; batch sizes and ZeRO are yours to add\n"
    "engine, *_ = deepspeed.initialize(model=model, config='ds_config.json', ...)\n"
    "deepspeed_plan.check(engine)                   # raises where the engine or a layer is not what was asked\n"
)
PLAIN_16 = ("bf16/none/nearest",)


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
    stored = {role_kind: [one for one in plan.storage if _kind(one) == role_kind] for role_kind in ("master", "state")}
    if wide == "bf16":
        both = {kind: bool(group) and {one.cast for one in group} <= set(PLAIN_16) for kind, group in stored.items()}
        config["bf16"]["bf16_master_weights_and_grads"] = both["master"]
        config["bf16"]["bf16_optimizer_states"] = both["master"] and both["state"]
    done = {
        "master": config["bf16"].get("bf16_master_weights_and_grads", False),
        "state": config["bf16"].get("bf16_optimizer_states", False),
    }
    told += sorted(
        {
            f"DeepSpeed does not keep {one.role} in {short_cast(parse_cast(one.cast))}"
            for one in plan.storage
            if not done.get(_kind(one), False)
        }
    )
    told += _scaled(plan, wide, config)
    return config, told


def _kind(one: Stored) -> str:
    return "master" if one.role == MASTER else one.role if one.role in ("buffer", "epsilon") else "state"


def _scaled(plan: Plan, wide: str, config: dict[str, Any]) -> list[str]:
    """Put loss scaling in, which DeepSpeed has for fp16 alone."""
    scaling = plan.loss_scaling
    if scaling.kind == "none":
        return []
    if wide != "fp16" or scaling.scale is None:
        return [f"DeepSpeed scales the loss ({scaling.kind}) with fp16 only, and the other products are in {wide}"]
    if scaling.kind == "static":
        config["fp16"]["loss_scale"] = scaling.scale
        return []
    config["fp16"] |= {
        "loss_scale": 0,
        "initial_scale_power": round(math.log2(scaling.scale)),
        "loss_scale_window": scaling.growth_interval or 1000,
        "min_loss_scale": int(min((minimum for _, minimum in scaling.minimums), default=1)),
    }
    rising = len(scaling.minimums) > 1
    return ["DeepSpeed's smallest loss scale does not rise with the steps: the first minimum is used"] * rising
