"""What a window holds when it is closed, made of what was recorded while it was open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from probes.buffers import BufferWatch
from probes.history import SlotHistory
from probes.losses import KNOWN_NAMES
from probes.names import written_parameter
from probes.parameter_records import sampled_parameters
from probes.parameters import ParameterWatch
from probes.recorder import Recorder, SiteTally
from probes.records import GRADIENT, Evidence, Product, Site, Slot
from probes.recurrent import parameters_of
from probes.window import Contents


def contents_of(
    recorder: Recorder,
    parameters: ParameterWatch,
    buffers: BufferWatch,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Contents:
    """Plain data; nothing of the model stays in it."""
    steps = max(len(recorder.recorded), 1)
    met = recorder.rows.histories()
    still = buffers.still(met)
    histories = _in_order({slot: met[slot] for slot in met if slot not in still}, recorder.tallies)
    records = tuple(
        replace(record, lookups=tuple(recorder.lookups.get(record.name, ()))) for record in parameters.records()
    )
    shapes = {written_parameter(name): _shape(parameter) for name, parameter in model.named_parameters()}
    sites = tuple(
        _site(name, tally, steps, Slot(name, GRADIENT) in histories, shapes)
        for name, tally in recorder.tallies.items()
        if any(slot.site == name for slot in histories)
    )
    noise = {record.name: record.gradient_noise for record in records}
    noise |= {site.name: parameters.batch_noise(_weights_of(site)) for site in sites}
    if recorder.recorded and not sites:
        recorder.note("no matrix product was met: the hook sees torch's own functions")
    elif recorder.scoring.tried and not recorder.scoring.knew_the_loss:
        recorder.note(
            f"no loss function with a known curvature was met ({', '.join(KNOWN_NAMES)}): the training gradient is "
            "kept in its place, and damage is not predicted; curvature_of(loss, outputs, factor) tells a loss's own"
        )
    evidence = {slot: recorder.scoring.evidence(slot, noise) for slot in histories}
    unreached = [site.name for site in sites if GRADIENT not in site.roles and not _has_curvature(site, evidence)]
    if unreached and recorder.scoring.curvature_from == "loss":
        recorder.note(
            f"no gradient arrives at {_some_of(unreached)}, for nothing beneath is trained: the damage of casts there "
            "is not predicted"
        )
    if recorder.flops is not None and recorder.flops.trouble is not None:
        recorder.note(recorder.flops.trouble)
    scales = tuple(scale.value for scale in recorder.loss_scales)
    losses = (math.nan if loss is None else float(loss) for loss in recorder.losses)
    sampled = sampled_parameters(records)
    return Contents(
        model_name=type(model).__name__,
        optimizer_name=type(optimizer).__name__,
        parameters=shapes,
        steps=tuple(recorder.recorded),
        losses=tuple(loss / scale for loss, scale in zip(losses, scales, strict=True)),
        sites=sites,
        coverage=recorder.coverage(sites),
        histories=histories,
        evidence=evidence,
        notes=tuple(recorder.notes),
        loss_scales=scales,
        parameter_records=(*records, *buffers.records(met)),
        sampled=() if sampled is None else (sampled,),
        backward_errors=recorder.scoring.backward_errors,
        curvature_from=recorder.scoring.curvature_from,
    )


def _in_order(histories: Mapping[Slot, SlotHistory], sites: Mapping[str, SiteTally]) -> dict[Slot, SlotHistory]:
    """Slots by site, in the order in which sites were met, and by role; then those of parameters alone."""
    order = [Slot(name, role) for name, tally in sites.items() for role in (*tally.roles, GRADIENT)]
    return {slot: histories[slot] for slot in (*order, *histories) if slot in histories}


def _site(name: str, tally: SiteTally, steps: int, has_gradient: bool, shapes: Mapping[str, tuple[int, ...]]) -> Site:
    products = (Product(product, operands, flops / steps) for (product, operands), flops in tally.products.items())
    return Site(
        name=name,
        op=tally.op,
        roles=(*tally.roles, *([GRADIENT] if has_gradient else [])),
        shapes={role: tuple(shape) for role, shape in tally.shapes.items()},
        dtypes={role: str(dtype).removeprefix("torch.") for role, dtype in tally.dtypes.items()},
        elements={role: count / steps for role, count in tally.elements.items()},
        products=tuple(products),
        parameter=tally.parameter,
        parameter_shape=_parameter_shape(tally, shapes),
        calls=tally.calls / steps,
    )


def _parameter_shape(tally: SiteTally, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Of a parameter that was taken out of the model since, the shape that its products had."""
    if not tally.parameter:
        return None
    met = tally.shapes.get("weight")
    return shapes.get(tally.parameter, None if met is None else tuple(met))


def _has_curvature(site: Site, evidence: Mapping[Slot, Evidence]) -> bool:
    slots = (Slot(site.name, role) for role in site.roles)
    return any(slot in evidence and evidence[slot].curvature is not None for slot in slots)


def _some_of(names: Sequence[str], shown: int = 3) -> str:
    """The first of them, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _weights_of(site: Site) -> tuple[str, ...]:
    """Dotted names of the parameters that the site multiplies by."""
    return parameters_of(site.name, site.roles) if site.parameter is None else (site.parameter,)


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A lazy one, which no forward has given a shape, has none."""
    return () if is_lazy(parameter) else tuple(parameter.shape)
