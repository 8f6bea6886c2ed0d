"""The sketch's kernel for CUDA against the plain sketch: on a device where there is one, else on Triton's interpreter.

The interpreter calculates with numpy and has no shared memory: a tensor takes the counters' place. So that the
counters are cleared, added to and read in that order, with a barrier between, is looked up in what is compiled.
"""

from __future__ import annotations

import importlib
import json
import math
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

from probes import sketch_triton
from probes.errors import MissingTriton, ProbeError, UnsupportedTensor
from probes.in_memory import in_memory_order
from probes.layout import (
    BINS,
    DISTINCT,
    EXTREMES,
    HASH_CELLS,
    NANS,
    SAMPLE,
    SIGNIFICANT_BITS,
    SUM_OF_SQUARES,
    SUMS,
    ZEROS,
)
from probes.sketch import EMPTY_EXTREMES, SketchArray, add_reference
from tests.tensors import AWKWARD, generator

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
WIDTHS = {torch.float16: 2, torch.bfloat16: 2, torch.float32: 4, torch.float64: 8}
FLOAT32_BITS = {
    "zero": 0x00000000,
    "negative zero": 0x80000000,
    "smallest subnormal": 0x00000001,
    "negative subnormal of one bit": 0x80000400,
    "subnormal of many bits": 0x00155555,
    "large subnormal": 0x007FFFF0,
    "smallest normal": 0x00800000,
    "one": 0x3F800000,
    "one and a bit": 0x3F800001,
    "largest": 0x7F7FFFFF,
    "negative largest": 0xFF7FFFFF,
    "infinity": 0x7F800000,
    "negative infinity": 0xFF800000,
    "signalling NaN": 0x7F800001,
    "quiet NaN": 0x7FC00000,
    "negative NaN": 0xFFC00123,
    "all ones": 0xFFFFFFFF,
}


@pytest.fixture(autouse=True)
def as_silent_as_a_device() -> Iterator[None]:
    """numpy, which the interpreter calculates with, warns of overflow and NaN."""
    with np.errstate(all="ignore"):
        yield


