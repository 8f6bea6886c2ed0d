"""Which scales finer than a tensor's a slot is sketched for: by row or block, along which axis, by which kind of rule.

A tensor that enters two products is written once for each, with its scales along that product's inner dimension. An
axis says which dimensions of a tensor these are: `along -1` is the last one alone, and a row is what runs along it;
`across -1` is all others, flattened in their order, and what runs along them is a column of the matrix that the tensor
is (`scaling.py`). So columns need no tilings of their own: they are the rows of the other axis.

    linear             input, weight, grad_output   along -1, then across -1
    matmul and kin     left operand                 along -1, then along -2 (across -1 where the right one is a weight)
                       right operand                along -2, then along -1
                       grad_output                  along -1, then along -2 (as the left; before a weight: exchanged)
    attention          query, key, grad_output      along -1, then along -2
                       value                        along -2, then along -1
    convolution        input, grad_output           channels at a place, then the places of a channel
                       weight                       all of one output channel, then all of one input channel

(A transposed convolution's weight has these exchanged.) The first axis belongs to the forward product, for grad_output
to the product that gives the input's gradient. Whatever is not in the list, einsum and recurrent cells among it, is
taken as linear is: the axis is named in every result.

A rule reads a tile's largest magnitude in one of three ways, so one sketch serves every format and all rules of a kind
(`relative.py`). It is called by the first of them: `current`, `e8m0` (with e8m0up and whatever is `:pow2`), `nvfp4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from probes.casts import Cast
from probes.errors import WindowError
from probes.scaling import RULES, TILES, Tile, as_matrix

KINDS = {"current": "current", "e8m0": "e8m0", "e8m0up": "e8m0", "nvfp4": "nvfp4"}
"""Rule → the kind of sketch that tells of it."""

CLASSES = {"current": 2, "e8m0": 9, "nvfp4": 10}
"""Kind of sketch → classes of tiles that are counted apart (`relative.py`)."""

DEFAULT = ("row", "block32")
"""What a window that is opened without `finer` may take at its scored steps, whose extra backward passes cost far more:
rows for fp8 recipes, blocks of 32 for MX. In times of the tensor-wide sketch (4096 × 1024 float32, one thread of a busy
machine, benchmarks/tile_sketches.py): row 0.6 to 0.8 along the last dimension and 2.7 to 2.9 across, block32 1.4 to 1.8
and 1.4 to 1.8; of the others block1x128 0.8 to 1.0 and 1.5 to 1.9, block128x128 1.0 to 1.4, block16 (nvfp4) 2.0 to 2.6.
"""

_FINER = tuple(name for name in RULES if name not in ("none", "tensor"))


@dataclass(frozen=True)
class Axis:
    """The dimensions that scales run along: one of a tensor's, or all but one."""

    dimension: int
    across: bool = False

    def __str__(self) -> str:
        return f"{'across' if self.across else 'along'} {self.dimension}"

    @property
    def other(self) -> Axis:
        """All dimensions that are not of this axis."""
        return Axis(self.dimension, not self.across)


@dataclass(frozen=True)
class Tiling:
    """One way of cutting a tensor into tiles that have a scale each, and how rules read a tile's largest magnitude.

    granularity  row or a block, of `scaling.TILES`
    kind         of `KINDS`
    """

    granularity: str
    kind: str
    axis: Axis

    @property
    def key(self) -> str:
        """What its sketches are filed under: `block32/e8m0 along -1`."""
        return f"{self.granularity}/{self.kind} {self.axis}"

    @property
    def classes(self) -> int:
        """Classes of tiles that are counted apart."""
        return CLASSES[self.kind]

    @property
    def tile(self) -> Tile:
        """Rows and columns of a tile of `matrix`."""
        return TILES[self.granularity]

    def matrix(self, values: Tensor) -> Tensor:
        """[rows, columns]: the axis along the rows. A view where there is one."""
        whole = as_matrix(values, self.axis.dimension)
        return whole.T if self.axis.across else whole

    def in_memory(self, values: Tensor) -> tuple[Tensor, int, int]:
        """The same tiles as they lie in memory: contiguous [batches, P, Q], and how much of P and Q a tile takes.

        Nothing is copied of a contiguous tensor unless its tiles have no such form, as blocks of 128 rows along a
        middle dimension do not.
        """
        dimension = self.axis.dimension % max(values.dim(), 1)
        before, size = prod(values.shape[:dimension]), (*values.shape, 1)[dimension]
        after = values.numel() // max(before * size, 1)
        rows, columns = self.tile
        if rows != 1:  # square: the same whichever way the matrix lies
            return as_matrix(values, dimension).contiguous().view(1, -1, size), rows or 0, columns or 0
        if not self.axis.across and after > 1:
            return values.contiguous().view(before, size, after), columns or size, 1
        if not self.axis.across:
            return values.contiguous().view(1, before, size), 1, columns or size
        if before == 1:
            return values.contiguous().view(1, size, after), 1, columns or after
        return as_matrix(values, dimension).contiguous().view(1, -1, size), columns or before * after, 1


