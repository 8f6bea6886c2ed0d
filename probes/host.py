"""Numbers of a step brought to the host, all at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_host(rows: Sequence[Tensor]) -> list[Tensor]:
    """The tensors on the CPU, by one transfer a device; each is one of a single dimension."""
    found: list[Tensor | None] = [None] * len(rows)
    for device in dict.fromkeys(row.device for row in rows):
        places = [i for i, row in enumerate(rows) if row.device == device]
        host = torch.cat([rows[i] for i in places]).cpu().split([len(rows[i]) for i in places])
        for place, row in zip(places, host, strict=True):
            found[place] = row
    return [row for row in found if row is not None]
