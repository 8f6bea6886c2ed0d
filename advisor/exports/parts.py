"""What each target's maker returns, and the scripts that are copied as they are."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any


@dataclass
class Parts:
    """Files, how to use them, and what cannot be done."""

    files: dict[str, str]
    use: str
    cannot: list[str] = field(default_factory=list)


def script(name: str) -> str:
    """A script of `advisor/exports/scripts`, word for word."""
    return (files("advisor.exports") / "scripts" / name).read_text(encoding="utf-8")


def as_json(data: Any) -> str:
    """The text of a JSON file."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_yaml(data: Any, indent: int = 0) -> str:
    """Dicts, lists of scalars and scalars as YAML; scalars and keys are written as JSON, which YAML reads."""
    lines = []
    for key, value in data.items():
        head = f"{' ' * indent}{key if str(key).isidentifier() else json.dumps(key)}:"
        if isinstance(value, dict) and value:
            lines.append(f"{head}\n{as_yaml(value, indent + 2)}".rstrip("\n"))
        else:
            lines.append(f"{head} {_FOR_YAML.sub(_escaped, json.dumps(value, ensure_ascii=False))}")
    return "\n".join(lines) + "\n"


_FOR_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")  # in JSON's strings as they are, in YAML's not


def _escaped(letter: re.Match[str]) -> str:
    return f"\\u{ord(letter[0]):04x}"
