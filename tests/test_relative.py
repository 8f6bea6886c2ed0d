"""Relative sketches: the kernel against the plain reference, and both against what casts take for scales."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from probes import relative_kernels, scaling
from probes.casts import Cast
from probes.errors import MalformedWindow, UnsupportedTensor
from probes.relative import RelativeArray, add_reference, bytes_a_slot, bytes_of, references, size_of
from probes.relative_history import RelativeHistory, RelativeRow
from probes.relative_layout import BINS, EXTREME, FOURTHS, TAIL, TILES
from probes.tiles import CLASSES, DEFAULT, Axis, Tiling, tilings_of

NAN, INF = math.nan, math.inf
GRANULARITIES = ("row", "block32", "block16", "block1x128", "block128x128")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (3 * torch.randn(shape, generator=generator)).exp()


def spoiled(x: Tensor) -> Tensor:
    """With zeros, a row of them, NaN, Inf, and subnormals."""
    flat = x.clone().view(-1)
    flat[::17], flat[5 % len(flat)], flat[7 % len(flat)] = 0, NAN, -INF
    flat[len(flat) // 2 :: 13] = 1e-42
    whole = flat.view(x.shape)
    if x.dim():
        whole[0] = 0
    return whole


def tilings(dimensions: int) -> Iterator[Tiling]:
    for granularity in GRANULARITIES:
        for kind in CLASSES:
            for dimension in range(-max(dimensions, 1), 0):
                yield Tiling(granularity, kind, Axis(dimension))
                yield Tiling(granularity, kind, Axis(dimension, across=True))


def sketch(x: Tensor, tiling: Tiling) -> Tensor:
    sums = torch.zeros(size_of(tiling.classes), dtype=torch.float64)
    add_reference(sums, x, tiling)
    return sums


def parts(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    half = (len(sums) - TAIL) // 2
    return sums[:half].view(-1, BINS), sums[half : 2 * half].view(-1, BINS), sums[2 * half :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1, 1), (100,), (37, 100), (3, 50, 70), (130, 300), (2, 6, 5, 7)], ids=str)
def test_the_kernel_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for x in (numbers(*shape).to(dtype), spoiled(numbers(*shape)).to(dtype)):
        for tiling in tilings(x.dim()):
            ours = torch.zeros(size_of(tiling.classes), dtype=torch.float64)
            relative_kernels.add(ours, x, tiling)
            expected = sketch(x, tiling)
            assert torch.equal(parts(ours)[0], parts(expected)[0]), tiling.key
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0.0, msg=tiling.key)


@pytest.mark.parametrize("shape", [(70, 1000), (1000, 70), (140, 9000)], ids=str)
def test_panels_meet_without_a_seam(shape: tuple[int, int]) -> None:
    """Tensors larger than what the kernel takes at once, whichever way their tiles lie."""
    x = numbers(*shape)
    for granularity in ("row", "block32", "block128x128"):
        for across in (False, True):
            tiling = Tiling(granularity, "e8m0", Axis(-1, across))
            ours = torch.zeros(size_of(tiling.classes), dtype=torch.float64)
            relative_kernels.add(ours, x, tiling)
            torch.testing.assert_close(ours, sketch(x, tiling), rtol=1e-12, atol=0.0)


def test_any_strides_and_none_of_the_tensor_changed() -> None:
    x = numbers(60, 80)
    tiling = Tiling("block32", "e8m0", Axis(-1))
    for view in (x.T, x[::2, 1::3], x[0].expand(5, 80), x.view(4, 15, 80).transpose(0, 1)):
        before, array = view.clone(), RelativeArray[str]()
        array.add("a", view, tiling)
        array.end_step(0)
        expected = RelativeRow.of(0, sketch(view.contiguous(), tiling).numpy())
        assert (array.rows()["a"][0].counts == expected.counts).all()
        assert torch.equal(view, before)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_counts_are_of_finite_non_zero_elements(granularity: str) -> None:
    x = spoiled(numbers(200, 300))
    for kind in CLASSES:
        counts, squares, tail = parts(sketch(x, Tiling(granularity, kind, Axis(-1))))
        assert counts.sum() == ((x != 0) & x.isfinite()).sum()
        assert ((counts > 0) == (squares > 0)).all()
        tile = scaling.TILES[granularity]
        assert tail[TILES] == (scaling.tile_amax(x, tile) > 0).sum()


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1", "e2m3", "int8", "fp16"])
def test_scales_are_multiples_of_the_reference(name: str) -> None:
    """What the sketch rests on: a rule's scale over R depends on the format and the class of the tile alone."""
    amax = torch.from_numpy(2.0 ** np.random.default_rng(0).uniform(-60, 60, 5000)).float()
    target = Cast.parse(f"{name}/none").format

    def scale(granularity: str, rule: str, of: Tensor) -> Tensor:
        scale = Cast.parse(f"{name}/{granularity}/{rule}").scale
        assert scale is not None
        return scaling.scale_of(of, scale, target, of.amax()).double()

    reference, _ = references(amax, "current")
    torch.testing.assert_close(scale("row", "current", amax), reference.double() / target.largest, rtol=1e-6, atol=0.0)
    reference, tile_class = references(amax, "e8m0")
    assert torch.equal(scale("block32", "e8m0", amax), reference.double() * 2.0**-target.emax)
    ratio = scale("block32", "e8m0up", amax) / reference
    for each in range(8 if name != "fp16" else 7):  # fp16's significand is decided within the last class
        assert len(ratio[tile_class == each].unique()) <= 1
    assert len(ratio.unique()) == 2
    near = amax[(amax > 2.0**-10) & (amax < 2.0**10)]
    reference, tile_class = references(near, "nvfp4")
    quotient = scale("block16", "nvfp4", near) * target.largest / reference
    assert ((quotient - 1).abs() < 1e-6).double().mean() > 0.99  # but for ties that float32 rounds another way
    assert ((near / reference)[tile_class < 8] <= 1 + 1 / (16.0 + 2 * tile_class[tile_class < 8])).all()


