"""Real architectures: every matrix FLOP of forward and backward is a site's, or listed; names and roles are right."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, build
from flops import torch_flops
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probes.probing import probe
from probes.records import Coverage
from probes.window import Window

QUICK = {"gpt2-sdpa", "llama-eager", "mixtral-grouped-sdpa", "unet", "lstm", "graph-sparse", "dlrm"}
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
FAST = {"lstm", "graph-sparse", "dlrm"}
BITS = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers' own


def watched(model: nn.Module, step: Callable[[], Tensor], steps: int = 1, **options: Any) -> tuple[Window, list[float]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    with probe(model, optimizer, steps=steps, **options) as window:
        for _ in range(steps):
            loss = step()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return window, losses


@pytest.mark.parametrize("name", EVERY)
def test_every_flop_is_counted_once(name: str) -> None:
    _, step = build(name)
    expected = torch_flops(lambda: step().backward())
    window, _ = watched(*build(name), curvature_steps=0)
    assert window.coverage.share >= 0.99
    assert window.total_flops == pytest.approx(expected, rel=2e-3)  # the rest runs without gradients: position tables


@pytest.mark.parametrize("name", EVERY)
def test_names_and_roles(name: str) -> None:
    model, step = build(name)
    window, _ = watched(model, step, curvature_steps=0)
    roles = {site.name: site.roles for site in window.sites}
    layers = {path for path, module in model.named_modules() if _multiplies(module)}
    assert layers <= roles.keys()
    for layer in layers:
        assert sorted(roles.pop(layer)) == ["grad_output", "input", "weight"]  # Mamba multiplies one from the left
    others = Counter((re.sub(r"\d+", "#", site), found) for site, found in roles.items())
    assert others == Counter({(site, found): count for site, found, count in _OTHERS[name]})


WEIGHT, PAIR, ATTENTION = (
    ("input", "weight", "grad_output"),
    ("lhs", "rhs", "grad_output"),
    ("query", "key", "value", "grad_output"),
)


def _attention(path: str, eager: bool) -> list[Any]:
    return [(f"{path}/matmul.#", PAIR, 4) if eager else (f"{path}/sdpa.#", ATTENTION, 2)]


def _others(name: str) -> list[Any]:
    """Of each architecture, the sites beside its linear layers and convolutions: name, roles, how many."""
    family, eager = name.split("-")[0], name.endswith("eager")
    layers = "model.layers.#"
    mixture = [(f"{layers}.mlp.gate", WEIGHT, 2)] + (
        [(f"{layers}.mlp.experts/bmm.#", PAIR, 4)]  # the gathered copies are no views of the parameter
        if "batched" in name
        else [(f"{layers}.mlp.experts/{weight}", WEIGHT, 2) for weight in ("gate_up_proj", "down_proj")]
    )
    weights = [f"weight_{part}_l{layer}" for layer in (0, 1) for part in ("ih", "hh")]
    found: dict[str, list[Any]] = {
        "gpt2": _attention("transformer.h.#.attn", eager),
        "llama": _attention(f"{layers}.self_attn", eager),
        "mixtral": _attention(f"{layers}.self_attn", eager) + mixture,
        "bert": _attention("bert.encoder.layer.#.attention.self", eager),
        "t5": [
            one
            for path in (
                "encoder.block.#.layer.#.SelfAttention",
                "decoder.block.#.layer.#.SelfAttention",
                "decoder.block.#.layer.#.EncDecAttention",
            )
            for one in _attention(path, eager)
        ],
        "vit": _attention("vit.layers.#.attention", eager),
        "whisper": [
            one
            for path in ("encoder.layers.#.self_attn", "decoder.layers.#.self_attn", "decoder.layers.#.encoder_attn")
            for one in _attention(f"model.{path}", eager)
        ],
        "mamba": [("backbone.layers.#.mixer/matmul.#", PAIR, 2 * 24)],  # one a position of the scan
        "mamba2": [("backbone.layers.#.mixer/einsum.#", PAIR, 10)],
        "unet": [("attention/einsum.#", PAIR, 2)],
        "lstm": [("lstm", ("input", "state", "cell", *weights, "grad_output"), 1)],
        "dlrm": [("(root)/bmm.#", PAIR, 1)],
        "graph": [],
    }
    gathered = {"graph-dense": "matmul", "graph-sparse": "mm"}
    if name in gathered:
        return [(f"layers.#/{gathered[name]}.#", PAIR, 2)]
    return found.get(family, [])


_OTHERS = {name: _others(name) for name in ARCHITECTURES}


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D"


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Without it the gradient of gathered experts is another one each time, watched or not."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", BITS)
def test_watching_changes_no_bit(name: str) -> None:
    model, step = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plain = []
    for _ in range(2):
        loss = step()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.append(loss.item())
    watched_model, watched_step = build(name)
    _, losses = watched(watched_model, watched_step, steps=2, curvature_steps=1, casts=["e4m3fn"])
    assert losses == plain
    for one, other in zip(model.parameters(), watched_model.parameters(), strict=True):
        assert torch.equal(one, other)


# What is not seen.


class Functional(nn.Module):
    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def coverage(model: nn.Module, step: Callable[[], Tensor], **options: Any) -> Coverage:
    """Of one step; its FLOPs must be those that torch counts."""
    expected = torch_flops(lambda: step().backward())
    model.zero_grad()
    window, _ = watched(model, step, **options)
    assert window.total_flops == expected
    return window.coverage


def unseen(found: Coverage) -> list[tuple[str, str]]:
    return [(entry["where"], entry["op"]) for entry in found.unseen]


def _powers(x: Tensor) -> Tensor:
    return torch.linalg.matrix_power(x.t() @ x, 3)


@pytest.mark.parametrize("scored", [0, 1])
def test_what_is_not_seen_is_listed_with_its_backward(scored: int) -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "hidden": Functional(lambda m, x: _powers(x))})
    x, target = torch.randn(8, 4), torch.randn(6, 6)

    def step() -> Tensor:
        return F.mse_loss(model["hidden"](model["up"](x)), target)

    found = coverage(model, step, curvature_steps=scored)
    assert unseen(found) == [("hidden", "aten.mm")]
    cubed = 2 * 6**3 * 2  # two products
    assert found.unseen_flops == 3 * cubed
    linear, gram = 2 * 8 * 4 * 6, 2 * 8 * 6 * 6
    assert found.share == (2 * linear + 3 * gram) / (2 * linear + 3 * gram + 3 * cubed)


def test_an_unseen_product_without_gradients_has_no_backward() -> None:
    model = Functional(lambda m, x: m.head(_powers(x)), head=nn.Linear(4, 3))
    found = coverage(model, lambda: model(torch.ones(5, 4)).square().sum())
    assert found.unseen_flops == 2 * 2 * 4**3


def test_a_model_that_is_used_twice_counts_twice() -> None:
    model = Functional(lambda m, x: _powers(m.layer(x)), layer=nn.Linear(4, 4))
    x = torch.randn(5, 4)
    once = coverage(model, lambda: model(x).square().sum())
    twice = coverage(model, lambda: (model(x) @ model(2 * x).detach()).square().sum() + model(x).square().sum())
    inside = [entry["flops"] for entry in twice.unseen if entry["where"] == "(root)"]
    assert inside == [once.unseen_flops * 2 + 2 * 2 * 4**3]  # the detached one is never differentiated


def test_products_of_the_loss_are_outside() -> None:
    model = nn.Linear(4, 6)
    x = torch.randn(8, 4)

    def step() -> Tensor:
        torch.ones(4, 4) @ torch.ones(4, 4)  # no loss goes through it
        embedded = model(x)
        return F.cross_entropy(embedded @ embedded.t(), torch.arange(8))

    window, _ = watched(model, step)
    assert unseen(window.coverage) == [("(outside)", "aten.mm")]
    assert window.coverage.unseen_flops == 3 * 2 * 8 * 6 * 8


def test_a_product_outside_with_a_parameter_of_the_model_is_its_site() -> None:
    """As where a loss takes the head's weight, or a method multiplies that is no forward."""
    model = nn.ModuleDict({"body": nn.Linear(4, 6), "head": nn.Linear(6, 5, bias=False)})
    x, target = torch.randn(8, 4), torch.arange(8) % 5

    def step() -> Tensor:
        return F.cross_entropy(model["body"](x) @ model["head"].weight.t(), target)

    expected = torch_flops(lambda: step().backward())
    window, _ = watched(model, step, curvature_steps=1)
    assert window.coverage == Coverage(1.0)
    assert window.total_flops == expected
    assert window.site("head").roles == ("input", "weight", "grad_output")
    assert window.evidence("head", "weight").directional


