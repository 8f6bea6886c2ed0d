"""Where a share of a tensor keeps what it has counted, chunk after chunk: `kernels.py`'s tables, by their addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from probes import bit_planes, pairs
from probes.bit_planes import BELOW, OCTAVE, WINDOW, WORDS
from probes.layout import BIN_SHIFT, BINS, HASH_CELLS, MANTISSA_BITS
from probes.pairs import ALL_CODES

WAYS = 8  # tables of bins, since increments of one place wait for one another
ALL_BINS = BINS + 8  # Inf and NaN fall into the last eight

MAGNITUDE = np.uint32(0x7FFFFFFF)
INF_BITS = np.uint32(0x7F800000)
LEAST_NORMAL = np.uint32(1 << MANTISSA_BITS)
SHIFT = np.uint32(BIN_SHIFT)
NONE = np.uint32(0xFFFFFFFF)

FLOAT32, BFLOAT16, FLOAT16, FLOAT64 = range(4)  # kinds of elements
FLOAT16_BINS = 112 * OCTAVE  # from float16's bin of a number to float32's

CHUNK = bit_planes.CHUNK  # elements
IN_PAIRS = not bit_planes.AVAILABLE
OCTAVES = (pairs.CODES if IN_PAIRS else WINDOW) // OCTAVE  # of a window
CODED_OCTAVES = OCTAVES if IN_PAIRS else OCTAVES + BELOW // OCTAVE  # from a window's last one down
LOWEST_BASE = OCTAVE if IN_PAIRS else OCTAVE + BELOW  # so that no subnormal has a code
HIGHEST_BASE = BINS - OCTAVES * OCTAVE
PARTS = 1 if IN_PAIRS else WORDS  # of a count

# A share's scratch, by the byte where each part starts.
AT_PLANES = 0  # of a chunk's codes
AT_LISTED = AT_PLANES + CHUNK  # uint8 [CHUNK + 64]: codes outside the window of planes
AT_OCTAVES = AT_LISTED + CHUNK + 64  # uint32 [256]: how many of a sample have which exponent
AT_COUNTS = AT_OCTAVES + 4 * 256  # uint64 [ALL_BINS, PARTS]
AT_BINS = AT_COUNTS + 8 * ALL_BINS * PARTS  # uint32 [ALL_BINS * WAYS]
AT_CELLS = AT_BINS + 4 * ALL_BINS * WAYS  # uint8 [HASH_CELLS + 64]: one more cell for what is no sample
AT_CHUNK = AT_CELLS + HASH_CELLS + 64  # uint32 [CHUNK]
AT_INDICES = AT_CHUNK + 4 * CHUNK  # uint16 [CHUNK]
AT_TALLIES = AT_INDICES + 2 * CHUNK  # float64 [8]: as the last of a row of sums
AT_SEEN = AT_TALLIES + 64  # uint32 [16]
AT_TABLE = AT_SEEN + 64  # uint32 [ALL_CODES, ALL_CODES]: pairs
AT_MASKS = AT_TABLE + 4 * ALL_CODES * ALL_CODES  # uint32 [CHUNK / 32]: who in a chunk of pairs is outside the window
SCRATCH = AT_MASKS + 4 * CHUNK // pairs.GROUP

# What a share has seen, by its place in `seen`.
LARGEST, SMALLEST, BITS = range(3)  # bits of magnitudes; mantissa bits in use
FIRST_BIN, LAST_BIN = 3, 4  # of the table of bins, as far as it is used
FIRST_OCTAVE, LAST_OCTAVE = 5, 6  # of the counts, as far as they are used
BASE = 7  # the window's first bin
FIRST_CODE, LAST_CODE = 8, 9  # of the table of pairs, as far as it is used
SINGLY = 10  # why the next chunk is better counted by increments of one, after the last: else 0
SAME, WIDE = 1, 2  # all in one bin or zero; much outside any window


def _to_pointer(_typing, address):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), code


def _to_trailing_zeros(_typing, word):  # type: ignore[no-untyped-def]
    def code(_context, builder, _signature, arguments):  # type: ignore[no-untyped-def]
        return builder.cttz(arguments[0], cgutils.true_bit)

    return types.int64(types.uint64), code


pointer: Any = intrinsic(_to_pointer)
trailing_zeros: Any = intrinsic(_to_trailing_zeros)
