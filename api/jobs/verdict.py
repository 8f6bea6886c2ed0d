"""The verdict: what the pair of trainings showed about the plan.

The gap is the mean over held-out batches of (plan's loss - baseline's loss); its 95% interval is the paired t
interval over those batches. It says how sure the gap of these two trainings is, not how it varies from seed
to seed: `compared` tells the reader so.
"""

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from scipy.special import stdtrit

from advisor.plan import Plan
from api.schemas import RunRequest

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Arm:
    """What one training came to: held-out losses, one a batch; none if it diverged, and then at which step."""

    losses: list[float]
    diverged_at: int | None

    @property
    def loss(self) -> float:
        """Mean held-out loss; NaN if the training diverged."""
        return statistics.fmean(self.losses) if self.losses else math.nan

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(plan: Plan, baseline: Arm | None, arm: Arm, wanted: RunRequest) -> dict[str, Any]:
    """The verdict's members (api.schemas.Verdict)."""
    known = {
        "plan_loss": arm.loss,
        "baseline_loss": None if baseline is None else baseline.loss,
        "batches": wanted.evaluate_batches,
        "share_8bit": plan.predicted.share_8bit,
        "predicted_damage": plan.predicted.damage,
        "tolerance": plan.tolerance,
        "diverged_at": arm.diverged_at,
        "compared": _compared(baseline, wanted),
    }
    if arm.diverged_at is not None:
        summary = f"the plan diverged: its loss was not finite at step {arm.diverged_at} of {wanted.steps}"
        return {**known, "summary": summary, "held": False}
    if baseline is None:
        return {**known, "summary": f"the plan's held-out loss is {arm.loss:.4g}; no baseline was asked for"}
    gap, low, high = paired_interval(arm.losses, baseline.losses)
    held = _held(low, high, plan.tolerance)
    return {
        **known,
        "gap": gap,
        "gap_interval": [low, high],
        "held": held,
        "summary": _summary(gap, low, high, plan.tolerance, held),
    }


def paired_interval(losses: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Mean of the paired differences and the ends of its 95% interval; NaN where a loss is not finite.

    At least two pairs, of equal number.
    """
    differences = [a - b for a, b in zip(losses, reference, strict=True)]
    if not all(math.isfinite(value) for value in differences):
        return math.nan, math.nan, math.nan
    gap = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = float(stdtrit(len(differences) - 1, (1 + CONFIDENCE) / 2)) * error
    return gap, gap - reach, gap + reach


def _held(low: float, high: float, tolerance: float | None) -> bool | None:
    """True: the whole interval is within the tolerance. False: all of it is above. None: it is open, or no limit."""
    if tolerance is None:
        return None
    if math.isnan(high) or low > tolerance:
        return False
    return True if high <= tolerance else None


def _summary(gap: float, low: float, high: float, tolerance: float | None, held: bool | None) -> str:
    measured = f"the plan's held-out loss is {gap:+.4g} against the baseline's (95%: {low:+.4g} to {high:+.4g})"
    if tolerance is None:
        return f"{measured}; the plan has no tolerance to hold it to"
    limit = f"the tolerance of {tolerance:.4g}"
    if held is None:
        return f"{measured}; the interval reaches over {limit}, so more held-out batches are needed to decide"
    return f"{measured}; " + (f"it holds {limit}" if held else f"it does not hold {limit}")


def _compared(baseline: Arm | None, wanted: RunRequest) -> str:
    start = "fresh weights" if wanted.start_window is None else f"the state of window {wanted.start_window}"
    if baseline is None:
        return f"one training of {wanted.steps} steps from {start}, with the plan alone"
    return (
        f"two trainings of {wanted.steps} steps from {start} on the same batches, one in fp32 and one with the "
        f"plan's casts emulated, each evaluated in its own precision on the same {wanted.evaluate_batches} "
        "held-out batches; one seed, so the interval is over batches and not over seeds"
    )
