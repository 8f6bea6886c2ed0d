"""Which products a library's 8-bit kernel takes: the ones that training calls, as far as they exist.

For training there are kernels of two dense matrices: torch._scaled_mm (cuBLASLt, hipBLASLt), which torchao's
Float8Linear and TransformerEngine's Linear come to as well, and torch._int_mm. Nothing of theirs takes a batch of
matrices, attention's inner products, convolutions or recurrent layers in 8 bits, forward and backward, with one scale a
tensor. (torch._scaled_grouped_mm wants a scale a row; FlashAttention 3's 8-bit forward has no backward.)
"""

from __future__ import annotations

from functools import lru_cache

from advisor.device import Hardware
from advisor.operands import Operand, is_taken
from advisor.product_shapes import ATTENTION, ProductShape

MULTIPLE = 16
"""torch._scaled_mm: the inner dimension and both of the right operand's are divisible by 16, because cuBLASLt wants
rows that begin at multiples of 16 bytes (aten/src/ATen/native/cuda/Blas.cpp; pytorch/pytorch pull request 108308)."""

_DENSE = frozenset({"linear", "addmm", "mm", "matmul", "scaled_mm", "inner", "tensordot", "einsum"})


def native_refusal(shape: ProductShape, left: Operand, right: Operand, hardware: Hardware) -> str | None:
    """Why no native kernel takes this product in 8 bits, as its operands would have it.

    None where one does, and where an operand is wider than 8 bits, so that nobody asks.
    """
    if left.format is None or right.format is None or max(left.bits, right.bits) > 8:
        return None
    if not hardware.takes(left.format, right.format):
        return f"{hardware.title} multiplies no {left.format} by {right.format}"
    if not is_taken(left, right, hardware):
        return f"no 8-bit kernel of {hardware.title} takes scales by {left.granularity} and by {right.granularity}"
    return refused_op(shape.op, shape.batch > 1, shape.exact) or _refused_sizes(shape)


@lru_cache(maxsize=256)
def refused_op(op: str, batched: bool, exact: bool) -> str | None:
    """Why no 8-bit kernel does this operation, whatever its sizes."""
    if op in ATTENTION:
        return "no 8-bit kernel of attention has a backward pass"
    if op.startswith("conv"):
        return "no 8-bit kernel of a convolution has a backward pass"
    if op.startswith(("lstm", "gru", "rnn")):
        return "recurrent kernels have no 8-bit form"
    if op == "grouped_mm":
        return "the grouped 8-bit kernel wants a scale a row, and none has a backward pass with one a tensor"
    if op not in _DENSE:
        return f"no 8-bit kernel does what {op} does"
    if batched:
        return "8-bit kernels multiply two matrices, not a batch of them"
    return None if exact else "the sizes of this product are not known"


def has_odd_sizes(shape: ProductShape) -> bool:
    """Whether 8-bit kernels refuse the sizes."""
    return bool(shape.k % MULTIPLE or shape.n % MULTIPLE)


def _refused_sizes(shape: ProductShape) -> str | None:
    odd = [f"{what} {size}" for what, size in (("inner size", shape.k), ("columns", shape.n)) if size % MULTIPLE]
    return f"{' and '.join(odd)}: not divisible by {MULTIPLE}" if odd else None
