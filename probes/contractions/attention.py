"""The six products of scaled dot-product attention, two of whose operands nobody outside the kernel sees.

The probabilities P = softmax(scale·Q·Kᵀ + mask) and the gradient at the scores, P∘(dP − Σ P∘dP) with dP = G·Vᵀ, are
calculated again in float32: kept for a few entries of the batch, while their extent (for a scale of the whole tensor)
is that of all entries, taken a few at a time. Without dropout, whose draws are lost. The factor `scale` stays out of
the gradients at query and key: it does not change an error relative to the product's magnitudes.

An entry is a sample and a head of keys. Heads of queries that share it (grouped-query attention) stand beside one
another, and the gradients at key and value sum over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.contractions.contraction import Contraction, Extent, Lettered
from probes.contractions.sampling import ENTRIES, some
from probes.errors import WindowError
from probes.sites import ProductCall

AT_ONCE = 1 << 24  # numbers of attention matrices that are held together, but for one entry


def attention_products(
    call: ProductCall,
    operands: Sequence[Tensor],
    gradient: Tensor | None,
    wanted: set[str],
    generator: np.random.Generator,
) -> Iterator[Contraction]:
    """Scores and values, and of the gradients behind them those that the wanted ones need.

    Raises WindowError where leading dimensions are broadcast, or keys and values differ in their number of heads.
    """
    heads = _Heads.of(call, operands, gradient if wanted else None)
    query, key, value, arrived = heads.query, heads.key, heads.value, heads.gradient
    leading = heads.leading
    yield Contraction("scores", query, key, (*leading, "shared", "query", "key"))
    inside = _inside(heads, generator)
    weights, entry = inside.probabilities, ("entry",)
    yield Contraction("values", weights, inside.few(value), (*entry, "shared", "query", "out"))
    if arrived is None or inside.scores_grad is None:
        return
    if wanted & {"query_grad", "key_grad"}:
        yield Contraction("probabilities_grad", arrived, value, (*leading, "shared", "query", "key"))
    if "query_grad" in wanted:
        yield Contraction("query_grad", inside.scores_grad, inside.few(key), (*entry, "shared", "query", "feature"))
    if "key_grad" in wanted:
        yield Contraction("key_grad", inside.scores_grad, inside.few(query), (*entry, "key", "feature"))
    if "value_grad" in wanted:
        yield Contraction("value_grad", weights, inside.few(arrived), (*entry, "key", "out"))


@dataclass(frozen=True)
class _Heads:
    """Query and gradient [leading.., shared, query, ..], key and value [leading.., key, ..]; mask as the scores are."""

    query: Lettered
    key: Lettered
    value: Lettered
    gradient: Lettered | None
    mask: Tensor | None
    causal: bool
    scale: float

    @classmethod
    def of(cls, call: ProductCall, operands: Sequence[Tensor], gradient: Tensor | None) -> _Heads:
        given: dict[str, Any] = {**dict(zip(_names(call), call.args, strict=False)), **call.kwargs}
        query, key, value = (operand if operand.dim() > 2 else operand[None] for operand in operands)
        shared = query.shape[-3] // key.shape[-3] if given.get("enable_gqa") and key.shape[-3] else 1
        if key.shape[:-2] != value.shape[:-2] or query.shape[:-2] != (*key.shape[:-3], key.shape[-3] * shared):
            raise WindowError("attention over operands whose leading dimensions are broadcast is not followed")
        mask = given.get("attn_mask", given.get("attn_bias"))
        if mask is not None:
            mask = mask.detach().expand(*query.shape[:-1], key.shape[-2]).unflatten(-3, (-1, shared))
        leading = tuple(f"leading{n}" for n in range(key.dim() - 2))

        def of_queries(values: Tensor, last: str) -> Lettered:
            grouped = values.view(query.shape[:-1] + values.shape[-1:]).unflatten(-3, (-1, shared))
            return Lettered.of(grouped, (*leading, "shared", "query", last))

        scale = given.get("scale")
        return cls(
            of_queries(query, "feature"),
            Lettered.of(key, (*leading, "key", "feature")),
            Lettered.of(value, (*leading, "key", "out")),
            None if gradient is None else of_queries(gradient, "out"),
            mask,
            bool(given.get("is_causal", False)),
            1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else float(scale),
        )

    @property
    def leading(self) -> tuple[str, ...]:
        return self.key.letters[:-2]

    @property
    def entries(self) -> list[tuple[int, ...]]:
        """Every index of the leading dimensions."""
        return list(product(*map(range, self.key.values.shape[:-2])))

    def matrices(self, entries: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor | None]:
        """Probabilities and the gradient at the scores, float32 [entries, shared, query, key], of those entries.

        A query that may look at no key has probabilities 0.
        """
        query, key = (picked(one.values, entries).float() for one in (self.query, self.key))
        scores = (query @ key[:, None].transpose(-1, -2)) * self.scale
        if self.causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -math.inf)
        if self.mask is not None:
            mask = picked(self.mask, entries)
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        blind = scores.amax(-1, keepdim=True) == -math.inf
        probabilities = scores.softmax(-1).masked_fill(blind, 0.0)
        if self.gradient is None:
            return probabilities, None
        arrived, value = (picked(one.values, entries).float() for one in (self.gradient, self.value))
        at_probabilities = arrived @ value[:, None].transpose(-1, -2)
        inner = (probabilities * at_probabilities).sum(-1, keepdim=True)
        return probabilities, probabilities * (at_probabilities - inner)


def _names(call: ProductCall) -> list[str]:
    """What the positions of the call's arguments are called; the kernels behind sdpa have orders of their own."""
    operator = getattr(call.function, "default", call.function)
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return ["query", "key", "value", "attn_mask", "dropout_p", "is_causal"]
    return [argument.name for argument in schema.arguments]


