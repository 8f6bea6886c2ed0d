"""Accelerate: FP8 layers by torchao, converted before `prepare`; mixed precision for the rest.

Accelerate can convert with torchao by itself (AORecipeKwargs), with one configuration for all layers and a filter by
default that leaves out the first and the last linear layer by name. A plan has several configurations and names its
layers, so they are converted first, and Accelerate is asked for the 16-bit part alone. (accelerate 1.15.)
"""

from __future__ import annotations

from typing import Any

from advisor.exports.layers import half_sentences, kept_with, stored_sentences
from advisor.exports.parts import Parts, as_json, script
from advisor.exports.torchao_files import DATA, SCRIPT, torchao_layers
from advisor.loss_scaling import GROWTH_INTERVAL, first_scale
from advisor.plan import Plan

SETTINGS, CHECK = "plan_accelerate.json", "accelerate_plan.py"
USE = (
    "import accelerate_plan\n"
    "accelerator = accelerate_plan.accelerator()    # further arguments of Accelerator may be given\n"
    "accelerate_plan.convert(model)                 # before prepare\n"
    "model, optimizer, loader = accelerator.prepare(model, optimizer, loader)\n"
    "accelerate_plan.check(accelerator, model)      # raises where something is not what was asked\n"
)


def accelerate_export(plan: Plan) -> Parts:
    """The accelerator's settings, torchao's files for the FP8 layers, and the script that checks both."""
    layers, cannot = torchao_layers(plan)
    settings, told = precision_settings(plan, "Accelerate")
    cannot += told + half_sentences(plan, "Accelerate") + stored_sentences(plan, "Accelerate")
    files = {SETTINGS: as_json(settings), DATA: as_json(layers), SCRIPT: script(SCRIPT), CHECK: script(CHECK)}
    return Parts(files, USE, cannot)


def precision_settings(plan: Plan, target: str) -> tuple[dict[str, Any], list[str]]:
    """{"precision": "fp32", "bf16" or "fp16", "loss_scale": GradScaler's arguments or None}, and what is not done."""
    wide, scaling = kept_with(plan), plan.loss_scaling
    settings: dict[str, Any] = {"precision": wide, "loss_scale": None}
    told = []
    if scaling.kind != "none" and wide != "fp16":
        told.append(f"{target} scales the loss ({scaling.kind}) with fp16 only, and the other products are in {wide}")
    elif scaling.kind == "dynamic":
        settings["loss_scale"] = {
            "init_scale": first_scale(scaling),
            "growth_interval": scaling.growth_interval or GROWTH_INTERVAL,
        }
        if scaling.minimums:
            told.append(f"{target}'s GradScaler has no smallest scale")
    elif scaling.kind == "static":
        # A GradScaler whose scale never grows; it would still halve on an overflow.
        settings["loss_scale"] = {"init_scale": scaling.scale, "growth_interval": 2**31 - 1}
        told.append(f"{target}'s GradScaler halves even a static scale when a gradient overflows")
    return settings, told
