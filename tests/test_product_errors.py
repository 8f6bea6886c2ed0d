"""Backward errors of a site's products: sampled right, told apart, disturbing nothing."""

from __future__ import annotations

import gc
import json
import math
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensors import generator
from torch import Tensor, nn

from probes.backward_error import backward_errors, histograms, product_and_magnitudes
from probes.casts import Cast
from probes.contractions.contraction import Extent
from probes.errors import InvalidCast, WindowError
from probes.numbers import plain
from probes.ops import Operation
from probes.product_errors import CASTS, FORMATS, Crest, ProductError, pooled, site_backward_errors
from probes.sites import ProductCall, SiteHook

INT8, INT8_ROW = Cast.parse("int8"), Cast.parse("int8/row")


class Measuring(SiteHook):
    """Measures each product's backward errors when its gradient arrives, inside the user's backward."""

    def __init__(self, model: nn.Module, casts: tuple[Cast, ...] = CASTS) -> None:
        super().__init__(model)
        self.casts = casts
        self.met: list[str] = []
        self.found: list[ProductError] = []

    def on_product(self, call: ProductCall) -> Tensor:
        self.met.append(call.site)
        result = call.run()
        result.register_hook(lambda gradient: self.found.extend(site_backward_errors(call, gradient, self.casts)))
        return result

    def on_unplaced(self, operation: Operation) -> None:
        self.met.append(f"{operation.name}, met in backward")


def measured(
    run: Callable[..., Tensor], *operands: Tensor, casts: tuple[Cast, ...] = CASTS, gradient: Tensor | None = None
) -> dict[tuple[str, str], ProductError]:
    """By product and cast, of the one product of a function of these leaves."""
    model = nn.Module()
    model.forward = run  # type: ignore[method-assign]
    with Measuring(model, casts) as hook:
        result = model(*(operand.detach().clone().requires_grad_() for operand in operands))
        result.backward(torch.randn(result.shape, generator=generator(9)) if gradient is None else gradient)
    return {(one.product, one.cast): one for one in hook.found}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def test_the_default_casts_are_those_of_the_design() -> None:
    texts = {str(cast) for cast in CASTS}
    for name in FORMATS:
        assert {f"{name}/tensor/current/nearest", f"{name}/row/current/nearest"} <= texts
    assert {"fp16/none/nearest", "bf16/none/nearest"} <= texts


@pytest.mark.parametrize("cast", CASTS, ids=str)
def test_the_three_products_of_a_linear_layer(cast: Cast) -> None:
    """Small enough to be taken whole: the very errors of the dense products, scales along each inner dimension."""
    x, weight, gradient = randn(2, 8, 12, seed=1), randn(10, 12, seed=2), randn(2, 8, 10, seed=3)
    x[0, 0, 0], weight[3, 3], gradient[1, 2, 3] = 40.0, -9.0, 60.0
    found = measured(F.linear, x, weight, casts=(cast,), gradient=gradient)
    flat_x, flat_g = x.flatten(0, 1), gradient.flatten(0, 1)
    for name, left, right in (
        ("forward", flat_x, weight),
        ("input_grad", flat_g, weight.t()),
        ("weight_grad", flat_x.t(), flat_g.t()),
    ):
        exact, _ = product_and_magnitudes(left, right)
        expected = histograms(backward_errors(left.contiguous(), right.contiguous(), cast)[None], exact)[0]
        record = found[name, str(cast)]
        assert record.site == "(root)/linear.0"
        assert record.sampled == exact.numel()
        assert replace(record.errors, largest=0.0) == replace(expected, largest=0.0)
        assert record.errors.largest == pytest.approx(expected.largest)


def test_a_convolution_is_scaled_along_its_patches() -> None:
    x, weight = randn(2, 3, 7, seed=1), randn(4, 3, 3, seed=2)
    patches = F.pad(x, (1, 1)).unfold(2, 3, 1).permute(0, 2, 1, 3).reshape(14, 9)
    found = measured(lambda x, w: F.conv1d(x, w, padding=1), x, weight, casts=(INT8, INT8_ROW))
    exact, _ = product_and_magnitudes(patches, weight.flatten(1))
    for cast in (INT8, INT8_ROW):
        expected = histograms(backward_errors(patches, weight.flatten(1), cast)[None], exact)[0]
        record = found["forward", str(cast)]
        assert replace(record.errors, largest=0.0) == replace(expected, largest=0.0)


