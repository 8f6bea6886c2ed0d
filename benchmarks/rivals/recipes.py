"""What others would do with a model, as plans: the recipes that a plan of ours is set beside.

Each is a function of a `Setting` and gives a cast for every slot it narrows; the rest stays as it is. A recipe that a
library decides by itself is decided by that library: torchao's automatic filter, and ModelOpt's auto_quantize.

    bf16         every operand of every product in bf16
    pure-bf16    that, and master weights and optimizer state in bf16 as well (Yun et al. 2023)
    int8         every product with a weight: its operands and its gradient in int8, one scale a tensor
    te-hybrid    the same products, e4m3 forward and e5m2 for gradients, scales delayed by 1,024 steps:
                 TransformerEngine's DelayedScaling with Format.HYBRID, its default
    torchao      nn.Linear only, the same formats, scales of the tensor at hand: Float8LinearConfig(), no filter
    torchao-rows nn.Linear only, e4m3 for all three, a scale a row, rounded to a power of two: recipe "rowwise"
    torchao-auto `torchao`, where its own filter `_auto_filter_for_recipe` lets it
    first-last   `te-hybrid` but for the first and the last of these sites
    modelopt     the layers and formats that auto_quantize chooses among fp8 and int8 at 12 effective bits a weight; it
                 says nothing of gradients, which get e5m2 beside fp8 and int8 beside int8
    mellempudi   every operand and gradient in e5m2 without a scale, activations and gradients rounded stochastically;
                 fp16 master weights; dynamic loss scale whose minimum rises (Mellempudi et al. 2019)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

import advisor
from advisor.castnames import KEEP
from advisor.cost import shares
from advisor.hardware import hardware_named
from advisor.plan import LossScaling, Plan, Stored
from benchmarks.advice.models import Trainable
from probes.parameter_records import MASTER
from probes.records import GRADIENT, Site
from probes.window import Window

Slot = tuple[str, str]
Casts = dict[Slot, str]

E4M3, E5M2, INT8 = "e4m3fn/tensor/current", "e5m2/tensor/current", "int8/tensor/current"
HISTORY = 1024  # TransformerEngine 2.20, common/recipe: DelayedScaling.amax_history_len
EFFECTIVE_BITS = 12.0  # halfway between bf16 and 8 bits: about half of the weights are narrowed
CALIBRATION_BATCHES = 16
FIRST_LOSS_SCALE = 2.0**13


@dataclass(frozen=True)
class Setting:
    """One model at the step from which the contenders train on."""

    trainable: Trainable
    model: nn.Module
    window: Window
    hardware: str

    @property
    def weighted(self) -> list[Site]:
        """The sites that multiply by a parameter, in the order in which they run."""
        return [site for site in self.window.sites if any(role.startswith("weight") for role in site.roles)]

    @property
    def linear(self) -> dict[str, nn.Linear]:
        """The model's linear layers whose product is a site, by its name."""
        names = {site.name for site in self.window.sites}
        return {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Linear) and name in names}


@dataclass(frozen=True)
class Recipe:
    """A cast for each slot that is narrowed, and what becomes of stored tensors and of the loss."""

    casts: Casts
    storage: tuple[Stored, ...] = ()
    loss_scaling: LossScaling | None = None


def plan_of(setting: Setting, recipe: Recipe) -> Plan:
    """The recipe as a plan. Of what it costs, only the share of FLOPs in 8 bits is filled in."""
    window = setting.window
    some_role = window.sites[0].roles[0]
    data = advisor.uniform(window, setting.hardware, **{some_role: KEEP}).to_dict()
    for one in data["assignments"]:
        cast = recipe.casts.get((one["site"], one["role"]), KEEP)
        if cast != KEEP:
            one |= {"cast": cast, "reason": "as the recipe has it."} | dict.fromkeys(UNKNOWN)
    for name in ("damage", "damage_se", "noise_ratio", "lost_batch_share"):
        data["predicted"][name] = None
    data["storage"] = [stored.model_dump(mode="json") for stored in recipe.storage]
    if recipe.loss_scaling is not None:
        data["loss_scaling"] = recipe.loss_scaling.model_dump(mode="json")
    plan = Plan.from_dict(data)
    predicted = plan.predicted.model_copy(update={"share_8bit": share_in_8bit(setting, plan)})
    return plan.model_copy(update={"predicted": predicted})


def share_in_8bit(setting: Setting, plan: Plan) -> float:
    """FLOPs of products whose operands both have 8 bits, in a pair that the hardware takes, over all."""
    casts = {(one.site, one.role): advisor.Cast.parse(one.cast) for one in plan.assignments}
    narrow = shares(setting.window.sites, casts, hardware_named(setting.hardware))
    return narrow.flops_8bit / setting.window.total_flops


UNKNOWN = (
    "damage",
    "damage_se",
    "damage_interval",
    "damage_from",
    "noise_ratio",
    "lost_batch_share",
    "bias",
    "sqnr_db",
    "underflow",
    "subnormal",
    "overflow",
    "amax",
)


def bf16(setting: Setting) -> Recipe:
    """Every operand of every product."""
    return Recipe({(site.name, role): "bf16/none" for site in setting.window.sites for role in site.roles})


