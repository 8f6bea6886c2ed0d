"""The torch functions that multiply matrices, one row each.

A row names the positions of the operands, so that roles are explicit; everything else that the hook needs (FLOPs, the
backward products) follows from the operation's kind. What is not in the table is not a site; `coverage.py` counts what
passes beneath it. Not in it on purpose: products of two vectors (`dot`, `outer`, `ger`, `addr`, `vecdot`, `kron`, and
`matmul`, `inner` or `einsum` where they come to that), which no matrix unit runs and torch counts as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import Any

import torch
import torch.nn.functional as F

from probes.attention import Attention, FlexAttention
from probes.chains import Bilinear, Chain, Einsum
from probes.convolutions import Convolution
from probes.grouped import Distances, Grouped, Scaled
from probes.operation import Operation
from probes.recurrent import Cell, Recurrent

__all__ = ["COMPILED", "OPERATIONS", "Operation", "operation_of"]

_LAYER = (((0, "input"), (1, "weight")), ("input", "weight"))
_ADDED = {"addmm": ("mat1", "mat2"), "addmv": ("mat", "vec")} | dict.fromkeys(
    ("baddbmm", "addbmm"), ("batch1", "batch2")
)
_PAIRS = {"matmul": "other", "mm": "mat2", "bmm": "mat2", "mv": "vec", "inner": "other"}
_CONVOLUTIONS = [f"conv{sort}{n}d" for n in (1, 2, 3) for sort in ("", "_transpose")]
_SDPA = (((0, "query"), (1, "key"), (2, "value")), ("query", "key", "value"))
_DROPOUT = {"flash_attention": 3, "flash_attention_for_cpu": 3, "efficient_attention": 5, "cudnn_attention": 5}


def operation_of(function: Callable[..., Any]) -> Operation | None:
    """The row of a torch function, one of its operators or one of another library's; None for any other function."""
    found = OPERATIONS.get(function)
    if found is not None or torch.compiler.is_compiling() or type(function) in _FUNCTIONS:
        return found
    if not isinstance(function, _OPERATORS):
        return None
    if isinstance(function, torch._ops.OpOverload):
        function = function.overloadpacket
    if isinstance(function, torch._ops.OpOverloadPacket):
        return _BY_NAME.get(function._qualified_op_name)
    assert isinstance(function, torch._ops.HigherOrderOperator), "the third kind of operator"
    return _BY_NAME.get(function.name())


COMPILED = frozenset({BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType})
"""What torch's own functions are, but for those written in Python."""
# Asked first: to ask whether something is an operator, an abstract class, takes longer than all else the hook does.
_FUNCTIONS = COMPILED | {FunctionType}
_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket, torch._ops.HigherOrderOperator)


def _table() -> dict[Callable[..., Any], Operation]:
    found: dict[Callable[..., Any], Operation] = {}
    for names, operation in _rows():
        for name in names:
            for place in (torch, torch.Tensor, torch.linalg, torch.sparse, F):
                for spelling in (name, f"{name}_", f"__{name}__"):
                    if hasattr(place, spelling):
                        found[getattr(place, spelling)] = operation
            found |= dict.fromkeys(_operators(name), operation)
    found[torch.Tensor.__rmatmul__] = Operation("matmul", ((0, "input"), (1, "other")), swapped=True)
    return found


def _rows() -> Iterator[tuple[tuple[str, ...], Operation]]:
    """Names in torch, its Tensor, linalg, sparse and nn.functional, and in torch.ops.aten, with their row."""
    yield ("linear",), Operation("linear", *_LAYER)
    for name, second in _PAIRS.items():
        yield (name, *_ALIASES.get(name, ())), Operation(name, ((0, "input"), (1, second)))
    for name, (first, second) in _ADDED.items():
        yield (name, *_ALIASES.get(name, ())), Operation(name, ((1, first), (2, second)))
    yield ("tensordot",), Operation("tensordot", ((0, "a"), (1, "b")))
    yield ("einsum",), Einsum("einsum", ())
    yield ("multi_dot", "linalg_multi_dot"), Chain("multi_dot", ())
    yield ("chain_matmul",), Chain("chain_matmul", ())
    yield ("bilinear",), Bilinear("bilinear", ((0, "input1"), (1, "input2"), (2, "weight")), ("lhs", "rhs", "weight"))
    yield ("cdist",), Distances("cdist", ((0, "x1"), (1, "x2")))
    for name in (*_CONVOLUTIONS, "conv_tbc"):
        yield (name,), Convolution(name, *_LAYER)
    yield ("convolution", "_convolution"), Convolution("convolution", *_LAYER)
    yield ("scaled_dot_product_attention",), Attention("sdpa", *_SDPA)
    for kind, dropout in _DROPOUT.items():
        yield (f"_scaled_dot_product_{kind}",), Attention("sdpa", *_SDPA, dropout=(dropout, "dropout_p"))
    yield ("_grouped_mm",), Grouped("grouped_mm", ((0, "self"), (1, "mat2")))
    yield ("_scaled_mm", "_scaled_mm_v2"), Scaled("scaled_mm", ((0, "self"), (1, "mat2")))
    yield ("_scaled_grouped_mm", "_scaled_grouped_mm_v2"), Scaled("grouped_mm", ((0, "self"), (1, "mat2")))
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        yield (name,), Recurrent(name, ())
        yield (f"{name}_cell",), Cell(f"{name}_cell", ())


_ALIASES = {
    "matmul": ("linalg_matmul",),
    "mm": ("spmm", "smm", "hspmm", "_sparse_mm"),
    "addmm": ("sspaddmm", "_sparse_addmm", "_addmm_activation"),
}


def _operators(name: str) -> Iterator[Any]:
    """torch.ops.aten's, as a torch.export program calls them: the packet and each overload."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is not None:
        yield packet
        for overload in packet.overloads():
            yield getattr(packet, overload)


OPERATIONS = _table()

# Operators that are met by name, because what defines them need not be imported: those of other libraries, and
# flex_attention, which torch compiles for itself and then calls (what it compiles for a user is not met here).
_BY_NAME = {
    "transformers::grouped_mm_fallback": Grouped("grouped_mm", ((0, "input"), (1, "weight"))),  # transformers 5
    "flex_attention": FlexAttention("flex_attention", *_SDPA),
}
