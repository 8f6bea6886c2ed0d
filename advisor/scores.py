"""The score: what each candidate cast would do to each slot of a window.

Metrics come from the sketches (`columns.py`), for any cast. Damage and gradient noise come from the scored steps
where the cast was a candidate there; for any other cast they are estimated from the sketches and brought to scale by
the slot's coherence, the ratio of the two estimates for the casts that have both (`estimates.py`):

    damage (forward roles)  directional: ½·Σ_samples (g·δ)²          from sketches: ½·Σg²·mean(δ²) × coherence
    noise (all roles)       measured in the gradient products        from sketches: what is rounded, what is flushed

Noise is divided by the minibatch's own: `lost_batch_share` = 1 − 1/(1 + ratio). That takes the error for noise; what
of it is alike in every batch stays when noise has averaged out, and is told beside it.

What is approximate: Gauss-Newton for the Hessian, a few draws of it, second order in δ, and the weight gradient's noise
standing for all that lies upstream. A delayed cast's metrics follow the window's steps, but what was measured of it was
measured with the scale of the scored step's own tensor.

All slots and casts are scored at once, as columns; the rows are made of them when they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from advisor.metrics import require_scored
from advisor.score_columns import ScoreColumns
from advisor.score_rows import rows_of
from probes.casts import Cast
from probes.records import Slot
from probes.step_table import data_frame
from probes.window import Window

DEFAULT_CASTS = tuple(map(Cast.parse, ("e4m3fn", "e5m2", "int8", "bf16", "fp16")))


@dataclass(frozen=True, eq=False)
class Scores:
    """`rows`: one dict a slot and cast, in the window's order; `columns`: the same numbers as arrays.

    site, role, cast           the slot, and the cast's canonical string
    underflow, subnormal, overflow  shares of the non-zero elements, pooled over the window
    sqnr_db, dynamic_range_bits, exponent_bits, amax, rms
    damage, damage_se          predicted rise of the loss and its standard error; None for gradients, and where no
                               known loss was met (`window.curvature_from` is not "loss"). No damage_se where the cast
                               shrinks the tensor and no measured one tells what that does
    damage_interval            [lower, upper]: where the damage lies with 95% probability (`intervals.py`), or None
    damage_from                "directional" (measured at the scored steps, of this cast or of one that makes the same
                               error) or "sketch" (estimated)
    bias_damage, bias_damage_se  ⟨g, δ⟩: what the loss changes by in the first order, signed, mean over the scored
                               steps, and its standard error over them. Of roundings it is chance and passes as weights
                               move; clipping and flushing to zero make it systematic. In no sum; None if not measured
    coherence, shrink_coherence  what the sketches' damage is multiplied by, as far as the error is random and as far
                               as it shrinks the tensor (`estimates.py`); None where no measured cast tells
    shrinking                  share of the error energy in the part that shrinks the tensor: (Σx·δ)²/(Σx²·Σδ²)
    noise_ratio                noise energy that the cast adds to gradients, over the minibatch's own
    lost_batch_share           1 − 1/(1 + noise_ratio)
    lost_batch_interval        [lower, upper]: where a gradient's lost batch share lies with 95% probability, or None
    noise_from                 "measured" (at the scored steps, of this cast or of one that makes the same error) or
                               "sketch" (told by how much of the tensor is flushed, from casts that were measured)
    systematic_ratio, systematic_ratio_se  of casts of gradients: energy of the mean of their errors in the weight's
                               gradient, over the minibatch's noise, and its standard error. It does not average out:
                               after 1/systematic_ratio steps it outweighs that noise. None with fewer than two scored
                               steps, at sites with no weight of their own or beneath, and in windows from before it was
                               measured
    lost_updates               of a parameter's master weight: share of the updates that it would not take
                               (`lost_updates.py`); None for other slots, and where nothing can be said
    epsilon_vanishes           of an optimizer's state: whether its epsilon is zero in the cast's format; or None
    confidence                 the chance that the next window gives this damage, or this noise, within a factor of two
                               (`confidence.py`); None with fewer than four steps
    bias                       Σx·δ/Σx²: what clipping and flushing to zero take off systematically
    backward_error             product of the site ("forward", "input_grad", "weight_grad", …) → {"median", "p99"} of
                               its backward error with both operands in the cast, as sampled at the scored steps; None
                               where the cast was not among those measured there
    flags                      why the metrics may be less exact than they look
    axis                       for scales by row, column or block: the dimensions that they run along, which are those
                               of the forward product (of a gradient: of the product that gives the input's), as
                               `along -1`; None for any other cast
    other_axes                 dicts of axis, underflow, subnormal, overflow, sqnr_db, flags: the other products
    """

    of_window: ScoreColumns

    @cached_property
    def columns(self) -> dict[str, NDArray[Any]]:
        """Column → array [rows], in the rows' order: float64, with NaN for None; or object, of texts, bools and None.

        All but backward_error, flags, axis and other_axes. The arrays are read-only: the rows are made of the same.
        """
        return {name: column.read_only() for name, column in self.of_window.columns.items()}

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The scores as dicts, made when they are first asked for."""
        return rows_of(self.of_window)

    def __len__(self) -> int:
        return len(self.of_window)

    def to_pandas(self) -> Any:
        """The rows as a pandas.DataFrame. Raises MissingPackage without pandas."""
        return data_frame(self.rows)

    def of(self, site: str, role: str | None = None) -> list[dict[str, Any]]:
        """The rows of one site, or of one slot."""
        return [row for row in self.rows if row["site"] == site and role in (None, row["role"])]


def score(window: Window, casts: Sequence[str | Cast] | None = None, *, slots: Sequence[Slot] | None = None) -> Scores:
    """Score casts (default: the usual 8-bit and 16-bit ones) on every slot of a window; no training, no tensors.

    A cast that is named twice, or by two names, is scored once. Scales by row, column and block are for tensors of
    products: a parameter's own slots get no rows for them.

    `slots`: score these alone, as `window.product_slots` for what a plan can choose from.

    Raises UnknownFormat or InvalidCast for a cast that is none, CastNotScored for one of which sketches do not tell
    enough (scales by row, column or block, where it was not opened with `finer`), WindowError for one still open.
    """
    chosen = [Cast.parse(cast) if isinstance(cast, str) else cast for cast in casts or DEFAULT_CASTS]
    chosen = list(dict.fromkeys(chosen))
    require_scored(*chosen)
    return Scores(ScoreColumns.of(window, window.slots if slots is None else slots, chosen))
