"""What a relative sketch costs beside the tensor-wide one and a copy: one interleaved run, the least of each.

python benchmarks/tile_sketches.py [rows columns]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from probes.relative import RelativeArray, bytes_of
from probes.sketch import SketchArray
from probes.tiles import Axis, Tiling

TILINGS = (
    ("row", "current"),
    ("block32", "e8m0"),
    ("block16", "nvfp4"),
    ("block1x128", "current"),
    ("block128x128", "current"),
)
ROUNDS = 15


def main() -> None:
    torch.set_num_threads(1)
    rows, columns = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (4096, 1024)
    x = torch.randn(rows, columns)
    copy, whole, relative = torch.empty_like(x), SketchArray(1), RelativeArray[str]()
    cases: dict[str, Callable[[], object]] = {
        "copy": lambda: copy.copy_(x),
        "clone": x.clone,
        "tensor-wide": lambda: whole.add(0, x),
    }
    sizes = {}
    for granularity, kind in TILINGS:
        for across in (False, True):
            tiling = Tiling(granularity, kind, Axis(-1, across))
            cases[tiling.key] = lambda tiling=tiling: relative.add(tiling.key, x, tiling)  # type: ignore[misc]
            sizes[tiling.key] = bytes_of(tiling)
    spent: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(ROUNDS + 1):
        for name, case in cases.items():
            started = time.perf_counter()
            case()
            spent[name].append(time.perf_counter() - started)
    base = min(spent["tensor-wide"][1:])
    for name, times in spent.items():
        least = min(times[1:])
        size = f"{sizes[name] / 1024:6.1f} KiB a slot" if name in sizes else ""
        print(f"{name:32s} {least * 1e9 / x.numel():6.2f} ns an element {least / base:6.2f} × tensor-wide {size}")


if __name__ == "__main__":
    main()
