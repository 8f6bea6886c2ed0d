"""The share of lost updates from the joint sketch against casting weights and updates themselves."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.lost_updates import lost_updates, plain_lost_share
from advisor.tensor_scales import scales
from probes import lost_updates as lost_updates_module
from probes.casts import Cast
from probes.errors import MalformedWindow
from probes.lost_updates import CELLS, SAMPLE, UpdateSketch, cells_of, update_edges, weight_edges
from probes.probing import probe
from tests.tensors import AWKWARD, generator

UNSCALED = ["bf16", "fp16", "tf32", "e3m4/none", "e4m3fn/none", "e5m2/none", "e2m3/none", "e3m2/none", "e2m1/none"]
SCALED = ["e4m3fn", "e5m2", "e3m4", "int8", "e2m1", "e4m3fn/tensor/current:pow2"]
SHARE = 0.01


def sketch(weight: Tensor, update: Tensor) -> UpdateSketch:
    return UpdateSketch.of(cells_of(weight, update).numpy())


def directly(weight: Tensor, update: Tensor, text: str) -> float:
    """round(r + Δw) = r, r = round(w), in units of the cast's scale for w."""
    cast = Cast.parse(text)
    scale = cast.scale_for(float(weight.abs().max())) if cast.scale else 1.0
    unscaled = Cast.parse(f"{cast.format}/none/nearest")
    held = unscaled(weight.float() / torch.tensor(scale))
    after = unscaled(held + update.float() / torch.tensor(scale))
    return float((after == held)[update != 0].double().mean())


def from_sketch(weight: Tensor, update: Tensor, text: str) -> float:
    magnitude = update.float().abs()
    known = float(magnitude[magnitude > 0].min()), float(magnitude.max())
    share = lost_updates(sketch(weight, update), Cast.parse(text), float(weight.abs().max()), known)
    assert share is not None
    return share


def pairs(build: Any, steps: int = 60) -> list[tuple[str, Tensor, Tensor]]:
    """Weights and their updates at some steps of a small training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))
    optimizer, teacher, found = build(model.parameters()), torch.randn(64, 10), []
    for step in range(steps):
        x = torch.randn(64, 64)
        optimizer.zero_grad()
        F.cross_entropy(model(x), (x @ teacher).argmax(dim=1)).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        if step in (0, 3, 20, steps - 1):
            found += [(name, before[name], p.detach() - before[name]) for name, p in model.named_parameters()]
    return found


@pytest.mark.parametrize(
    "build",
    [
        partial(torch.optim.AdamW, lr=1e-3),
        partial(torch.optim.Adam, lr=1e-2),
        partial(torch.optim.SGD, lr=0.1),
        partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    ],
    ids=["adamw", "adam", "sgd", "momentum"],
)
def test_real_updates(build: Any) -> None:
    """Without a scale nothing is approximate but a tie; a scale's thresholds cut bins, which averages out over many."""
    middling = 0
    for name, weight, update in pairs(build):
        for text in UNSCALED:
            share = directly(weight, update, text)
            middling += 0.02 < share < 0.98
            assert abs(from_sketch(weight, update, text) - share) < 3e-4, (name, text)
        for text in SCALED if weight.numel() > 1000 else ():
            assert abs(from_sketch(weight, update, text) - directly(weight, update, text)) < SHARE, (name, text)
    assert middling > 20


@pytest.mark.parametrize("text", ["bf16", "fp16", "e4m3fn/none", "e5m2/none"])
def test_where_in_its_octave_a_weight_lies(text: str) -> None:
    """Norms' weights lie at 1 and close to it, where half as much is enough downward as upward."""
    for spread in (0.0, 1e-4, 3e-3, 0.03):
        weight = 1 + spread * torch.randn(20_000, generator=generator(1))
        update = torch.randn(20_000, generator=generator(2)) * 10.0 ** torch.linspace(-4, 0, 20_000)
        assert abs(from_sketch(weight, update, text) - directly(weight, update, text)) < 1e-3, spread


