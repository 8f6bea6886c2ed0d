"""Checks that Megatron's per-module quantization recipe reaches what a precision plan asks for: `check(model)`.

Reads `plan_megatron.json` and `.yaml` beside this file. `model` is what Megatron built, or its chunk on this rank: with
pipeline parallelism each rank has a part of the layers, and `whole=False` says so.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

HERE = Path(__file__).parent
PLAN = json.loads((HERE / "plan_megatron.json").read_text(encoding="utf-8"))
RECIPE = HERE / "plan_megatron.yaml"
WIDE = "bf16"
WRAPPERS = ("module.",)


class PlanNotCarriedOut(RuntimeError):
    """The model is not what the plan asks for."""


def check(model: nn.Module, whole: bool = True) -> None:
    """Raise PlanNotCarriedOut unless the recipe gives each of the plan's layers, and no other, its configuration.

    Where Megatron has given a layer's parameters to TransformerEngine already (`te_quant_params`), they are compared.
    """
    from megatron.core.quantization.quant_config import MatchContext, RecipeConfig

    recipe = RecipeConfig.from_yaml_file(str(RECIPE))
    modules = {_plain(name): module for name, module in model.named_modules()}
    wrong = [f"{name}: the model has no such module" for name in PLAN["layers"] if whole and name not in modules]
    for name, module in modules.items():
        asked = PLAN["layers"].get(name, WIDE)
        found = recipe.match_to_config_key(MatchContext(module_path=name, layer_number=None))
        if found != asked:
            wrong.append(f"{name}: the recipe gives it {found!r}, asked for was {asked!r}")
        params = getattr(module, "te_quant_params", None)
        if name in PLAN["layers"]:
            if not any(parameter is not None for parameter in module.parameters(recurse=False)):
                wrong.append(f"{name}: a {type(module).__name__} without a weight of its own")
            elif hasattr(module, "te_quant_params") and params is None:
                wrong.append(f"{name}: Megatron gave it no recipe: was --te-precision-config-file passed?")
    if wrong:
        raise PlanNotCarriedOut(f"{len(wrong)} layers are not as the plan has them:\n  " + "\n  ".join(wrong))


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        while name.startswith(wrapper) and name not in PLAN["layers"]:  # which may have a module of that name
            name = name.removeprefix(wrapper)
    return name
