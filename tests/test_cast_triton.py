"""The Triton kernels against the specification: on a device where there is one, else on Triton's interpreter.

The interpreter calculates with numpy, so what it cannot show is left to two other tests: that the kernels compile for
a device (they are compiled for one, without one), and that Triton's launches there give the same (only on a device).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from probes import cast_triton
from probes.casting import Circumstances, by_expressions, by_triton
from probes.casts import Cast, CastState
from probes.errors import InvalidCast
from probes.scaling import RULES

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    pytest.skip("Triton's interpreter rounds a fused multiply-add twice before 3.9", allow_module_level=True)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

OVERFLOWING = ("e4m3fn", "e5m2", "bf16", "e4m3fnuz", "e8m3", "e3m0", "e6m23", "fp32", "e7m22")
FORMATS = (*OVERFLOWING, "e2m1", "int8", "int4")
IN_FLOAT32 = {
    "current": ("current", "current:pow2"),
    "delayed": ("delayed(len=3,margin=1)", "delayed:pow2"),
    "static": ("static=0.37", "static=0.37:pow2"),
}
SCALINGS = ["none"] + [
    f"{granularity}/{scale}"
    for granularity, rules in RULES.items()
    for rule in rules
    for scale in IN_FLOAT32.get(rule, (rule,))
]
STREAM = 0xFEDCBA9876543210
EDGES = [0.0, -0.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-126), 3.4028234663852886e38]


@pytest.fixture(autouse=True)
def repeatable_and_as_silent_as_a_device() -> Iterator[None]:
    """numpy, which the interpreter calculates with, warns of overflow and NaN."""
    torch.manual_seed(0)
    with np.errstate(all="ignore"):
        yield


def any_bits(shape: tuple[int, ...], seed: int) -> Tensor:
    bits = torch.randint(-(2**31), 2**31, shape, generator=torch.Generator().manual_seed(seed))
    return bits.to(torch.int32).view(torch.float32)


def values(scaling: str) -> Tensor:
    """[14, 150]: rows of different magnitude; where a scale is not for all, also any bits, and rows of one kind."""
    generator = torch.Generator().manual_seed(len(scaling))
    x = torch.randn(14, 150, generator=generator) * 2.0 ** torch.randint(-9, 9, (14, 1), generator=generator)
    x[3, 40:45] = torch.tensor(EDGES[:5])
    x[4] *= 2.0**-130
    if not scaling.startswith("tensor/c") and not scaling.startswith("tensor/d"):
        x[5:10] = any_bits((5, 150), seed=1)
        x[10], x[11], x[12], x[13, :8] = 0.0, np.inf, np.nan, torch.tensor(EDGES)
    return x


def assert_same(ours: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, any NaN being as good as another."""
    ours, nan = ours.cpu(), expected.isnan()
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert torch.equal(ours.isnan(), nan)
    assert torch.equal(ours[~nan], expected[~nan])
    assert torch.equal(ours[~nan].signbit(), expected[~nan].signbit())


def check(cast: Cast, x: Tensor, history: tuple[float | Tensor, ...] = (), dimension: int = -1) -> None:
    expected, amax = by_expressions(cast, x, Circumstances(history, STREAM, dimension))
    ours, found = by_triton(cast, x.to(DEVICE), Circumstances(history, STREAM, dimension))
    assert_same(ours, expected)
    if cast.is_delayed:
        assert isinstance(found, Tensor)
        assert (found.device.type, found.shape, found.item()) == (DEVICE.type, (), amax)


def casts(name: str, scaling: str) -> Iterator[Cast]:
    """Of this format and scaling, every one that there is."""
    for rounding in ("nearest", "stochastic", "zero"):
        for overflow in ("", ":inf"):
            with contextlib.suppress(InvalidCast):  # int8 has no Inf, and bf16 is too wide for nvfp4
                yield Cast.parse(f"{name}/{scaling}/{rounding}{overflow}")


@pytest.mark.parametrize(("scaling", "name"), list(zip(SCALINGS, itertools.cycle(OVERFLOWING), strict=False)))
def test_every_scaling_and_rounding(scaling: str, name: str) -> None:
    """Each scaling with a format of its own: all with all are the slow test below."""
    for cast in list(casts(name, scaling)) or casts("e4m3fn", scaling):
        check(cast, values(scaling))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str) -> None:
    x = torch.cat([any_bits((2000,), seed=2), torch.tensor(EDGES), torch.randn(2000) * Cast.parse(name).format.largest])
    for cast in casts(name, "none"):
        check(cast, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_with_every_scaling(name: str) -> None:
    for scaling in SCALINGS:
        for cast in casts(name, scaling):
            check(cast, values(scaling))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["e4m3fn", "bf16", "fp16", "fp32/none/nearest:inf", "int4/none/zero", "e5m2/none/stochastic"]
)
def test_16_bit_tensors_are_read_and_written_as_they_are(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cast_triton, "_BLOCK", 2**14)  # the interpreter takes as long for any
    cast, x = Cast.parse(name), torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    ours, _ = by_triton(cast, x.to(DEVICE), Circumstances(stream=CastState(5).next_stream()))
    assert_same(ours, cast(x, CastState(5)))


