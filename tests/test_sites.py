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

# What torch says of its own functions when they are first called.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in ("torch.chain_matmul", "Sparse CSR", "Sparse CSC", "LSTM with projections", "`isinstance.treespec")
]


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
        (lambda m, x: torch.linalg.matmul(x, m.w), "(root)", WEIGHT),
        (lambda m, x: torch.ops.aten.mm(x, m.w), "(root)", WEIGHT),
        (lambda m, x: torch.zeros(4, 4).addmm_(x, m.w), "(root)", WEIGHT),
        (lambda m, x: torch.addbmm(x, x[None], m.w[None]), "(root)", WEIGHT),
        (lambda m, x: torch.addmv(x[0], x, m.w[0]), "(root)", WEIGHT),
        (lambda m, x: x @ m.w[1], "(root)", WEIGHT),
        (lambda m, x: torch.inner(x, m.w), "(root)", WEIGHT),
        (lambda m, x: torch.tensordot(x, m.w, dims=([1], [0])), "(root)", WEIGHT),
        (lambda m, x: torch.einsum(x, [0, 1], m.w, [1, 2], [0, 2]), "(root)", WEIGHT),
        (lambda m, x: torch.einsum(x, [..., 1], m.w, [1, 2]), "(root)", WEIGHT),
        (lambda m, x: torch.einsum("ab,bc,cd->ad", x, m.w, x), "(root)", ("lhs", "weight", "rhs")),
        (lambda m, x: torch.einsum("ab,bc,cd->ad", x, x, x), "(root)/einsum.0", ("operand0", "operand1", "operand2")),
        (lambda m, x: torch.linalg.multi_dot([m.w, x, x]), "(root)", ("weight", "lhs", "rhs")),
        (lambda m, x: torch.chain_matmul(x, m.w), "(root)", WEIGHT),
        (lambda m, x: F.bilinear(x, x, m.w[None]), "(root)", ("lhs", "rhs", "weight")),
        (lambda m, x: torch.cdist(x.repeat(8, 1), m.w), "(root)", WEIGHT),
        (lambda m, x: F.conv1d(x[None], m.w[:, :, None], padding="same"), "(root)", WEIGHT),
        (
            lambda m, x: torch.convolution(x[None], m.w[:, :, None], None, [1], [0], [1], False, [0], 1),
            "(root)",
            WEIGHT,
        ),
        (lambda m, x: torch.conv_tbc(x[None], m.w[None], x[0]), "(root)", WEIGHT),
        (lambda m, x: torch.sparse.mm(x.to_sparse(), m.w), "(root)", WEIGHT),
        (lambda m, x: x.to_sparse_csr() @ m.w, "(root)", WEIGHT),
        (lambda m, x: torch.sparse.addmm(x, x.to_sparse(), m.w), "(root)", WEIGHT),
        (lambda m, x: m.w @ m.w, "(root)/matmul.0", PAIR),
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


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.outer(x[0], m.w[0]),
        lambda m, x: torch.dot(x[0], m.w[0]),
        lambda m, x: x[0] @ m.w[0],
        lambda m, x: torch.inner(x[0], m.w[0]),
        lambda m, x: torch.linalg.vecdot(x, m.w),
        lambda m, x: torch.kron(x, m.w),
        lambda m, x: torch.einsum("ij,ij->ij", x, m.w),
        lambda m, x: torch.einsum("ij->ji", x),
        lambda m, x: torch.cdist(x, m.w),  # few rows: torch subtracts, and multiplies no matrices
        lambda m, x: torch.cdist(x.repeat(8, 1), m.w, p=1.0),
    ],
)
def test_what_sums_no_products_of_matrices_is_no_site(function: Any) -> None:
    assert met(Functional(function), lambda m: m(torch.randn(4, 4))) == []


