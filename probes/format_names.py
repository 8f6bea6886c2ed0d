"""Formats by name: ours, those that other libraries use, and any eXmY.

Other libraries' names are looked up as they are written there, capitals included, because capitals decide: the
FP8 specification and TransformerEngine call E4M3 what ml_dtypes and torch call float8_e4m3fn (largest 448), while
ml_dtypes' float8_e4m3, our e4m3, has an Inf and ends at 240.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from probes.errors import UnknownFormat
from probes.formats import FORMATS, Format, ieee_like

LIBRARIES = ("torch", "ml_dtypes", "TransformerEngine", "ONNX")

# Our name, then each library's own in the order of LIBRARIES; "" where it has none. From torch 2.13 (`torch.dtype`),
# ml_dtypes 0.6 and numpy, TransformerEngine 2.x (`DType` in transformer_engine.h, and its recipes' `Format`), ONNX
# 1.23 (`TensorProto.DataType`). Several names of one library are separated by a blank.
_NAMES = (
    ("fp64", "float64 double", "float64", "", "DOUBLE"),
    ("fp32", "float32 float", "float32", "kFloat32", "FLOAT"),
    ("tf32", "", "", "", ""),
    ("bf16", "bfloat16", "bfloat16", "kBFloat16", "BFLOAT16"),
    ("fp16", "float16 half", "float16", "kFloat16", "FLOAT16"),
    ("e4m3fn", "float8_e4m3fn", "float8_e4m3fn", "kFloat8E4M3 E4M3", "FLOAT8E4M3FN"),
    ("e4m3", "", "float8_e4m3", "", ""),
    ("e4m3fnuz", "float8_e4m3fnuz", "float8_e4m3fnuz", "", "FLOAT8E4M3FNUZ"),
    ("e5m2", "float8_e5m2", "float8_e5m2", "kFloat8E5M2 E5M2", "FLOAT8E5M2"),
    ("e5m2fnuz", "float8_e5m2fnuz", "float8_e5m2fnuz", "", "FLOAT8E5M2FNUZ"),
    ("e3m4", "", "float8_e3m4", "", ""),
    ("e8m0", "float8_e8m0fnu", "float8_e8m0fnu", "kFloat8E8M0", "FLOAT8E8M0"),
    ("e3m2", "", "float6_e3m2fn", "", ""),
    ("e2m3", "", "float6_e2m3fn", "", ""),
    ("e2m1", "float4_e2m1fn_x2", "float4_e2m1fn", "kFloat4E2M1 E2M1", "FLOAT4E2M1"),
    ("int8", "", "", "kInt8", "INT8"),
    ("int4", "", "", "", "INT4"),
)

ALIASES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        own: MappingProxyType({library: tuple(names.split()) for library, names in zip(LIBRARIES, others, strict=True)})
        for own, *others in _NAMES
    }
)
"""Our name → library → its names for the same format. torch, ml_dtypes and numpy call int8 and int4 as we do."""

_OWN_NAME = {alias: own for own, named in ALIASES.items() for names in named.values() for alias in names}
_ANY = re.compile(r"e(\d{1,2})m(\d{1,2})")
_FAMILIES = {"fp8": ("e4m3fn", "e5m2"), "fp6": ("e3m2", "e2m3"), "fp4": ("e2m1",)}  # words that name no one format
_EXPONENT_BITS, _MANTISSA_BITS = range(2, 9), range(24)
_ANY_RULE = "any eXmY with X from 2 to 8 and Y from 0 to 23"


def format_named(name: Any) -> Format:
    """The format of this name: of the table, of another library (its dtype too, object or class), or any eXmY.

    An eXmY that the table does not hold is laid out as IEEE 754 would, and keeps its name: e8m7 has bf16's values.
    Raises UnknownFormat, with the names that are near and all that there are.
    """
    text = name.__name__ if isinstance(name, type) else str(name).removeprefix("torch.")
    if text in FORMATS:
        return FORMATS[text]
    if text in _OWN_NAME:
        return FORMATS[_OWN_NAME[text]]
    sizes = _ANY.fullmatch(text)
    if sizes is not None:
        exponent_bits, mantissa_bits = int(sizes[1]), int(sizes[2])
        canonical = f"e{exponent_bits}m{mantissa_bits}"
        if exponent_bits in _EXPONENT_BITS and mantissa_bits in _MANTISSA_BITS and text == canonical:
            return ieee_like(exponent_bits, mantissa_bits)
        raise UnknownFormat(f"no format is called {text!r}: there is {_ANY_RULE}")
    raise UnknownFormat(f"no format is called {text!r}{_meant(text)} (there are {', '.join(FORMATS)}, and {_ANY_RULE})")


def _meant(text: str) -> str:
    known = {alias.lower(): alias for named in ALIASES.values() for alias in (*named["torch"], *named["ml_dtypes"])}
    known |= {own: own for own in FORMATS}
    near = _FAMILIES.get(re.sub(r"^(float|mxfp|nvfp)", "fp", text.lower())) or tuple(
        known[match] for match in difflib.get_close_matches(text.lower(), known, n=3, cutoff=0.5)
    )
    return f"; did you mean {' or '.join(near)}?" if near else ""
