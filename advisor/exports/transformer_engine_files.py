"""TransformerEngine: one recipe for the model, and a list of layers and products that stay out of it.

A recipe fixes format and scaling for every TE layer; nvdlfw-inspect's YAML turns single products (`fprop`, `dgrad`,
`wgrad`) or whole layers off. So the recipe is the one that serves most of the plan's FLOPs, and what it does not serve
is turned off and told. (TransformerEngine 2.20, common/recipe and debug/features; nvdlfw-inspect 0.2.)
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from advisor.castnames import short_cast
from advisor.exports.layers import (
    FORWARD,
    INPUT_GRADIENT,
    OPERANDS,
    WEIGHT_GRADIENT,
    Layer,
    half_sentences,
    is_fp8,
    layers_of,
    scaling_sentences,
    stored_sentences,
)
from advisor.exports.parts import Parts, as_json, as_yaml, script
from advisor.plan import Plan
from probes.casts import Cast
from probes.records import GRADIENT

DATA, FEATURES, SCRIPT = "plan_transformer_engine.json", "plan_transformer_engine.yaml", "transformer_engine_plan.py"
USE = (
    "import transformer_engine_plan as plan\n"
    "plan.start(model)              # before the first step: starts nvdlfw-inspect, names the layers, checks them\n"
    "with transformer_engine.pytorch.autocast(enabled=True, recipe=plan.recipe()):\n"
    "    ...                        # as in any training with TransformerEngine\n"
    "plan.check(model)              # again at any time: raises where a layer of the plan is missing or unnamed\n"
)
PRODUCTS = {FORWARD: "fprop", INPUT_GRADIENT: "dgrad", WEIGHT_GRADIENT: "wgrad"}
HYBRID, E4M3 = "HYBRID", "E4M3"


@dataclass(frozen=True)
class Recipe:
    """A recipe's class and its arguments. `fits` says whether it casts a role as the plan wants it."""

    kind: str
    format: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def fits(self, role: str, cast: Cast) -> bool:
        """Whether a tensor in this role is cast so by this recipe."""
        backward = role == GRADIENT and self.format == HYBRID
        return cast.format.name == ("e5m2" if backward else "e4m3fn") and _scaling(cast) == (self.kind, self.arguments)


def transformer_engine_export(plan: Plan) -> Parts:
    """A JSON with the recipe and the layers, nvdlfw-inspect's YAML, and the script that starts and checks."""
    layers, cannot = layers_of(plan)
    recipe = _best(layers)
    off: dict[tuple[str, ...], list[str]] = defaultdict(list)
    on: dict[str, list[str]] = {}
    for layer in layers:
        done = () if recipe is None else _done(layer, recipe)
        cannot += _told(layer, done)
        left = tuple(PRODUCTS[product] for product in OPERANDS if product not in done)
        if done:
            on[layer.name] = [PRODUCTS[product] for product in done]
        if left:
            off[left].append(layer.name)
    cannot += half_sentences(plan, "TransformerEngine")
    cannot += stored_sentences(plan, "TransformerEngine") + scaling_sentences(plan, "TransformerEngine")
    data = {
        "model": plan.model,
        "recipe": None if recipe is None else _as_data(recipe),
        "layers": on,
        "off": sorted(name for products, names in off.items() if len(products) == len(PRODUCTS) for name in names),
    }
    return Parts({DATA: as_json(data), FEATURES: as_yaml(_features(off)), SCRIPT: script(SCRIPT)}, USE, cannot)


def _features(off: dict[tuple[str, ...], list[str]]) -> dict[str, Any]:
    """Sections of nvdlfw-inspect: each layer is in one, for it refuses those that two sections name."""
    sections: dict[str, Any] = {}
    for products, names in off.items():
        whole = len(products) == len(PRODUCTS)
        feature = (
            {"DisableQuantizationLayer": {"enabled": True}}
            if whole
            else {"DisableQuantizationGEMM": {"enabled": True, "gemms": list(products)}}
        )
        sections["layers_off" if whole else f"{'_'.join(products)}_off"] = {
            "enabled": True,
            # nvdlfw-inspect's names begin with "model."; its exact_layer_names raises for every other layer.
            "layers": {"layer_name_regex_pattern": rf"^(?:model\.)?(?:{'|'.join(map(re.escape, names))})$"},
            "transformer_engine": feature,
        }
    return sections


def _best(layers: list[Layer]) -> Recipe | None:
    """The recipe that serves most FLOPs; the first of equals in the order of the layers."""
    served: dict[Recipe, float] = {}
    for layer in layers:
        for cast in layer.casts.values():
            scaling = _scaling(cast)
            if scaling is not None:
                for name in (HYBRID, E4M3):
                    served.setdefault(Recipe(scaling[0], name, scaling[1]), 0.0)
    for recipe in served:
        served[recipe] = sum(layer.site.flops * len(_done(layer, recipe)) for layer in layers)
    return max(served, key=lambda one: served[one], default=None) if any(served.values()) else None


def _done(layer: Layer, recipe: Recipe) -> tuple[str, ...]:
    return tuple(
        product
        for product, operands in OPERANDS.items()
        if all(role in layer.casts and recipe.fits(role, layer.casts[role]) for role in operands)
    )


def _scaling(cast: Cast) -> tuple[str, tuple[tuple[str, Any], ...]] | None:
    """The recipe's class and arguments that scale like this cast."""
    if not is_fp8(cast) or cast.scale is None:
        return None
    scale = cast.scale
    if cast.granularity == "tensor" and scale.rule == "delayed":
        history = (("margin", scale.margin), ("amax_history_len", scale.length), ("amax_compute_algo", "max"))
        return "DelayedScaling", history
    if cast.granularity == "tensor" and scale.rule == "current":
        return "Float8CurrentScaling", ()
    if cast.granularity in ("block1x128", "block128x128"):
        return "Float8BlockScaling", ()
    if cast.granularity == "block32" and scale.rule in ("e8m0", "e8m0up"):
        return "MXFP8BlockScaling", ()
    return None


def _told(layer: Layer, done: tuple[str, ...]) -> list[str]:
    used = {role for product in done for role in OPERANDS[product]}
    return [
        f"{layer.name} {role}: {short_cast(cast)}; the model's one recipe does not cast it so: its products stay wide"
        for role, cast in layer.casts.items()
        if cast.bits <= 8 and role not in used
    ]


def _as_data(recipe: Recipe) -> dict[str, Any]:
    return {"class": recipe.kind, "fp8_format": recipe.format, **dict(recipe.arguments)}
