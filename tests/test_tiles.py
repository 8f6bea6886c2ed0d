"""Which tilings a slot gets, and scores from a window that was opened with them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import advisor
from advisor.errors import CastNotScored, InvalidPlan
from probes.casts import Cast
from probes.errors import WindowError
from probes.tiles import axes_of, checked_names, tiling_name, tilings_of

LAYER, PAIR = ("input", "weight"), ("lhs", "rhs")
CASTS = [
    "e4m3fn/row",
    "e4m3fn/column",
    "e4m3fn/block32",
    "e5m2/block32/e8m0up",
    "e2m1/block16/nvfp4",
    "e4m3fn/block128x128",
]
FINER = ["row", "block32", "block16", "block128x128"]


@pytest.mark.parametrize(
    ("op", "roles", "role", "dimensions", "axes"),
    [
        ("linear", LAYER, "input", 3, "along -1, across -1"),
        ("linear", LAYER, "weight", 2, "along -1, across -1"),
        ("linear", LAYER, "grad_output", 3, "along -1, across -1"),
        ("linear", LAYER, "input", 1, "along -1"),
        ("matmul", PAIR, "lhs", 4, "along -1, along -2"),
        ("bmm", PAIR, "rhs", 3, "along -2, along -1"),
        ("bmm", PAIR, "grad_output", 3, "along -1, along -2"),
        ("addmm", LAYER, "input", 2, "along -1, across -1"),
        ("addmm", LAYER, "weight", 2, "along -2, along -1"),
        ("matmul", ("weight", "input"), "weight", 2, "along -1, along -2"),
        ("matmul", ("weight", "input"), "grad_output", 3, "along -2, along -1"),
        ("mv", PAIR, "rhs", 1, "along -1"),
        ("sdpa", ("query", "key", "value"), "key", 4, "along -1, along -2"),
        ("sdpa", ("query", "key", "value"), "value", 4, "along -2, along -1"),
        ("sdpa", ("query", "key", "value"), "grad_output", 4, "along -1, along -2"),
        ("conv2d", LAYER, "input", 4, "along -3, across -3"),
        ("conv2d", LAYER, "weight", 4, "across -4, across -3"),
        ("conv1d", LAYER, "grad_output", 3, "along -2, across -2"),
        ("conv_transpose2d", LAYER, "weight", 4, "across -3, across -4"),
    ],
)
def test_axes_are_inner_dimensions(op: str, roles: tuple[str, ...], role: str, dimensions: int, axes: str) -> None:
    assert ", ".join(map(str, axes_of(op, roles, role, dimensions))) == axes


def test_names() -> None:
    def keys(*names: str, dimensions: int = 2) -> list[str]:
        return [tiling.key for tiling in tilings_of(names, "linear", LAYER, "input", dimensions)]

    assert keys("row") == ["row/current along -1", "row/current across -1"]
    assert keys("row", "column") == ["row/current along -1", "row/current across -1"]  # a column is the other axis' row
    assert keys("block32", "block32/e8m0up") == ["block32/e8m0 along -1", "block32/e8m0 across -1"]
    assert keys("block16", dimensions=1) == ["block16/nvfp4 along -1"]
    assert keys("block128x128") == ["block128x128/current along -1"]  # the same squares either way
    assert keys("row/current:pow2") == ["row/e8m0 along -1", "row/e8m0 across -1"]
    assert checked_names(["row", "block32", "row/current"]) == ("row/current", "block32/e8m0")
    for name in ("tensor", "block64", "row/e8m0up", "block32/nvfp4", "row/current/nearest", ""):
        with pytest.raises(WindowError, match="there is row/current"):
            keys(name)


@pytest.mark.parametrize("granularity", ["row", "column", "block32", "block16", "block1x128", "block128x128"])
def test_every_rule_has_a_sketch_that_its_own_name_asks_for(granularity: str) -> None:
    from probes.scaling import RULES

    for rule in (*RULES[granularity], "current:pow2"):
        cast = Cast.parse(f"e4m3fn/{granularity}/{rule}")
        assert tiling_name(cast) in checked_names([tiling_name(cast)])
        assert tilings_of([f"{granularity}/{rule}"], "linear", LAYER, "input", 2)[0].granularity != "column"


class Net(nn.Module):
    """A linear layer whose products an outside check can repeat, a convolution, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 96, 3)
        self.proj = nn.Linear(96, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.proj(self.conv(x).transpose(1, 2)).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(hidden, hidden * 0.5, hidden).squeeze(1)
        return self.head(mixed.mean(dim=1))


def opened(finer: list[str], steps: int = 2) -> tuple[advisor.Window, list[Tensor]]:
    """A window over a few steps, and what the layer `proj` was given in each."""
    torch.manual_seed(0)
    net, seen = Net(), []
    net.proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    with advisor.probe(net, optimizer, steps=steps, curvature_steps=0, finer=finer) as window:
        for step in range(steps):
            x = torch.randn(32, 4, 50, generator=torch.Generator().manual_seed(step))
            F.cross_entropy(net(x), torch.arange(32) % 10).backward()
            optimizer.step()
            optimizer.zero_grad()
    return window, seen


def test_a_scored_row_is_the_cast_applied_directly() -> None:
    window, seen = opened([*FINER, "column"])
    scores = advisor.score(window, casts=CASTS)
    weight = torch.manual_seed(0) and Net().proj.weight.detach()
    for cast in CASTS:
        for role, tensors in (("input", seen), ("weight", [weight, weight])):
            for dimension, axis in ((-1, "along -1"), (0, "across -1")):
                signal = error = flushed = nonzero = 0.0
                for x in (tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors):
                    result = Cast.parse(cast)(x, dimension=dimension).double()
                    signal += float(x.double().square().sum())
                    error += float((result - x.double()).square().sum())
                    flushed += float(((result == 0) & (x != 0)).sum())
                    nonzero += float((x != 0).sum())
                (row,) = [row for row in scores.of("proj", role) if row["cast"] == str(Cast.parse(cast))]
                (found,) = [one for one in (row, *row["other_axes"]) if one["axis"] == axis]
                assert found["flags"] == [], (cast, role, axis)
                assert abs(found["sqnr_db"] - 10 * math.log10(signal / error)) < 0.5, (cast, role, axis)
                assert abs(found["underflow"] - flushed / nonzero) < 0.005


def test_every_product_has_scores_along_its_axes() -> None:
    window, _ = opened(FINER, steps=1)
    scores = advisor.score(window, casts=["e4m3fn/row", "e4m3fn"])
    assert {(row["site"], row["role"]) for row in scores.rows} == set(window.product_slots) | {
        (slot.site, slot.role) for slot in window.slots if not window.is_product(slot)
    }
    by_slot = {
        (row["site"], row["role"]): [one["axis"] for one in (row, *row["other_axes"])]
        for row in scores.rows
        if row["axis"] is not None
    }
    assert by_slot["conv", "weight"] == ["across -3", "across -2"]
    assert by_slot["(root)/sdpa.0", "value"] == ["along -2", "along -1"]
    assert by_slot["(root)/sdpa.0", "query"] == ["along -1", "along -2"]
    assert {*by_slot} == set(window.product_slots)
    per_tensor = [row for row in scores.rows if row["cast"] == "e4m3fn/tensor/current/nearest"]
    assert all((row["axis"], row["other_axes"]) == (None, []) for row in per_tensor)


def test_the_file_keeps_them(tmp_path: Path) -> None:
    window, _ = opened(["row", "block32"], steps=1)
    window.save(tmp_path / "window.safetensors")
    again = advisor.load_window(tmp_path / "window.safetensors")
    casts = ["e4m3fn/row", "e4m3fn/block32"]
    assert advisor.score(again, casts).rows == advisor.score(window, casts).rows


def test_what_the_window_was_not_opened_for_is_refused_with_the_way_to_it() -> None:
    window, _ = opened(["row"], steps=1)
    with pytest.raises(CastNotScored, match=r"finer=\['block32/e8m0'\]"):
        advisor.score(window, ["e4m3fn/block32"])
    with pytest.raises(CastNotScored, match=r"finer=\['row/e8m0'\]"):
        advisor.score(window, ["e4m3fn/row/current:pow2"])
    with pytest.raises(CastNotScored, match="needs no scale finer than a tensor's"):
        advisor.score(window, ["bf16/row"])
    with pytest.raises(InvalidPlan, match="a scale for every column"):
        advisor.recommend(window, casts=["e4m3fn/column"], tolerance=1.0)
    assert len(advisor.score(window, ["fp32/row"]).rows) == len(window.slots)  # which needs no scale at all
    with pytest.raises(WindowError, match="no tiling is called 'blocks'"):
        opened(["blocks"])


def test_watching_finer_does_not_disturb() -> None:
    def trained(finer: list[str] | None) -> list[Tensor]:
        torch.manual_seed(0)
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        x, y = torch.randn(32, 4, 50), torch.arange(32) % 10

        def train() -> None:
            for _ in range(3):
                F.cross_entropy(net(x + torch.randn(1)), y).backward()
                optimizer.step()
                optimizer.zero_grad()

        if finer is None:
            train()
        else:
            with advisor.probe(net, optimizer, steps=3, finer=finer):
                train()
        return [parameter.detach().clone() for parameter in net.parameters()]

    assert all(map(torch.equal, trained(None), trained(FINER)))