@pytest.mark.parametrize("scale", ["current", "current:pow2", "delayed(len=2,margin=-3)"])
def test_a_tensor_without_anything_finite(scale: str) -> None:
    for x in ([0.0, -0.0], [np.inf, np.nan, -np.inf], [2.0**-149, -(2.0**-140)], [3.4028234663852886e38, 1.0]):
        check(Cast.parse(f"e4m3fn/tensor/{scale}"), torch.tensor(x))


@pytest.mark.parametrize("margin", [0, 2, -3])
def test_delayed_scaling_takes_what_was_seen_before(margin: int) -> None:
    cast, x = Cast.parse(f"e5m2/tensor/delayed(len=4,margin={margin})"), torch.randn(50, 70)
    here = [torch.tensor(magnitude, device=DEVICE) for magnitude in (0.0, 0.25, 7.0)]
    for history in ((0.0,), (here[0],), (0.5, 0.125), (here[1], here[2]), (9.0, here[2], here[0])):
        check(cast, x, history)
    check(Cast.parse("fp32/tensor/delayed"), x, (1.0,))


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small tensor has many blocks, of which one program does several."""
    for name, value in {"_BLOCK": 512, "_LARGE_BLOCK": 512, "_MANY_ROWS": 6, "_SEARCHERS": 3}.items():
        monkeypatch.setattr(cast_triton, name, value)


@pytest.mark.usefixtures("tiny_blocks")
@pytest.mark.parametrize(
    "scaling", ["none", "tensor", "tensor/delayed", "row", "column", "block16", "block1x128", "block128x128"]
)
def test_every_shape(scaling: str) -> None:
    cast = Cast.parse(f"e2m1/{scaling}/stochastic" if scaling == "none" else f"e2m1/{scaling}")
    for shape in ((), (3, 1), (2, 1600), (7, 520), (131, 20)):
        check(cast, any_bits(shape, seed=len(shape)) if scaling != "tensor" else torch.randn(shape), (0.0,))


@pytest.mark.parametrize("scaling", ["none", "tensor/current", "row/current", "block32/e8m0"])
def test_strides_and_dimensions(scaling: str) -> None:
    x = torch.randn(3, 4, 10, 6, generator=torch.Generator().manual_seed(1))
    for rounding in ("nearest", "stochastic"):
        cast = Cast.parse(f"e4m3fn/{scaling}/{rounding}")
        views = x.permute(3, 1, 0, 2), x[:, ::3, 1:], x.flip(1), x.to(memory_format=torch.channels_last)
        for view, dimension in zip(views, (-1, 0, 1, -3), strict=True):
            check(cast, view, dimension=-1 if cast.has_one_scale else dimension)
    ours, _ = by_triton(Cast.parse("e4m3fn"), views[3].to(DEVICE), Circumstances(stream=STREAM))
    assert ours.stride() == views[3].stride()


@triton.jit
def _quotients(values, scales, out, HOW: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, BLOCK)
    tl.store(out + place, cast_triton._quotient(tl.load(values + place), tl.load(scales + place), HOW))


def near_halves(count: int) -> tuple[Tensor, Tensor]:
    """Dividends and divisors whose quotients lie as near to the middle between two float32 as any do."""
    found, generator = [], torch.Generator().manual_seed(6)
    for draw in torch.randint(2**22, 2**23, (count,), generator=generator).tolist():
        divisor = 2 * draw + 1
        for above in (-3, -1, 1, 3):
            middle = -above * pow(divisor, -1, 2**25) % 2**25
            dividend = (middle * divisor + above) >> 25
            if middle & 1 and 2**23 <= dividend < divisor:
                found.append((dividend, divisor))
    dividends, divisors = torch.tensor(found, dtype=torch.float32).T
    return dividends, divisors


def test_division_by_parts_is_ieee_division() -> None:
    how = cast_triton._told(torch.float32, Cast.parse("e4m3fn").scale, Cast.parse("e4m3fn").format, "nearest", True)
    assert how["HOW"].divides_by_parts
    dividends, divisors = near_halves(8000)
    count = 2**16 - len(dividends)
    assert 0 < count < 2**16 - 5000
    scales = any_bits((count,), seed=3).abs().nan_to_num(1.0).clamp(2.0**-135)
    x, scales = torch.cat([any_bits((count,), seed=4).abs(), dividends]), torch.cat([scales, divisors])
    x[: count // 2] = (scales[: count // 2] * torch.randn(count // 2)).abs()  # of a magnitude that formats hold
    out = torch.empty(2**16, device=DEVICE)
    _quotients[(1,)](x.to(DEVICE), scales.to(DEVICE), out, how["HOW"], BLOCK=2**16, enable_fp_fusion=False)
    ours, exact = out.cpu(), torch.from_numpy(x.numpy() / scales.numpy())
    held = (exact >= 2.0**-126) & (exact <= 2.0**60)
    assert held.sum() > 40_000
    assert torch.equal(ours[held], exact[held])
    assert torch.equal(ours == 0, exact == 0)
    assert (ours[exact > 2.0**60] > 2.0**60).all()
    assert (ours[exact < 2.0**-126] <= 2.0**-126).all()


COMPILED = """
import json, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class NoDevice:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

