"""What the REST calls take and give: one pydantic model a body, with an example where a client sends it.

Numbers that may be NaN or infinite have the type Number: the strings "NaN", "Infinity", "-Infinity" in JSON.
A page is {"items": [...], "next": cursor or null}; the cursor goes back as `?cursor=` and means nothing else.
Times are RFC 3339 in UTC. An unknown field in a request is an error, never ignored.
"""

import re
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from advisor.numbers import Number
from db.ids import Prefix

JobState = Literal["queued", "running", "succeeded", "failed", "canceled"]
JobKind = Literal["window", "run"]
WindowState = Literal["pending", "recorded", "failed"]
Phase = Literal["warmup", "window", "baseline", "plan", "evaluate"]

# A name stands in paths, so it is one plain path segment; ids start with a prefix that names may not have.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
NAME_RULE = "1 to 100 of A-Z a-z 0-9 . _ -, the first a letter or a digit"
ID_STARTS = tuple(f"{prefix}_" for prefix in get_args(Prefix))


def checked_name(name: str) -> str:
    """The name, if a model can have it. Raises ValueError."""
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise ValueError(f"a model's name is {NAME_RULE}")
    if name.startswith(ID_STARTS):
        raise ValueError(f"a model's name does not begin with {', '.join(ID_STARTS)}: that is how ids begin")
    return name


Name = Annotated[
    str,
    AfterValidator(checked_name),  # whose sentence reads better than the pattern
    Field(description=NAME_RULE, json_schema_extra={"pattern": NAME_PATTERN}),
]


class Request(BaseModel):
    """A body that a client sends. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class View(BaseModel):
    """A body that the service sends."""

    model_config = ConfigDict(frozen=True)


Item = TypeVar("Item")


class Page(View, Generic[Item]):
    """Some items, and the cursor of the next page (null on the last one)."""

    items: list[Item]
    next: str | None = None


class Problem(BaseModel):
    """An error, after RFC 9457. `errors` says what is wrong with a body, part by part."""

    model_config = ConfigDict(extra="allow")

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    instance: str | None = None
    errors: list[dict[str, Any]] | None = None


# Models


class ArchitectureSubmission(Request):
    """A model of a built-in family, its data and how it is trained."""

    name: Name
    kind: Literal["architecture"]
    family: str
    config: dict[str, Any] = {}
    data: dict[str, Any] = {}
    training: dict[str, Any] = {}


class ExternalSubmission(Request):
    """A name for a model that stays where it is: only its windows are pushed here."""

    name: Name
    kind: Literal["external"]


ModelSubmission = Annotated[ArchitectureSubmission | ExternalSubmission, Field(discriminator="kind")]


class ModelView(View):
    id: str
    name: str
    kind: Literal["architecture", "external"]
    family: str | None = None
    config: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    parameters: int | None = Field(None, description="number of parameters; null for an external model")
    created_at: datetime


# Windows


class WindowRequest(Request):
    """Train `warmup` ordinary steps, then record `steps` optimizer steps (each `every`-th of them)."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"steps": 20, "warmup": 50, "every": 1, "curvature_steps": 2, "seed": 0}}
    )

    steps: int = Field(20, ge=1, le=10_000)
    warmup: int = Field(50, ge=0, le=1_000_000)
    every: int = Field(1, ge=1, le=10_000)
    curvature_steps: int = Field(2, ge=0, le=1_000)
    casts: list[str] | None = Field(
        None, min_length=1, description="candidates for the directional products; null: the usual"
    )
    finer: list[str] | None = Field(
        None,
        description='scales by row and block to sketch for at every recorded step, as "block16/nvfp4"; '
        "null: by row and block of 32, at the scored steps",
    )
    overhead: float | None = Field(None, gt=0, le=1, description="share of the time that watching may take at most")
    seed: int | None = Field(None, ge=0, lt=2**63, description="null: the seed of the model's training")


