"""Predicted against measured, for all six models: `python -m benchmarks.advice.table --data FOLDER --write`

Takes the brute force from the ledgers of `truth.py`, opens a window of its own on each model, asks the advisor, and
compares. `--write` writes `advice.json` beside this file and the page `docs/advice.md`; without it the page is printed.
Targets are in `agreement.py`. About ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from advisor.menu import lost_share
from benchmarks.advice.additivity import plan_totals
from benchmarks.advice.agreement import TARGETS, Compared, agreement, group_of, ranking, within_factor
from benchmarks.advice.first_order import first_orders
from benchmarks.advice.forward_truth import Truth, forward_truths
from benchmarks.advice.gradient_truth import GradientTruth, gradient_truths
from benchmarks.advice.ledger import Ledger
from benchmarks.advice.models import MODELS, Start
from benchmarks.advice.moved import slots_of
from benchmarks.advice.page import page
from benchmarks.advice.predicted import MIXED, SCORED, STEPS, Pair, Predicted, cost_of_a_scored_step, predict
from benchmarks.advice.training_truth import gaps, interval
from benchmarks.advice.truth import CASTS, add_common_arguments, begin, is_adaptive, open_ledger, progress_on_terminal
from probes.casts import Cast
from probes.numbers import plain
from probes.records import GRADIENT

RESULT = Path(__file__).with_name("advice.json")
PAGE = Path(__file__).parents[2] / "docs" / "advice.md"
SHRUNK = 0.5  # share of a gradient
USUAL = ("e4m3fn", "e5m2", "int8")  # ranked by themselves too; and a second window's only candidates


def result_of(start: Start, quick: bool) -> dict[str, Any]:
    """One model's part of the table."""
    trainable, (model, optimizer, _) = start.trainable, start.load()
    ledger = open_ledger(start, quick)
    if not ledger.of("exact"):
        sys.exit(
            f"{ledger.path} has no brute force of {start.label} yet: `python -m benchmarks.advice.truth` measures it"
        )
    parameters = {one.slot.site: one.parameter for one in slots_of(model, trainable.batch(0, 0).inputs)}
    rises = forward_truths(ledger.of("forward"))
    noises = gradient_truths(ledger, model, parameters, is_adaptive(optimizer))
    predicted = predict(start)
    compared = compare(rises, noises, predicted)
    of_usual = predict(start, candidates=USUAL)
    from_sketches = compare(rises, noises, of_usual)
    plans = plan_totals(trainable, model, predicted)
    return {
        "loss": predicted.loss,
        "notes": list(predicted.window.notes),
        "scored_steps": predicted.scored_steps,
        "scored_step_in_plain_steps": cost_of_a_scored_step(start.name),
        "roles": {role: _role(role, compared, predicted) for role in _groups(compared)},
        "from_sketches": {
            role: agreement(
                [
                    one
                    for pair, one in from_sketches.items()
                    if group_of(pair[0].role) == role and not _is_usual(pair[1])
                ]
            )
            for role in _groups(compared)
        },
        "in_intervals": {
            "measured": in_intervals(compared, predicted, "measured"),
            "sketch": in_intervals(from_sketches, of_usual, "sketch"),
        },
        "alike": agreement(list(_alike(noises, predicted).values())),
        "first_order": _first_order(rises, first_orders(start)),
        "plans": [
            {**plain(one), "meets": within_factor(one.predicted, one.measured, one.standard_error)} for one in plans
        ],
        "trainings": _trainings(ledger, noises, predicted),
        "pairs": [
            [*pair[0], pair[1], *(_short(value) for value in (one.predicted, one.measured, one.standard_error))]
            for pair, one in compared.items()
        ],
    }


def compare(
    rises: Mapping[Pair, Truth], noises: Mapping[Pair, GradientTruth], predicted: Predicted
) -> dict[Pair, Compared]:
    """Damage of forward slots in loss units, noise of gradients over the minibatch's."""
    found = {}
    for pair, rise in rises.items():
        found[pair] = Compared(rise.second, rise.second_se, predicted.of(pair, "damage"))
    for pair, noise in noises.items():
        if pair[0].role == GRADIENT:
            found[pair] = Compared(noise.ratio, noise.ratio_se, predicted.of(pair, "noise_ratio"))
    return found


def in_intervals(compared: Mapping[Pair, Compared], predicted: Predicted, source: str) -> dict[str, int]:
    """Of the decided pairs of gradients and casts whose noise has this source: how many are in their intervals."""
    inside = []
    for pair, one in compared.items():
        row = predicted.rows.get(pair, {})
        if pair[0].role == GRADIENT and one.decided and row.get("noise_from") == source:
            low, high = row["lost_batch_interval"]
            inside.append(low <= lost_share(one.measured) <= high)
    return {"pairs": len(inside), "inside": sum(inside)}


def _alike(noises: Mapping[Pair, GradientTruth], predicted: Predicted) -> dict[Pair, Compared]:
    """The mean error that casts put into weights' gradients, over the minibatch's noise.

    Not where most of the gradient is taken away: what is alike there is the mean gradient itself, which stands still at
    a checkpoint and turns in a window.
    """
    told = {pair: predicted.of(pair, "systematic_ratio") for pair in noises}
    return {
        pair: Compared(noises[pair].alike, noises[pair].alike_se, value)
        for pair, value in told.items()
        if pair[0].role == GRADIENT and value is not None and noises[pair].shrinkage < SHRUNK
    }


