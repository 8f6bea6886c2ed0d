"""The same casts by other libraries, each called the way its own documentation does: what `peers.py` compares values
with and `cast_speed.py` times.

Every entry takes a float32 tensor and gives back what would be read after writing it, as a float32 tensor. Under
`work` stands the cast of ours that does the same work; where the values differ, `peers.py` shows how.

    torch         its float8 dtypes
    ml_dtypes     numpy's narrow dtypes, of JAX and TensorFlow
    gfloat        Graphcore's formats as data, with a function over arrays
    qtorch        QPyTorch; compiles C++ when it is first imported, which needs a compiler and takes a minute
    unit_scaling  Graphcore's FPFormat
    torchao       the casts of its float8 training and of its MX tensors
    microxcaling  Microsoft's MX emulation. It is on no package index, so its algorithm (tensor expressions: exponents
                  by log2, a shift, a rounding, a clamp, assignments where the input was Inf) is expressed anew here, in
                  fewer operations than its own
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.formats import FORMATS


@dataclass(frozen=True)
class PeerCast:
    """A cast of another library.

    library      as in LIBRARIES
    work         the string of our cast that does the same work
    call         how it is called, for the reader
    run          float32 tensor in, float32 tensor out
    on_cuda      whether it takes a CUDA tensor without going through the CPU
    timed        whether cast_speed.py times it: of several ways to call a library, the one a user would take
    timed_on     values that it is timed on where it would take minutes on all; None for all
    """

    library: str
    work: str
    call: str
    run: Callable[[Tensor], Tensor]
    on_cuda: bool = False
    timed: bool = True
    timed_on: int | None = None


def installed() -> tuple[list[PeerCast], dict[str, str], dict[str, str]]:
    """The casts of all libraries that can be imported; the versions of those, "" where there are none; why the others
    cannot be."""
    casts, versions, missing = [], {}, {}
    for library, (package, found) in LIBRARIES.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                casts += list(found())
        except Exception as error:  # qtorch's compilation fails in many ways
            missing[library] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            versions[library] = importlib.metadata.version(package) if package else ""
    return casts, versions, missing


def _torch() -> Iterator[PeerCast]:
    dtypes = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e4m3fnuz": torch.float8_e4m3fnuz}
    for name, dtype in (dtypes | {"e8m0": torch.float8_e8m0fnu}).items():
        run = _through(dtype)
        yield PeerCast("torch", f"{name}/none/nearest", f"x.to({dtype}).float()", run, on_cuda=True)
    for name, dtype in dtypes.items():
        largest = FORMATS[name].largest
        call = f"x.clamp(-{largest:.0f}, {largest:.0f}).to({dtype}).float()"
        yield PeerCast("torch", f"{name}/none/nearest", call, _through(dtype, largest), on_cuda=True)


def _through(dtype: torch.dtype, largest: float | None = None) -> Callable[[Tensor], Tensor]:
    if largest is None:
        return lambda x: x.to(dtype).float()
    return lambda x: x.clamp(-largest, largest).to(dtype).float()


def _ml_dtypes() -> Iterator[PeerCast]:
    import ml_dtypes

    names = {
        "e4m3fn": "float8_e4m3fn",
        "e5m2": "float8_e5m2",
        "e4m3fnuz": "float8_e4m3fnuz",
        "e8m0": "float8_e8m0fnu",
        "e2m1": "float4_e2m1fn",
    }
    for name, theirs in names.items():
        dtype = getattr(ml_dtypes, theirs)

        def run(x: Tensor, dtype: type = dtype) -> Tensor:
            with np.errstate(over="ignore", invalid="ignore"):
                return torch.from_numpy(x.numpy().astype(dtype).astype(np.float32))

        yield PeerCast("ml_dtypes", f"{name}/none/nearest", f"a.astype({theirs}).astype(float32)", run)


def _gfloat() -> Iterator[PeerCast]:
    import gfloat
    from gfloat import BlockFormatInfo, RoundMode
    from gfloat import formats as infos

    kinds = {
        "e4m3fn": infos.format_info_ocp_e4m3,
        "e5m2": infos.format_info_ocp_e5m2,
        "e8m0": infos.format_info_ocp_e8m0,
        "e2m1": infos.format_info_ocp_e2m1,
    }
    for name, info in kinds.items():
        for saturate in (True, False):

            def run(x: Tensor, info: object = info, saturate: bool = saturate) -> Tensor:
                return torch.from_numpy(gfloat.round_ndarray(info, x.numpy(), RoundMode.TiesToEven, saturate))

            call = f"round_ndarray({info}, a, sat={saturate})"
            yield PeerCast("gfloat", f"{name}/none/nearest", call, run, timed=saturate)

    draws = np.random.default_rng(0)

    def stochastic(x: Tensor) -> Tensor:
        bits = draws.integers(0, 2**16, x.shape)
        how = {"rnd": RoundMode.Stochastic, "sat": True, "srbits": bits, "srnumbits": 16}
        return torch.from_numpy(gfloat.round_ndarray(infos.format_info_ocp_e4m3, x.numpy(), **how))

    call = "round_ndarray(…, RoundMode.Stochastic, srbits=generator.integers(…))"
    yield PeerCast("gfloat", "e4m3fn/none/stochastic", call, stochastic)

    block = BlockFormatInfo("mxfp8", infos.format_info_ocp_e4m3, 32, infos.format_info_ocp_e8m0)

    def blocks(x: Tensor) -> Tensor:
        rows: NDArray[np.float32] = x.numpy().reshape(-1, 32)
        written = [gfloat.quantize_block(block, row, gfloat.compute_scale_amax) for row in rows]
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.array(written).astype(np.float32)).view(x.shape)

    yield PeerCast(
        "gfloat", "e4m3fn/block32/e8m0/nearest", "quantize_block(…, compute_scale_amax)", blocks, timed_on=4096
    )


def _qtorch() -> Iterator[PeerCast]:
    from qtorch.quant import float_quantize

    for name, exponent, mantissa in (("e4m3fn", 4, 3), ("e5m2", 5, 2), ("e2m1", 2, 1)):

        def run(x: Tensor, exponent: int = exponent, mantissa: int = mantissa) -> Tensor:
            return float_quantize(x, exponent, mantissa, "nearest")

        call = f'float_quantize(x, {exponent}, {mantissa}, "nearest")'
        yield PeerCast("qtorch", f"{name}/none/nearest", call, run)
    call = 'float_quantize(x, 4, 3, "stochastic")'
    yield PeerCast("qtorch", "e4m3fn/none/stochastic", call, lambda x: float_quantize(x, 4, 3, "stochastic"))


def _unit_scaling() -> Iterator[PeerCast]:
    from unit_scaling.formats import FPFormat

    for name, exponent, mantissa in (("e4m3fn", 4, 3), ("e5m2", 5, 2), ("e2m1", 2, 1)):
        run = FPFormat(exponent, mantissa, "nearest").quantise
        call = f'FPFormat({exponent}, {mantissa}, "nearest").quantise(x)'
        yield PeerCast("unit_scaling", f"{name}/none/nearest", call, run, on_cuda=True)
    call = "FPFormat(4, 3).quantise(x)"
    yield PeerCast("unit_scaling", "e4m3fn/none/stochastic", call, FPFormat(4, 3).quantise, on_cuda=True)


def _torchao() -> Iterator[PeerCast]:
    logging.getLogger("torchao").setLevel(logging.ERROR)  # of extensions built for GPUs, which nothing here uses
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.float8.float8_utils import to_fp8_saturated
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, f32_to_f4_unpacked
    from torchao.prototype.mx_formats.mx_tensor import MXTensor

    for name, dtype in (("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):

        def run(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return to_fp8_saturated(x, dtype).float()

        yield PeerCast("torchao", f"{name}/none/nearest", f"to_fp8_saturated(x, {dtype}).float()", run, on_cuda=True)

    def fp4(x: Tensor) -> Tensor:
        return f4_unpacked_to_f32(f32_to_f4_unpacked(x))

    yield PeerCast("torchao", "e2m1/none/nearest", "f4_unpacked_to_f32(f32_to_f4_unpacked(x))", fp4, on_cuda=True)

    def mx(x: Tensor) -> Tensor:
        return MXTensor.to_mx(x, torch.float8_e4m3fn, 32).dequantize()

    call = "MXTensor.to_mx(x, torch.float8_e4m3fn, 32).dequantize()"
    yield PeerCast("torchao", "e4m3fn/block32/e8m0/nearest", call, mx, on_cuda=True)


def _microxcaling() -> Iterator[PeerCast]:
    for name in ("e4m3fn", "e5m2", "e2m1"):

        def run(x: Tensor, name: str = name) -> Tensor:
            return elementwise(x, name, "even", saturate=True)

        call = 'elementwise, round="even", saturate_normals=True'
        yield PeerCast("microxcaling", f"{name}/none/nearest", call, run, on_cuda=True)

        def default(x: Tensor, name: str = name) -> Tensor:
            return elementwise(x, name, "nearest", saturate=False)

        call = "elementwise, its defaults"
        yield PeerCast("microxcaling", f"{name}/none/nearest", call, default, on_cuda=True, timed=False)

    def dithered(x: Tensor) -> Tensor:
        return elementwise(x, "e4m3fn", "dither", saturate=True)

    call = 'elementwise, round="dither", saturate_normals=True'
    yield PeerCast("microxcaling", "e4m3fn/none/stochastic", call, dithered, on_cuda=True)

    def mx(x: Tensor) -> Tensor:
        return in_blocks(x, "e4m3fn", 32, "even")

    call = 'MX, block_size=32, round="even"'
    yield PeerCast("microxcaling", "e4m3fn/block32/e8m0/nearest", call, mx, on_cuda=True)


def elementwise(x: Tensor, name: str, rounding: str, saturate: bool) -> Tensor:
    """microxcaling's algorithm for one value, re-expressed.

    rounding  its own words: "even"; "nearest", which takes ties away from zero and is its default; "dither"
    saturate  whether finite values beyond the largest become the largest; otherwise Inf. Inf stays Inf either way
    """
    target = FORMATS[name]
    magnitude = x.abs()
    exponent = torch.where(x == 0, 0.0, torch.log2(magnitude)).floor().clamp(min=target.emin)
    spacing = 2.0 ** (exponent - target.mantissa_bits)
    steps = magnitude / spacing
    if rounding == "even":
        tie_above_even = (steps - 0.5) % 2 == 0
        whole = (steps + 0.5).floor() - tie_above_even.to(x.dtype)
    else:
        whole = (steps + (torch.rand_like(x) if rounding == "dither" else 0.5)).floor()
    rounded = x.sign() * whole * spacing
    if saturate:
        rounded = rounded.clamp(-target.largest, target.largest)
    else:
        rounded = torch.where(rounded.abs() > target.largest, x.sign() * torch.inf, rounded)
    for infinity in (torch.inf, -torch.inf):
        rounded[x == infinity] = infinity
    return rounded


def in_blocks(x: Tensor, name: str, size: int, rounding: str) -> Tensor:
    """microxcaling's algorithm for MX blocks along the last dimension, re-expressed: OCP's scale, and NaN throughout
    a block whose scale would be beyond 2^127."""
    blocks = x.view(*x.shape[:-1], -1, size)
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    exponent = torch.where(amax == 0, 2.0**-126, amax).log2().floor() - FORMATS[name].emax
    scale = 2.0 ** torch.where(exponent > 127, torch.nan, exponent).clamp(min=-127)
    return (elementwise(blocks / scale, name, rounding, saturate=True) * scale).view(x.shape)


LIBRARIES: Mapping[str, tuple[str, Callable[[], Iterator[PeerCast]]]] = MappingProxyType(
    {
        "torch": ("torch", _torch),
        "ml_dtypes": ("ml_dtypes", _ml_dtypes),
        "gfloat": ("gfloat", _gfloat),
        "qtorch": ("qtorch", _qtorch),
        "unit_scaling": ("unit-scaling", _unit_scaling),
        "torchao": ("torchao", _torchao),
        "microxcaling": ("", _microxcaling),
    }
)
"""Library → its name for pip ("" where it has none) and its casts."""