class WindowView(View):
    """A window. What was recorded is null until the state is `recorded`."""

    id: str
    model_id: str
    state: WindowState
    origin: Literal["job", "pushed"]
    job_id: str | None = None
    created_at: datetime
    request: dict[str, Any] | None = Field(None, description="what was asked; null for a pushed window")
    steps: list[int] = []
    losses: list[Number] = []
    coverage: dict[str, Any] | None = None
    sites: int = 0
    slots: int = 0
    bytes_stored: int = Field(default=0, description="bytes of all stored sketches of the window")
    bytes_per_sketch: Number | None = Field(default=None, description="mean bytes of one slot's sketch of one step")
    has_checkpoint: bool = Field(False, description="a run can start from this window's first step")
    notes: list[str] = []


class RemedyView(View):
    """What choice of a plan mends a finding."""

    kind: Literal["cast", "loss_scale", "storage"]
    says: str
    casts: list[str] = Field([], description="canonical casts that keep the tensor, the narrowest first")
    loss_scale: Number | None = Field(None, description="the power of two to multiply the loss with")


class FindingView(View):
    """Why a cast would fail on this training, at one place."""

    cause: str = Field(description="channel_outliers, heavy_tails, small_gradients, growing_amax, epsilon_vanishes, …")
    site: str
    role: str
    cast: str = Field(description="under which it bites")
    severe: bool = Field(description="whether it bites under a usual recipe, by more than is harmless")
    numbers: dict[str, Number] = Field(description="what the sentence is made of")
    sentence: str
    remedy: RemedyView


class FindingPage(Page[FindingView]):
    """Findings of one window: severe ones first, each cause's largest first. `total`: of all pages."""

    window: str
    total: int


class WindowCreated(View):
    window: WindowView
    job: "JobView"


# Layers, history, scores


class LayerView(View):
    """One site: a matrix product, its tensors, its share of all matrix FLOPs (forward and backward)."""

    site: str
    op: str
    roles: list[str]
    shapes: dict[str, list[int]]
    dtypes: dict[str, str]
    flops: Number
    share_of_flops: Number
    parameter: str | None = None


class Layers(View):
    window: str
    items: list[LayerView]


class HistoryView(View):
    """Metrics of one slot step by step, for one cast; every list has one entry a recorded step."""

    site: str
    role: str
    cast: str
    window: str
    steps: list[int]
    metrics: dict[str, list[Number]]
    flags: list[str] = []


class ScoreRow(BaseModel):
    """What one cast would do to one slot, pooled over the window (see `Scores.rows` of the library)."""

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="strings")

    site: str
    role: str
    cast: str
    underflow: Number
    subnormal: Number
    overflow: Number
    sqnr_db: Number
    dynamic_range_bits: Number
    exponent_bits: Number
    amax: Number
    damage: Number | None = None
    damage_se: Number | None = None
    damage_from: str | None = None
    bias_damage: Number | None = Field(None, description="first-order change of the loss, signed; in no sum")
    bias_damage_se: Number | None = None
    coherence: Number | None = None
    shrink_coherence: Number | None = None
    shrinking: Number | None = Field(None, description="share of the error energy that shrinks the tensor as a whole")
    noise_ratio: Number | None = None
    lost_batch_share: Number | None = None
    lost_updates: Number | None = None
    epsilon_vanishes: bool | None = None
    bias: Number | None = None
    backward_error: dict[str, dict[str, Number]] | None = Field(
        None, description="product → median and p99 of its backward error, both operands in this cast"
    )
    confidence: Number | None = None
    flags: list[str] = []


class ScorePage(Page[ScoreRow]):
    window: str


# Plans


class Budget(Request):
    """At least this 8-bit share, at most this time a step and memory; null: whatever comes."""

    model_config = ConfigDict(json_schema_extra={"example": {"share_8bit": 0.8}})

    share_8bit: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    time_s: float | None = Field(None, ge=0, allow_inf_nan=False, description="of matrix products and casts, seconds")
    memory_bytes: float | None = Field(None, ge=0, allow_inf_nan=False)