def test_all_six_products_of_attention() -> None:
    query, key, value = (randn(2, 2, 9, 8, seed=seed) for seed in (1, 2, 3))
    found = measured(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), query, key, value)
    names = ["scores", "values", "probabilities_grad", "query_grad", "key_grad", "value_grad"]
    assert list(dict.fromkeys(product for product, _ in found)) == names
    assert len(found) == len(names) * len(CASTS)
    for (product, cast), record in found.items():
        assert record.errors.measured > 0, product
        assert 0 <= record.quantiles[0.5] < 0.3, (product, cast)
    # The first query sees one key: a row of the values product that is one term, and zeros that are exact in int8.
    exact = found["values", "int8/row/current/nearest"].errors
    assert exact.sampled == 4 * 9 * 8


def test_a_sample_tells_the_whole() -> None:
    left, right = randn(600, 80, seed=1), randn(80, 500, seed=2)
    found = measured(torch.mm, left, right)
    for cast in CASTS:
        whole = backward_errors(left, right.t().contiguous(), cast)
        record = found["forward", str(cast)]
        assert record.sampled == 256
        # 256 of one entry are worth some 100 that are independent: the median is within 4 sigma, 1.25·0.8/10 each
        assert record.quantiles[0.5] == pytest.approx(float(whole.median()), rel=0.4)
        assert record.quantiles[1.0] <= float(whole.max()) * (1 + 1e-9)


def test_one_outlier_spoils_the_tensor_but_not_its_rows() -> None:
    left, right = randn(2000, 64, seed=1), randn(64, 300, seed=2)
    found = measured(torch.mm, left, right, casts=(INT8, INT8_ROW))
    left[777, 7] = 4000.0  # in one row of 2,000, which is most likely not among the sampled
    spoiled = measured(torch.mm, left, right, casts=(INT8, INT8_ROW))
    by_tensor, by_row = str(INT8), str(INT8_ROW)
    assert spoiled["forward", by_tensor].quantiles[0.5] > 50 * found["forward", by_tensor].quantiles[0.5]
    assert spoiled["forward", by_row].quantiles[0.5] == found["forward", by_row].quantiles[0.5]
    assert spoiled["forward", by_tensor].left.tensor > 50 * found["forward", by_tensor].left.tensor
    assert spoiled["forward", by_tensor].left.row == found["forward", by_tensor].left.row


def test_the_crest_explains_the_integer() -> None:
    """int8's error is proportional to √(crest² + crest²) of the two operands; e4m3fn's hardly moves."""
    integer, floating = [], []
    for freedom in (4.0, 6.0, 10.0, 30.0):
        draw = np.random.default_rng(int(freedom))
        left, right = (torch.from_numpy(draw.standard_t(freedom, (400, 400)).astype(np.float32)) for _ in range(2))
        found = measured(torch.mm, left, right, casts=(INT8, Cast.parse("e4m3fn")))
        record = found["forward", str(INT8)]
        # Per unit of RMS; the errors' own unit is the mean magnitude, smaller than the RMS where tails are heavy.
        rms_over_mean = [float(x.square().mean().sqrt() / x.abs().mean()) for x in (left, right)]
        crest = math.hypot(record.left.tensor, record.right.tensor) * math.prod(rms_over_mean)
        integer.append(record.quantiles[0.5] / crest)
        floating.append(found["forward", "e4m3fn/tensor/current/nearest"].quantiles[0.5])
        assert record.left.row < record.left.tensor
    assert max(integer) < 1.35 * min(integer)
    assert max(floating) < 1.6 * min(floating)


def test_crest_of_plain_rows() -> None:
    rows = torch.tensor([[1.0, -1.0], [0.0, 0.0], [math.nan, 3.0], [0.0, 2.0], [math.inf, math.nan]])
    crest = Crest.of(Extent.of(rows), rows[None])
    assert crest.tensor == pytest.approx(3 / math.sqrt((1 + 1 + 9 + 4) / 7))
    assert crest.row == 1.0  # of 1, 1 and √2; what has no crest does not count
    assert math.isnan(Crest.of(Extent.of(rows[1]), rows[1]).tensor)
    assert math.isnan(Crest.of(Extent.of(rows[1]), rows[1]).row)


def test_values_that_are_no_numbers_stay_in_their_rows() -> None:
    x, weight = randn(16, 8, seed=1), randn(16, 8, seed=2)
    x[0, 0], x[1, 1], weight[2, 2] = math.nan, math.inf, -math.inf
    found = measured(F.linear, x, weight)
    for cast in CASTS:
        errors = found["forward", str(cast)].errors
        assert errors.non_finite == 2 * 16 + 1 * 16 - 2
        assert errors.measured == 14 * 15
        assert 0 < errors.largest < 0.6
    assert found["input_grad", str(INT8)].errors.non_finite == 16
    broken = measured(F.linear, torch.full_like(x, math.nan), weight)
    assert math.isnan(broken["forward", str(INT8)].quantiles[0.5])
    assert math.isnan(broken["forward", str(INT8)].left.tensor)


def test_zeros_have_no_error() -> None:
    x, weight = randn(16, 8, seed=1), randn(16, 8, seed=2)
    x[:4] = 0.0
    record = measured(F.linear, x, weight)["forward", str(INT8)]
    assert (record.errors.idle, record.errors.measured) == (4 * 16, 12 * 16)
    nothing = measured(F.linear, torch.zeros(16, 8), weight)["forward", str(INT8)]
    assert nothing.errors.idle == 256
    assert math.isnan(nothing.quantiles[0.5])


def test_an_inner_dimension_of_one() -> None:
    found = measured(torch.mm, randn(9, 1, seed=1), randn(1, 7, seed=2))
    assert found["forward", str(INT8)].sampled == 63
    assert found["forward", str(INT8_ROW)].quantiles[1.0] < 1e-6  # each row is one number, which its scale makes exact


@pytest.mark.parametrize("shapes", [((0, 3), (3, 2)), ((2, 0), (0, 3)), ((0, 2, 3), (0, 3, 2))])
def test_products_of_nothing_have_no_record(shapes: tuple[tuple[int, ...], ...]) -> None:
    assert measured(torch.matmul, *(torch.zeros(shape) for shape in shapes)) == {}


def kept(run: Callable[..., Tensor], *operands: Tensor) -> ProductCall:
    class Keeping(SiteHook):
        def on_product(self, call: ProductCall) -> Tensor:
            self.call = call
            return call.run()

    model = nn.Module()
    model.forward = run  # type: ignore[method-assign]
    with Keeping(model) as hook:
        model(*operands)
    return hook.call


def test_without_a_gradient_the_forward_products_alone() -> None:
    x = randn(3, 4, 5, seed=1).requires_grad_()
    linear, attention = kept(F.linear, x, randn(6, 5, seed=2)), kept(F.scaled_dot_product_attention, x, x, x)
    assert [one.product for one in site_backward_errors(linear, None, [INT8])] == ["forward"]
    assert [one.product for one in site_backward_errors(attention, None, [INT8])] == ["scores", "values"]
    assert site_backward_errors(linear, None, []) == []


def test_autocast_does_not_reach_it() -> None:
    query = randn(2, 9, 8, seed=1).requires_grad_()
    call, gradient = kept(F.scaled_dot_product_attention, query, query, query), randn(2, 9, 8, seed=2)
    plain_errors = site_backward_errors(call, gradient)
    with torch.autocast("cpu"):
        assert site_backward_errors(call, gradient) == plain_errors


def test_each_seed_looks_elsewhere() -> None:
    call = kept(F.linear, randn(900, 40, seed=1), randn(700, 40, seed=2))
    assert site_backward_errors(call, None, [INT8]) == site_backward_errors(call, None, [INT8])
    assert site_backward_errors(call, None, [INT8]) != site_backward_errors(call, None, [INT8], seed=1)


def test_refusals() -> None:
    call = kept(F.linear, randn(3, 5, seed=1), randn(6, 5, seed=2))
    with pytest.raises(InvalidCast, match="cannot be sampled"):
        site_backward_errors(call, None, [Cast.parse("int8/column")])
    unknown = replace(call, operation=replace(call.operation, name="lstm"))
    with pytest.raises(WindowError, match="lstm"):
        site_backward_errors(unknown, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    found = measured(
        F.linear,
        randn(16, 8, seed=1).to(dtype),
        randn(16, 8, seed=2).to(dtype),
        gradient=randn(16, 16, seed=3).to(dtype),
    )
    assert 0 < found["forward", str(INT8)].quantiles[0.5] < 0.02
    own = {torch.float16: "fp16/none/nearest", torch.bfloat16: "bf16/none/nearest"}.get(dtype)
    if own is not None:
        assert found["forward", own].errors.exact == 256  # written as they are already


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.out = nn.Conv1d(4, 8, 3, padding=1), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.conv(x).transpose(1, 2))[:, None]
        h = F.dropout(F.scaled_dot_product_attention(h, h, h, dropout_p=0.1), 0.1)
        return self.out(h).square().mean()


