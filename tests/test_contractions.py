"""Every contraction is the product that autograd calculates, and is sampled without being cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensors import generator
from torch import Tensor, nn

from probes.contractions import attention, sampling
from probes.contractions import contractions as products_of
from probes.contractions.contraction import Contraction, Extent, Lettered
from probes.contractions.sampling import sampled, some
from probes.errors import WindowError
from probes.ops import Operation
from probes.sites import ProductCall, SiteHook

A, B, C = (torch.randn(6, 5, 4, 3, generator=generator(seed)).double() for seed in range(3))


class Caught(SiteHook):
    """Keeps the one product of a model and its result."""

    def on_product(self, call: ProductCall) -> Tensor:
        self.call, self.result = call, call.run()
        return self.result


def caught(run: Callable[..., Tensor], *operands: Tensor) -> tuple[ProductCall, Tensor, dict[str, Tensor]]:
    """The call, a gradient at its result, and by name the product and the gradients that autograd makes of it."""
    leaves = [operand.detach().clone().requires_grad_() for operand in operands]
    model = nn.Module()
    model.forward = run  # type: ignore[method-assign]
    with Caught(model) as hook:
        model(*leaves)
    call, result = hook.call, hook.result
    gradient = torch.randn(result.shape, generator=generator(9), dtype=result.dtype)
    gradients = torch.autograd.grad(result, call.operands, gradient)
    expected = {f"{role}_grad": found for role, found in zip(call.roles, gradients, strict=True)}
    return call, gradient, {"forward": plain(call), **expected}


def plain(call: ProductCall) -> Tensor:
    """The product without bias, addend, factor or dropout."""
    return call.plain(call.operands).detach() / call.kwargs.get("alpha", 1)


def dense(contraction: Contraction) -> Tensor:
    """All of the product, its dimensions in the order of `out`."""
    letters = list(dict.fromkeys((*contraction.left.letters, *contraction.right.letters)))
    spelled = {letter: chr(ord("a") + place) for place, letter in enumerate(letters)}

    def term(of: Sequence[str]) -> str:
        return "".join(spelled[letter] for letter in of)

    left, right = contraction.left, contraction.right
    equation = f"{term(left.letters)},{term(right.letters)}->{term(contraction.out)}"
    return torch.einsum(equation, left.values, right.values)


def dense_from_factors(contraction: Contraction) -> Tensor:
    """The same as [batch, rows, columns], from what sampling reads when it takes everything."""
    left, right = contraction.factors
    everything = [range(size) for size in (left.sizes[0], left.sizes[1], right.sizes[1])]
    rows, columns = left.gathered(everything[0], everything[1]), right.gathered(everything[0], everything[2])
    return rows.double() @ columns.double().transpose(-1, -2)


def assert_products(run: Callable[..., Tensor], *operands: Tensor) -> None:
    """Each product of the call is what autograd calculates, but for the factor alpha of the gradients."""
    call, gradient, expected = caught(run, *operands)
    found = {one.name: one for one in products_of(call, gradient, np.random.default_rng(0))}
    assert list(found) == [product.name for product in call.products(expected["forward"])]
    for name, contraction in found.items():
        exact = expected[name] / (1 if name == "forward" else call.kwargs.get("alpha", 1))
        assert torch.allclose(dense(contraction).reshape(exact.shape), exact, atol=1e-12), name
        grouped = dense_from_factors(contraction)
        assert grouped.numel() == exact.numel()
        assert torch.allclose(grouped.flatten().sort().values, exact.flatten().sort().values, atol=1e-4), name


@pytest.mark.parametrize(
    ("run", "first", "second"),
    [
        (F.linear, A, B[0, 0, :2]),
        (F.linear, A[0, 0, 0], B[0, 0]),
        (F.linear, A[0, 0], B[0, 0, 0]),
        (torch.matmul, A, B.mT),
        (torch.matmul, A[:, :1], B[:1].mT),
        (torch.matmul, A[:, :1, :1], B[:1, :, :1].mT),
        (torch.matmul, A[0, 0], B.mT),
        (torch.matmul, A, B[0, 0].mT),
        (torch.matmul, A[0, 0, 0], B.mT),
        (torch.matmul, A, B[0, 0, 0]),
        (lambda x, y: x.__rmatmul__(y), A[0, 0].mT, B[0, 0]),
        (torch.mm, A[0, 0, :, :1], B[0, 0, :, :1].mT),
        (torch.bmm, A[0], B[0].mT),
        (torch.bmm, A[0, :1], B[0, :1].mT),
        (torch.mv, A[0, 0], B[0, 0, 0]),
        (torch.ops.aten.bmm.default, A[0], B[0].mT),
        (lambda x, y: torch.einsum("bqhd,bkhd->bhqk", x, y), A, B[:, :2]),
        (lambda x, y: torch.einsum("bqhd,bkhd->bhqk", [x, y]), A, B[:, :2]),
        (lambda x, y: torch.einsum("ij, jk", x, y), A[0, 0], B[0, 0].mT),
        (lambda x, y: torch.einsum("ji,kj", x, y), A[0, 0], B[0, 0].mT),
        (lambda x, y: torch.einsum("...nd,...md->...nm", x, y), A, B[0]),
        (lambda x, y: torch.einsum("...nd,md", x, y), A, B[0, 0]),
        (lambda x, y: torch.einsum("...d,...d->...", x, y), A, B),
        (lambda x, y: torch.einsum("b...d,b...d->b", x, y), A, B),
        (lambda x, y: torch.einsum("abcd,acdb->", x, y), A, B.permute(0, 2, 3, 1)),
    ],
)
def test_bilinear(run: Callable[..., Tensor], first: Tensor, second: Tensor) -> None:
    assert_products(run, first, second)


@pytest.mark.parametrize(
    ("name", "function", "first", "second", "rest"),
    [
        ("inner", torch.inner, A[0], B[0, 0], ()),
        ("inner", torch.inner, A, B[0, 0, 0], ()),
        ("tensordot", torch.tensordot, A, B.permute(2, 3, 0, 1), ()),
        ("tensordot", torch.tensordot, A[0, 0], B[0, 0].mT, (1,)),
        ("tensordot", torch.tensordot, A, B, (([0, -1], [-4, 3]),)),
        ("convolution", torch.convolution, A[0, :3], B[0, :, :, :2], (None, [2], [1], [1], False, [0], 1)),
        ("convolution", torch.convolution, A[0, :3], B[0, :4, :2], (None, [2], [1], [2], True, [1], 2)),
    ],
)
def test_functions_that_the_hook_may_come_to_meet(
    name: str, function: Callable[..., Tensor], first: Tensor, second: Tensor, rest: tuple[Any, ...]
) -> None:
    operands = [operand.detach().clone().requires_grad_() for operand in (first, second)]
    result = function(*operands, *rest)
    gradient = torch.randn(result.shape, generator=generator(9)).double()
    expected = [result.detach(), *torch.autograd.grad(result, operands, gradient)]
    call, _, _ = caught(F.linear, A, B[0, 0])
    call = replace(call, operation=Operation(name, ()), operands=operands, args=(*operands, *rest), kwargs={})
    for contraction, exact in zip(products_of(call, gradient, np.random.default_rng(0)), expected, strict=True):
        assert torch.allclose(dense(contraction).reshape(exact.shape), exact), contraction.name


def test_sums_over_a_batch_are_inner() -> None:
    operands = [A[0].detach().clone().requires_grad_(), B[0].mT.detach().clone().requires_grad_()]
    result = torch.bmm(*operands).sum(0)
    gradient = torch.randn(result.shape, generator=generator(9)).double()
    expected = [result.detach(), *torch.autograd.grad(result, operands, gradient)]
    call, _, _ = caught(torch.matmul, A, B.mT)
    call = replace(call, operation=Operation("addbmm", ()), operands=operands)
    for contraction, exact in zip(products_of(call, gradient, np.random.default_rng(0)), expected, strict=True):
        assert torch.allclose(dense(contraction).reshape(exact.shape), exact), contraction.name


def test_addends_and_factors_stay_out() -> None:
    square, batch = A[0, 0, :3], A[0, :, :3]
    assert_products(lambda x, y: torch.addmm(square, x, y, beta=0.5, alpha=3.0), square, B[0, 0, :3])
    assert_products(lambda x, y: torch.baddbmm(batch, x, y, beta=2.0), batch, B[0, :, :3])
    assert_products(lambda x, y: F.linear(x, y, torch.ones(4).double()), A, B[0, 0])


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        (3, {}),
        (1, {"stride": 2}),
        (2, {"stride": 3, "padding": 2}),
        (3, {"stride": 2, "padding": 1, "dilation": 2}),
        (3, {"padding": 4, "groups": 2}),
        (2, {"stride": 2, "groups": 4, "dilation": 3, "padding": 1}),
    ],
)
def test_convolutions(dimensions: int, transposed: bool, kernel: int, options: dict[str, int]) -> None:
    run = getattr(F, f"conv{'_transpose' if transposed else ''}{dimensions}d")
    groups = options.get("groups", 1)
    x = torch.randn(3, 4, *(9, 8, 7)[:dimensions], generator=generator(1)).double()
    channels = (4, 8 // groups) if transposed else (8, 4 // groups)
    weight = torch.randn(*channels, *[kernel] * dimensions, generator=generator(2)).double()
    assert_products(lambda x, w: run(x, w, torch.ones(8).double(), **options), x, weight)


@pytest.mark.parametrize(
    "run",
    [
        lambda x, w: F.conv2d(x, w, None, (2, 1), (1, 0), (1, 2)),
        lambda x, w: F.conv2d(x, w, stride=[2], padding="valid"),
        pytest.param(
            lambda x, w: F.conv2d(x, w, padding="same"),
            marks=pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
        ),
        lambda x, w: F.conv2d(x, w, padding="same", dilation=3),
        lambda x, w: F.conv2d(x[0], w),
        lambda x, w: F.conv_transpose2d(x, w, None, (3, 2), 1, (2, 1), 1, (1, 3)),
        lambda x, w: F.conv_transpose2d(x[0], w, stride=2, output_padding=1),
        lambda x, w: torch.ops.aten.conv2d.default(x, w, None, [2, 2]),
    ],
)
def test_ways_to_call_a_convolution(run: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(3, 4, 9, 8, generator=generator(1)), torch.randn(4, 4, 2, 3, generator=generator(2))
    assert_products(run, x.double(), weight.double())


def test_only_a_few_samples_of_a_convolution_are_padded_but_all_enter_the_weight_gradient() -> None:
    x, weight = torch.randn(20, 2, 8, generator=generator(1)), torch.randn(3, 2, 3, generator=generator(2))
    call, gradient, expected = caught(F.conv1d, x, weight)
    forward, at_input, at_weight = products_of(call, gradient, np.random.default_rng(0))
    assert forward.left.values.shape[0] == at_input.left.values.shape[0] == sampling.ENTRIES
    assert dense(at_weight).flatten().allclose(expected["weight_grad"].flatten(), atol=1e-4)
    assert forward.left.extent == Extent.of(x)
    assert at_input.left.extent == Extent.of(gradient)


SDPA = F.scaled_dot_product_attention
Q, K, V = (
    torch.randn(2, heads, n, width, generator=generator(n)).double()
    for heads, n, width in ((4, 5, 6), (4, 7, 6), (4, 7, 3))
)
KEEP = torch.rand(2, 1, 5, 7, generator=generator(3)) < 0.6
ADDED = torch.randn(5, 7, generator=generator(4)).double()
BLIND = torch.ones(5, 7, dtype=torch.bool).index_fill(0, torch.tensor([2]), False)


@pytest.mark.parametrize(
    ("operands", "options"),
    [
        ((Q, K, V), {}),
        ((Q, K, V), {"is_causal": True}),
        ((Q, K, V), {"attn_mask": KEEP, "scale": 0.3}),
        ((Q, K, V), {"attn_mask": ADDED}),
        ((Q, K, V), {"attn_mask": BLIND}),
        ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True}),
        ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True, "is_causal": True, "attn_mask": None}),
        ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True, "attn_mask": KEEP}),
        ((Q[0], K[0], V[0]), {"attn_mask": ADDED}),
        ((Q[0, 0], K[0, 0], V[0, 0]), {"is_causal": True}),
        ((Q[None], K[None], V[None]), {}),
        ((Q.transpose(1, 2).contiguous().transpose(1, 2), K, V), {}),
    ],
)
def test_attention(operands: tuple[Tensor, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "ENTRIES", 1000)
    call, gradient, expected = caught(lambda q, k, v: SDPA(q, k, v, **options), *operands)
    found = {one.name: one for one in products_of(call, gradient, np.random.default_rng(0))}
    assert list(found) == [product.name for product in call.products(gradient)]
    scale = options.get("scale", operands[0].shape[-1] ** -0.5)
    for name, exact, factor in (
        ("values", expected["forward"], 1.0),
        ("query_grad", expected["query_grad"], scale),
        ("key_grad", expected["key_grad"], scale),
        ("value_grad", expected["value_grad"], 1.0),
    ):
        # The probabilities are float32, so the products agree as far as those go.
        assert torch.allclose(dense_in_double(found[name]).reshape(exact.shape) * factor, exact, atol=3e-6), name
    keys = operands[1] if operands[1].shape[:-2] == operands[0].shape[:-2] else operands[1].repeat_interleave(2, 1)
    values = operands[2] if operands[2].shape[:-2] == operands[0].shape[:-2] else operands[2].repeat_interleave(2, 1)
    for name, exact in (("scores", operands[0] @ keys.mT), ("probabilities_grad", gradient @ values.mT)):
        assert torch.allclose(dense(found[name]).reshape(exact.shape), exact), name
    assert found["values"].left.extent.largest == pytest.approx(float(found["values"].left.values.amax()))
    rms = float(found["key_grad"].left.values.square().mean().sqrt())
    assert found["key_grad"].left.extent.rms == pytest.approx(rms, rel=1e-5)


def dense_in_double(contraction: Contraction) -> Tensor:
    left, right = (one.seen_as(one.values.double(), one.letters) for one in (contraction.left, contraction.right))
    return dense(Contraction(contraction.name, left, right, contraction.out))


def test_attention_keeps_a_few_entries_scaled_as_all() -> None:
    big = Q.clone()
    big[1, 3] *= 50  # its probabilities are nearly 0 or 1
    call, gradient, _ = caught(SDPA, big, K, V)
    found = {one.name: one for one in products_of(call, gradient, np.random.default_rng(0))}
    assert found["values"].left.values.shape == (4, 1, 5, 7)
    assert found["values"].right.extent == Extent.of(V)
    probabilities = ((big @ K.mT) * 6**-0.5).softmax(-1)
    assert found["values"].left.extent.largest == pytest.approx(float(probabilities.amax()), rel=1e-5)


def test_large_attention_is_followed_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    call, gradient, _ = caught(lambda q, k, v: SDPA(q, k, v, KEEP), Q, K, V)
    whole = list(products_of(call, gradient, np.random.default_rng(0)))
    monkeypatch.setattr(attention, "AT_ONCE", 3 * 5 * 7)
    pieces = list(products_of(call, gradient, np.random.default_rng(0)))
    assert [one.left.extent.largest for one in whole] == pytest.approx([one.left.extent.largest for one in pieces])
    assert [one.left.extent.rms for one in whole] == pytest.approx([one.left.extent.rms for one in pieces])
    assert (len(whole[1].left.values), len(pieces[1].left.values)) == (4, 3)


def test_kernels_behind_attention_are_read_by_their_own_arguments() -> None:
    """They take their arguments in other orders; the CPU's takes the mask by its name alone."""
    plain = list(products_of(*caught(lambda q, k, v: SDPA(q, k, v, ADDED), Q, K, V)[:2], np.random.default_rng(0)))
    causal = list(
        products_of(*caught(lambda q, k, v: SDPA(q, k, v, is_causal=True), Q, K, V)[:2], np.random.default_rng(0))
    )
    call, gradient, _ = caught(SDPA, Q, K, V)
    aten = torch.ops.aten
    for function, args, kwargs, expected in (
        (aten._scaled_dot_product_flash_attention_for_cpu.default, (Q, K, V, 0.0, True), {}, causal),
        (aten._scaled_dot_product_flash_attention_for_cpu, (Q, K, V, 0.0), {"attn_mask": ADDED}, plain),
        (aten._scaled_dot_product_flash_attention, (Q, K, V, 0.0, True, False), {}, causal),
        (aten._scaled_dot_product_efficient_attention, (Q, K, V, ADDED, True, 0.0), {}, plain),
    ):
        other = replace(call, function=function, args=args, kwargs=kwargs)
        found = products_of(other, gradient, np.random.default_rng(0))
        for one, same in zip(found, expected, strict=True):
            assert torch.equal(one.left.values, same.left.values)


