"""What a plan saves: products by hand, on the pairs that each device takes."""

from __future__ import annotations

import dataclasses

import pytest

from advisor.castnames import KEEP, briefest_cast, parse_cast, short_cast
from advisor.cli import numbers_text
from advisor.cost import Operand, memory, operand, product_bits, role_bytes, shares, site_shares
from advisor.hardware import HARDWARE, hardware_named
from probes.casts import Cast
from probes.formats import FORMATS
from probes.records import Site
from tests.planned import attention, linear

H100 = hardware_named("h100")


def casts(site: Site, **by_role: str) -> dict[str, Cast]:
    return {role: parse_cast(by_role.get(role, KEEP)) for role in site.roles}


def share_8bit(site: Site, hardware: str = "h100", **by_role: str) -> float:
    return site_shares(site, casts(site, **by_role), hardware_named(hardware)).flops_8bit / site.flops


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, 0),
        ({"input": "e4m3fn"}, 0),
        ({"input": "e4m3fn", "weight": "e4m3fn"}, 1 / 3),
        ({"input": "e4m3fn", "weight": "e4m3fn", "grad_output": "e4m3fn"}, 1),
        ({"input": "e4m3fn", "weight": "e4m3fn", "grad_output": "e5m2"}, 1),
        ({"input": "e5m2", "weight": "e4m3fn", "grad_output": "e5m2"}, 2 / 3),  # e5m2×e5m2 is not taken
        ({"input": "int8", "weight": "int8", "grad_output": "e5m2"}, 1 / 3),  # int8 goes with int8 alone
        ({"input": "e4m3fn/none", "weight": "e4m3fn", "grad_output": "bf16"}, 1 / 3),
    ],
)
def test_8bit_share_of_a_linear_layer(chosen: dict[str, str], expected: float) -> None:
    assert share_8bit(linear(), **chosen) == pytest.approx(expected)


@pytest.mark.parametrize("name", [*FORMATS, "e4m2", "e8m3", "e7m7"])
@pytest.mark.parametrize("device", HARDWARE)
def test_only_listed_pairs_run_in_8_bits(name: str, device: str) -> None:
    listed = (name, name) in hardware_named(device).pairs
    everything = dict.fromkeys(("input", "weight", "grad_output"), f"{name}/none")
    assert share_8bit(linear(), device, **everything) == (FORMATS[name].bits <= 8 if listed else 0)


def test_a_device_without_8bit_floats_runs_them_in_no_8bit_product() -> None:
    everything = dict.fromkeys(("input", "weight", "grad_output"), "e4m3fn")
    assert [name for name in HARDWARE if share_8bit(linear(), name, **everything) == 0] == ["a100", "cpu", "mi300x"]
    assert share_8bit(linear(), "a100", **dict.fromkeys(everything, "int8")) == 1


def test_what_no_cast_reaches_is_never_narrow() -> None:
    """Attention's probabilities stay inside the kernel, so two of its four products cannot be in 8 bits."""
    assert share_8bit(attention(), **dict.fromkeys(attention().roles, "e4m3fn")) == pytest.approx(0.5)


def test_the_share_counts_flops_of_all_sites() -> None:
    small, large = linear("small", batch=1), linear("large", batch=3)
    chosen = {(site.name, role): parse_cast(KEEP) for site in (small, large) for role in site.roles}
    chosen |= {("large", role): parse_cast("e4m3fn") for role in large.roles}
    found = shares([small, large], chosen, H100)
    assert found.flops_8bit / (small.flops + large.flops) == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("left", "right", "bits"),
    [
        (("e4m3fn", 8), ("e5m2", 8), 8),
        (("e5m2", 8), ("e5m2", 8), 16),  # widened to bf16, where it is exact
        (("e4m3fn", 8), ("bf16", 16), 16),
        (("bf16", 16), ("bf16", 16), 16),
        (("bf16", 16), ("fp16", 16), 32),  # neither holds the other
        (("e4m3fn", 8), ("fp32", 32), 32),
        (("fp32", 32), ("fp64", 64), 64),
        (("e2m1", 4), ("e2m1", 4), 16),  # no pair of the table, though 4 bits are enough for neither
        (("e3m2", 6), ("e4m3fn", 8), 16),
        (("int4", 4), ("int8", 8), 16),
        (("e8m3", 12), ("e8m3", 12), 16),  # bf16 holds it
        (("e5m9", 15), ("e4m3fn", 8), 16),  # fp16 does
        (("e6m9", 16), ("e6m9", 16), 32),  # neither
        (("e8m0", 8), ("fp16", 16), 32),
        (("tf32", 32), ("tf32", 32), 32),
        (("bfloat", 16), ("e4m3fn", 8), 32),  # no format of ours
        ((None, 32), ("e4m3fn", 8), 32),
    ],
)
def test_bits_in_which_a_product_runs(left: tuple[str | None, int], right: tuple[str | None, int], bits: int) -> None:
    assert product_bits(Operand(*left), Operand(*right), H100) == bits
    assert product_bits(Operand(*right), Operand(*left), H100) == bits