def test_a_product_that_is_changed_in_place_has_its_gradient() -> None:
    """Also where einsum has put its dimensions in another order, and a mask comes over it in place."""
    model = nn.ModuleDict({"up": nn.Linear(5, 5), "hidden": Functional(lambda m, x: masked(x))})
    keys, mask = torch.randn(6, 4, 5), torch.ones(3, 6).triu().bool()

    def masked(x: Tensor) -> Tensor:
        return torch.einsum("binh,jnh->bnij", x, keys).masked_fill_(mask, -9.0)

    found = coverage(model, lambda: model["hidden"](model["up"](torch.randn(2, 3, 4, 5))).square().sum())
    assert found == Coverage(1.0)


def test_a_step_whose_forward_is_in_its_closure_is_counted() -> None:
    """As Lightning has it, and LBFGS."""
    model, x = nn.Sequential(nn.Linear(4, 6), Functional(lambda m, x: _powers(x))), torch.randn(8, 4)
    optimizer = torch.optim.AdamW(model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    expected = torch_flops(closure)
    with probe(model, optimizer, steps=2) as window:
        for _ in range(2):
            optimizer.step(closure)  # type: ignore[arg-type]
    assert window.total_flops == expected
    assert unseen(window.coverage) == [("1", "aten.mm")]


def test_the_optimizers_products_are_not_the_models() -> None:
    class Whitened(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None and parameter.dim() == 2:
                        with torch.enable_grad():
                            parameter.grad = (parameter.grad @ parameter.grad.t() @ parameter).detach()
            super().step(closure)

    model = nn.Linear(4, 4)
    optimizer = Whitened(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=1) as window:
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
    assert window.coverage == Coverage(1.0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_recomputes_is_not_counted(reentrant: bool) -> None:
    inner = nn.Sequential(nn.Linear(4, 6), Functional(lambda m, x: _powers(x)))
    x = torch.randn(8, 4, requires_grad=True)
    plain = coverage(inner, lambda: inner(x).square().sum())
    model = Functional(lambda m, x: checkpoint(m.inner, x, use_reentrant=reentrant), inner=inner)
    window, _ = watched(model, lambda: model(x).square().sum())
    assert window.coverage.share == plain.share
    assert window.coverage.unseen_flops == plain.unseen_flops
    assert unseen(window.coverage) == [("inner.1", "aten.mm")]


def test_evaluation_is_not_counted() -> None:
    model = Functional(lambda m, x: _powers(m.layer(x)), layer=nn.Linear(4, 4))
    x = torch.randn(5, 4)

    def step() -> Tensor:
        with torch.no_grad():
            model(x)
        return model(x).square().sum()

    assert watched(model, step)[0].coverage == watched(model, lambda: model(x).square().sum())[0].coverage


def test_second_derivatives_are_listed() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(8, 4, requires_grad=True)

    def step() -> Tensor:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum()

    window, _ = watched(model, step)  # FlopCounterMode cannot follow torch.autograd.grad (2.13)
    first, second = 2 * 8 * 4 * 6, 2 * 8 * 6
    assert window.site("0").flops == 4 * first  # forward; towards x alone; then towards x and the weight
    assert window.site("2").flops == 2 * second
    assert window.coverage.unseen == (
        {"where": "0", "op": "aten.mm", "flops": 2 * first},
        {"where": "2", "op": "aten.mm", "flops": second},
    )


def test_a_scripted_module_is_listed_and_takes_no_hook() -> None:
    with pytest.warns(DeprecationWarning, match="script"):
        scripted = torch.jit.script(nn.Linear(4, 6))
    model = Functional(lambda m, x: m.head(m.inner(x)), inner=scripted, head=nn.Linear(6, 2))
    x = torch.randn(8, 4)
    window, _ = watched(model, lambda: model(x).square().sum())
    assert ("(root)", "aten.addmm") in unseen(window.coverage)
    assert [site.name for site in window.sites if site.name == "head"] == ["head"]


def test_what_is_inside_a_recurrent_call_is_its_sites_and_listed() -> None:
    window, _ = watched(*build("lstm"), curvature_steps=0)
    (inside,) = window.coverage.unseen
    site = window.site("lstm")
    assert (inside["where"], inside["op"], inside["site"]) == ("lstm", "aten.lstm", "lstm")
    first = 2 * 4 * 24 * 64 * 4 * 64  # batch, steps, width of the input, of the gates
    assert site.flops == 3 * 4 * first  # two layers of two matrices of the same size
    assert inside["flops"] == site.flops - first  # all but the first layer's product with the input
    assert window.coverage.share == 1
    assert window.coverage.unseen_flops == 0


def test_coverage_goes_through_a_file() -> None:
    window, _ = watched(*build("lstm"), curvature_steps=0)
    found = window.coverage
    assert Coverage.from_dict({"share": found.share, "unseen": [dict(entry) for entry in found.unseen]}) == found


def test_counting_disturbs_no_counter_of_the_users() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, step = build("graph-dense")
    with FlopCounterMode(display=False) as alone:
        step().backward()
    model, step = build("graph-dense")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with probe(model, optimizer, steps=1, curvature_steps=1), FlopCounterMode(display=False) as beside:
        step().backward()
        optimizer.step()
    assert beside.get_total_flops() == alone.get_total_flops()
