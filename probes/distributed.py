"""One window of several processes: the sketches of all ranks, as one process on the joined batch would have them.

Each rank records its own part of the batch. When the window closes, ranks tell each other which bins of which slots
they have, and then one SUM and one MAX all-reduce add everything up. What has to be known to do so:

- A weight is the same on every rank, so it is counted once; so are the parameters' own tensors, unless each rank holds
  a shard (FSDP2), where shards add up.
- Gradients are averaged over ranks, so a rank's gradient is that of a loss as many times as large: the recorder
  divides by the number of ranks before it sketches.

The group is the one that DistributedDataParallel or FSDP2 uses, or the one that the user gives. A rank that leaves its
window by an exception takes no part, and the others wait for it as they do in any collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from probes.errors import WindowError
from probes.history import SlotHistory, SparseRow, history_of
from probes.joining import joined_coverage, joined_evidence, joined_losses, joined_sites
from probes.parameter_records import joined_records
from probes.records import Slot
from probes.window import Contents

Group = Any  # a torch.distributed.ProcessGroup, which a build without torch.distributed does not have
Key = tuple[Slot, int]  # a slot at a step


def group_of(model: nn.Module, given: Group | None = None) -> Group | None:
    """The group whose ranks train this model together, None where one process trains it alone.

    A group that was given; DistributedDataParallel's; the mesh of parameters that are DTensors (FSDP2). Raises
    WindowError for a group where torch.distributed is not set up, or that this process is not in.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if given is not None:
            raise WindowError("a process group was given, but torch.distributed is not initialized")
        return None
    group = given
    if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
        group = model.process_group
    if group is None:
        meshes = [mesh for p in model.parameters() if (mesh := getattr(p, "device_mesh", None)) is not None]
        if meshes and meshes[0].ndim > 1:
            raise WindowError(
                f"the parameters lie on a mesh of {meshes[0].ndim} dimensions: give probe the group of the ranks "
                "that have different parts of the batch, as group=mesh['dp'].get_group()"
            )
        group = meshes[0].get_group() if meshes else None
    if group is not None and dist.get_rank(group) < 0:
        raise WindowError("this process is not in the process group that was given")
    return None if group is None or dist.get_world_size(group) < 2 else group


def ranks_of(group: Group | None) -> int:
    """How many processes there are in the group, 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a part of the parameters, as DTensors."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def agreed(decision: bool, group: Group | None) -> bool:
    """The first rank's decision; every rank of the group must ask."""
    if group is None:
        return decision
    told = torch.tensor([decision], dtype=torch.uint8, device=_device(group))
    dist.broadcast(told, dist.get_global_rank(group, 0), group=group)
    return bool(told.item())


def merged(contents: Contents, group: Group, sharded: bool) -> Contents:
    """The window of all ranks, the same on every rank. `sharded`: parameters' own tensors are parts, not copies.

    Every rank of the group must call it. Raises WindowError if the ranks recorded different steps.
    """
    own = {(slot, row.step): row for slot, history in contents.histories.items() for row in history.rows()}
    told: list[Any] = [None] * dist.get_world_size(group)
    bins = {key: row.bins for key, row in own.items()}
    dist.all_gather_object(told, (bins, replace(contents, histories={})), group=group)
    occupied, ranks = [each for each, _ in told], [each for _, each in told]
    if len({rank.steps for rank in ranks}) > 1:
        raise WindowError(f"the ranks recorded different steps: {sorted({rank.steps for rank in ranks})}")
    once = _same_on_every_rank(ranks, occupied, sharded)
    histories = _added(own, occupied, once, group)
    return replace(
        contents,
        losses=joined_losses([rank.losses for rank in ranks]),
        sites=joined_sites([rank.sites for rank in ranks], once),
        coverage=joined_coverage([rank.coverage for rank in ranks]),
        histories=histories,
        evidence={slot: joined_evidence([rank.evidence.get(slot) for rank in ranks]) for slot in histories},
        notes=tuple(dict.fromkeys(note for rank in ranks for note in rank.notes)),
        parameter_records=joined_records([rank.parameter_records for rank in ranks], sharded),
        world_size=len(ranks),
    )


def _same_on_every_rank(
    ranks: Sequence[Contents], occupied: Sequence[Mapping[Key, NDArray[np.uint16]]], sharded: bool
) -> frozenset[Slot]:
    """Slots whose tensor each rank has whole."""
    sites = [site for rank in ranks for site in rank.sites]
    weights = {Slot(site.name, role) for site in sites if site.parameter for role in site.roles if "weight" in role}
    products = {Slot(site.name, role) for site in sites for role in site.roles}
    parameters = {slot for keys in occupied for slot, _ in keys if slot not in products}
    return frozenset(weights if sharded else weights | parameters)


def _added(
    own: Mapping[Key, SparseRow],
    occupied: Sequence[Mapping[Key, NDArray[np.uint16]]],
    once: frozenset[Slot],
    group: Group,
) -> dict[Slot, SlotHistory]:
    """One SUM and one MAX over all ranks, of rows that every rank lays out alike."""
    keys = sorted(dict.fromkeys(key for keys in occupied for key in keys), key=lambda key: key[1])
    order = dict.fromkeys(slot for keys in occupied for slot, _ in keys)
    bins = [np.unique(np.concatenate([each[key] for each in occupied if key in each])) for key in keys]
    starts = np.cumsum([0, *map(len, bins)])
    counts, tails, gains = np.zeros(starts[-1]), np.zeros((len(keys), 5)), np.zeros(len(keys))
    extremes = np.full((len(keys), 4), -np.inf, dtype=np.float32)
    me = dist.get_rank(group)
    for place, key in enumerate(keys):
        first = next(rank for rank, each in enumerate(occupied) if key in each)
        if key in own and (me == first or key[0] not in once):
            row = own[key]
            counts[starts[place] + np.searchsorted(bins[place], row.bins)] = row.counts
            tails[place], extremes[place] = row.tail, row.extremes
            gains[place] = row.gain if me == first else 0.0
    summed = _reduced(np.concatenate([counts, tails.ravel(), gains]), dist.ReduceOp.SUM, group)
    extremes = _reduced(extremes, dist.ReduceOp.MAX, group)
    counts, tails, gains = np.split(summed, [len(counts), len(counts) + tails.size])
    rows: dict[Slot, list[SparseRow]] = {slot: [] for slot in order}
    for place, (slot, step) in enumerate(keys):
        held = counts[starts[place] : starts[place + 1]]
        tail = tails.reshape(-1, 5)[place]
        kept = bins[place][held > 0], held[held > 0].astype(np.int64)
        rows[slot].append(SparseRow(step, *kept, tail, extremes[place], float(gains[place])))
    return {slot: history_of(found) for slot, found in rows.items()}


def _reduced(array: NDArray[Any], operation: Any, group: Group) -> NDArray[Any]:
    shared = torch.from_numpy(array).to(_device(group))
    dist.all_reduce(shared, op=operation, group=group)
    return np.asarray(shared.cpu().numpy())


def _device(group: Group) -> torch.device:
    """Where the group's backend takes tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )
