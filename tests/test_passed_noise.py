"""What casts in products of two activations do to the gradients of the weights beneath, beside brute force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probes.casts import Cast
from probes.probing import probe
from probes.window import Window

CAST = "e5m2/tensor/current/nearest"
BATCHES = 4

Rounding = Callable[[Tensor], Tensor]


class Rounded(torch.autograd.Function):
    """Nothing forward; rounds the gradient."""

    @staticmethod
    def forward(context: object, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return Cast.parse(CAST)(gradient)


class Graph(nn.Module):
    """A mean over neighbours, with a second path around it: errors average out, and the sum has more than they do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 1)
        self.adjacency: Tensor
        self.register_buffer("adjacency", (torch.rand(12, 12) < 0.5) / 6.0)
        self.rounding: Rounding | None = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.inner(x))
        mean = self.adjacency @ hidden
        return predicted(self.outer, torch.tanh(hidden + (self.rounding(mean) if self.rounding else mean)))


class Mixing(nn.Module):
    """One head over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.rounding: Rounding | None = None

    def forward(self, x: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        return self.rounding(mixed) if self.rounding else mixed


class Attention(nn.Module):
    """`kind` says how the inside is recomputed in the backward pass, if it is."""

    def __init__(self, kind: str = "kept") -> None:
        super().__init__()
        self.mixing, self.outer, self.kind = Mixing(), nn.Linear(8, 1), kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "kept":
            return predicted(self.outer, self.mixing(x))
        again = checkpoint(self.mixing, x.requires_grad_(), use_reentrant=self.kind == "reentrant")
        return predicted(self.outer, again)


def predicted(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """One number a sample."""
    found: Tensor = layer(hidden).mean(1)
    return found


def batch(step: int, samples: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(samples, 12, 6, generator=generator), torch.randn(samples, 1, generator=generator)


def watched(model: nn.Module, parts: int = 1, autocast: torch.dtype | None = None) -> Window:
    """A window all of whose steps are scored; each batch in so many parts."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=BATCHES, curvature_steps=BATCHES, casts=[CAST]) as window:
        for step in range(BATCHES):
            optimizer.zero_grad()
            x, y = batch(step)
            for inputs, targets in zip(x.chunk(parts), y.chunk(parts), strict=True):
                with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
                    out = model(inputs)
                (F.mse_loss(out.float(), targets) / parts).backward()
            optimizer.step()
    return window


class Hit(NamedTuple):
    """A weight's gradients and the errors in them, a batch each, and the batch's noise there."""

    exact: list[Tensor]
    errors: list[Tensor]
    noise: float

    @property
    def ratio(self) -> float:
        """Error over gradient in energy, over the batch's noise."""
        return _energy(self.errors) / _energy(self.exact) / self.noise

    @property
    def systematic(self) -> float:
        """The same of the mean error, from the products of two batches' errors."""
        together = float(torch.stack(self.errors).sum(0).double().square().sum()) - _energy(self.errors)
        return together / (BATCHES - 1) / _energy(self.exact) / self.noise


def _energy(tensors: Sequence[Tensor]) -> float:
    return sum(float(each.double().square().sum()) for each in tensors)


def hardest_hit(model: Graph | Attention, window: Window, weights: Sequence[str]) -> Hit:
    """Brute force: of the weight where the error is most."""
    owner = model.mixing if isinstance(model, Attention) else model
    hits = [unhit(window, name) for name in weights]
    for step in range(BATCHES):
        x, y = batch(step)
        found = []
        for rounding in (None, Rounded.apply):
            owner.rounding = rounding
            parameters = [model.get_parameter(f"{name}.weight") for name in weights]
            found.append(torch.autograd.grad(F.mse_loss(model(x), y), parameters))
        for hit, exact, rounded in zip(hits, *found, strict=True):
            hit.exact.append(exact)
            hit.errors.append(rounded - exact)
    owner.rounding = None
    return max(hits, key=lambda hit: hit.ratio)


def unhit(window: Window, name: str) -> Hit:
    noise = window.evidence(name, "grad_output").batch_noise
    assert noise
    return Hit([], [], noise)