def test_scales_decide_below_16_bits_alone() -> None:
    row, block = Operand("e4m3fn", 8, "row"), Operand("e4m3fn", 8, "block32")
    assert product_bits(row, Operand("e5m2", 8), H100) == 8
    assert product_bits(row, block, H100) == product_bits(block, block, H100) == 16
    assert product_bits(block, block, hardware_named("b200")) == 8
    assert product_bits(Operand("bf16", 16, "row"), Operand("bf16", 16, "block32"), H100) == 16
    site = linear()
    assert operand(site, "input", Cast.parse("e4m3fn/row")) == row
    assert operand(site, "input", Cast.parse("e4m3fn/none")) == Operand("e4m3fn", 8, "tensor")
    assert operand(site, "input", parse_cast(KEEP)) == Operand("fp32", 32, "tensor")


def test_8bit_values_are_exact_in_the_16bit_format_they_are_widened_to() -> None:
    import torch

    for name in ("e4m3fn", "e5m2", "int8"):
        code_points = torch.arange(-128, 128, dtype=torch.float32)
        if name != "int8":
            dtype = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
            code_points = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        finite = code_points[code_points.isfinite()]
        for wide in (torch.bfloat16, torch.float16):
            assert torch.equal(finite.to(wide).float(), finite), (name, wide)


def test_bytes_of_a_linear_layer() -> None:
    site = linear()
    kept = memory([site], {(site.name, role): parse_cast(KEEP) for role in site.roles})
    assert (kept.weights_bytes, kept.copies_bytes, kept.activations_bytes) == (32 * 64 * 4, 0, 16 * 64 * 4)
    narrow = memory([site], {(site.name, role): parse_cast("e4m3fn") for role in site.roles})
    assert (narrow.weights_bytes, narrow.copies_bytes, narrow.activations_bytes) == (32 * 64 * 4, 32 * 64, 16 * 64)
    assert narrow.total_bytes == 32 * 64 * 5 + 16 * 64


def test_a_bf16_tensor_is_not_widened_by_the_cast_that_keeps_it() -> None:
    site = linear(dtype="bfloat16")
    assert role_bytes(site, "input", parse_cast(KEEP)) == 16 * 64 * 2
    assert site_shares(site, casts(site), H100).flops_16bit == site.flops
    assert role_bytes(site, "weight", parse_cast("bf16")) == 0  # no copy: it is the weight itself


def test_bytes_are_those_in_memory() -> None:
    site = linear()
    assert role_bytes(site, "input", parse_cast("tf32")) == 16 * 64 * 4
    assert role_bytes(site, "weight", parse_cast("tf32")) == 0  # no copy: tf32 is read from float32
    assert role_bytes(site, "input", parse_cast("fp64")) == 16 * 64 * 4
    assert role_bytes(site, "input", parse_cast("e2m1")) == 16 * 64 / 2
    assert role_bytes(site, "weight", parse_cast("e3m2")) == 32 * 64 * 6 / 8
    double = linear(dtype="float64")
    assert role_bytes(double, "input", parse_cast(KEEP)) == 16 * 64 * 8
    assert role_bytes(double, "input", parse_cast("fp32/tensor")) == 16 * 64 * 4
    assert role_bytes(linear(dtype="complex64"), "input", parse_cast(KEEP)) == 16 * 64 * 4


