"""Every one of the 2^32 float32 inputs, cast by us and by ml_dtypes: `python benchmarks/exhaustive.py`.

Rounding to nearest, with overflow to Inf or NaN where the format has one, as ml_dtypes overflows; e2m1 has neither and
saturates in both. (fp16 is numpy's own.) Results are compared bit for bit, any NaN being as good as another. One
difference is a rule and not an error: a NaN stays a NaN here in e2m1 too, which has no code for it and in which
ml_dtypes writes -0. Those inputs must give NaN, and are counted apart.

Takes some ten minutes on two cores and writes `exhaustive.json` beside this file. `--stride 257` looks at every 257th
input and only prints. The exit status is 0 where nothing differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from probes.casts import Cast
from probes.formats import FORMATS

CASTS = {
    "e4m3fn": ("e4m3fn/none/nearest:inf", ml_dtypes.float8_e4m3fn),
    "e5m2": ("e5m2/none/nearest:inf", ml_dtypes.float8_e5m2),
    "e2m1": ("e2m1/none/nearest", ml_dtypes.float4_e2m1fn),
    "fp16": ("fp16/none/nearest:inf", np.float16),
    "bf16": ("bf16/none/nearest:inf", ml_dtypes.bfloat16),
}
RESULT = Path(__file__).with_suffix(".json")
INPUTS = 1 << 32
CHUNK = 1 << 24  # patterns that a process takes at a time
PART = 1 << 18  # of which so many at once, to stay in the cache
SHOWN = 5


@dataclass
class Compared:
    """What came of some inputs. `first` holds a few that differ: bits of the input, of our result, of theirs."""

    inputs: int = 0
    mismatches: int = 0
    nan_kept: int = 0
    first: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, other: Compared) -> None:
        """Take in the next inputs."""
        self.inputs += other.inputs
        self.mismatches += other.mismatches
        self.nan_kept += other.nan_kept
        self.first = [*self.first, *other.first][:SHOWN]


def compare(name: str, start: int, stride: int) -> Compared:
    """One chunk of patterns, in a process of its own."""
    torch.set_num_threads(1)
    text, dtype = CASTS[name]
    cast, found = Cast.parse(text), Compared()
    codes = np.arange(1 << 8 * np.dtype(dtype).itemsize, dtype=f"u{np.dtype(dtype).itemsize}")
    with np.errstate(invalid="ignore", over="ignore"):
        decoded = codes.view(dtype).astype(np.float32).view(np.uint32)  # looked up faster than cast back
        for first in range(start, start + CHUNK, PART * stride):
            inputs = np.arange(first, min(first + PART * stride, start + CHUNK), stride, dtype=np.int64)
            bits = inputs.astype(np.uint32)
            ours = cast(torch.from_numpy(bits.view(np.float32))).numpy().view(np.uint32)
            theirs = decoded[bits.view(np.float32).astype(dtype).view(codes.dtype)]
            found.inputs += bits.size
            other = np.flatnonzero(ours != theirs)
            if other.size:
                found.add(_apart(bits[other], ours[other], theirs[other], not _has_nan(name)))
    return found


def _apart(bits: Any, ours: Any, theirs: Any, keeps_nan: bool) -> Compared:
    """Of results whose bits differ, those that are not a NaN in both."""
    both = np.isnan(ours.view(np.float32)) & np.isnan(theirs.view(np.float32))
    kept = np.isnan(ours.view(np.float32)) & np.isnan(bits.view(np.float32)) & keeps_nan
    wrong = np.flatnonzero(~both & ~kept)
    first = [(f"{bits[at]:#010x}", f"{ours[at]:#010x}", f"{theirs[at]:#010x}") for at in wrong[:SHOWN]]
    return Compared(mismatches=wrong.size, nan_kept=int(kept.sum()), first=first)


def _has_nan(name: str) -> bool:
    return FORMATS[name].overflow is not None


def run(names: Sequence[str], stride: int, processes: int) -> Iterator[tuple[str, Compared, float]]:
    """Each format's comparison and its seconds, with a progress bar."""
    starts = [-(-chunk // stride) * stride for chunk in range(0, INPUTS, CHUNK)]
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with Progress(*columns) as progress, ProcessPoolExecutor(processes, context) as pool:
        bars = {name: progress.add_task(name, total=len(starts), start=False) for name in names}
        for name in names:
            progress.start_task(bars[name])
            began, total = time.perf_counter(), Compared()
            for found in pool.map(compare, [name] * len(starts), starts, [stride] * len(starts)):
                total.add(found)
                progress.advance(bars[name])
            yield name, total, time.perf_counter() - began


def _cpu() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and write what a full run found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=CASTS, default=list(CASTS))
    parser.add_argument("--stride", type=int, default=1, help="look at every so many inputs, and only print")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2)
    asked = parser.parse_args(arguments)
    if not 1 <= asked.stride <= CHUNK:
        parser.error(f"--stride {asked.stride}: from 1 to {CHUNK}")
    formats = {}
    for name, found, seconds in run(asked.formats, asked.stride, asked.processes):
        cast, dtype = CASTS[name]
        formats[name] = {"cast": cast, "oracle": np.dtype(dtype).name, **asdict(found), "seconds": round(seconds, 1)}
        print(f"{cast:<26}{found.inputs:>14,} inputs{found.mismatches:>8,} differ{seconds:>8.0f} s", *found.first)
    told = {
        "date": date.today().isoformat(),
        "cpu": _cpu(),
        "processes": asked.processes,
        "versions": {name: version(name) for name in ("torch", "ml_dtypes", "numpy", "numba")},
        "formats": formats,
    }
    if asked.stride == 1 and list(formats) == list(CASTS):
        RESULT.write_text(json.dumps(told, indent=2) + "\n")
    return int(any(entry["mismatches"] for entry in formats.values()))


if __name__ == "__main__":
    sys.exit(main())
