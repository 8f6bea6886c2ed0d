"""Casts: format, scaling and rounding, all that is needed to write a tensor down.

A cast is called with a tensor and gives back what would be read after writing it: each value divided by its
scale, rounded to the format's grid, limited, and multiplied by the scale again. Calculation is in float32, as
on hardware that casts float32 accumulators; float64 tensors are calculated in float64, so that they are
rounded once; float16 and bfloat16 are widened first and the result is rounded to their dtype at the end. How
scales are found is in `scaling.py`, how values are rounded in `rounding.py`: those two are the specification,
written to be read, and they are what runs in float64 and wherever there is no compiled kernel.

What the unusual becomes:

    NaN       NaN, also for int8, which has none: in an emulation a divergence must stay visible
    -0        -0; +0 in fnuz formats, which have no other
    ±Inf      the format's largest value times the scale; with `:inf`, Inf or NaN as the format has it
    nothing finite but zeros    scale 1, so that an Inf becomes the format's largest value
    a very small amax           a float32 scale is never below 2^-126, where float32 loses precision; tensors that are
                                far below the format's largest value times that are flushed to zero
    no elements                 no elements
    a ragged last block         a smaller block with a scale of its own
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from probes import casting, rounding, scaling
from probes.casting import Circumstances
from probes.errors import InvalidCast, UnsupportedTensor
from probes.format_names import format_named
from probes.formats import Format
from probes.gradients import StraightThrough, outside_graphs
from probes.near import refuse
from probes.rounding import ROUNDINGS
from probes.scaling import FLOAT32_LARGEST, NVFP4_LARGEST, RULES, Scale

_TO_INF = ":inf"
_COUNTING = Lock()  # autograd's threads and the user's may share a state, the process's own at least


@dataclass
class CastState:
    """What a cast carries from call to call: its place in a stream of random numbers, and recent largest magnitudes.

    The same seed and the same calls give the same values, on every device; torch's generators are never used. So two
    tensors want two seeds: states that are alike round them alike.

    history  the largest finite magnitude of each of the latest calls of a delayed cast, the newest last: floats from
             the CPU, 0-dim tensors from elsewhere, which are not waited for
    """

    seed: int = 0
    calls: int = 0
    history: deque[float | Tensor] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not isinstance(self.calls, int):
            raise TypeError(f"a seed and a number of calls are integers, got {self.seed!r} and {self.calls!r}")

    def next_stream(self) -> int:
        """64 bits that name the stream of the next call."""
        with _COUNTING:
            self.calls += 1
            calls = self.calls
        return _splitmix64(_splitmix64(self.seed) + calls)

    def remember(self, amax: float | Tensor, length: int) -> None:
        """Add a call's largest magnitude, and forget what is more than `length` calls ago."""
        self.history.append(amax)
        while len(self.history) > length:
            self.history.popleft()


