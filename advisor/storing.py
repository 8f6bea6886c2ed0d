"""In which formats master weights and optimizer state are kept: as they are, as asked, or where a window says so.

"auto" keeps a tensor in 16 bits only where the window shows that nothing is lost by it:

- a master weight, in the first cast of MASTER_CASTS that takes the updates: rounded to nearest, at most MOST_LOST of
  them come to nothing; rounded stochastically, which loses none in the mean, rounding adds at most MOST_NOISE of the
  energy of an update. Nothing overflows.
- an optimizer's state, in bf16 if epsilon does not vanish in it and at most MOST_UNDERFLOW of the elements do. A mean
  of squares moves by a thousandth of itself a step (β₂ = 0.999), less than half a step of bf16: to nearest it would
  stay where it is, so it is rounded stochastically.

What rounding a stored weight does to the loss is not in a plan's damage: it is that of the same cast as `weight`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from advisor.errors import InvalidPlan
from advisor.lost_updates import epsilon_vanishes, lost_of
from advisor.metrics import measure
from advisor.plan import Stored
from probes.casts import Cast
from probes.errors import ProbeError
from probes.parameter_records import MASTER, UPDATE, ParameterRecord
from probes.records import Slot
from probes.window import Window

AS_IS, AUTO = "as-is", "auto"
STORED_AS_IS = "master weights and optimizer state stay as they are"
# All ours; see above.
MOST_LOST = 0.01
MOST_NOISE = 0.1
MOST_UNDERFLOW = 1e-4
MASTER_CASTS = ("bf16/none/nearest", "fp16/none/nearest", "bf16/none/stochastic")
STATE_CAST = "bf16/none/nearest"
SQUARES_CAST = "bf16/none/stochastic"
# States that are means or sums of squares, by the names that torch's optimizers give them.
SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf"})


@dataclass(frozen=True)
class Storage:
    """The tensors that a plan keeps in another format, and what it says of all: "fp32", "bf16" or "bf16 and fp32"."""

    rows: tuple[Stored, ...] = ()
    master_weights: str = ""
    optimizer_state: str = ""
    notes: tuple[str, ...] = (STORED_AS_IS,)
    casts: Mapping[tuple[str, str], Cast] = field(default_factory=dict)


KEPT_AS_IT_IS = Storage()


def given(rows: Sequence[Stored]) -> Storage:
    """Tensors that are stored as a recipe has it, whatever that does."""
    if not rows:
        return KEPT_AS_IT_IS
    casts = {(row.name, row.role): Cast.parse(row.cast) for row in rows}
    return Storage(tuple(rows), notes=(f"{len(rows)} tensors are stored as the recipe has it",), casts=casts)


def storage_of(windows: Sequence[Window], master_weights: str = AS_IS, optimizer_state: str = AS_IS) -> Storage:
    """Where master weights and states are kept. Either is "as-is", "auto" or a cast, such as "bf16" or "fp16".

    Of several windows each tensor counts with the worst. Raises InvalidPlan for any other word, and where the windows
    did not follow the parameters.
    """
    wanted = {"master_weights": master_weights, "optimizer_state": optimizer_state}
    casts = {name: _read(name, word) for name, word in wanted.items()}
    records = windows[-1].parameter_records
    if not records and set(wanted.values()) != {AS_IS}:
        raise InvalidPlan("the window followed no parameters, so nothing can be said of how they are stored")
    rows: list[Stored] = []
    for record in records:
        if record.dtype == "float32" and master_weights != AS_IS:
            rows += _master(windows, record, casts["master_weights"])
        if optimizer_state != AS_IS:
            for state, dtype in record.states.items():
                if dtype == "float32":
                    rows += _state(windows, record, state, casts["optimizer_state"])
    rows = [row for row in rows if row.cast != "fp32/none/nearest"]
    stored = {(row.name, row.role): Cast.parse(row.cast) for row in rows}
    own = {(record.name, MASTER): record.dtype for record in records}
    states = {(record.name, state): dtype for record in records for state, dtype in record.states.items()}
    return Storage(
        rows=tuple(rows),
        master_weights=_in_words(own, stored) if master_weights != AS_IS else "",
        optimizer_state=_in_words(states, stored) if optimizer_state != AS_IS else "",
        notes=_notes(wanted, rows, len(own), len(states)),
        casts=stored,
    )


def _read(name: str, word: str) -> Cast | None:
    """The cast that a word names; None for the two that name none."""
    if word in (AS_IS, AUTO):
        return None
    try:
        cast = Cast.parse(word)
    except ProbeError as error:
        raise InvalidPlan(f"{name}={word!r}: give {AS_IS!r}, {AUTO!r} or a cast such as 'bf16' or 'fp16'") from error
    if not cast.has_one_scale or (cast.scale is not None and cast.scale.rule == "delayed"):
        raise InvalidPlan(f"{name}={word!r}: no tensor is kept so; give a cast without a scale or with one a tensor")
    return cast


def _master(windows: Sequence[Window], record: ParameterRecord, wanted: Cast | None) -> list[Stored]:
    if wanted is not None:
        lost = _lost(windows, record.name, wanted)
        said = "" if lost is None else f"; it loses {100 * lost:.2g}% of its updates"
        return [_stored(record.name, MASTER, wanted, f"{wanted} as asked for all master weights{said}")]
    for text in MASTER_CASTS:
        cast = Cast.parse(text)
        slot = Slot(record.name, MASTER)
        if not all(slot in window.slots for window in windows):
            return []
        if _worst(windows, slot, cast, lambda found: found.overflow) > 0:
            continue
        if cast.rounding == "stochastic":
            noise = _noise(windows, record.name, cast)
            if noise is not None and noise <= MOST_NOISE:
                why = f"no update is lost in the mean, and rounding adds {100 * noise:.2g}% of an update's energy"
                return [_stored(record.name, MASTER, cast, why)]
            continue
        lost = _lost(windows, record.name, cast)
        if lost is not None and lost <= MOST_LOST:
            return [_stored(record.name, MASTER, cast, f"loses {100 * lost:.2g}% of its updates, at most 1% may be")]
    return []


def _state(windows: Sequence[Window], record: ParameterRecord, state: str, wanted: Cast | None) -> list[Stored]:
    cast = wanted or Cast.parse(SQUARES_CAST if state in SQUARES else STATE_CAST)
    vanishes = epsilon_vanishes(record, cast.format)
    slot = Slot(record.name, state)
    there = all(slot in window.slots for window in windows)
    underflow = _worst(windows, slot, cast, lambda found: found.underflow) if there else None
    said = "unknown underflow" if underflow is None else f"{100 * underflow:.2g}% underflow"
    epsilon = f"epsilon {record.epsilon:.0e} " + ("vanishes" if vanishes else "stays")
    facts = said if vanishes is None else f"{said}, {epsilon}"
    if wanted is not None:
        return [_stored(record.name, state, cast, f"{cast} as asked for all optimizer state; {facts}")]
    if vanishes or underflow is None or underflow > MOST_UNDERFLOW:
        return []
    why = "; rounded stochastically, since a step moves it by less than bf16 resolves" if state in SQUARES else ""
    return [_stored(record.name, state, cast, f"{facts}{why}")]


def _stored(name: str, role: str, cast: Cast, reason: str) -> Stored:
    return Stored(name=name, role=role, cast=str(cast), reason=f"{reason}.")


def _lost(windows: Sequence[Window], parameter: str, cast: Cast) -> float | None:
    """The largest share of lost updates; None where a window cannot tell."""
    found = [lost_of(window, parameter, [cast]).get(str(cast)) for window in windows]
    known = [share for share in found if share is not None]
    return max(known) if len(known) == len(found) else None


def _noise(windows: Sequence[Window], parameter: str, cast: Cast) -> float | None:
    """Energy that rounding a weight adds to one update, over the update's own.

    Rounding the sum of a weight on the grid and an update that is small beside the grid's step u adds |Δw|·u; with as
    much for every update, Σ|Δw|·u ≤ √(Σ Δw²·Σ u²), and u² is 6 times what stochastic rounding adds to a weight at a
    place of no special kind (u²/6).
    """
    found = []
    for window in windows:
        if Slot(parameter, UPDATE) not in window.slots:
            return None
        update = window.history(parameter, UPDATE)
        moved = float(update.sum_of_squares.sum()) / max(float(update.elements.sum()), 1.0)
        rounded = measure(window.history(parameter, MASTER), cast, "float32").pooled()
        steps = 6 * rounded.error_energy / max(rounded.elements, 1.0)
        if moved <= 0:
            return None
        found.append((steps / moved) ** 0.5)
    return max(found)


def _worst(windows: Sequence[Window], slot: Slot, cast: Cast, rate: Callable[..., float]) -> float:
    """The largest of the windows' rates; 0 for a tensor of zeros."""
    rates = [rate(measure(window.history(*slot), cast, window.dtype(slot)).pooled()) for window in windows]
    return max(0.0 if each != each else float(each) for each in rates)


def _in_words(own: Mapping[tuple[str, str], str], stored: Mapping[tuple[str, str], Cast]) -> str:
    """The formats of some tensors, that of most first."""
    names = Counter(
        stored[key].format.name if key in stored else _SHORT.get(dtype, dtype) for key, dtype in own.items()
    )
    return " and ".join(name for name, _ in sorted(names.items(), key=lambda one: (-one[1], one[0]))) or "fp32"


_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def _notes(wanted: Mapping[str, str], rows: Sequence[Stored], masters: int, states: int) -> tuple[str, ...]:
    if set(wanted.values()) == {AS_IS}:
        return (STORED_AS_IS,)
    of_master = sum(row.role == MASTER for row in rows)
    told = (
        f"{of_master} of {masters} master weights and {len(rows) - of_master} of {states} optimizer states are kept in "
        "another format than their own; what rounding a stored weight does to the loss is in no sum"
    )
    return (told,)
