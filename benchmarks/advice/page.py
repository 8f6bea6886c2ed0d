"""The page `docs/advice.md`, made of `advice.json` alone: no figure in it was written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from advisor.menu import Limits
from benchmarks.advice.agreement import PLAN_FACTOR, TARGETS
from benchmarks.advice.forward_truth import ROUND
from benchmarks.advice.gradient_truth import BATCHES, EXACT_BATCHES
from benchmarks.advice.training_truth import LAST, PAIRS, PAIRS_ALIKE, SMALL, STEPS
from probes.numbers import from_json
from probes.records import GRADIENT

WORST = 5  # pairs a model that are listed
RISE = 1e-3  # of the loss: the default tolerance
LOST = 0.02  # the default limit on lost batch
ALIKE = Limits(math.inf, LOST).systematic
FAR = 2.0  # predicted over measured, or the reverse, from which on a pair is listed


def page(result: Mapping[str, Any]) -> str:
    """The whole page as Markdown."""
    models = result["models"]
    sections = (_opening(result), _roles(models), _rivals(models), _sketches(models), _first_order(models))
    return "\n\n".join((*sections, _plans(models), _trainings(models), _far(models))) + "\n"


def _opening(result: Mapping[str, Any]) -> str:
    targets = "; ".join(
        f"{role} Spearman at least {one.spearman}, ratio {one.lowest_ratio} to {one.highest_ratio}"
        for role, one in TARGETS.items()
    )
    casts = ", ".join(f"`{cast}`" for cast in result["casts"])
    rows = [
        (
            name,
            _number(one["loss"], 3),
            str(one["scored_steps"]),
            _number(one["scored_step_in_plain_steps"], 0),
            _number(one["scored_steps"] * from_json(one["scored_step_in_plain_steps"]), 0),
        )
        for name, one in result["models"].items()
    ]
    head = ("model", "loss", "scored steps", "one costs", "all of them")
    return f"""# Predicted against measured

This page is written by `python -m benchmarks.advice.table --write`, from the brute force that
`python -m benchmarks.advice.truth` has measured (torch {result["torch"]}, CPU, one thread). Six small models are
trained for 300 to 400 steps on tiny Shakespeare and Fashion-MNIST; `benchmarks/advice/models.py` says how.

**Measured, forward.** At the checkpoint's weights each tensor of each product is moved by a cast's rounding error δ
and by −δ, and the rise is ½[L(+δ) + L(−δ)] − L(0), the mean over at least {2 * ROUND} training batches that no step
has seen. **Measured, gradients.** With one tensor cast in the backward pass alone, the error's energy in the weight's
gradient ({BATCHES} batches) over the minibatch's own noise in it ({EXACT_BATCHES} batches); with Adam each element is
divided by its own size first, as Adam does. A product without a weight is judged at the matrix that it
hits hardest.
**Predicted.** `advisor.score` on a window over the training's next {result["window_steps"]} steps, of which
{result["scored_steps"]} are scored: `damage`, and `noise_ratio` for `{GRADIENT}`. Where samples mix (BatchNorm) of
{result["mixed_steps"]}, all scored: the network's own curvature varies there from batch to batch by 1 to 7 times the
Gauss-Newton damage that it adds to, and {result["scored_steps"]} steps tell little of its mean. Casts: {casts}.

Only pairs of slot and cast count whose truth exceeds twice its standard error. Targets, set before the first table was
made: {targets}; every decided pair must have a prediction. The ratio is the median of predicted over measured.

{_table(head, rows)}

Constants of the estimator were chosen while these models of seed 0 were looked at. Rows named `-seed1` are of
checkpoints trained from another seed, on which nothing was chosen; no whole trainings were run for them.

The cost is in plain training steps, with all {len(result["casts"])} casts as candidates."""


def _roles(models: Mapping[str, Any]) -> str:
    rows = []
    for name, one in models.items():
        for role, found in one["roles"].items():
            agreed, meets = found["agreement"], found["meets"]
            verdict = "" if meets is None else "met" if meets else "**missed**"
            decided = f"{agreed['decided']} of {agreed['pairs']}"
            if agreed["predicted"] < agreed["decided"]:
                decided += f", {agreed['predicted']} predicted"
            quartiles = f"{_number(agreed['low'])} to {_number(agreed['high'])}"
            rows.append(
                (name, role, decided, _number(agreed["spearman"], 3), _number(agreed["ratio"]), quartiles, verdict)
            )
    head = ("model", "role", "decided", "Spearman", "ratio", "its quartiles", "target")
    return f"""## Slot by slot

