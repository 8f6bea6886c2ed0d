"""Runs a function in several processes joined by gloo, and gives what each returned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

IMPORTED = ["pytest", "torch", "torch.distributed.fsdp", "advisor", "probes.probing"]
"""Once for all ranks: they are forked from a process that has done this and has started no thread."""


def on_ranks(count: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """`function(rank, *arguments)` on each of `count` ranks; a module's own function, whose result can be saved."""
    mp.set_forkserver_preload(IMPORTED)
    mp.start_processes(_run, (count, function, folder, arguments), nprocs=count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run(rank: int, count: int, function: Callable[..., Any], folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    try:
        torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
