"""The backward error is its formula, its histogram tells its quantiles, and Student-t matrices show what is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tensors import generator
from torch import Tensor

from probes.backward_error import (
    LAST_BIN,
    ErrorHistogram,
    backward_errors,
    histograms,
    product_and_magnitudes,
)
from probes.casts import Cast
from probes.contractions.contraction import Extent
from probes.errors import InvalidCast
from probes.numbers import plain
from probes.self_check import CROSSOVERS, SelfCheck, crossover, disagreements, lines, self_check


def by_the_formula(left: Tensor, right: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """|L·R − Q(L)·Q(R)| / (|L|·|R|), element by element, as a loop over the sum."""
    error, magnitude = torch.zeros(len(left), len(right)).double(), torch.zeros(len(left), len(right)).double()
    for k in range(left.shape[1]):
        exact = left[:, k, None].double() * right[None, :, k].double()
        error += exact - first[:, k, None].double() * second[None, :, k].double()
        magnitude += exact.abs()
    return error.abs() / magnitude


@pytest.mark.parametrize("text", ["int8", "e4m3fn/row", "e5m2/block32/e8m0", "fp16", "bf16/row", "int8/tensor/delayed"])
def test_it_is_the_formula(text: str) -> None:
    cast, random = Cast.parse(text), generator(1)
    left, right = torch.randn(9, 70, generator=random), torch.randn(6, 70, generator=random)
    expected = by_the_formula(left, right, cast(left), cast(right))
    assert torch.allclose(backward_errors(left, right, cast), expected, rtol=1e-9, atol=1e-15)


def test_a_part_is_scaled_as_the_whole() -> None:
    left, right = torch.randn(40, 30, generator=generator(1)), torch.randn(20, 30, generator=generator(2))
    left[33, 3], right[17, 5] = 1000.0, -300.0
    extents = Extent.of(left), Extent.of(right)
    for text in ("int8", "int8/tensor/current:pow2", "e4m3fn/tensor/delayed(len=4,margin=2)", "int8/tensor/static=0.2"):
        cast = Cast.parse(text)
        whole = backward_errors(left, right, cast)[:8, :8]
        assert torch.allclose(backward_errors(left[:8], right[:8], cast, extents), whole, rtol=1e-9), text
        if not cast.is_static:
            assert not torch.allclose(backward_errors(left[:8], right[:8], cast), whole, rtol=1e-3), text


@pytest.mark.parametrize("text", ["int8/column", "e4m3fn/block128x128", "e2m1/block16/nvfp4"])
def test_scales_of_several_rows_cannot_be_sampled(text: str) -> None:
    x = torch.ones(4, 32)
    with pytest.raises(InvalidCast, match="cannot be sampled"):
        backward_errors(x, x, Cast.parse(text), (Extent(1.0, 1.0), Extent(1.0, 1.0)))


def test_what_is_no_number() -> None:
    left = torch.tensor([[0.0, 0.0], [1.0, math.nan], [math.inf, 1.0], [0.0, 2.0], [9e4, 1.0]])
    right = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    errors = backward_errors(left, right, Cast.parse("fp16:inf"))
    assert errors.isnan().tolist() == [[True, True], [True, True], [True, True], [False, True], [False, False]]
    assert errors[3, 0] == 0.0
    assert errors[4].tolist() == [math.inf, math.inf]
    exact, _ = product_and_magnitudes(left, right)
    (found,) = histograms(errors[None], exact)
    assert (found.sampled, found.measured, found.idle, found.non_finite, found.exact) == (10, 3, 3, 4, 1)
    assert found.largest == found.quantile(1.0) == math.inf
    made_nan = backward_errors(left[4:], right, Cast.parse("e4m3fn/none/nearest:inf"))
    assert made_nan.tolist() == [[math.inf, math.inf]]
    saturated = backward_errors(left, right, Cast.parse("fp16"))
    assert 0 < saturated[4, 1] == pytest.approx(1 - 65504 / 9e4)


def test_random_rounding_is_repeatable() -> None:
    cast, x = Cast.parse("e4m3fn/tensor/current/stochastic"), torch.randn(20, 30, generator=generator(1))
    errors = backward_errors(x, x[:5], cast)
    assert torch.equal(errors, backward_errors(x, x[:5], cast))
    assert errors.median() > backward_errors(x, x[:5], Cast.parse("e4m3fn")).median()


def histogram_of(values: Any) -> ErrorHistogram:
    errors = torch.tensor(values, dtype=torch.float64)
    return histograms(errors[None], torch.zeros_like(errors))[0]


def test_quantiles_are_within_a_bin() -> None:
    values = np.exp(np.random.default_rng(1).standard_normal(4000)) / 300
    found = histogram_of(values)
    for share in (0.01, 0.1, 0.5, 0.9, 0.99, 0.999):
        assert abs(math.log2(found.quantile(share) / np.quantile(values, share))) < 0.25
    assert abs(math.log2(found.quantile(0.5) / np.median(values))) < 0.03  # interpolated: far better where many are
    assert found.quantile(1.0) == values.max()
    shares = np.linspace(0, 1, 300)
    assert (np.diff([found.quantile(share) for share in shares]) >= 0).all()


def test_histograms_add() -> None:
    parts = [np.random.default_rng(seed).lognormal(seed, 1, 50 * seed) for seed in (1, 2, 3)]
    parts[1][:20], parts[2][7] = 0.0, math.nan
    one, two, three = map(histogram_of, parts)
    assert one.plus(two).plus(three) == three.plus(one.plus(two)) == histogram_of(np.concatenate(parts))
    assert ErrorHistogram().plus(one) == one.plus(ErrorHistogram()) == one
    assert one.plus(two).plus(three).idle == 1


def test_edges_of_a_histogram() -> None:
    assert math.isnan(ErrorHistogram().quantile(0.5))
    assert math.isnan(histogram_of([math.nan]).quantile(1.0))
    mostly_exact = histogram_of([0.0] * 9 + [0.25])
    assert (mostly_exact.quantile(0.5), mostly_exact.quantile(0.89), mostly_exact.quantile(1.0)) == (0.0, 0.0, 0.25)
    assert histogram_of([0.0, 0.0]).quantile(0.99) == 0.0
    assert histogram_of([1e-300, 1e300]).sampled == 2
    assert histogram_of([1e-300]).quantile(0.5) == 1e-300
    assert histogram_of([0.01]).quantile(0.5) <= 0.01
    with pytest.raises(ValueError, match="from 0 to 1"):
        ErrorHistogram().quantile(1.5)


@pytest.mark.parametrize("values", [[], [0.0], [math.nan, 0.5, 0.1, 0.0], [math.inf, 0.1]])
def test_a_histogram_reads_back(values: list[float]) -> None:
    found = histogram_of(values)
    assert ErrorHistogram.from_dict(json.loads(json.dumps(plain(found), allow_nan=False))) == found


@pytest.mark.parametrize(
    "change",
    [
        {"counts": [1, -1]},
        {"counts": [0.5]},
        {"counts": [True]},
        {"counts": 3},
        {"counts": [1] * 1000},
        {"counts": []},
        {"first": LAST_BIN + 1},
        {"first": -(10**9)},
        {"first": "NaN"},
        {"exact": 2**60},
        {"idle": None},
        {"largest": "NaN"},
        {"largest": -1.0},
        {"largest": 0.0},
        {"largest": "many"},
    ],
)
def test_a_histogram_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    good = plain(histogram_of([0.5, 0.1, 0.0]))
    assert ErrorHistogram.from_dict(good)
    with pytest.raises((TypeError, ValueError)):
        ErrorHistogram.from_dict({**good, **change})


def test_student_matrices_show_the_known_crossover() -> None:
    records = self_check(trials=2, freedom=(math.inf, 2.0, 3.0, 4.0, 15.0))
    assert [(one.granularity, one.freedom) for one in records] == [
        (by, nu) for by in ("tensor", "row") for nu in (2.0, 3.0, 4.0, 15.0, math.inf)
    ]
    assert disagreements(records) == []
    for granularity, known in CROSSOVERS.items():
        assert known.float_until <= crossover(records, granularity) <= known.integer_from
    text = "\n".join(lines(records))
    assert "0.0131 and 0.00245" in text
    assert "scale by row: int8 is better for ν above 2." in text


@pytest.mark.slow
def test_student_matrices_as_in_the_paper() -> None:
    records = self_check(trials=10)
    assert len(records) == 20
    assert disagreements(records) == []
    assert 5 < crossover(records, "tensor") < 9
    assert 2.2 < crossover(records, "row") < 2.8


def test_a_wrong_median_or_winner_is_told() -> None:
    good = SelfCheck(math.inf, "tensor", int8=0.00072, e4m3fn=0.00175, trials=3)
    assert disagreements([good]) == []
    assert "median of int8" in disagreements([replace(good, int8=0.0009)])[0]
    assert "median of e4m3fn" in disagreements([replace(good, e4m3fn=0.0018)])[0]
    assert "median of int8" in disagreements([replace(good, int8=math.nan)])[1]
    assert "e4m3fn is better" in disagreements([SelfCheck(8.0, "row", 0.002, 0.001, 3)])[0]
    assert "int8 is better" in disagreements([SelfCheck(2.0, "row", 0.001, 0.002, 3)])[0]
    assert disagreements([replace(good, int8=0.0009, size=100)]) == []


def test_crossover_is_between_the_records_that_differ() -> None:
    def records(*pairs: tuple[float, float]) -> list[SelfCheck]:
        return [SelfCheck(nu, "row", ratio, 1.0, 1) for nu, ratio in pairs]

    assert crossover(records((2, 2.0), (8, 0.5)), "row") == pytest.approx(4)
    assert 4 < crossover(records((2, 2.0), (4, 1.5), (math.inf, 0.5)), "row") < math.inf
    assert math.isnan(crossover(records((2, 2.0), (8, 1.5)), "row"))
    assert crossover(records((2, 0.5), (8, 0.5)), "row") == 0
    assert math.isnan(crossover(records((2, 2.0), (8, 0.5)), "tensor"))


def test_self_check_draws_from_no_stream_of_the_users() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = self_check(1, size=20, freedom=(3.0,))
    assert first == self_check(1, size=20, freedom=(3.0,))
    assert first != self_check(1, size=20, freedom=(3.0,), seed=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    for trials, size in ((0, 20), (1, 0)):
        with pytest.raises(ValueError, match="one trial"):
            self_check(trials, size)
