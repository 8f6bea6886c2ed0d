"""Libraries with mixed precision for a whole model and no FP8 layers by name: torchao's layers, settings beside them.

Accelerate and Lightning both scale the loss with torch's GradScaler, in fp16 only.
"""

from __future__ import annotations

from typing import Any

from advisor.exports.layers import half_sentences, kept_with, stored_sentences
from advisor.exports.parts import Parts, as_json, script
from advisor.exports.torchao_files import DATA, SCRIPT, torchao_layers
from advisor.loss_scaling import GROWTH_INTERVAL, first_scale
from advisor.plan import Plan


def mixed_precision_export(plan: Plan, target: str, settings_file: str, script_file: str, use: str) -> Parts:
    """The target's settings, torchao's files for the FP8 layers, and the script that carries out and checks."""
    layers, cannot = torchao_layers(plan)
    settings, told = _settings(plan, target)
    cannot += told + half_sentences(plan, target) + stored_sentences(plan, target)
    files = {
        settings_file: as_json(settings),
        DATA: as_json(layers),
        SCRIPT: script(SCRIPT),
        script_file: script(script_file),
    }
    return Parts(files, use, cannot)


def _settings(plan: Plan, target: str) -> tuple[dict[str, Any], list[str]]:
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
