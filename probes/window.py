"""The window: what a short stretch of watched training leaves to ask questions of.

Plain data: sites, sketches by slot and step, and the evidence of the scored steps. `probing.py` records one; a window
that was loaded from a file holds the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.errors import MalformedWindow, WindowError
from probes.history import SlotHistory
from probes.numbers import from_json, plain
from probes.records import Coverage, Evidence, Site, Slot, list_of, read_record, shape_of, text

SCHEMA = "numerics-advisor/window/1"


class Window:
    """What was recorded of a model's training. While it is being recorded, only `done` and `notes` can be asked.

    steps        optimizer steps recorded, counted from 0 at the window's start
    losses       the training loss of each recorded step: what backward started from, summed over a step's backward
                 calls; NaN where none was seen
    sites, slots the matrix products met, and their (site, role) rows
    coverage     share of the forward pass's matrix FLOPs that the sites hold, and what was met but not seen
    parameters   dotted name → shape, of the whole model
    notes        what could not be done as asked, in sentences
    """

    def __init__(self) -> None:
        self.done = False
        self.notes: tuple[str, ...] = ()
        self._closed = False

    def fill(
        self,
        *,
        model_name: str,
        optimizer_name: str,
        parameters: Mapping[str, tuple[int, ...]],
        steps: Sequence[int],
        losses: Sequence[float],
        sites: Sequence[Site],
        coverage: Coverage,
        histories: Mapping[Slot, SlotHistory],
        evidence: Mapping[Slot, Evidence],
        notes: Sequence[str],
    ) -> None:
        self.model_name, self.optimizer_name = model_name, optimizer_name
        self.parameters = dict(parameters)
        self._steps, self._losses = tuple(steps), list(losses)
        self._sites = {site.name: site for site in sites}
        self._coverage = coverage
        self._histories, self._evidence = dict(histories), dict(evidence)
        self.notes = tuple(notes)
        self._closed = True

    def _require_closed(self) -> None:
        if not self._closed:
            raise WindowError("the window is still open: leave its `with` block before asking what it recorded")

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer steps recorded, from 0."""
        self._require_closed()
        return self._steps

    @property
    def losses(self) -> list[float]:
        """Training loss of each recorded step; NaN where no backward call was seen."""
        self._require_closed()
        return self._losses

    @property
    def sites(self) -> tuple[Site, ...]:
        """The matrix products, in the order in which they were met."""
        self._require_closed()
        return tuple(self._sites.values())

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every (site, role) with a history."""
        self._require_closed()
        return tuple(self._histories)

    @property
    def coverage(self) -> Coverage:
        """What share of the matrix FLOPs was seen."""
        self._require_closed()
        return self._coverage

    @property
    def total_flops(self) -> float:
        """All matrix FLOPs a step, forward and backward."""
        return sum(site.flops for site in self.sites) + self.coverage.unseen_flops

    def site(self, name: str) -> Site:
        """The site of this name. Raises WindowError with near matches."""
        self._require_closed()
        if name not in self._sites:
            raise WindowError(f"the window has no site {name!r}{_nearest(name, self._sites)}")
        return self._sites[name]

    def history(self, site: str, role: str) -> SlotHistory:
        """The sketches of one slot, step by step. Raises WindowError with near matches."""
        slot = self._slot(site, role)
        return self._histories[slot]

    def evidence(self, site: str, role: str) -> Evidence:
        """What the scored steps measured of one slot."""
        return self._evidence.get(self._slot(site, role), Evidence())

    def _slot(self, site: str, role: str) -> Slot:
        self.site(site)
        slot = Slot(site, role)
        if slot not in self._histories:
            roles = ", ".join(found.role for found in self._histories if found.site == site)
            raise WindowError(f"site {site!r} has no role {role!r}; it has {roles}")
        return slot

    def header(self) -> dict[str, Any]:
        """All but the sketches, as JSON holds it: non-finite numbers are "NaN", "Infinity" and "-Infinity"."""
        self._require_closed()
        header: dict[str, Any] = plain(
            {
                "schema": SCHEMA,
                "model": self.model_name,
                "optimizer": self.optimizer_name,
                "parameters": self.parameters,
                "steps": self._steps,
                "losses": self._losses,
                "coverage": self._coverage,
                "notes": self.notes,
                "sites": list(self._sites.values()),
                "slots": [
                    {
                        "site": slot.site,
                        "role": slot.role,
                        "dtype": self._sites[slot.site].dtypes.get(slot.role),
                        "shape": self._sites[slot.site].shapes.get(slot.role),
                        "evidence": self._evidence.get(slot, Evidence()),
                    }
                    for slot in self._histories
                ],
            }
        )
        return header

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], histories: Sequence[SlotHistory]) -> Window:
        """A window from its header and its slots' histories, in the header's order. Raises MalformedWindow."""
        schema = header.get("schema") if isinstance(header, Mapping) else None
        if schema != SCHEMA:
            raise MalformedWindow(f"this is no window of a known version: schema {schema!r}, expected {SCHEMA!r}")
        window = cls()
        try:
            slots = [Slot(text(entry["site"]), text(entry["role"])) for entry in header["slots"]]
            sites = [read_record(Site, entry) for entry in header["sites"]]
            evidence = [read_record(Evidence, entry["evidence"]) for entry in header["slots"]]
            steps = [int(step) for step in header["steps"]]
            losses = [float(from_json(loss)) for loss in header["losses"]]
            parameters = {text(name): shape_of(shape) for name, shape in header["parameters"].items()}
            notes = [text(note) for note in list_of(header["notes"])]
            names = text(header["model"]), text(header["optimizer"])
            coverage = read_record(Coverage, header["coverage"])
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            if isinstance(error, MalformedWindow):
                raise
            raise MalformedWindow(f"the window's header cannot be read: {error!r}") from error
        if len(losses) != len(steps):
            raise MalformedWindow(f"the window has {len(steps)} steps but {len(losses)} losses")
        if len(histories) != len(slots) or len(set(slots)) != len(slots):
            raise MalformedWindow(f"the window names {len(slots)} slots and holds {len(histories)} histories")
        if any(set(history.steps.tolist()) - set(steps) for history in histories):
            raise MalformedWindow("a slot's history has steps that the window did not record")
        roles = {site.name: site.roles for site in sites}
        for slot in slots:
            if slot.role not in roles.get(slot.site, ()):
                raise MalformedWindow(
                    f"the window has sketches of {slot.role!r} at {slot.site!r}, which it does not list"
                )
        window.fill(
            model_name=names[0],
            optimizer_name=names[1],
            parameters=parameters,
            steps=steps,
            losses=losses,
            sites=sites,
            coverage=coverage,
            histories=dict(zip(slots, (history.checked() for history in histories), strict=True)),
            evidence=dict(zip(slots, evidence, strict=True)),
            notes=notes,
        )
        window.done = True
        return window

    def to_bytes(self) -> bytes:
        """The window file's bytes (`windowfile.py`)."""
        from probes.windowfile import window_to_bytes

        return window_to_bytes(self)

    def save(self, path: str | Path) -> None:
        """Write the window file; an existing one is replaced whole or not at all."""
        from probes.windowfile import write_window

        write_window(self, Path(path))

    def __repr__(self) -> str:
        if not self._closed:
            return "<Window, still open>"
        share = f"{self._coverage.share:.1%} of matrix FLOPs"
        return f"<Window of {self.model_name}: {len(self._steps)} steps, {len(self._sites)} sites, {share}>"


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; near: {', '.join(near)}" if near else ""