def test_a_sparse_operand_is_read_and_replaced_by_its_values() -> None:
    graph, x = torch.eye(4).to_sparse(), torch.randn(4, 2)
    for laid_out in (graph, graph.to_sparse_csr(), graph.to_sparse_csc()):
        with Lister(Functional(lambda m, x, graph=laid_out: graph @ x)) as lister:
            lister.model(x)
        (call,) = lister.calls
        assert torch.equal(call.operands[0], torch.ones(4))
        assert torch.equal(call.run([2 * torch.ones(4), x]), 2 * x)
        assert torch.equal(call.plain([3 * torch.ones(4), x]), 3 * x)
        assert [product.flops for product in call.products(x)] == [2 * 4 * 2]


def test_experts_in_one_parameter_are_weights() -> None:
    ends = torch.tensor([1, 4], dtype=torch.int32)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        stacked = m.w.view(2, 2, 4)
        return F.linear(x, stacked[1]) + F.grouped_mm(x, stacked.transpose(1, 2), offs=ends)

    model = Functional(run)
    x = torch.randn(4, 4)
    with Lister(model) as lister:
        model(x)
    assert [(call.site, call.roles) for call in lister.calls] == [("(root)", WEIGHT)] * 2
    grouped = lister.calls[1]
    exact = torch.cat([x[:1] @ model.w[:2].t(), x[1:] @ model.w[2:].t()])
    assert torch.allclose(grouped.plain(grouped.operands), exact, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "states", "weights"),
    [
        (nn.LSTM(4, 6, proj_size=3), 2, ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (
            nn.GRU(4, 6, bidirectional=True),
            1,
            ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
        ),
        (nn.RNN(4, 6, 2, bias=False), 1, ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]),
        (nn.RNN(4, 6, nonlinearity="relu"), 1, ["weight_ih_l0", "weight_hh_l0"]),
        (nn.LSTMCell(4, 6), 2, ["weight_ih", "weight_hh"]),
        (nn.GRUCell(4, 6), 1, ["weight_ih", "weight_hh"]),
        (nn.RNNCell(4, 6), 1, ["weight_ih", "weight_hh"]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_recurrent_call_is_one_site(layer: nn.Module, states: int, weights: list[str], packed: bool) -> None:
    single = isinstance(layer, nn.RNNCellBase)
    x: Any = torch.randn(3, 4) if single else torch.randn(5, 3, 4)
    if packed and not single:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 1]))
    model = nn.ModuleDict({"layer": layer})
    with Lister(model) as lister:
        result = model["layer"](x)
    (call,) = lister.calls
    assert call.site == "layer"
    assert call.roles == ("input", *("state", "cell")[:states], *weights)
    assert call.weights == set(weights)
    for role, operand in list(zip(call.roles, call.operands, strict=True))[1 + states :]:
        assert torch.equal(operand, getattr(layer, role))
    again = call.run(call.operands)
    first = (result if isinstance(result, Tensor) else result[0]).data if not packed or single else result[0].data
    assert torch.equal(again if isinstance(again, Tensor) else again[0], first)
    entries = 9 if packed and not single else 3 if single else 15
    forward = [product for product in call.products(again) if not product.backward]
    assert [product.flops for product in forward] == [2 * entries * getattr(layer, name).numel() for name in weights]


def test_parameters_that_stand_in_for_a_call_are_the_modules_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    sites = met(model, lambda m: torch.func.functional_call(m, doubled, (torch.randn(3, 4),)))
    assert sites == [("0", WEIGHT), ("2", WEIGHT)]


def test_parametrized_weights_are_named_by_the_module_that_runs() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    assert met(model, lambda m: m(torch.randn(3, 4))) == [("0/linear.0", WEIGHT)]


def test_adapters_beside_a_layer_are_sites_of_their_own() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.down, self.up = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x))

    assert [site for site, _ in met(Adapted(), lambda m: m(torch.randn(3, 4)))] == ["base", "down", "up"]


