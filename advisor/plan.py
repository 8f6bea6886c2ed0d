"""A precision plan: a cast for every slot, why, and what it is predicted to cost and to save.

A plan is a value and a file. The file is JSON of the schema `numerics-advisor/plan/1`, published as
docs/plan-1.schema.json; it holds no time and no machine, so that the same window and the same limits give the
same bytes. NaN and infinities are the strings of `advisor.numbers`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from advisor.errors import InvalidPlan
from advisor.numbers import Number
from probes.casts import Cast
from probes.errors import ProbeError

SCHEMA = "numerics-advisor/plan/1"

# Functions that lift a plan of an older schema to the next one, by the older one's name. There is none yet.
UPGRADES: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {}


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


class PlannedSite(_Part):
    """A site that the plan is for; applying it to a model without this site is refused."""

    site: str
    op: str
    roles: tuple[str, ...]
    parameter: str | None
    """Dotted name of the parameter that is the weight, if one is."""
    parameter_shape: tuple[int, ...] | None
    flops: Number
    """Matrix FLOPs a step in the window, forward and backward; not compared when the plan is applied."""


class Assignment(_Part):
    """The cast of one slot and what its score was."""

    site: str
    role: str
    cast: str
    """Canonical, with every part; fp32/none/nearest leaves the tensor in the user's own dtype."""
    damage: Number | None
    """Predicted rise of the loss, in its own units; null for gradients, and where it is unknown."""
    damage_se: Number | None
    """Standard error of `damage`; null where it is unknown."""
    damage_interval: tuple[Number, Number] | None = None
    """Where the damage lies with 95% probability, calibration and drift included; null where it is unknown."""
    damage_from: str | None
    """What the damage was computed from: "directional" or "sketch"."""
    noise_ratio: Number | None
    """Energy of the rounding errors in the gradients over that of the minibatch's own noise."""
    lost_batch_share: Number | None
    """1 - 1/(1 + noise_ratio): as if the batch were smaller by this share."""
    bias: Number | None
    sqnr_db: Number | None
    underflow: Number | None
    """Share of the non-zero elements that become zero, 0 to 1."""
    subnormal: Number | None
    overflow: Number | None
    amax: Number | None
    flags: tuple[str, ...]
    reason: str

    @field_validator("cast")
    @classmethod
    def _canonical(cls, text: str) -> str:
        return _canonical(text)


class Predicted(_Part):
    """What the whole plan is predicted to cost and to save."""

    damage: Number | None
    """Sum of the assignments' damages, loss units; null where one of them is unknown."""
    damage_se: Number | None
    """Standard error of the sum, slots taken as independent; null where one is unknown."""
    damage_interval: tuple[Number, Number] | None = None
    """Where the sum lies with 95% probability, calibration and drift included; null where one is unknown."""
    noise_ratio: Number | None
    lost_batch_share: Number | None
    """Of the first layer's batch, where the noise of all slots comes together; later layers lose less."""
    share_8bit: Number
    """FLOPs of products of two operands of at most 8 bits, in a pair the hardware takes, over `flops`."""
    share_16bit: Number
    """The same for at most 16 bits; includes the products in 8."""
    flops: Number
    """All matrix FLOPs a step, forward and backward, with those that the probe did not see."""
    speedup: Number | None
    """Time of a step's matrix products as they are over that with the plan; null where no time is predicted."""
    time_s: Number | None = None
    """Time of a step's matrix products with the plan on the hardware, casts and scaling included; seconds."""
    time_before_s: Number | None = None
    memory_bytes: int
    """Weights, their narrow copies and the activations saved for the backward pass, with the plan; and of parameters
    that the window followed, their gradients and optimizer state."""
    memory_bytes_before: int
    optimal: bool | None
    """Whether no plan within the limits is better at the objective; null for a recipe that was given."""
    optimal_gap: Number | None = None
    """By how much another may be better at most, 0 where `optimal`: a share of `flops`, seconds, bytes or loss."""


class LossScaling(_Part):
    """What the loss is multiplied with before the backward pass; gradients are divided by it before the update."""

    kind: Literal["none", "static", "dynamic"]
    reason: str
    scale: Number | None = None
    """The factor, or the one that dynamic scaling starts from; a power of two. Null for "none"."""
    growth_interval: int | None = None
    """Dynamic: steps without a non-finite gradient until the scale doubles."""
    minimums: tuple[tuple[int, Number], ...] = ()
    """Dynamic: (step from which on, smallest scale), as in Mellempudi et al. (2019), sec. 3.2; steps rising."""


class Stored(_Part):
    """The cast in which a tensor that outlives a step is kept: after each update it is rounded to it."""

    name: str
    """Dotted name of the parameter or buffer."""
    role: str
    """`master`, `weight_grad`, an optimizer state's own name (`exp_avg`), `epsilon` (the optimizer's), or `buffer`."""
    cast: str
    """Canonical; fp32/none/nearest leaves the tensor in its own dtype."""
    reason: str

    @field_validator("cast")
    @classmethod
    def _canonical(cls, text: str) -> str:
        return _canonical(text)


class Watch(_Part):
    """A number to watch while a training runs with the plan, and from where on it calls the plan into question."""

    site: str
    role: str
    metric: str
    """`amax`; `crest`, which is amax over the RMS; `underflow` of the slot's cast."""
    threshold: Number
    """The plan was made for values below it; of `amax` in the tensor's own units, of rates a share from 0 to 1."""
    sentence: str


