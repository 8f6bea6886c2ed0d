"""How long scoring takes: `OMP_NUM_THREADS=1 python benchmarks/score_speed.py`.

A window of 5,000 slots and 20 recorded steps is made up (normal, heavy-tailed and small-gradient magnitudes in float32,
`--bf16` a share of them in bf16; each step with a scale of its own) and scored for 40 casts. Printed, once the kernels
are compiled: the seconds that `advisor.score` takes, which makes the columns, and those that `rows`, made when first
asked for, takes after it, by the clock and by the processor; and what the plain path (`advisor.metrics.measure`)
takes for the metrics alone, from a few slots, scaled up.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import advisor
from advisor.metrics import measure
from probes.casts import Cast
from probes.history import SlotHistory, SparseRow, history_of, sparse_row
from probes.records import Coverage, Evidence, Product, Site, Slot
from probes.sketch import SketchArray
from probes.window import Contents, Window

FORMATS = ("e4m3fn", "e5m2", "int8", "e3m4", "e4m3fnuz", "e5m2fnuz", "e2m3", "e3m2", "e2m1", "int4")
SCALES = ("tensor/current", "tensor/current:pow2", "tensor/delayed(len=16,margin=0)")
CASTS = (
    *(f"{name}/{scale}" for name in FORMATS for scale in SCALES),
    *("bf16", "fp16", "tf32", "fp32", "e4m3fn/none", "e5m2/none", "int8/tensor/static=0.05"),
    *("e4m3fn/tensor/current/stochastic", "e5m2/tensor/current/stochastic", "e4m3fn/tensor/current/zero"),
)
ROLES = ("input", "weight", "grad_output")
SAMPLES = 100_000  # elements of a tensor


def drawn(kind: int, generator: torch.Generator) -> torch.Tensor:
    """A tensor of one of four kinds."""
    x = torch.randn(SAMPLES, generator=generator)
    if kind == 1:
        return x * (0.7 * torch.randn(SAMPLES, generator=generator)).exp() * 1e-5
    if kind == 2:
        return torch.nn.functional.gelu(x)
    return x.bfloat16().float() if kind == 3 else 0.02 * x


def steps_of(kind: int, steps: int, generator: torch.Generator) -> list[SparseRow]:
    """Real sketches of tensors of one kind, a step each, of slowly rising magnitude."""
    array, rows = SketchArray(1), []
    for step in range(steps):
        array.sums.zero_()
        array.extremes.copy_(torch.tensor([[0.0, -np.inf, 0.0, 0.0]]))
        x = drawn(kind, generator) * float(2 ** (0.02 * step + torch.rand(1, generator=generator).item()))
        array.add(0, x.bfloat16().float() if kind == 3 else x)
        rows.append(sparse_row(step, array.sums[0].numpy(), array.extremes[0].numpy()))
    return rows


def made_up(slots: int, steps: int, measured: Sequence[str], bf16: float) -> Window:
    """A window of this size; a share `bf16` of its slots holds bf16 values."""
    generator = torch.Generator().manual_seed(0)
    pool = [[history_of(steps_of(kind, steps, generator)) for _ in range(8)] for kind in range(4)]
    random = np.random.default_rng(0)
    sites: list[Site] = []
    histories: dict[Slot, SlotHistory] = {}
    evidence: dict[Slot, Evidence] = {}
    names = [str(Cast.parse(cast)) for cast in measured]
    for index in range(-(-slots // len(ROLES))):
        name = f"blocks.{index}.up"
        flops = tuple(
            Product(product, operands, 1e9)
            for product, operands in (
                ("forward", ("input", "weight")),
                ("input_grad", ("grad_output", "weight")),
                ("weight_grad", ("grad_output", "input")),
            )
        )
        shapes = dict.fromkeys(ROLES, (SAMPLES,))
        dtypes = dict.fromkeys(ROLES, "float32")
        sites.append(Site(name, "linear", ROLES, shapes, dtypes, dict.fromkeys(ROLES, 1e5), flops, None, 1.0))
        for place, role in enumerate(ROLES[: slots - len(histories)]):
            kind = 3 if random.random() < bf16 else (2, 0, 1)[place]
            # No two slots are alike: a power of two moves the bins and leaves all else.
            histories[Slot(name, role)] = shifted(pool[kind][index % 8], int(random.integers(-3, 4)))
            errors = dict(zip(names, (1e-4 * random.random(len(names))).tolist(), strict=True))
            evidence[Slot(name, role)] = Evidence(
                curvature=1.0,
                directional={} if role == "grad_output" else errors,
                directional_se={} if role == "grad_output" else errors,
                relative_noise=errors,
                batch_noise=0.5,
            )
    contents = Contents(
        "Made", "Adam", {}, tuple(range(steps)), (1.0,) * steps, tuple(sites), Coverage(1.0), histories, evidence,
        curvature_from="loss",
    )  # fmt: skip
    return Window(contents)


def shifted(history: SlotHistory, octaves: int) -> SlotHistory:
    """The same tensor times a power of two."""
    factor = 2.0**octaves
    return replace(
        history,
        bins=(history.bins.astype(np.int64) + 8 * octaves).clip(0).astype(np.uint16),
        amax=(history.amax * factor).astype(np.float32),
        amin=(history.amin * factor).astype(np.float32),
        sum_of_squares=history.sum_of_squares * factor**2,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the window, score it, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slots", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--bf16", type=float, default=0.0, help="share of the slots that hold bf16 values")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", type=int, default=10, help="slots that the plain path is timed on")
    asked = parser.parse_args(arguments)
    window = made_up(asked.slots, asked.steps, advisor_defaults(), asked.bf16)
    advisor.score(made_up(3, 2, advisor_defaults(), 0.5), CASTS)  # compiles
    columns, rows, processor = [], [], []
    for _ in range(asked.rounds):
        begin, busy = time.perf_counter(), time.process_time()
        scores = advisor.score(window, CASTS)
        middle, busy_columns = time.perf_counter(), time.process_time() - busy
        count = len(scores.rows)
        columns.append(middle - begin)
        rows.append(time.perf_counter() - middle)
        processor.append((busy_columns, time.process_time() - busy - busy_columns))
        del scores
    plain = plain_seconds(window, asked.plain)
    found: dict[str, Any] = {
        "slots": asked.slots,
        "casts": len(CASTS),
        "steps": asked.steps,
        "rows": count,
        "occupied_bins_a_step": round(
            float(np.mean([len(window.history(*slot).bins) for slot in window.slots])) / asked.steps
        ),
        "score_s": round(float(np.median(columns)), 3),
        "rows_s": round(float(np.median(rows)), 3),
        "score_processor_s": round(float(np.median([a for a, _ in processor])), 3),
        "score_processor_least_s": round(min(a for a, _ in processor), 3),
        "rows_processor_s": round(float(np.median([b for _, b in processor])), 3),
        "plain_processor_s": round(plain, 1),
    }
    print(json.dumps(found, indent=1))


def advisor_defaults() -> tuple[str, ...]:
    """The casts that a window measures by default."""
    return "e4m3fn", "e5m2", "int8", "bf16", "fp16"


def plain_seconds(window: Window, slots: int) -> float:
    """What the plain path would take for the whole window: its metrics alone."""
    some = window.slots[:: max(len(window.slots) // slots, 1)][:slots]
    begin = time.process_time()
    for slot in some:
        for cast in CASTS:
            measure(window.history(*slot), Cast.parse(cast), window.dtype(slot)).pooled()
    return (time.process_time() - begin) / len(some) * len(window.slots)


if __name__ == "__main__":
    main()