def test_a_shared_parameter_counts_once() -> None:
    one, other = linear("embedding"), dataclasses.replace(linear("head"), parameter="embedding.weight")
    chosen = {(site.name, role): parse_cast("e4m3fn") for site in (one, other) for role in site.roles}
    assert memory([one, other], chosen).weights_bytes == memory([one], chosen).weights_bytes
    assert memory([one, other], chosen).copies_bytes == memory([one], chosen).copies_bytes
    apart = chosen | {("head", "weight"): parse_cast("bf16")}
    assert memory([one, other], apart).copies_bytes == 32 * 64 * (1 + 2)


def test_without_a_backward_pass_nothing_is_saved() -> None:
    site = dataclasses.replace(linear(), products=linear().products[:1], roles=("input", "weight"))
    assert role_bytes(site, "input", parse_cast(KEEP)) == 0


def test_the_hardware_table_is_sound() -> None:
    for name, row in HARDWARE.items():
        assert row.name == name
        assert row.source
        assert row.memory_bytes > 20e9
        assert set(row.formats) <= set(FORMATS)
        assert {(right, left) for left, right in row.pairs} == row.pairs, "pairs are written in both orders"
        assert ("e5m2", "e5m2") not in row.pairs
        assert not {"e8m0", "tf32"} & set(row.formats)


@pytest.mark.parametrize(
    ("text", "short", "in_tables"),
    [
        ("e4m3fn", "e4m3fn", "e4m3fn"),
        ("bf16", "bf16", "bf16"),
        ("e5m2/none", "e5m2/none/nearest", "e5m2/none"),
        ("float8_e4m3fn", "e4m3fn", "e4m3fn"),
        ("e2m2", "e2m2", "e2m2"),
        ("e8m3", "e8m3", "e8m3"),
        ("e8m3/tensor", "e8m3/tensor/current/nearest", "e8m3/tensor"),
        ("e4m3fn/row", "e4m3fn/row/current/nearest", "e4m3fn/row"),
        ("e4m3fn/block1x128", "e4m3fn/block1x128/current/nearest", "e4m3fn/block1x128"),
        ("e4m3fn/block32/current", "e4m3fn/block32/current/nearest", "e4m3fn/block32/current"),
        ("bf16/none/stochastic", "bf16/none/stochastic", "bf16/none/stochastic"),
        ("e4m3fn/block32", "e4m3fn/block32/e8m0/nearest", "e4m3fn/block32/e8m0"),
        (
            "e4m3fn/tensor/delayed",
            "e4m3fn/tensor/delayed(len=16,margin=0)/nearest",
            "e4m3fn/tensor/delayed(len=16,margin=0)",
        ),
        ("int8/tensor/static=0.5/zero", "int8/tensor/static=0.5/zero", "int8/tensor/static=0.5/zero"),
        ("e5m2:inf", "e5m2/tensor/current/nearest:inf", "e5m2/tensor/current/nearest:inf"),
    ],
)
def test_short_names(text: str, short: str, in_tables: str) -> None:
    assert short_cast(Cast.parse(text)) == short
    assert numbers_text.short_cast(str(Cast.parse(text))) == in_tables
    assert Cast.parse(short) == Cast.parse(in_tables) == Cast.parse(text)


@pytest.mark.parametrize(
    ("text", "brief"),
    [
        ("e4m3fn/tensor/current/nearest", "e4m3fn"),
        ("bf16/none/nearest", "bf16"),
        ("bf16/none/stochastic", "bf16/none/stochastic"),
        ("e4m3fn/row/current/nearest", "e4m3fn/row"),
        ("e4m3fn/block32/e8m0/nearest", "e4m3fn/block32"),
        ("e4m3fn/block32/current/nearest", "e4m3fn/block32/current"),
        ("e5m2/tensor/current/nearest:inf", "e5m2:inf"),
        ("e5m2/tensor/current:pow2/nearest", "e5m2/tensor/current:pow2"),
    ],
)
def test_a_plan_s_table_has_the_briefest_names(text: str, brief: str) -> None:
    assert briefest_cast(Cast.parse(text)) == brief
    assert Cast.parse(brief) == Cast.parse(text)


def test_a_format_of_a_newer_service_is_shown_whole() -> None:
    assert numbers_text.short_cast("e99m1/none/nearest") == "e99m1/none/nearest"