class FrontPoint(_Part):
    """The best that can be had within a tolerance, and the least damage that reaches it."""

    tolerance: Number
    damage: Number
    lost_batch_share: Number
    share_8bit: Number
    time_s: Number | None = None
    """Of a plan for time."""
    memory_bytes: int | None = None
    """Of a plan for memory."""


class Plan(_Part):
    """A precision plan; see the module. Equal plans have equal bytes."""

    schema_name: Literal["numerics-advisor/plan/1"] = Field(alias="schema")
    kind: Literal["planned", "uniform"]
    """Found by the planner, or the same recipe given for every site."""
    model: str
    """Class name of the model that was probed."""
    hardware: str
    tolerance: Number | None
    """Limit on the sum of damages, loss units; null for a recipe that was given and where there was none."""
    max_lost_batch: Number | None
    objective: Literal["share_8bit", "time", "memory", "damage"] = "share_8bit"
    """What the plan is best at, within its limits."""
    constraints: tuple[str, ...] = ()
    """What else was demanded of it: budgets, sites that stay, one cast a role; as sentences."""
    mean_loss: Number | None
    """Mean loss of the window."""
    predicted: Predicted
    loss_scaling: LossScaling
    master_weights: str
    """The format of most master weights, in words; `storage` has it tensor by tensor."""
    optimizer_state: str
    """The same of the optimizer's state."""
    storage: tuple[Stored, ...] = ()
    """Tensors that are kept in another format than their own; those that are not named stay as they are."""
    assignments: tuple[Assignment, ...]
    sites: tuple[PlannedSite, ...]
    front: tuple[FrontPoint, ...]
    """Points of the Pareto front of damage against what the plan is best at, at the same limit on lost batch."""
    summary: tuple[str, ...] = ()
    """What limits the plan, what holds it back, and what would change it, in sentences."""
    watch: tuple[Watch, ...] = ()
    """What to watch in a training with the plan; the most telling first."""
    notes: tuple[str, ...]
    approximations: tuple[str, ...]

    @model_validator(mode="after")
    def _one_cast_a_slot(self) -> Self:
        slots = [(site.site, role) for site in self.sites for role in site.roles]
        given = [(one.site, one.role) for one in self.assignments]
        had, has = set(given), set(slots)
        for what, wrong in (
            ("sites repeats", _repeated(slots)),
            ("assignments repeats", _repeated(given)),
            ("assignments lacks", [slot for slot in slots if slot not in had]),
            (
                "assignments has a slot that sites does not name:",
                [slot for slot in given if slot not in has],
            ),
        ):
            if wrong:
                raise ValueError(f"{what} {', '.join(f'{site} {role}' for site, role in wrong[:5])}")
        return self

    def cast(self, site: str, role: str) -> Cast:
        """The cast of a slot. Raises KeyError for a slot that the plan does not have."""
        for one in self.assignments:
            if (one.site, one.role) == (site, role):
                return Cast.parse(one.cast)
        raise KeyError((site, role))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON can hold it: lists, strings, numbers; non-finite numbers as strings."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def from_dict(cls, data: object, source: str = "the plan") -> Self:
        """What `to_dict` gave, of this schema or an older one. InvalidPlan names the field at fault."""
        if not isinstance(data, dict):
            raise InvalidPlan(f"{source} is not a plan: a JSON object was expected, not {type(data).__name__}")
        schema = data.get("schema")
        if schema is None:
            raise InvalidPlan(f"{source} is not a plan: it has no field 'schema' (this release reads {SCHEMA!r})")
        while schema in UPGRADES:
            data = UPGRADES[schema](data)
            schema = data["schema"]
        if schema != SCHEMA:
            raise InvalidPlan(
                f"{source} has the schema {schema!r}; this release reads {SCHEMA!r}. Make the plan anew from "
                "its window, or update the package"
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InvalidPlan(f"{source} cannot be used: {_faults(error)}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan; a reader sees the old file or the new one, never a part. Raises OSError."""
        target = Path(path)
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def __str__(self) -> str:
        from advisor.plan_text import text  # plan_text describes this class

        return text(self)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file that `Plan.save` wrote. InvalidPlan says what is wrong; OSError if unreadable."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidPlan(f"{path} is not a plan: it is not JSON ({error})") from error
    return Plan.from_dict(data, source=str(path))


def plan_schema() -> dict[str, Any]:
    """The JSON Schema of a plan, as docs/plan-1.schema.json publishes it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA.replace('/', ':')}",
        **Plan.model_json_schema(by_alias=True, mode="validation"),
    }


def _canonical(text: str) -> str:
    try:
        return str(Cast.parse(text))
    except ProbeError as error:
        raise ValueError(str(error)) from error


def _faults(error: ValidationError) -> str:
    """The first faults, each with the path of its field."""
    told = []
    for fault in error.errors(include_url=False)[:3]:
        where = ".".join(map(str, fault["loc"])) or "the plan as a whole"
        told.append(f"{where}: {fault['msg']}")
    more = error.error_count() - len(told)
    return "; ".join(told) + (f" (and {more} more)" if more > 0 else "")


def _repeated(slots: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [slot for slot, count in Counter(slots).items() if count > 1]
