"""Casts as text: one canonical string each, which reads back; and what is said of a text that means nothing."""

from __future__ import annotations

import random
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from probes.casts import Cast
from probes.errors import InvalidCast, ProbeError, UnknownFormat
from probes.format_names import format_named
from probes.formats import FORMATS
from probes.rounding import ROUNDINGS
from probes.scaling import RULES, Scale

CANONICAL = {
    # formats of 8 bits or less are scaled by their largest magnitude, all others are not scaled
    "e4m3fn": "e4m3fn/tensor/current/nearest",
    "int8": "int8/tensor/current/nearest",
    "e2m1": "e2m1/tensor/current/nearest",
    "e8m0": "e8m0/tensor/current/nearest",
    "bf16": "bf16/none/nearest",
    "fp64": "fp64/none/nearest",
    "e8m3": "e8m3/none/nearest",
    "e4m2": "e4m2/tensor/current/nearest",
    "e8m7": "e8m7/none/nearest",
    # a granularity's first rule is its default
    "fp16/tensor": "fp16/tensor/current/nearest",
    "e5m2/none": "e5m2/none/nearest",
    "e5m2/row": "e5m2/row/current/nearest",
    "e5m2/column": "e5m2/column/current/nearest",
    "e5m2/block32": "e5m2/block32/e8m0/nearest",
    "e2m1/block16": "e2m1/block16/nvfp4/nearest",
    "e5m2/block1x128": "e5m2/block1x128/current/nearest",
    "e5m2/block128x128": "e5m2/block128x128/current/nearest",
    # options
    "e5m2/tensor/delayed": "e5m2/tensor/delayed(len=16,margin=0)/nearest",
    "e5m2/tensor/delayed/stochastic": "e5m2/tensor/delayed(len=16,margin=0)/stochastic",
    "e5m2/tensor/delayed()": "e5m2/tensor/delayed(len=16,margin=0)/nearest",
    "e5m2/tensor/delayed(len=1024)": "e5m2/tensor/delayed(len=1024,margin=0)/nearest",
    "e5m2/tensor/delayed(margin=-2)": "e5m2/tensor/delayed(len=16,margin=-2)/nearest",
    "e5m2/tensor/delayed( margin = 1 , len = 2 ):pow2/zero": "e5m2/tensor/delayed(len=2,margin=1):pow2/zero",
    "int8/tensor/static=0.013": "int8/tensor/static=0.013/nearest",
    "int8/tensor/static=1e-3:pow2": "int8/tensor/static=0.001:pow2/nearest",
    "int8/tensor/static=2": "int8/tensor/static=2.0/nearest",
    "e4m3fn/tensor/current:pow2": "e4m3fn/tensor/current:pow2/nearest",
    "e4m3fn/block32/e8m0up/stochastic": "e4m3fn/block32/e8m0up/stochastic",
    # what overflows to Inf or NaN
    "e5m2:inf": "e5m2/tensor/current/nearest:inf",
    "e5m2/row:inf": "e5m2/row/current/nearest:inf",
    "e5m2/tensor/current:pow2:inf": "e5m2/tensor/current:pow2/nearest:inf",
    "fp16/none/zero:inf": "fp16/none/zero:inf",
    # other libraries' names
    "float8_e4m3fn/none": "e4m3fn/none/nearest",
    "torch.bfloat16": "bf16/none/nearest",
    "FLOAT8E5M2/tensor": "e5m2/tensor/current/nearest",
    "kFloat4E2M1/block32": "e2m1/block32/e8m0/nearest",
}


@pytest.mark.parametrize(("text", "canonical"), CANONICAL.items())
def test_a_cast_is_written_one_way(text: str, canonical: str) -> None:
    cast = Cast.parse(text)
    assert str(cast) == f"{cast}" == canonical
    assert Cast.parse(canonical) == cast
    assert hash(Cast.parse(canonical)) == hash(cast)


