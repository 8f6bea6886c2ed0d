"""Writes docs/formats.md from the tables of formats, names, granularities and rules: `python docs/generate.py`.

Figures come from the code; the prose is here. tests/test_docs.py holds the committed page to what this writes, and
parses every cast on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from probes.casts import Cast
from probes.format_names import ALIASES, LIBRARIES
from probes.formats import FORMATS, Format
from probes.scaling import E4M3, E8M0_EXPONENTS, RULES, SMALLEST_EXPONENT, TILES, Scale

PAGE = Path(__file__).parent / "formats.md"

MX_FORMATS = ("e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1")

CASTS = """# Formats and casts

<!-- Written by docs/generate.py: change it there. -->

A cast says how a tensor is written down: an element format, which elements share a scale, how the scale is found, and
how values are rounded. Called with a tensor, it gives back what would be read after writing it: a new tensor of the
same shape and dtype.

```python
import torch
from advisor import Cast, CastState

x = torch.randn(64, 256)
cast = Cast.parse("e4m3fn/block32")
read_back = cast(x)  # each value divided by its scale, rounded, limited, multiplied by the scale
print(cast)  # e4m3fn/block32/e8m0/nearest

delayed, state = Cast.parse("e5m2/tensor/delayed/stochastic"), CastState(seed=3)
for step in range(4):
    delayed(x, state)  # the history and the random stream go on in the state
```

## The string

    format/granularity/scale/rounding
    format/granularity/scale/rounding:inf

`str(cast)` writes every part, and `Cast.parse` reads it back to an equal cast. Trailing parts may be left out:

- the granularity: `tensor` for formats of 8 bits or less, `none` for others;
- the scale: the first rule in the table below;
- the rounding: `nearest`;
- `:inf`: without it, what lies beyond the largest value saturates.

So {defaults}.
Granularity `none` has no scale, hence no third part: `e8m3/none/stochastic`. What cannot be parsed is refused with the
names that are near and all that there are.

## Granularity: which elements share a scale

A tensor is seen as a matrix: one dimension runs along the rows, all others are flattened in their order. It is the last
dimension unless a call names another, `cast(x, dimension=0)`. A tensor with one dimension is one row.

"""

TILE_WORDS = {
    "none": "no scale",
    "tensor": "all",
    "row": "a row: all elements along the dimension",
    "column": "a column: all elements at one place of the dimension",
}

SCALES = """
The last block of a row or column may be smaller; it has a scale of its own.

## Scale: how it is found

A scale is the factor from the written value to the value: `x / scale` is rounded. `amax` is the largest finite
magnitude among the elements that share the scale, `largest` the format's largest value.

