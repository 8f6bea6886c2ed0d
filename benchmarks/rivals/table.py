"""The table of the rivals: gaps with intervals, and who is better at an equal share of 8 bits.

Fixed before the table was run, and not changed after:

- gap: a contender's held-out loss at the end minus fp32's of the same seed; its interval is Student's t, 95%, over
  seeds
- at an equal share: `plan=X` has at least the 8-bit share of X (where it cannot, the table says so). It is `better`
  than X where the interval of the paired difference of gaps lies below 0, `worse` where it lies above, else `tied`
- at an equal gap: a contender keeps the loss where the mean of its gap is at most the standard deviation of fp32's
  held-out loss over seeds and nothing broke down; of those that do, who has the largest 8-bit share
- a training that ended in NaN counts as worse than any number
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from benchmarks.rivals.trainings import BASELINE, CONTROL, GO_ON_STEPS, HARDWARE, OURS, SCORED_STEPS, WINDOW_STEPS

CONFIDENCE = 0.95
ROOT = Path(__file__).parent.parent.parent
JSON, PAGE = ROOT / "benchmarks" / "rivals.json", ROOT / "docs" / "rivals.md"

Row = Mapping[str, Any]

# Written after the table was run.
READING = (
    "Beside `te-hybrid` on the LSTM the plan was, as long as nothing predicted what recurrent",
    "inputs and weights do to gradients and no plan narrowed them; it now has the same share and the same loss.",
    "H100s multiply no two e5m2 operands, so `mellempudi` has no share there, and `torchao-auto` converts nothing at",
    "these sizes. Trainings of the ConvNet and the ViT differ so much by chance that only large differences show.",
)


def write(rows: Sequence[Row]) -> str:
    """Write both files and return the page."""
    tables = {model: model_table(rows, model) for model in dict.fromkeys(row["model"] for row in rows)}
    JSON.write_text(json.dumps({"models": tables, "runs": list(rows)}, indent=1, allow_nan=True) + "\n")
    page = "\n".join(_page(tables)) + "\n"
    PAGE.write_text(page)
    return page


def model_table(rows: Iterable[Row], model: str) -> dict[str, Any]:
    """What the table says of one model."""
    losses: dict[str, dict[int, float]] = {}
    shares: dict[str, list[float]] = {}
    for row in rows:
        if row["model"] == model:
            losses.setdefault(row["contender"], {})[row["seed"]] = row["held_out"]
            shares.setdefault(row["contender"], []).append(row["share_8bit"])
    base = losses[BASELINE]
    spread = float(np.std(list(base.values()), ddof=1)) if len(base) > 1 else math.nan
    contenders = {}
    for name, found in losses.items():
        gaps = [found[seed] - base[seed] for seed in sorted(found) if seed in base]
        mean, half = interval(gaps)
        contenders[name] = {
            "gap": mean,
            "half_width": half,
            "seeds": len(gaps),
            "share_8bit": float(np.mean(shares[name])),
            "keeps_the_loss": bool(mean <= spread),
        }
    pairs = {}
    for name, rival in OURS.items():
        if rival is not None and name in losses and rival in losses:
            both = sorted(losses[name].keys() & losses[rival].keys())
            pairs[rival] = verdict([losses[name][seed] - losses[rival][seed] for seed in both])
            pairs[rival]["shares_8bit"] = [float(np.mean(shares[one])) for one in (name, rival)]
    return {
        "fp32_loss": float(np.mean(list(base.values()))),
        "fp32_spread": spread,
        "contenders": contenders,
        "at_equal_share": pairs,
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its Student interval; NaN where there are fewer than two, or one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    if len(values) < 2:
        return math.fsum(values) / max(len(values), 1), math.nan
    half = student.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    return math.fsum(values) / len(values), float(half)


def verdict(differences: Sequence[float]) -> dict[str, Any]:
    """Ours minus the rival's, by seed: better, tied or worse."""
    if any(map(math.isnan, differences)):
        return {"difference": math.nan, "half_width": math.nan, "ours": "undecided: a training ended in NaN"}
    mean, half = interval(differences)
    return {
        "difference": mean,
        "half_width": half,
        "ours": "better" if mean + half < 0 else "worse" if mean - half > 0 else "tied",
    }


def _page(tables: Mapping[str, Any]) -> Iterable[str]:
    yield "# The plan beside rules of thumb"
    yield ""
    yield "Made by `python -m benchmarks.rivals`; every run is in `benchmarks/rivals.json`. From a checkpoint each"
    yield f"contender trains on for {GO_ON_STEPS} steps, emulated, beside fp32 on the same batches; plans come from a"
    yield f"window of {WINDOW_STEPS} steps, {SCORED_STEPS} of them scored, and are for {HARDWARE}. The gap is in"
    yield "held-out loss, with its 95% interval over seeds; `benchmarks/rivals/recipes.py` describes the recipes, and"
    yield "`benchmarks/rivals/table.py`, written before the runs, says what counts as better."
    yield f"`{CONTROL}` is fp32 from weights moved by a millionth: what chance alone does."
    yield "All runs are of fbd1711, on two cores of a Zen 3."
    yield ""
    yield "## At an equal share of FLOPs in 8 bits"
    yield ""
    yield "Loss of our plan with at least the rival's share, minus the rival's."
    yield ""
    rivals = list(dict.fromkeys(rival for table in tables.values() for rival in table["at_equal_share"]))
    yield "| model | " + " | ".join(rivals) + " |"
    yield "|---" * (len(rivals) + 1) + "|"
    for model, table in tables.items():
        yield f"| {model} | " + " | ".join(_pair(table["at_equal_share"].get(rival)) for rival in rivals) + " |"
    yield ""
    yield _worse(tables)
    yield from READING
    yield ""
    yield "## Each model"
    for model, table in tables.items():
        yield ""
        yield f"### {model}"
        yield ""
        yield f"fp32: {table['fp32_loss']:.4f}, standard deviation over seeds {table['fp32_spread']:.4f}."
        keep = {n: c for n, c in table["contenders"].items() if c["keeps_the_loss"]}
        best = max(keep, key=lambda name: keep[name]["share_8bit"])
        yield f"Largest 8-bit share of those that keep the loss: {best}, {100 * keep[best]['share_8bit']:.1f}%."
        yield ""
        yield "| contender | 8-bit share | gap | 95% ± | seeds | keeps the loss |"
        yield "|---|---|---|---|---|---|"
        for name, one in table["contenders"].items():
            yield (
                f"| {name} | {100 * one['share_8bit']:.1f}% | {one['gap']:+.4f} | {one['half_width']:.4f} | "
                f"{one['seeds']} | {'yes' if one['keeps_the_loss'] else 'no'} |"
            )


def _worse(tables: Mapping[str, Any]) -> str:
    found = [
        f"{model} beside {rival}"
        for model, table in tables.items()
        for rival, one in table["at_equal_share"].items()
        if one["ours"] not in ("better", "tied")
    ]
    return f"Worse or undecided: {', '.join(found)}." if found else "No pairing is worse."


def _pair(one: Row | None) -> str:
    if one is None:
        return ""
    mine, theirs = one["shares_8bit"]
    less = f" (at {100 * mine:.0f}% against {100 * theirs:.0f}%)" if mine < theirs - 1e-6 else ""
    return f"{one['ours']}: {one['difference']:+.4f} ± {one['half_width']:.4f}{less}"