def any_scale(chance: random.Random, granularity: str) -> Scale | None:
    if not RULES[granularity]:
        return None
    rule = chance.choice(RULES[granularity])
    power_of_two = rule in ("current", "delayed", "static") and chance.random() < 0.4
    if rule == "delayed":
        length = chance.choice([1, 2, 16, 1024, 65_536, chance.randint(1, 65_536)])
        return Scale(rule, power_of_two, length=length, margin=chance.randint(-64, 64))
    if rule == "static":
        value = chance.choice([2.0**-126, 1.0, 2.0**127, chance.random() * 10.0 ** chance.randint(-30, 38)])
        return Scale(rule, power_of_two, value=value)
    return Scale(rule, power_of_two)


def any_cast(chance: random.Random) -> Cast:
    while True:
        size = f"e{chance.randint(2, 8)}m{chance.randint(0, 23)}"
        target = format_named(chance.choice([size, chance.choice(list(FORMATS))]))
        granularity = chance.choice(list(RULES))
        scale = any_scale(chance, granularity)
        saturate = target.overflow is None or chance.random() < 0.5
        if scale is None or scale.rule != "nvfp4" or target.largest < 1e30:
            return Cast(target, granularity, scale, chance.choice(ROUNDINGS), saturate)


def test_random_casts_read_back_as_themselves() -> None:
    chance, texts = random.Random(20), {}
    for _ in range(20_000):
        cast = any_cast(chance)
        again = Cast.parse(str(cast))
        assert again == cast
        assert hash(again) == hash(cast)
        assert str(again) == str(cast)
        assert texts.setdefault(str(cast), cast) == cast  # no two casts share a text
    assert len(texts) > 10_000


def test_casts_of_the_same_values_are_one() -> None:
    assert len({Cast.parse(text) for text in ("e4m3fn", "e4m3fn/tensor", "float8_e4m3fn/tensor/current/nearest")}) == 1
    assert len({Cast.parse(text) for text in ("bf16", "e8m7", "bf16:inf", "bf16/tensor", "bf16/none/zero")}) == 5
    assert Cast.parse("int8/tensor/static=1") == Cast.parse("int8/tensor/static=1.0")


def test_a_cast_is_a_value() -> None:
    cast = Cast.parse("e4m3fn")
    with pytest.raises(FrozenInstanceError):
        cast.rounding = "zero"  # type: ignore[misc]
    assert replace(cast, rounding="zero") == Cast.parse("e4m3fn/tensor/current/zero")
    assert cast.bits == 8


GRANULARITIES = "none, tensor, row, column, block32, block16, block1x128, block128x128"

