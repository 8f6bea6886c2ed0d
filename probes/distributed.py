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

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from probes.errors import WindowError
from probes.history import SlotHistory, SparseRow, history_of
from probes.joining import joined_coverage, joined_evidence, joined_losses, joined_sites
from probes.layout import EXTREMES
from probes.parameter_records import joined_records
from probes.product_errors import pooled
from probes.records import Slot
from probes.relative_history import RelativeHistory, RelativeRow
from probes.relative_layout import TAIL
from probes.window import Contents

Group = Any  # a torch.distributed.ProcessGroup, which a build without torch.distributed does not have
WHOLE = ""  # in a tiling's place: the tensor-wide sketch


class Key(NamedTuple):
    """A sketch of a slot, tensor-wide or by a tiling's name, at a step."""

    slot: Slot
    tiling: str
    step: int


Occupied = Mapping[Key, NDArray[np.uint16]]
_MORE = {True: 6, False: TAIL}  # numbers that a sketch has beside its places: zeros to sum of squares, and the gain


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


class Piece(NamedTuple):
    """What one rank has of one sketch of one step: numbers beside the places that they belong to, and some more."""

    places: NDArray[np.uint16]  # rising
    numbers: NDArray[np.float64]  # [places, ..]
    more: NDArray[np.float64]


def merged(contents: Contents, group: Group, sharded: bool) -> Contents:
    """The window of all ranks, the same on every rank. `sharded`: parameters' own tensors are parts, not copies.

    Every rank of the group must call it. If ranks recorded different steps, each keeps its own part, and says so.
    """
    own, extremes = _pieces(contents.histories)
    told: list[Any] = [None] * dist.get_world_size(group)
    places = {key: piece.places for key, piece in own.items()}
    dist.all_gather_object(told, (places, replace(contents, histories={})), group=group)
    occupied, ranks = [each for each, _ in told], [each for _, each in told]
    if len({rank.steps for rank in ranks}) > 1:
        note = f"the ranks recorded different steps ({sorted({rank.steps for rank in ranks})}): this is one rank's part"
        return replace(contents, notes=(*contents.notes, note))
    once = _same_on_every_rank(ranks, occupied, sharded)
    histories = _histories(*_added(own, extremes, occupied, once, group))
    return replace(
        contents,
        losses=joined_losses([rank.losses for rank in ranks]),
        sites=joined_sites([rank.sites for rank in ranks], once),
        coverage=joined_coverage([rank.coverage for rank in ranks]),
        histories=histories,
        evidence={slot: joined_evidence([rank.evidence.get(slot) for rank in ranks]) for slot in histories},
        notes=tuple(dict.fromkeys(note for rank in ranks for note in rank.notes)),
        sampled=tuple(dict.fromkeys(sentence for rank in ranks for sentence in rank.sampled)),
        parameter_records=joined_records([rank.parameter_records for rank in ranks], sharded),
        backward_errors=tuple(pooled([error for rank in ranks for error in rank.backward_errors])),
        world_size=len(ranks),
    )


def _pieces(histories: Mapping[Slot, SlotHistory]) -> tuple[dict[Key, Piece], dict[Key, NDArray[np.float32]]]:
    """Every sketch of every step, and the extremes that tensor-wide ones have."""
    pieces, extremes = {}, {}
    for slot, history in histories.items():
        for row in history.rows():
            key = Key(slot, WHOLE, row.step)
            pieces[key] = Piece(row.bins, row.counts.astype(np.float64)[:, None], np.append(row.tail, row.gain))
            extremes[key] = row.extremes
        for tiling, finer in history.finer.items():
            for part in finer.rows():
                numbers = np.stack([part.counts, part.squares], axis=1)
                pieces[Key(slot, tiling, part.step)] = Piece(part.cells, numbers, part.tail)
    return pieces, extremes


