"""What a step holds in memory: by hand, and from a real window."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.castnames import KEEP, parse_cast
from advisor.cost import memory, role_bytes, shared_tensors
from probes.casts import Cast
from probes.parameter_records import ParameterRecord
from probes.records import Site
from probes.window import Window
from tests.planned import linear

ADAM = {"exp_avg": "float32", "exp_avg_sq": "float32"}


def record(name: str, elements: int, dtype: str = "float32", **states: str) -> ParameterRecord:
    return ParameterRecord(name=name, dtype=dtype, roles=(), elements=elements, states=states)


def everything(sites: list[Site], cast: str = KEEP) -> dict[tuple[str, str], Cast]:
    return {(site.name, role): parse_cast(cast) for site in sites for role in site.roles}


def test_records_bring_gradients_states_and_the_weights_of_no_product() -> None:
    site = linear()
    records = [record("up.weight", 32 * 64, **ADAM), record("norm.weight", 64, **ADAM)]
    found = memory([site], everything([site]), records)
    assert found.weights_bytes == 4 * (32 * 64 + 64)
    assert found.gradients_bytes == 4 * (32 * 64 + 64)
    assert found.states_bytes == 8 * (32 * 64 + 64)
    assert found.activations_bytes == memory([site], everything([site])).activations_bytes
    parts = found.weights_bytes + found.gradients_bytes + found.states_bytes + found.activations_bytes
    assert found.total_bytes == parts


def test_a_weight_without_a_record_counts_as_before() -> None:
    site = linear()  # frozen, say: the optimizer does not hold it
    found = memory([site], everything([site]), [record("norm.weight", 64)])
    assert found.weights_bytes == 4 * (32 * 64 + 64)
    assert found.gradients_bytes == 4 * 64


def test_tensors_that_a_plan_keeps_narrower_take_less() -> None:
    site = linear()
    records = [record("up.weight", 32 * 64, **ADAM)]
    storage = {
        ("up.weight", "master"): parse_cast("bf16"),
        ("up.weight", "exp_avg"): parse_cast("e4m3fn"),
        ("up.weight", "exp_avg_sq"): parse_cast(KEEP),
    }
    found = memory([site], everything([site]), records, storage)
    assert found.weights_bytes == 2 * 32 * 64
    assert found.states_bytes == (1 + 4) * 32 * 64
    wider = memory([site], everything([site]), [record("up.weight", 32 * 64, "bfloat16")], {
        ("up.weight", "master"): parse_cast("fp64"),
    })  # fmt: skip
    assert wider.weights_bytes == 2 * 32 * 64


@pytest.mark.parametrize(("kind", "bytes_each"), [("uint8", 1), ("bfloat16", 2), ("float64", 8), ("SomeTensor", 4)])
def test_states_of_other_kinds(kind: str, bytes_each: int) -> None:
    assert memory([], {}, [record("p", 100, first=kind)]).states_bytes == 100 * bytes_each


def test_slices_of_one_parameter_have_copies_of_their_own() -> None:
    """q and k as two products with halves of one weight: half a copy each, and not one that is shared."""
    halves = [
        dataclasses.replace(linear(name), parameter="both.weight", parameter_shape=(64, 64)) for name in ("q", "k")
    ]
    assert memory(halves, everything(halves, "e4m3fn")).copies_bytes == 2 * 32 * 64
    tied = [dataclasses.replace(linear(name), parameter="w", parameter_shape=(32, 64)) for name in ("q", "k")]
    assert memory(tied, everything(tied, "e4m3fn")).copies_bytes == 32 * 64


def test_a_shared_activation_counts_once_for_each_way_it_is_written() -> None:
    sites = [linear(name) for name in ("q", "k", "v")]
    shared = {(site.name, "input"): ("q", "input") for site in sites}
    casts = everything(sites)
    assert memory(sites, casts).activations_bytes == 3 * 4 * 16 * 64
    assert memory(sites, casts, shared=shared).activations_bytes == 4 * 16 * 64
    casts["v", "input"] = parse_cast("e4m3fn")
    assert memory(sites, casts, shared=shared).activations_bytes == (4 + 1) * 16 * 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.up = (nn.Linear(16, 16) for _ in range(4))
        self.lstm = nn.LSTM(16, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.up(mixed) + self.lstm(mixed)[0].mean()


@pytest.fixture(scope="module")
def window() -> Window:
    torch.manual_seed(0)
    model = Block()
    optimizer = torch.optim.Adam(model.parameters())
    with advisor.probe(model, optimizer, steps=3, curvature_steps=0) as found:
        for _ in range(3):
            F.cross_entropy(model(torch.randn(4, 6, 16)).mean(1), torch.randint(0, 16, (4,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    return found


def test_a_window_tells_which_slots_hold_the_same_tensor(window: Window) -> None:
    shared = shared_tensors(window)
    assert shared["query", "input"] == shared["key", "input"] == shared["value", "input"] == ("query", "input")
    assert shared["up", "input"] == shared["lstm", "input"] == ("up", "input")
    inputs = [("(root)/sdpa.0", role) for role in ("query", "key", "value")]
    assert [shared[slot] for slot in inputs] == inputs
    assert not any(role.startswith("weight") or role == "grad_output" for _, role in shared)


def test_memory_of_a_real_model(window: Window) -> None:
    sites = list(window.sites)
    found = memory(sites, everything(sites), window.parameter_records, shared=shared_tensors(window))
    weights = sum(parameter.numel() for parameter in Block().parameters())
    assert found.weights_bytes == found.gradients_bytes == 4 * weights
    assert found.states_bytes == 8 * weights
    # x, attention's output, its query, key and value, each once
    assert found.activations_bytes == 4 * (5 * 4 * 6 * 16)
    narrow = memory(sites, everything(sites, "bf16"), window.parameter_records, shared=shared_tensors(window))
    assert narrow.activations_bytes * 2 == found.activations_bytes
    matrices = sum(one.numel() for name, one in Block().named_parameters() if "weight" in name)
    assert narrow.copies_bytes == 2 * matrices


def test_recurrent_weights_are_weights(window: Window) -> None:
    site = window.site("lstm")
    assert role_bytes(site, "weight_ih_l0", parse_cast(KEEP)) == 0  # and no saved activations
    assert role_bytes(site, "weight_ih_l0", parse_cast("bf16")) == 2 * 32 * 16
