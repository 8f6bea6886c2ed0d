"""What can go wrong in `probes`.

ProbeError
├── UnknownFormat         a format name that no table holds
├── NotInFormat           a value without a code in a format, or a number that is no code
├── InvalidCast           a cast string, or a combination of its parts, that means nothing
├── UnsupportedTensor     a tensor of a dtype that has no place in a sketch or a cast
├── MissingTriton         what runs on a CUDA device was asked for, and Triton is not installed
├── MissingPackage        an export asks for a package that is no dependency and is not installed
└── WindowError           a window that was opened, used or asked in a way it cannot serve
    └── MalformedWindow   a window file, or a packed history, that does not hold what it must
"""

from __future__ import annotations


class ProbeError(Exception):
    """Root of every error that `probes` raises on purpose."""


class UnknownFormat(ProbeError, ValueError):
    """No format has this name."""


class NotInFormat(ProbeError, ValueError):
    """A value that has no code in the format, or a number that is none of its codes."""


class InvalidCast(ProbeError, ValueError):
    """This text, or this combination of format, scaling and rounding, is no cast."""


class UnsupportedTensor(ProbeError, TypeError):
    """A tensor that cannot be cast or sketched: not of a floating dtype."""


class MissingTriton(ProbeError, ImportError):
    """Triton, in which the kernels for CUDA devices are written, cannot be imported."""


class MissingPackage(ProbeError, ImportError):
    """An export needs a package that is not installed."""


class WindowError(ProbeError, ValueError):
    """A probing window was opened or used in a way it cannot serve."""


class MalformedWindow(WindowError):
    """Bytes that are not a window file of a known schema version."""
