"""Which pairs of formats the matrix units of a device multiply, through the libraries that training calls.

A pair is what decides whether a product runs in 8 bits: two narrow operands that no kernel takes together are
widened first, and nothing is gained. The table holds ordered pairs (left operand, right operand), both orders
written out, of formats with one scale a tensor: products of 4 and 6 bits and of blocks with scales of their own (MX,
NVFP4) are absent, also where the hardware has them. A name is a format exactly: an MI300X multiplies e4m3fnuz, another
format than e4m3fn.

Peak rates and bandwidths are absent: no speed is predicted from this table.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from advisor.errors import UnknownHardware

Pair = tuple[str, str]


@dataclass(frozen=True)
class Hardware:
    """A device to plan for. `memory_bytes` is the data sheet's figure, its gigabyte taken as 10^9 bytes."""

    name: str
    title: str
    pairs: frozenset[Pair]
    memory_bytes: int
    source: str
    note: str = ""

    def takes(self, left: str, right: str) -> bool:
        """Whether the matrix units multiply these two formats as they are."""
        return (left, right) in self.pairs

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats that occur in a pair, sorted."""
        return tuple(sorted({name for pair in self.pairs for name in pair}))


# Like formats: what the matrix units of Ampere and everything after it multiply (fp32 as tf32 or on the
# vector units). NVIDIA A100 Tensor Core GPU Architecture white paper, "A100 Tensor Cores"; int8 with int32
# sums.
_LIKE: frozenset[Pair] = frozenset({("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"), ("int8", "int8")})

# cuBLAS documentation, cublasLtMatmul(), data types of FP8 kernels (compute capability 8.9 and above): A×B is
# E4M3×E4M3, E4M3×E5M2 or E5M2×E4M3. E5M2×E5M2 is not in that list, and PyTorch's _scaled_mm refuses it for
# this reason (pytorch/pytorch issue 132005).
_FP8: frozenset[Pair] = frozenset({("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2"), ("e5m2", "e4m3fn")})

# hipBLASLt: A and B may each be fp8 or bf8 (README, table of data types), and on gfx942 these are the FNUZ variants
# alone ("Data type support"). PyTorch's _scaled_mm lets two e5m2 operands pass on ROCm (pytorch/pytorch pull request
# 148228).
_FP8_FNUZ: frozenset[Pair] = frozenset(
    (left, right) for left in ("e4m3fnuz", "e5m2fnuz") for right in ("e4m3fnuz", "e5m2fnuz")
)

_GB = 10**9

_ROWS = (
    Hardware(
        name="a100",
        title="NVIDIA A100 SXM 80 GB",
        pairs=_LIKE,  # Ampere, compute capability 8.0: no FP8 kernels
        memory_bytes=80 * _GB,
        source="NVIDIA A100 Tensor Core GPU data sheet; A100 Tensor Core GPU Architecture white paper",
        note="no 8-bit floating point; int8 is its only 8-bit format",
    ),
    Hardware(
        name="b200",
        title="NVIDIA B200",
        # tcgen05.mma kinds f16, i8 and f8f6f4: CUTLASS documentation, "Blackwell SM100 GEMMs". The
        # instruction takes E5M2×E5M2; the library that training calls does not, so the pair is left out here
        # too.
        pairs=_LIKE | _FP8,
        memory_bytes=180 * _GB,  # DGX B200 data sheet: 1,440 GB over 8 GPUs
        source="NVIDIA DGX B200 data sheet; CUTLASS documentation, Blackwell SM100 GEMMs; cuBLAS",
    ),
    Hardware(
        name="h100",
        title="NVIDIA H100 SXM 80 GB",
        pairs=_LIKE | _FP8,  # Hopper, compute capability 9.0
        memory_bytes=80 * _GB,
        source="NVIDIA H100 Tensor Core GPU data sheet; cuBLAS documentation, cublasLtMatmul",
    ),
    Hardware(
        name="h200",
        title="NVIDIA H200 SXM 141 GB",
        pairs=_LIKE | _FP8,  # Hopper, compute capability 9.0
        memory_bytes=141 * _GB,
        source="NVIDIA H200 Tensor Core GPU data sheet; cuBLAS documentation, cublasLtMatmul",
    ),
    Hardware(
        name="l40s",
        title="NVIDIA L40S",
        pairs=_LIKE | _FP8,  # Ada, compute capability 8.9
        memory_bytes=48 * _GB,
        source="NVIDIA L40S data sheet; cuBLAS documentation, cublasLtMatmul",
    ),
    Hardware(
        name="mi300x",
        title="AMD Instinct MI300X",
        pairs=_LIKE | _FP8_FNUZ,  # CDNA 3, gfx942
        memory_bytes=192 * _GB,
        source="AMD Instinct MI300X data sheet; hipBLASLt README and documentation, Data type support",
        note="its 8-bit floats are e4m3fnuz and e5m2fnuz, which are candidates only where they are named; e4m3fn and "
        "e5m2 are not multiplied",
    ),
    Hardware(
        name="rtx4090",
        title="NVIDIA GeForce RTX 4090",
        pairs=_LIKE | _FP8,  # Ada, compute capability 8.9
        memory_bytes=24 * _GB,
        source="NVIDIA Ada GPU Architecture white paper; cuBLAS documentation, cublasLtMatmul",
    ),
)

HARDWARE: Mapping[str, Hardware] = MappingProxyType({row.name: row for row in _ROWS})


def hardware_named(name: str) -> Hardware:
    """The row of that name. Raises UnknownHardware, with near matches and the whole list."""
    if name in HARDWARE:
        return HARDWARE[name]
    near = difflib.get_close_matches(str(name).lower(), HARDWARE, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UnknownHardware(f"unknown hardware {name!r}: {hint}Known: {', '.join(HARDWARE)}.")
