"""torchao: which nn.Linear become Float8Linear, and with which Float8LinearConfig.

Float8LinearConfig says, tensor by tensor and product by product, whether it is cast (dynamically, by tensor or by row)
or left: that holds a plan's three products a layer. What it has not: delayed and static scales, stochastic rounding,
int8, products other than nn.Linear's. (torchao 0.18, float8/config.py.)
"""

from __future__ import annotations

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
    narrow_casts,
    scaling_sentences,
    stored_sentences,
)
from advisor.exports.parts import Parts, as_json, script
from advisor.plan import Plan
from probes.casts import Cast
from probes.records import GRADIENT

DATA, SCRIPT = "plan_torchao.json", "torchao_plan.py"
USE = (
    "import torchao_plan\n"
    "torchao_plan.convert(model)   # after moving it to its device, before torch.compile and FSDP; checks itself\n"
    "torchao_plan.check(model)     # again at any time: raises where the model is not what was asked\n"
)
GRANULARITIES = {"tensor": "tensorwise", "row": "axiswise"}
FORMATS = ("e4m3fn", "e5m2")
PAIRS = frozenset({("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2"), ("e5m2", "e4m3fn")})  # what torch._scaled_mm takes


def torchao_export(plan: Plan) -> Parts:
    """A JSON of layers and their configurations, and the script that converts and checks."""
    data, cannot = torchao_layers(plan)
    cannot += _another_plan(plan)
    cannot += half_sentences(plan, "torch.autocast")
    cannot += stored_sentences(plan, "torchao") + scaling_sentences(plan, "torchao")
    return Parts({DATA: as_json(data), SCRIPT: script(SCRIPT)}, USE, cannot)


def torchao_layers(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """What the script reads, and what cannot be done.

    layers       module path → index into configs
    unconverted  the other linear layers
    configs      Float8LinearConfig's fields
    """
    layers, cannot = layers_of(plan)
    configs: list[dict[str, Any]] = []
    chosen: dict[str, int] = {}
    for layer in layers:
        config, told = _config(layer)
        cannot += told
        if config is not None:
            if config not in configs:
                configs.append(config)
            chosen[layer.name] = configs.index(config)
    rest = [layer.name for layer in layers if layer.name not in chosen]
    return {"model": plan.model, "layers": chosen, "unconverted": rest, "configs": configs}, cannot


def _another_plan(plan: Plan) -> list[str]:
    """How to have a plan that torchao carries out, where it has not the formats of this one."""
    foreign = [
        (layer.name, role) for layer in layers_of(plan)[0] for role, cast in narrow_casts(layer) if not _fits(cast)
    ]
    if not foreign:
        return []
    wanted = ", ".join(f'"{name}/tensor/current/nearest"' for name in FORMATS)
    told = (
        f"{len(foreign)} of the linear layers' casts are none that torchao has: a plan made of its own, by "
        f"advisor.recommend(window, casts=[{wanted}]), is carried out in more layers"
    )
    return [told]


def _config(layer: Layer) -> tuple[dict[str, Any] | None, list[str]]:
    """The layer's configuration, or None where no product of it runs in 8 bits."""
    products = tuple(p for p in layer.narrow(_fits) if _taken(layer, p))
    told = [
        f"{layer.name} {role}: {short_cast(cast)}; {_why(layer, cast)}"
        for role, cast in layer.unused(products, _fits)
        if cast.bits <= 8
    ]
    powers = {":pow2" in str(cast) for _, cast in narrow_casts(layer)}
    if not products:
        return None, told
    if len(powers) > 1:
        return None, [*told, f"{layer.name}: torchao rounds the scales of all its tensors to powers of two, or of none"]
    told += [
        f"{layer.name} {role}: {short_cast(cast)} is done with the scale of the tensor at hand: torchao has no other"
        for role, cast in narrow_casts(layer)
        if _fits(cast) and cast.scale is not None and cast.scale.rule == "delayed"
    ]
    config: dict[str, Any] = {"round_scales_to_power_of_2": powers.pop()}
    for role, field, first, other, second in (
        ("input", "cast_config_input", FORWARD, "for_grad_weight", WEIGHT_GRADIENT),
        ("weight", "cast_config_weight", FORWARD, "for_grad_input", INPUT_GRADIENT),
        (GRADIENT, "cast_config_grad_output", INPUT_GRADIENT, "for_grad_weight", WEIGHT_GRADIENT),
    ):
        cast = layer.casts.get(role)
        config[field] = _cast_config(cast, first in products)
        config[f"{field}_{other}"] = _cast_config(cast, second in products)
    return config, told


def _cast_config(cast: Cast | None, narrow: bool) -> dict[str, str]:
    if cast is None or not _fits(cast):
        return {"scaling_type": "disabled"}
    return {
        "scaling_type": "dynamic" if narrow else "disabled",
        "scaling_granularity": GRANULARITIES[cast.granularity] if narrow else "tensorwise",
        "target_dtype": f"float8_{cast.format.name}",
    }


def _fits(cast: Cast) -> bool:
    """Whether torchao can cast so: a delayed scale is replaced by the tensor's own, which is never worse."""
    if not is_fp8(cast) or cast.granularity not in GRANULARITIES:
        return False
    return cast.scale is not None and cast.scale.rule in ("current", "delayed")


def _taken(layer: Layer, product: str) -> bool:
    """Whether its kernels multiply the pair: both by tensor or both by row, and not e5m2 twice."""
    left, right = (layer.casts[role] for role in OPERANDS[product])
    return left.granularity == right.granularity and (left.format.name, right.format.name) in PAIRS


def _why(layer: Layer, cast: Cast) -> str:
    if _fits(cast):
        return "its partner in each product stays wide, or no kernel of torchao's multiplies the two"
    return "torchao casts to e4m3fn and e5m2 by tensor or by row, to nearest, with scales of the tensor at hand"
