"""A recorded window as the database keeps it: a header, a summary for lists, and one payload a slot."""

import json
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from db.store import windows
from db.store.windows import PackedSketch
from probes.window import Window


@dataclass(frozen=True)
class Recording:
    header: bytes
    summary: dict[str, Any]
    sketches: tuple[PackedSketch, ...]

    def store(self, session: Session, window_id: str, checkpoint: str | None) -> None:
        """Fill the window's row and its sketches."""
        windows.record(
            session,
            window_id,
            summary=self.summary,
            header=self.header,
            sketches=self.sketches,
            checkpoint=checkpoint,
        )


def pack(window: Window) -> Recording:
    """Everything of the window, in bytes and plain values."""
    header = window.header()
    return Recording(
        header=json.dumps(header, allow_nan=False).encode(),
        summary={
            "steps": [int(step) for step in window.steps],
            "losses": [float(loss) for loss in window.losses],
            "coverage": header["coverage"],
            "sites": len(window.sites),
            "notes": list(window.notes),
        },
        sketches=tuple(
            PackedSketch(slot.site, slot.role, window.history(slot.site, slot.role).pack()) for slot in window.slots
        ),
    )
