"""How a sketch is laid out: the columns of a row of `sums` and of `extremes`, for all that reads or writes one."""

from __future__ import annotations

MANTISSA_BITS = 23
BIN_SHIFT = 20  # a float32's bits, shifted right by this, are its bin: exponent and three leading mantissa bits
BINS = 255 << (MANTISSA_BITS - BIN_SHIFT)  # 2040: every finite magnitude
ZEROS, NANS, POSITIVE_INFS, NEGATIVE_INFS, SUM_OF_SQUARES = range(BINS, BINS + 5)
SUMS = BINS + 8  # a round 2048: sixteen kilobytes a slot

AMAX, MINUS_AMIN, SIGNIFICANT_BITS, DISTINCT = range(4)
EXTREMES = 4

SAMPLE = 4096  # elements looked at for the count of distinct magnitudes
HASH_CELLS = 4096  # linear counting: cells hit by the hashes of the sample