def tiling_name(cast: Cast) -> str:
    """The name, as `tilings_of` takes it, of the sketch that tells of a cast with a scale by row, column or block."""
    assert cast.scale is not None
    kind = "e8m0" if cast.scale.power_of_two else KINDS[cast.scale.rule]
    return f"{'row' if cast.granularity == 'column' else cast.granularity}/{kind}"


def tilings_of(names: Sequence[str], op: str, roles: Sequence[str], role: str, dimensions: int) -> tuple[Tiling, ...]:
    """The tilings of one slot: every name along every axis that its tensor enters a product with.

    names       `row`, `block32`, `block32/current`: granularity and rule, by default the granularity's first
    op, roles   the site's operation and its operands' roles, left to right
    role        the slot's
    dimensions  of the tensor

    Raises WindowError for a name that is none.
    """
    axes = axes_of(op, roles, role, dimensions)
    found: dict[Tiling, None] = {}
    for granularity, kind in map(_read, names):
        for axis in axes:
            if granularity == "column":
                found[Tiling("row", kind, axis.other)] = None
            elif granularity != "block128x128" or not _is_same_matrix(axis, axes[0], dimensions):
                found[Tiling(granularity, kind, axis)] = None
    return tuple(found)


def tiling_for(cast: Cast, axis: Axis, axes: Sequence[Axis], dimensions: int) -> Tiling:
    """The tiling that tells of a cast along one of a tensor's axes."""
    granularity, kind = tiling_name(cast).split("/")
    if cast.granularity == "column":
        axis = axis.other
    elif granularity == "block128x128" and _is_same_matrix(axis, axes[0], dimensions):
        axis = axes[0]
    return Tiling(granularity, kind, axis)


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of tilings written in full, each once. Raises WindowError for one that is none."""
    return tuple(dict.fromkeys("/".join(_read(name)) for name in names))


def axes_of(op: str, roles: Sequence[str], role: str, dimensions: int) -> tuple[Axis, ...]:
    """The axes of a tensor's products, the one that scores go by first; one alone where the tensor is a vector."""
    along_last, along_rows, across_last = Axis(-1), Axis(-2), Axis(-1, across=True)
    if dimensions < 2:
        return (along_last,)
    if op.startswith("conv"):
        return _convolution_axes(op, role)
    if op == "sdpa":
        return (along_rows, along_last) if role == "value" else (along_last, along_rows)
    if op not in _MATMULS:
        return along_last, across_last
    rows = across_last if roles[1] == "weight" else along_rows
    if role == roles[1]:
        return along_rows, along_last
    if role == roles[0]:
        return along_last, rows
    return (along_rows, along_last) if roles[0] == "weight" else (along_last, rows)


_MATMULS = frozenset({"matmul", "mm", "bmm", "mv", "addmm", "baddbmm"})


def _convolution_axes(op: str, role: str) -> tuple[Axis, ...]:
    places = int(op.removesuffix("d")[-1])
    channels, first = -places - 1, -places - 2
    if role != "weight":
        return Axis(channels), Axis(channels, across=True)
    axes = Axis(first, across=True), Axis(channels, across=True)
    return axes[::-1] if "transpose" in op else axes


def _is_same_matrix(axis: Axis, first: Axis, dimensions: int) -> bool:
    """Whether another axis than the first cuts the same matrix into the same square blocks."""
    return axis != first and (axis == first.other or dimensions == 2)


def _read(name: str) -> tuple[str, str]:
    """Granularity and kind."""
    granularity, _, rule = str(name).partition("/")
    kinds = _kinds(granularity) if granularity in _FINER else {}
    rule = rule or next(iter(kinds), "")
    if rule not in kinds:
        known = ", ".join(f"{one}/{kind}" for one in _FINER for kind in dict.fromkeys(_kinds(one).values()))
        raise WindowError(f"no tiling is called {name!r}; there is {known}")
    return granularity, kinds[rule]


def _kinds(granularity: str) -> dict[str, str]:
    """Every rule of a granularity, its default first, and its kind; a kind's own name is taken for it too."""
    kinds = {rule: KINDS[rule] for rule in RULES[granularity]} | {"current:pow2": "e8m0"}
    return kinds | {kind: kind for kind in kinds.values()}
