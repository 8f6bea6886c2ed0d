"""Carries out a precision plan with TransformerEngine: `recipe()`, `start(model)`, and `check(model)`.

Reads `plan_transformer_engine.json` and `.yaml` beside this file. The model must be built of TransformerEngine's
layers, with the module paths that the plan has.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

HERE = Path(__file__).parent
PLAN = json.loads((HERE / "plan_transformer_engine.json").read_text(encoding="utf-8"))
FEATURES = HERE / "plan_transformer_engine.yaml"
GEMMS = ("fprop", "dgrad", "wgrad")
NAMED = "model."  # what nvdlfw-inspect puts before every name


class PlanNotCarriedOut(RuntimeError):
    """The model cannot be, or is not, what the plan asks for."""


def recipe() -> Any:
    """The TransformerEngine recipe, for `transformer_engine.pytorch.autocast`. None where the plan has no FP8."""
    from transformer_engine.common import recipe as recipes

    if PLAN["recipe"] is None:
        return None
    arguments = dict(PLAN["recipe"])
    kind = getattr(recipes, arguments.pop("class"))
    return kind(fp8_format=recipes.Format[arguments.pop("fp8_format")], **arguments)


def start(model: nn.Module) -> None:
    """Start nvdlfw-inspect with the plan's YAML, give every layer of theirs its module path as a name, and check.

    The names are given here: nvdlfw-inspect's own take a layer's `layer_number`, which Megatron counts from 1.
    """
    import nvdlfw_inspect.api as inspect_api
    import transformer_engine.debug as debug

    features = str(Path(debug.__file__).parent / "features")
    inspect_api.initialize(config_file=str(FEATURES), feature_dirs=[features])
    give_names(model)
    check(model)


def give_names(model: nn.Module) -> None:
    """What nvdlfw-inspect calls each layer; a module of the user's may have a `name` that it needs."""
    for name, module in model.named_modules():
        if _is_of_theirs(module):
            module.name = NAMED + name


def check(model: nn.Module) -> None:
    """Raise PlanNotCarriedOut unless each layer of the plan is a TransformerEngine layer that the YAML treats as asked.

    A TransformerEngine layer that the plan does not name would run in FP8 unasked: that is refused too.
    """
    modules = dict(model.named_modules())
    theirs = {name for name, module in modules.items() if _is_theirs(module)}
    wrong = [
        f"{name}: asked for in FP8, and no layer of TransformerEngine" for name in PLAN["layers"] if name not in theirs
    ]
    known = {*PLAN["layers"], *PLAN["off"]}
    wrong += [f"{name}: a layer of TransformerEngine that the plan does not know" for name in theirs - known]
    wrong += [
        f"{name}: its name for nvdlfw-inspect is {getattr(modules[name], 'name', None)!r}"
        for name in sorted(theirs)
        if getattr(modules[name], "name", None) != NAMED + name
    ]
    wrong += [
        f"{name}: the YAML turns off {off}, asked for was {asked}" for name, off, asked in _unlike(theirs & known)
    ]
    if wrong:
        raise PlanNotCarriedOut(f"{len(wrong)} layers are not as the plan has them:\n  " + "\n  ".join(wrong))


def _is_theirs(module: nn.Module) -> bool:
    """A layer with a matrix product of its own: those that have an FP8 state and a weight."""
    return (
        _is_of_theirs(module)
        and "weight" in dict(module.named_parameters(recurse=False))
        and hasattr(module, "fp8_meta")
    )


def _is_of_theirs(module: nn.Module) -> bool:
    """Whether its class is TransformerEngine's, or made from one of those."""
    return any(one.__module__.startswith("transformer_engine.pytorch") for one in type(module).__mro__)


def _unlike(names: set[str]) -> list[tuple[str, list[str], list[str]]]:
    import yaml

    sections = (yaml.safe_load(FEATURES.read_text(encoding="utf-8")) or {}).values()
    found = []
    for name in sorted(names):
        off: set[str] = set()
        for section in sections:
            if re.search(section["layers"]["layer_name_regex_pattern"], NAMED + name):
                feature = section["transformer_engine"]
                every = set(GEMMS)
                off |= (
                    every if "DisableQuantizationLayer" in feature else set(feature["DisableQuantizationGEMM"]["gemms"])
                )
        asked = set(GEMMS) - set(PLAN["layers"].get(name, []))
        if off != asked:
            found.append((name, sorted(off), sorted(asked)))
    return found
