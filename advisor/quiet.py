"""Keeping from stdout what a library's C code prints there whatever it is told."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

STDOUT = 1
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def without_prints_of(start: bytes) -> Iterator[None]:
    """Leaves out lines that begin so of what the process writes to its file descriptor of stdout meanwhile.

    All else that is written there meanwhile, by other threads too, is written at the end. Where stdout is closed there
    is nothing to do.
    """
    with _ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        try:
            kept = os.dup(STDOUT)
        except OSError:
            yield
            return
        stack.callback(os.close, kept)
        caught = stack.enter_context(tempfile.TemporaryFile())
        _flush()
        os.dup2(caught.fileno(), STDOUT)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, STDOUT)
            caught.seek(0)
            rest = b"".join(line for line in caught if not line.startswith(start))
            while rest:
                rest = rest[os.write(STDOUT, rest) :]


def _flush() -> None:
    """Python's buffer and C's: what is in them belongs to where stdout led when it was written."""
    if sys.stdout is not None:
        with contextlib.suppress(ValueError):  # closed
            sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)
