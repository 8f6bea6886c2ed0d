"""Memory apart from the training's: nothing overlaps, a step's is used again, and nothing stays behind."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from probes import apart
from probes.apart import Apart, Copies, whole_lines
from probes.gradient_noise import Differences
from tests.tensors import generator


@pytest.mark.parametrize("dtype", [torch.int32, torch.bfloat16, torch.float64, torch.uint8])
def test_what_is_handed_out_does_not_overlap(dtype: torch.dtype) -> None:
    memory = Apart()
    parts = [memory.empty(size, dtype).fill_(k) for k, size in enumerate((1, 7, 0, 64, 1000, 3))]
    for k, (part, size) in enumerate(zip(parts, (1, 7, 0, 64, 1000, 3), strict=True)):
        assert part.dtype == dtype
        assert part.shape == (size,)
        assert bool((part == k).all())


def test_another_block_is_taken_when_one_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_BLOCK", 256)
    memory = Apart()
    parts = [memory.empty(40, torch.int32).fill_(k) for k in range(5)]
    large = memory.empty(1000, torch.int32).fill_(9)  # larger than a block
    assert [int(part.sum()) for part in parts] == [40 * k for k in range(5)]
    assert int(large.sum()) == 9000


def test_a_block_goes_when_nothing_in_it_is_referred_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_BLOCK", 256)
    memory = Apart()
    part = memory.copy_of(np.arange(8))
    block = weakref.ref(memory._block)
    memory.copy_of(np.arange(64))  # from the next one
    gc.collect()
    assert block() is not None
    assert part.tolist() == list(range(8))
    del part
    gc.collect()
    assert block() is None


def test_a_copied_array_is_the_same_and_its_own() -> None:
    given = np.arange(12, dtype=np.uint16).reshape(3, 4)
    copy = Apart().copy_of(given)
    given += 1
    assert copy.dtype == np.uint16
    assert copy.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_copies_keep_the_order_in_memory_and_are_put_where_the_last_ones_were() -> None:
    plain, turned = torch.randn(5, 3, generator=generator()), torch.randn(4, 6, generator=generator()).t()
    half = plain.bfloat16()
    copies, places = Copies(), []
    for _ in range(2):
        copies.begin(sum(whole_lines(one.nbytes) for one in (plain, turned, half)))
        found = [copies.of(one) for one in (plain, turned, half)]
        for one, copy in zip((plain, turned, half), found, strict=True):
            assert torch.equal(one, copy)
            assert one.stride() == copy.stride()
        places.append([copy.data_ptr() for copy in found])
    assert places[0] == places[1]
    assert len(set(places[0])) == 3


@pytest.mark.parametrize("values", [torch.ones(100), torch.ones(4, 8)[:, ::2]], ids=["no room", "gaps"])
def test_a_copy_without_a_place_has_memory_of_its_own(values: torch.Tensor) -> None:
    copies = Copies()
    copies.begin(64)
    first = copies.of(torch.zeros(4))
    copy = copies.of(values)
    copy += 1
    assert bool((copy == 2).all())
    assert not first.any()
    assert bool((values == 1).all())


def test_samples_of_gradients_take_turns_in_two_places() -> None:
    """What is allocated at each step and stays to the next one makes the heap grow from step to step."""
    differences, places = Differences(), []
    for step in range(6):
        differences.add({"weight": torch.full((50,), float(step))})
        places.append(differences._last[torch.device("cpu")].values.data_ptr())
    assert places[:2] == places[2:4] == places[4:]
    assert differences.sums() == {
        "weight": (sum(50 / 2 for _ in range(5)), sum(50 * (k**2 + (k + 1) ** 2) / 2 for k in range(5)))
    }
