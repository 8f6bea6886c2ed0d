"""The matrix products behind one call, forward and backward, each as two tensors with lettered dimensions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from probes.contractions.attention import attention_products
from probes.contractions.bilinear import BILINEAR, bilinear_products
from probes.contractions.contraction import Contraction
from probes.contractions.convolution import CONVOLUTIONS, convolution_products
from probes.errors import WindowError
from probes.sites import ProductCall

__all__ = ["contractions"]


def contractions(call: ProductCall, gradient: Tensor | None, generator: np.random.Generator) -> Iterator[Contraction]:
    """The products of a call, one after another, by the names that `Operation.products` has for them.

    gradient   at the call's result; without one, the forward products alone
    generator  chooses the samples or heads that are looked at, where not all are

    Tensors are read where they are, outside the graph. Gradients of operands that ask for none are left out. A product
    without elements or terms is none. Raises WindowError for an operation, or an arrangement of operands, that is not
    followed product by product.
    """
    name, operands = call.operation.name, [operand.detach() for operand in call.operands]
    gradient = None if gradient is None else gradient.detach()
    if any(not tensor.numel() for tensor in (*operands, *(() if gradient is None else (gradient,)))):
        return
    wanted = {f"{role}_grad" for role, operand in zip(call.roles, call.operands, strict=True) if operand.requires_grad}
    if name == "sdpa":
        yield from attention_products(call, operands, gradient, wanted, generator)
    elif name in CONVOLUTIONS:
        yield from convolution_products(call, operands, gradient, wanted, generator)
    elif name in BILINEAR and len(operands) == 2:
        yield from bilinear_products(call, operands, gradient, wanted)
    else:
        raise WindowError(f"{name} of {len(operands)} operands is not followed product by product")
