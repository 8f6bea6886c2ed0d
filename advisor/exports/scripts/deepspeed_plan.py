"""Carries out a precision plan with DeepSpeed: `convert(model)` before `initialize`, `check(engine)` after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torchao_plan
from torch import nn

CONFIG = json.loads((Path(__file__).parent / "ds_config.json").read_text(encoding="utf-8"))
PlanNotCarriedOut = torchao_plan.PlanNotCarriedOut


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """The plan's FP8 layers; see torchao_plan.convert."""
    return torchao_plan.convert(model, **options)


def check(engine: Any) -> None:
    """Raise PlanNotCarriedOut unless the engine's precision and the model's FP8 layers are those of the plan."""
    wrong = []
    for name, found in (("bf16", engine.bfloat16_enabled()), ("fp16", engine.fp16_enabled())):
        if bool(found) != CONFIG[name]["enabled"]:
            wrong.append(f"{name} is {'on' if found else 'off'}, asked for was {CONFIG[name]['enabled']}")
    scale, power = CONFIG["fp16"].get("loss_scale"), CONFIG["fp16"].get("initial_scale_power")
    if scale is not None and engine.loss_scale() != scale:
        wrong.append(f"the loss scale is {engine.loss_scale()} (0: dynamic), asked for was {scale}")
    if power is not None and engine.initial_dynamic_scale() != 2**power:
        wrong.append(f"the loss scale starts at {engine.initial_dynamic_scale()}, asked for was {2**power}")
    for name, kept in (
        ("bf16_master_weights_and_grads", engine.bf16_master_weights_and_gradients()),
        ("bf16_optimizer_states", engine.bf16_optimizer_states()),
    ):
        if bool(kept) != CONFIG["bf16"].get(name, False):
            wrong.append(f"{name} is {'on' if kept else 'off'}, asked for was {CONFIG['bf16'].get(name, False)}")
    if wrong:
        raise PlanNotCarriedOut("the engine is not as the plan has it:\n  " + "\n  ".join(wrong))
    torchao_plan.check(engine.module)
