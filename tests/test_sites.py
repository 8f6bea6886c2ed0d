"""The site hook meets every product, with the names and roles of the design."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probes.sites import ProductCall, SiteHook


class Lister(SiteHook):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: list[ProductCall] = []

    def on_product(self, call: ProductCall) -> Tensor:
        self.calls.append(call)
        return call.run()


def met(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[tuple[str, tuple[str, ...]]]:
    with Lister(model) as lister:
        run(model)
    return [(call.site, call.roles) for call in lister.calls if not call.recomputing]


class Functional(nn.Module):
    """A module whose forward is the function under test, with a parameter of its own."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


WEIGHT, PAIR = ("input", "weight"), ("lhs", "rhs")


@pytest.mark.parametrize(
    ("function", "site", "roles"),
    [
        (lambda m, x: F.linear(x, m.w), "(root)", WEIGHT),
        (lambda m, x: x @ m.w, "(root)", WEIGHT),
        (lambda m, x: x.matmul(m.w.t()), "(root)", WEIGHT),
        (lambda m, x: m.w @ x, "(root)", ("weight", "input")),
        (lambda m, x: torch.mm(x, m.w[:2].t()), "(root)", WEIGHT),
        (lambda m, x: torch.addmm(x, x, m.w), "(root)", WEIGHT),
        (lambda m, x: x.addmm(mat1=x, mat2=m.w), "(root)", WEIGHT),
        (lambda m, x: torch.einsum("ij,jk->ik", x, m.w), "(root)", WEIGHT),
        (lambda m, x: torch.einsum("ij,jk->ik", [x, m.w]), "(root)", WEIGHT),
        (lambda m, x: torch.ops.aten.mm.default(x, m.w), "(root)", WEIGHT),
        (lambda m, x: x @ x, "(root)/matmul.0", PAIR),
        (lambda m, x: torch.bmm(x[None], x[None]), "(root)/bmm.0", PAIR),
        (lambda m, x: torch.baddbmm(x[None], x[None], x[None]), "(root)/baddbmm.0", PAIR),
        (lambda m, x: torch.einsum("ij,jk", x, x), "(root)/einsum.0", PAIR),
        (lambda m, x: x.__rmatmul__(x), "(root)/matmul.0", PAIR),
        (lambda m, x: F.linear(x, x), "(root)/linear.0", WEIGHT),
        (lambda m, x: F.conv1d(x[None], x[:, :, None]), "(root)/conv1d.0", WEIGHT),
        (lambda m, x: F.scaled_dot_product_attention(x, x, x), "(root)/sdpa.0", ("query", "key", "value")),
    ],
)
def test_one_product(function: Any, site: str, roles: tuple[str, ...]) -> None:
    assert met(Functional(function), lambda m: m(torch.randn(4, 4))) == [(site, roles)]


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions(dimensions: int, transposed: bool) -> None:
    layer = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dimensions}d")
    model = nn.Sequential(layer(2, 3, 2))
    assert met(model, lambda m: m(torch.randn(1, 2, *[4] * dimensions))) == [("0", WEIGHT)]


def test_operands_are_left_to_right() -> None:
    model = Functional(lambda m, x: x.__rmatmul__(m.w))
    x = torch.randn(4, 4)
    with Lister(model) as lister:
        result = model(x)
    (call,) = lister.calls
    assert call.roles == ("weight", "input")
    assert torch.equal(call.operands[1], x)
    assert torch.equal(call.run([torch.eye(4), x]), x)
    assert torch.equal(result, model.w @ x)


def test_products_without_a_parameter_count_anew_in_each_forward() -> None:
    model = nn.Sequential(Functional(lambda m, x: (x @ x) @ (x @ m.w)), Functional(lambda m, x: x @ x))

    def twice(m: nn.Module) -> None:
        m(torch.randn(4, 4))
        m(torch.randn(4, 4))

    once = ["0/matmul.0", "0", "0/matmul.1", "1/matmul.0"]
    assert [site for site, _ in met(model, twice)] == once * 2


