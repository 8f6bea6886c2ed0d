"""What the narrow casts of a plan mean for one layer: which of its three products run in 8 bits, and in what.

Other libraries think in layers and products, a plan in tensors: a product runs in 8 bits there only if both of its
operands are cast to 8 bits. A cast whose partner stays wide is of no use to them, and is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType

from advisor.castnames import KEEP, keeps, parse_cast, short_cast
from advisor.loss_scaling import first_scale
from advisor.native import MULTIPLE
from advisor.plan import Plan, PlannedSite
from probes.casts import Cast
from probes.names import ROOT
from probes.records import GRADIENT

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = "forward", "input_grad", "weight_grad"
OPERANDS = MappingProxyType(
    {
        FORWARD: ("input", "weight"),
        INPUT_GRADIENT: (GRADIENT, "weight"),
        WEIGHT_GRADIENT: ("input", GRADIENT),
    }
)
LINEAR_ROLES = frozenset({"input", "weight"})


@dataclass(frozen=True)
class Layer:
    """A site with an input and a weight, and its casts by role; `grad_output` is absent where none came."""

    site: PlannedSite
    casts: dict[str, Cast]

    @property
    def name(self) -> str:
        """The module's path."""
        return self.site.site

    def narrow(self, fits: Callable[[Cast], bool]) -> tuple[str, ...]:
        """The products whose two operands have casts that fit."""
        return tuple(
            product
            for product, operands in OPERANDS.items()
            if all(role in self.casts and fits(self.casts[role]) for role in operands)
        )

    def unused(self, products: tuple[str, ...], fits: Callable[[Cast], bool]) -> Iterator[tuple[str, Cast]]:
        """Roles with a cast that none of these products uses."""
        used = {role for product in products for role in OPERANDS[product]}
        for role, cast in self.casts.items():
            if not keeps(cast) and not (role in used and fits(cast)):
                yield role, cast


def layers_of(plan: Plan) -> tuple[list[Layer], list[str]]:
    """The plan's linear layers, and a sentence for every cast at a site that is none.

    A linear layer is a site of `linear` with a parameter of its own: whether the module is an nn.Linear is for the
    model to say, and for the exported script to ask. One whose sizes no FP8 kernel takes is there without its narrow
    casts. Not one: a product with one of several parameters of a module
    (`attn/in_proj_weight`), and a model that is itself a linear layer, which nothing can put another in the place of.
    """
    casts: dict[str, dict[str, Cast]] = {site.site: {} for site in plan.sites}
    for one in plan.assignments:
        casts[one.site][one.role] = parse_cast(one.cast)
    layers, others = [], []
    for site in plan.sites:
        found = casts[site.site]
        why, odd = _no_layer(site), any(size % MULTIPLE for size in site.parameter_shape or ())
        if why is None and odd:
            why = f"a weight of {list(site.parameter_shape or ())} is not divisible by {MULTIPLE}, as FP8 kernels need"
            layers.append(Layer(site, {role: parse_cast(KEEP) if _is_narrow(c) else c for role, c in found.items()}))
        elif why is None:
            layers.append(Layer(site, found))
            continue
        others += [f"{site.site} {role}: {short_cast(cast)}; {why}" for role, cast in found.items() if _is_narrow(cast)]
    return layers, others


def _no_layer(site: PlannedSite) -> str | None:
    """Why a site is no linear layer that a library can convert; None where it is one."""
    if site.op != "linear" or not set(site.roles) >= LINEAR_ROLES or site.parameter is None:
        return f"the site is a {site.op}, not a linear layer"
    if site.site == ROOT:
        return "the model is itself the linear layer, and only layers within a model can be converted"
    if "/" in site.site:
        return f"its weight is one of several of {site.site.rpartition('/')[0]}, which is not a linear layer"
    return None


def is_fp8(cast: Cast) -> bool:
    """Whether a cast is to e4m3fn or e5m2, in a way that FP8 libraries have: nearest, saturating, scaled."""
    return (
        cast.format.name in ("e4m3fn", "e5m2")
        and cast.scale is not None
        and cast.rounding == "nearest"
        and cast.saturate
    )


def narrow_casts(layer: Layer) -> Iterator[tuple[str, Cast]]:
    """The roles with casts of 8 bits or less."""
    return ((role, cast) for role, cast in layer.casts.items() if _is_narrow(cast))


def _is_narrow(cast: Cast) -> bool:
    return not keeps(cast) and cast.bits <= 8


def kept_with(plan: Plan) -> str:
    """The one 16-bit format that every operand outside 8 bits is given, or "fp32" where they stay as they are.

    Autocast and its kin take a whole model or nothing: a plan that gives some operands 16 bits and leaves others is
    "fp32" here, and `half_sentences` tells what is not done.
    """
    wide = {
        "fp32" if keeps(cast) else cast.format.name
        for cast in (parse_cast(one.cast) for one in plan.assignments)
        if keeps(cast) or cast.bits > 8
    }
    return wide.pop() if len(wide) == 1 and wide <= {"bf16", "fp16"} else "fp32"


def half_sentences(plan: Plan, how: str) -> list[str]:
    """A sentence where some operands, not all, are given 16 bits, which `how` cannot do."""
    some = [one for one in plan.assignments if 8 < parse_cast(one.cast).bits <= 16]
    if not some or kept_with(plan) != "fp32":
        return []
    named = ", ".join(f"{one.site} {one.role}" for one in some[:3]) + (", …" if len(some) > 3 else "")
    return [f"{len(some)} tensors are given 16 bits while others stay ({named}): {how} takes all or none, so they stay"]


def stored_sentences(plan: Plan, target: str) -> list[str]:
    """Sentences for stored tensors that the target does not keep in the plan's formats."""
    named = sorted({f"{one.role} in {short_cast(parse_cast(one.cast))}" for one in plan.storage})
    return [f"{target} does not keep {name}" for name in named]


def scaling_sentences(plan: Plan, target: str) -> list[str]:
    """A sentence where the plan scales the loss and the target's export does not."""
    scaling = plan.loss_scaling
    if scaling.kind == "none":
        return []
    return [
        f"{target}'s export does not scale the loss: do so by hand ({scaling.kind}, {first_scale(scaling):g} at first)"
    ]
