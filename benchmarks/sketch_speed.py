"""How fast a tensor is sketched, as times of a copy: `python benchmarks/sketch_speed.py`.

What is measured. `SketchArray.add` of one tensor, whole call, against `x.clone()` of the same. One timing is as many
calls in a row as take about a millisecond (one, for large tensors), divided by their number. A round times the sketch,
the clone and the clone once more, in an order that is shuffled anew; what is printed is the median over rounds of the
sketch's time divided by the clone's of the same round, with its quartiles. Reading at 0.8 of the clone's speed is a
ratio of 1.25. The two clones against each other are the noise of it all (A/A).

A clone has no single speed. While the copy is small, or the one before it has just been let go, malloc gives the same
memory again, and a copy that fits the last-level cache never meets the memory's own speed ("warm"). Where the memory is
new, as it is for what a training step keeps for its backward pass, the system first has to map it and to clear it
("kept": each copy is held until the timing is over). Both are printed. A sketch allocates nothing, and is the same in
both.

Values are normal, heavy-tailed (Student-t with two degrees of freedom), 90% zeros as after a ReLU, and constant: the
last two are the bad case of a histogram, whose increments of one place wait for each other. The layouts are those of
views that a model makes; their clone is a copy that is contiguous.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.sketch import SketchArray

SIZES = (1_000, 16_384, 131_072, 1 << 20, 1 << 22, 1 << 24)
LAYOUT_SIZE = 1 << 20
AIM = 1.25
LEAST_S = 1e-3  # of a timing, where calls are shorter
MOST_KEPT_BYTES = 256 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
VALUES: dict[str, Callable[[int, np.random.Generator], NDArray[Any]]] = {
    "normal": lambda size, draw: draw.standard_normal(size),
    "heavy": lambda size, draw: draw.standard_t(2, size),
    "sparse": lambda size, draw: np.maximum(draw.standard_normal(size) - 1.2816, 0),
    "constant": lambda size, _: np.full(size, 0.37),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t(),
    "a part of each row": lambda x: x[:, 128:640],
    "every other column": lambda x: x[:, ::2],
    "every other row": lambda x: x[::2],
    "expanded": lambda x: x[:16, None].expand(16, 64, x.shape[1]),
}


def tensor(values: str, dtype: str, size: int) -> Tensor:
    """Values of a kind, from a seed of their size."""
    drawn = VALUES[values](size, np.random.default_rng(size))
    return torch.from_numpy(drawn.astype(np.float32)).to(DTYPES[dtype])


def measure(x: Tensor, rounds: int, kept: bool) -> dict[str, Any]:
    """Medians of microseconds and of ratios, their quartiles, and the clone against itself."""
    array, shuffler = SketchArray(1), random.Random(0)

    def sketch() -> None:
        array.add(0, x)

    calls = {"sketch": _calls(sketch), "clone": _calls(x.clone)}
    if kept:
        calls["clone"] = max(1, min(calls["clone"], MOST_KEPT_BYTES // x.nbytes))
    found: dict[str, list[float]] = {"sketch": [], "clone": [], "again": []}
    order = list(found)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                if name == "sketch":
                    found[name].append(_seconds(sketch, calls[name]))
                elif kept:
                    found[name].append(_seconds_kept(x, calls["clone"]))
                else:
                    found[name].append(_seconds(x.clone, calls["clone"]))
    finally:
        gc.enable()
    times = {name: np.array(seconds) for name, seconds in found.items()}
    ratio, noise = times["sketch"] / times["clone"], times["again"] / times["clone"]
    return {
        "sketch_us": float(np.median(times["sketch"])) * 1e6,
        "clone_us": float(np.median(times["clone"])) * 1e6,
        "ratio": float(np.median(ratio)),
        "quartiles": np.quantile(ratio, (0.25, 0.75)).tolist(),
        "noise": float(np.median(noise)),
        "noise_quartiles": np.quantile(noise, (0.25, 0.75)).tolist(),
    }


def _calls(run: Callable[[], object]) -> int:
    for _ in range(3):
        run()
    return max(1, round(LEAST_S / max(min(_seconds(run, 1) for _ in range(5)), 1e-7)))


def _seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _seconds_kept(x: Tensor, calls: int) -> float:
    copies: list[Tensor | None] = [None] * calls
    start = time.perf_counter()
    for i in range(calls):
        copies[i] = x.clone()
    return (time.perf_counter() - start) / calls


def machine() -> str:
    """Processor, cores, versions and threads, in one line."""
    name = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"


def print_row(label: str, found: dict[str, Any]) -> None:
    """A case's line."""
    low, high = found["quartiles"]
    worst, best = found["noise_quartiles"][1], found["noise_quartiles"][0]
    print(
        f"{label:<52}{found['sketch_us']:>11,.1f}{found['clone_us']:>11,.1f}{found['ratio']:>8.2f}"
        f"  {low:>5.2f} to {high:<5.2f}{found['noise']:>7.2f}  {best:>5.2f} to {worst:<5.2f}",
        flush=True,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Time, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="for torch and for the sketch; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=25, help="default 25")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="elements")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16", "float16"])
    parser.add_argument("--values", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--memory", nargs="+", choices=["warm", "kept"], default=["warm", "kept"])
    parser.add_argument("--json", type=Path, help="write everything there, too")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(f"{machine()}; {options.rounds} rounds; load {os.getloadavg()[0]:.1f} at the start\n")
    head = f"{'sketch':>11}{'clone':>11}{'ratio':>8}  {'quartiles':<14}{'A/A':>7}  quartiles"
    print(f"{'dtype, values or layout, elements; clone':<52}{head}\n{'':<52}{'µs':>11}{'µs':>11}")
    rows = []
    for dtype in options.dtypes:
        for values in options.values:
            for size in options.sizes:
                for memory in options.memory:
                    found = measure(tensor(values, dtype, size), options.rounds, memory == "kept")
                    rows.append({"dtype": dtype, "values": values, "size": size, "memory": memory, **found})
                    print_row(f"{dtype}, {values}, {size:,}; {memory}", found)
    for dtype in options.dtypes:
        x = tensor("normal", dtype, LAYOUT_SIZE).view(1024, 1024)
        for layout, view in LAYOUTS.items():
            found = measure(view(x), options.rounds, False)
            rows.append({"dtype": dtype, "layout": layout, "size": view(x).numel(), "memory": "warm", **found})
            print_row(f"{dtype}, {layout}, {view(x).numel():,}; warm", found)
    print(f"\nThe aim is a ratio of {AIM} from a million elements on. Load {os.getloadavg()[0]:.1f} at the end.")
    if options.json:
        result = {"machine": machine(), "rounds": options.rounds, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
