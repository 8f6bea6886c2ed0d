"""The compiled sketch equals the plain one, and both equal what a tensor holds."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import numpy as np
import pytest
import torch

from probes import kernels, sketch, threads
from probes.errors import UnsupportedTensor
from probes.layout import (
    BIN_SHIFT,
    BINS,
    DISTINCT,
    MANTISSA_BITS,
    NANS,
    NEGATIVE_INFS,
    SAMPLE,
    SIGNIFICANT_BITS,
    SUM_OF_SQUARES,
    SUMS,
    ZEROS,
)
from probes.sketch import BIN_EDGES, SketchArray, add_reference
from probes.threads import SMALLEST_SHARE
from tests.tensors import AWKWARD, generator

SIZES = (1, 2, 31, 1023, 1024, 1025, 9 * 1024, 9 * 1024 + 1, 40_000, SAMPLE + 1, 70 * 1024 + 511, 200_003)


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Into how many shares the kernel divides its work; what torch and numba were started with may allow just one."""
    threads.launch()
    return lambda number: monkeypatch.setattr(kernels, "threads_for", lambda _elements: number)


def sketched(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    array = SketchArray(3)
    for value in values:
        array.add(1, value)
    assert not array.sums[[0, 2]].any()
    return array.sums[1], array.extremes[1]


def assert_equals_the_reference(values: torch.Tensor) -> None:
    sums, extremes = torch.zeros(SUMS, dtype=torch.float64), torch.tensor(sketch.EMPTY_EXTREMES)
    add_reference(sums, extremes, values)
    got_sums, got_extremes = sketched(values)
    torch.testing.assert_close(got_sums[SUM_OF_SQUARES], sums[SUM_OF_SQUARES], rtol=1e-12, atol=0)
    got_sums[SUM_OF_SQUARES] = sums[SUM_OF_SQUARES]
    assert torch.equal(got_sums, sums)
    assert torch.equal(got_extremes, extremes)


def of_bits(low: int, high: int, step: int = 1) -> torch.Tensor:
    """float32 values of a range of bit patterns."""
    return torch.arange(low, high, step, dtype=torch.int64).to(torch.int32).view(torch.float32)


def normal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=generator(seed))