def test_multihead_attention_is_seen_inside() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, batch_first=True)})
    x = torch.randn(3, 5, 16)
    assert met(model, lambda m: m["attn"](x, x, x, need_weights=False)) == [
        ("attn/in_proj_weight", WEIGHT),
        ("attn/sdpa.0", ("query", "key", "value")),
        ("attn.out_proj", WEIGHT),
    ]
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2, kdim=8, vdim=8)})
    y = torch.randn(5, 3, 8)
    sites = [site for site, _ in met(model, lambda m: m["attn"](torch.randn(5, 3, 16), y, y))]
    assert sites == [
        "attn/q_proj_weight",
        "attn/k_proj_weight",
        "attn/v_proj_weight",
        "attn/bmm.0",
        "attn/bmm.1",
        "attn.out_proj",
    ]


def test_a_tied_weight_is_named_by_the_module_that_runs() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    assert met(Tied(), lambda m: m(torch.arange(3))) == [("head", WEIGHT)]


def test_gpt2_conv1d_is_met() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16, bos_token_id=1, eos_token_id=1)
    sites = [
        site for site, _ in met(GPT2LMHeadModel(config), lambda m: m(input_ids=torch.ones(2, 8, dtype=torch.long)))
    ]
    block = "transformer.h.0"
    assert sites == [
        f"{block}.attn.c_attn",
        f"{block}.attn/sdpa.0",
        f"{block}.attn.c_proj",
        f"{block}.mlp.c_fc",
        f"{block}.mlp.c_proj",
        "lm_head",
    ]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_recomputes_is_met_and_marked(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with Lister(model) as lister:
        checkpoint(model, torch.randn(2, 4, requires_grad=True), use_reentrant=reentrant).sum().backward()
    assert [(call.site, call.recomputing) for call in lister.calls] == [
        ("0", False),
        ("2", False),
        ("0", True),
        ("2", True),
    ]


def test_leaving_takes_every_hook_off_even_after_an_exception() -> None:
    model = nn.Sequential(Functional(lambda m, x: 1 / 0))
    with pytest.raises(ZeroDivisionError), Lister(model) as lister:
        model(torch.ones(2, 2))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert lister.stack.frames == []


def test_integer_products_and_products_outside_the_model_are_left_alone() -> None:
    model = Functional(lambda m, x: x.long() @ x.long())
    assert met(model, lambda m: (m(torch.ones(2, 2)), torch.ones(2, 2) @ torch.ones(2, 2))) == []


def test_sparse_operands_are_left_alone() -> None:
    graph = torch.eye(4).to_sparse()
    assert met(Functional(lambda m, x: graph @ x), lambda m: m(torch.randn(4, 4))) == []


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda m, x: F.linear(x, m.w), 2 * 3 * 4 * 4),
        (lambda m, x: torch.einsum("ij,jk->ik", x, m.w), 2 * 3 * 4 * 4),
        (lambda m, x: torch.einsum("...j,kj->...k", x[None], m.w), 2 * 3 * 4 * 4),
        (lambda m, x: F.conv1d(x.t()[None], m.w[:, :, None]), 2 * 3 * 4 * 4),
        (lambda m, x: torch.baddbmm(x[None], x[None], m.w[None]), 2 * 3 * 4 * 4),
    ],
)
def test_flops_are_those_of_torch(function: Any, flops: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Functional(function), torch.randn(3, 4, requires_grad=True)
    with Lister(model) as lister:
        result = model(x)
    products = lister.calls[0].products(result)
    assert [product.name for product in products] == ["forward", "input_grad", "weight_grad"]
    with FlopCounterMode(display=False) as counter:
        function(model, x).sum().backward()
    assert sum(product.flops for product in products) == counter.get_total_flops() == 3 * flops
