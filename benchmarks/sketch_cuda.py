"""How fast the sketch reads on a CUDA device, beside a copy: `python benchmarks/sketch_cuda.py`. Needs such a device.

What is measured. A candidate is `probes.sketch_triton.add` on one tensor, or `out.copy_(x)` of the same tensor, timed
as in `cast_speed.py`: on the device by events, many calls queued behind a waiting kernel, interleaved in an order that
is shuffled each round; medians over rounds, and of ratios within a round. Several tensors of a size take turns, so that
together they are at least four times the second-level cache: what is read comes from memory.

    of a copy          bytes read a second, over those that the copy reads a second: the goal is 0.7
    of its traffic     the same, over what the copy reads and writes a second, which is the memory's bandwidth
    host us            what a call takes of the host's time, nothing being waited for

The kinds of values: `normal`; `relu`, half of them zeros; `wide`, magnitudes even over 200 octaves; `equal`, all in one
bin; `nan`, normal with one NaN in each 100,000, where nearly all is read twice; `one bank`, powers of 16, the worst
case for counters in shared memory.

Before anything is timed each dtype and kind is held against the CPU's kernel (counts and extremes must be equal), with
torch's synchronisation check set to raise, and in a CUDA graph. Exits with 1 if they differ, with 2 without a device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from cast_speed import interleaved
from torch import Tensor

from probes import kernels
from probes.layout import EXTREMES, SUM_OF_SQUARES, SUMS
from probes.sketch import EMPTY_EXTREMES

SIZES = (1 << 16, 1 << 20, 1 << 24, 1 << 26, 1 << 28)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("normal", "relu", "wide", "equal", "nan", "one bank")
GOAL = 0.7
CHECKED_SIZE = (1 << 20) + 12_345
HOST_CALLS = 200


def values(kind: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size], of this kind, the same for each call."""
    draws = torch.Generator(device).manual_seed(size)
    x = torch.randn(size, generator=draws, device=device)
    if kind == "relu":
        x = x.relu()
    elif kind == "wide":
        x = torch.exp2(torch.rand(size, generator=draws, device=device) * 200 - 100)
    elif kind == "equal":
        x = torch.full_like(x, 1.25)
    elif kind == "nan":
        x[::100_000] = torch.nan
    elif kind == "one bank":
        x = torch.exp2(4.0 * torch.randint(-16, 16, (size,), generator=draws, device=device))
    return x.to(dtype)


def empty_row(device: torch.device) -> tuple[Tensor, Tensor]:
    """`sums` and `extremes` of one slot."""
    return torch.zeros(SUMS, dtype=torch.float64, device=device), torch.tensor(EMPTY_EXTREMES, device=device)


def differs(add: Callable[..., None], x: Tensor) -> str | None:
    """What is not as on the CPU, called once and replayed once from a graph; None if all is."""
    sums, extremes = empty_row(x.device)
    add(*empty_row(x.device), x)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        add(sums, extremes, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add(sums, extremes, x)
    graph.replay()
    expected_sums, expected_extremes = np.zeros(SUMS), np.array(EMPTY_EXTREMES, dtype=np.float32)
    for _ in range(2):
        kernels.add(expected_sums.ctypes.data, expected_extremes.ctypes.data, x.cpu())
    found_sums, found_extremes = sums.cpu().numpy(), extremes.cpu().numpy()
    if not np.array_equal(found_sums[:SUM_OF_SQUARES], expected_sums[:SUM_OF_SQUARES]):
        return f"{int((found_sums != expected_sums)[:SUM_OF_SQUARES].sum())} counts"
    if not np.array_equal(found_extremes, expected_extremes):
        return f"extremes: {found_extremes[:EXTREMES]}, not {expected_extremes}"
    if not np.isclose(found_sums[SUM_OF_SQUARES], expected_sums[SUM_OF_SQUARES], rtol=1e-12, atol=0):
        return f"sum of squares: {found_sums[SUM_OF_SQUARES]}, not {expected_sums[SUM_OF_SQUARES]}"
    return None


def host_seconds(run: Callable[[], object]) -> float:
    """Of a call, without waiting for the device."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(HOST_CALLS):
        run()
    took = (time.perf_counter() - start) / HOST_CALLS
    torch.cuda.synchronize()
    return took


def measured(add: Callable[..., None], kind: str, size: int, name: str, rounds: int, device: torch.device) -> dict:
    """One row of the table."""
    dtype = DTYPES[name]
    read_bytes = size * dtype.itemsize
    cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    tensors = [values(kind, size, dtype, device)]
    tensors += [tensors[0].clone() for _ in range(min(4 * cache_bytes // read_bytes, 256))]
    outs = [torch.empty_like(x) for x in tensors]
    row, to_read, to_copy = empty_row(device), cycle(tensors), cycle(zip(outs, tensors, strict=True))

    def sketch() -> None:
        add(*row, next(to_read))

    def copy() -> None:
        out, x = next(to_copy)
        out.copy_(x)

    times = interleaved({"sketch": sketch, "copy": copy}, rounds, device, lambda: None)
    ratio = float(np.median(times["copy"] / times["sketch"]))
    return {
        "dtype": name,
        "kind": kind,
        "size": size,
        "read_gb_per_s": read_bytes / float(np.median(times["sketch"])) / 1e9,
        "of_a_copy": ratio,
        "of_its_traffic": ratio / 2,
        "host_us": host_seconds(sketch) * 1e6,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="default 25")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="elements")
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=list(DTYPES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there as well")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and this torch finds none", file=sys.stderr)
        sys.exit(2)
    from probes.sketch_triton import add  # not before it is known that there is a device

    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}; torch {torch.__version__}; {asked.rounds} rounds")
    for name in asked.dtypes:
        for kind in asked.kinds:
            if wrong := differs(add, values(kind, CHECKED_SIZE, DTYPES[name], device)):
                sys.exit(f"{name}, {kind}: not as on the CPU: {wrong}")
    print("All counts and extremes are as on the CPU; nothing was waited for.\n")
    print(
        f"{'dtype':<10}{'values':<10}{'elements':>13}{'GB/s':>9}{'of a copy':>11}{'of its traffic':>16}{'host us':>9}"
    )
    rows = []
    for name in asked.dtypes:
        for kind in asked.kinds:
            for size in asked.sizes:
                row = measured(add, kind, size, name, asked.rounds, device)
                rows.append(row)
                print(
                    f"{name:<10}{kind:<10}{size:>13,}{row['read_gb_per_s']:>9,.0f}{row['of_a_copy']:>11.2f}"
                    f"{row['of_its_traffic']:>16.2f}{row['host_us']:>9.1f}"
                )
    print(f"\nThe goal is {GOAL} of a copy.")
    if asked.json:
        told = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "rows": rows}
        asked.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
