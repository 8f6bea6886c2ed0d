"""Casts inside what compiles, traces or transforms a function: the same bits, and never a loop behind its back."""

from __future__ import annotations

import pytest
import torch
from oracles import assert_same
from tensors import generator
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from probes.casts import Cast, CastState

CASTS = ("e4m3fn", "bf16", "e4m3fn/block32", "e2m1/block16", "e5m2/column", "e5m2/none/stochastic", "e8m0/none")


def tensor(seed: int = 0) -> Tensor:
    return torch.randn(8, 64, generator=generator(seed))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own
@pytest.mark.parametrize("text", [*CASTS, "e5m2/tensor/delayed"])
def test_a_compiled_function_casts_as_it_would_uncompiled(text: str) -> None:
    torch.compiler.reset()
    cast, compiled_state, state = Cast.parse(text), CastState(1), CastState(1)
    compiled = torch.compile(lambda x: cast(x * 2, compiled_state) + 1, backend="eager")
    for call in range(3):
        assert_same(compiled(tensor(call)), cast(tensor(call) * 2, state) + 1)
    x = tensor().requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None
    assert (x.grad == 2).all()


@pytest.mark.parametrize("text", [text for text in CASTS if "stochastic" not in text])
def test_a_recorded_graph_casts_what_it_is_given(text: str) -> None:
    cast = Cast.parse(text)
    recorded = make_fx(lambda x: cast(x))(tensor(1))
    assert_same(recorded(tensor(2)), cast(tensor(2)))


def test_an_exported_program_casts_what_it_is_given() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Cast.parse("e4m3fn/block32")(x)

    exported = torch.export.export(Model(), (tensor(1),)).module()
    assert_same(exported(tensor(2)), Cast.parse("e4m3fn/block32")(tensor(2)))


def test_vmap_scales_each_sample_by_itself() -> None:
    cast = Cast.parse("e4m3fn")
    assert_same(torch.vmap(cast)(tensor()), torch.stack([cast(row) for row in tensor()]))


def test_func_grad_passes_straight_through() -> None:
    cast = Cast.parse("e4m3fn")
    assert (torch.func.grad(lambda x: cast(x).sum())(tensor()) == 1).all()
    per_sample = torch.vmap(torch.func.grad(lambda x: (2 * cast(x)).sum()))(tensor())
    assert (per_sample == 2).all()


def test_fake_tensors_have_shapes_and_no_values() -> None:
    with FakeTensorMode():
        for text in CASTS:
            assert Cast.parse(text)(torch.empty(3, 70, dtype=torch.bfloat16)).shape == (3, 70)
