"""The matrices behind a site's products: how many, how many rows and columns, and how long the inner sum.

A product is [batch, m, k] times [batch, k, n], launched `calls` times a step. Most of it follows from what a window
keeps of a site, whatever the operation was called: with a and b elements in the operands of one call and f = 2·batch·
m·n·k operations, n = f/2a, m = f/2b and k is what is left. That holds for linear layers, matmul with any broadcasting,
einsum of two and grouped products. A convolution is taken as the implicit product it is, with k = channels × kernel of
a group; attention as one product a head; a recurrent layer's state products as one launch a step of the sequence.

What cannot be told (a chain's partial products) is taken to be a cube of the same operations: `exact` is False there.
Shapes that differ from call to call are taken at their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from advisor.operands import is_weight, own_operand
from probes.records import GRADIENT, Product, Site

ATTENTION = frozenset({"sdpa", "flex_attention"})
INSIDE = frozenset({"hidden", "gates_grad", "partial", "probabilities", "scores_grad"})


class ProductShape(NamedTuple):
    """[batch, m, k] × [batch, k, n], `calls` times a step. `own` is the format of the site's first operand.

    exact   whether the sizes follow from the site's record
    """

    product: Product
    op: str
    own: str
    batch: int
    m: int
    n: int
    k: int
    calls: float
    exact: bool = True

    @property
    def flops(self) -> float:
        """Operations of one call."""
        return 2.0 * self.batch * self.m * self.n * self.k


def product_shapes(site: Site) -> tuple[ProductShape, ...]:
    """One for each of the site's products, in their order; those without operations are left out."""
    found = []
    for product in site.products:
        if product.flops <= 0:
            continue
        sizes = _sizes(site, product)
        exact = sizes is not None
        if sizes is None:
            side = (product.flops / max(site.calls, 1.0) / 2) ** (1 / 3)
            sizes = _Sizes(1, side, side, side)
        batch, m, n, k = (max(1, round(size)) for size in sizes)
        found.append(
            ProductShape(
                product=product,
                op=site.op,
                own=own_operand(site, site.roles[0]).format or "fp32",
                batch=batch,
                m=m,
                n=n,
                k=k,
                calls=product.flops / (2.0 * batch * m * n * k),  # the operations a step stay those that were counted
                exact=exact,
            )
        )
    return tuple(found)


def elements_a_call(site: Site, role: str) -> float:
    """Elements of a role in one call: a weight is read once a step however often its module is called."""
    count = site.elements.get(role, float(prod(site.shapes.get(role, (0,)))))
    return count if is_weight(role) else count / max(site.calls, 1.0)


class _Sizes(NamedTuple):
    batch: float
    m: float
    n: float
    k: float


def _sizes(site: Site, product: Product) -> _Sizes | None:
    if site.op in ATTENTION:
        return _attention(site.shapes, product)
    if site.op.startswith("conv"):
        return _convolution(site, product)
    if any(role.startswith("weight_") for role in site.roles):
        return _recurrent(site, product)
    if set(product.operands) & INSIDE or len(set(product.operands)) < 2:
        return None
    return _two_operands(site, product)


def _two_operands(site: Site, product: Product) -> _Sizes | None:
    """From the elements of both operands of a call and its operations alone."""
    left, right = (elements_a_call(site, role) for role in product.operands)
    flops = product.flops / max(site.calls, 1.0)
    if not left or not right:
        return None
    n, m = flops / (2 * left), flops / (2 * right)
    other = next((role for role in (*site.roles, GRADIENT) if role not in product.operands), None)
    result = elements_a_call(site, other) if other in site.roles and other is not None else 0.0
    k = flops / (2 * result) if result else _inner(site, product)
    batch = flops / (2 * m * n * k) if k else 0.0
    if min(m, n, k, batch) < 0.5:
        return None
    # batch·m·k = left and so on: where one operand is shared by all of the batch, batch comes out as 1 and m holds it
    return _Sizes(batch, m, n, k)


def _inner(site: Site, product: Product) -> float:
    """The inner size where nothing is known of the result: the left operand's last dimension, or its rows."""
    shape = site.shapes.get(product.operands[0], ())
    return float(shape[-1]) if shape and not product.backward else float(prod(shape[:-1]))


def _convolution(site: Site, product: Product) -> _Sizes | None:
    """A weight [outputs, inputs of a group, …] meets every place of the output; of a transposed convolution [inputs,
    outputs of a group, …] every place of the input."""
    weight = site.shapes.get("weight", ())
    if len(weight) < 3 or site.op == "conv_tbc" or not prod(weight):
        return None
    places = product.flops / max(site.calls, 1.0) / (2.0 * prod(weight))
    transposed = "transpose" in site.op
    channels = site.shapes.get(GRADIENT if transposed else "input", ())[1:2]
    groups = max(1, round(channels[0] / weight[1])) if channels else 1
    whole, part = weight[0] / groups, weight[1] * prod(weight[2:])
    inner, outer = (whole, part) if transposed else (part, whole)
    match product.name:
        case "forward":
            return _Sizes(groups, places, outer, inner)
        case "input_grad":
            return _Sizes(groups, places, inner, outer)
        case _:
            return _Sizes(groups, inner, outer, places)


def _attention(shapes: Mapping[str, tuple[int, ...]], product: Product) -> _Sizes | None:
    query, key, value = (shapes.get(role, ()) for role in ("query", "key", "value"))
    if min(len(query), len(key), len(value)) < 2:
        return None
    heads, tokens, wide = prod(query[:-2]), query[-2], query[-1]
    others, out = key[-2], value[-1]
    match product.name:
        case "scores" | "scores_again_grad":
            return _Sizes(heads, tokens, others, wide)
        case "values":
            return _Sizes(heads, tokens, out, others)
        case "probabilities_grad":
            return _Sizes(heads, tokens, others, out)
        case "query_grad":
            return _Sizes(heads, tokens, wide, others)
        case "key_grad":
            return _Sizes(heads, others, wide, tokens)
        case "value_grad":
            return _Sizes(heads, others, out, tokens)
        case _:
            return None


def _recurrent(site: Site, product: Product) -> _Sizes | None:
    """A weight [gates, inner] meets every entry (step × batch) of the sequence: the input's in one launch, the
    states' in one launch a step. How many steps is the input's longer leading dimension where it has two."""
    role = next((one for one in product.operands if is_weight(one)), None) or product.name.removesuffix("_grad")
    weight = site.shapes.get(role, ())
    if len(weight) != 2 or not prod(weight):
        return None
    entries = product.flops / max(site.calls, 1.0) / (2.0 * prod(weight))
    gates, inner = weight
    if product.name.endswith("_forward"):
        sizes = _Sizes(1, entries, gates, inner)
    elif product.name == f"{role}_grad":
        return _Sizes(1, inner, gates, entries)
    else:
        sizes = _Sizes(1, entries, inner, gates)
    leading = site.shapes.get("input", ())[:-1]
    if "_ih_" in role or role == "weight_ih" or len(leading) < 2:
        return sizes
    return _Sizes(1, max(1.0, entries / max(leading)), sizes.n, sizes.k)


def operand_elements(shape: ProductShape) -> Iterator[float]:
    """Elements of the left operand, the right one and the result of one call."""
    yield shape.batch * float(shape.m) * shape.k
    yield shape.batch * float(shape.k) * shape.n
    yield shape.batch * float(shape.m) * shape.n
