"""Windows that an earlier version recorded stay readable: files, and the packed histories of a database."""

from __future__ import annotations

from pathlib import Path

import pytest

import advisor
from probes.history import SlotHistory
from probes.windowfile import window_from_bytes

DATA = Path(__file__).parent / "data"


def test_a_file_of_the_first_version() -> None:
    window = advisor.load_window(DATA / "window-1.safetensors")
    assert window.steps == (0, 1, 2)
    assert window.loss_scales == (1.0, 1.0, 1.0)
    assert window.losses == pytest.approx([1.1057120561599731, 1.071610450744629, 1.0392616987228394])
    assert window.curvature_from == "loss"
    assert advisor.score(window).of("0", "weight")[0]["damage"] > 0
    gradient = advisor.score(window).of("0", "grad_output")[0]
    assert gradient["noise_ratio"] > 0
    assert gradient["systematic_ratio"] is None  # what nobody measured then is unknown, and limits nothing
    again = window_from_bytes(window.to_bytes())
    assert again.header() == window.header()
    assert again.header()["schema"] == "numerics-advisor/window/2"


def test_a_packed_history_of_the_first_version() -> None:
    history = SlotHistory.unpack((DATA / "history-1.packed").read_bytes())
    assert history.gain.tolist() == [1.0, 1.0, 1.0]
    assert history.finer == {}
    assert SlotHistory.unpack(history.pack()).counts.tolist() == history.counts.tolist()
