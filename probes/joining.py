"""What ranks recorded beside their sketches, joined: as one process on the joined batch would have it.

FLOPs and elements of a step are those of all ranks together. A rank's loss is the mean over its own part of the batch
and the joined one is the mean over ranks; so are the curvature and the directional products of damage, which are
multiples of the loss. Standard errors of a mean add as variances.

A mean error over its gradient's energy is more of a joined gradient than of a rank's. The mean error is the same, but
the noise n of R ranks' gradients averages out to n/R. With b the noise's part of the joined gradient's energy, which
`batch_noise` is (the optimizer's gradients are joined already), a rank's gradient has 1 + (R - 1)·b times that energy.
Where b is not known, or a rank met the slot without measuring it, or not at all, no mean error is told.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import replace

from probes.records import Coverage, Evidence, Product, Site, Slot


def joined_losses(ranks: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """The mean over ranks, step by step."""
    return tuple(math.fsum(losses) / len(losses) for losses in zip(*ranks, strict=True))


def joined_sites(ranks: Sequence[Sequence[Site]], once: Collection[Slot]) -> tuple[Site, ...]:
    """Each site with the work of all ranks; slots in `once`, whose tensor each rank has whole, count as on one rank."""
    found: dict[str, list[Site]] = defaultdict(list)
    for sites in ranks:
        for site in sites:
            found[site.name].append(site)
    return tuple(_joined_site(parts, once) for parts in found.values())


def _joined_site(parts: Sequence[Site], once: Collection[Slot]) -> Site:
    elements: dict[str, float] = defaultdict(float)
    flops: dict[tuple[str, tuple[str, str]], float] = defaultdict(float)
    for part in parts:
        for role, count in part.elements.items():
            repeated = Slot(part.name, role) in once
            elements[role] = max(elements[role], count) if repeated else elements[role] + count
        for product in part.products:
            flops[product.name, product.operands] += product.flops
    return replace(
        parts[0],
        roles=tuple(dict.fromkeys(role for part in parts for role in part.roles)),
        elements=dict(elements),
        products=tuple(Product(name, operands, count) for (name, operands), count in flops.items()),
        calls=max(part.calls for part in parts),
    )


def joined_coverage(ranks: Sequence[Coverage]) -> Coverage:
    """FLOPs that were not seen, of all ranks; the share is the mean of the ranks that counted."""
    shares = [coverage.share for coverage in ranks if not math.isnan(coverage.share)]
    unseen: dict[tuple[str, str], float] = defaultdict(float)
    for coverage in ranks:
        for entry in coverage.unseen:
            unseen[entry["where"], entry["op"]] += entry["flops"]
    entries = tuple({"where": where, "op": op, "flops": flops} for (where, op), flops in unseen.items())
    return Coverage(math.fsum(shares) / len(shares) if shares else math.nan, entries)


def joined_evidence(ranks: Sequence[Evidence | None]) -> Evidence:
    """Means over ranks of what is in loss units; a rank that never used the slot measured nothing, which is zero."""
    held = [evidence for evidence in ranks if evidence is not None]
    curvatures = [evidence.curvature for evidence in held if evidence.curvature is not None]
    casts = dict.fromkeys(cast for evidence in held for cast in evidence.directional)
    sloped = dict.fromkeys(cast for evidence in held for cast in evidence.first_order)
    sure = dict.fromkeys(cast for evidence in held for cast in evidence.first_order_se)
    kept = dict.fromkeys(cast for evidence in held for cast in evidence.beyond)
    noisy = dict.fromkeys(cast for evidence in held for cast in evidence.relative_noise)
    batch_noises = [evidence.batch_noise for evidence in held if evidence.batch_noise is not None]
    batch_noise = _mean(batch_noises) if batch_noises else None
    everywhere = bool(held) and len(held) == len(ranks) and batch_noise is not None
    alike = held[0].systematic_noise if everywhere else {}
    steady = [cast for cast in alike if all(cast in e.systematic_noise for e in held)]
    larger = 1 + (len(ranks) - 1) * (batch_noise or 0.0)  # a rank's gradient, in energy, than the joined one
    return Evidence(
        curvature=math.fsum(curvatures) / len(ranks) if curvatures else None,
        directional={cast: math.fsum(e.directional.get(cast, 0.0) for e in held) / len(ranks) for cast in casts},
        directional_se={
            cast: math.hypot(*(e.directional_se.get(cast, 0.0) for e in held)) / len(ranks) for cast in casts
        },
        beyond={cast: math.fsum(e.beyond.get(cast, 0.0) for e in held) / len(ranks) for cast in kept},
        first_order={cast: math.fsum(e.first_order.get(cast, 0.0) for e in held) / len(ranks) for cast in sloped},
        first_order_se={
            cast: math.hypot(*(e.first_order_se.get(cast, 0.0) for e in held)) / len(ranks) for cast in sure
        },
        relative_noise={
            cast: _mean([e.relative_noise[cast] for e in held if cast in e.relative_noise]) for cast in noisy
        },
        systematic_noise={cast: larger * _mean([e.systematic_noise[cast] for e in held]) for cast in steady},
        # Ranks see other parts of the same batches: what they err by is not taken to be independent.
        systematic_noise_se={cast: larger * _mean([e.systematic_noise_se[cast] for e in held]) for cast in steady},
        batch_noise=batch_noise,
        whole_batch=any(evidence.whole_batch for evidence in held),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