def test_dropout_does_not_enter_what_is_calculated_again() -> None:
    state = torch.get_rng_state()
    without = caught(SDPA, Q, K, V)
    torch.set_rng_state(state)
    for given in (lambda q, k, v: SDPA(q, k, v, dropout_p=0.5), lambda q, k, v: SDPA(q, k, v, None, 0.5)):
        call, gradient, _ = caught(given, Q, K, V)
        pairs = zip(
            products_of(call, gradient, np.random.default_rng(0)),
            products_of(*without[:2], np.random.default_rng(0)),
            strict=True,
        )
        for one, other in pairs:
            assert torch.equal(one.left.values, other.left.values)


def test_gradients_that_nobody_asks_for_are_left_out() -> None:
    def names(first: bool, second: bool, *rest: bool, run: Any = torch.matmul) -> list[str]:
        operands = [
            x.detach().clone().requires_grad_(on)
            for x, on in zip((Q, K.mT) if not rest else (Q, K, V), (first, second, *rest), strict=True)
        ]
        with Caught(nn.Module()) as hook:
            hook.model.forward = run  # type: ignore[method-assign]
            hook.model(*operands)
        gradient = torch.ones_like(hook.result)
        found = [one.name for one in products_of(hook.call, gradient, np.random.default_rng(0))]
        assert found == [product.name for product in hook.call.products(hook.result)]
        return found

    assert names(False, False) == ["forward"]
    assert names(True, False) == ["forward", "lhs_grad"]
    assert names(False, True) == ["forward", "rhs_grad"]
    assert names(False, False, True, run=SDPA) == ["scores", "values", "value_grad"]
    assert names(True, False, False, run=SDPA) == ["scores", "values", "probabilities_grad", "query_grad"]


