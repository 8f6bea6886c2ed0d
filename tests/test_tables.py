"""A window as pandas, Parquet and TensorBoard hold it says what its sketches say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from probes.errors import MissingPackage
from probes.probing import probe
from probes.step_table import COLUMNS, HEADER_KEY, step_table
from probes.window import Window

SCALE = 1024.0
INPUTS = [torch.tensor([[1.0, -2.0, 0.0], [4.0, 0.5, float(odd)]]) for odd in ("inf", "nan", 0.25)]


@pytest.fixture(scope="module")
def window() -> Window:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=3, curvature_steps=0, loss_scale=SCALE) as opened:
        for x in INPUTS:
            (F.mse_loss(model(x), torch.zeros(2, 2)) * SCALE).backward()
            optimizer.step()
            optimizer.zero_grad()
    return opened


def test_the_table_is_of_the_very_tensors(window: Window) -> None:
    table = step_table(window)
    assert tuple(table) == COLUMNS
    assert {len(values) for values in table.values()} == {3 * len(window.slots)}
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    inputs = [row for row in rows if row["role"] == "input"]
    for row, x in zip(inputs, INPUTS, strict=True):
        finite: Tensor = x[x.isfinite()].double()
        assert row["elements"] == 6
        assert row["zeros"] == 1
        assert row["nonzero"] == len(finite) - 1
        assert (row["nans"], row["positive_infs"]) == (int(x.isnan().sum()), int(x.isposinf().sum()))
        assert row["mean_square"] == pytest.approx(float(finite.square().mean()))
        assert row["rms"] == pytest.approx(row["mean_square"] ** 0.5)
        assert row["amax"] == 4.0
        assert row["dynamic_range_bits"] == math.log2(4.0 / row["amin"])
        assert row["dtype"] == "float32"


def test_loss_scales_are_taken_out(window: Window) -> None:
    table = step_table(window)
    at = list(zip(table["role"], table["step"], strict=True)).index(("grad_output", 2))
    history = window.history("(root)", "grad_output")
    assert table["loss_scale"][at] == SCALE
    assert table["amax"][at] == float(history.amax[2]) / SCALE


def test_pandas(window: Window) -> None:
    frame = window.to_pandas()
    assert list(frame.columns) == list(COLUMNS)
    assert len(frame) == 3 * len(window.slots)
    assert frame[(frame.role == "input") & (frame.step == 2)].amin.item() == 0.25
    scores = advisor.score(window, ["bf16"])
    assert np.array_equal(scores.to_pandas()["sqnr_db"], [row["sqnr_db"] for row in scores.rows], equal_nan=True)


def test_parquet_reads_back_with_its_header(window: Window, tmp_path: Path) -> None:
    import pyarrow.parquet

    window.to_parquet(tmp_path / "w.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "w.parquet")
    back, expected = table.to_pydict(), step_table(window)
    for name in COLUMNS:
        assert np.array_equal(back[name], expected[name], equal_nan=isinstance(expected[name][0], float)), name
    assert json.loads(table.schema.metadata[HEADER_KEY])["model"] == "Linear"


def test_event_files_read_back(window: Window, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    window.to_tensorboard(tmp_path / "events")
    events = EventAccumulator(str(tmp_path / "events"), size_guidance={"histograms": 0})  # all of them
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("(root)/input/amax")] == [(0, 4), (1, 4), (2, 4)]
    nonfinite = [event.value for event in events.Scalars("(root)/input/nonfinite")]
    assert nonfinite == pytest.approx([1 / 6, 1 / 6, 0])
    assert [event.value for event in events.Scalars("loss_scale")] == [SCALE] * 3
    histogram = events.Histograms("(root)/input/log2")[2].histogram_value
    assert histogram.num == 5
    held = dict(zip(histogram.bucket_limit, histogram.bucket, strict=True))
    for value in (0.25, 0.5, 1.0, 2.0, 4.0):  # log2 is the lower end of a bucket half an octave wide
        assert held[math.log2(value) + 0.5] == 1
    assert "(root)/grad_output/log2" in events.Tags()["histograms"]


@pytest.mark.parametrize(
    ("name", "call"), [("pandas", "to_pandas"), ("pyarrow", "to_parquet"), ("tensorboard", "to_tensorboard")]
)
def test_what_is_missing_is_named(
    window: Window, name: str, call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackage, match=f"pip install {name}"):
        getattr(window, call)(*([] if call == "to_pandas" else [tmp_path / "x"]))
