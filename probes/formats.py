"""Number formats as data: what an element of a tensor can be written as.

A value of every format here is an integer multiple of a power of two. With p = floor(log2|x|), the grid
around x has the spacing 2^(max(p, emin) - mantissa_bits): constant within an octave, and constant below the
smallest normal number. An integer format fits the same description as a format without an exponent field: one
octave of subnormals, which for int8 are the multiples of 1 up to 127. One rule rounds to all of them.

No torch here: the command line prints this table.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from types import MappingProxyType

from probes.errors import UnknownFormat


class NonFinite(Enum):
    """What a format has beyond its finite values, and so what an overflow can become."""

    INF_AND_NAN = "Inf and NaN"  # IEEE 754: the top exponent code is theirs
    NAN = "NaN"  # the one code of all ones; the rest of the top exponent holds finite values (OCP FP8, 2023)
    NONE = "none"


@dataclass(frozen=True)
class Format:
    """An element number format: a sign bit, an exponent field and a mantissa field.

    The value of a finite code with exponent field E and mantissa field M is M·2^(emin - mantissa_bits) for E
    = 0 and (1 + M/2^mantissa_bits)·2^(E - bias) otherwise.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    nonfinite: NonFinite

    @property
    def bits(self) -> int:
        """Width of a code, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def is_integer(self) -> bool:
        """Whether the values lie on one even grid. Symmetric: two's complement's -128 is not used."""
        return self.exponent_bits == 0

    @cached_property
    def emin(self) -> int:
        """Exponent of the smallest normal number; for an integer format, where its one octave would end."""
        return 1 - self.bias

    @cached_property
    def emax(self) -> int:
        """Exponent of the largest value."""
        if self.is_integer:
            return self.emin - 1
        reserved = 1 if self.nonfinite is NonFinite.INF_AND_NAN else 0
        return 2**self.exponent_bits - 1 - reserved - self.bias

    @cached_property
    def largest(self) -> float:
        """Largest finite value."""
        last_mantissa_is_nan = self.nonfinite is NonFinite.NAN
        return 2.0 ** (self.emax + 1) - self.largest_spacing * (2 if last_mantissa_is_nan else 1)

    @cached_property
    def largest_spacing(self) -> float:
        """Distance between the two largest values that the grid has up to 2^(emax + 1)."""
        return 2.0 ** (max(self.emax, self.emin) - self.mantissa_bits)

    @cached_property
    def smallest_subnormal(self) -> float:
        """Smallest non-zero magnitude, and the spacing of the grid below the smallest normal number."""
        return 2.0 ** (self.emin - self.mantissa_bits)

    @cached_property
    def smallest_normal(self) -> float:
        """Smallest magnitude held with full precision; for an integer format, its step."""
        return self.smallest_subnormal if self.is_integer else 2.0**self.emin

    @property
    def epsilon(self) -> float:
        """Distance from 1 to the next larger value."""
        return 2.0 ** (max(0, self.emin) - self.mantissa_bits)

    @property
    def overflow(self) -> float | None:
        """What a magnitude beyond the largest becomes unless saturated; None if there is nothing."""
        return {NonFinite.INF_AND_NAN: float("inf"), NonFinite.NAN: float("nan"), NonFinite.NONE: None}[self.nonfinite]

    def __str__(self) -> str:
        return self.name


_TABLE = (
    #      name    exponent mantissa bias
    Format("fp32", 8, 23, 127, NonFinite.INF_AND_NAN),
    Format("fp16", 5, 10, 15, NonFinite.INF_AND_NAN),
    Format("bf16", 8, 7, 127, NonFinite.INF_AND_NAN),
    Format("e4m3fn", 4, 3, 7, NonFinite.NAN),
    Format("e5m2", 5, 2, 15, NonFinite.INF_AND_NAN),
    Format("int8", 0, 7, -6, NonFinite.NONE),  # the bias that makes the step 1
)

FORMATS: Mapping[str, Format] = MappingProxyType({entry.name: entry for entry in _TABLE})


def format_named(name: str) -> Format:
    """The format of this name. Raises UnknownFormat, with the names that are near and all that there are."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(str(name).lower(), FORMATS, n=2, cutoff=0.5)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UnknownFormat(f"no format is called {name!r}{meant} (there are {', '.join(FORMATS)})")