A recurrent layer's `weight_hh_l0` and its like count as weights; "other" is attention's operands, without a target.

{_table(head, rows)}"""


def _rivals(models: Mapping[str, Any]) -> str:
    rows = []
    for name, one in models.items():
        for role, found in one["roles"].items():
            row = [name, role]
            for kind in ("rankings_of_usual", "rankings"):
                ranked = found[kind]
                row.append(str(ranked["predicted"]["pairs"]))
                row += [_number(ranked[by]["spearman"]) for by in ("predicted", "sqnr", "underflow", "backward_error")]
            rows.append(row)
    head = ("model", "role", *2 * ("pairs", "predicted", "SQNR", "underflow", "backward error"))
    return f"""## The same pairs ranked by rules of thumb

Spearman with the measured value: first over e4m3fn, e5m2 and int8 per tensor alone, then over all casts. SQNR counts as
worse the lower it is. The backward error is the median one of the site's forward product (for `{GRADIENT}`: of its
weight gradient) with both operands cast, so it cannot tell an input from a weight; a recurrent layer has none.

{_table(head, rows)}"""


def _sketches(models: Mapping[str, Any]) -> str:
    rows = [
        (name, role, str(found["decided"]), _number(found["spearman"], 3), _number(found["ratio"]))
        for name, one in models.items()
        for role, found in one["from_sketches"].items()
    ]
    own, told = (
        " of ".join(
            str(sum(one["in_intervals"][source][what] for one in models.values())) for what in ("inside", "pairs")
        )
        for source in ("measured", "sketch")
    )
    return f"""## Formats that the window did not know

A second window, in which e4m3fn, e5m2 and int8 were the candidates: what its sketches and what was measured of these
tell of the other casts above, none of which it measured. Of gradients a window measures two other casts beside its
candidates, `e2m2` and `e2m0`, which are none of these.

{_table(("model", "role", "decided", "Spearman", "ratio"), rows)}

Of the decided noise ratios of gradients {own} lie in the 95% intervals of what the first window measured,
and {told} in those of what the second told."""


def _first_order(models: Mapping[str, Any]) -> str:
    rows = []
    for name, one in models.items():
        found = one["first_order"]
        sizes = found["sizes"]
        rows.append(
            (
                name,
                f"{found['decided']} of {found['pairs']}",
                str(found["larger_than_second"]),
                str(found["raises"]),
                f"{found['same_sign']} of {found['compared']}",
                _number(sizes["spearman"], 3),
                _number(sizes["ratio"]),
            )
        )
    head = ("model", "decided", "larger than the rise", "raise the loss", "sign told", "Spearman of sizes", "ratio")
    return f"""## The first-order part

The mean of ½[L(+δ) − L(−δ)], which cancels above: the slope along one particular rounding, and what clipping and
flushing do. It is in no predicted damage. Decided are pairs where it differs from zero by two standard errors; how
often it is larger than the second-order rise, and how often it raises the loss. Then what ⟨g, δ⟩ with the training's
own gradient, over eight steps, would have told of those pairs.

{_table(head, rows)}"""


def _plans(models: Mapping[str, Any]) -> str:
    rows = []
    for name, one in models.items():
        for plan in one["plans"]:
            total, error = from_json(plan["measured"]), from_json(plan["standard_error"])
            measured = f"{_number(total, 5)} ± {_number(error, 5)}"
            decided = total > 2 * error
            ratio = from_json(plan["predicted"]) / total if decided else math.nan
            verdict = "undecided" if not decided else "met" if plan["meets"] else "**missed**"
            rows.append((name, plan["plan"], _number(plan["predicted"], 5), measured, _number(ratio), verdict))
    return f"""## Do damages add?

The predicted total of a plan's forward casts, and the symmetric rise of the loss with all of them at once. Target:
within a factor of {PLAN_FACTOR:g}, give or take two standard errors; undecided where it is no larger than these. Random
plans draw a cast for each tensor.