| written | scale | what it is |
|---|---|---|
| `current` | amax / largest, in float32 | the largest magnitude becomes the format's largest value |
| `{delayed}` | A·2^margin / largest, in float32 | A is the largest amax of the last `len` calls, this \
call not among them. Before a call that saw anything but zeros, A is the call's own amax. `margin` is the number of \
octaves kept free. `delayed` alone has the values shown |
| `static=0.013` | the number, in float32 | given in advance |
| `e8m0` | 2^(floor(log2 amax) − emax) | the rule of OCP Microscaling Formats 1.0, section 6.3; emax is the exponent \
of the format's largest value: {emax} |
| `e8m0up` | 2^ceil(log2(amax / largest)) | the smallest power of two with which nothing saturates (Mishra et al. \
2025, "Recipes for pre-training LLMs with MXFP8") |
| `nvfp4` | q·g | two levels (NVIDIA 2025, "Pretraining large language models with NVFP4"): g = amax of the whole \
tensor / (largest·{largest}), in float32; q = (block's amax / largest) / g, rounded to {e4m3}, and at least \
{e4m3_smallest} |

`:pow2` after `current`, `delayed` or `static` rounds that float32 scale up to a power of two:
`e4m3fn/tensor/current:pow2`, `e5m2/tensor/delayed(len=64,margin=1):pow2/stochastic`.

Under `e8m0` the largest magnitudes may saturate: for e4m3fn any amax from 256 up to 512 has the scale 1, and the
largest value is {largest}. That is the published rule. `e8m0up` avoids it with a scale twice as large, at the price
of the lowest octave.

Limits: a float32 scale is not below 2^{smallest}, under which float32 loses precision, so that tensors whose amax is
less than that times the largest value do not use the format's upper end, and in the end become zero. An `e8m0` or
`e8m0up` scale lies between 2^{e8m0_from} and 2^{e8m0_to}. No scale is so large that the largest value times it would
overflow float32. Where there is nothing but zeros, or nothing finite, the scale is 1. So it is for formats that hold
every float32 (fp32, fp64, e8m23).

A delayed cast keeps its history in a `CastState`, which is given to each call, `cast(x, state)`. Without one every call
is a first call.

## Rounding

| written | what it does |
|---|---|
| `nearest` | to the nearest value, a tie to the one with the even significand (IEEE 754). Without mantissa bits that \
is the one of larger magnitude |
| `stochastic` | up or down at random, so that the mean is the value: between 0 and 1, 0.3 becomes 1 with probability \
0.3. Probabilities have 24 bits |
| `zero` | toward zero: the nearest value that is no larger in magnitude |

Random numbers come from a counter and a hash, not from torch's generators. A draw depends on the state's seed, the
number of calls before, and the element's place in the tensor: the same on the CPU and on CUDA, for any number of
threads. `CastState(seed=3)` starts a stream; without a state the process has one that goes on from call to call.

## Overflow

What rounds beyond the largest value, Inf included, becomes the largest value (times its scale). With `:inf` it becomes
Inf, or NaN in formats without Inf; formats with neither ({neither}) refuse `:inf`.
Rounding `zero` with `:inf` takes finite values to the largest, which is what lies toward zero, and only Inf to Inf or
NaN. `cast.saturates(x)` tells which elements these are.

Other libraries differ here: see [peers.md](peers.md). ONNX's Cast operator does too: it wraps integers around (8 to
INT4 is -8, here 7), gives FLOAT8E8M0 a rounding upward as its default, which no cast here has (the scale rule `e8m0up`
does it), and makes a NaN in FLOAT4E2M1 -0.

## What the unusual becomes

| in | out |
|---|---|
| NaN | NaN, in every format, also in those that have none: in an emulation a divergence must stay visible |
| -0 | -0, in int8 and int4 too; +0 in the fnuz formats, which have no other |
| Inf | does not count for amax; see overflow |
| no elements | no elements |
| e8m0: zero | 2^-127, its smallest value; NaN with `:inf` |
| e8m0: negative | NaN |
| e8m0: between 2^-127 and 2^-126, to nearest | 2^-126, as torch and ml_dtypes have it: float32 is subnormal there |
| float16, bfloat16 | calculated in float32, then rounded to the tensor's own dtype. If that cannot hold a value (to \
bf16, 65504 is 65536), it becomes the dtype's largest; with `:inf`, Inf |
| float64 | calculated in float64, rounded once |
| subnormal float32 | calculated with. Leave `torch.set_flush_denormal` alone: flushed, spacings of e8mY are 0 |
| other dtypes, sparse layouts | refused with `UnsupportedTensor` |

## Gradients

Rounding has a gradient of zero almost everywhere, so gradients pass through a cast as if it were not there
(straight-through). `probes/gradients.py` has what can be chosen: another cast for the gradient, and
`saturated="mask"`, which gives elements that saturate no gradient. `"pass"` is the default: with scales that follow the
largest magnitude next to nothing saturates, and with those that lag behind an element without a gradient could not
come back into range.

## Formats

"""

FORMATS_AFTER = """
The smallest subnormal is also the spacing below the smallest normal value. Epsilon is the distance from 1 to the next
larger value. A value is M·2^(1 − bias − m) where the exponent field E is 0 and (1 + M/2^m)·2^(E − bias) otherwise, M
being the mantissa field of m bits. Integers have no exponent field and are all on one grid of step 1; int8 leaves -128
unused, so that it is symmetric. e8m0, a format for scales, has neither sign nor zero. tf32 takes 32 bits in memory.
fp64 is fp32 to a float32 tensor. "NaN" alone means the one code of all ones; the rest of the top exponent holds
finite values.

