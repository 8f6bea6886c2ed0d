"""Server-sent events as they travel: lines in, events out (WHATWG HTML, section 9.2)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from advisor.errors import ServiceError


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job. id: its place in the stream; kind: "state", "step" or "log"."""

    id: int
    kind: str
    data: dict[str, Any]


def read_events(lines: Iterable[str]) -> Iterator[Event]:
    """The events of a stream of lines (without their line ends). An event cut off by the stream's end is
    dropped.

    Comments, which keep a quiet stream open, are skipped. Raises ServiceError on an event that is not ours.
    """
    fields: dict[str, str] = {}
    data: list[str] = []
    for line in lines:
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                data.append(value)
            else:
                fields[name] = value
            continue
        if data:
            yield _event(fields, "\n".join(data))
        fields, data = {}, []


def _event(fields: dict[str, str], data: str) -> Event:
    try:
        return Event(int(fields["id"]), fields.get("event", "message"), json.loads(data))
    except (KeyError, ValueError) as error:
        raise ServiceError(
            f"the stream holds {fields} with data {data[:100]!r}, not an event of ours: check the URL"
        ) from error