def test_a_batch_of_calls_under_vmap_is_read_whole_and_counted_whole() -> None:
    model, x = nn.Linear(4, 6), torch.randn(5, 3, 4)
    with Lister(model) as lister:
        torch.vmap(model)(x)
    (call,) = lister.calls
    assert (call.site, call.roles) == ("(root)", WEIGHT)
    assert torch.equal(call.operands[0], x)


class Doubled(torch.autograd.Function):
    """2·x·w, multiplied without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * (x @ w)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * gradient @ w.t(), x.t() @ (2 * gradient)


def test_products_inside_a_custom_function_have_their_site() -> None:
    class Listing(Lister):
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            self.gradients: list[tuple[str, str, Tensor]] = []

        def on_function_gradient(self, product: Any, role: str, gradient: Tensor) -> None:
            self.gradients.append((product.site, role, gradient))

    model = nn.ModuleDict({"inner": Functional(lambda m, x: Doubled.apply(x, m.w))})
    x = torch.randn(3, 4, requires_grad=True)
    with Listing(model) as lister:
        model["inner"](x).sum().backward()
        with torch.no_grad():
            model["inner"](x)
    assert [(call.site, call.roles, call.opaque) for call in lister.calls] == [
        ("inner", WEIGHT, True),
        ("inner", WEIGHT, False),  # nothing is trained there
    ]
    assert [(site, role) for site, role, _ in lister.gradients] == [("inner", "input"), ("inner", "weight")]
    assert all(torch.equal(gradient, torch.full((3, 4), 2.0)) for _, _, gradient in lister.gradients)


def test_an_exported_program_keeps_its_module_paths() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4))
    x = torch.randn(2, 5, 16)
    program = torch.export.unflatten(torch.export.export(model, (x,)))
    sites = met(program, lambda m: m(x))
    assert sites == [
        ("0.self_attn", WEIGHT),
        ("0.self_attn/sdpa.0", ("query", "key", "value")),
        ("0.self_attn.out_proj", WEIGHT),
        ("0.linear1", WEIGHT),
        ("0.linear2", WEIGHT),
        ("1", WEIGHT),
    ]


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        (lambda m, x: F.linear(x, m.w), 2 * 3 * 4 * 4),
        (lambda m, x: torch.einsum("ij,jk->ik", x, m.w), 2 * 3 * 4 * 4),
        (lambda m, x: torch.einsum("...j,kj->...k", x[None], m.w), 2 * 3 * 4 * 4),
        (lambda m, x: F.conv1d(x.t()[None], m.w[:, :, None]), 2 * 3 * 4 * 4),
        (lambda m, x: torch.baddbmm(x[:, None], x[:, None], m.w.expand(3, 4, 4)), 2 * 3 * 4 * 4),
        (lambda m, x: torch.inner(x, m.w), 2 * 3 * 4 * 4),
        (lambda m, x: torch.tensordot(x, m.w, 1), 2 * 3 * 4 * 4),
        (lambda m, x: torch.einsum("bij,jk->ik", x[None].expand(5, 3, 4), m.w), 2 * 3 * 4 * 4),  # b goes first
        (lambda m, x: torch.einsum("ijb,jk->ik", x[..., None].expand(3, 4, 5), m.w), 2 * 3 * 4 * 4),  # b goes first
        (lambda m, x: torch.einsum("ij,ij->i", x, m.w[:3]), 2 * 3 * 4),
        (lambda m, x: F.conv_transpose1d(x.t()[None], m.w[:, :, None]), 2 * 3 * 4 * 4),
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


def test_flops_of_longer_chains_are_those_of_torch() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Functional(lambda m, x: torch.einsum("ab,bc,cd->ad", x, m.w, m.w)), torch.randn(3, 4, requires_grad=True)
    with Lister(model) as lister:
        result = model(x)
    products = lister.calls[0].products(result)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    assert sum(product.flops for product in products) == counter.get_total_flops()
    assert [product.operands for product in products if not product.backward] == [
        ("operand0", "operand1"),
        ("partial", "operand2"),
    ]
