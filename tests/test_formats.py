"""The format table against ml_dtypes' own figures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import ml_dtypes
import numpy as np
import pytest

from probes.errors import ProbeError, UnknownFormat
from probes.format_names import format_named
from probes.formats import FORMATS

FLOATS = {
    "fp32": np.float32,
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("name", FLOATS)
def test_figures_are_those_of_ml_dtypes(name: str) -> None:
    ours, theirs = FORMATS[name], ml_dtypes.finfo(FLOATS[name])
    assert ours.bits == theirs.bits
    assert ours.exponent_bits == theirs.nexp
    assert ours.mantissa_bits == theirs.nmant
    assert ours.largest == float(theirs.max)
    assert ours.smallest_normal == float(theirs.smallest_normal)
    assert ours.smallest_subnormal == float(theirs.smallest_subnormal)
    assert ours.epsilon == float(theirs.eps)


@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3fn", "e5m2"])
def test_every_code_decodes_by_the_documented_rule(name: str) -> None:
    ours = FORMATS[name]
    codes = np.arange(2 ** (ours.bits - 1), dtype=np.uint16 if ours.bits == 16 else np.uint8)
    with np.errstate(invalid="ignore"):
        theirs = codes.view(FLOATS[name]).astype(np.float64)
    exponent, mantissa = codes.astype(int) >> ours.mantissa_bits, codes.astype(int) % 2**ours.mantissa_bits
    spacing = 2.0 ** (np.maximum(exponent, 1) - ours.bias - ours.mantissa_bits)
    values = (mantissa + (exponent > 0) * 2**ours.mantissa_bits) * spacing
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(values[finite], theirs[finite])
    assert values[finite].max() == ours.largest
    assert (values[~finite] > ours.largest).all()


def test_int8_is_the_integers_up_to_127() -> None:
    int8 = FORMATS["int8"]
    assert (int8.bits, int8.largest, int8.smallest_subnormal, int8.smallest_normal) == (8, 127.0, 1.0, 1.0)
    assert int8.epsilon == 1.0
    assert int8.overflow is None


def test_overflow_is_what_the_format_has() -> None:
    assert FORMATS["e5m2"].overflow == np.inf
    assert FORMATS["e4m3fn"].overflow != FORMATS["e4m3fn"].overflow  # NaN


def test_formats_are_values() -> None:
    assert replace(FORMATS["bf16"]) == FORMATS["bf16"]
    assert hash(replace(FORMATS["bf16"])) == hash(FORMATS["bf16"])
    assert str(FORMATS["bf16"]) == "bf16"
    with pytest.raises(FrozenInstanceError):
        FORMATS["bf16"].bias = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        FORMATS["mine"] = FORMATS["bf16"]  # type: ignore[index]


@pytest.mark.parametrize(("name", "meant"), [("e4m3", "e4m3fn"), ("BF16", "bf16"), ("fp8", "fp16"), ("int 8", "int8")])
def test_an_unknown_name_lists_the_near_ones(name: str, meant: str) -> None:
    with pytest.raises(UnknownFormat, match=meant) as caught:
        format_named(name)
    assert isinstance(caught.value, ProbeError)
    assert isinstance(caught.value, ValueError)
    assert all(known in str(caught.value) for known in FORMATS)


def test_the_table_does_not_import_torch() -> None:
    check = "import sys, probes, probes.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
