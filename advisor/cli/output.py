"""Where the commands write: results to stdout, progress and errors to stderr, JSON with words for NaN."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from probes.numbers import as_json

if TYPE_CHECKING:
    from rich.console import Console

# Ours: wide enough for the tables where the output goes to a file or a pipe, which have no width.
WIDTH_OF_A_PIPE = 100


def console(error: bool = False) -> Console:
    """A console on stdout, or on stderr. Text is printed as it is: no markup, no guessed highlighting."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() else WIDTH_OF_A_PIPE
    return Console(stderr=error, width=width, markup=False, highlight=False)


def print_json(value: Any) -> None:
    """The value as JSON on stdout."""
    sys.stdout.write(json.dumps(_words(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _words(value: Any) -> Any:
    """The same value with NaN and infinities as the strings that the service uses."""
    if isinstance(value, dict):
        return {name: _words(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_words(item) for item in value]
    if isinstance(value, float):
        return as_json(value)
    return value
