"""Every code point of every format of 8 bits or less, and of fp16 and bf16, against ml_dtypes and gfloat."""

from __future__ import annotations

import re

import gfloat
import numpy as np
import pytest
import torch
from oracles import (
    ML_DTYPES,
    NARROW,
    UP_TO_16_BITS,
    assert_same,
    edge_cast,
    gfloat_format,
    overflows,
    strided_float32,
)

from probes import codes
from probes.errors import NotInFormat, ProbeError
from probes.format_names import format_named
from probes.formats import FORMATS, Format

# From the tables of the standards: OCP FP8 1.0 (table 2), OCP Microscaling 1.0 (section 5.3), IEEE 754 (binary16).
BY_EYE = {
    "e4m3fn": {0x00: 0.0, 0x01: 2**-9, 0x07: 0.875 * 2**-6, 0x08: 2**-6, 0x38: 1.0, 0x7E: 448.0, 0x7F: np.nan},
    "e5m2": {0x01: 2**-16, 0x03: 0.75 * 2**-14, 0x04: 2**-14, 0x7B: 57344.0, 0x7C: np.inf, 0x7D: np.nan, 0x7F: np.nan},
    "e4m3": {0x77: 240.0, 0x78: np.inf, 0x79: np.nan},
    "e4m3fnuz": {0x00: 0.0, 0x01: 2**-10, 0x7F: 240.0},
    "e5m2fnuz": {0x01: 2**-17, 0x7F: 57344.0},
    "e3m4": {0x6F: 15.5, 0x70: np.inf},
    "e3m2": {0x01: 0.0625, 0x03: 0.1875, 0x04: 0.25, 0x1F: 28.0},
    "e2m3": {0x01: 0.125, 0x07: 0.875, 0x08: 1.0, 0x1F: 7.5},
    "e2m1": dict(enumerate([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])),
    "fp16": {0x0001: 2**-24, 0x3C00: 1.0, 0x3555: 0.333251953125, 0x7BFF: 65504.0, 0x7C00: np.inf, 0x7E00: np.nan},
    "bf16": {0x0080: 2**-126, 0x3F80: 1.0, 0x4049: 3.140625, 0x7F80: np.inf, 0x7FC0: np.nan},
}