@pytest.mark.parametrize("text", ["fp16", "e4m3fn/none", "e5m2/none", "e2m1/none"])
def test_weights_below_the_smallest_normal_number(text: str) -> None:
    target = Cast.parse(text).format
    weight = target.smallest_normal * torch.randn(20_000, generator=generator(3)) / 4
    weight[:2000] = 0
    update = target.smallest_subnormal / 2 * torch.randn(20_000, generator=generator(4)).exp()
    share = directly(weight, update, text)
    assert share > 0.02
    assert abs(from_sketch(weight, update, text) - share) < 1e-3


@pytest.mark.parametrize("sign", [1, -1])
def test_the_direction_matters(sign: int) -> None:
    """Pure weight decay goes inward, where powers of two have less room."""
    weight = torch.randn(20_000, generator=generator(5))
    update = sign * 0.06 * weight * torch.rand(20_000, generator=generator(6))
    for text in ("e4m3fn/none", "e5m2/none", "e3m4/none"):
        assert abs(from_sketch(weight, update, text) - directly(weight, update, text)) < 1e-3, text


def test_16_bit_parameters() -> None:
    weight = torch.randn(20_000, generator=generator(7)).bfloat16()
    update = (weight + 0.01 * torch.randn(20_000, generator=generator(8))).bfloat16() - weight
    assert from_sketch(weight, update, "bf16") == 0
    for text in ("e4m3fn/none", "e5m2/none"):
        assert abs(from_sketch(weight, update, text) - directly(weight, update, text)) < SHARE, text