def trained(probe: bool, autocast: bool = False) -> tuple[list[float], list[Tensor], Any]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    model = Small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses, hook = [], Measuring(model) if probe else SiteHook(model)
    with hook:
        for _ in range(3):
            with torch.autocast("cpu", enabled=autocast):
                loss = model(torch.randn(2, 4, 6))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    streams = torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002
    return losses, [parameter.detach() for parameter in model.parameters()], (streams, hook)


@pytest.mark.parametrize("autocast", [False, True])
def test_training_goes_on_bit_by_bit(autocast: bool) -> None:
    losses, weights, (streams, _) = trained(probe=False, autocast=autocast)
    probed, others, (probed_streams, hook) = trained(probe=True, autocast=autocast)
    assert losses == probed
    assert all(map(torch.equal, weights, others))
    assert streams == probed_streams
    assert hook.met == ["conv", "up", "(root)/sdpa.0", "out"] * 3  # the measuring itself is not met
    products = {(one.site, one.product) for one in hook.found}
    assert len(products) == 2 + 3 + 6 + 3  # the batch asks for no gradient
    pool = pooled(hook.found)
    assert len(pool) == len(products) * len(CASTS)


def test_no_tensor_is_kept() -> None:
    x, weight, gradient = randn(20, 8, seed=1).requires_grad_(), randn(20, 8, seed=2), randn(20, 20, seed=3)
    call = kept(F.linear, x, weight)
    found = site_backward_errors(call, gradient)
    watched = [weakref.ref(tensor) for tensor in (x, weight, gradient)]
    assert x.grad is None
    del call, x, weight, gradient
    gc.collect()
    assert [ref() for ref in watched] == [None, None, None]
    assert len(found) == 2 * len(CASTS)


def records() -> list[ProductError]:
    return list(measured(F.linear, randn(16, 8, seed=1), randn(16, 8, seed=2)).values())


def test_pooling_joins_steps_and_keeps_products_and_casts_apart() -> None:
    first = records()
    second = list(measured(F.linear, 3 * randn(4, 8, seed=3), randn(16, 8, seed=4)).values())
    pool = pooled([*first, *second])
    assert [(one.product, one.cast) for one in pool] == [(one.product, one.cast) for one in first]
    for one, other, both in zip(first, second, pool, strict=True):
        assert both.errors == one.errors.plus(other.errors)
        assert both.sampled == one.sampled + other.sampled
        share = one.sampled / both.sampled
        assert both.left.row == pytest.approx(share * one.left.row + (1 - share) * other.left.row)
    blank = replace(first[0], left=Crest(math.nan, math.nan))
    assert pooled([blank, first[0]])[0].left == first[0].left
    assert math.isnan(pooled([blank, blank])[0].left.tensor)
    assert pooled([]) == []


def test_a_record_reads_back() -> None:
    x = randn(16, 8, seed=1)
    x[0, 0] = math.nan
    for found in (records(), measured(F.linear, x * 0, randn(16, 8, seed=2)).values()):
        for record in found:
            assert same(ProductError.from_dict(json.loads(json.dumps(plain(record), allow_nan=False))), record)


def same(one: ProductError, other: ProductError) -> bool:
    return json.dumps(plain(one)) == json.dumps(plain(other))


@pytest.mark.parametrize(
    "change",
    [
        {"site": 3},
        {"product": None},
        {"cast": "int8"},
        {"cast": "int9/tensor/current/nearest"},
        {"cast": 8},
        {"errors": None},
        {"errors": {}},
        {"left": {"tensor": 0.5, "row": 1.0}},
        {"left": {"tensor": "Infinity", "row": 1.0}},
        {"right": {"tensor": 2.0}},
        {"right": {"tensor": 2.0, "row": "large"}},
        {"right": {"tensor": None, "row": 2.0}},
    ],
)
def test_a_record_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    good = plain(records()[0])
    with pytest.raises((TypeError, ValueError, KeyError)):
        ProductError.from_dict({**good, **change})


def test_a_site_of_usual_size_has_a_small_record() -> None:
    found = measured(F.linear, randn(512, 256, seed=1), randn(512, 256, seed=2))
    assert len(found) == 3 * len(CASTS)
    assert max(len(json.dumps(plain(record))) for record in found.values()) < 800