REFUSED = [
    # granularity
    ("e4m3fn/tensr", ["granularity", "'tensr'", "did you mean tensor", GRANULARITIES]),
    ("e4m3fn/", ["granularity", "''", GRANULARITIES]),
    ("e4m3fn/block64", ["'block64'", "did you mean block16", "block32", GRANULARITIES]),
    ("e4m3fn/block128", ["'block128'", "did you mean block1x128", GRANULARITIES]),
    ("e4m3fn/Tensor", ["'Tensor'", "did you mean tensor"]),
    # a scale that is none, or not there
    ("e4m3fn/row/delayed", ["scale at granularity 'row'", "'delayed'", "there is current"]),
    ("e4m3fn/row/static=1", ["scale at granularity 'row'", "'static'", "there is current"]),
    ("e4m3fn/block128x128/delayed", ["'delayed'", "current, e8m0, e8m0up"]),
    ("e4m3fn/tensor/e8m0", ["scale at granularity 'tensor'", "'e8m0'", "current, delayed, static"]),
    ("e2m1/block32/nvfp4", ["scale at granularity 'block32'", "'nvfp4'", "e8m0, e8m0up, current"]),
    ("e4m3fn/block32/e8m0upp", ["'e8m0upp'", "did you mean e8m0up"]),
    ("e4m3fn/tensor/curent", ["'curent'", "did you mean current"]),
    (
        "e4m3fn/tensor/stochastic",
        ["the scale of a tensor", "'stochastic' is a rounding", "current or delayed or static"],
    ),
    ("e4m3fn/tensor//nearest", ["scale at granularity 'tensor'", "''"]),
    ("bf16/block16/nvfp4", ["nvfp4 scales are for narrow formats", "bf16"]),
    ("e8m0/block16/nvfp4", ["nvfp4 scales are for narrow formats", "e8m0"]),
    # options
    ("e4m3fn/block32/e8m0:pow2", ["e8m0 scale takes no ':pow2'", "float32"]),
    ("e4m3fn/block32/e8m0up:pow2", ["e8m0up scale takes no ':pow2'"]),
    ("e2m1/block16/nvfp4:pow2", ["nvfp4 scale takes no ':pow2'"]),
    ("e4m3fn/tensor/current:pow4", ["current:pow4"]),
    ("e4m3fn/tensor/current(len=3)", ["current(len=3)"]),
    ("e4m3fn/tensor/current=3", ["current=3"]),
    ("e4m3fn/tensor/delayed(len=0)", ["len=0", "from 1 to 65536"]),
    ("e4m3fn/tensor/delayed(len=65537)", ["len=65537", "from 1 to 65536"]),
    ("e4m3fn/tensor/delayed(len=-1)", ["len=-1", "from 1 to 65536"]),
    ("e4m3fn/tensor/delayed(margin=65)", ["margin=65", "from -64 to 64"]),
    ("e4m3fn/tensor/delayed(len=1.5)", ["delayed(len=16,margin=0)", "len=1.5"]),
    ("e4m3fn/tensor/delayed(len=2,len=3)", ["delayed(len=16,margin=0)", "len=2,len=3"]),
    ("e4m3fn/tensor/delayed(length=2)", ["delayed(len=16,margin=0)", "length=2"]),
    ("e4m3fn/tensor/delayed(len=2", ["delayed(len=16,margin=0)", "'delayed(len=2'"]),
    ("e4m3fn/tensor/delayed=2", ["delayed(len=16,margin=0)", "'delayed=2'"]),
    ("e4m3fn/tensor/static", ["static=0.013", "'static'"]),
    ("e4m3fn/tensor/static=", ["static=0.013", "'static='"]),
    ("e4m3fn/tensor/static=x", ["static=0.013", "'static=x'"]),
    ("e4m3fn/tensor/static=nan", ["static=0.013", "'static=nan'"]),
    ("e4m3fn/tensor/static=0", ["static=0.0", "from 2^-126 to 3.4028235e+38"]),
    ("e4m3fn/tensor/static=-1", ["static=-1.0", "from 2^-126 to 3.4028235e+38"]),
    ("e4m3fn/tensor/static=inf", ["static=inf", "static=0.013"]),
    ("e4m3fn/tensor/static=1e39", ["static=1e+39", "from 2^-126 to 3.4028235e+38"]),
    ("e4m3fn/tensor/static=1e-39", ["static=1e-39", "from 2^-126 to 3.4028235e+38"]),
    ("e4m3fn/tensor/static(1)", ["static=0.013", "'static(1)'"]),
    # rounding
    ("e4m3fn/tensor/current/nearst", ["rounding", "'nearst'", "did you mean nearest", "nearest, stochastic, zero"]),
    ("e4m3fn/tensor/current/", ["rounding", "''", "nearest, stochastic, zero"]),
    ("e4m3fn/none/current/nearest", ["rounding", "'current'", "nearest, stochastic, zero"]),
    ("e4m3fn/none/nearest/more", ["nothing follows the rounding", "'more'"]),
    ("bf16/none/nearest:sat", ["rounding", "'nearest:sat'", "did you mean nearest"]),
    ("bf16/none/nearest:inf:inf", ["'nearest:inf'", "nearest, stochastic, zero"]),
    # overflow to what the format has not
    *((f"{name}/none/nearest:inf", [name, "neither Inf nor NaN", "leave ':inf' away"]) for name in ("int8", "e2m1")),
    *((f"{name}:inf", [name, "neither Inf nor NaN"]) for name in ("int4", "e3m2", "e2m3")),
]