@dataclass(frozen=True)
class Cast:
    """A format, a scaling and a rounding; a value, compared and hashed by its parts.

    granularity  which elements share a scale: none, tensor, row, column, block32, block16, block1x128, block128x128
    scale        how it is found; None without scaling
    rounding     "nearest" (ties to even), "stochastic" (up or down at random, unbiased) or "zero" (toward zero)
    saturate     whether what lies beyond the format's largest value becomes that value, or Inf or NaN

    Raises InvalidCast for a combination that means nothing.
    """

    format: Format
    granularity: str = "none"
    scale: Scale | None = None
    rounding: str = "nearest"
    saturate: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format) or not isinstance(self.scale, Scale | None):
            raise InvalidCast(f"a cast is made of a Format and a Scale, not of {self.format!r} and {self.scale!r}")
        if self.format != format_named(self.format.name):
            raise InvalidCast(f"{self.format!r} is not what {self.format.name!r} names: its text would not read back")
        if self.granularity not in RULES:
            refuse("granularity", self.granularity, tuple(RULES))
        rules = RULES[self.granularity]
        if self.scale is None and rules:
            raise InvalidCast(f"granularity {self.granularity!r} needs a scale: {' or '.join(rules)}")
        if self.scale is not None and self.scale.rule not in rules:
            refuse(f"scale at granularity {self.granularity!r}", self.scale.rule, rules)
        if self.scale is not None and self.scale.rule == "nvfp4" and self.format.largest > NVFP4_LARGEST:
            raise InvalidCast(f"nvfp4 scales are for narrow formats: {self.format} goes beyond {NVFP4_LARGEST:.3g}")
        if self.rounding not in ROUNDINGS:
            refuse("rounding", self.rounding, ROUNDINGS)
        if not self.saturate and self.format.overflow is None:
            raise InvalidCast(f"{self.format} has neither Inf nor NaN to overflow to; leave {_TO_INF!r} away")

    @classmethod
    def parse(cls, text: str) -> Cast:
        """A cast from `format/granularity/scale/rounding`, with `:inf` at the end for overflow to Inf or NaN.

        Without granularity `none` there is a scale, with it there is not. Trailing parts may be left out:
        formats of 8 bits or less default to `tensor/current/nearest`, others to `none/nearest`; a granularity's
        default scale is the first of `scaling.RULES`. Raises InvalidCast or UnknownFormat.
        """
        if not isinstance(text, str):
            raise InvalidCast(f"a cast is written as text like 'e4m3fn/tensor/current/nearest', got {text!r}")
        name, *rest = text.removesuffix(_TO_INF).split("/")
        target = format_named(name)
        granularity = rest.pop(0) if rest else "tensor" if target.bits <= 8 else "none"
        try:
            scale = None
            if granularity in ROUNDINGS:
                raise InvalidCast(f"{granularity!r} is a rounding, which comes last: {name}/none/{granularity}")
            if RULES.get(granularity):
                default = RULES[granularity][0]
                scale = Scale.parse(_rule_of(rest.pop(0), granularity) if rest else default)
            chosen = rest.pop(0) if rest else ROUNDINGS[0]
            cast = cls(target, granularity, scale, chosen, saturate=not text.endswith(_TO_INF))
        except InvalidCast as error:
            raise InvalidCast(f"cast {text!r}: {error}") from error
        if rest:
            raise InvalidCast(f"cast {text!r}: nothing follows the rounding, got {'/'.join(rest)!r}")
        return cast

    def __str__(self) -> str:
        parts = (self.format.name, self.granularity, self.scale, self.rounding)
        return "/".join(str(part) for part in parts if part is not None) + ("" if self.saturate else _TO_INF)

    @property
    def bits(self) -> int:
        """Width of an element, without its share of scales."""
        return self.format.bits

    def scale_for(self, amax: float, history: Sequence[float] = ()) -> float:
        """The factor from a written value to the value itself, for a tensor of this largest finite magnitude.

        The same arithmetic as a call's. 1 without scaling, for amax 0, and for fp32, which holds every magnitude.

        history  for delayed scaling: the largest magnitudes of the calls before

        Raises InvalidCast for scales by row, column or block, which a tensor has many of.
        """
        if not self.has_one_scale:
            raise InvalidCast(f"{self} has a scale for every {self.granularity}, so the whole tensor has no one scale")
        if self.needs_no_scale:
            return 1.0
        recent = self._recent(history)
        if amax <= FLOAT32_LARGEST and np.float32(amax) == amax:
            return casting.whole_scale_of_float32(self, amax, recent)
        return float(casting.whole_scale(self, torch.tensor(max(amax, 0.0), dtype=torch.float64), recent))

    def __call__(self, x: Tensor, state: CastState | None = None, dimension: int = -1) -> Tensor:
        """What is read back after writing x: a new tensor of its shape and dtype.

        x          float16, bfloat16, float32 or float64; any shape, any strides, empty too
        state      the place in the random stream for stochastic rounding, and delayed scaling's history; without one,
                   a stream of the process's own that goes on from call to call, and no history
        dimension  the one that rows and blocks of scales run along

        The gradient passes unchanged (see `straight_through` for more). torch.compile makes no graph of a cast, but
        breaks its own in two. A value that x's own dtype cannot hold
        (fp16's largest, rounded up to bf16) becomes that dtype's largest under saturation. Raises UnsupportedTensor
        for any other dtype and for sparse layouts, and IndexError for a dimension that x has not.
        """
        if torch.compiler.is_compiling():
            return outside_graphs(self._call)(x, state, dimension)
        return self._call(x, state, dimension)

    def _call(self, x: Tensor, state: CastState | None, dimension: int) -> Tensor:
        if not isinstance(x, Tensor):
            raise UnsupportedTensor(f"a cast takes a torch.Tensor, not {type(x).__name__}")
        if x.requires_grad and torch.is_grad_enabled():
            through: Tensor = StraightThrough.apply(x, lambda value: self._cast(value, state, dimension), _unchanged)
            return through
        return self._cast(x, state, dimension)

    def saturates(self, x: Tensor, state: CastState | None = None, dimension: int = -1) -> Tensor:
        """Bool, of x's shape: whether each element rounds beyond the format's largest value, Inf included.

        As the next call with this state would round them; the state is left as it is. NaN is False.
        """
        wide, dimension = casting.widened(x), self._dimension_of(x, dimension)
        if x.numel() == 0:
            return torch.zeros_like(x, dtype=torch.bool)
        with torch.no_grad():
            matrix, target = scaling.as_matrix(wide, dimension), casting.target_in(wide.dtype, self.format)
            now = _PROCESS_STATE if state is None else state
            scale, _ = casting.matrix_scales(self, matrix, self._recent(() if state is None else state.history))
            draws = casting.draws_for(self, matrix, CastState(now.seed, now.calls).next_stream())
            rounded = rounding.on_grid(matrix / scale, target, self.rounding, draws)
            beyond = rounded > target.largest
            if target.signed:
                beyond |= rounded < target.lowest
            return scaling.as_shaped(beyond, x, dimension)

    @property
    def has_one_scale(self) -> bool:
        """Whether one number scales a whole tensor (1 without scaling), so that its largest magnitude tells all."""
        return self.granularity in ("none", "tensor")

    @property
    def needs_no_scale(self) -> bool:
        """Whether all scales are 1: without scaling, and for a format that holds every float32."""
        return self.scale is None or self.format.largest >= FLOAT32_LARGEST

    @property
    def is_random(self) -> bool:
        """Whether a call draws random numbers."""
        return self.rounding == "stochastic"

    @property
    def is_static(self) -> bool:
        """Whether the scale is given in advance."""
        return self.scale is not None and self.scale.rule == "static"

    @property
    def is_delayed(self) -> bool:
        """Whether the scale comes from the calls before."""
        return self.scale is not None and self.scale.rule == "delayed"

    def _cast(self, x: Tensor, state: CastState | None, dimension: int) -> Tensor:
        dimension = self._dimension_of(x, dimension)
        if x.numel() == 0:
            return casting.widened(x).to(x.dtype, copy=True)
        stream = (_PROCESS_STATE if state is None else state).next_stream() if self.is_random else 0
        history = self._recent(() if state is None else state.history)
        values, amax = casting.carry_out(self, x, Circumstances(history, stream, dimension))
        if self.is_delayed and state is not None:
            assert self.scale is not None
            assert amax is not None
            state.remember(amax, self.scale.length)
        return values

    def _recent(self, history: Iterable[float | Tensor]) -> tuple[float | Tensor, ...]:
        """As much of a history as the scale looks back on."""
        return tuple(history)[-self.scale.length :] if self.scale is not None and self.is_delayed else ()

    def _dimension_of(self, x: Tensor, dimension: int) -> int:
        """-1 where it does not matter, so that random draws are those of the tensor's own order."""
        if not -max(x.dim(), 1) <= dimension < max(x.dim(), 1):
            raise IndexError(f"dimension {dimension} is none of a tensor of shape {list(x.shape)}")
        return -1 if self.has_one_scale else dimension


_PROCESS_STATE = CastState()


def _unchanged(gradient: Tensor) -> Tensor:
    return gradient


def _splitmix64(value: int) -> int:
    """A 64-bit mix (Steele, Lea and Flood 2014): neighbouring seeds and calls get unrelated streams."""
    mask = 2**64 - 1
    z = (value + 0x9E3779B97F4A7C15) & mask
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
    return z ^ (z >> 31)


def _rule_of(text: str, granularity: str) -> str:
    """The text of a scale, refused with the granularity's own rules if it names none."""
    rule = re.split(r"[(=:]", text, maxsplit=1)[0]
    if rule in ROUNDINGS:
        choice = " or ".join(RULES[granularity])
        raise InvalidCast(f"{rule!r} is a rounding; before it comes the scale of a {granularity}: {choice}")
    if rule not in RULES[granularity]:
        refuse(f"scale at granularity {granularity!r}", rule, RULES[granularity])
    return text