@pytest.mark.parametrize(
    ("run", "operands", "message"),
    [
        (lambda x, y: torch.einsum("iik,ij->kj", x, y), (A[0, 0, :3, :3].expand(3, 3, 3), A[0, 0, :3]), "diagonal"),
        (lambda x, y: torch.einsum("ijm,ikl->mkl", x, y), (A[0], B[0]), "without a partner"),
        (SDPA, (Q, K[:1], V[:1]), "broadcast"),
        (SDPA, (Q, K, V[:, :1]), "broadcast"),
    ],
)
def test_what_is_no_plain_product_is_refused(run: Any, operands: tuple[Tensor, ...], message: str) -> None:
    call, gradient, _ = caught(run, *operands)
    with pytest.raises(WindowError, match=message):
        list(products_of(call, gradient, np.random.default_rng(0)))


def test_tensors_that_are_of_no_such_product_are_refused() -> None:
    call, gradient, _ = caught(torch.matmul, A, B.mT)
    for first, second, arrived in ((A.flatten(), B.mT, None), (A, B, None), (A, B.mT, gradient[0])):
        broken = replace(call, operands=[first.requires_grad_(), second])
        with pytest.raises(WindowError, match="followed"):
            list(products_of(broken, arrived, np.random.default_rng(0)))
    with pytest.raises(WindowError, match="multi_dot of 3 operands"):
        list(
            products_of(
                replace(call, operation=Operation("multi_dot", ()), operands=[A, B, C], roles=("a", "b", "c")),
                None,
                np.random.default_rng(0),
            )
        )


