"""Number formats as data: what an element of a tensor can be written as.

A value of every format here is an integer multiple of a power of two. With p = floor(log2|x|), the grid
around x has the spacing 2^(max(p, emin) - mantissa_bits): constant within an octave, and constant below the
smallest normal number. An integer format fits the same description as a format without an exponent field: one
octave of subnormals, which for int8 are the multiples of 1 up to 127. One rule rounds to all of them.

`format_named` in `format_names.py` finds a format by the names of torch, ml_dtypes, TransformerEngine and ONNX,
and makes any other eXmY.

No torch here: the command line prints this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from math import inf, ldexp, nan
from types import MappingProxyType


class NonFinite(Enum):
    """What a format has beyond its finite values, and so what an overflow can become."""

    INF_AND_NAN = "Inf and NaN"  # IEEE 754: the top exponent field is theirs
    INF = "Inf"  # the same without a mantissa field, where the top exponent field is a single code
    NAN = "NaN"  # the one code of all ones; the rest of the top exponent holds finite values (OCP FP8, 2023)
    NAN_FOR_NEGATIVE_ZERO = "NaN in place of -0"  # "fnuz": every exponent field holds finite values
    NONE = "neither Inf nor NaN"


@dataclass(frozen=True, repr=False)
class Format:
    """An element number format: a sign bit, an exponent field and a mantissa field.

    The value of a finite code with exponent field E and mantissa field M is M·2^(emin - mantissa_bits) for E
    = 0 and (1 + M/2^mantissa_bits)·2^(E - bias) otherwise.

    signed        e8m0 alone has no sign, and then no zero either: its E = 0 is 2^-bias
    symmetric     whether an integer format leaves two's complement's lowest code unused, as int8 does here
    memory_bits   what an element takes up in memory where that is more than its code; 0 for as much
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    nonfinite: NonFinite
    signed: bool = True
    symmetric: bool = True
    memory_bits: int = 0

    @cached_property
    def bits(self) -> int:
        """Width of a code, the sign included."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @cached_property
    def stored_bits(self) -> int:
        """Width of an element in memory: tf32's 19 bits take 32."""
        return max(self.bits, self.memory_bits)

    @property
    def code_points(self) -> int:
        """Number of codes."""
        return 1 << self.bits

    @property
    def is_integer(self) -> bool:
        """Whether the values lie on one even grid."""
        return self.exponent_bits == 0

    @property
    def keeps_negative_zero(self) -> bool:
        """Whether -0 stays -0. In the fnuz formats its code is NaN's. Integers have one zero, but in a tensor that is
        cast and back its sign is kept all the same: it disturbs nothing, and 1/x keeps its own."""
        return self.nonfinite is not NonFinite.NAN_FOR_NEGATIVE_ZERO

    @property
    def has_subnormals(self) -> bool:
        """Whether there are non-zero values below the smallest normal number."""
        return self.smallest_subnormal < self.smallest_normal

    @cached_property
    def emin(self) -> int:
        """Exponent of the smallest normal number; for an integer format, where its one octave would end."""
        return 1 - self.bias if self.signed else -self.bias

    @cached_property
    def emax(self) -> int:
        """Exponent of the largest value."""
        if self.is_integer:
            return self.emin - 1
        top_is_finite = self.nonfinite in (NonFinite.NONE, NonFinite.NAN_FOR_NEGATIVE_ZERO) or (
            self.nonfinite is NonFinite.NAN and self.mantissa_bits > 0
        )
        return 2**self.exponent_bits - (1 if top_is_finite else 2) - self.bias

    @cached_property
    def largest(self) -> float:
        """Largest finite value."""
        last_mantissa_is_nan = self.nonfinite is NonFinite.NAN and self.mantissa_bits > 0
        spacings = 2 ** (self.emax + 1 - self._largest_spacing_exponent)
        return ldexp(spacings - (2 if last_mantissa_is_nan else 1), self._largest_spacing_exponent)

    @property
    def lowest(self) -> float:
        """Most negative finite value; without a sign, the smallest one."""
        if not self.signed:
            return self.smallest_subnormal
        return -self.largest - (0 if self.symmetric else self.largest_spacing)

    @property
    def largest_magnitude(self) -> float:
        """Largest magnitude of either sign: 8 for int4."""
        return max(self.largest, -self.lowest)

    @cached_property
    def largest_spacing(self) -> float:
        """Distance between the two largest values that the grid has up to 2^(emax + 1)."""
        return ldexp(1.0, self._largest_spacing_exponent)

    @cached_property
    def smallest_subnormal(self) -> float:
        """Smallest non-zero magnitude, and the spacing of the grid below the smallest normal number."""
        return ldexp(1.0, self.emin - self.mantissa_bits)

    @cached_property
    def smallest_normal(self) -> float:
        """Smallest magnitude held with full precision; for an integer format, its step."""
        return self.smallest_subnormal if self.is_integer else ldexp(1.0, self.emin)

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger value."""
        return ldexp(1.0, max(0, self.emin) - self.mantissa_bits)

    @property
    def overflow(self) -> float | None:
        """What a magnitude beyond the largest becomes unless saturated; None if there is nothing."""
        if self.nonfinite in (NonFinite.INF_AND_NAN, NonFinite.INF):
            return inf
        return None if self.nonfinite is NonFinite.NONE else nan

    @property
    def _largest_spacing_exponent(self) -> int:
        return max(self.emax, self.emin) - self.mantissa_bits

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        if self.is_integer:
            return f"Format({self.name}: {self.bits} bits, {self.lowest:.0f} to {self.largest:.0f})"
        sign = "" if self.signed else "no sign, no zero, "
        return (
            f"Format({self.name}: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits, {sign}"
            f"bias {self.bias}, smallest 2^{self.emin - self.mantissa_bits}, largest {self.largest:.6g}, "
            f"{self.nonfinite.value})"
        )


def ieee_like(exponent_bits: int, mantissa_bits: int, name: str = "") -> Format:
    """The format laid out as IEEE 754 lays out its own: bias 2^(X-1) - 1, the top exponent field for Inf and NaN."""
    return Format(
        name or f"e{exponent_bits}m{mantissa_bits}",
        exponent_bits,
        mantissa_bits,
        bias=2 ** (exponent_bits - 1) - 1,
        nonfinite=NonFinite.INF_AND_NAN if mantissa_bits else NonFinite.INF,
    )


_TABLE = (
    ieee_like(11, 52, "fp64"),
    ieee_like(8, 23, "fp32"),
    Format("tf32", 8, 10, 127, NonFinite.INF_AND_NAN, memory_bits=32),  # NVIDIA A100 architecture white paper
    ieee_like(8, 7, "bf16"),
    ieee_like(5, 10, "fp16"),
    #      name       exponent mantissa bias
    Format("e4m3fn", 4, 3, 7, NonFinite.NAN),  # OCP 8-bit Floating Point Specification 1.0, table 1
    ieee_like(4, 3),
    Format("e4m3fnuz", 4, 3, 8, NonFinite.NAN_FOR_NEGATIVE_ZERO),  # Noune et al. 2022, "8-bit numerical formats"
    ieee_like(5, 2),  # OCP FP8 1.0, table 1
    Format("e5m2fnuz", 5, 2, 16, NonFinite.NAN_FOR_NEGATIVE_ZERO),
    ieee_like(3, 4),
    Format("e8m0", 8, 0, 127, NonFinite.NAN, signed=False),  # OCP Microscaling 1.0, section 5.4.1: a scale's format
    Format("e3m2", 3, 2, 3, NonFinite.NONE),  # OCP Microscaling Formats (MX) 1.0, section 5.3.2
    Format("e2m3", 2, 3, 1, NonFinite.NONE),
    Format("e2m1", 2, 1, 1, NonFinite.NONE),  # section 5.3.3
    Format("int8", 0, 7, -6, NonFinite.NONE),  # the bias that makes the step 1
    Format("int4", 0, 3, -2, NonFinite.NONE, symmetric=False),
)

FORMATS: Mapping[str, Format] = MappingProxyType({entry.name: entry for entry in _TABLE})
