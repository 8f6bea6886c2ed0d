"""What torch itself counts, with what its table lacks or has wrong (2.13): the oracle for the FLOPs of sites."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

_aten = torch.ops.aten


def torch_flops(run: Callable[[], Any]) -> int:
    """FLOPs of all matrix products that run."""
    with FlopCounterMode(display=False, custom_mapping=_CORRECTED) as counter:
        run()
    return int(counter.get_total_flops())


def _convolution_backward(
    gradient: Any, x: Any, weight: Any, _bias: Any, _stride: Any, _padding: Any, _dilation: Any, *rest: Any, **_: Any
) -> int:
    """Torch takes the weight gradient of a grouped convolution for `groups` times what it is."""
    transposed, _output_padding, _groups, mask, *_ = rest
    return conv_flop_count(x, weight, gradient, transposed) * (mask[0] + mask[1])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    *rows, width = query
    return 2 * prod(rows) * key[-2] * (width + value[-1])


def _attention_backward(_gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores once more, probabilities' gradient, and those of query, key and value."""
    *rows, width = query
    return 2 * prod(rows) * key[-2] * (3 * width + 2 * value[-1])


def _grouped(first: Any, second: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(first[-2:]) * second[-1]


def _recurrent(x: Any, input_weight: Any, state_weight: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(x[:-1]) * (prod(input_weight) + prod(state_weight))


def _recurrent_backward(*args: Any, **kwargs: Any) -> int:
    return 2 * _recurrent(*args, **kwargs)


def _raw(count: Callable[..., int]) -> Callable[..., int]:
    count._get_raw = True  # type: ignore[attr-defined]
    return count


def _stored(matrix: Tensor) -> int:
    return matrix._nnz() if matrix.layout != torch.strided else matrix.numel()


@_raw
def _product(first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    """Of a sparse matrix only what it stores."""
    return 2 * _stored(first) * second.shape[1]


@_raw
def _added_product(_addend: Tensor, first: Tensor, second: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _stored(first) * second.shape[1]


_CORRECTED: dict[Any, Any] = {
    _aten.convolution_backward: _convolution_backward,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._grouped_mm: _grouped,
    _aten.mkldnn_rnn_layer: _recurrent,
    _aten.mkldnn_rnn_layer_backward: _recurrent_backward,
    _aten.mm: _product,
    _aten.addmm: _added_product,
    _aten._sparse_addmm: _added_product,
    _aten._sparse_mm: _product,
}
