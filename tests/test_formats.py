"""The table of formats against ml_dtypes' and torch's own figures, and the names by which a format is found."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import ML_DTYPES, TORCH

from probes.errors import ProbeError, UnknownFormat
from probes.format_names import ALIASES, LIBRARIES, format_named
from probes.formats import FORMATS, ieee_like

EVERY_SIZE = [(x, y) for x in range(2, 9) for y in range(24)]


@pytest.mark.parametrize("name", [*ML_DTYPES, "fp64"])
def test_figures_are_those_of_ml_dtypes(name: str) -> None:
    ours, theirs = FORMATS[name], ml_dtypes.finfo(ML_DTYPES.get(name, np.float64))
    assert ours.bits == theirs.bits
    assert ours.exponent_bits == theirs.nexp
    assert ours.mantissa_bits == theirs.nmant
    assert ours.largest == float(theirs.max)
    assert ours.lowest == float(theirs.min)
    assert ours.smallest_normal == float(theirs.smallest_normal)
    assert ours.epsilon == float(theirs.eps)
    assert ours.smallest_subnormal == float(theirs.smallest_subnormal)


@pytest.mark.parametrize("name", [*TORCH, "fp32", "fp64"])
def test_figures_are_those_of_torch(name: str) -> None:
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(name) or TORCH[name]
    ours, theirs = FORMATS[name], torch.finfo(dtype)
    assert (ours.bits, ours.largest, ours.lowest) == (theirs.bits, theirs.max, theirs.min)
    assert ours.smallest_normal == theirs.smallest_normal
    if name != "e5m2fnuz":  # whose two mantissa bits torch 2.13 counts as three here
        assert ours.epsilon == theirs.eps


def test_the_table_holds_what_the_contract_names() -> None:
    assert " ".join(FORMATS) == (
        "fp64 fp32 tf32 bf16 fp16 e4m3fn e4m3 e4m3fnuz e5m2 e5m2fnuz e3m4 e8m0 e3m2 e2m3 e2m1 int8 int4"
    )
    assert all(name == entry.name for name, entry in FORMATS.items())


def test_integers() -> None:
    int8, int4 = FORMATS["int8"], FORMATS["int4"]
    assert (int8.lowest, int8.largest, int4.lowest, int4.largest) == (-127, 127, -8, 7)
    for integer in (int8, int4):
        assert integer.smallest_subnormal == integer.smallest_normal == integer.epsilon == 1
        assert integer.overflow is None
        assert integer.is_integer


def test_tf32_is_fp32_with_fp16s_mantissa() -> None:
    tf32, fp32 = FORMATS["tf32"], FORMATS["fp32"]
    assert (tf32.bits, tf32.stored_bits) == (19, 32)
    assert tf32.smallest_normal == fp32.smallest_normal
    assert tf32.largest == (2 - 2.0**-10) * 2.0**127
    assert tf32.epsilon == FORMATS["fp16"].epsilon


def test_overflow_is_what_the_format_has() -> None:
    assert FORMATS["e5m2"].overflow == np.inf
    assert np.isnan([FORMATS[name].overflow for name in ("e4m3fn", "e4m3fnuz", "e5m2fnuz", "e8m0")]).all()
    assert {FORMATS[name].overflow for name in ("e3m2", "e2m3", "e2m1", "int8", "int4")} == {None}


def test_formats_are_values() -> None:
    assert replace(FORMATS["bf16"]) == FORMATS["bf16"]
    assert hash(replace(FORMATS["bf16"])) == hash(FORMATS["bf16"])
    with pytest.raises(FrozenInstanceError):
        FORMATS["bf16"].bias = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        FORMATS["mine"] = FORMATS["bf16"]  # type: ignore[index]


def test_formats_are_readable() -> None:
    assert f"{FORMATS['bf16']}" == "bf16"
    assert repr(FORMATS["int8"]) == "Format(int8: 8 bits, -127 to 127)"
    assert repr(FORMATS["e4m3fn"]) == (
        "Format(e4m3fn: 4 exponent and 3 mantissa bits, bias 7, smallest 2^-9, largest 448, NaN)"
    )
    assert "no sign, no zero" in repr(FORMATS["e8m0"])


@pytest.mark.parametrize(("x", "y"), EVERY_SIZE)
def test_any_size_has_a_name(x: int, y: int) -> None:
    found = format_named(f"e{x}m{y}")
    assert (found.name, found.exponent_bits, found.mantissa_bits) == (f"e{x}m{y}", x, y)
    if found.name not in FORMATS:
        assert found == ieee_like(x, y)
        assert found.largest == (2 - 2.0**-y) * 2.0 ** (2 ** (x - 1) - 1)
        assert found.overflow == np.inf


@pytest.mark.parametrize(("name", "same"), [("e8m7", "bf16"), ("e5m10", "fp16"), ("e8m23", "fp32"), ("e8m10", "tf32")])
def test_a_size_that_the_table_names_otherwise_keeps_its_name(name: str, same: str) -> None:
    found = format_named(name)
    assert str(found) == name
    assert replace(found, name=same, memory_bits=FORMATS[same].memory_bits) == FORMATS[same]


@pytest.mark.parametrize("name", ["e1m3", "e9m3", "e4m24", "e11m52", "e04m3", "e4m03", "e12m0"])
def test_a_size_beyond_the_range_is_refused_with_the_range(name: str) -> None:
    with pytest.raises(UnknownFormat, match=rf"'{name}': there is any eXmY with X from 2 to 8 and Y from 0 to 23"):
        format_named(name)


def test_dtypes_of_torch_and_ml_dtypes_are_found_by_their_names_and_themselves() -> None:
    for name, dtype in (*TORCH.items(), ("fp32", torch.float32), ("fp64", torch.double), ("int8", torch.int8)):
        assert format_named(dtype) is format_named(str(dtype)) is FORMATS[name]
    for name, theirs in (*ML_DTYPES.items(), ("int4", ml_dtypes.int4), ("int8", np.int8)):
        assert format_named(np.dtype(theirs)) is format_named(np.dtype(theirs).name) is FORMATS[name]


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("kFloat8E4M3", "e4m3fn"),  # TransformerEngine: a DType, and a recipe's Format
        ("E4M3", "e4m3fn"),
        ("E5M2", "e5m2"),
        ("kBFloat16", "bf16"),
        ("FLOAT8E4M3FN", "e4m3fn"),  # ONNX
        ("FLOAT8E5M2FNUZ", "e5m2fnuz"),
        ("FLOAT4E2M1", "e2m1"),
        ("FLOAT", "fp32"),
        ("INT4", "int4"),
        ("half", "fp16"),
    ],
)
def test_names_of_other_libraries(alias: str, name: str) -> None:
    assert format_named(alias) is FORMATS[name]


def test_a_name_means_one_format() -> None:
    every = [alias for named in ALIASES.values() for library in LIBRARIES for alias in set(named[library])]
    meant = {alias: {own for own, named in ALIASES.items() if alias in sum(named.values(), ())} for alias in every}
    assert all(len(own) == 1 for own in meant.values())
    assert list(ALIASES) == list(FORMATS)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BF16", "bf16"),
        ("fp8", "e4m3fn or e5m2"),
        ("float4", "e2m1"),
        ("mxfp6", "e3m2 or e2m3"),
        ("int 8", "int8"),
        ("e4m3fnu", "e4m3fnuz"),
        ("float8_e4m3f", "float8_e4m3fn"),
        ("e4m3fn/tensor", "e4m3fn"),
        ("", "there are fp64"),
        ("qwertz", "there are fp64"),
    ],
)
def test_an_unknown_name_lists_the_near_ones_and_all(name: str, meant: str) -> None:
    with pytest.raises(UnknownFormat, match=re.escape(meant)) as caught:
        format_named(name)
    assert isinstance(caught.value, ProbeError)
    assert isinstance(caught.value, ValueError)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in FORMATS)


@pytest.mark.parametrize("name", [None, 3, b"bf16", torch.complex64, "torch.int32"])
def test_what_names_no_format(name: object) -> None:
    with pytest.raises(UnknownFormat, match="no format is called"):
        format_named(name)


def test_the_table_and_the_codes_do_not_import_torch() -> None:
    check = "import sys, probes, probes.formats, probes.codes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_dtype_classes_name_their_format() -> None:
    assert format_named(np.float16) is FORMATS["fp16"]
    assert format_named(ml_dtypes.bfloat16) is FORMATS["bf16"]
    assert format_named(ml_dtypes.float8_e4m3fn) is FORMATS["e4m3fn"]
