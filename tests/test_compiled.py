"""Windows of compiled models: the same sketches as of uncompiled ones, no graph break, no recompile after a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from probes.probing import probe
from probes.window import Window
from tests.tensors import same_history

# Dynamo's own doing, whatever it traces (2.13): it makes an autograd.Function, and looks at every tensor's .grad.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm, self.dropout = nn.LayerNorm(8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        h = F.scaled_dot_product_attention(h, h, h) + torch.einsum("btd,bsd->bts", h, h) @ h
        return x + self.dropout(self.down(F.relu(self.up(h), inplace=True)))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


def by_block(model: Any) -> nn.Module:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="aot_eager", fullgraph=True)
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    return model


Trained = tuple[list[float], list[Tensor], Window | None, list[int]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def trained(
    compiled: Callable[[nn.Module], nn.Module], watch: bool, build: Callable[[], nn.Module] = Small, **options: Any
) -> Trained:
    """Losses, weights, the window around steps 1 to 4 of 6, and how many graphs there were after each step."""
    torch.manual_seed(0)
    model = compiled(build())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, graphs = [], []

    def step() -> None:
        with torch.no_grad():
            model(torch.randn(2, 6, 8))
        loss = F.cross_entropy(model(torch.randn(2, 6, 8)).flatten(0, 1), torch.randint(0, 5, (12,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])

    step()
    window = None
    if watch:
        with probe(model, optimizer, steps=4, **options) as window:
            for _ in range(4):
                step()
    else:
        for _ in range(4):
            step()
    step()
    return losses, [parameter.detach().clone() for parameter in model.parameters()], window, graphs


NOTHING_SCORED: dict[str, Any] = {"curvature_steps": 0}


@pytest.mark.parametrize(
    ("compiled", "options"),
    [
        (whole, {"every": 2, "curvature_steps": 1}),
        (in_place, NOTHING_SCORED),
        (by_block, NOTHING_SCORED),
        pytest.param(whole, NOTHING_SCORED, marks=pytest.mark.slow),
        pytest.param(in_place, {"every": 2, "curvature_steps": 1}, marks=pytest.mark.slow),
        pytest.param(by_block, {"every": 2, "curvature_steps": 1}, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_is_recorded_in_its_graph(
    compiled: Callable[[nn.Module], nn.Module], options: dict[str, Any]
) -> None:
    _, _, expected, _ = trained(uncompiled, watch=True, **options)
    plain_losses, plain_weights, _, _ = trained(compiled, watch=False)
    counters.clear()
    losses, weights, window, graphs = trained(compiled, watch=True, **options)
    assert losses == plain_losses
    assert all(map(torch.equal, weights, plain_weights))
    assert window is not None
    assert expected is not None
    assert window.slots == expected.slots
    for slot in expected.slots:
        assert same_history(window.history(*slot), expected.history(*slot)), slot
    assert window.sites == expected.sites
    assert window.parameters == expected.parameters
    assert window.coverage == expected.coverage
    assert not counters["graph_break"]
    assert len(set(graphs[1:])) == 1  # one more graph for the window's first step, and none after


def test_a_compiled_function_around_the_model_makes_the_window_eager() -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend="aot_eager")
    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().mean()

    with probe(model, optimizer, steps=3, curvature_steps=0) as window:
        for _ in range(3):
            loss_of(torch.randn(2, 6, 8)).backward()
            optimizer.step()
    assert "goes on uncompiled" in window.notes[0]
    assert window.history("head", "input").steps.tolist() == [1, 2]
    assert window.coverage.share == 1


def test_many_windows_do_not_reach_the_compiler_s_limit() -> None:
    torch.manual_seed(0)
    model = torch.compile(nn.Linear(8, 4), backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    limit = torch._dynamo.config.recompile_limit
    for _ in range(limit + 2):
        with probe(model, optimizer, steps=1, curvature_steps=0, finer=()) as window:
            model(torch.randn(6, 8)).sum().backward()
            optimizer.step()
        assert window.history("(root)", "input").elements.tolist() == [48]
    model(torch.randn(6, 8)).sum().backward()
    assert torch._dynamo.config.recompile_limit == limit


def test_the_compiled_parts_are_left_as_they_were() -> None:
    model = whole(Small())
    before = model.forward
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1):
        model(torch.randn(2, 6, 8)).sum().backward()
        optimizer.step()
    assert model.forward is before


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 5))


def test_a_graph_that_is_not_as_laid_out_goes_on_uncompiled() -> None:
    """`F.multi_head_attention_forward` is one call to a traced hook, and several to one that is not."""
    losses, _, window, _ = trained(whole, watch=True, build=encoder, curvature_steps=0)
    assert losses == trained(whole, watch=False, build=encoder)[0]
    assert window is not None
    assert window.coverage.share == 1
    assert {"0.self_attn/in_proj_weight", "0.self_attn.out_proj", "0.linear1", "1"} <= {s.name for s in window.sites}