def empty_row(device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    return torch.zeros(SUMS, dtype=torch.float64, device=device), torch.tensor(EMPTY_EXTREMES, device=device)


def plain(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    sums, extremes = empty_row()
    for values in tensors:
        if values.numel():
            add_reference(sums, extremes, values)
    return sums, extremes


def sketched(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    if DEVICE.type == "cpu" and TRITON < (3, 9):
        pytest.skip("Triton's interpreter mixes up constants and tensors before 3.9")
    sums, extremes = empty_row(DEVICE)
    for values in tensors:
        sketch_triton.add(sums, extremes, values.to(DEVICE))
    return sums.cpu(), extremes.cpu()


def assert_same(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Equal bit for bit; squares up to the order in which they are added."""
    torch.testing.assert_close(ours[0][SUM_OF_SQUARES], expected[0][SUM_OF_SQUARES], rtol=1e-12, atol=0)
    assert torch.equal(ours[0][:SUM_OF_SQUARES], expected[0][:SUM_OF_SQUARES])
    assert not ours[0][SUM_OF_SQUARES + 1 :].any()
    assert torch.equal(ours[1], expected[1])


def check(*tensors: Tensor) -> None:
    assert_same(sketched(*tensors), plain(*tensors))


def from_bits(bits: list[int]) -> Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_tensors(name: str) -> None:
    check(AWKWARD[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_code_point_of_16_bits(dtype: torch.dtype) -> None:
    points = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    check(points)
    wide = points.float()
    check(points[wide.isfinite() & (wide.abs() >= 2.0**-126)])  # what is seen in one pass


@pytest.mark.parametrize("name", FLOAT32_BITS)
def test_a_float32_edge_alone(name: str) -> None:
    check(from_bits([FLOAT32_BITS[name]]))


def test_a_subnormal_counts_from_its_own_leading_bit() -> None:
    """Here the plain sketch does not serve: float32's log2 of all ones is rounded up to the next integer."""
    for bits, used in ((0x007FFFFF, 22), (0x003FFFFF, 21), (0x00000003, 1), (0x00400000, 0)):
        _, extremes = sketched(from_bits([bits]))
        assert extremes[SIGNIFICANT_BITS] == used


def test_float32_edges_among_others() -> None:
    edges = from_bits(list(FLOAT32_BITS.values()))
    check(edges, torch.cat([torch.randn(5000, generator=generator(1)), edges, torch.zeros(5000)]))


def test_float64_is_rounded_to_float32() -> None:
    edges = [1 + 2.0**-24, 1 + 3 * 2.0**-24, 3.5e38, -1e300, 1e-46, -1e-320, 2.0**-149, math.inf, -math.inf, math.nan]
    check(torch.tensor(edges, dtype=torch.float64))


@pytest.mark.parametrize("dtype", WIDTHS)
def test_sizes_around_rows_and_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of two rows, and three programs that read chunks in turn."""
    monkeypatch.setattr(sketch_triton, "_CHUNK_BYTES", 2 * 4096)
    chunk, values = 2 * 4096 // WIDTHS[dtype], torch.randn(40_000, generator=generator(2)).to(dtype)
    values[::7] = 0
    for size in (1, chunk // 2 - 1, chunk // 2, chunk - 1, chunk, chunk + 1, 3 * chunk, 4 * chunk + chunk // 2 + 3):
        check(values[:size])


@pytest.mark.parametrize("bits", ["quiet NaN", "negative infinity", "subnormal of many bits", "zero"])
def test_an_odd_value_wherever_it_is(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program goes over its own elements again, and only these."""
    monkeypatch.setattr(sketch_triton, "_CHUNK_BYTES", 4096)
    chunk = 4096 // 4
    for place in (0, chunk - 1, chunk, 3 * chunk, 4 * chunk + 9):
        values = torch.randn(4 * chunk + 10, generator=generator(3)) + 8
        values[place] = from_bits([FLOAT32_BITS[bits]])
        check(values)


def test_layouts() -> None:
    x = torch.randn(6, 9, 8, 7, generator=generator(4))
    dense = x.permute(3, 1, 0, 2), x[2:], x.to(memory_format=torch.channels_last)
    for view in dense:
        assert in_memory_order(view).data_ptr() == view.data_ptr()  # read where it is
    unaligned = x.flatten()[1:]
    check(*dense, unaligned, x[:, ::3, 1:], x.flip(1), x[:, :1].expand(6, 9, 8, 7), x.bfloat16()[..., 1])


def test_a_negated_view() -> None:
    values = torch.tensor([1.5, -math.inf, 0.0, math.inf, -math.inf])
    assert torch._neg_view(values).is_neg()
    assert_same(sketched(torch._neg_view(values)), plain(-values))


def test_calls_into_one_row_add_up() -> None:
    check(AWKWARD["nonfinite"], AWKWARD["rows"], AWKWARD["bf16"], AWKWARD["empty"], AWKWARD["rows"])


def test_only_its_own_row_is_written_and_nothing_of_the_tensor() -> None:
    array, values = SketchArray(3, DEVICE), AWKWARD["nonfinite"].clone().to(DEVICE).requires_grad_()
    before = values.detach().clone()
    sketch_triton.add(array.sums[1], array.extremes[1], values)
    assert torch.equal(values.detach().view(torch.int32), before.view(torch.int32))
    assert not array.sums[[0, 2]].any()
    assert array.extremes[[0, 2]].tolist() == [list(EMPTY_EXTREMES)] * 2
    assert_same((array.sums[1].cpu(), array.extremes[1].cpu()), plain(AWKWARD["nonfinite"]))


def test_nothing_finite_leaves_the_extremes_alone() -> None:
    sums, extremes = sketched(torch.tensor([math.nan, 0.0, math.inf, -0.0]))
    assert extremes.tolist() == list(EMPTY_EXTREMES)
    assert sums[ZEROS : ZEROS + 5].tolist() == [2.0, 1.0, 1.0, 0.0, 0.0]


def test_distinct_values_up_to_every_cell() -> None:
    """One magnitude for each hash cell; then half of these."""
    bits = np.random.default_rng(5).integers(1, 0x7F800000, 400_000, dtype=np.int64)
    _, first = np.unique((bits * 0x9E3779B1 & 0xFFFFFFFF) >> 20, return_index=True)
    assert len(first) == HASH_CELLS
    values = from_bits(bits[first].tolist())
    _, extremes = sketched(values)
    assert extremes[DISTINCT] == HASH_CELLS
    check(values)
    check(values[::2])


def test_no_linear_count_is_so_near_a_half_that_logarithms_could_differ() -> None:
    empty = np.arange(1, HASH_CELLS + 1, dtype=np.longdouble)
    counts = HASH_CELLS * np.log(HASH_CELLS / empty)
    assert np.abs(counts - np.floor(counts) - 0.5).min() > 1e-6


@pytest.mark.parametrize("wrong", [torch.arange(3), torch.ones(3).to_sparse(), torch.ones(3, device="meta")])
def test_what_is_no_tensor_for_a_sketch(wrong: Tensor) -> None:
    sums, extremes = empty_row(DEVICE)
    with pytest.raises(UnsupportedTensor, match="convert or move"):
        sketch_triton.add(sums, extremes, wrong if wrong.is_meta else wrong.to(DEVICE))
    assert not sums.any()


def test_without_triton_the_import_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "probes.sketch_triton")
    with pytest.raises(MissingTriton, match="pip install triton") as raised:
        importlib.import_module("probes.sketch_triton")
    assert isinstance(raised.value, ImportError)
    assert isinstance(raised.value, ProbeError)


@pytest.mark.slow
def test_any_size_dtype_and_magnitude() -> None:
    draws = generator(6)
    for _ in range(300):
        size = int(2 ** (torch.rand((), generator=draws) * 16))
        dtype = list(WIDTHS)[int(torch.randint(4, (), generator=draws))]
        scale = 2.0 ** torch.randint(-150, 128, (), generator=draws).double()
        values = (torch.randn(size, generator=draws).double() * scale).to(dtype)
        values[torch.rand(size, generator=draws) < 0.01] = 0
        check(values)


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
    compiled.append(launch(kernel, *arguments, warmup=True, **named))
JITFunction.run = only_compile
driver.set_active(NoDevice())

from probes import sketch_triton
from probes.layout import EXTREMES, SUMS
row = torch.empty(SUMS, dtype=torch.float64, device="meta"), torch.empty(EXTREMES, device="meta")
for dtype, size in json.loads(sys.argv[1]):
    sketch_triton.add(*row, torch.empty(size, dtype=getattr(torch, dtype), device="meta"))
print(json.dumps([[kernel.asm["ptx"], len(kernel.asm["cubin"])] for kernel in compiled]))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, int]]:
    """PTX and size of what is launched for each dtype, as launches that go no further than the compiler have it.

    The tensors are on the `meta` device: reading any value on the host would raise.
    """
    if TRITON < (3, 7):
        pytest.skip("Triton 3.6 has neighbours in several threads: its loop passes sums between them, by barriers")
    wanted = [("float32", 100_000), ("bfloat16", 2**33), ("float16", 5000), ("float64", 64)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    command = [sys.executable, "-W", "error", "-c", COMPILED, json.dumps(wanted)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: (ptx, size) for (name, _), (ptx, size) in zip(wanted, json.loads(done.stdout), strict=True)}


Line = tuple[str, str, str]


def lines_of(ptx: str) -> list[Line]:
    """Predicate, operation (or label) and operands of each line of the kernel."""
    found = (re.match(r"\s*(@\S+\s+)?(\$L\w+:|[a-z][\w.:]*)\s*([^;]*)", line) for line in ptx.splitlines())
    return [(one[1] or "", one[2], one[3]) for one in found if one]


def successors(lines: list[Line], at: int) -> list[int]:
    predicate, operation, operands = lines[at]
    if operation == "ret":
        return []
    if not operation.startswith("bra"):
        return [at + 1]
    target = next(place for place, line in enumerate(lines) if line[1] == f"{operands.strip()}:")
    return [target, at + 1] if predicate else [target]


def after(state: str, operation: str) -> str:
    """What the counters are, which a barrier makes known to all threads."""
    is_barrier = operation.startswith("bar")
    if operation.startswith("atom") and ".shared.add" in operation:
        assert state in ("cleared", "counting")
        return "counting"
    if operation.startswith("ld.shared"):
        assert state != "counting"
    if operation.startswith("st.shared") and state == "unknown":
        return "being cleared"
    return {"being cleared": "cleared", "counting": "counted"}.get(state, state) if is_barrier else state


def test_compiled_counters_are_cleared_added_to_and_read_between_barriers(compiled: dict[str, tuple[str, int]]) -> None:
    """On every way through the kernel."""
    for name, (ptx, _) in compiled.items():
        lines = lines_of(ptx)
        seen, todo = set(), [(next(at for at, line in enumerate(lines) if line[1] == "ld.param.b64"), "unknown")]
        while todo:
            at, state = todo.pop()
            if (at, state) not in seen:
                seen.add((at, state))
                state = after(state, lines[at][1])
                todo += [(place, state) for place in successors(lines, at)]
        assert {state for _, state in seen} == {"unknown", "being cleared", "cleared", "counting", "counted"}, name
        assert {state for at, state in seen if lines[at][1] == "ret"} <= {"cleared", "counted"}, name


def test_compiles_for_a_device(compiled: dict[str, tuple[str, int]]) -> None:
    for name, (ptx, size) in compiled.items():
        assert size > 1000
        assert re.search(r"\.maxnreg 64", ptx)
        elements = re.search(r"\.param (\.\w+) _sketch_param_3", ptx)
        assert elements is not None
        assert elements[1] == (".u64" if name == "bfloat16" else ".u32")


def test_compiled_reads_wide_and_in_few_instructions(compiled: dict[str, tuple[str, int]]) -> None:
    """In the loop over chunks: 16 bytes a load, one atomic operation an element, and nothing between threads."""
    for name, (ptx, _) in compiled.items():
        blocks = (lines_of(block) for block in re.split(r"\n(?=\$L__BB)", ptx))
        found = [[operation for _, operation, _ in block if not operation.endswith(":")] for block in blocks]
        (loop,) = (block for block in found if any(one.startswith("ld.global.v") for one in block))
        counts = sum(one.endswith(".shared.add.u32") for one in loop)
        assert counts == 16384 // 256 // WIDTHS[getattr(torch, name)]
        assert sum(one.startswith("ld.") for one in loop) == 4
        assert {one for one in loop if one.startswith("ld.")} <= {"ld.global.v4.b32", "ld.global.v2.b64"}
        assert len(loop) < 18 * counts, name
        assert not any(one.startswith(("bar", "shfl", "vote", "match", "st.")) for one in loop), name


def test_compiled_threads_hold_no_element_twice(compiled: dict[str, tuple[str, int]]) -> None:
    """Or it would be counted twice: in a chunk, in a row of the rest, and in a part of the sample."""
    for name, (ptx, _) in compiled.items():
        width = WIDTHS[getattr(torch, name)]
        counts = [operation for _, operation, _ in lines_of(ptx) if operation.endswith(".shared.add.u32")]
        assert len(counts) == (16384 // width + 4096 // width + SAMPLE) // 256, name


def test_compiled_keeps_subnormal_values(compiled: dict[str, tuple[str, int]]) -> None:
    for name, (ptx, _) in compiled.items():
        assert not re.search(r"\.ftz\.f(?:32|16)", ptx), name


@needs_cuda
@pytest.mark.parametrize("name", AWKWARD)
def test_a_device_is_not_waited_for(name: str) -> None:
    values, (sums, extremes) = AWKWARD[name].cuda(), empty_row("cuda")
    sketch_triton.add(*empty_row("cuda"), values)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        sketch_triton.add(sums, extremes, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same((sums.cpu(), extremes.cpu()), plain(AWKWARD[name]))


@needs_cuda
def test_many_programs_on_a_device() -> None:
    for dtype in WIDTHS:
        values = torch.randn(2**24 + 12_345, generator=generator(7)).to(dtype)
        values[12_345_678], values[9_999_999] = math.nan, 0.0
        check(values)


@needs_cuda
def test_on_another_stream_and_in_a_graph() -> None:
    values, (sums, extremes) = torch.randn(300_000, device="cuda"), empty_row("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sketch_triton.add(sums, extremes, values)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sketch_triton.add(sums, extremes, values)
    graph.replay()
    graph.replay()
    assert_same((sums.cpu(), extremes.cpu()), plain(*[values.cpu()] * 3))


@needs_cuda
def test_places_beyond_2_to_the_31() -> None:
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of device memory")
    size = 2**31 + 4099
    values = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    values[-1], values[-2], values[2**31] = math.nan, 3.0, 0.0
    sums, extremes = empty_row("cuda")
    sketch_triton.add(sums, extremes, values)
    assert sums[:BINS].sum() == size - 2
    assert sums[[ZEROS, NANS]].tolist() == [1.0, 1.0]
    assert sums[SUM_OF_SQUARES] == size - 3 + 9.0
    assert extremes[[0, 1, SIGNIFICANT_BITS]].tolist() == [3.0, -1.0, 1.0]
    assert len(extremes) == EXTREMES
