"""The window: what a short stretch of watched training leaves to ask questions of.

Plain data: sites, sketches by slot and step, and the evidence of the scored steps. `probing.py` records one; a window
that was loaded from a file holds the same.
"""

from __future__ import annotations

import difflib
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.errors import MalformedWindow, WindowError
from probes.history import SlotHistory
from probes.numbers import from_json, plain
from probes.parameter_records import ParameterRecord
from probes.product_errors import ProductError
from probes.records import Coverage, Evidence, Site, Slot, list_of, read_record, shape_of, text

SCHEMA = "numerics-advisor/window/2"
FIRST_SCHEMA = "numerics-advisor/window/1"


@dataclass(frozen=True)
class Contents:
    """What a closed window holds; the properties of Window say what each is.

    Everything but the histories is the window file's header, field by field.
    """

    model_name: str
    optimizer_name: str
    parameters: Mapping[str, tuple[int, ...]]
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    sites: tuple[Site, ...]
    coverage: Coverage
    histories: Mapping[Slot, SlotHistory]
    evidence: Mapping[Slot, Evidence]
    notes: tuple[str, ...] = ()
    loss_scales: tuple[float, ...] = ()
    parameter_records: tuple[ParameterRecord, ...] = ()
    backward_errors: tuple[ProductError, ...] = ()
    sampled: tuple[str, ...] = ()
    world_size: int = 1
    curvature_from: str | None = None