def _groups(compared: Mapping[Pair, Compared]) -> list[str]:
    met = {group_of(slot.role) for slot, _ in compared}
    return [role for role in (*TARGETS, "other") if role in met]


def _role(role: str, compared: Mapping[Pair, Compared], predicted: Predicted) -> dict[str, Any]:
    """Agreement of one group of roles, whether it meets its target, and how the rules of thumb rank the same pairs."""
    pairs = [pair for pair in compared if group_of(pair[0].role) == role]
    found = agreement([compared[pair] for pair in pairs])
    return {
        "agreement": found,
        "meets": None if role not in TARGETS else found.meets(TARGETS[role]),
        "rankings": _rankings(pairs, compared, predicted),
        "rankings_of_usual": _rankings([pair for pair in pairs if _is_usual(pair[1])], compared, predicted),
    }


def _rankings(
    pairs: Sequence[Pair], compared: Mapping[Pair, Compared], predicted: Predicted
) -> dict[str, dict[str, float]]:
    """Rank correlation with the truth, and over how many pairs, of the prediction and of the rules of thumb."""
    chosen = [compared[pair] for pair in pairs]
    values: dict[str, list[float | None]] = {
        "predicted": [one.predicted for one in chosen],
        "sqnr": [_minus(predicted.of(pair, "sqnr_db")) for pair in pairs],
        "underflow": [predicted.of(pair, "underflow") for pair in pairs],
        "backward_error": [predicted.backward_error.get(pair) for pair in pairs],
    }
    return {name: dict(zip(("spearman", "pairs"), ranking(chosen, by), strict=True)) for name, by in values.items()}


def _is_usual(cast: str) -> bool:
    return cast in map(str, map(Cast.parse, USUAL))


def _first_order(rises: Mapping[Pair, Truth], told: Mapping[Pair, float]) -> dict[str, Any]:
    """How large the part is that cancels in the symmetric rise, and whether ⟨g, δ⟩ of a few steps tells it."""
    decided = {pair: one for pair, one in rises.items() if abs(one.first) > 2 * one.first_se}
    both = [(one.first, told[pair]) for pair, one in decided.items() if pair in told]
    larger = [pair for pair, one in decided.items() if abs(one.first) > abs(one.second)]
    return {
        "pairs": len(rises),
        "decided": len(decided),
        "larger_than_second": len(larger),
        "raises": sum(one.first > 0 for one in decided.values()),
        "compared": len(both),
        "same_sign": sum(first * value > 0 for first, value in both),
        "sizes": agreement([Compared(abs(first), 0.0, abs(value)) for first, value in both]),
    }


def _trainings(ledger: Ledger, noises: Mapping[Pair, GradientTruth], predicted: Predicted) -> list[dict[str, Any]]:
    """Whole trainings with one gradient cast, the strongest noise first."""
    found = []
    for pair, gap in gaps(ledger).items():
        mean, width = interval(gap)
        found.append(
            {
                **pair[0]._asdict(),
                "cast": pair[1],
                "predicted": predicted.of(pair, "lost_batch_share"),
                "measured_noise_ratio": noises[pair].ratio,
                "predicted_alike": predicted.of(pair, "systematic_ratio"),
                "alike": noises[pair].alike,
                "gap": mean,
                "gap_half_width": width,
                "seeds": len(gap),
            }
        )
    return sorted(found, key=lambda one: -one["measured_noise_ratio"])


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare the models that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    parser.add_argument(
        "--write", action="store_true", help="write advice.json and docs/advice.md, in which other models stay"
    )
    parser.add_argument("--page-only", action="store_true", help="write the page again from advice.json")
    asked = parser.parse_args(arguments)
    if asked.page_only:
        PAGE.write_text(page(json.loads(RESULT.read_text())))
        return
    begin(asked)
    show = progress_on_terminal()
    result: dict[str, Any] = {
        "torch": torch.__version__.split("+")[0],
        "window_steps": STEPS,
        "scored_steps": SCORED,
        "mixed_steps": MIXED,
        "casts": list(map(str, CASTS)),
        "models": {},
    }
    for name in asked.models:
        start = Start(name, asked.seed, asked.cache)
        show(f"{start.label}: window, scores and plans")
        found = plain(result_of(start, asked.quick))
        if asked.write and RESULT.exists():  # another process may have written meanwhile
            result["models"] = json.loads(RESULT.read_text())["models"]
        known = {**result["models"], start.label: found}
        result["models"] = {one: known[one] for one in sorted(known, key=_place)}
        if asked.write:
            RESULT.write_text(json_of(result))
            PAGE.write_text(page(result))
    if not asked.write:
        print(page(result))


def _place(label: str) -> tuple[bool, int, str]:
    """First the checkpoints of seed 0, then others; models in their own order."""
    name = label.partition("-seed")[0]
    return name != label, list(MODELS).index(name), label


def json_of(result: Mapping[str, Any]) -> str:
    """Indented, but for the pairs: one a line."""
    text = json.dumps(result, indent=1, allow_nan=False)
    lines: list[str] = []
    inside: list[str] | None = None
    for line in text.splitlines():
        stripped = line.strip()
        if inside is not None:
            inside.append(stripped)
            if stripped.startswith("]"):
                lines.append(line[: len(line) - len(line.lstrip())] + "".join(inside).replace(",", ", "))
                inside = None
        elif stripped == "[":
            inside = [stripped]
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