{_table(("model", "plan", "predicted", "measured", "ratio", "target"), rows)}"""


def _trainings(models: Mapping[str, Any]) -> str:
    rows, risen, unharmed = [], [], []
    for name, one in models.items():
        for run in one["trainings"]:
            lost, alike = (_told(run[key]) for key in ("predicted", "predicted_alike"))
            gap, width = from_json(run["gap"]), from_json(run["gap_half_width"])
            allowed = within(run["predicted"], run["predicted_alike"])
            proven = gap - width > RISE * from_json(one["loss"])
            (risen if proven else unharmed).append(allowed)
            rows.append(
                (
                    name,
                    run["site"],
                    f"`{run['cast']}`",
                    "not told" if lost is None else f"{100 * lost:.2g}%",
                    f"{from_json(run['measured_noise_ratio']):.2g}",
                    "not told" if alike is None else f"{alike:.2g}",
                    f"{from_json(run['alike']):.2g}",
                    f"{_number(gap, 4)} ± {_number(width, 4)}" + (" **rises**" if proven else ""),
                    str(run["seeds"]),
                    "yes" if allowed else "no",
                )
            )
    head = (
        *("model", "gradient at", "cast", "lost batch, predicted", "noise ratio", "alike, predicted", "alike"),
        *("loss gap", "seeds", "within the limits"),
    )
    return f"""## Whole trainings with one gradient cast

{STEPS} steps from new weights, with and without the cast, the same batches; the mean difference of the loss over the
last {LAST} steps, with its 95% interval over seeds. {PAIRS} pairs a model are spread over the measured noise, the
strongest first; {PAIRS_ALIKE} more are those of little noise, at most {SMALL:g} of the minibatch's, of which most is
alike.

Alike is the energy of the mean error over the minibatch's noise, over the whole gradient: it does not average out as
noise does, and outweighs it after the inverse of that number of steps. The small gradients of a cross-entropy's many
wrong classes are flushed and the large one of the right class is not, so at a head it can be most of the error. By
default a plan takes no cast that loses more than {100 * LOST:g}% of the batch or that has more than {ALIKE:.2g} alike.
Predicted, measured, all casts of the benchmark; of a product without a weight at the one beneath that it hits hardest:

{_table(("model", "decided", "Spearman", "ratio"), _alike(models))}

A loss rises where the whole interval is above {RISE:g} of it, the default tolerance. Of {len(risen)} pairs for which it
rises the limits, with the scored steps above, allow {sum(risen)}; of the other {len(unharmed)} they allow
{sum(unharmed)}.
The limit on what is alike was chosen on chargpt and lstm.

{_table(head, rows)}"""


def _alike(models: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found = {name: one["alike"] for name, one in models.items()}
    return [
        (name, f"{one['decided']} of {one['pairs']}", _number(one["spearman"], 3), _number(one["ratio"]))
        for name, one in found.items()
    ]


def _told(value: Any) -> float | None:
    return None if value is None else float(from_json(value))


def within(lost: Any, alike: Any) -> bool:
    """Whether a plan's default limits allow a cast of a gradient by itself: what is alike is unknown at some sites."""
    lost, alike = _told(lost), _told(alike)
    return lost is not None and lost <= LOST and (alike is None or alike <= ALIKE)


def _far(models: Mapping[str, Any]) -> str:
    rows = []
    for name, one in models.items():
        found = []
        for site, role, cast, predicted, measured, error in one["pairs"]:
            measured, predicted = from_json(measured), from_json(predicted)
            if not measured > 2 * from_json(error):
                continue
            ratio = 0.0 if predicted is None else predicted / measured
            if not 1 / FAR <= ratio <= FAR:
                told = "none" if predicted is None else f"{predicted:.2g}"
                found.append(
                    (
                        max(ratio, 1 / max(ratio, 1e-9)),
                        (site, role, f"`{cast}`", told, f"{measured:.2g}", f"{ratio:.2g}"),
                    )
                )
        found.sort(key=lambda far: -far[0])
        rows += [(name, f"{len(found)}", *cells) for _, cells in found[:WORST]]
    head = ("model", "so many", "site", "role", "cast", "predicted", "measured", "ratio")
    return f"""## Where it is wrong

Decided pairs that are off by more than a factor of {FAR:g}: how many, and the {WORST} worst of each model.

{_table(head, rows) if rows else "None."}"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _number(value: Any, digits: int = 2) -> str:
    return f"{from_json(value):.{digits}f}" if _is_number(value) else "–"


def _is_number(value: Any) -> bool:
    return value is not None and from_json(value) == from_json(value)
