"""What a refusal says: the value, what there is instead, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import NoReturn

from probes.errors import InvalidCast


def refuse(part: str, value: object, available: Sequence[str]) -> NoReturn:
    """Raise InvalidCast for a part of a cast that there is not, with near matches and all that there are."""
    near = difflib.get_close_matches(str(value), available, n=2)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    raise InvalidCast(f"no {part} is called {value!r}{meant} (there is {', '.join(available) or 'none'})")
