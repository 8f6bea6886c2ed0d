"""Runs the trouble suite: `python -m benchmarks.trouble`, from the repository's root, about ten minutes on one core.

Each finished run goes into benchmarks/trouble/results.json at once, and is not run again unless its case, or the plan
that its window gives, has changed; `--again` runs everything anew. At the end docs/trouble.md is written from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

import advisor
from advisor.plan import Plan
from benchmarks.trouble import page
from benchmarks.trouble.cases import CASES, Case
from benchmarks.trouble.training import final_loss, window_of
from benchmarks.trouble.verdict import SEEDS

RESULTS = Path(__file__).parent / "results.json"
HARDWARE = "h100"


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help=f"cases to run, by default all: {', '.join(CASES)}")
    parser.add_argument("--again", action="store_true", help="forget earlier results of these cases")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in asked.case or CASES:
        run_case(CASES[name], results, asked.again)
    page.write({name: results[name] for name in CASES if name in results})


def run_case(case: Case, results: dict[str, Any], again: bool) -> None:
    """One case: its window, what that says, its plans, and all runs of all arms that are not there yet."""
    window = window_of(case)
    told = [
        one for one in advisor.diagnose(window) if (one.cause, one.site, one.role) == (case.cause, case.site, case.role)
    ]
    plan = advisor.recommend(window, hardware=HARDWARE, **case.advice)
    arms: dict[str, Plan | None] = {"fp32": None, "uniform": case.uniform(window), "plan": plan}
    settings = {
        "planted": case.planted,
        "recipe": case.recipe,
        "cause": case.cause,
        "site": case.site,
        "role": case.role,
        "steps": case.steps,
        "start": case.start,
        "window": case.window,
        "held_out": case.held_out,
    }
    before = results.get(case.name, {})
    if again or any(before.get(key) != value for key, value in settings.items()):
        before = {}
    results[case.name] = {
        **settings,
        "told": str(told[0]) if told else None,
        "severe": bool(told and told[0].severe),
        "share_8bit": plan.predicted.share_8bit,
        "stored": [f"{row.name} {row.role}: {row.cast}" for row in plan.storage],
        "loss_scale": plan.loss_scaling.scale,
        "arms": {},
    }
    for arm, carried in arms.items():
        digest = None if carried is None else digest_of(carried)
        known = before.get("arms", {}).get(arm, {})
        losses = dict(known.get("losses", {})) if known.get("plan") == digest else {}
        results[case.name]["arms"][arm] = {"plan": digest, "losses": losses}
        for seed in SEEDS:
            if str(seed) not in losses:
                began = time.perf_counter()
                loss = final_loss(case, seed, carried)
                losses[str(seed)] = loss if math.isfinite(loss) else str(loss)
                print(f"{case.name}, {arm}, seed {seed}: {loss:.4f} ({time.perf_counter() - began:.1f} s)", flush=True)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def digest_of(plan: Plan) -> str:
    """Of what a plan does, not of what it says."""
    done = {
        "casts": [(one.site, one.role, one.cast) for one in plan.assignments],
        "storage": [(one.name, one.role, one.cast) for one in plan.storage],
        "loss_scaling": (plan.loss_scaling.kind, plan.loss_scaling.scale, plan.loss_scaling.growth_interval),
    }
    return hashlib.sha256(json.dumps(done).encode()).hexdigest()[:16]


if __name__ == "__main__":
    main()
