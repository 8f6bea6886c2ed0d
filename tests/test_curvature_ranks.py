"""Scored steps where two processes train together: nothing of the training changes, and the measured is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probes.probing import probe
from probes.window import Window
from tests.ranks import on_ranks

SITES = ("first", "blocks.0.up", "blocks.1.down", "head")


class Block(nn.Module):
    """A residual block with two products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(F.gelu(self.up(x)))
        return result


class Model(nn.Module):
    """Two blocks that are recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        result: Tensor = self.head(x)
        return result


def trained(wrap: Callable[[nn.Module], nn.Module], rank: int, watched: bool) -> tuple[list[Tensor], Window | None]:
    """The gradients and parameters of some steps, each rank on its own half of the batch."""
    torch.manual_seed(0)
    model = wrap(Model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: list[Tensor] = []
    watching = probe(model, optimizer, steps=3) if watched else None
    window = None if watching is None else watching.__enter__()
    for step in range(4):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).chunk(2)[rank]
        F.cross_entropy(model(x), torch.arange(4)).backward()
        seen += [parameter.grad.detach().clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    if watching is not None:
        watching.__exit__(None, None, None)
    return [_whole(tensor) for tensor in (*seen, *model.parameters())], window


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def replicated(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def static(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, static_graph=True)


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    assert isinstance(model, Model)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.blocks, model.first):
        fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def every_way(rank: int) -> dict[str, dict[str, Any]]:
    return {wrap.__name__: both(rank, wrap) for wrap in (replicated, static, sharded)}


def both(rank: int, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
    plain, _ = trained(wrap, rank, watched=False)
    seen, window = trained(wrap, rank, watched=True)
    assert window is not None
    evidence = {site: window.evidence(site, "weight") for site in SITES}
    return {
        "same": len(plain) == len(seen) and all(map(torch.equal, plain, seen)),
        "notes": window.notes,
        "from": window.curvature_from,
        "curvature": {site: found.curvature for site, found in evidence.items()},
        "directional": {
            site: {cast: value - found.beyond.get(cast, 0.0) for cast, value in found.directional.items()}
            for site, found in evidence.items()
        },
        "beyond": {site: dict(found.beyond) for site, found in evidence.items()},
        "noise": {site: dict(found.relative_noise) for site, found in evidence.items()},
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    first: dict[str, dict[str, Any]] = on_ranks(2, every_way, tmp_path_factory.mktemp("ranks"))[0]
    return first


@pytest.mark.parametrize("way", ["replicated", "static", "sharded"])
def test_processes_train_as_they_would_unwatched(way: str, found: dict[str, dict[str, Any]]) -> None:
    """A static graph is not scored before DistributedDataParallel knows it, but is afterwards."""
    assert found[way]["same"]
    assert len(found[way]["notes"]) == (way == "sharded")
    assert all(map(bool, found[way]["beyond"].values())) == (way != "sharded")
    assert found[way]["from"] == "loss"
    assert all(curvature > 0 for curvature in found[way]["curvature"].values())


def test_a_rank_that_holds_no_weight_whole_measures_the_same(found: dict[str, dict[str, Any]]) -> None:
    """FSDP2: a weight is there while it is used, forward and backward. Its damage is Gauss-Newton's alone."""
    sharded, replicated = found["sharded"], found["replicated"]
    for kind in ("directional", "noise"):
        for site in SITES:
            assert sharded[kind][site] == pytest.approx(replicated[kind][site], rel=1e-3)
    assert sharded["curvature"] == pytest.approx(replicated["curvature"], rel=1e-3)
