"""Carries out a precision plan with torchao: `convert(model)`, and `check(model)` after it or at any later time.

Reads `plan_torchao.json` beside this file. `convert` refuses, before it changes anything, a model in which a layer of
the plan is missing or is no plain nn.Linear (torchao passes over those, as over Hugging Face's Conv1D, without a word).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

PLAN = json.loads((Path(__file__).parent / "plan_torchao.json").read_text(encoding="utf-8"))
WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.")


class PlanNotCarriedOut(RuntimeError):
    """The model cannot be, or is not, what the plan asks for."""


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """Turn the plan's layers into Float8Linear, in place, and check. `options` go into each Float8LinearConfig.

    `emulate=True` among them runs on any device. Raises PlanNotCarriedOut.
    """
    from torchao.float8 import convert_to_float8_training

    modules = _modules(model)
    wrong = []
    for name in PLAN["layers"]:
        module = modules.get(name)
        if module is None:
            wrong.append(f"{name}: the model has no such module")
        elif type(module) is not nn.Linear:
            wrong.append(f"{name}: a {type(module).__module__}.{type(module).__name__}, which torchao does not convert")
        elif any(size % 16 for size in module.weight.shape):
            wrong.append(f"{name}: shape {tuple(module.weight.shape)} is not divisible by 16, as FP8 kernels need it")
    _refuse(wrong)
    for index in range(len(PLAN["configs"])):
        names = {name for name, at in PLAN["layers"].items() if at == index}
        convert_to_float8_training(
            model, config=_config(index, **options), module_filter_fn=lambda m, fqn, names=names: _plain(fqn) in names
        )
    check(model)
    return model


def check(model: nn.Module) -> None:
    """Raise PlanNotCarriedOut unless exactly the plan's layers are Float8Linear, each with its configuration."""
    from torchao.float8.float8_linear import Float8Linear

    done = {name: module for name, module in _modules(model).items() if isinstance(module, Float8Linear)}
    wrong = [f"{name}: asked for, and not converted" for name in PLAN["layers"] if name not in done]
    wrong += [f"{name}: converted, and not asked for" for name in done if name not in PLAN["layers"]]
    for name, index in PLAN["layers"].items():
        if name in done:
            asked, found = _config(index), done[name].config
            wrong += [
                f"{name}: {field} is {getattr(found, field)}, asked for was {getattr(asked, field)}"
                for field in PLAN["configs"][index]
                if getattr(found, field) != getattr(asked, field)
            ]
    _refuse(wrong)


def _config(index: int, **options: Any) -> Any:
    from torchao.float8 import CastConfig, Float8LinearConfig
    from torchao.float8.config import ScalingGranularity, ScalingType

    fields: dict[str, Any] = {}
    for name, value in PLAN["configs"][index].items():
        if isinstance(value, dict):
            dtype = value.get("target_dtype")
            value = CastConfig(
                scaling_type=ScalingType(value["scaling_type"]),
                scaling_granularity=ScalingGranularity(value.get("scaling_granularity", "tensorwise")),
                target_dtype=None if dtype is None else getattr(torch, dtype),
            )
        fields[name] = value
    return Float8LinearConfig(**fields, **options)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return {_plain(name): module for name, module in model.named_modules()}


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise PlanNotCarriedOut(f"{len(wrong)} layers are not as the plan has them:\n  " + "\n  ".join(wrong))