@pytest.mark.parametrize("name", BY_EYE)
def test_codes_that_a_standard_names(name: str) -> None:
    target, given = FORMATS[name], np.array(list(BY_EYE[name]))
    expected = np.array(list(BY_EYE[name].values()), dtype=float)
    assert_same(codes.decode(given, target), expected)
    if target.keeps_negative_zero:
        assert_same(codes.decode(given + target.code_points // 2, target), -expected)


def test_codes_without_a_sign_or_with_a_complement() -> None:
    assert codes.decode([0x00, 0x7F, 0xFE], FORMATS["e8m0"]).tolist() == [2.0**-127, 1.0, 2.0**127]
    assert np.isnan(codes.decode(0xFF, FORMATS["e8m0"]))
    assert np.isnan(codes.decode(0x80, FORMATS["e4m3fnuz"]))
    assert codes.decode([0x00, 0x7F, 0x81, 0xFF, 0x80], FORMATS["int8"]).tolist() == [0, 127, -127, -1, -128]
    assert codes.decode(range(16), FORMATS["int4"]).tolist() == [*range(8), *range(-8, 0)]


@pytest.mark.parametrize("target", NARROW, ids=str)
def test_every_code_of_8_bits_or_less_means_what_gfloat_says(target: Format) -> None:
    info = gfloat_format(target)
    theirs = np.array([gfloat.decode_float(info, code).fval for code in range(target.code_points)])
    assert_same(codes.decode(np.arange(target.code_points), target), theirs)


@pytest.mark.parametrize("name", [name for name in ML_DTYPES if FORMATS[name].bits <= 16])
def test_every_code_means_what_ml_dtypes_says(name: str) -> None:
    target = FORMATS[name]
    every = np.arange(target.code_points, dtype=np.uint16 if target.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):
        assert_same(codes.decode(every, target), every.view(ML_DTYPES[name]).astype(np.float64))


@pytest.mark.parametrize("target", UP_TO_16_BITS, ids=str)
def test_every_code_is_decoded_and_encoded_again(target: Format) -> None:
    every = np.arange(target.code_points)
    value = codes.decode(every, target)
    number = ~np.isnan(value) & (value >= target.lowest) | np.isneginf(value)  # not the code that int8 leaves unused
    again = codes.encode(value[number], target)
    np.testing.assert_array_equal(again, every[number])
    assert again.dtype == (np.uint8 if target.bits <= 8 else np.uint16)
    nan = value[np.isnan(value)]
    if nan.size:  # one of the codes of NaN, with its sign where there are two
        assert codes.is_nan(codes.encode(nan, target), target).all()
        assert_same(np.signbit(codes.decode(codes.encode(nan, target), target)), np.signbit(nan))


@pytest.mark.parametrize("target", UP_TO_16_BITS, ids=str)
def test_the_figures_of_a_format_are_those_of_its_codes(target: Format) -> None:
    value = codes.decode(np.arange(target.code_points), target)
    finite = value[np.isfinite(value)]
    positive = np.sort(finite[finite > 0])
    assert target.code_points == len(value) == 2**target.bits
    assert positive[-1] == target.largest
    assert positive[0] == target.smallest_subnormal
    assert finite[finite >= target.lowest].min() == target.lowest
    above_one = positive[positive > 1]
    if len(above_one) and 1 in positive:
        assert above_one[0] - 1 == target.epsilon
    assert target.emax == np.floor(np.log2(target.largest))
    spacing = np.diff(positive)
    full = (positive[:-1] >= target.smallest_normal) & (spacing < target.largest_spacing)
    assert (spacing[full] == 2.0 ** np.floor(np.log2(positive[:-1][full])) * 2.0**-target.mantissa_bits).all()
    assert target.has_subnormals == (positive[0] < target.smallest_normal)
    inf, nan = np.isinf(value).any(), np.isnan(value).any()
    assert (target.overflow == np.inf, target.overflow is None) == (inf, not inf and not nan)


@pytest.mark.parametrize(("name", "code", "value"), [("fp32", np.uint32, np.float32), ("fp64", np.uint64, np.float64)])
def test_wide_formats_have_numpys_codes(name: str, code: type, value: type) -> None:
    bits = np.random.default_rng(0).integers(0, np.iinfo(code).max, 100_000, dtype=code, endpoint=True)
    with np.errstate(invalid="ignore"):
        numbers = bits.view(value).astype(np.float64)
    assert_same(codes.decode(bits, FORMATS[name]), numbers)
    finite = np.isfinite(numbers)
    np.testing.assert_array_equal(codes.encode(numbers[finite], FORMATS[name]), bits[finite])


@pytest.mark.parametrize("target", UP_TO_16_BITS, ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "zero"])
def test_a_cast_leaves_every_value_of_the_format_as_it_is(target: Format, rounding: str) -> None:
    value = codes.decode(np.arange(target.code_points), target)
    value = torch.from_numpy(value[np.isfinite(value) & (value >= target.lowest)])
    for x in (value, value.float()):  # by the specification, and by the compiled loops
        assert_same(edge_cast(target, rounding)(x), value)


@pytest.mark.parametrize("target", UP_TO_16_BITS, ids=str)
def test_whatever_is_cast_has_a_code(target: Format) -> None:
    for saturate in overflows(target):
        cast = edge_cast(target, "nearest", saturate)(strided_float32(100_003)).numpy()
        number = cast[~np.isnan(cast)]
        assert_same(codes.decode(codes.encode(number, target), target), number + 0.0 if target.is_integer else number)


REFUSED = [
    ("e4m3fn", 449.0),
    ("e4m3fn", 480.0),  # what its NaN would be
    ("e4m3fn", np.inf),
    ("e4m3fnuz", -np.inf),
    ("e2m1", np.nan),
    ("e3m0", np.nan),
    ("e8m0", 0.0),
    ("e8m0", -1.0),
    ("e8m0", 3.0),
    ("int8", -128.0),
    ("int8", np.nan),
    ("int4", 0.5),
    ("bf16", 2.0**-134),
    ("fp16", 1 + 2.0**-11),
    ("e5m2", 1e300),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_what_is_no_value_of_the_format_is_refused(name: str, value: float) -> None:
    with pytest.raises(NotInFormat, match=re.escape(f"{value} is no value of Format({name}: ")) as caught:
        codes.encode([1.0, value], format_named(name))
    assert isinstance(caught.value, ProbeError)
    assert isinstance(caught.value, ValueError)


def test_what_is_no_code_is_refused() -> None:
    with pytest.raises(NotInFormat, match="256 is no code of Format"):
        codes.decode([0, 256], FORMATS["e5m2"])
    with pytest.raises(NotInFormat, match="-1 is no code of Format"):
        codes.decode(-1, FORMATS["int4"])
    with pytest.raises(NotInFormat, match="integers, not float64"):
        codes.decode(1.0, FORMATS["e5m2"])


def test_shapes_are_kept() -> None:
    grid = np.zeros((3, 1, 2), dtype=int)
    assert codes.decode(grid, FORMATS["e5m2"]).shape == codes.encode(grid, FORMATS["e5m2"]).shape == (3, 1, 2)
    assert (
        codes.decode(np.zeros(0, dtype=int), FORMATS["int8"]).shape == codes.encode([], FORMATS["int8"]).shape == (0,)
    )
    assert codes.encode(1.5, FORMATS["fp16"]).shape == ()