def told(window: Window, site: str, role: str = "grad_output") -> float:
    evidence = window.evidence(site, role)
    assert evidence.batch_noise
    return evidence.relative_noise[CAST] / evidence.batch_noise


@pytest.mark.parametrize(
    ("make", "site", "weights"),
    [(Graph, "(root)/matmul.0", ["inner"]), (Attention, "mixing/sdpa.0", ["mixing.q", "mixing.k", "mixing.v"])],
)
def test_noise_of_a_product_without_a_weight_is_that_of_the_weight_it_hits_hardest(
    make: Callable[[], Graph | Attention], site: str, weights: list[str]
) -> None:
    torch.manual_seed(0)
    model = make()
    window = watched(model)
    assert not window.notes
    evidence, hit = window.evidence(site, "grad_output"), hardest_hit(model, window, weights)
    assert told(window, site) == pytest.approx(hit.ratio, rel=1e-3)
    assert evidence.batch_noise
    # A sketch holds the products of so small a gradient exactly.
    assert evidence.systematic_noise[CAST] / evidence.batch_noise == pytest.approx(hit.systematic, rel=1e-2)
    assert evidence.systematic_noise_se[CAST] > 0


@pytest.mark.parametrize("kind", ["not reentrant", "reentrant"])
def test_checkpointing_changes_nothing(kind: str) -> None:
    found = []
    for one in ("kept", kind):
        torch.manual_seed(0)
        window = watched(Attention(one))
        assert not [note for note in window.notes if "noise" in note]
        found.append(told(window, "mixing/sdpa.0"))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize(("place", "role"), list(enumerate(["query", "key", "value"])))
def test_an_operands_error_goes_the_same_way(place: int, role: str) -> None:
    """Of attention's operands, beside brute force with the operand moved and the result's gradient as it was."""
    torch.manual_seed(0)
    model = Attention()
    mixing, window = model.mixing, watched(model)
    names = ["mixing.q", "mixing.k", "mixing.v"]
    hits = [unhit(window, name) for name in names]
    for step in range(BATCHES):
        x, y = batch(step)
        operands = [mixing.q(x), mixing.k(x), mixing.v(x)]
        result = F.scaled_dot_product_attention(*operands)
        loss = F.mse_loss(predicted(model.outer, result), y)
        (gradient,) = torch.autograd.grad(loss, result, retain_graph=True)
        moved = [operand.detach().requires_grad_() for operand in operands]
        moved[place] = Cast.parse(CAST)(moved[place].detach()).requires_grad_()
        at_operands = torch.autograd.grad(F.scaled_dot_product_attention(*moved), moved, gradient)
        for name, hit, at_operand in zip(names, hits, at_operands, strict=True):
            (exact,) = torch.autograd.grad(result, model.get_parameter(f"{name}.weight"), gradient, retain_graph=True)
            hit.exact.append(exact)
            hit.errors.append(torch.einsum("bto,bti->oi", at_operand, x) - exact)
    assert told(window, "mixing/sdpa.0", role) == pytest.approx(max(hit.ratio for hit in hits), rel=1e-3)


def test_it_holds_under_accumulation_and_autocast() -> None:
    torch.manual_seed(0)
    model = Graph()
    whole = told(watched(model), "(root)/matmul.0")
    # A micro-batch's error is rounded at its own scale, and energies of micro-batches add up.
    assert told(watched(model, parts=4), "(root)/matmul.0") == pytest.approx(whole, rel=0.7)
    for dtype in (torch.bfloat16, torch.float16):
        window = watched(model, autocast=dtype)
        assert not window.notes
        assert told(window, "(root)/matmul.0") == pytest.approx(whole, rel=0.2)


class Lookup(nn.Module):
    """Attention over what a table holds, with no weight beneath."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.outer = nn.Embedding(5, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table((x[..., 0] > 0).long())
        return predicted(self.outer, rows @ (x.mT @ rows))


def test_one_with_no_weight_beneath_has_its_own_gradients() -> None:
    torch.manual_seed(0)
    window = watched(Lookup())
    assert not window.notes
    for site in ("(root)/matmul.0", "(root)/matmul.1"):
        assert 0 < window.evidence(site, "grad_output").relative_noise[CAST] < 0.1