@pytest.mark.parametrize("name", AWKWARD)
def test_kernel_equals_the_reference(name: str) -> None:
    assert_equals_the_reference(AWKWARD[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    assert_equals_the_reference(values)
    for part in values.chunk(64):
        assert_equals_the_reference(part)
    assert_equals_the_reference(values[torch.randperm(len(values), generator=generator())])


@pytest.mark.parametrize(
    "values",
    [
        of_bits(0, 4000),
        of_bits(0x007FF000, 0x00801000),
        of_bits(0x7F7FE000, 0x7F802000),
        of_bits(0xFF7FE000, 0xFF802000),
        of_bits(0x7F800001, 0x7FFFFFFF, 9973),
        of_bits(0, 2**32, 65_537),
        of_bits(0x3F7FE000, 0x3F802000),
        torch.tensor([-0.0] * 3000),
        torch.tensor([0.0] * 20_000 + [1e-45] * 3 + [0.0] * 20_000),
    ],
    ids=["subnormal", "least normal", "largest", "negative", "NaN payloads", "all", "a bin's edge", "-0", "one bin"],
)
def test_float32_at_its_edges(values: torch.Tensor) -> None:
    assert_equals_the_reference(values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sizes_around_chunks(size: int, dtype: torch.dtype) -> None:
    assert_equals_the_reference((normal(size) * 0.01).to(dtype))


def kinds(size: int) -> dict[str, torch.Tensor]:
    """What takes the kernel's different ways, and changes between them."""
    normals = normal(size)
    spans = torch.exp2(40 * torch.rand(size, generator=generator(2)) - 20)
    outliers = normals.clone()
    outliers[:: size // 97] *= 1e12
    rising = torch.exp2(torch.linspace(-120, 120, size)) * normals
    nonfinite = torch.relu(normals)
    nonfinite[[size // 3, size // 2, -1]] = torch.tensor([math.inf, -math.inf, math.nan])
    return {
        "relu": torch.relu(normals),
        "sparse": torch.relu(normals - 1.28),
        "constant": torch.full((size,), -0.37),
        "mask": (normals > 0).float(),
        "wide": spans,
        "outliers": outliers,
        "rising": rising,
        "heavy": normals / normal(size, 3).abs().clamp(min=1e-9),
        "zeros first": torch.cat([torch.zeros(size // 2), normals[: size - size // 2]]),
        "nonfinite": nonfinite,
        "subnormal": torch.cat([normals[: size // 2], normals[size // 2 :] * 1e-39]),
    }


@pytest.mark.parametrize("name", kinds(400))
@pytest.mark.parametrize("number", [1, 2])
def test_ways_through_the_kernel(name: str, number: int, shares: Callable[[int], None]) -> None:
    shares(number)
    assert_equals_the_reference(kinds(3 * SMALLEST_SHARE + 77)[name])


@pytest.mark.parametrize("octaves", [1, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 40, 120, 240])
def test_windows_of_octaves_join_without_a_gap(octaves: int) -> None:
    """Every bin of so many octaves: what the window does not hold is listed, or counted by increments."""
    highest = (127 + octaves // 2) << MANTISSA_BITS
    values = of_bits(highest - (octaves << MANTISSA_BITS), highest, 1 << BIN_SHIFT - 2).repeat(9)
    assert_equals_the_reference(values[torch.randperm(len(values), generator=generator(octaves))])


@pytest.mark.parametrize("outside", [1, 63, 64, 65, 66, 500])
@pytest.mark.parametrize("what", [0.0, 1e-4, 1e-30, 1e4, 1e30, 1e-40, math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_outside_the_window_are_counted_be_they_few_or_many(
    what: float, outside: int, dtype: torch.dtype
) -> None:
    values = normal(3 * 2048).to(dtype)
    values[2048 : 2048 + outside] = what
    assert_equals_the_reference(values)


@pytest.mark.parametrize("further", [1.0078125, 3.125])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_go_further_within_their_bin(further: float, dtype: torch.dtype) -> None:
    """In a later chunk, and by so little that its bin is one that has been met."""
    values = 1.25 + torch.rand(4 * 2048, generator=generator())
    values[:2] = torch.tensor([1.0625, 3.0625])  # so that no later chunk but the last meets these bins
    values = values.to(dtype)
    values[3 * 2048 + 5] = further
    assert_equals_the_reference(values)


@pytest.mark.parametrize("shares_outside", [(0.002, 0.0), (0.0, 0.002), (0.01, 0.01), (0.3, 0.3)])
@pytest.mark.parametrize("apart", [2.0**9, 2.0**16, 2.0**25, 2.0**60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_on_both_sides_of_the_window(
    shares_outside: tuple[float, float], apart: float, dtype: torch.dtype
) -> None:
    values, drawn = normal(8 * 2048), torch.rand(8 * 2048, generator=generator(1))
    below, above = shares_outside
    values = torch.where(drawn < below, values / apart, torch.where(drawn > 1 - above, values * apart, values))
    values[::50] = 0.0
    assert_equals_the_reference(values.to(dtype))


def test_values_move_from_one_window_to_another() -> None:
    assert_equals_the_reference(torch.cat([normal(4096) * scale for scale in (1.0, 1e-20, 1e20, 1e-30, 1.0)]))


def stretches(seed: int) -> torch.Tensor:
    """Stretches of many kinds and lengths, one after another: each may leave the kernel with the wrong window."""
    draw = generator(seed)
    pieces = []
    for _ in range(int(torch.randint(1, 12, (), generator=draw))):
        size = int(torch.randint(1, 6000, (), generator=draw))
        scale = 2.0 ** int(torch.randint(-140, 120, (), generator=draw))
        plain, spread = torch.randn(size, generator=draw), torch.rand(size, generator=draw)
        kind = int(torch.randint(6, (), generator=draw))
        piece = (
            plain * scale,
            torch.full((size,), scale),
            plain * 0.0,
            torch.exp2(240 * spread - 120) * plain.sign(),
            torch.where(spread < 0.3, plain * scale, 0.0),
            torch.where(spread < 0.01, math.inf, torch.where(spread < 0.02, math.nan, plain * scale)),
        )[kind]
        pieces.append(piece)
    return torch.cat(pieces)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stretches_of_many_kinds(seed: int, dtype: torch.dtype) -> None:
    values = stretches(seed).to(dtype)
    assert_equals_the_reference(values)
    assert_equals_the_reference(values[seed:])  # of another alignment


PLAIN = """
import torch
from probes import bit_planes, pairs
from tests.test_sketch import AWKWARD, assert_equals_the_reference, normal
assert not bit_planes.AVAILABLE and not pairs.READS_FLOAT16
for values in (*AWKWARD.values(), normal(200_003), normal(70_000).relu(), normal(6000).view(60, 100).t()):
    assert_equals_the_reference(values)
"""


@pytest.mark.slow
def test_a_processor_without_these_instructions_counts_the_same(tmp_path: Path) -> None:
    """In a process of its own, as numba settles at its start what it compiles for."""
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", PLAIN], check=True, env={**os.environ, **plain})


WITH_PLANES = """
from numba import float64, int64, uint16, uint32
from probes import bit_planes
from probes.chunk_planes import take_planes
assert bit_planes.AVAILABLE
take_planes.compile((int64, int64, int64, uint32[::1], uint16[::1], float64[::1], uint32[::1], uint32))
assert "zmm" in take_planes.inspect_asm(take_planes.signatures[0])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="its instructions are those of x86-64")
def test_the_kernel_for_avx512_compiles_where_it_cannot_run(tmp_path: Path) -> None:
    features = "avx avx2 fma bmi bmi2 popcnt f16c lzcnt avx512f avx512bw avx512vl avx512dq avx512cd avx512vbmi gfni"
    features += " avx512vbmi2 avx512bitalg avx512vpopcntdq"
    named = ",".join(f"+{feature}" for feature in features.split())
    other = {"NUMBA_CPU_NAME": "znver4", "NUMBA_CPU_FEATURES": named, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", WITH_PLANES], check=True, env={**os.environ, **other})


SHARED = """
import torch
from probes.sketch import SketchArray
torch.set_num_threads(2)
SketchArray(1).add(0, torch.ones(1 << 18))
assert torch.get_num_threads() == 2, torch.get_num_threads()
"""


def test_torch_keeps_its_number_of_threads() -> None:
    """In a process of its own, as numba's threads start once, and with more of them than torch has."""
    subprocess.run([sys.executable, "-c", SHARED], check=True, env={**os.environ, "NUMBA_NUM_THREADS": "3"})


@pytest.mark.parametrize("number", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_do_not_matter(number: int, dtype: torch.dtype, shares: Callable[[int], None]) -> None:
    values = normal(5 * SMALLEST_SHARE + 1).to(dtype)
    shares(1)
    alone = sketched(values), sketched(values.view(-1, 3)[:, :2])
    shares(number)
    for (sums, extremes), expected in zip((sketched(values), sketched(values.view(-1, 3)[:, :2])), alone, strict=True):
        assert torch.equal(sums[:SUM_OF_SQUARES], expected[0][:SUM_OF_SQUARES])
        assert torch.equal(extremes, expected[1])


def test_many_threads_at_once_have_tables_of_their_own() -> None:
    tensors = [normal(50_000, seed) for seed in range(8)]
    expected = [sketched(values) for values in tensors]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for (sums, extremes), (one, other) in zip(pool.map(sketched, tensors), expected, strict=True):
                assert torch.equal(sums[:SUM_OF_SQUARES], one[:SUM_OF_SQUARES])
                assert torch.equal(extremes, other)


def test_a_forked_child_sketches() -> None:
    sketched(normal(2 * SMALLEST_SHARE))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_the_child, args=(queue,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork where there are threads
        child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == 4 * SMALLEST_SHARE


def _in_the_child(queue: SimpleQueue[float]) -> None:
    torch.set_num_threads(1)
    sums, _ = sketched(torch.ones(4 * SMALLEST_SHARE))
    queue.put(float(sums[:BINS].sum()))


big = torch.randn(96, 40, 64, generator=generator(12))
LAYOUTS = {
    "transposed": big.transpose(0, 2),
    "every other column": big[:, :, ::2],
    "every other row": big[:, ::2],
    "a part of each row": big[:, :, 5:37],
    "a head": big.view(96, 40, 4, 16).transpose(1, 2)[:, 1],
    "a corner": big[3:90, 2:39, 1:63],
    "expanded": big[:, :1].expand(96, 40, 64),
    "expanded over all": big[0, 0, 0].expand(50, 60),
    "expanded and sliced": big[:, None, :, ::3].expand(96, 3, 40, 22),
    "windows": big.view(-1).unfold(0, 8, 3),
    "one column": big[:, 0, 0],
    "channels last": big[None].to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layouts(name: str, dtype: torch.dtype) -> None:
    values = LAYOUTS[name] if dtype == torch.float32 else None
    if values is None:
        source = big.to(dtype)
        values = source.as_strided(LAYOUTS[name].shape, LAYOUTS[name].stride(), LAYOUTS[name].storage_offset())
    assert_equals_the_reference(values)
    sums, _ = sketched(values)
    assert sums[:ZEROS].sum() == values.numel()


def test_a_repeated_element_counts_as_often_as_it_is_repeated() -> None:
    sums, extremes = sketched(torch.tensor([[3.0], [0.0]]).expand(2, 1000))
    assert sums[ZEROS] == 1000
    assert sums[SUM_OF_SQUARES] == 9000
    assert sums[:BINS].sum() == 1000
    assert extremes[DISTINCT] == 1


def test_a_negated_view_is_read_as_it_reads() -> None:
    infinite = torch.tensor([complex(0, math.inf), complex(0, -1)]).conj().imag
    assert infinite.is_neg()
    sums, _ = sketched(infinite)
    assert sums[NEGATIVE_INFS] == 1


def test_what_has_no_memory_is_refused() -> None:
    with pytest.raises(UnsupportedTensor, match="strided"):
        SketchArray(1).add(0, torch.eye(3).to_sparse())
    with pytest.raises(UnsupportedTensor, match="meta"):
        SketchArray(1).add(0, torch.empty(3, device="meta"))
    with pytest.raises(UnsupportedTensor, match="storage"):
        torch.func.vmap(lambda x: SketchArray(1).add(0, x))(torch.ones(3, 2))
    with pytest.raises(UnsupportedTensor, match="no memory"):
        SketchArray(1).add(0, torch._efficientzerotensor(3))


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_beyond_the_array_is_refused(slot: int) -> None:
    with pytest.raises(IndexError, match="reserve"):
        SketchArray(2).add(slot, torch.ones(3))


def test_parameters_and_subclasses_are_read() -> None:
    class Marked(torch.Tensor):
        pass

    for values in (torch.nn.Parameter(torch.ones(3)), torch.ones(3).as_subclass(Marked)):
        assert sketched(values)[0][:BINS].sum() == 3


def test_memory_is_bounded_while_an_array_grows() -> None:
    for slots in (1, 64, 100):
        array, most = SketchArray(slots), 0
        while array.slots < 5000:
            before = array.bytes
            array.reserve(array.slots + 1)
            most = max(most, array.bytes + (before if array.bytes != before else 0))
        assert most <= 256 << 20, slots
        assert array.bytes >= 5000 * (8 * SUMS + 16)


def test_draining_hands_over_and_starts_anew() -> None:
    array = SketchArray(2)
    array.add(0, torch.ones(5))
    sums, extremes = array.drain()
    assert sums.shape == (2, SUMS)
    assert sums[0].sum() == 10  # five elements in a bin, and the sum of their squares
    assert not array.sums.any()
    array.add(0, torch.full((3,), 2.0))
    assert sums[0].sum() == 10
    assert extremes[0, 0] == 1
    assert array.extremes.tolist() == [[2, -2, 0, 1], list(sketch.EMPTY_EXTREMES)]


@pytest.mark.parametrize("name", AWKWARD)
def test_sketch_says_what_the_tensor_holds(name: str) -> None:
    values = AWKWARD[name].float().reshape(-1)
    sums, extremes = sketched(AWKWARD[name])
    finite = values[values.isfinite()]
    nonzero = finite[finite != 0].abs()
    assert sums[ZEROS] == (values == 0).sum()
    assert sums[NANS] == values.isnan().sum()
    assert sums[ZEROS + 2] == values.isposinf().sum()
    assert sums[ZEROS + 3] == values.isneginf().sum()
    assert sums[:BINS].sum() == len(nonzero)
    if len(nonzero):
        assert extremes[0] == nonzero.max()
        assert -extremes[1] == nonzero.min()
        expected, _ = np.histogram(nonzero.double().numpy(), BIN_EDGES)
        assert np.array_equal(sums[:BINS].numpy(), expected)


def test_bins_are_eight_an_octave() -> None:
    octave = BIN_EDGES[(BIN_EDGES >= 1) & (BIN_EDGES < 2)]
    assert octave.tolist() == [1 + i / 8 for i in range(8)]


def test_sketches_add_up() -> None:
    parts = AWKWARD["rows"].chunk(7)
    whole_sums, whole_extremes = sketched(AWKWARD["rows"])
    sums, extremes = sketched(*parts)
    assert torch.equal(sums[:SUM_OF_SQUARES], whole_sums[:SUM_OF_SQUARES])
    assert torch.equal(extremes[:DISTINCT], whole_extremes[:DISTINCT])


def test_arrays_merge_by_one_sum_and_one_max() -> None:
    here, there = SketchArray(1), SketchArray(2)
    here.add(0, AWKWARD["nonfinite"])
    there.add(0, AWKWARD["rows"])
    there.add(1, AWKWARD["bf16"])
    here.merge(there)
    both, _ = sketched(AWKWARD["nonfinite"], AWKWARD["rows"])
    assert torch.equal(here.sums[0, :SUM_OF_SQUARES], both[:SUM_OF_SQUARES])
    assert torch.equal(here.extremes[1], there.extremes[1])


def test_reserve_keeps_what_is_recorded() -> None:
    array = SketchArray(1)
    array.add(0, AWKWARD["rows"])
    before = array.sums[0].clone()
    array.reserve(100)
    assert len(array.sums) >= 100
    assert torch.equal(array.sums[0], before)


@pytest.mark.parametrize(
    ("values", "bits"), [([1.0, 1.5, 3.0], 1), ([1.0, 2.0, 4.0], 0), ([1 + 2**-7], 7), ([0.1], 23)]
)
def test_significant_bits(values: list[float], bits: int) -> None:
    _, extremes = sketched(torch.tensor(values))
    assert extremes[SIGNIFICANT_BITS] == bits


def test_distinct_counts_values_and_not_elements() -> None:
    _, extremes = sketched(torch.randint(1, 18, (20_000,), generator=generator()).float())
    assert 15 <= extremes[DISTINCT] <= 19


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedTensor, match=str(dtype).removeprefix("torch.")):
        SketchArray(1).add(0, torch.ones(3).to(dtype))


def test_the_tensor_is_left_alone() -> None:
    values = torch.randn(100, 5, generator=generator(), requires_grad=True)
    before = values.detach().clone()
    SketchArray(1).add(0, values)
    assert torch.equal(values, before)
    assert values._version == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_was_read_can_still_be_resized(dtype: torch.dtype) -> None:
    values = torch.ones(6, 4, dtype=dtype)
    for view in (values, values.t(), values[:, ::2], values[:, 1:3]):
        SketchArray(1).add(0, view)
    assert values.untyped_storage().resizable()