def test_the_largest_of_each_tile_has_a_bin_of_its_own() -> None:
    x = numbers(50, 64)
    for kind, classes in CLASSES.items():
        counts, squares, _ = parts(sketch(x, Tiling("row", kind, Axis(-1))))
        assert counts[classes - 1].sum() == 50
        reference, _ = references(x.abs().amax(dim=1), kind)
        torch.testing.assert_close(squares[classes - 1].sum(), reference.double().square().sum())
    counts, _, _ = parts(sketch(torch.full((3, 40), 1.75), Tiling("block32", "current", Axis(-1))))
    assert counts[1].nonzero().tolist() == [[128 + 192]]  # 1.75: 128 bins below 1 and three quarters of an octave
    assert counts.sum() == counts[1].sum() == 120


def test_a_ragged_last_block_is_a_tile() -> None:
    x = torch.ones(2, 100)
    x[:, 96:] = 1000
    counts, _, tail = parts(sketch(x, Tiling("block32", "current", Axis(-1))))
    assert tail[TILES] == 8
    assert counts[1].sum() == 200  # all are the largest of their tile


def test_small_and_large_tiles_are_counted_apart() -> None:
    x = torch.tensor([[1e-35, 2e-35, 0.0], [1.0, 1e-35, 3.0], [3e38, 1.0, 2.0]])
    _, _, tail = parts(sketch(x, Tiling("row", "current", Axis(-1))))
    assert tail[EXTREME] == 5
    fourths = 2 * float(x[0, 1].double()) ** 4 + 3 * 81.0 + 3 * float(x[2, 0].double()) ** 4
    assert tail[FOURTHS] == pytest.approx(fourths)


def test_nothing_and_nonsense() -> None:
    array = RelativeArray[str]()
    tiling = Tiling("row", "nvfp4", Axis(-1))
    array.add("empty", torch.empty(0, 5), tiling)
    array.add("zeros", torch.zeros(4, 5), tiling)
    array.add("nothing finite", torch.full((4, 5), NAN), tiling)
    array.end_step(0)
    assert array.rows() == {}
    with pytest.raises(UnsupportedTensor, match="int64"):
        array.add("whole", torch.arange(5), tiling)


# ---- steps, ranks, bytes


def recorded(*steps: tuple[int, Tensor], tiling: Tiling, factor: float = 1.0) -> RelativeHistory:
    array = RelativeArray[str]()
    for step, x in steps:
        array.add("slot", x, tiling, factor)
        array.end_step(step)
    return RelativeHistory.of(array.rows().get("slot", []))


def same(one: RelativeHistory, other: RelativeHistory) -> bool:
    return all(np.array_equal(value, getattr(other, name)) for name, value in vars(one).items())


def test_keys_grow_side_by_side_and_steps_start_anew() -> None:
    array, x = RelativeArray[str](), numbers(30, 40)
    by_row, by_block = Tiling("row", "current", Axis(-1)), Tiling("block32", "e8m0", Axis(-1))
    for step in range(3):
        array.add("rows", x, by_row)
        if step:
            for key in "abcdef":
                array.add(key, x, by_block)
        array.end_step(step)
    rows = array.rows()
    assert [row.step for row in rows["rows"]] == [0, 1, 2]
    assert [row.step for row in rows["f"]] == [1, 2]
    assert all((row.counts == rows["rows"][0].counts).all() for row in rows["rows"])
    assert not array.sums.any()
    assert len(array.sums) * 8 >= bytes_of(by_row) + 6 * bytes_of(by_block)


