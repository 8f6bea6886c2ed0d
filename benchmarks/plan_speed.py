"""How long a plan takes: 5,000 slots with 40 casts each, stage by stage.

    python benchmarks/plan_speed.py [--sites 1700] [--seed 0]

Scores are synthetic, for a model of that size takes long to train here. Two kinds of sites: `alike`, the four products
of a transformer's attention and three of a gated MLP, layer after layer, as real models have them; and `unlike`, every
site of its own random sizes, which no model has and which is the hardest for a solver, for no two sums of FLOPs agree.
Damage and noise of a slot are log-normal over the slots (a factor of 6 either way), and for a cast in proportion to the
energy of its rounding error, give or take a quarter; the tolerance is what about half of the FLOPs in 8 bits
cost, and the limit on lost batch binds beside it.

Stages: `menus` prunes, `solve` is the four goals of the plan, `front` its points at other tolerances, and `plan` is
`plan_from_rows` whole, with reasons, which repeats the others.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from advisor.candidates import SlotScores
from advisor.hardware import hardware_named
from advisor.menu import Limits, menus
from advisor.objectives import Budget, Task
from advisor.planner import plan_from_rows
from advisor.restrictions import Restrictions
from advisor.selection import Frame, front, select
from probes.records import Product, Site

# Energy of a cast's rounding error, e4m3fn's with a scale taken as 1.
FORMATS = {
    "e4m3fn": 1.0,
    "e5m2": 4.1,
    "int8": 0.3,
    "bf16": 1e-3,
    "fp16": 2e-5,
    "e3m4": 0.3,
    "e2m5": 0.4,
    "e2m3": 16.0,
    "e3m2": 16.0,
    "e2m1": 200.0,
    "int4": 60.0,
    "e4m3fnuz": 1.0,
    "e5m2fnuz": 4.1,
    "tf32": 1e-5,
}
SCALINGS = {"none": 3.0, "tensor/current": 1.0, "tensor/current:pow2": 1.3}
CASTS = [(f"{name}/{how}", error * worse) for name, error in FORMATS.items() for how, worse in SCALINGS.items()][:40]
# Inputs and outputs of a layer's products: query, key, value, output, gate, up, down; 4,096 tokens.
LAYER = ((2048, 2048), (2048, 512), (2048, 512), (2048, 2048), (2048, 5632), (2048, 5632), (5632, 2048))
TOKENS = 4096
LOST_BATCH = 0.002

Made = TypeVar("Made")


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--sites", type=int, default=1700)
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    print(f"{given.sites} sites, {3 * given.sites} slots, {len(CASTS)} casts a slot; CPU and wall seconds")
    for kind in ("alike", "unlike"):
        measure(kind, given.sites, given.seed)


def measure(kind: str, count: int, seed: int) -> None:
    """Prints a line for each stage."""
    sites, rows, tolerance = instance(kind, count, seed)
    hardware, limits = hardware_named("h100"), Limits(tolerance, LOST_BATCH)
    total = sum(site.flops for site in sites)
    options = timed(f"{kind}: menus", lambda: menus(SlotScores(sites, rows), hardware))
    left = np.mean(
        [len(timed_group.group.gains) for timed_group in timed(f"{kind}: groups", lambda: _grouped(options))]
    )
    print(f"  {left:.0f} combinations a site are left of {(len(CASTS) + 1) ** 3}")
    chosen = timed(f"{kind}: solve", lambda: select(options, limits, Frame(total)))
    print(f"  proven: {chosen.proven}; at most {chosen.gap:.1e} of the FLOPs more")
    timed(f"{kind}: front", lambda: front(options, limits, tolerance, Frame(total)))
    for name, task, restrictions in (
        ("plan", Task(), Restrictions()),
        ("plan for memory", Task("memory"), Restrictions()),
        ("plan for time", Task("time"), Restrictions()),
        ("plan of least damage", Task("damage", Budget(share_8bit=0.4)), Restrictions()),
        ("plan, one cast a role", Task(), Restrictions(uniform_roles=True)),
    ):
        plan = timed(f"{kind}: {name}", lambda t=task, r=restrictions: _plan(sites, rows, tolerance, total, t, r))
        told = plan.predicted
        print(
            f"  {100 * told.share_8bit:.2f}% in 8 bits, {told.time_s:.6g} s, {told.memory_bytes:.6g} bytes, "
            f"damage {told.damage:.6g}; optimal: {told.optimal}, gap {told.optimal_gap:.1e}"
        )


def _grouped(options: Sequence[Any]) -> Sequence[Any]:
    for menu in options:
        _ = menu.group
    return options


def _plan(sites: Sequence[Site], rows: Sequence[Any], tolerance: float, total: float, task: Any, how: Any) -> Any:
    return plan_from_rows(
        sites,
        rows,
        hardware=hardware_named("h100"),
        tolerance=tolerance,
        max_lost_batch=LOST_BATCH,
        total_flops=total,
        mean_loss=2.0,
        task=task,
        restrictions=how,
    )


def timed(what: str, work: Callable[[], Made]) -> Made:
    """What the work gives, with its time printed."""
    start, on_the_wall = time.process_time(), time.perf_counter()
    made = work()
    cpu, wall = time.process_time() - start, time.perf_counter() - on_the_wall
    print(f"{what:<32} {cpu:6.2f} {wall:8.2f}", flush=True)
    return made


def instance(kind: str, count: int, seed: int) -> tuple[list[Site], list[dict[str, Any]], float]:
    """Sites, their scores, and a tolerance that about half of their FLOPs fit in."""
    draw = np.random.default_rng(seed)
    sites = []
    for place in range(count):
        inputs, outputs = LAYER[place % len(LAYER)] if kind == "alike" else 16 * draw.integers(8, 400, 2)
        sites.append(_linear(f"layers.{place // len(LAYER)}.{place % len(LAYER)}", int(inputs), int(outputs)))
    rows, whole = [], 0.0
    for site in sites:
        for role in site.roles:
            size = 1e-6 * float(np.exp(draw.normal(0.0, 1.8)))
            noise = size * float(np.exp(draw.normal(0.0, 0.7)))
            factors = np.exp(draw.normal(0.0, 0.25, (len(CASTS), 2)))
            for (cast, error), (one, other) in zip(CASTS, factors.tolist(), strict=True):
                rows.append(_score(site.name, role, cast, size * error * one, noise * error * other))
            whole += size
    return sites, rows, whole / 120


def _linear(name: str, inputs: int, outputs: int) -> Site:
    roles = ("input", "weight", "grad_output")
    flops = 2.0 * inputs * outputs * TOKENS
    return Site(
        name=name,
        op="linear",
        roles=roles,
        shapes={"input": (TOKENS, inputs), "weight": (outputs, inputs), "grad_output": (TOKENS, outputs)},
        dtypes=dict.fromkeys(roles, "bfloat16"),
        elements={"input": TOKENS * inputs, "weight": outputs * inputs, "grad_output": TOKENS * outputs},
        products=(
            Product("forward", ("input", "weight"), flops),
            Product("input_grad", ("grad_output", "weight"), flops),
            Product("weight_grad", ("input", "grad_output"), flops),
        ),
        parameter=f"{name}.weight",
        calls=1.0,
    )


def _score(site: str, role: str, cast: str, damage: float, noise: float) -> dict[str, Any]:
    gradient = role == "grad_output"
    return {
        "site": site,
        "role": role,
        "cast": cast,
        "underflow": 0.0002,
        "subnormal": 0.01,
        "overflow": 0.0,
        "sqnr_db": 31.5,
        "amax": 4.0,
        "rms": 1.0,
        "damage": None if gradient else damage,
        "damage_se": None if gradient else damage / 10,
        "damage_from": None if gradient else "directional",
        "noise_ratio": noise,
        "bias": 0.0,
        "flags": [],
    }


if __name__ == "__main__":
    main()