def pure_bf16(setting: Setting) -> Recipe:
    """Nothing is kept in more than 16 bits."""
    return Recipe(bf16(setting).casts, storage=_stored(setting, "bf16/none/nearest", state=True))


def int8(setting: Setting) -> Recipe:
    """Every product with a weight."""
    return Recipe(_given(setting.weighted, INT8, INT8))


def te_hybrid(setting: Setting) -> Recipe:
    """Every product with a weight, e4m3 forward and e5m2 backward, delayed."""
    return Recipe(_hybrid(setting.weighted, f"delayed(len={HISTORY})"))


def first_last(setting: Setting) -> Recipe:
    """All but the first and the last."""
    return Recipe(_hybrid(setting.weighted[1:-1], f"delayed(len={HISTORY})"))


def torchao(setting: Setting) -> Recipe:
    """Linear layers, without a filter."""
    return Recipe(_hybrid([s for s in setting.weighted if s.name in setting.linear]))


def torchao_rows(setting: Setting) -> Recipe:
    """Linear layers, e4m3 by rows."""
    cast = "e4m3fn/row/current:pow2"
    return Recipe(_given([s for s in setting.weighted if s.name in setting.linear], cast, cast))


def torchao_auto(setting: Setting) -> Recipe:
    """Linear layers that torchao's own filter for its tensorwise recipe lets pass. Needs torchao."""
    from torchao.float8 import _auto_filter_for_recipe

    wanted = _auto_filter_for_recipe("tensorwise", [])
    passed = {name for name, module in setting.linear.items() if wanted(module, name)}
    return Recipe(_hybrid([site for site in setting.weighted if site.name in passed]))


def modelopt(setting: Setting) -> Recipe:
    """The layers and formats that ModelOpt's auto_quantize chooses, by its gradient score. Needs nvidia-modelopt."""
    import modelopt.torch.quantization as mtq

    trainable = setting.trainable
    batches = [trainable.batch(1_000_000 + index, 0) for index in range(CALIBRATION_BATCHES)]
    outputs: dict[str, Tensor] = {}

    def forward_backward(model: nn.Module, batch: Any) -> None:
        trainable.loss(model, batch).backward()

    def forward(model: nn.Module, batch: Any) -> Tensor:
        outputs["last"] = model(batch.inputs)
        return outputs["last"]

    _, state = mtq.auto_quantize(
        deepcopy(setting.model),
        {"effective_bits": EFFECTIVE_BITS},
        [mtq.FP8_DEFAULT_CFG, mtq.INT8_DEFAULT_CFG],
        batches,
        forward,
        forward_backward_step=forward_backward,
        num_calib_steps=CALIBRATION_BATCHES,
        num_score_steps=CALIBRATION_BATCHES,
    )
    casts: Casts = {}
    for name, chosen in state["best"]["recipe"].items():
        sites = [site for site in setting.weighted if site.name == name.removesuffix(".quant_recipe")]
        if "FP8" in str(chosen):
            casts |= _hybrid(sites)
        elif "INT8" in str(chosen):
            casts |= _given(sites, INT8, INT8)
    return Recipe(casts)


def mellempudi(setting: Setting) -> Recipe:
    """e5m2 everywhere, no scales but the loss's."""
    casts = {
        (site.name, role): "e5m2/none/nearest" if role.startswith("weight") else "e5m2/none/stochastic"
        for site in setting.window.sites
        for role in site.roles
    }
    scaling = LossScaling(
        kind="dynamic",
        reason="Mellempudi et al. (2019), sec. 3.2: the smallest scale rises as gradients shrink.",
        scale=FIRST_LOSS_SCALE,
        growth_interval=200,
        minimums=((0, 2.0**8), (60, 2.0**13)),  # ours: the paper's are for trainings of 10^5 steps
    )
    return Recipe(casts, storage=_stored(setting, "fp16/none/nearest", state=False), loss_scaling=scaling)


RECIPES: Mapping[str, Callable[[Setting], Recipe]] = MappingProxyType(
    {
        "bf16": bf16,
        "pure-bf16": pure_bf16,
        "int8": int8,
        "te-hybrid": te_hybrid,
        "first-last": first_last,
        "torchao": torchao,
        "torchao-rows": torchao_rows,
        "torchao-auto": torchao_auto,
        "modelopt": modelopt,
        "mellempudi": mellempudi,
    }
)


def _given(sites: list[Site], forward: str, gradient: str) -> Casts:
    return {(site.name, role): gradient if role == GRADIENT else forward for site in sites for role in site.roles}


def _hybrid(sites: list[Site], scale: str = "current") -> Casts:
    return _given(sites, f"e4m3fn/tensor/{scale}", f"e5m2/tensor/{scale}")


def _stored(setting: Setting, cast: str, state: bool) -> tuple[Stored, ...]:
    """Every parameter's master weight, and its optimizer state where that is asked for."""
    found = []
    for record in setting.window.parameter_records:
        roles = (MASTER, *(name for name in record.states if state and name != "step"))
        found += [Stored(name=record.name, role=role, cast=cast, reason="as the recipe has it.") for role in roles]
    return tuple(found)