class Window:
    """What was recorded of a model's training. While it is being recorded, only `done` and `notes` can be asked.

    Its parts are read through the properties below; `load_window` gives the same from a file.
    """

    def __init__(self, contents: Contents | None = None) -> None:
        self.done = contents is not None
        self.notes: tuple[str, ...] = ()
        self._contents: Contents | None = None
        if contents is not None:
            self.fill(contents)

    def fill(self, contents: Contents) -> None:
        """Close the window: this is what it holds from now on."""
        self._contents = contents
        self.notes = contents.notes
        self._sites = {site.name: site for site in contents.sites}
        self._products = {(site.name, role) for site in contents.sites for role in site.roles}
        self._records = {record.name: record for record in contents.parameter_records}

    @property
    def _held(self) -> Contents:
        if self._contents is None:
            raise WindowError("the window is still open: leave its `with` block before asking what it recorded")
        return self._contents

    @property
    def model_name(self) -> str:
        """Name of the model's class."""
        return self._held.model_name

    @property
    def optimizer_name(self) -> str:
        """Name of the optimizer's class."""
        return self._held.optimizer_name

    @property
    def parameters(self) -> Mapping[str, tuple[int, ...]]:
        """Dotted name → shape, of the whole model."""
        return self._held.parameters

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer steps recorded, from 0."""
        return self._held.steps

    @property
    def losses(self) -> list[float]:
        """Training loss of each recorded step, without its loss scale; NaN where no backward call was seen.

        What backward started from, summed over a step's backward calls.
        """
        return list(self._held.losses)

    @property
    def loss_noise(self) -> float:
        """How far the loss jumps from one recorded step to the next: the standard deviation of its noise, loss units.

        Taken from the median of successive differences, which neither a trend nor a few outliers move much: 1.4826
        times their median absolute value over √2. Steps without a loss, and non-finite ones, are left out together with
        their differences; NaN where fewer than two neighbours are left.
        """
        losses = self.losses
        apart = [abs(after - before) for before, after in itertools.pairwise(losses)]
        finite = [difference for difference in apart if math.isfinite(difference)]
        return 1.4826 * statistics.median(finite) / math.sqrt(2) if finite else math.nan

    @property
    def loss_scales(self) -> tuple[float, ...]:
        """Factor that each recorded step's loss, and so its gradients, had when recorded; 1 without loss scaling."""
        return self._held.loss_scales or (1.0,) * len(self.steps)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The matrix products, in the order in which they were met."""
        return self._held.sites

    @property
    def parameter_records(self) -> tuple[ParameterRecord, ...]:
        """What the optimizer's steps showed of each parameter: lost updates, gradient noise, epsilon."""
        return tuple(record for record in self._held.parameter_records if not record.is_buffer)

    @property
    def buffer_records(self) -> tuple[ParameterRecord, ...]:
        """The floating buffers that the training moved, as BatchNorm's running statistics; role `buffer`."""
        return tuple(record for record in self._held.parameter_records if record.is_buffer)

    def parameter_record(self, name: str) -> ParameterRecord | None:
        """That of one parameter or buffer by its dotted name, None where it was not followed."""
        return self._records.get(name) if self._held else None

    @property
    def backward_errors(self) -> tuple[ProductError, ...]:
        """Backward error of sampled products at the scored steps, by site, product and cast."""
        return self._held.backward_errors

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Every (site, role) with a history: operands and gradients of products, then those of parameters."""
        return tuple(self._held.histories)

    @property
    def product_slots(self) -> tuple[Slot, ...]:
        """The slots of matrix products: what a plan gives casts to."""
        return tuple(slot for slot in self.slots if self.is_product(slot))

    def is_product(self, slot: Slot) -> bool:
        """Whether a slot is a tensor of a matrix product, and not one of a parameter alone."""
        return slot in self._products if self._held else False

    @property
    def coverage(self) -> Coverage:
        """What share of the matrix FLOPs was seen."""
        return self._held.coverage

    @property
    def sampled(self) -> tuple[str, ...]:
        """What was recorded in part only, in sentences; empty where every element of every step was read."""
        return self._held.sampled

    @property
    def world_size(self) -> int:
        """Processes whose sketches were added up; 1 without torch.distributed."""
        return self._held.world_size

    @property
    def curvature_from(self) -> str | None:
        """Where predicted damage comes from: "loss" (its curvature), "gradient" (training gradient), None: nowhere."""
        return self._held.curvature_from

    @property
    def total_flops(self) -> float:
        """All matrix FLOPs a step, forward and backward."""
        return sum(site.flops for site in self.sites) + self.coverage.unseen_flops

    def site(self, name: str) -> Site:
        """The site of this name. Raises WindowError with near matches."""
        if name not in (self._sites if self._held else {}):
            raise WindowError(f"the window has no site {name!r}{_nearest(name, self._sites)}")
        return self._sites[name]

    def history(self, site: str, role: str) -> SlotHistory:
        """The sketches of one slot, step by step. Raises WindowError with near matches."""
        found = self._held.histories.get(Slot(site, role))
        return self._held.histories[self._slot(site, role)] if found is None else found

    def histories(self, slots: Iterable[Slot]) -> list[SlotHistory]:
        """The same of many slots."""
        held = self._held.histories
        return [held[slot] if slot in held else self.history(*slot) for slot in slots]

    def evidence(self, site: str, role: str) -> Evidence:
        """What the scored steps measured of one slot."""
        found = self._held.evidence.get(Slot(site, role))
        if found is None:
            self._slot(site, role)
            return Evidence()
        return found

    def all_evidence(self, slots: Iterable[Slot]) -> list[Evidence]:
        """The same of many slots."""
        held = self._held.evidence
        return [held[slot] if slot in held else self.evidence(*slot) for slot in slots]

    def dtype(self, slot: Slot) -> str | None:
        """The recorded tensor's own dtype ("float32"), where known."""
        site = self._sites.get(slot.site)
        if site is not None and slot.role in site.dtypes:
            return site.dtypes[slot.role]
        return self._records[slot.site].dtype if slot.site in self._records else None

    def _slot(self, site: str, role: str) -> Slot:
        slot, histories = Slot(site, role), self._held.histories
        if slot not in histories:
            roles = ", ".join(found.role for found in histories if found.site == site)
            if not roles:
                raise WindowError(f"the window has no site {site!r}{_nearest(site, {s.site: s for s in histories})}")
            raise WindowError(f"site {site!r} has no role {role!r}; it has {roles}")
        return slot

    def header(self) -> dict[str, Any]:
        """All but the sketches, as JSON holds it: non-finite numbers are "NaN", "Infinity" and "-Infinity"."""
        held = self._held
        header: dict[str, Any] = plain(
            {
                "schema": SCHEMA,
                "model": held.model_name,
                "optimizer": held.optimizer_name,
                "parameters": held.parameters,
                "steps": held.steps,
                "losses": held.losses,
                "loss_scales": self.loss_scales,
                "world_size": held.world_size,
                "coverage": held.coverage,
                "curvature_from": held.curvature_from,
                "sampled": held.sampled,
                "notes": held.notes,
                "sites": held.sites,
                "parameter_records": held.parameter_records,
                "backward_errors": held.backward_errors,
                "slots": [
                    {
                        "site": slot.site,
                        "role": slot.role,
                        "dtype": self.dtype(slot),
                        "shape": self._sites[slot.site].shapes.get(slot.role) if slot.site in self._sites else None,
                        "evidence": held.evidence.get(slot, Evidence()),
                    }
                    for slot in held.histories
                ],
            }
        )
        return header

    @classmethod
    def from_parts(cls, header: Mapping[str, Any], histories: Sequence[SlotHistory]) -> Window:
        """A window from its header and its slots' histories, in the header's order. Raises MalformedWindow."""
        try:
            header = _of_this_version(header)
            slots = [Slot(text(entry["site"]), text(entry["role"])) for entry in header["slots"]]
            evidence = [read_record(Evidence, entry["evidence"]) for entry in header["slots"]]
            contents = Contents(
                model_name=text(header["model"]),
                optimizer_name=text(header["optimizer"]),
                parameters={text(name): shape_of(shape) for name, shape in header["parameters"].items()},
                steps=tuple(int(step) for step in header["steps"]),
                losses=tuple(float(from_json(loss)) for loss in header["losses"]),
                sites=tuple(read_record(Site, entry) for entry in header["sites"]),
                coverage=read_record(Coverage, header["coverage"]),
                histories=dict(zip(slots, (history.checked() for history in histories), strict=False)),
                evidence=dict(zip(slots, evidence, strict=True)),
                notes=tuple(text(note) for note in list_of(header["notes"])),
                loss_scales=tuple(float(from_json(scale)) for scale in header["loss_scales"]),
                parameter_records=tuple(read_record(ParameterRecord, entry) for entry in header["parameter_records"]),
                backward_errors=tuple(read_record(ProductError, entry) for entry in header["backward_errors"]),
                sampled=tuple(text(note) for note in list_of(header["sampled"])),
                world_size=int(header["world_size"]),
                curvature_from=None if header["curvature_from"] is None else text(header["curvature_from"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            if isinstance(error, MalformedWindow):
                raise
            raise MalformedWindow(f"the window's header cannot be read: {error!r}") from error
        _require_agreement(contents, slots, histories)
        return cls(contents)

    def to_bytes(self) -> bytes:
        """The window file's bytes (`windowfile.py`)."""
        from probes.windowfile import window_to_bytes

        return window_to_bytes(self)

    def save(self, path: str | Path) -> None:
        """Write the window file; an existing one is replaced whole or not at all."""
        from probes.windowfile import write_window

        write_window(self, Path(path))

    def to_pandas(self) -> Any:
        """A pandas.DataFrame, one line a slot and step (`step_table.py` says which columns). Raises MissingPackage."""
        from probes.step_table import data_frame, step_table

        return data_frame(step_table(self))

    def to_parquet(self, path: str | Path) -> None:
        """Write the same table as a Parquet file, with the window's header in its metadata. Raises MissingPackage."""
        from probes.step_table import write_parquet

        write_parquet(self, Path(path))

    def to_tensorboard(self, folder: str | Path) -> None:
        """Write a TensorBoard event file into a folder: scalars and histograms of every slot. Raises MissingPackage."""
        from probes.event_files import write_events

        write_events(self, Path(folder))

    def __repr__(self) -> str:
        if self._contents is None:
            return "<Window, still open>"
        share = f"{self.coverage.share:.1%} of matrix FLOPs"
        return f"<Window of {self.model_name}: {len(self.steps)} steps, {len(self.sites)} sites, {share}>"


def _of_this_version(header: Any) -> Mapping[str, Any]:
    """The header as this version has it; what an earlier version did not record is empty."""
    schema = header.get("schema") if isinstance(header, Mapping) else None
    if schema == FIRST_SCHEMA:
        missing: dict[str, Any] = {"parameter_records": [], "backward_errors": [], "sampled": [], "world_size": 1}
        missing["loss_scales"] = [1.0] * len(header.get("steps", ()))
        measured = any(entry["evidence"]["curvature"] is not None for entry in header["slots"])
        missing["curvature_from"] = "loss" if measured else None
        missing["coverage"] = _of_both_passes(header["coverage"])
        return {**header, **missing}
    if schema != SCHEMA:
        raise MalformedWindow(f"this is no window of a known version: schema {schema!r}, expected {SCHEMA!r}")
    return dict(header)


def _of_both_passes(coverage: Any) -> Any:
    """The first version counted the forward pass alone; the gradients of what it did not see are twice as much."""
    unseen = [{**entry, "flops": 3 * entry["flops"]} for entry in coverage["unseen"]]
    return {**coverage, "unseen": unseen}


def _require_agreement(contents: Contents, slots: Sequence[Slot], histories: Sequence[SlotHistory]) -> None:
    """Raises MalformedWindow where parts of a window that was read contradict each other."""
    steps = set(contents.steps)
    for name in ("losses", "loss_scales"):
        if len(getattr(contents, name)) != len(contents.steps):
            raise MalformedWindow(
                f"the window has {len(contents.steps)} steps but {len(getattr(contents, name))} {name}"
            )
    if len(histories) != len(slots) or len(set(slots)) != len(slots):
        raise MalformedWindow(f"the window names {len(slots)} slots and holds {len(histories)} histories")
    if any(set(history.steps.tolist()) - steps for history in histories):
        raise MalformedWindow("a slot's history has steps that the window did not record")
    roles = {site.name: set(site.roles) for site in contents.sites}
    for record in contents.parameter_records:
        roles.setdefault(record.name, set()).update(record.roles)
    for slot in slots:
        if slot.role not in roles.get(slot.site, ()):
            raise MalformedWindow(f"the window has sketches of {slot.role!r} at {slot.site!r}, which it does not list")


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; near: {', '.join(near)}" if near else ""
