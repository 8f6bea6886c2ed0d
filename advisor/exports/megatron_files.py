"""Megatron Core and Bridge: a per-module quantization recipe, ordered globs to configurations.

The first matcher that matches decides, and a last one takes everything else. A configuration is a whole layer's: FP8 by
tensor (current scaling) or by blocks, in `e4m3` or `hybrid`; delayed scaling is refused there, and single products
cannot be turned off. (megatron-core 0.16, core/quantization and extensions/transformer_engine.py.)
"""

from __future__ import annotations

from typing import Any

from advisor.castnames import short_cast
from advisor.exports.layers import (
    OPERANDS,
    Layer,
    half_sentences,
    is_fp8,
    layers_of,
    narrow_casts,
    scaling_sentences,
    stored_sentences,
)
from advisor.exports.parts import Parts, as_json, as_yaml, script
from advisor.plan import Plan
from probes.casts import Cast
from probes.records import GRADIENT

DATA, RECIPE, SCRIPT = "plan_megatron.json", "plan_megatron.yaml", "megatron_plan.py"
USE = (
    "# beside --bf16 --transformer-impl transformer_engine, without --fp8-format:\n"
    "--te-precision-config-file plan_megatron.yaml\n"
    "import megatron_plan\n"
    "megatron_plan.check(model)    # after the model is built: raises where the recipe does not reach what it should\n"
)
WIDE = "bf16"
RECIPES = {"tensor": "tensorwise", "block1x128": "blockwise", "block128x128": "blockwise", "block32": "mxfp8"}


def megatron_export(plan: Plan) -> Parts:
    """The recipe's YAML, a JSON of what each layer should get, and the script that checks."""
    layers, cannot = layers_of(plan)
    chosen: dict[str, str] = {}
    for layer in layers:
        config, told = _config(layer)
        cannot += told
        chosen[layer.name] = config
    configs: dict[str, Any] = {name: _payload(name) for name in sorted({*chosen.values(), WIDE})}
    matchers: dict[str, Any] = {
        f"layer_{index}": _matcher(_literal(name), config) for index, (name, config) in enumerate(chosen.items())
    }
    matchers["everything_else"] = _matcher("*", WIDE)
    cannot += half_sentences(plan, "Megatron")
    cannot += stored_sentences(plan, "Megatron's recipe") + scaling_sentences(plan, "Megatron's recipe")
    data = {"model": plan.model, "layers": {name: config for name, config in chosen.items() if config != WIDE}}
    return Parts(
        {RECIPE: as_yaml({"configs": configs, "matchers": matchers}), DATA: as_json(data), SCRIPT: script(SCRIPT)},
        USE,
        cannot,
    )


def _matcher(pattern: str, config: str) -> dict[str, Any]:
    return {"config": config, "type": "glob", "pattern": pattern, "enabled": True}


def _literal(name: str) -> str:
    """The name as a glob that matches nothing else."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _payload(config: str) -> dict[str, Any]:
    if config == WIDE:
        return {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": {}}
    recipe, _, name = config.partition("_")
    return {
        "transformer_engine_config_type": "TEQuantizationParams",
        "training_recipe": {
            "fp8_quantization_recipe": recipe,
            "fp8_format": name,
            "override_nonquantized_autocast": True,
        },
    }


def _config(layer: Layer) -> tuple[str, list[str]]:
    """The name of the layer's configuration, and what of its casts is not done."""
    casts = dict(narrow_casts(layer))
    if not casts:
        return WIDE, []
    recipes = {RECIPES.get(cast.granularity) for cast in casts.values() if _fits(cast)}
    formats = {role: cast.format.name for role, cast in casts.items()}
    forward = {name for role, name in formats.items() if role != GRADIENT}
    backward = formats.get(GRADIENT, "e4m3fn")
    whole = casts.keys() == {role for operands in OPERANDS.values() for role in operands if role in layer.casts}
    if (
        len(recipes) == 1
        and None not in recipes
        and all(map(_fits, casts.values()))
        and whole
        and forward == {"e4m3fn"}
    ):
        told = [
            f"{layer.name} {role}: {short_cast(cast)} is done with the scale of the tensor at hand; Megatron's recipe "
            "has no delayed ones"
            for role, cast in casts.items()
            if cast.scale is not None and cast.scale.rule == "delayed"
        ]
        return f"{recipes.pop()}_{'hybrid' if backward == 'e5m2' else 'e4m3'}", told
    why = (
        "Megatron's recipe is for a whole layer: e4m3 forward, e4m3 or e5m2 backward, one kind of scale; it stays "
        "in bf16"
    )
    return WIDE, [f"{layer.name} {role}: {short_cast(cast)}; {why}" for role, cast in casts.items()]


def _fits(cast: Cast) -> bool:
    return is_fp8(cast) and cast.granularity in RECIPES
