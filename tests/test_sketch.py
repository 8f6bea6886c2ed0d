"""The compiled sketch equals the plain one, and both equal what a tensor holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes import sketch
from probes.errors import UnsupportedTensor
from probes.layout import BINS, DISTINCT, NANS, SIGNIFICANT_BITS, SUM_OF_SQUARES, SUMS, ZEROS
from probes.sketch import BIN_EDGES, SketchArray, add_reference
from tests.tensors import AWKWARD, generator


def sketched(*values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    array = SketchArray(3)
    for value in values:
        array.add(1, value)
    assert not array.sums[[0, 2]].any()
    return array.sums[1], array.extremes[1]


@pytest.mark.parametrize("name", AWKWARD)
def test_kernel_equals_the_reference(name: str) -> None:
    values = AWKWARD[name]
    sums, extremes = torch.zeros(SUMS, dtype=torch.float64), torch.tensor(sketch.EMPTY_EXTREMES)
    if values.numel():
        add_reference(sums, extremes, values)
    got_sums, got_extremes = sketched(values)
    torch.testing.assert_close(got_sums[SUM_OF_SQUARES], sums[SUM_OF_SQUARES], rtol=1e-12, atol=0)
    got_sums[SUM_OF_SQUARES] = sums[SUM_OF_SQUARES]
    assert torch.equal(got_sums, sums)
    assert torch.equal(got_extremes, extremes)


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