def test_the_whole_way() -> None:
    """Followed in a window, scored from its file, against the updates of those very steps."""
    torch.manual_seed(0)
    model = nn.Linear(32, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    weights, updates = [], []
    with probe(model, optimizer, steps=12, curvature_steps=0) as window:
        for step in range(12):
            optimizer.zero_grad()
            model(torch.randn(64, 32)).square().mean().backward()
            before = model.weight.detach().clone()
            optimizer.step()
            if step in (2, 5, 8, 11):
                weights.append(before)
                updates.append(model.weight.detach() - before)
    assert window.history("weight", "update").steps.tolist() == [2, 5, 8, 11]
    for text in ("bf16", "fp16", "e4m3fn/none", "e5m2", "e4m3fn"):
        (row,) = (row for row in advisor.score(window, [text]).of("weight", "master"))
        shares = [directly(*pair, text) for pair in zip(weights, updates, strict=True)]
        assert abs(row["lost_updates"] - np.mean(shares)) < SHARE, text


@pytest.mark.parametrize("text", ["bf16", "fp16", "e4m3fn/none", "e4m3fn", "e5m2", "int8", "int4", "e2m1", "fp32"])
def test_the_compiled_share_is_the_plain_one(text: str) -> None:
    cast = Cast.parse(text)
    for seed, size in ((0, 1e-3), (1, 1e-7), (2, 10.0)):
        weight = torch.randn(4000, generator=generator(seed)) ** 3
        update = size * torch.randn(4000, generator=generator(seed + 50)) * weight.abs().sqrt()
        updates, amax = sketch(weight, update), float(weight.abs().max())
        reach = float(update.abs().min()), float(update.abs().max())
        (scale,) = scales(np.array([amax]), cast)
        for limits in ((0.0, math.inf), reach):
            plain = plain_lost_share(updates, cast, float(scale), amax, limits)
            assert lost_updates(updates, cast, amax, limits) == pytest.approx(plain, rel=1e-12, abs=1e-15)


def test_what_is_not_told() -> None:
    weight, update = torch.ones(100), torch.full((100,), 1e-3)
    for text in ("bf16/none/stochastic", "bf16/none/zero", "e4m3fn/row", "e8m0/none"):
        assert lost_updates(sketch(weight, update), Cast.parse(text)) is None
    assert lost_updates(sketch(weight, torch.zeros(100)), Cast.parse("bf16")) is None
    assert lost_updates(sketch(weight, update), Cast.parse("bf16")) == 1.0


# The sketch itself


@pytest.mark.parametrize("kind", ["any bits", "normal"])
def test_the_kernel_and_torchs_operations_agree(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    if kind == "normal":
        weight, update = torch.randn(2, 20_000, generator=generator)
        update *= 10 ** (3 * torch.randn(20_000, generator=generator) - 4)
    else:
        weight, update = AWKWARD["any bits"].float(), AWKWARD["any bits"].flip(0).float()
    bits = (part[:SAMPLE].contiguous().view(torch.int32) for part in (weight, update))
    assert torch.equal(cells_of(weight[:SAMPLE], update[:SAMPLE]), lost_updates_module._cells_of_bits(*bits))


def test_every_element_is_counted_once_and_in_its_place() -> None:
    weight, update = AWKWARD["any bits"].float(), AWKWARD["any bits"].flip(0).float()
    cells = cells_of(weight[:SAMPLE], update[:SAMPLE]).numpy()
    w, change = weight[:SAMPLE].abs().double().numpy(), update[:SAMPLE].abs().double().numpy()
    counted = np.isfinite(w) & np.isfinite(change) & (change > 0)
    assert ((cells > 0) == counted).all()
    assert (cells < CELLS).all()
    place, step = (cells[counted] - 1) // 2 // 512, (cells[counted] - 1) // 2 % 512
    w, change = w[counted], change[counted]
    edges = weight_edges()[place]
    inside = (place > 0) & (w < 2.0**16)
    assert 5000 < inside.sum() < len(w)
    assert ((edges[inside, 0] <= w[inside]) & (w[inside] <= edges[inside, 1])).all()
    assert (w[place == 0] < 2.0**-32).all()
    bounds = update_edges()
    assert ((change <= bounds[step + 1]) | (step == 511)).all()
    assert ((change > bounds[step]) | (step == 0)).all()


def test_classes_are_those_of_rounding() -> None:
    """Just above a power of two and just below one, ties with their power: where r is that power, and nowhere else."""
    for text, bits in (("e5m2/none", 2), ("e4m3fn/none", 3), ("e3m4/none", 4), ("bf16", 7), ("fp16", 10)):
        for edge in (1 + 2.0 ** -(bits + 1), 2 - 2.0 ** -(bits + 1)):
            weight = torch.tensor([edge - 1e-6, edge, edge + 1e-6])
            (low, tie, high) = cells_of(weight, torch.full((3,), 0.1)).tolist()
            held = Cast.parse(text)(weight).tolist()
            assert (low == tie) == (held[0] == held[1])
            assert (tie == high) == (held[1] == held[2])
            assert low != high


def test_a_large_parameter_is_sampled_over_all_its_columns() -> None:
    weight = torch.arange(1024.0).repeat(512, 1) + 1
    cells = cells_of(weight, torch.ones_like(weight))
    assert SAMPLE / 2 < len(cells) <= SAMPLE
    whole = UpdateSketch.of(torch.cat([cells_of(part, torch.ones_like(part)) for part in weight.split(16)]).numpy())
    part = UpdateSketch.of(cells.numpy())
    shares = [lost_updates(found, Cast.parse("bf16")) for found in (whole, part)]
    assert shares[0] == pytest.approx(shares[1], abs=3 * 0.5 / len(cells) ** 0.5)
    assert len(np.unique(part.weight)) >= len(np.unique(whole.weight)) - 1


def test_packed_and_joined() -> None:
    weight, update = torch.randn(5000, generator=generator(9)), 1e-3 * torch.randn(5000, generator=generator(10))
    whole = sketch(weight, update)
    read = UpdateSketch.unpack(whole.pack())
    assert np.array_equal(read.cells, whole.cells)
    assert np.array_equal(read.counts, whole.counts)
    joined = UpdateSketch.joined([sketch(weight[:700], update[:700]), sketch(weight[700:], update[700:])])
    assert joined.pack() == whole.pack()
    assert UpdateSketch.joined([]).total == 0
    assert UpdateSketch.unpack(UpdateSketch.joined([]).pack()).total == 0


def test_what_is_no_packed_sketch_is_refused() -> None:
    good = sketch(torch.ones(3), torch.ones(3))
    beyond = UpdateSketch(good.cells + CELLS, good.counts).pack()
    nothing = UpdateSketch(good.cells, 0 * good.counts).pack()
    for bad in ("", "AAAA", "no base 64!", good.pack()[:-8], beyond, nothing, good.pack() + "AAAA"):
        with pytest.raises(MalformedWindow):
            UpdateSketch.unpack(bad)