class PlanRequest(Request):
    """A plan from recorded windows: the planner's, or with `uniform` the same recipe everywhere."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"hardware": "h100", "tolerance": 0.01, "max_lost_batch": 0.02}}
    )

    windows: list[str] | None = Field(None, min_length=1, max_length=32, description="null: the latest recorded one")
    hardware: str = "h100"
    tolerance: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="loss units; null: 0.1% of the window's mean loss"
    )
    max_lost_batch: float = Field(0.02, ge=0, lt=1, allow_inf_nan=False)
    casts: list[str] | None = Field(None, min_length=1, max_length=64)
    objective: Literal["share_8bit", "time", "memory", "damage"] = "share_8bit"
    budget: Budget | None = Field(None, description="what the plan must reach beside its limits")
    uniform_roles: bool = Field(False, description="one cast a role, the same at every site that is cast at all")
    keep: list[str] = Field([], max_length=256, description="globs of modules or sites that stay as they are")
    only: list[str] = Field([], max_length=256, description="globs of those that may be touched; empty: all")
    first_last: int = Field(0, ge=0, le=10_000, description="so many sites at the beginning and at the end stay")
    native_only: bool = Field(False, description="8 bits only at sites all of whose products native kernels run")
    master_weights: str = Field("as-is", description='"as-is", "auto" or a cast such as "bf16"')
    optimizer_state: str = Field("as-is", description='"as-is", "auto" or a cast such as "bf16"')
    uniform: dict[str, str] | None = Field(
        None,
        min_length=1,
        description='role to cast, e.g. {"input": "int8/none", "grad_output": "e5m2/none"}; '
        "beside it only hardware and one window are taken",
    )

    @model_validator(mode="after")
    def _no_window_twice(self) -> Self:
        windows = self.windows or []
        if repeated := [window for place, window in enumerate(windows) if window in windows[:place]]:
            raise ValueError(f"windows names {repeated[0]!r} twice; name each window once")
        return self

    @model_validator(mode="after")
    def _nothing_beside_a_recipe(self) -> Self:
        if self.uniform is None:
            return self
        alone = {"uniform", "hardware", "windows"}
        given = sorted(name for name in self.model_fields_set - alone if getattr(self, name) is not None)
        if given:
            raise ValueError(f"a uniform recipe takes no {' and no '.join(given)}: its casts are given; leave it out")
        if len(self.windows or []) > 1:
            raise ValueError("a uniform recipe takes one window, whose scores predict its cost; name one")
        return self


class PlanView(View):
    id: str
    model_id: str
    windows: list[str]
    created_at: datetime
    request: dict[str, Any]
    plan: dict[str, Any] = Field(description="schema numerics-advisor/plan/1, as plan.to_dict() of the library")


class ExportView(View):
    plan: str
    target: str
    files: dict[str, str] = Field(description="name → text")
    use: str = Field(description="how to use them")
    cannot: list[str] = Field(description="what the target does not do of the plan")


# Runs


class RunRequest(Request):
    """Train `steps` steps with the plan, and beside it the fp32 baseline: same start, same data order."""

    model_config = ConfigDict(json_schema_extra={"example": {"steps": 200, "baseline": True, "evaluate_batches": 8}})

    steps: int = Field(200, ge=1, le=1_000_000)
    seed: int | None = Field(None, ge=0, lt=2**63)
    baseline: bool = True
    baseline_run: str | None = Field(None, description="reuse the baseline of this run: same start, seed and steps")
    start_window: str | None = Field(None, description="start from this window's checkpoint; null: from scratch")
    evaluate_batches: int = Field(8, ge=2, le=1_000)


class CurvePoint(View):
    step: int
    loss: Number


class Curves(View):
    baseline: list[CurvePoint] = []
    plan: list[CurvePoint] = []


class Verdict(View):
    """What the pair of trainings showed; `gap` is the plan's held-out loss minus the baseline's."""

    model_config = ConfigDict(extra="allow", frozen=True)

    summary: str
    compared: str
    baseline_loss: Number | None = None
    plan_loss: Number | None = None
    gap: Number | None = None
    gap_interval: tuple[Number, Number] | None = Field(None, description="95%, paired t over held-out batches")
    batches: int | None = None
    share_8bit: Number | None = None
    predicted_damage: Number | None = None
    tolerance: Number | None = None
    diverged_at: int | None = None
    held: bool | None = Field(
        None,
        description="the interval's upper end is within the tolerance; false when its lower end is above it",
    )


class AppliedRow(View):
    model_config = ConfigDict(extra="allow", frozen=True)

    site: str | None = Field(description="a site, or the name of a stored tensor; null where it is not known")
    role: str | None = Field(description="null where the plan names no such site")
    cast: str | None
    how: str
    count: int


class RunView(View):
    id: str
    plan_id: str
    model_id: str
    state: JobState
    job_id: str
    created_at: datetime
    request: dict[str, Any]
    steps: int
    curves: Curves
    verdict: Verdict | None = None
    applied: list[AppliedRow] = []


class RunCreated(View):
    run: RunView
    job: "JobView"


# Jobs


class Progress(View):
    phase: Phase
    step: int
    steps: int
    loss: Number | None = None
    steps_per_s: Number | None = None
    seconds_left: Number | None = None


class JobResult(View):
    href: str


class JobView(View):
    """A job. `result` says where its outcome is, `error` what went wrong; both null while it is under way."""

    id: str
    kind: JobKind
    state: JobState
    attempt: int = Field(description="0 until it first starts; more than 1 after a worker or its machine died")
    cancel_requested: bool = False
    model_id: str
    target: str = Field(description="the window's or run's id")
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    progress: Progress | None = None
    error: Problem | None = None
    result: JobResult | None = None


# Catalogue and health


class FormatView(View):
    """An element number format and the figures that follow from its layout."""

    name: str
    bits: int = Field(description="width of a code, with its sign")
    stored_bits: int = Field(description="width of an element in memory")
    exponent_bits: int
    mantissa_bits: int
    bias: int = Field(description="of the exponent field; of an integer format, what makes its step 1")
    signed: bool
    code_points: int
    nonfinite: str = Field(description="what it has beyond its finite values, and so what an overflow can become")
    largest: Number
    lowest: Number
    smallest_normal: Number
    smallest_subnormal: Number = Field(description="smallest non-zero magnitude")
    epsilon: Number = Field(description="distance from 1 to the next larger value")
    aliases: dict[str, list[str]] = Field(description="library to its names for this format; none where it has none")


class HardwareView(View):
    name: str
    title: str
    pairs: list[tuple[str, str]] = Field(description="operand formats that its matrix units multiply")
    granularities: list[str] = Field(description="which scales its 8-bit kernels take")
    memory_bytes: int
    tflops: dict[str, float] = Field(description="dense peak rate by format, 10^12 operations a second")
    bandwidth_bytes_s: float = Field(description="peak of its memory")
    launch_s: float = Field(description="what starting a kernel adds to its time")
    product_start_s: float = Field(description="the same of a matrix product")
    tile_s: float = Field(description="start and end of a tile of 128 x 256 results, beside its arithmetic")
    achieved: float = Field(description="part of the peak that large products of 16 bits and more reach")
    achieved_8bit: float = Field(description="the same of 8 bits and less")
    achieved_bandwidth: float = Field(description="part of the bandwidth's peak that kernels reach")
    units: int = Field(description="units that work on tiles of a product side by side")
    inner_layout: bool = Field(description="8-bit operands must both lie along the inner dimension")
    source: str
    sources: dict[str, str] = Field(description="where figures are from that no data sheet has")
    note: str = ""


class Health(View):
    status: Literal["ok"] = "ok"


class Readiness(View):
    status: Literal["ready", "not ready"]
    database: str
    migrations: str
    worker: str


WindowCreated.model_rebuild()
RunCreated.model_rebuild()
