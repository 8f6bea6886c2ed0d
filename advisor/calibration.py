"""The CPU at hand as hardware to plan for, measured in about two seconds.

    plan = advisor.recommend(window, hardware=advisor.measured_cpu())

The row `cpu` of the table is such a measurement, fixed once, so that a plan made for it is the same everywhere. This
one is of the machine that it runs on, with torch's present number of threads, and differs a little from call to call;
so do plans that are made for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from advisor.device import Hardware

SIDE = 512  # of the matrices that rates are measured on
_COPIED = 1 << 26  # bytes: more than caches near the cores hold
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def measured_cpu(repeats: int = 7) -> Hardware:
    """This CPU's rates, bandwidth and memory; each the best of `repeats` runs, of 1 or more.

    What large products reach is measured as such, so the parts of the peak are 1. torch._scaled_mm has no 8-bit kernel
    on a CPU (2.13 widens its operands), so 8-bit floats are in no pair; torch._int_mm takes int8.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats!r}: at least one run is needed")
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(SIDE, SIDE, generator=generator)
    rates = {name: _rate_tflops(_squared(square.to(dtype)), repeats) for name, dtype in _DTYPES.items()}
    whole = torch.randint(-127, 128, (SIDE, SIDE), dtype=torch.int8, generator=generator)
    rates["int8"] = _rate_tflops(lambda: torch._int_mm(whole, whole), repeats)
    source, target = torch.ones(_COPIED // 4), torch.zeros(_COPIED // 4)
    copy_s = _best_s(lambda: target.copy_(source), repeats)
    small = torch.ones(4, 4)
    start_s = _best_s(lambda: [small @ small for _ in range(100)], repeats) / 100
    return Hardware(
        name="cpu",
        title=f"this CPU, {torch.get_num_threads()} threads",
        pairs=frozenset((name, name) for name in ("fp32", "bf16", "fp16", "int8")),
        granularities=frozenset({"tensor", "row"}),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        tflops=rates | {"tf32": rates["fp32"]},
        bandwidth_bytes_s=2 * _COPIED / copy_s,
        launch_s=start_s,
        product_start_s=start_s,
        inner_layout=False,
        source=f"measured: products of {SIDE} × {SIDE} matrices, a copy of {_COPIED >> 20} MiB, products of 4 × 4",
        note="no kernel multiplies 8-bit floats on a CPU",
    )


def _squared(square: Tensor) -> Callable[[], Tensor]:
    return lambda: square @ square


def _rate_tflops(product: Callable[[], Tensor], repeats: int) -> float:
    return 2 * SIDE**3 / _best_s(product, repeats) / 1e12


def _best_s(run: Callable[[], object], repeats: int) -> float:
    run()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best
