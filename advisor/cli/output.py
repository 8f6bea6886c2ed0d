"""Where the commands write: results to stdout, progress and errors to stderr, JSON with words for NaN."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes.numbers import plain

if TYPE_CHECKING:
    from rich.console import Console

STDOUT, STDERR = 1, 2  # descriptors
# Ours: wide enough for the tables where the output goes to a file or a pipe, which have no width.
WIDTH_OF_A_PIPE = 100


def keep_stdout_for_results() -> None:
    """From here on stdout has what this package writes, and no other: to be called once, before there are threads.

    What a library prints on the descriptor by itself goes to stderr, and so does the stdout of child processes. HiGHS
    1.12 prints a line in the middle of some plans whatever its options are (`advisor/branch_and_bound.py`), and what is
    piped would be no JSON.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper) or not _is_descriptor(sys.stdout, STDOUT):
        return  # a test's or an embedding program's own
    sys.stdout.flush()
    given = sys.stdout
    sys.stdout = open(  # noqa: SIM115 - it stays open for as long as the process runs
        os.dup(STDOUT), "w", encoding=given.encoding, errors=given.errors, buffering=1 if given.isatty() else -1
    )
    os.dup2(STDERR, STDOUT)


def _is_descriptor(stream: io.TextIOWrapper, number: int) -> bool:
    try:
        return stream.fileno() == number
    except OSError:  # it has none
        return False


def console(error: bool = False) -> Console:
    """A console on stdout, or on stderr. Text is printed as it is: no markup, no guessed highlighting."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else WIDTH_OF_A_PIPE
    return Console(stderr=error, width=width, markup=False, highlight=False)


def print_json(value: Any) -> None:
    """The value as JSON on stdout."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_json_line(value: Any) -> None:
    """The value as one line of JSON on stdout, at once: a reader at the other end of a pipe waits for it."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


def check_place(path: Path) -> None:
    """Raise OSError, naming the path as it was given, where no file can be written there.

    For a result that takes minutes: asked before the work, not after it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "this is a folder; name a file in it", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}; create it first", str(path))
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"nothing can be written in the folder {path.parent}", str(path))
