"""An export as a value, and the targets there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from advisor.errors import InvalidPlan
from advisor.exports.accelerate_files import accelerate_export
from advisor.exports.deepspeed_files import deepspeed_export
from advisor.exports.lightning_files import lightning_export
from advisor.exports.megatron_files import megatron_export
from advisor.exports.parts import Parts
from advisor.exports.torchao_files import torchao_export
from advisor.exports.transformer_engine_files import transformer_engine_export
from advisor.loss_scaling import require_usable
from advisor.plan import Plan

TARGETS: Mapping[str, Callable[[Plan], Parts]] = MappingProxyType(
    {
        "torchao": torchao_export,
        "transformer-engine": transformer_engine_export,
        "deepspeed": deepspeed_export,
        "megatron": megatron_export,
        "accelerate": accelerate_export,
        "lightning": lightning_export,
    }
)


@dataclass(frozen=True)
class Export:
    """A plan for a library.

    files   name → text; a script imports only the library it is for, torch, and the other files beside it
    use     how to use them, in a few lines
    cannot  what the library does not do of the plan: one sentence each
    """

    target: str
    files: dict[str, str]
    use: str
    cannot: tuple[str, ...]

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write the files into a folder, which is made if it is not there; returns their paths. Raises OSError."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        paths = []
        for name, text in self.files.items():
            path = place / name
            path.write_text(text, encoding="utf-8")
            paths.append(path)
        return paths


def export(plan: Plan, target: str) -> Export:
    """The plan for one of TARGETS. Raises InvalidPlan for another name, and for a loss scale that none can be."""
    if target not in TARGETS:
        raise InvalidPlan(f"there is no export to {target!r}; there are {', '.join(TARGETS)}")
    require_usable(plan.loss_scaling)
    parts = TARGETS[target](plan)
    return Export(target, parts.files, parts.use, tuple(dict.fromkeys(parts.cannot)))
