"""What has been measured, one JSON object a line, so that a run that was killed goes on where it stopped.

The first line says of what: another model, other weights or another version of the measurement are no continuation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn


class OtherLedger(Exception):
    """The file holds measurements of something else."""


class Ledger:
    """`records`, in the order in which they were added; `add` appends one, to the file at once.

    of   what is measured: the file's first line. Raises OtherLedger where a file that is there says otherwise.
    """

    def __init__(self, path: Path, of: Mapping[str, Any]) -> None:
        self.path, self.records = path, []
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        if lines and lines[0] != dict(of):
            raise OtherLedger(f"{path} holds measurements of {lines[0]}, not of {dict(of)}: remove it to start anew")
        self.records: list[dict[str, Any]] = lines[1:]
        if not lines:
            path.write_text(json.dumps(of) + "\n")

    def add(self, record: dict[str, Any]) -> None:
        """Keep one more."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The records whose `kind` is this."""
        return [record for record in self.records if record["kind"] == kind]

    def seconds(self, kind: str) -> float:
        """How long these took, over all runs."""
        return float(sum(record["seconds"] for record in self.of(kind)))


def fingerprint(model: nn.Module) -> str:
    """Of a model's parameters, bit by bit: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """What is there; a last line without an end was being written when the run was killed, and is cut off."""
    if not path.is_file():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]
