"""How long a cast takes, as times of a copy, and against other libraries: `python benchmarks/cast_speed.py`.

What is measured. A candidate is a full cast and back of a float32 tensor of normal values: scale, rounding, overflow,
the result newly allocated, as `x.clone()` allocates its own. One timing is as many calls in a row as take about 2 ms
(one, for large tensors), divided by their number. A round times every candidate once, in an order that is shuffled anew
each round; what is printed is the median over rounds of a candidate's time divided by the clone's in the same round.
Whatever slows the machine for longer than a round slows both.

What was there before matters. After an operation torch's threads spin for some milliseconds in wait of the next one:
that helps a clone that follows, and takes cores from whoever else wants to work, so a cast that always came after the
clone would look slower, and one that never did, faster, than among other operations. Hence the shuffle. `--before` sets
the scene instead: `clone` runs an untimed clone before each timing (torch's threads spin, as in a training step; the
worst case for us), `pause` sleeps until they have stopped.

On CUDA the times are the device's, by events. A short kernel that only waits goes first, so that launches are queued
and the gaps between them are not counted; a copy between two places of the device's memory, which is what x.clone() is
there, is the measure. Up to 4M values both fit into the cache of a large GPU: take 16M for the memory's own speed.

The second table gives the same work to other libraries (`peer_casts.py`; those that are missing are named) in the same
way. The factor is their time over ours, `same` the share of values that are equal to ours (no draw of a stochastic
rounding is another's). gfloat's blocks go value by value through Python; they are timed on a few and extrapolated.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peer_casts import PeerCast, installed
from torch import Tensor

from probes.casts import Cast

SIZES = (64, 4096, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
JUDGED_SIZE = 1 << 22
PEER_SIZES = (1 << 20, 1 << 22)

# What we set out for on 4M values, in clones: for the CPU; on CUDA every cast is to take at most CUDA_AIM copies.
AIMS: Mapping[str, float | None] = {
    "e4m3fn/tensor/current/nearest": 3.0,
    "e5m2/tensor/current/nearest": 3.0,
    "bf16/tensor/current/nearest": 3.0,
    "bf16/none/nearest": 3.0,
    "e4m3fn/none/nearest": 3.0,
    "e8m3/none/nearest": 5.0,
    "e8m3/tensor/current/nearest": 5.0,
    "e5m10/none/nearest": 5.0,
    "int8/tensor/current/nearest": None,
    "e4m3fn/tensor/current/stochastic": 5.0,
    "e8m3/none/stochastic": 5.0,
    "e4m3fn/tensor/current/zero": None,
    "e4m3fn/block32/e8m0/nearest": 5.0,
    "e4m3fn/block32/e8m0up/nearest": 5.0,
    "e2m1/block32/e8m0/nearest": 5.0,
    "e4m3fn/block32/e8m0/stochastic": None,
    "e2m1/block16/nvfp4/nearest": None,
    "e4m3fn/block1x128/current/nearest": None,
    "e4m3fn/block128x128/current/nearest": None,
    "e4m3fn/row/current/nearest": None,
    "e4m3fn/column/current/nearest": None,
}
CUDA_AIM = 1.3
PEER_WORK = ("e4m3fn/none/nearest", "e4m3fn/none/stochastic", "e4m3fn/block32/e8m0/nearest")

CLONE = "x.clone()"
LEAST_S = 2e-3  # of a timing, where calls are shorter
PAUSE_S = 0.02  # longer than torch's threads spin
WAIT_CYCLES = 20_000_000  # of the kernel that lets launches queue: some 10 ms
MOST_QUEUED = 20  # calls behind it: what the host can launch in that time

Seconds = NDArray[np.float64]


def matrix(size: int, device: torch.device) -> Tensor:
    """Normal values as a matrix, as square as powers of two allow, with at least a block's 32 columns."""
    columns = max(32, 1 << (size.bit_length() - 1) // 2)
    return torch.randn(size // columns, columns, generator=torch.Generator().manual_seed(size)).to(device)


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, before: Callable[[], object]
) -> dict[str, Seconds]:
    """Seconds a call [rounds] of each candidate: in every round one timing of each, in an order of the round's own.

    before  what is called, untimed, before each timing
    """
    clock = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    most = MOST_QUEUED if device.type == "cuda" else sys.maxsize
    calls, order, shuffler = {}, list(candidates), random.Random(0)
    for name, run in candidates.items():
        clock(run, 1)  # whatever is compiled on first use
        enough = round(LEAST_S / max(min(clock(run, 1) for _ in range(3)), 1e-7))
        calls[name] = min(max(1, enough), most)
    found: dict[str, list[float]] = {name: [] for name in candidates}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffler.shuffle(order)
            for name in order:
                before()
                found[name].append(clock(candidates[name], calls[name]))
    finally:
        gc.enable()
    return {name: np.array(times) for name, times in found.items()}


def against_clone(
    cast_names: Sequence[str], size: int, rounds: int, device: torch.device, before: str
) -> dict[str, Any]:
    """For each cast and the clone: microseconds, times of the clone, and the quartiles of those."""
    x = matrix(size, device)
    candidates: dict[str, Callable[[], object]] = {CLONE: x.clone}
    for name in cast_names:
        candidates[name] = _bound(Cast.parse(name), x)
    times = interleaved(candidates, rounds, device, _scene(before, x))
    ratios = {name: seconds / times[CLONE] for name, seconds in times.items()}
    return {
        name: {
            "microseconds": float(np.median(times[name])) * 1e6,
            "clones": float(np.median(ratios[name])),
            "quartiles": np.quantile(ratios[name], (0.25, 0.75)).tolist(),
        }
        for name in candidates
    }


def against_peers(
    peers: Sequence[PeerCast], work: str, size: int, rounds: int, device: torch.device, before: str
) -> list[dict[str, Any]]:
    """One row for each library's way to do the work, with the time of ours in the same rounds."""
    x, ours = matrix(size, device), Cast.parse(work)
    candidates: dict[str, Callable[[], object]] = {work: _bound(ours, x)}
    inputs = {}
    for peer in peers:
        given = x if peer.timed_on is None else x.flatten()[: peer.timed_on].view(-1, 32)
        candidates[f"{peer.library} {peer.call}"] = _bound(peer.run, given)
        inputs[f"{peer.library} {peer.call}"] = peer, given
    times = interleaved(candidates, rounds, device, _scene(before, x))
    rows = []
    for name, (peer, given) in inputs.items():
        seconds = times[name] * (size / given.numel())
        rows.append(
            {
                "work": work,
                "size": size,
                "library": peer.library,
                "call": peer.call,
                "timed_on": given.numel(),
                "milliseconds": float(np.median(seconds)) * 1e3,
                "ours_milliseconds": float(np.median(times[work])) * 1e3,
                "factor": float(np.median(seconds / times[work])),
                "same": None
                if ours.rounding == "stochastic"
                else float((peer.run(given) == ours(given)).double().mean()),
            }
        )
    return rows


def _bound(run: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: run(x)


def _scene(before: str, x: Tensor) -> Callable[[], object]:
    return {"shuffled": lambda: None, "clone": x.clone, "pause": lambda: time.sleep(PAUSE_S)}[before]


def _cpu_seconds(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _cuda_seconds(run: Callable[[], object], calls: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(WAIT_CYCLES)
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3 / calls


def print_ratios(found: Mapping[int, Mapping[str, Any]], cuda: bool) -> None:
    """Two tables: times of the clone, and microseconds."""
    sizes = "".join(f"{size:>12,}" for size in found)
    for title, field, digits in (("times of x.clone()", "clones", 2), ("microseconds", "microseconds", 1)):
        aim = "aim" if field == "clones" else ""
        print(f"\n{title:<40}{aim:>6}{sizes}")
        for name in next(iter(found.values())):
            wanted = (CUDA_AIM if cuda else AIMS[name]) if aim and name in AIMS else None
            cells = "".join(f"{rows[name][field]:>12,.{digits}f}" for rows in found.values())
            print(f"{name:<40}{'' if wanted is None else f'{wanted:g}':>6}{cells}")
    if JUDGED_SIZE in found:
        print(f"\nThe aim is for {JUDGED_SIZE:,} values.")


def print_peers(rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for each kind of work and size."""
    for work, size in dict.fromkeys((row["work"], row["size"]) for row in rows):
        chosen = [row for row in rows if (row["work"], row["size"]) == (work, size)]
        print(f"\n{f'{work}, {size:,} values':<82}{'ms':>9}{'factor':>9}{'same':>9}")
        ours = float(np.median([row["ours_milliseconds"] for row in chosen]))
        print(f"{'ours':<82}{ours:>9.2f}{1:>9.1f}")
        for row in chosen:
            sampled = f" (from {row['timed_on']:,} values)" if row["timed_on"] != size else ""
            name = f"{row['library']} {row['call']}{sampled}"
            same = "" if row["same"] is None else f"{row['same']:.2%}"
            print(f"{name:<82}{row['milliseconds']:>9.2f}{row['factor']:>9.1f}{same:>9}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Time, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="for torch and for our loops; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=25, help="default 25; a third of it for other libraries")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="powers of two, from 64")
    parser.add_argument("--casts", nargs="+", metavar="CAST", help="instead of the usual ones")
    parser.add_argument("--before", choices=("shuffled", "clone", "pause"), default="shuffled", help="see above")
    parser.add_argument("--no-peers", action="store_true", help="leave the other libraries out")
    parser.add_argument("--quick", action="store_true", help="a look: 5 rounds, 64 and 1M values, libraries at 1M")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there as well")
    asked = parser.parse_args(arguments)
    if wrong := [size for size in asked.sizes if size < 64 or size & (size - 1)]:
        parser.error(f"sizes are powers of two from 64, not {wrong[0]}")
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("this torch finds no CUDA device; run without --device for the CPU")
    if asked.threads:
        torch.set_num_threads(asked.threads)
    rounds, sizes, peer_sizes = asked.rounds, asked.sizes, PEER_SIZES
    if asked.quick:
        rounds, sizes, peer_sizes = 5, [64, 1 << 20], (1 << 20,)
    names = [str(Cast.parse(name)) for name in asked.casts] if asked.casts else list(AIMS)

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
    print(f"{where}; torch {torch.__version__}; {rounds} rounds; before each timing: {asked.before}")
    found = {}
    for size in sizes:
        print(f"timing {size:,} values …", file=sys.stderr)
        found[size] = against_clone(names, size, rounds, device, asked.before)
    print_ratios(found, device.type == "cuda")

    rows, versions = [], {}
    if not asked.no_peers:
        peers, versions, missing = installed()
        for library, reason in missing.items():
            print(f"{library} is left out, it cannot be imported: {reason}", file=sys.stderr)
        peers = [peer for peer in peers if peer.timed and (peer.on_cuda or device.type == "cpu")]
        for work in PEER_WORK:
            chosen = [peer for peer in peers if peer.work == work]
            for size in peer_sizes if chosen else ():
                print(f"timing other libraries, {work}, {size:,} values …", file=sys.stderr)
                rows += against_peers(chosen, work, size, max(3, rounds // 3), device, asked.before)
        print_peers(rows)
    if asked.json:
        told = {
            "where": where,
            "torch": torch.__version__,
            "rounds": rounds,
            "before": asked.before,
            "clones": found,
            "libraries": versions,
            "peers": rows,
        }
        asked.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
