"""Windows of two processes equal that of one on the joined batch: values are small integers, so sums are exact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probes.distributed import group_of
from probes.errors import WindowError
from probes.history import SlotHistory
from probes.probing import probe
from probes.window import Window
from tests.ranks import on_ranks
from tests.tensors import same_history

STEPS, SAMPLES = 3, 8


class Small(nn.Module):
    """A linear layer, attention-like products of activations, and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(self.up(x).relu())
        mixed = (x @ x.transpose(1, 2)) @ x
        return nn.functional.linear(mixed, self.embedding.weight)


def small() -> nn.Module:
    model = Small()
    values = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = torch.randint(-1, 2, parameter.shape, generator=values).float()
    return model


def batch(step: int) -> Tensor:
    return torch.randint(0, 8, (SAMPLES, 2), generator=torch.Generator().manual_seed(step))


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    model(tokens).sum(dim=(1, 2)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def watched(model: nn.Module, parts: int = 1, part: int = 0, **options: Any) -> Window:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=STEPS, curvature_steps=0, finer=["row", "block32/e8m0"], **options) as window:
        for step in range(STEPS):
            step_once(model, optimizer, batch(step).chunk(parts)[part])
    return window


def within_samples(history: SlotHistory) -> dict[str, Any]:
    """Tiles that run over samples lie within a rank's part of the batch, as the product they are for does."""
    return {key: finer for key, finer in history.finer.items() if key.endswith("along -1")}


def ddp_rank(rank: int) -> bytes:
    return watched(nn.parallel.DistributedDataParallel(small()), 2, rank).to_bytes()


def fsdp_rank(rank: int) -> bytes:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return watched(model, 2, rank).to_bytes()


@pytest.mark.parametrize("rank_function", [ddp_rank, fsdp_rank])
def test_two_ranks_equal_one_process_on_the_joined_batch(rank_function: Any, tmp_path: Path) -> None:
    from probes.windowfile import window_from_bytes

    joined = watched(small())
    ranks = [window_from_bytes(data) for data in on_ranks(2, rank_function, tmp_path)]
    assert ranks[0].header() == ranks[1].header()
    merged = ranks[0]
    assert merged.world_size == 2
    assert merged.losses == pytest.approx(joined.losses, rel=1e-6)
    assert set(merged.slots) == set(joined.slots)
    for slot in joined.slots:
        found, expected = merged.history(*slot), joined.history(*slot)
        assert (found.distinct <= expected.distinct).all()  # a sketch of ranks knows the largest of their counts
        assert found.finer.keys() == expected.finer.keys()
        assert same_history(
            dataclasses.replace(found, distinct=expected.distinct, finer=within_samples(found)),
            dataclasses.replace(expected, finer=within_samples(expected)),
        ), slot
    for site in joined.sites:
        assert merged.site(site.name).flops == site.flops
        assert merged.site(site.name).elements == site.elements
        assert merged.site(site.name).parameter == site.parameter
    for record in joined.parameter_records:
        found_record = merged.parameter_record(record.name)
        assert found_record is not None
        assert (found_record.shape, found_record.elements) == (record.shape, record.elements)
        assert found_record.roles == record.roles


def test_a_group_without_distributed_is_refused() -> None:
    with pytest.raises(WindowError, match="not initialized"):
        group_of(nn.Linear(2, 2), given=object())