def test_what_a_slot_takes_is_known_before() -> None:
    array, x = RelativeArray[str](), numbers(4, 30, 40)
    for names in (["row"], ["row", "block32", "block16/e8m0", "block128x128"]):
        array = RelativeArray[str]()
        for tiling in tilings_of(names, "bmm", ("lhs", "rhs"), "lhs", 3):
            array.add(tiling.key, x, tiling)
        assert sum(8 * size_of(tiling.classes) for tiling in tilings_of(names, "bmm", ("lhs", "rhs"), "lhs", 3)) == (
            bytes_a_slot(names)
        )
        assert bytes_a_slot(names) <= 8 * len(array.sums) <= 2 * bytes_a_slot(names)
    assert bytes_a_slot(DEFAULT) == 2 * (12_320 + 55_328)


def test_dense_numbers_of_ranks_add_up_to_the_joined_batch() -> None:
    """What an all-reduce with SUM does; tiles along the last dimension do not care which rank they are on."""
    x, tiling = numbers(64, 96), Tiling("block32", "e8m0", Axis(-1))
    ranks = [recorded((4, half), tiling=tiling).rows()[0] for half in (x[:20], x[20:])]
    joined = RelativeHistory.of([RelativeRow.of(4, ranks[0].dense() + ranks[1].dense())])
    whole = recorded((4, x), tiling=tiling)
    assert same(joined, whole)
    assert same(RelativeHistory.of(ranks), whole)  # rows of one step are added, too


def test_a_factor_multiplies_what_is_sketched() -> None:
    x, tiling = numbers(8, 64), Tiling("row", "current", Axis(-1))
    whole, half = recorded((0, x), tiling=tiling), recorded((0, x), tiling=tiling, factor=0.5)
    assert np.array_equal(whole.cells, half.cells)
    assert np.allclose(whole.squares, 4 * half.squares)


def test_packing_round_trips() -> None:
    tiling = Tiling("block16", "nvfp4", Axis(-1))
    for steps in ([], [(2, numbers(9, 50))], [(0, numbers(9, 50)), (5, numbers(4, 4, seed=1)), (6, torch.ones(3))]):
        history = recorded(*steps, tiling=tiling)
        assert same(RelativeHistory.unpack(history.pack()), history)


def test_hostile_bytes_are_refused() -> None:
    data = recorded((0, numbers(9, 50)), (1, numbers(9, 50)), tiling=Tiling("row", "e8m0", Axis(-1))).pack()
    for cut in (*range(20), len(data) // 2, len(data) - 1):
        with pytest.raises(MalformedWindow):
            RelativeHistory.unpack(data[:cut])
    with pytest.raises(MalformedWindow):
        RelativeHistory.unpack(data + b"\0")
    with pytest.raises(MalformedWindow):
        RelativeHistory.unpack(data[:4] + b"\xff" * 12 + data[16:])
    generator = np.random.default_rng(0)
    for _ in range(300):
        spoiled = bytearray(data)
        spoiled[generator.integers(len(data))] ^= int(generator.integers(1, 256))
        try:
            RelativeHistory.unpack(bytes(spoiled)).checked()
        except MalformedWindow:
            continue


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cells", np.array([7, 7], dtype=np.uint16)),
        ("cells", np.array([9, 7], dtype=np.uint16)),
        ("cells", np.array([1, 60_000], dtype=np.uint16)),
        ("counts", np.array([1, 0])),
        ("counts", np.array([1, 2**60])),
        ("squares", np.array([1.0, NAN])),
        ("squares", np.array([1.0, -1.0])),
        ("squares", np.array([1.0, 1e300])),
        ("fourths", np.array([INF])),
        ("fourths", np.array([-1.0])),
        ("tiles", np.array([-1])),
        ("extreme", np.array([2**60])),
        ("steps", np.array([-3])),
    ],
)
def test_contradictions_are_refused(name: str, value: np.ndarray) -> None:
    held = {
        "steps": np.array([0]),
        "offsets": np.array([0, 2]),
        "cells": np.array([3, 7], dtype=np.uint16),
        "counts": np.array([1, 2]),
        "squares": np.array([1.0, 2.0]),
        "fourths": np.array([3.0]),
        "tiles": np.array([1]),
        "extreme": np.array([0]),
    }
    assert RelativeHistory.unpack(RelativeHistory(**held).pack()).tiles.tolist() == [1]
    with pytest.raises(MalformedWindow):
        RelativeHistory.unpack(RelativeHistory(**{**held, name: value}).pack())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_tiles_are_those_that_a_cast_scales(granularity: str) -> None:
    """A cast along a dimension is the cast of the tiling's matrix; across the last one, of its transpose."""
    x, cast = numbers(6, 140, 10), Cast.parse(f"e4m3fn/{granularity}/current")
    for dimension in (-1, -2, -3):
        matrix = Tiling(granularity, "current", Axis(dimension)).matrix(x)
        assert torch.equal(scaling.as_shaped(cast(matrix), x, dimension), cast(x, dimension=dimension))
    across = Tiling(granularity, "current", Axis(-1, across=True)).matrix(x)
    assert torch.equal(cast(across).T, cast(x.view(-1, 10), dimension=0))