@pytest.mark.parametrize(("text", "says"), REFUSED, ids=[text for text, _ in REFUSED])
def test_a_text_that_means_nothing_is_refused_with_what_there_is(text: str, says: list[str]) -> None:
    with pytest.raises(InvalidCast) as caught:
        Cast.parse(text)
    assert repr(text) in str(caught.value)
    assert all(part in str(caught.value) for part in says), str(caught.value)
    assert isinstance(caught.value, ProbeError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("e4m3f/tensor", "did you mean e4m3fn"),
        ("fp8", "did you mean e4m3fn or e5m2"),
        ("BF16/none", "did you mean bf16"),
        ("e9m2/none", "any eXmY with X from 2 to 8 and Y from 0 to 23"),
        ("e4m24", "any eXmY with X from 2 to 8 and Y from 0 to 23"),
        ("/tensor/current", "there are fp64"),
        ("", "there are fp64"),
        (" e4m3fn", "did you mean e4m3fn"),
    ],
)
def test_an_unknown_format_is_refused_with_the_near_ones(text: str, says: str) -> None:
    with pytest.raises(UnknownFormat, match=says):
        Cast.parse(text)


@pytest.mark.parametrize("given", [None, 3, b"e4m3fn", FORMATS["e4m3fn"], torch.bfloat16])
def test_what_is_no_text_is_refused(given: object) -> None:
    with pytest.raises(InvalidCast, match="a cast is written as text like 'e4m3fn/tensor/current/nearest', got "):
        Cast.parse(given)  # type: ignore[arg-type]


def test_a_cast_is_refused_however_it_is_made() -> None:
    e4m3fn, e2m1 = FORMATS["e4m3fn"], FORMATS["e2m1"]
    with pytest.raises(InvalidCast, match="'tensor' needs a scale: current or delayed or static"):
        Cast(e4m3fn, "tensor")
    with pytest.raises(InvalidCast, match=r"no scale at granularity 'none' is called 'current' \(there is none\)"):
        Cast(e4m3fn, "none", Scale("current"))
    with pytest.raises(InvalidCast, match="no scale at granularity 'row' is called 'static'"):
        Cast(e4m3fn, "row", Scale("static", value=1.0))
    with pytest.raises(InvalidCast, match="no granularity is called 'block8'"):
        Cast(e4m3fn, "block8", Scale("current"))
    with pytest.raises(InvalidCast, match="no rounding is called 'up'"):
        Cast(e4m3fn, rounding="up")
    with pytest.raises(InvalidCast, match="neither Inf nor NaN"):
        Cast(e2m1, saturate=False)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "currant"}, "no scale is called 'currant'; did you mean current"),
        ({"rule": "current", "length": 3}, "a length and a margin are for delayed scales, not for current"),
        ({"rule": "static"}, "a static scale needs its value, as in static=0.013"),
        ({"rule": "current", "value": 1.0}, "no other takes one"),
        ({"rule": "static", "value": float("nan")}, "static=nan: a scale is a float32 from 2"),
        ({"rule": "delayed", "length": 2.5}, "len=2.5"),
        ({"rule": "delayed", "length": 16.0}, "len=16.0.*the length is an integer"),
        ({"rule": "e8m0", "power_of_two": True}, "takes no ':pow2'"),
    ],
)
def test_a_scale_is_refused_however_it_is_made(options: dict[str, object], says: str) -> None:
    with pytest.raises(InvalidCast, match=says):
        Scale(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.float32(0.013), np.float64(2.0), 2])
def test_a_static_scale_of_any_number_is_written_as_a_float(value: float) -> None:
    cast = Cast(FORMATS["int8"], "tensor", Scale("static", value=value))
    assert str(cast) == f"int8/tensor/static={float(value)!r}/nearest"
    assert Cast.parse(str(cast)) == cast


@pytest.mark.parametrize("number", ["1_0", " 1", "\u0663", "0x10", "1e", "+-1"])
def test_a_static_scale_is_written_in_plain_digits(number: str) -> None:
    with pytest.raises(InvalidCast, match="written static="):
        Cast.parse(f"e4m3fn/tensor/static={number}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bf16/stochastic", "bf16/none/stochastic"),
        ("e4m3fn/tensor/nearest", "a rounding; .*current or delayed or static"),
    ],
)
def test_a_rounding_in_another_parts_place_is_told_its_own(text: str, says: str) -> None:
    with pytest.raises(InvalidCast, match=says):
        Cast.parse(text)
