"""Sites and scores for the planner's tests, written down instead of recorded."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from advisor.candidates import Candidate, Row
from advisor.cost import enters_gradient
from advisor.product_casts import FOLLOWED
from probes.casts import Cast
from probes.records import GRADIENT, Product, Site

CASTS = ("e4m3fn", "e5m2", "int8", "bf16", "fp16")
COST = {"e4m3fn": 1.0, "e5m2": 4.1, "int8": 0.3, "bf16": 1e-3, "fp16": 1e-4}


def linear(name: str = "up", inputs: int = 64, outputs: int = 32, batch: int = 16, dtype: str = "float32") -> Site:
    roles = ("input", "weight", "grad_output")
    flops = 2.0 * inputs * outputs * batch
    return Site(
        name=name,
        op="linear",
        roles=roles,
        shapes={"input": (batch, inputs), "weight": (outputs, inputs), "grad_output": (batch, outputs)},
        dtypes=dict.fromkeys(roles, dtype),
        elements={"input": batch * inputs, "weight": outputs * inputs, "grad_output": batch * outputs},
        products=(
            Product("forward", ("input", "weight"), flops),
            Product("input_grad", ("grad_output", "weight"), flops),
            Product("weight_grad", ("input", "grad_output"), flops),
        ),
        parameter=f"{name}.weight",
        calls=1.0,
    )


def attention(name: str = "attn/sdpa.0") -> Site:
    roles = ("query", "key", "value", "grad_output")
    return Site(
        name=name,
        op="sdpa",
        roles=roles,
        shapes=dict.fromkeys(roles, (2, 4, 8, 8)),
        dtypes=dict.fromkeys(roles, "float32"),
        elements=dict.fromkeys(roles, 512.0),
        products=(
            Product("scores", ("query", "key"), 1000.0),
            Product("values", ("probabilities", "value"), 1000.0),
            Product("probabilities_grad", ("grad_output", "value"), 1000.0),
            Product("value_grad", ("probabilities", "grad_output"), 1000.0),
        ),
        parameter=None,
        calls=1.0,
    )


def score(site: str, role: str, cast: str, cost: float | None, **parts: Any) -> dict[str, Any]:
    """One row as `Scores.rows` has it: `cost` is the damage (of a gradient: nothing) and the noise ratio."""
    gradient = role == "grad_output"
    row = {
        "site": site,
        "role": role,
        "cast": cast,
        "underflow": 0.0002,
        "subnormal": 0.01,
        "overflow": 0.0,
        "sqnr_db": 31.5,
        "dynamic_range_bits": 20.0,
        "exponent_bits": 5.0,
        "amax": 4.0,
        "rms": 1.0,
        "damage": None if gradient else cost,
        "damage_se": None if gradient or cost is None else cost / 10,
        "damage_from": None if gradient else "directional",
        "noise_ratio": cost,
        "lost_batch_share": None if cost is None else cost / (1 + cost),
        "bias": 0.0,
        "flags": [],
    }
    return row | parts


def scores(sites: Sequence[Site], seed: int = 0, lowest: float = -7, highest: float = -3) -> list[dict[str, Any]]:
    """Every usual cast on every slot, costs over some decades; int8 is better or far worse, by chance."""
    draw = random.Random(seed)
    rows = []
    for site in sites:
        for role in site.roles:
            size = 10 ** draw.uniform(lowest, highest)
            cost = COST | {"int8": draw.choice([0.3, 600.0])}
            rows += [score(site.name, role, cast, size * cost[cast]) for cast in CASTS]
    return rows


def flops(sites: Sequence[Site]) -> float:
    return math.fsum(site.flops for site in sites)


def candidate(site: Site, role: str, cast: Cast, row: Row) -> Candidate | None:
    """The plain way to what `SlotScores` has as columns; None where damage or noise is unknown or not finite.

    None too for scales by row or block where the products cannot be cast one by one.
    """
    if not cast.has_one_scale and site.op not in FOLLOWED:
        return None
    damage = 0.0 if role == GRADIENT else _finite(row.get("damage"))
    noise = _finite(row.get("noise_ratio"))
    if noise is None and row.get("noise_ratio") is None and not enters_gradient(site, role):
        noise = 0.0
    return None if damage is None or noise is None else Candidate(cast, damage, noise, row)


def _finite(value: Any) -> float | None:
    """The number where it is finite, at least 0; None otherwise. An estimate below 0 is noise around 0."""
    if value is None or not math.isfinite(value):
        return None
    return max(0.0, float(value))
