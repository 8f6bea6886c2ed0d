"""Packed histories read back as they were, and junk is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from probes.errors import MalformedWindow
from probes.history import SlotHistory, history_of, sparse_row
from probes.sketch import SketchArray
from tests.tensors import AWKWARD, same_history


def recorded(*names: str) -> SlotHistory:
    array, rows = SketchArray(1), []
    for step, name in enumerate(names):
        array.add(0, AWKWARD[name])
        sums, extremes = (part.numpy() for part in array.drain())
        rows.append(sparse_row(step, sums[0], extremes[0]))
    return history_of(rows)


@pytest.mark.parametrize("names", [(), ("rows",), tuple(AWKWARD)])
def test_pack_round_trip(names: tuple[str, ...]) -> None:
    history = recorded(*names)
    assert same_history(SlotHistory.unpack(history.pack()), history)


def test_elements_count_every_kind() -> None:
    history = recorded(*AWKWARD)
    assert history.elements.tolist() == [values.numel() for values in AWKWARD.values()]
    finite = [int((values.isfinite() & (values != 0)).sum()) for values in AWKWARD.values()]
    assert history.nonzero.tolist() == finite


def test_a_step_takes_some_hundred_bytes() -> None:
    assert len(recorded(*["rows"] * 20).pack()) / 20 < 600


@pytest.mark.parametrize("cut", [0, 3, 10, 16, 60, -1])
def test_truncated_bytes_are_refused(cut: int) -> None:
    with pytest.raises(MalformedWindow):
        SlotHistory.unpack(recorded("rows", "bf16").pack()[:cut])


def test_a_hostile_length_is_refused_without_the_memory() -> None:
    packed = bytearray(recorded("rows").pack())
    packed[4:16] = b"\xff" * 12
    with pytest.raises(MalformedWindow, match="known version"):
        SlotHistory.unpack(bytes(packed))


@pytest.mark.parametrize(
    "change",
    [
        {"counts": np.array([-1])},
        {"amax": np.array([np.nan])},
        {"amin": np.array([9e9])},
        {"offsets": np.array([0, 5000])},
        {"zeros": np.array([1, 2])},
        {"zeros": np.array([2**63 - 1])},
        {"steps": np.array([-1])},
        {"sum_of_squares": np.array([1e-9])},
        {"sum_of_squares": np.array([1e30])},
        {"amax": np.array([1.0], dtype=np.float32)},
    ],
)
def test_arrays_that_contradict_each_other_are_refused(change: dict[str, np.ndarray]) -> None:
    with pytest.raises(MalformedWindow, match="contradict"):
        dataclasses.replace(recorded("rows"), **change).checked()


@pytest.mark.parametrize("name", ["steps", "bins"])
def test_steps_and_bins_rise(name: str) -> None:
    history = recorded("rows", "rows")
    backwards = dataclasses.replace(history, **{name: getattr(history, name)[::-1]})
    with pytest.raises(MalformedWindow, match="contradict"):
        backwards.checked()
