"""What a window says of each trainable parameter and moving buffer: plain data, held in the window file's header."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from probes.lost_updates import SAMPLE, UpdateSketch
from probes.numbers import from_json
from probes.records import list_of, shape_of, text

MASTER, WEIGHT_GRADIENT, UPDATE, BUFFER = "master", "weight_grad", "update", "buffer"


@dataclass(frozen=True)
class ParameterRecord:
    """One trainable parameter as the optimizer sees it, or a floating buffer that the training moves (`buffers.py`).

    name, shape, dtype   its dotted name; `optimizer.group0.param3` where only the optimizer has it
    roles                which of its tensors have sketches, under its name
    states               state tensor → its dtype; those that are not floating (uint8) or quantized have no sketch
    epsilon              the optimizer's, None where it has none or does not hold the parameter
    gradient_noise       energy of the minibatch's noise over the gradient's own, which has that noise in it; 0 to 1 but
                         for chance, None where nothing could be said
    noise_from           "moments" of the optimizer, or "differences" of successive gradients
    sparse               its gradient is sparse, so weight_grad is of the coalesced values alone
    elements             that this process holds
    packed_updates       step → the joint sketch of updates and weights as text; empty where no update was seen
    lookups              modules in which rows of it are looked up by index, as of an embedding
    """

    name: str
    dtype: str
    roles: tuple[str, ...]
    shape: tuple[int, ...] = ()
    elements: int = 0
    states: Mapping[str, str] = field(default_factory=dict)
    epsilon: float | None = None
    gradient_noise: float | None = None
    noise_from: str | None = None
    sparse: bool = False
    packed_updates: Mapping[int, str] = field(default_factory=dict)
    lookups: tuple[str, ...] = ()

    @property
    def is_buffer(self) -> bool:
        """Whether it is no parameter but a buffer."""
        return BUFFER in self.roles

    @property
    def signal_to_noise(self) -> float | None:
        """Energy of the mean gradient over that of the minibatch's noise in it; 0 at least, None where unknown."""
        if self.gradient_noise is None:
            return None
        return max(1 / self.gradient_noise - 1, 0.0) if self.gradient_noise > 0 else float("inf")

    @property
    def updates(self) -> dict[int, UpdateSketch]:
        """The joint sketch of updates and weights of each followed step."""
        return {step: UpdateSketch.unpack(packed) for step, packed in self.packed_updates.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParameterRecord:
        def number(value: Any) -> float | None:
            return None if value is None else float(from_json(value))

        record = cls(
            name=text(data["name"]),
            dtype=text(data["dtype"]),
            roles=tuple(map(text, list_of(data["roles"]))),
            shape=shape_of(data["shape"]),
            elements=int(data["elements"]),
            states={text(name): text(kind) for name, kind in data["states"].items()},
            epsilon=number(data["epsilon"]),
            gradient_noise=number(data["gradient_noise"]),
            noise_from=None if data["noise_from"] is None else text(data["noise_from"]),
            sparse=bool(data["sparse"]),
            packed_updates={int(step): text(packed) for step, packed in data["packed_updates"].items()},
            lookups=tuple(map(text, list_of(data.get("lookups", ())))),  # windows before have none
        )
        _ = record.updates  # raises MalformedWindow
        return record


def joined_records(ranks: Sequence[Sequence[ParameterRecord]], sharded: bool) -> tuple[ParameterRecord, ...]:
    """The records of all ranks as one. Where each holds a shard, elements and updates add, and noise is weighted."""
    found: dict[str, list[ParameterRecord]] = defaultdict(list)
    for records in ranks:
        for record in records:
            found[record.name].append(record)
    return tuple(_joined(parts) if sharded and not parts[0].is_buffer else parts[0] for parts in found.values())


def _joined(parts: Sequence[ParameterRecord]) -> ParameterRecord:
    updates: dict[int, list[UpdateSketch]] = defaultdict(list)
    for part in parts:
        for step, sketch in part.updates.items():
            updates[step].append(sketch)
    noises = [(part.gradient_noise, part.elements) for part in parts if part.gradient_noise is not None]
    weight = sum(elements for _, elements in noises)
    return replace(
        max(parts, key=lambda part: len(part.roles)),
        elements=sum(part.elements for part in parts),
        gradient_noise=sum(noise * elements for noise, elements in noises) / weight if weight else None,
        packed_updates={step: UpdateSketch.joined(shards).pack() for step, shards in updates.items()},
    )


def sampled_parameters(records: Iterable[ParameterRecord]) -> str | None:
    """A sentence on the parameters whose lost updates are told from a sample, None where there are none."""
    large = [record.name for record in records if record.packed_updates and record.elements > SAMPLE]
    if not large:
        return None
    return f"lost updates of {len(large)} parameters are told from {SAMPLE} evenly strided elements of each"
