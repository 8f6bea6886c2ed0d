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
WITHIN = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # names that wrappers put in between


class PlanNotCarriedOut(RuntimeError):
    """The model cannot be, or is not, what the plan asks for."""


def convert(model: nn.Module, **options: Any) -> nn.Module:
    """Turn the plan's layers into Float8Linear, in place, and check. `options` go into each Float8LinearConfig.

    `emulate=True` among them runs on any device. Raises PlanNotCarriedOut.
    """
    from torchao.float8 import convert_to_float8_training

    inner = _unwrapped(model)
    modules = _modules(inner)
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
            inner, config=_config(index, **options), module_filter_fn=lambda m, fqn, names=names: _plain(fqn) in names
        )
    _put_everywhere(inner, {name: modules[name] for name in PLAN["layers"]})
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
    return {_plain(name): module for name, module in _unwrapped(model).named_modules()}


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model within wrappers: the outermost that has all of the plan's layers, for a module called
    `module` may be the user's; the innermost where none has."""
    known = {*PLAN["layers"], *PLAN["unconverted"]}
    while not known <= {_plain(name) for name, _ in model.named_modules()}:
        within = [child for name, child in model._modules.items() if name in ("module", *WITHIN)]
        if len(model._modules) != 1 or not within:
            break
        model = within[0]
    return model


def _put_everywhere(model: nn.Module, before: dict[str, nn.Module]) -> None:
    """torchao converts a layer at its first place alone; others that share it are given the converted one too."""
    after, names = _modules(model), {id(module): name for name, module in before.items()}
    for parent in list(model.modules()):
        for place, child in list(parent._modules.items()):
            if id(child) in names:
                setattr(parent, place, after[names[id(child)]])


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WITHIN)


def _refuse(wrong: list[str]) -> None:
    if wrong:
        raise PlanNotCarriedOut(f"{len(wrong)} layers are not as the plan has them:\n  " + "\n  ".join(wrong))
