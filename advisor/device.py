"""A device to plan for, as data: the pairs of formats that it multiplies, how fast, and how much it holds.

The table of those we know is in `devices.py`; anyone can make another, and give it wherever a name is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from advisor.errors import InvalidHardware

Pair = tuple[str, str]

FULL_PRECISION = "fp32"


@dataclass(frozen=True)
class Hardware:
    """A device to plan for.

    pairs              ordered (left, right) formats that its matrix units multiply as they are
    granularities      of `probes.scaling.TILES`: which scales its 8-bit kernels take; two of different granularity only
                       as `takes_scales` says
    memory_bytes       the data sheet's figure, its gigabyte taken as 10^9 bytes
    tflops             dense peak rate by format, in 10^12 operations a second, a multiply-add counted as two. Data
                       sheets print twice that, with 2:4 sparsity. Empty: no time is predicted for this device
    bandwidth_bytes_s  peak of its memory
    launch_s           what starting a kernel adds to its time
    product_start_s    the same of a matrix product
    tile_s             what filling and writing a tile of 128 × 256 results takes beside its arithmetic
    achieved           part of the peak that large products of 16 bits and more reach
    achieved_8bit      the same of 8 bits and less
    achieved_bandwidth part of the bandwidth's peak that casts and products reach
    units              units that work on tiles of a product's result side by side (streaming multiprocessors)
    inner_layout       whether 8-bit operands must both lie along the inner dimension, so that a tensor which enters two
                       products is written twice, the second time transposed
    source             where the pairs and the data sheet's figures are from
    sources            field → where its figure is from, for those that no data sheet has
    """

    name: str
    title: str
    pairs: frozenset[Pair]
    memory_bytes: int
    source: str
    note: str = ""
    tflops: Mapping[str, float] = field(default_factory=dict)
    bandwidth_bytes_s: float = 0.0
    launch_s: float = 0.0
    product_start_s: float = 0.0
    tile_s: float = 0.0
    granularities: frozenset[str] = frozenset({"tensor"})
    achieved: float = 1.0
    achieved_8bit: float = 1.0
    achieved_bandwidth: float = 1.0
    units: int = 1
    inner_layout: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", frozenset(self.pairs))
        object.__setattr__(self, "granularities", frozenset(self.granularities))
        object.__setattr__(self, "tflops", dict(self.tflops))
        object.__setattr__(self, "sources", dict(self.sources))
        self._refuse_impossible()

    def __hash__(self) -> int:
        return hash(self.name)

    def takes(self, left: str, right: str) -> bool:
        """Whether the matrix units multiply these two formats as they are."""
        return (left, right) in self.pairs

    def takes_scales(self, left: str, right: str) -> bool:
        """Whether its 8-bit kernels multiply operands with scales of these granularities.

        One scale a tensor stands for the same one in every row; 128 × 128 blocks (of the weight) go with blocks of 1 ×
        128; otherwise both are alike.
        """
        if not {left, right} <= self.granularities:
            return False
        together = {left, right}
        if left == right:
            return left != "block128x128"
        return together in ({"tensor", "row"}, {"block1x128", "block128x128"})

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats that occur in a pair, sorted."""
        return tuple(sorted({name for pair in self.pairs for name in pair}))

    @property
    def has_rates(self) -> bool:
        """Whether times can be predicted for it."""
        return bool(self.tflops)

    def rate_flops_s(self, format_name: str, bits: int) -> float:
        """Operations a second that a large product of this format reaches; of one that is not listed, fp32's."""
        peak = self.tflops.get(format_name, self.tflops.get(FULL_PRECISION, 0.0))
        return peak * 1e12 * (self.achieved_8bit if bits <= 8 else self.achieved)

    @property
    def traffic_bytes_s(self) -> float:
        """Bytes a second that a kernel reads and writes when nothing else holds it up."""
        return self.bandwidth_bytes_s * self.achieved_bandwidth

    def _refuse_impossible(self) -> None:
        if not self.tflops:
            return
        missing = {name for pair in self.pairs for name in pair} - set(self.tflops)
        if FULL_PRECISION not in self.tflops or missing:
            lacking = ", ".join(sorted(missing | {FULL_PRECISION} - set(self.tflops)))
            raise InvalidHardware(f"hardware {self.name!r}: tflops lacks {lacking}; give a rate for every format")
        for name, value in self.tflops.items():
            if not 0 < value < float("inf"):
                raise InvalidHardware(f"hardware {self.name!r}: tflops of {name} is {value!r}; it must be above 0")
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name.startswith("achieved") and not 0 < value <= 1:
                raise InvalidHardware(f"hardware {self.name!r}: {one.name} is {value!r}; it must be in (0, 1]")
        times = (self.launch_s, self.product_start_s, self.tile_s)
        if not (
            0 < self.bandwidth_bytes_s < float("inf")
            and self.units >= 1
            and all(0 <= time < float("inf") for time in times)
        ):
            raise InvalidHardware(
                f"hardware {self.name!r}: a bandwidth above 0, at least 1 unit and times of 0 or more are needed, got "
                f"{self.bandwidth_bytes_s!r}, {self.units!r} and {times!r}"
            )
