"""Predicted times: by hand, by what must rise and fall, and against what others measured."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from advisor.castnames import KEEP, parse_cast
from advisor.cost import (
    cast_time_s,
    native_refusal,
    product_shapes,
    product_time_s,
    product_times_s,
    site_time_s,
    step_speedup,
    time_s,
)
from advisor.device import Hardware
from advisor.hardware import HARDWARE, hardware_named
from advisor.operands import Operand, product_operands
from advisor.product_shapes import ProductShape
from advisor.roofline import runs_in
from benchmarks.speedups import layer_times_s, product_ratios
from benchmarks.speedups import step_speedup as published_step
from probes.records import Product, Site
from tests.planned import attention, linear

H100 = hardware_named("h100")
PUBLISHED = Path(__file__).parent.parent / "benchmarks"
FP32, BF16, E4M3, E5M2 = Operand("fp32", 32), Operand("bf16", 16), Operand("e4m3fn", 8), Operand("e5m2", 8)

# A device to reckon by hand: 1 TFLOPS in bf16, 2 in 8 bits, 0.1 in fp32, 1 GB/s, 1 s a kernel, 3 s a product
PLAIN = Hardware(
    name="plain",
    title="Plain",
    pairs=frozenset({("fp32", "fp32"), ("bf16", "bf16"), ("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2")}),
    memory_bytes=10**9,
    source="made up",
    tflops={"fp32": 0.1, "bf16": 1.0, "e4m3fn": 2.0, "e5m2": 2.0},
    bandwidth_bytes_s=1e9,
    launch_s=1.0,
    product_start_s=3.0,
)


def shape(m: int, n: int, k: int, batch: int = 1, calls: float = 1.0, op: str = "linear") -> ProductShape:
    product = Product("forward", ("input", "weight"), 2.0 * batch * m * n * k * calls)
    return ProductShape(product, op, "fp32", batch, m, n, k, calls)


def large(dtype: str = "bfloat16") -> Site:
    return linear(inputs=4096, outputs=8192, batch=16384, dtype=dtype)


def everything(site: Site, cast: str) -> dict[str, object]:
    return dict.fromkeys(site.roles, parse_cast(cast))


def test_a_product_by_hand() -> None:
    flops = 2 * 20000.0**3
    assert product_time_s(shape(20000, 20000, 20000), BF16, BF16, PLAIN) == pytest.approx(3 + flops / 1e12)
    assert product_time_s(shape(20000, 20000, 20000), E4M3, E5M2, PLAIN) == pytest.approx(3 + flops / 2e12)
    assert product_time_s(shape(20000, 20000, 20000, calls=5.0), BF16, BF16, PLAIN) == pytest.approx(
        5 * (3 + flops / 1e12)
    )
    # One row: 16 million weights of two bytes take longer to read than to multiply
    read = 2 * (4000 + 4000 * 4000 + 4000) / 1e9
    assert product_time_s(shape(1, 4000, 4000), BF16, BF16, PLAIN) == pytest.approx(3 + read)


def test_two_narrow_operands_that_no_kernel_takes_are_widened_and_gain_nothing() -> None:
    plain = product_time_s(shape(20000, 20000, 20000), BF16, BF16, PLAIN)
    widened = product_time_s(shape(20000, 20000, 20000), E5M2, E5M2, PLAIN)
    assert widened == pytest.approx(plain + 2 * (1 + 3 * 20000**2 / 1e9))  # two passes: a byte read, two written
    mixed = product_time_s(shape(20000, 20000, 20000), E4M3, BF16, PLAIN)
    assert mixed == pytest.approx(plain + 1 + 3 * 20000**2 / 1e9)


@pytest.mark.parametrize("where", [shape(4096, 512, 1024), shape(100, 30, 50), shape(64, 64, 64, op="sdpa")])
def test_a_table_of_pairs_is_the_pairs_one_by_one(where: ProductShape) -> None:
    operands = [FP32, BF16, E4M3, E5M2, Operand("int8", 8), Operand("e4m3fn", 8, "row"), Operand(None, 32)]
    for hardware in (H100, PLAIN):
        table = product_times_s(where, operands, operands, hardware)
        for i, j in itertools.product(range(len(operands)), repeat=2):
            assert table[i, j] == product_time_s(where, operands[i], operands[j], hardware)
    assert product_times_s(where, [], operands, H100).shape == (0, len(operands))


@pytest.mark.parametrize(
    ("cast", "passes"),
    # of a weight of 64 × 32 float32 in two products; bytes an element of each kernel
    [
        ("e4m3fn/tensor/current", [4, 0, 5, 5]),  # largest value, its second stage, two layouts at different times
        ("e4m3fn/tensor/delayed", [5, 5]),
        ("e4m3fn/tensor/static=1", [5, 5]),
        ("e4m3fn/row", [5, 8, 5]),  # the other layout is transposed before it is scaled
        ("e4m3fn/block32", [5 + 1 / 32, 5 + 1 / 32]),
        ("bf16", [6]),
        ("fp32", []),
        ("fp64", []),  # wider than the tensor: it stays as it is
    ],
)
def test_what_a_cast_of_a_weight_moves(cast: str, passes: list[float]) -> None:
    site = linear()
    found = cast_time_s(site, "weight", parse_cast(cast), PLAIN)
    assert found == pytest.approx(sum(1 + 64 * 32 * each / 1e9 for each in passes))


def test_an_activation_is_written_in_both_layouts_at_once() -> None:
    site = linear()
    found = cast_time_s(site, "input", parse_cast("e4m3fn"), PLAIN)
    assert found == pytest.approx(3 + 16 * 64 * (4 + 0 + 6) / 1e9)
    any_layout = dataclasses.replace(PLAIN, inner_layout=False)
    assert cast_time_s(site, "input", parse_cast("e4m3fn"), any_layout) == pytest.approx(3 + 16 * 64 * (4 + 5) / 1e9)


def test_an_activation_scaled_by_row_is_transposed_as_it_is_first_read() -> None:
    found = cast_time_s(linear(), "input", parse_cast("e4m3fn/row"), PLAIN)
    assert found == pytest.approx(2 + 16 * 64 * ((4 + 1 + 4) + 5) / 1e9)


def test_a_weight_is_cast_at_every_call() -> None:
    once, thrice = linear(), dataclasses.replace(linear(), calls=3.0)
    cast = parse_cast("bf16")
    assert cast_time_s(thrice, "weight", cast, PLAIN) == pytest.approx(3 * cast_time_s(once, "weight", cast, PLAIN))


def test_a_site_is_the_sum_of_its_products_and_casts() -> None:
    site = large()
    casts = {"input": parse_cast("e4m3fn"), "weight": parse_cast("bf16"), "grad_output": parse_cast("e5m2")}
    products = sum(
        product_time_s(one, *product_operands(site, one.product, casts), H100) for one in product_shapes(site)
    )
    alone = products + sum(cast_time_s(site, role, cast, H100) for role, cast in casts.items())
    assert site_time_s(site, casts, H100) == pytest.approx(alone)
    other = dataclasses.replace(linear("other"), dtypes=site.dtypes)
    both = {(one.name, role): cast for one in (site, other) for role, cast in casts.items()}
    assert time_s([site, other], both, H100) == pytest.approx(alone + site_time_s(other, casts, H100))


@pytest.mark.parametrize("name", ["h100", "h100-pcie", "h200", "b200", "l40s", "rtx4090"])
def test_8_bits_are_faster_for_large_layers_and_slower_for_small_ones(name: str) -> None:
    hardware, small = hardware_named(name), linear(inputs=256, outputs=256, batch=256, dtype="bfloat16")
    for site, faster in ((large(), True), (small, False)):
        kept = site_time_s(site, everything(site, KEEP), hardware)  # type: ignore[arg-type]
        narrow = site_time_s(site, everything(site, "e4m3fn"), hardware)  # type: ignore[arg-type]
        assert (narrow < kept) == faster
        assert kept / narrow < 2


def test_where_no_kernel_takes_them_narrow_casts_only_cost() -> None:
    for name, cast in (("a100", "e4m3fn"), ("mi300x", "e4m3fn"), ("h100", "e5m2"), ("cpu", "e4m3fn")):
        hardware, site = hardware_named(name), large()
        kept = site_time_s(site, everything(site, KEEP), hardware)  # type: ignore[arg-type]
        assert site_time_s(site, everything(site, cast), hardware) > kept  # type: ignore[arg-type]


@pytest.mark.parametrize("hardware", HARDWARE.values(), ids=lambda row: row.name)
def test_time_rises_with_every_size(hardware: Hardware) -> None:
    sides = (64, 256, 1024, 4096)
    for one in (FP32, BF16):
        for m, n, k in itertools.product(sides, repeat=3):
            here = product_time_s(shape(m, n, k), one, one, hardware)
            assert here > 0
            for bigger in ((2 * m, n, k), (m, 2 * n, k), (m, n, 2 * k)):
                # Splitting the inner sum begins at certain sizes, which may save a percent
                assert product_time_s(shape(*bigger), one, one, hardware) >= here * 0.97, (m, n, k, bigger)


def test_no_product_is_faster_than_the_devices_own_limits() -> None:
    for m, n, k in itertools.product((100, 1000, 10000), repeat=3):
        for one, bits in ((BF16, 16), (E4M3, 8)):
            found = product_time_s(shape(m, n, k), one, one, H100)
            assert found >= 2.0 * m * n * k / H100.rate_flops_s(one.format or "", bits)
            assert found >= (m * k + k * n) * bits / 8 / H100.bandwidth_bytes_s


@pytest.mark.parametrize(
    ("left", "right", "where", "expected"),
    [
        (E4M3, E5M2, shape(64, 64, 64), ("e4m3fn", 8)),
        (E5M2, E5M2, shape(64, 64, 64), ("bf16", 16)),
        (E4M3, E4M3, shape(64, 64, 24), ("bf16", 16)),
        (E4M3, E4M3, shape(64, 64, 64, op="conv2d"), ("bf16", 16)),
        (Operand("tf32", 32), Operand("tf32", 32), shape(64, 64, 64), ("tf32", 32)),
        (Operand("fp64", 64), Operand("fp64", 64), shape(64, 64, 64), ("fp64", 64)),
        (Operand("fp64", 64), FP32, shape(64, 64, 64), ("fp64", 64)),
        (Operand("e8m3", 12), Operand("e8m3", 12), shape(64, 64, 64), ("bf16", 16)),
        (BF16, Operand("fp16", 16), shape(64, 64, 64), ("fp32", 32)),
        (Operand(None, 32), BF16, shape(64, 64, 64, op="sdpa"), ("bf16", 16)),
        (Operand(None, 32), E4M3, shape(64, 64, 64, op="sdpa"), ("fp32", 32)),  # its own format is fp32
        (Operand(None, 32), Operand(None, 32), shape(64, 64, 64, op="lstm"), ("fp32", 32)),
        (Operand("complex64", 32), BF16, shape(64, 64, 64), ("fp32", 32)),
    ],
)
def test_the_format_that_a_product_runs_in(
    left: Operand, right: Operand, where: ProductShape, expected: tuple[str, int]
) -> None:
    assert runs_in(where, left, right, H100) == expected


@pytest.mark.parametrize(
    ("where", "left", "right", "told"),
    [
        (shape(64, 64, 64), E4M3, E4M3, None),
        (shape(63, 64, 64), E4M3, E4M3, None),  # rows of the left operand may be any number
        (shape(64, 64, 64), E4M3, BF16, None),  # nobody asks for 8 bits
        (shape(64, 64, 64), Operand(None, 32), E4M3, None),
        (shape(64, 64, 64), E5M2, E5M2, "multiplies no e5m2 by e5m2"),
        (shape(64, 64, 64), E4M3, Operand("int8", 8), "multiplies no e4m3fn by int8"),
        (shape(64, 64, 64), Operand("e4m3fn", 8, "row"), E4M3, None),
        (shape(64, 64, 64), Operand("e4m3fn", 8, "row"), Operand("e4m3fn", 8, "block32"), "by row and by block32"),
        (shape(64, 64, 72), E4M3, E4M3, "inner size 72: not divisible by 16"),
        (shape(64, 10, 72), E4M3, E4M3, "inner size 72 and columns 10: not divisible by 16"),
        (shape(64, 64, 64, batch=2), E4M3, E4M3, "not a batch"),
        (shape(64, 64, 64, op="conv2d"), E4M3, E4M3, "convolution"),
        (shape(64, 64, 64, op="sdpa"), E4M3, E4M3, "attention"),
        (shape(64, 64, 64, op="gru_cell"), E4M3, E4M3, "recurrent"),
        (shape(64, 64, 64, op="grouped_mm"), E4M3, E4M3, "scale a row"),
        (shape(64, 64, 64, op="bilinear"), E4M3, E4M3, "bilinear"),
        (shape(64, 64, 64)._replace(exact=False), E4M3, E4M3, "not known"),
    ],
)
def test_which_products_native_kernels_take(
    where: ProductShape, left: Operand, right: Operand, told: str | None
) -> None:
    found = native_refusal(where, left, right, H100)
    assert found is None if told is None else found is not None and told in found


def test_attention_in_bf16_runs_in_bf16_and_casts_to_8_bits_gain_nothing() -> None:
    site = dataclasses.replace(attention(), dtypes=dict.fromkeys(attention().roles, "bfloat16"))
    kept = site_time_s(site, everything(site, KEEP), H100)  # type: ignore[arg-type]
    assert site_time_s(site, everything(site, "e4m3fn"), H100) > kept  # type: ignore[arg-type]
    wide = dataclasses.replace(site, dtypes=dict.fromkeys(site.roles, "float32"))
    assert site_time_s(wide, everything(wide, KEEP), H100) > kept  # type: ignore[arg-type]


def test_a_step_gains_what_amdahl_allows() -> None:
    assert step_speedup(2.0, 1.0) == pytest.approx(2.0)
    assert step_speedup(2.0, 0.5) == pytest.approx(4 / 3)
    assert step_speedup(5.0, 0.0) == 1.0
    with pytest.raises(ValueError, match=r"products_share=1\.5"):
        step_speedup(2.0, 1.5)


def test_published_products_are_predicted_within_a_quarter() -> None:
    """Those of more than 1 GFLOP; 5% may be outside, and the smallest of one set (8-bit products bound by memory)."""
    sets = json.loads((PUBLISHED / "published_products.json").read_text())["sets"]
    assert len(sets) == 7
    for one in sets:
        ratios = product_ratios(one)
        outside = sum(abs(ratio - 1) > 0.25 for ratio in ratios)
        assert outside <= (2 if "33148" in one["source"] else 0.05 * len(ratios)), (
            one["device"],
            one["source"],
            ratios,
        )


def test_published_speedups_of_layers_and_steps() -> None:
    """Which layers gain, on which all agree; and by how much within the spread of the publications themselves."""
    told = json.loads((PUBLISHED / "published_speedups.json").read_text())
    there = dataclasses.replace(H100, **told["machine"]["changes"])
    for one in told["sets"]:
        for *size, measured, _, _ in one["layers"]:
            wide, narrow = layer_times_s(size, there, one["cast"])
            assert 0.65 < wide / narrow / measured < 1.45, (size, one["cast"])
    for one in told["steps"]["runs"]:
        assert published_step(one)[0] == pytest.approx(one["speedup"], rel=0.12)