compiled, launch = [], JITFunction.run
def only_compile(kernel, *arguments, warmup, **named):
    compiled.append((kernel.fn.__name__, launch(kernel, *arguments, warmup=True, **named)))
JITFunction.run = only_compile
driver.set_active(NoDevice())

from probes.casting import Circumstances, by_triton
from probes.casts import Cast
for text, dtype, shape in json.loads(sys.argv[1]):
    x = torch.empty(shape, dtype=getattr(torch, dtype))
    by_triton(Cast.parse(text), x, Circumstances((x.new_zeros(()),), 1))
print(json.dumps([(name, kernel.asm["ptx"], len(kernel.asm["cubin"])) for name, kernel in compiled]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, int]]:
    """Kernels' names, PTX and sizes: every kernel, as launches that go no further than the compiler have it."""
    square, long_rows = (256, 2048), (256, 16384)
    wanted = [
        ("e4m3fn/none", "bfloat16", square),
        ("e4m3fn/tensor", "float32", square),
        ("bf16/tensor/current:pow2/stochastic", "float32", square),
        ("e5m2/tensor/delayed/nearest:inf", "float16", square),
        ("e2m1/block16/nvfp4/stochastic", "float32", square),
        ("e4m3fn/block32/e8m0", "bfloat16", square),
        ("e4m3fnuz/row/current/zero:inf", "float32", square),
        ("e4m3fn/row", "float32", long_rows),
        ("e4m3fn/block128x128/e8m0up", "float16", square),
        ("e4m3fn/column", "float32", square),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    command = [sys.executable, "-c", COMPILED, json.dumps(wanted)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_compiles_for_a_device(compiled: list[tuple[str, str, int]]) -> None:
    kernels = {name for name in vars(cast_triton) if name.endswith("s_cast") or name.startswith("_amax")}
    assert {name for name, _, _ in compiled} == kernels
    assert all(size > 1000 for _, _, size in compiled)


def test_compiled_arithmetic_is_rounded_once_and_keeps_subnormal_values(compiled: list[tuple[str, str, int]]) -> None:
    """`.rn` also forbids the assembler to fuse a product with a sum."""
    for name, ptx, _ in compiled:
        operations = set(re.findall(r"\b(?:add|sub|mul|div|fma|rcp|cvt)\.[\w.]*f(?:16|32)[\w.]*", ptx))
        inexact = {operation for operation in operations if ".rn" not in operation and operation != "cvt.f32.f16"}
        assert not inexact, name
        assert not re.search(r"\.(?:ftz|approx|full)\b", ptx), name


def test_compiled_accesses_are_as_wide_as_they_get(compiled: list[tuple[str, str, int]]) -> None:
    for name, ptx, _ in compiled:
        assert "ld.global.v4.b32" in ptx, name
        assert name.startswith("_amax") or "st.global.v4.b32" in ptx, name


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_device_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    for name, scaling in itertools.product(FORMATS, SCALINGS):
        x = values(scaling).to(dtype)
        on_device = x.cuda()
        for cast in casts(name, scaling):
            ours, expected = CastState(5), CastState(5)
            for _ in range(3):
                torch.cuda.set_sync_debug_mode("error")  # nothing is waited for
                result = cast(on_device, ours)
                torch.cuda.set_sync_debug_mode("default")
                assert_same(result, cast(x, expected))


@needs_cuda
@pytest.mark.parametrize(("text", "columns"), [("e4m3fn/none", 64), ("e4m3fn/block32", 63), ("e4m3fn/column", 1)])
def test_places_beyond_2_to_the_31(text: str, columns: int) -> None:
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of device memory")
    x = torch.zeros(2**31 // columns + 4096, columns, dtype=torch.bfloat16, device="cuda")
    x[-64:] = torch.randn(64, columns)
    assert_same(Cast.parse(text)(x)[-64:], Cast.parse(text)(x[-64:].cpu()))
