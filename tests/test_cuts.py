"""Noise of a part of a product's gradients against that of the whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probes import cuts
from probes.casts import Cast
from probes.noise import noise_energies
from probes.undisturbed import undisturbed
from tests.tensors import generator
from tests.test_curvature import Catcher

CASTS = [Cast.parse(name) for name in ("e5m2", "int4")]


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = F.scaled_dot_product_attention(x, x.flip(2), x.roll(1, 2))
        return found


PRODUCTS = {
    "linear": (lambda: nn.Linear(200, 300), (40, 30, 200)),
    "convolution": (lambda: nn.Conv2d(100, 120, 3, stride=2, padding=1), (24, 100, 9, 9)),
    "attention": (Attention, (40, 2, 12, 8)),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_part_tells_of_the_whole(name: str, adaptive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = PRODUCTS[name]
    torch.manual_seed(0)
    x = torch.randn(shape, generator=generator(), requires_grad=True)
    with Catcher(build(), shape[0]) as caught:
        result = caught.model(x)
    g = torch.randn(result.shape, generator=generator(1)) * torch.linspace(0.5, 2, result.shape[-1])
    found = []
    for most in (None, 10**9):
        for limit in ("CHANNELS", "ENTRIES", "SAMPLES", "ROWS") if most else ():
            monkeypatch.setattr(cuts, limit, most)
        with undisturbed():
            found.append(noise_energies(caught.met[0].product.call, g, CASTS, adaptive))
    part, whole = found
    assert part.keys() == whole.keys()
    assert len(part) == 4  # two operands, the gradient and what it passes upstream; or three operands and the gradient
    for slot, energies in part.items():
        for cast, found in energies.items():
            assert found.ratio == pytest.approx(whole[slot][cast].ratio, rel=0.25)
            assert name == "attention" or found.ratio != whole[slot][cast].ratio
