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


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("linear", [(40, 30, 200), (3, 30, 200), (40, 5, 200), (600, 200)]),
        ("convolution", [(24, 100, 9, 9), (3, 100, 9, 9), (24, 100, 40, 40)]),
    ],
)
def test_a_weight_s_part_is_the_same_whatever_the_batch(name: str, shapes: list[tuple[int, ...]]) -> None:
    build, _ = PRODUCTS[name]
    found = []
    for shape in shapes:
        x = torch.randn(shape, generator=generator(), requires_grad=True)
        with Catcher(build(), shape[0]) as caught:
            result = caught.model(x)
        call = caught.met[0].product.call
        of_weight = [cut for cut in cuts.cuts_of(call, [*call.operands, result], [0, 1], 7) if cut.targets == (1,)]
        assert len(of_weight) == 2
        found.append([{dim: at.tolist() for dim, at in cut.indices[1].items()} for cut in of_weight])
    assert all(each == found[0] for each in found)


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
