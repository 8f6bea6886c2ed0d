"""Codes and values of a format, by the field's own definition: what a reader can hold beside the standard.

A code is, from the highest bit down, the sign (but in e8m0), the exponent field E and the mantissa field M:

    E = 0        M·2^(emin - mantissa_bits): zero and the subnormals (e8m0 has neither: its E = 0 is 2^-bias)
    otherwise    (1 + M/2^mantissa_bits)·2^(E - bias)

and an integer format's code is two's complement. Codes of Inf and NaN are those that `NonFinite` says:

    INF_AND_NAN            E all ones: Inf where M = 0, NaN otherwise
    INF                    E all ones, there being no M: Inf
    NAN                    E and M all ones: NaN
    NAN_FOR_NEGATIVE_ZERO  the sign alone: NaN
    NONE                   no code

Nothing is rounded here, and no cast goes through here: tests hold the casts to these codes, and these codes to
ml_dtypes and gfloat. numpy, no torch.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probes.errors import NotInFormat
from probes.formats import Format, NonFinite

Codes = NDArray[Any]  # unsigned integers
Values = NDArray[np.float64]


def decode(codes: ArrayLike, target: Format) -> Values:
    """float64, of the codes' shape: what each code means. A NaN has its code's sign.

    codes  integers from 0 to 2^bits - 1

    The code that a symmetric integer format leaves unused reads as two's complement has it: int8's 0x80 is -128.
    Raises NotInFormat for a number that is no code.
    """
    code = _checked(codes, target)
    sign, exponent, mantissa = _fields(code, target)
    if target.is_integer:
        return mantissa.astype(np.float64) - sign.astype(np.float64) * 2.0**target.mantissa_bits
    below_normal = np.ldexp(mantissa.astype(np.float64), target.emin - target.mantissa_bits)
    significand = 1.0 + np.ldexp(mantissa.astype(np.float64), -target.mantissa_bits)
    with np.errstate(over="ignore"):  # of fp64's top exponent, which is Inf's and NaN's
        normal = np.ldexp(significand, exponent.astype(np.int64) - target.bias)
    magnitude = np.where((exponent == 0) & target.signed, below_normal, normal)
    magnitude[is_inf(code, target)] = np.inf
    magnitude[is_nan(code, target)] = np.nan
    return np.copysign(magnitude, 1.0 - 2.0 * sign.astype(np.float64))


def encode(values: ArrayLike, target: Format) -> Codes:
    """Codes of values that the format has, in the narrowest unsigned dtype that holds them, of the values' shape.

    A NaN becomes the quiet one where the format has several (the highest mantissa bit alone), with its sign where the
    format has both. -0 becomes 0 where that is the only zero: in integer and fnuz formats.

    Raises NotInFormat for what is no value of the format: round first.
    """
    value = np.asarray(values, dtype=np.float64)
    code = _code_of_integer(value, target) if target.is_integer else _code_of_float(value, target)
    back = decode(code, target)
    has_code = np.where(np.isnan(value), np.isnan(back), back == value)
    if not has_code.all():
        _refuse("value", value[~has_code][0], target)
    return code.astype(_dtype(target))


def is_inf(codes: ArrayLike, target: Format) -> NDArray[np.bool_]:
    """Whether each code is +Inf or -Inf."""
    _, exponent, mantissa = _fields(_checked(codes, target), target)
    has_inf = target.nonfinite in (NonFinite.INF_AND_NAN, NonFinite.INF)
    return has_inf & (exponent == _ones(target.exponent_bits)) & (mantissa == 0)


def is_nan(codes: ArrayLike, target: Format) -> NDArray[np.bool_]:
    """Whether each code is a NaN."""
    code = _checked(codes, target)
    _, exponent, mantissa = _fields(code, target)
    top = exponent == _ones(target.exponent_bits)
    match target.nonfinite:
        case NonFinite.INF_AND_NAN:
            return top & (mantissa != 0)
        case NonFinite.NAN:
            return top & (mantissa == _ones(target.mantissa_bits))
        case NonFinite.NAN_FOR_NEGATIVE_ZERO:
            return code == np.uint64(1 << (target.bits - 1))
        case _:
            return np.zeros(code.shape, dtype=np.bool_)


def _code_of_float(value: Values, target: Format) -> Codes:
    """The code of each value; some code of another value where there is none."""
    magnitude = np.where(np.abs(value) <= target.largest, np.abs(value), 0.0)
    power = np.maximum(np.frexp(magnitude)[1] - 1, target.emin)
    significand = np.ldexp(magnitude, target.mantissa_bits - power).astype(np.uint64)
    normal = significand >> np.uint64(target.mantissa_bits)  # the hidden bit
    exponent = np.where(normal, power + target.bias, 0).astype(np.uint64)
    mantissa = significand & _ones(target.mantissa_bits)
    code = exponent << np.uint64(target.mantissa_bits) | mantissa
    code = np.where(np.isinf(value), _code_of_inf(target), code)
    code = np.where(np.isnan(value), _code_of_nan(target), code)
    has_sign = target.signed & (target.keeps_negative_zero | (np.abs(value) > 0))
    return code | (has_sign & np.signbit(value)).astype(np.uint64) << np.uint64(target.bits - 1)


def _code_of_integer(value: Values, target: Format) -> Codes:
    whole = np.where((value >= target.lowest) & (value <= target.largest), value, 0.0).astype(np.int64)
    return whole.astype(np.uint64) & _ones(target.bits)  # two's complement


def _fields(code: Codes, target: Format) -> tuple[Codes, Codes, Codes]:
    """Sign, exponent field and mantissa field."""
    mantissa = code & _ones(target.mantissa_bits)
    exponent = code >> np.uint64(target.mantissa_bits) & _ones(target.exponent_bits)
    sign = code >> np.uint64(target.mantissa_bits + target.exponent_bits)  # nothing is left where there is no sign
    return sign, exponent, mantissa


def _checked(codes: ArrayLike, target: Format) -> Codes:
    given = np.asarray(codes)
    if given.dtype.kind not in "iu":
        raise NotInFormat(f"codes are integers, not {given.dtype}")
    wrong = (given < 0) | (given > int(_ones(target.bits)))
    if wrong.any():
        _refuse("code", given[wrong][0], target)
    return given.astype(np.uint64)


def _code_of_inf(target: Format) -> np.uint64:
    """Of +Inf, and of something else where there is none."""
    return _ones(target.exponent_bits) << np.uint64(target.mantissa_bits)


def _code_of_nan(target: Format) -> np.uint64:
    """Of a NaN, and of something else where there is none."""
    match target.nonfinite:
        case NonFinite.INF_AND_NAN:
            return _code_of_inf(target) | np.uint64(1 << (target.mantissa_bits - 1))
        case NonFinite.NAN_FOR_NEGATIVE_ZERO:
            return np.uint64(1 << (target.bits - 1))
        case _:
            return _ones(target.bits - target.signed)


def _ones(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _dtype(target: Format) -> type[np.unsignedinteger[Any]]:
    fits = (dtype for dtype in (np.uint8, np.uint16, np.uint32, np.uint64) if np.iinfo(dtype).bits >= target.bits)
    return next(fits)


def _refuse(what: str, given: object, target: Format) -> NoReturn:
    raise NotInFormat(f"{given} is no {what} of {target!r}")
