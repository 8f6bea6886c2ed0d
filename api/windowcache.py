"""Decoded windows, the last few used, and what was computed from them.

A recorded window never changes, so nothing here goes stale; a deleted one is forgotten.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from advisor.diagnosis import Finding, diagnose
from db.session import Database
from db.store import windows
from probes.history import SlotHistory
from probes.window import Window

SCORES_A_WINDOW = 8  # score tables kept for each window, one a set of casts


class Entry:
    """A window, its score tables by casts, and its diagnosis. Of each one thread computes and others wait."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.lock = threading.Lock()
        self._rows: OrderedDict[tuple[str, ...] | None, list[dict[str, Any]]] = OrderedDict()
        self._diagnosing = threading.Lock()
        self._findings: tuple[Finding, ...] | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What `advisor.diagnose` says of the window."""
        with self._diagnosing:
            if self._findings is None:
                self._findings = diagnose(self.window)
            return self._findings

    def rows(self, casts: tuple[str, ...] | None, compute: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The score rows for these casts (None: the default ones)."""
        with self.lock:
            if casts not in self._rows:
                self._rows[casts] = compute()
                while len(self._rows) > SCORES_A_WINDOW:
                    self._rows.popitem(last=False)
            self._rows.move_to_end(casts)
            return self._rows[casts]


class WindowCache:
    """Window id to Entry; least recently used goes first."""

    def __init__(self, database: Database, size: int) -> None:
        self._database = database
        self._size = size
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def get(self, window_id: str) -> Entry:
        """The entry of a recorded window. Raises db's NotFound."""
        with self._lock:
            if window_id in self._entries:
                self._entries.move_to_end(window_id)
                return self._entries[window_id]
        # Two threads may decode the same window at once; the work is lost, the result is the same.
        entry = Entry(decode(self._database, window_id))
        with self._lock:
            entry = self._entries.setdefault(window_id, entry)
            self._entries.move_to_end(window_id)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return entry

    def forget(self, window_ids: list[str]) -> None:
        """Drop windows that were deleted."""
        with self._lock:
            for window_id in window_ids:
                self._entries.pop(window_id, None)


def decode(database: Database, window_id: str) -> Window:
    """The window as the database holds it. Raises db's NotFound if nothing is recorded."""
    with database.reading() as session:
        header = windows.header(session, window_id)
        sketches = windows.sketches(session, window_id)
    return Window.from_parts(json.loads(header), [SlotHistory.unpack(sketch.payload) for sketch in sketches])