**Any eXmY.** A name of X from 2 to 8 exponent and Y from 0 to 23 mantissa bits that is not in the table is laid out
as IEEE 754 lays out its own: bias 2^(X − 1) − 1, subnormals, the top exponent field for Inf and NaN (for Inf alone if Y
is 0). It keeps its name: `e8m7/none/nearest` gives what `bf16/none/nearest` gives, and is another cast. `e4m3` and
`e5m2` are such formats; OCP's E4M3, which ends at 448, is `e4m3fn`.

## Names in other libraries

These are read as well, capitals as written, because capitals decide: TransformerEngine's E4M3 is e4m3fn. So
`float8_e5m2/tensor` is `e5m2/tensor/current/nearest`. `format_named` in `probes/format_names.py` takes dtypes of torch
and numpy, too.

"""


def formats_page() -> str:
    """docs/formats.md."""
    return "".join((_casts(), _granularities(), _scales(), _formats(), FORMATS_AFTER, _names()))


def _casts() -> str:
    bf16, e5m2, e2m1 = (f"`{short}` is `{Cast.parse(short)}`" for short in ("bf16", "e5m2", "e2m1/block16"))
    return CASTS.replace("{defaults}", f"{bf16}, {e5m2}, and\n{e2m1}")


def _granularities() -> str:
    rows = ((f"`{name}`", _tile(name), _listed(f"`{rule}`" for rule in rules)) for name, rules in RULES.items())
    return _table(("granularity", "elements that share a scale", "rules, the default first"), rows)


def _tile(name: str) -> str:
    if name in TILE_WORDS:
        return TILE_WORDS[name]
    tile = TILES[name]
    rows = "" if tile.rows == 1 else f"{tile.rows} rows and "
    return f"a block: {rows}{tile.columns} along the dimension"


def _scales() -> str:
    neither = [name for name, target in FORMATS.items() if target.overflow is None]
    figures = {
        "delayed": str(Scale("delayed")),
        "emax": _listed(f"{FORMATS[name].emax} for {name}" for name in MX_FORMATS),
        "e4m3": E4M3.name,
        "largest": _number(E4M3.largest),
        "e4m3_smallest": _number(E4M3.smallest_subnormal),
        "smallest": str(SMALLEST_EXPONENT),
        "e8m0_from": str(E8M0_EXPONENTS[0]),
        "e8m0_to": str(E8M0_EXPONENTS[1]),
        "neither": _listed(neither),
    }
    text = SCALES
    for name, figure in figures.items():
        text = text.replace(f"{{{name}}}", figure)
    return text


def _formats() -> str:
    heads = ("format", "bits", "exponent", "mantissa", "bias", "largest", "lowest", "smallest normal")
    heads += ("smallest subnormal", "epsilon", "codes", "beyond finite values")
    return _table(heads, (_figures(target) for target in FORMATS.values()), right=slice(1, 11))


def _figures(target: Format) -> Sequence[str]:
    return (
        f"`{target}`",
        str(target.bits),
        str(target.exponent_bits),
        str(target.mantissa_bits),
        "" if target.is_integer else str(target.bias),
        _number(target.largest),
        _number(target.lowest),
        _number(target.smallest_normal),
        _number(target.smallest_subnormal) if target.has_subnormals else "none",
        _number(target.epsilon),
        _number(target.code_points),
        target.nonfinite.value,
    )


def _names() -> str:
    rows = (
        (f"`{own}`", *(_listed(f"`{name}`" for name in others[library]) for library in LIBRARIES))
        for own, others in ALIASES.items()
    )
    return _table(("ours", *LIBRARIES), rows) + "\ntorch, ml_dtypes and numpy call int8 and int4 as we do.\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: slice = slice(0, 0)) -> str:
    aligned = ["---"] * len(heads)
    aligned[right] = ["---:"] * len(aligned[right])
    lines = (heads, aligned, *rows)
    return "".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|\n" for line in lines)


def _number(value: float) -> str:
    """Powers of two as such where they are not short, all else with eight digits."""
    mantissa, exponent = math.frexp(abs(value))
    if mantissa == 0.5 and not 0.25 <= abs(value) <= 2**20:
        return f"{'-' if value < 0 else ''}2^{exponent - 1}"
    return f"{value:.8g}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


if __name__ == "__main__":
    PAGE.write_text(formats_page())
