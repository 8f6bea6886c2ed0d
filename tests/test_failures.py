"""The cause of a cast's harm is read off the tensor's own numbers: planted ones are found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advisor
from advisor.failures import cause
from probes.probing import probe
from tests.planned import score


def scored(x: Tensor, cast: str) -> dict[str, Any]:
    """The score of one cast on a layer's input of these values."""
    model = nn.Linear(x.shape[1], 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with probe(model, optimizer, steps=1, curvature_steps=0) as window:
        F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
        optimizer.step()
    (row,) = advisor.score(window, [cast]).of("(root)", "input")
    return row


def values(seed: int = 0) -> Tensor:
    return torch.randn(256, 64, generator=torch.Generator().manual_seed(seed))


def test_an_outlier_costs_the_rest_its_steps() -> None:
    x = values()
    x[0, 0] = 400.0
    told = cause(scored(x, "int8"))
    rms = float(x.square().mean().sqrt())
    assert told.startswith(f"outliers: the largest value is {400 / rms:.0f}× the RMS")
    assert f"leaves the RMS {127 * rms / 400:.2g} of int8's 127 steps" in told
    assert cause(scored(x, "e4m3fn")) == "coarse: e4m3fn has 3 mantissa bits"  # a float does not mind


def test_clipping_without_a_scale() -> None:
    assert "clipping: the largest value" in cause(scored(values() * 1e5, "fp16"))
    assert "beyond fp16's 6.55e+04" in cause(scored(values() * 1e5, "fp16"))


def test_flushing_without_a_scale() -> None:
    told = cause(scored(values() * 1e-6, "e5m2/none"))
    assert told == "flushing to zero: without a scale the smallest step is 1.5e-05, and the RMS is 1.0e-06"


def test_a_wide_range_under_one_scale() -> None:
    x = values() * 10 ** (3 * values(1))
    assert cause(scored(x, "e4m3fn")).startswith(("outliers", "flushing"))


@pytest.mark.parametrize(("cast", "bits"), [("e5m2", "2 mantissa bits"), ("bf16", "7 mantissa bits")])
def test_a_coarse_grid(cast: str, bits: str) -> None:
    assert cause(scored(values(), cast)) == f"coarse: {cast} has {bits}"


def test_nothing_is_said_where_nothing_is_known() -> None:
    assert cause(score("up", "input", "int8", 1.0)) == ""
    assert cause(score("up", "input", "e4m3fn", 1.0, sqnr_db=float("nan"), rms=None, amax=None, underflow=None)) == ""
