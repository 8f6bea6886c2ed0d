"""The casts that a diagnosis looks at: those of recipes that people use unseen, or those that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from advisor.castnames import parse_cast
from advisor.errors import CastNotScored
from probes.casts import Cast

FORWARD = ("int8", "e4m3fn")  # one scale a tensor, as torchao's int8 and float8 training have it
GRADIENT_SCALED = ("e4m3fn", "e5m2")
UNSCALED = ("fp16/none", "e5m2/none")  # a cast without loss scaling; the first decides
DELAYED_FORWARD, DELAYED_GRADIENT = "e4m3fn/tensor/delayed", "e5m2/tensor/delayed"  # TransformerEngine's DelayedScaling
MASTER = ("bf16",)
STATE = ("fp16",)
BUFFER = ("fp16", "bf16")  # what model.half() and model.bfloat16() make of BatchNorm's statistics


@dataclass(frozen=True)
class Recipes:
    """Casts by what they are for. `asked`: they were given, so whatever bites under them is severe."""

    forward: tuple[Cast, ...]
    gradient: tuple[Cast, ...]
    unscaled: tuple[Cast, ...]
    delayed_forward: tuple[Cast, ...]
    delayed_gradient: tuple[Cast, ...]
    master: tuple[Cast, ...]
    state: tuple[Cast, ...]
    buffer: tuple[Cast, ...]
    asked: bool

    @classmethod
    def of(cls, casts: Sequence[str | Cast] | None) -> Recipes:
        """The usual ones, or these. Raises UnknownFormat, InvalidCast, CastNotScored."""
        if casts is None:
            return cls(
                forward=_read(FORWARD),
                gradient=_read(GRADIENT_SCALED),
                unscaled=_read(UNSCALED),
                delayed_forward=_read((DELAYED_FORWARD,)),
                delayed_gradient=_read((DELAYED_GRADIENT,)),
                master=_read(MASTER),
                state=_read(STATE),
                buffer=_read(BUFFER),
                asked=False,
            )
        given = [parse_cast(cast) if isinstance(cast, str) else cast for cast in casts]
        for cast in given:
            if not cast.has_one_scale:
                raise CastNotScored(
                    f"{cast} has a scale for every {cast.granularity}: a diagnosis is of casts with one scale a tensor "
                    "or none, and names finer ones where they mend"
                )
        bare = tuple(cast for cast in given if cast.scale is None)
        delayed = tuple(cast for cast in given if cast.scale is not None and cast.scale.rule == "delayed")
        scaled = tuple(cast for cast in given if cast.scale is not None and cast not in delayed)
        return cls(scaled, scaled, bare, delayed, delayed, bare, bare, bare, asked=True)


def _read(names: Sequence[str]) -> tuple[Cast, ...]:
    return tuple(map(parse_cast, names))