def test_a_sample_has_the_full_inner_dimension_and_is_bounded() -> None:
    for m, k, n, batch in ((1000, 64, 700, 9), (3, 40_000, 5, 1), (1, 1, 1, 1), (300, 7, 1, 2), (8, 200_000, 8, 2)):
        left, right = torch.zeros(batch, m, k), torch.zeros(batch, n, k)
        pair = Contraction(
            "forward", Lettered.of(left, ("b", "m", "k")), Lettered.of(right, ("b", "n", "k")), ("b", "m", "n")
        )
        rows, columns = sampled(pair, np.random.default_rng(0))
        assert rows.shape[2] == columns.shape[2] == k
        assert rows.shape[0] == columns.shape[0] <= min(batch, sampling.ENTRIES)
        assert rows.shape[1] <= m
        assert columns.shape[1] <= n
        for sample, size in ((rows, m), (columns, n)):
            most = max(sampling.NUMBERS, sampling.FEWEST * k)
            assert sample.numel() <= most
            assert sample.shape[1] >= min(size, sampling.FEWEST)
        if batch * m * n >= sampling.ELEMENTS and k < 1000:
            assert rows.shape[0] * rows.shape[1] * columns.shape[1] >= sampling.ELEMENTS


def test_sampled_rows_are_rows_of_the_operands() -> None:
    left, right = torch.randn(6, 50, 7, generator=generator(1)), torch.randn(7, 90, generator=generator(2))
    spelled = Lettered.of(left, ("batch", "rows", "inner")), Lettered.of(right, ("inner", "columns"))
    rows, columns = sampled(Contraction("forward", *spelled, ("batch", "rows", "columns")), np.random.default_rng(3))
    assert {tuple(row) for row in rows.flatten(0, 1).tolist()} <= {tuple(row) for row in left.flatten(0, 1).tolist()}
    assert {tuple(row) for row in columns.flatten(0, 1).tolist()} <= {tuple(row) for row in right.t().tolist()}


