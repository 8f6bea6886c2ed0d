"""Devices: the table's figures against each other, and devices of the user's own."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from advisor.calibration import measured_cpu
from advisor.errors import AdvisorError, InvalidHardware, UnknownHardware
from advisor.hardware import HARDWARE, Hardware, hardware_named
from api.routes.catalogue import hardware as service_hardware
from probes.formats import FORMATS

OWN = Hardware(
    name="mine",
    title="Mine",
    pairs=frozenset({("fp32", "fp32"), ("bf16", "bf16"), ("e4m3fn", "e4m3fn")}),
    memory_bytes=10**10,
    source="measured here",
    tflops={"fp32": 10, "bf16": 100, "e4m3fn": 200},
    bandwidth_bytes_s=1e12,
)


def test_the_issue_names_these_devices() -> None:
    assert set(HARDWARE) == {"a100", "b200", "cpu", "h100", "h100-pcie", "h200", "l40s", "mi300x", "rtx4090"}


@pytest.mark.parametrize("row", HARDWARE.values(), ids=lambda row: row.name)
def test_every_row_has_a_rate_for_what_it_multiplies_and_a_source_for_what_no_data_sheet_has(row: Hardware) -> None:
    assert set(row.formats) <= set(row.tflops) <= set(FORMATS)
    assert row.has_rates
    assert row.source
    if row.name != "cpu":  # there one measurement gave every figure
        assert set(row.sources) == {
            "achieved",
            "achieved_8bit",
            "achieved_bandwidth",
            "launch_s",
            "product_start_s",
            "tile_s",
        }
        assert all(row.sources.values())
        # Dense: 8 bits at twice the rate of 16, and 16 at twice (Ada's, Hopper's tf32) that of tf32
        eight = [row.tflops[name] for name in row.formats if FORMATS[name].bits == 8 and name != "int8"]
        assert all(rate == pytest.approx(2 * row.tflops["bf16"], rel=0.02) for rate in eight)
        assert row.tflops["bf16"] == pytest.approx(2 * row.tflops["tf32"], rel=0.03)


@pytest.mark.parametrize(
    ("name", "sparse_bf16", "bandwidth_gb"),
    # What the makers print, with 2:4 sparsity where they print it (A100 312 without)
    [
        ("a100", 624, 2039),
        ("h100", 1979, 3350),
        ("h100-pcie", 1513, 2000),
        ("h200", 1979, 4800),
        ("b200", 4500, 7700),
        ("l40s", 733, 864),
        ("mi300x", 2614.9, 5300),
        ("rtx4090", 330.3, 1008),
    ],
)
def test_rates_are_half_of_the_printed_sparse_ones(name: str, sparse_bf16: float, bandwidth_gb: float) -> None:
    row = hardware_named(name)
    assert row.tflops["bf16"] == pytest.approx(sparse_bf16 / 2, rel=0.015)
    assert row.bandwidth_bytes_s == bandwidth_gb * 1e9


def test_a_device_of_the_users_own_is_taken_as_it_is() -> None:
    assert hardware_named(OWN) is OWN
    assert OWN.rate_flops_s("bf16", 16) == 100e12
    assert OWN.rate_flops_s("e8m3", 12) == 10e12  # no rate of its own: fp32's
    again = pickle.loads(pickle.dumps(OWN))
    assert again == OWN == copy.deepcopy(OWN)
    assert hash(again) == hash(OWN)


def test_what_is_given_can_change_afterwards_without_effect() -> None:
    rates = {"fp32": 1.0, "bf16": 2.0, "e4m3fn": 4.0}
    made = dataclasses.replace(OWN, tflops=rates)
    rates["bf16"] = 99.0
    assert made.tflops["bf16"] == 2.0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tflops": {"fp32": 10, "bf16": 100}}, "tflops lacks e4m3fn"),
        ({"tflops": {"bf16": 100, "e4m3fn": 200}}, "tflops lacks fp32"),
        ({"tflops": {"fp32": 10, "bf16": 0, "e4m3fn": 200}}, "tflops of bf16 is 0"),
        ({"tflops": {"fp32": 10, "bf16": float("nan"), "e4m3fn": 200}}, "tflops of bf16 is nan"),
        ({"achieved": 1.1}, "achieved is 1.1"),
        ({"achieved_bandwidth": 0.0}, "achieved_bandwidth is 0"),
        ({"bandwidth_bytes_s": 0.0}, "bandwidth above 0"),
        ({"launch_s": -1e-6}, "times of 0 or more"),
        ({"tile_s": float("inf")}, "times of 0 or more"),
        ({"product_start_s": float("nan")}, "times of 0 or more"),
        ({"units": 0}, "at least 1 unit"),
    ],
)
def test_impossible_figures_are_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(InvalidHardware, match=told) as caught:
        dataclasses.replace(OWN, **changes)
    assert isinstance(caught.value, AdvisorError)
    assert "mine" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "left", "right", "taken"),
    [
        ("h100", "tensor", "tensor", True),
        ("h100", "row", "row", True),
        ("h100", "tensor", "row", True),
        ("h100", "block1x128", "block128x128", True),
        ("h100", "block1x128", "block1x128", True),
        ("h100", "block128x128", "block128x128", False),
        ("h100", "row", "block1x128", False),
        ("h100", "block32", "block32", False),
        ("h100", "column", "row", False),
        ("b200", "block32", "block32", True),
        ("b200", "block1x128", "block128x128", False),
        ("l40s", "row", "row", True),
        ("a100", "row", "tensor", True),
    ],
)
def test_scales_that_kernels_take(name: str, left: str, right: str, taken: bool) -> None:
    assert hardware_named(name).takes_scales(left, right) is taken
    assert hardware_named(name).takes_scales(right, left) is taken


def test_a_device_without_rates_is_possible_and_has_no_times() -> None:
    assert not Hardware("old", "Old", frozenset({("bf16", "bf16")}), 10**9, "").has_rates


def test_unknown_hardware_names_what_is_near() -> None:
    with pytest.raises(UnknownHardware, match=r"'H-100'.*did you mean h100.*Known: a100, b200"):
        hardware_named("H-100")


def test_this_cpu_is_measured() -> None:
    found = measured_cpu(repeats=1)
    assert found.pairs == hardware_named("cpu").pairs
    assert set(found.tflops) == set(hardware_named("cpu").tflops)
    assert found.has_rates
    assert found.memory_bytes > 2**28
    assert not found.takes("e4m3fn", "e4m3fn")
    with pytest.raises(ValueError, match="repeats=0"):
        measured_cpu(repeats=0)


def test_the_service_tells_every_figure() -> None:
    views = {view.name: view.model_dump() for view in service_hardware().items}
    assert views.keys() == HARDWARE.keys()
    for name, row in HARDWARE.items():
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            assert views[name][field.name] == (sorted(value) if isinstance(value, frozenset) else value), field.name
