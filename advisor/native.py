"""Which products a library's 8-bit kernel takes: the ones that training calls, as far as they exist.

For training there are kernels of two dense matrices: torch._scaled_mm (cuBLASLt, hipBLASLt), which torchao's
Float8Linear and TransformerEngine's Linear come to as well, and torch._int_mm. Nothing of theirs takes a batch of
matrices, attention's inner products, convolutions or recurrent layers in 8 bits, forward and backward, with one scale a
tensor. (torch._scaled_grouped_mm wants a scale a row; FlashAttention 3's 8-bit forward has no backward.)
"""

from __future__ import annotations

from advisor.device import Hardware
from advisor.operands import Operand
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
    return _refused_op(shape) or _refused_sizes(shape)


def _refused_op(shape: ProductShape) -> str | None:
    if shape.op in ATTENTION:
        return "no 8-bit kernel of attention has a backward pass"
    if shape.op.startswith("conv"):
        return "no 8-bit kernel of a convolution has a backward pass"
    if shape.op.startswith(("lstm", "gru", "rnn")):
        return "recurrent kernels have no 8-bit form"
    if shape.op == "grouped_mm":
        return "the grouped 8-bit kernel wants a scale a row"
    if shape.op not in _DENSE:
        return f"no 8-bit kernel does what {shape.op} does"
    if shape.batch > 1:
        return "8-bit kernels multiply two matrices, not a batch of them"
    if not shape.exact:
        return "the sizes of this product are not known"
    return None


def _refused_sizes(shape: ProductShape) -> str | None:
    odd = [f"{what} {size}" for what, size in (("inner size", shape.k), ("columns", shape.n)) if size % MULTIPLE]
    return f"{' and '.join(odd)}: not divisible by {MULTIPLE}" if odd else None