def _same_on_every_rank(ranks: Sequence[Contents], occupied: Sequence[Occupied], sharded: bool) -> frozenset[Slot]:
    """Slots whose tensor each rank has whole."""
    sites = [site for rank in ranks for site in rank.sites]
    weights = {Slot(site.name, role) for site in sites if site.parameter for role in site.roles if "weight" in role}
    products = {Slot(site.name, role) for site in sites for role in site.roles}
    parameters = {key.slot for keys in occupied for key in keys if key.slot not in products}
    moving = {record.name for rank in ranks for record in rank.parameter_records if record.is_buffer}
    buffers = {slot for slot in parameters if slot.site in moving}
    return frozenset(weights | buffers if sharded else weights | parameters)


def _added(
    own: Mapping[Key, Piece],
    extremes: Mapping[Key, NDArray[np.float32]],
    occupied: Sequence[Occupied],
    once: frozenset[Slot],
    group: Group,
) -> tuple[dict[Key, Piece], dict[Key, NDArray[np.float32]]]:
    """One SUM and one MAX over all ranks, of pieces that every rank lays out alike."""
    keys = list(dict.fromkeys(key for keys in occupied for key in keys))
    me = dist.get_rank(group)
    laid, largest = [], []
    for key in keys:
        holders = [rank for rank, each in enumerate(occupied) if key in each]
        places = np.unique(np.concatenate([occupied[rank][key] for rank in holders]))
        numbers, more = np.zeros((len(places), 1 if key.tiling == WHOLE else 2)), np.zeros(_MORE[key.tiling == WHOLE])
        most = np.full(EXTREMES, -np.inf, dtype=np.float32)
        if key in own and (me == holders[0] or key.slot not in once):
            numbers[np.searchsorted(places, own[key].places)] = own[key].numbers
            more[:] = own[key].more
            if key.tiling == WHOLE:
                most = extremes[key]
                more[-1] *= me == holders[0]  # the gain, which is the same on all
        laid.append(Piece(places, numbers, more))
        largest.append(most)
    flat = [part.ravel() for piece in laid for part in (piece.numbers, piece.more)]
    summed = iter(np.split(_reduced(np.concatenate([np.zeros(0), *flat]), dist.ReduceOp.SUM, group), _ends(flat)))
    found = {}
    for key, piece in zip(keys, laid, strict=True):
        total, rest = next(summed).reshape(piece.numbers.shape), next(summed)
        held = total[:, 0] > 0
        found[key] = Piece(piece.places[held], total[held], rest)
    joined = _reduced(np.array(largest, dtype=np.float32).reshape(-1, EXTREMES), dist.ReduceOp.MAX, group)
    return found, dict(zip(keys, joined, strict=True))


def _ends(parts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    return np.cumsum([len(part) for part in parts])


def _histories(pieces: Mapping[Key, Piece], extremes: Mapping[Key, NDArray[np.float32]]) -> dict[Slot, SlotHistory]:
    whole: dict[Slot, list[SparseRow]] = defaultdict(list)
    finer: dict[Slot, dict[str, list[RelativeRow]]] = defaultdict(lambda: defaultdict(list))
    for key in sorted(pieces, key=lambda key: key.step):
        places, numbers, more = pieces[key]
        if key.tiling == WHOLE:
            counts = numbers[:, 0].astype(np.int64)
            whole[key.slot].append(SparseRow(key.step, places, counts, more[:-1], extremes[key], float(more[-1])))
        else:
            finer[key.slot][key.tiling].append(RelativeRow(key.step, places, numbers[:, 0], numbers[:, 1], more))
    order = dict.fromkeys(key.slot for key in pieces)
    tiled = {slot: {name: RelativeHistory.of(rows) for name, rows in held.items()} for slot, held in finer.items()}
    return {slot: history_of(whole[slot], tiled.get(slot)) for slot in order if slot in whole}


def _reduced(array: NDArray[Any], operation: Any, group: Group) -> NDArray[Any]:
    shared = torch.from_numpy(array).to(_device(group))
    dist.all_reduce(shared, op=operation, group=group)
    return np.asarray(shared.cpu().numpy())


def _device(group: Group) -> torch.device:
    """Where the group's backend takes tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )
