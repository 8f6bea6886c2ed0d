"""How a cast is carried out: compiled loops on the CPU, Triton kernels on CUDA, plain expressions everywhere else.

All three give the same bits. The expressions are the specification, in the words of `scaling.py` and `rounding.py`;
they are what runs in float64, on other devices, and for e8m0.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes import cast_kernels, rounding, scaling
from probes.errors import UnsupportedTensor
from probes.formats import FORMATS, Format
from probes.in_memory import in_memory_order
from probes.memory import memory_of

if TYPE_CHECKING:
    from probes.casts import Cast

_CALCULATED_IN = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
}


class Circumstances(NamedTuple):
    """What a call of a cast finds.

    history    for delayed scaling: the largest magnitudes of the calls before
    stream     64 bits that name the stream of random numbers
    dimension  the one that rows and blocks of scales run along
    """

    history: tuple[float | Tensor, ...] = ()
    stream: int = 0
    dimension: int = -1


class Outcome(NamedTuple):
    """Values of the input's shape; and the largest finite magnitude of the input, where delayed scaling wants it."""

    values: Tensor
    amax: float | Tensor | None


def carry_out(cast: Cast, x: Tensor, found: Circumstances) -> Outcome:
    """The cast of a tensor that has elements, in x's dtype, by the fastest way there is.

    What follows a tensor's operations (FX and JIT tracing, fake tensors, vmap) meets the plain expressions, whose
    operations are torch's.
    """
    if cast.format.signed and _is_for_triton(x) and not _is_followed(x):
        return by_triton(cast, x.detach().resolve_neg(), found)
    wide = widened(x)
    by_loops = wide.dtype == torch.float32 and wide.device.type == "cpu" and cast.format.signed and not _is_followed(x)
    values, amax = (by_compiled_loops if by_loops else by_expressions)(cast, wide, found)
    if x.dtype == values.dtype:
        return Outcome(values, amax)
    limit = torch.finfo(x.dtype).max
    if cast.saturate and (cast.scale is not None or limit < cast.format.largest):
        values.clamp_(-limit, limit)
    return Outcome(values.to(x.dtype), amax)


def widened(x: Tensor) -> Tensor:
    """x in the dtype that it is calculated in, outside the autograd graph. Raises UnsupportedTensor."""
    calculated_in = _CALCULATED_IN.get(x.dtype)
    if calculated_in is None or x.layout != torch.strided:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _CALCULATED_IN)
        raise UnsupportedTensor(f"a cast takes dense {allowed} tensors, not {x.dtype}, {x.layout}")
    x = x.detach().resolve_neg()
    return x if x.dtype == calculated_in else x.to(calculated_in)


def by_expressions(cast: Cast, wide: Tensor, found: Circumstances) -> Outcome:
    """On any device, in float32 or float64."""
    matrix, target = scaling.as_matrix(wide, found.dimension), target_in(wide.dtype, cast.format)
    scale, amax = matrix_scales(cast, matrix, found.history)
    draws = draws_for(cast, matrix, found.stream)
    written = rounding.to_grid(matrix / scale, target, cast.rounding, cast.saturate, draws, matrix.isinf())
    return Outcome(_back_in_shape(_finite(cast, written * scale), wide, found.dimension), amax)


def matrix_scales(cast: Cast, matrix: Tensor, history: Sequence[float | Tensor]) -> tuple[Tensor, Tensor | None]:
    """The scale of each element, broadcast to [rows, columns] where it can be; and the largest magnitude of all."""
    one = torch.ones((1, 1), dtype=matrix.dtype, device=matrix.device)
    if cast.scale is None:
        return one, None
    tile = scaling.TILES[cast.granularity]
    amax = scaling.tile_amax(matrix, tile)
    over_all = amax.amax()
    if cast.needs_no_scale:
        return one, over_all
    if cast.has_one_scale:
        return whole_scale(cast, over_all, history), over_all
    return scaling.over_tiles(scaling.scale_of(amax, cast.scale, cast.format, over_all), matrix, tile), None


def whole_scale(cast: Cast, amax: Tensor, history: Sequence[float | Tensor]) -> Tensor:
    """0-dim: the scale of a whole tensor of this largest magnitude."""
    assert cast.scale is not None
    if cast.is_delayed:
        amax = scaling.delayed_amax(amax, history, cast.scale.margin)
    return scaling.scale_of(amax, cast.scale, cast.format)


def draws_for(cast: Cast, matrix: Tensor, stream: int) -> Tensor | None:
    """A draw for each place of the matrix, if rounding takes any."""
    if not cast.is_random:
        return None
    return rounding.dither(stream, matrix.numel(), matrix.device).view(matrix.shape)


def by_compiled_loops(cast: Cast, wide: Tensor, found: Circumstances) -> Outcome:
    """float32 on the CPU."""
    outcome = _whole_by_loops(cast, wide, found) if cast.has_one_scale else _tiles_by_loops(cast, wide, found)
    if not cast.format.keeps_negative_zero:
        outcome.values.add_(0.0)
    return Outcome(_finite(cast, outcome.values), outcome.amax)


def whole_scale_of_float32(cast: Cast, amax: float, history: Sequence[float | Tensor]) -> float:
    """`whole_scale` for a largest magnitude that is a float32, without a tensor: microseconds in place of fifty."""
    assert cast.scale is not None
    if cast.scale.value is not None:
        return scaling.static_value(cast.scale)
    if cast.is_delayed:
        earlier = max((float(one) for one in history), default=0.0)
        amax = scaling.with_margin(earlier if earlier > 0 else amax, cast.scale.margin)
    return cast_kernels.scale_of(amax, cast.scale, cast.format)


def by_triton(cast: Cast, x: Tensor, found: Circumstances) -> Outcome:
    """On CUDA. 16-bit tensors are widened in registers, so the values have their own dtype already."""
    from probes import cast_triton  # not before it is needed: Triton is not everywhere

    scale, target = None if cast.needs_no_scale else cast.scale, target_in(torch.float32, cast.format)
    how = scale, target, cast.rounding, cast.saturate, found.stream
    if cast.has_one_scale:
        values = x if not cast.is_random and _is_dense(x) else x.contiguous()
        result = torch.empty_like(values)
        amax = cast_triton.round_whole(values, result, *how, found.history)
        if cast.is_delayed and amax is None:
            amax = cast_triton.finite_amax(values)
        return Outcome(_laid_out(_finite(cast, result), x), amax)
    matrix = scaling.as_matrix(x, found.dimension).contiguous()
    result = torch.empty_like(matrix)
    cast_triton.round_tiles(matrix, result, scaling.TILES[cast.granularity], *how)
    return Outcome(_back_in_shape(result, x, found.dimension), None)


def target_in(dtype: torch.dtype, target: Format) -> Format:
    """fp64 is fp32 to a float32 tensor, whose values it holds: the grid is then one that float32 can calculate."""
    return FORMATS["fp32"] if dtype == torch.float32 and target.name == "fp64" else target


def _whole_by_loops(cast: Cast, wide: Tensor, found: Circumstances) -> Outcome:
    """With one scale, memory is a row in any order; but a random draw belongs to a place in the tensor."""
    source = wide.contiguous() if cast.is_random or not _is_dense(wide) else wide
    result, amax, scale = torch.empty_like(source), None, 1.0
    values = _row(source)
    if cast.is_delayed or not (cast.needs_no_scale or cast.is_static):
        amax = cast_kernels.finite_amax(values)
    if not cast.needs_no_scale:
        scale = whole_scale_of_float32(cast, amax or 0.0, found.history)
    target = target_in(wide.dtype, cast.format)
    cast_kernels.round_values(values, _row(result), scale, target, cast.rounding, cast.saturate, found.stream)
    return Outcome(_laid_out(result, wide), amax)


def _tiles_by_loops(cast: Cast, wide: Tensor, found: Circumstances) -> Outcome:
    across = _runs_along_first(wide, found.dimension) and not cast.is_random  # a draw belongs to a place in the rows
    matrix = wide.reshape(len(wide), -1) if across else scaling.as_matrix(wide, found.dimension).contiguous()
    result, target = torch.empty_like(matrix), target_in(wide.dtype, cast.format)
    values, out, how = _row(matrix), _row(result), (target, cast.rounding, cast.saturate, found.stream)
    assert cast.scale is not None
    if cast.needs_no_scale:
        cast_kernels.round_values(values, out, 1.0, *how)
    else:
        over_all = 1.0
        if cast.scale.rule == "nvfp4":
            over_all = float(scaling.scale_over_all(torch.tensor(cast_kernels.finite_amax(values)), target))
        shape = matrix.shape[0], matrix.shape[1]
        tile = scaling.TILES[cast.granularity]
        size = scaling.fitted(scaling.Tile(tile.columns, tile.rows) if across else tile, shape)
        cast_kernels.round_tiles(values, out, shape, size, cast.scale, *how, over_all)
    if across:
        return Outcome(result.view(wide.shape), None)
    return Outcome(_back_in_shape(result, wide, found.dimension), None)


def _finite(cast: Cast, values: Tensor) -> Tensor:
    """Saturated values times a static scale may leave float32, for which no other scale is too large."""
    if cast.is_static and cast.saturate and not cast.needs_no_scale and values.dtype == torch.float32:
        assert cast.scale is not None
        if scaling.static_value(cast.scale) > scaling.largest_scale(cast.format.largest_magnitude):
            return values.clamp_(-scaling.FLOAT32_LARGEST, scaling.FLOAT32_LARGEST)
    return values


def _runs_along_first(x: Tensor, dimension: int) -> bool:
    """Whether memory is the transpose of the matrix of rows along the dimension: its tiles are then turned, not x."""
    return x.dim() > 1 and dimension in (0, -x.dim()) and x.is_contiguous()


def _back_in_shape(matrix: Tensor, like: Tensor, dimension: int) -> Tensor:
    return _laid_out(scaling.as_shaped(matrix, like, dimension), like)


def _laid_out(values: Tensor, like: Tensor) -> Tensor:
    """The values in memory as another tensor of their shape has its own, if that has no holes."""
    if values.is_contiguous() and like.is_contiguous():
        return values
    empty = torch.empty_like(like, dtype=values.dtype)
    return values if empty.stride() == values.stride() else empty.copy_(values)


def _is_followed(x: Tensor) -> bool:
    """Whether somebody records operations on x, or x has no memory to work on: loops of our own they cannot see."""
    return (
        type(x) not in (Tensor, torch.nn.Parameter)
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def _is_for_triton(x: Tensor) -> bool:
    """Whether the fused kernels take it: what is calculated in float32, on NVIDIA's devices, where Triton is."""
    in_float32 = _CALCULATED_IN.get(x.dtype) == torch.float32 and x.layout == torch.strided
    return x.is_cuda and in_float32 and torch.version.cuda is not None and _has_triton()


@cache
def _has_triton() -> bool:
    """From 3.6 on: before, its divisions on a device flush subnormal values, and no option keeps them."""
    try:
        import triton
    except ImportError:
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in any order: only then does empty_like repeat the strides."""
    return x.is_contiguous() or torch.empty_like(x, device="meta").stride() == x.stride()


def _row(x: Tensor) -> NDArray[np.float32]:
    """The memory of a dense tensor."""
    return memory_of(x if x.is_contiguous() else in_memory_order(x))