def test_some_are_different_in_order_and_within() -> None:
    random = np.random.default_rng(0)
    for size, count in ((1, 1), (5, 9), (17, 16), (10**12, 16)):
        chosen = some(size, count, random)
        assert len(chosen) == min(size, count)
        assert all(one < other for one, other in pairwise(chosen))
        assert 0 <= chosen[0] <= chosen[-1] < size
    spread = [index for _ in range(500) for index in some(100, 4, random)]
    assert abs(np.mean(spread) - 49.5) < 4 * 28.9 / 2000**0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extent(dtype: torch.dtype) -> None:
    values = torch.randn(40, 3, generator=generator(1)).to(dtype)
    assert Extent.of(values) == Extent(
        float(values.abs().amax()), pytest.approx(float(values.double().square().mean()) ** 0.5)
    )
    spoiled = values.clone()
    spoiled[0, 0], spoiled[1, 1], spoiled[2, 2] = float("nan"), float("inf"), -float("inf")
    kept = spoiled[spoiled.isfinite()].double()
    extent = Extent.of(spoiled)
    assert extent.largest == float(kept.abs().amax())
    assert extent.rms == pytest.approx(float(kept.square().mean()) ** 0.5)
    assert Extent.of(values.t()) == Extent.of(values)
    for nothing in (values[:0], torch.full((3,), float("nan"), dtype=dtype)):
        assert Extent.of(nothing).largest == 0.0
        assert np.isnan(Extent.of(nothing).rms)
    assert Extent.of(torch.zeros(3, dtype=dtype)) == Extent(0.0, 0.0)
    for large in (3e30, 3e-30):  # whose squares are no float32
        assert Extent.of(torch.full((5,), large)).rms == pytest.approx(large)


def test_flops_agree_with_the_sizes() -> None:
    call, gradient, expected = caught(torch.matmul, A, B[0].mT)
    for product, contraction in zip(
        call.products(expected["forward"]), products_of(call, gradient, np.random.default_rng(0)), strict=True
    ):
        left, right = contraction.factors
        assert 2.0 * prod(left.sizes) * right.sizes[1] == product.flops
