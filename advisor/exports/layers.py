"""What the narrow casts of a plan mean for one layer: which of its three products run in 8 bits, and in what.

Other libraries think in layers and products, a plan in tensors: a product runs in 8 bits there only if both of its
operands are cast to 8 bits. A cast whose partner stays wide is of no use to them, and is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType

from advisor.castnames import keeps, parse_cast, short_cast
from advisor.plan import Plan, PlannedSite
from probes.casts import Cast
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
    model to say, and for the exported script to ask.
    """
    casts: dict[str, dict[str, Cast]] = {site.site: {} for site in plan.sites}
    for one in plan.assignments:
        casts[one.site][one.role] = parse_cast(one.cast)
    layers, others = [], []
    for site in plan.sites:
        if site.op == "linear" and set(site.roles) >= LINEAR_ROLES and site.parameter is not None:
            layers.append(Layer(site, casts[site.site]))
        else:
            others += [
                f"{site.site} {role}: {short_cast(cast)}; the site is a {site.op}, not a linear layer"
                for role, cast in casts[site.site].items()
                if not keeps(cast) and cast.bits <= 8
            ]
    return layers, others


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
    return ((role, cast) for role, cast in layer.casts.items() if not keeps(cast) and cast.bits <= 8)


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
    return [f"{target}'s export does not scale the loss: do so by hand ({scaling.kind}, {scaling.scale:g} at first)"]
