"""Carries out a precision plan with Accelerate: `accelerator()`, `convert(model)` before `prepare`, then `check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torchao_plan
from torch import nn

SETTINGS = json.loads((Path(__file__).parent / "plan_accelerate.json").read_text(encoding="utf-8"))
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
PlanNotCarriedOut = torchao_plan.PlanNotCarriedOut


def accelerator(**arguments: Any) -> Any:
    """An accelerate.Accelerator with the plan's mixed precision and loss scaling; `arguments` are passed on."""
    from accelerate import Accelerator
    from accelerate.utils import GradScalerKwargs

    handlers = list(arguments.pop("kwargs_handlers", None) or [])
    if SETTINGS["loss_scale"] is not None:
        handlers.append(GradScalerKwargs(**SETTINGS["loss_scale"]))
    return Accelerator(mixed_precision=MIXED[SETTINGS["precision"]], kwargs_handlers=handlers, **arguments)


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """The plan's FP8 layers; see torchao_plan.convert."""
    return torchao_plan.convert(model, **options)


def check(accelerator: Any, model: nn.Module) -> None:
    """Raise PlanNotCarriedOut unless the accelerator's precision and the model's FP8 layers are those of the plan."""
    asked = MIXED[SETTINGS["precision"]]
    if accelerator.mixed_precision != asked:
        raise PlanNotCarriedOut(f"mixed precision is {accelerator.mixed_precision!r}, asked for was {asked!r}")
    scaler, wanted = accelerator.scaler, SETTINGS["loss_scale"]
    if wanted is not None and (scaler is None or scaler._init_scale != wanted["init_scale"]):
        raise PlanNotCarriedOut(f"the loss scale does not start at {wanted['init_scale']}")
    if wanted is not None and scaler.get_growth_interval() != wanted["growth_interval"]:
        raise PlanNotCarriedOut(f"the loss scale does not grow after {wanted['growth_interval']} steps")
    torchao_plan.check(accelerator.unwrap_model(model, keep_fp32_wrapper=False))