@dataclass(frozen=True)
class _Inside:
    """What only the kernel sees, of the chosen entries: [entry, shared, query, key]."""

    chosen: list[tuple[int, ...]]
    probabilities: Lettered
    scores_grad: Lettered | None

    def few(self, whole: Lettered) -> Lettered:
        """[entry, ..]: the chosen entries of an operand [leading.., ..]."""
        rest = whole.letters[len(self.chosen[0]) :]
        return whole.seen_as(picked(whole.values, self.chosen), ("entry", *rest))


def _inside(heads: _Heads, generator: np.random.Generator) -> _Inside:
    entries = heads.entries
    shape = heads.query.values.shape
    at_once = max(1, AT_ONCE // (shape[-3] * shape[-2] * heads.key.values.shape[-2]))
    extents: list[list[tuple[Extent, int]]] = [[], []]
    for start in range(0, len(entries), at_once):
        for found, matrix in zip(extents, heads.matrices(entries[start : start + at_once]), strict=True):
            if matrix is not None:
                found.append((Extent.of(matrix), matrix.numel()))
    chosen = [entries[place] for place in some(len(entries), min(ENTRIES, at_once), generator)]
    few = [
        None if matrix is None else Lettered(matrix, ("entry", "shared", "query", "key"), _joined(found))
        for matrix, found in zip(heads.matrices(chosen), extents, strict=True)
    ]
    assert few[0] is not None
    return _Inside(chosen, few[0], few[1])


def _joined(parts: Sequence[tuple[Extent, int]]) -> Extent:
    """Of parts and their numbers of elements; a part with nothing finite does not count."""
    finite = [(extent, count) for extent, count in parts if not math.isnan(extent.rms)]
    if not finite:
        return Extent(0.0, math.nan)
    total = sum(count for _, count in finite)
    rms = math.sqrt(sum(extent.rms**2 * count for extent, count in finite) / total)
    return Extent(max(extent.largest for extent, _ in finite), rms)


def picked(values: Tensor, entries: Sequence[tuple[int, ...]]) -> Tensor:
    """[entries, ..]: a copy of those entries of [leading.., ..]."""
    indices = torch.tensor(list(zip(*entries, strict=True)), device=values.device)
    return values[tuple(indices)]
