"""What a window says of the model beside its sketches: sites, their products, evidence, coverage.

All of it is plain data: `numbers.plain` gives what the window file's header holds, and `from_dict` reads it back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from probes.errors import MalformedWindow
from probes.numbers import from_json

GRADIENT = "grad_output"  # the role of the gradient at a product's result; every other role is a forward one


class Slot(NamedTuple):
    """A row of sketches: one role of one site."""

    site: str
    role: str


@dataclass(frozen=True)
class Product:
    """One of the matrix products of a site, forward or backward.

    `operands` are roles; a name that is no slot ("probabilities" inside fused attention) is an operand that nobody
    outside the kernel sees. `flops`: floating-point operations a step, a multiply-add counted as two.
    """

    name: str
    operands: tuple[str, str]
    flops: float

    @property
    def backward(self) -> bool:
        """Whether it runs in the backward pass."""
        return self.name.endswith("_grad")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Product:
        first, second = data["operands"]
        return cls(text(data["name"]), (text(first), text(second)), _amount(data["flops"]))


@dataclass(frozen=True)
class Site:
    """One matrix product of the model, with the backward products that follow from it.

    `roles`: the operands' left to right, then `grad_output` where a gradient came back.
    `shapes` and `dtypes` are those last seen; `elements` and `calls` are means a recorded step.
    `parameter` is the dotted name of the parameter that is the weight, if one is, and `parameter_shape` its own shape
    (the weight may be a view of a part of it).
    """

    name: str
    op: str
    roles: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    elements: dict[str, float]
    products: tuple[Product, ...]
    parameter: str | None
    calls: float
    parameter_shape: tuple[int, ...] | None = None

    @property
    def flops(self) -> float:
        """FLOPs of all its products, forward and backward, a step."""
        return sum(product.flops for product in self.products)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Site:
        return cls(
            name=text(data["name"]),
            op=text(data["op"]),
            roles=tuple(map(text, list_of(data["roles"]))),
            shapes={text(role): shape_of(shape) for role, shape in data["shapes"].items()},
            dtypes={text(role): text(dtype) for role, dtype in data["dtypes"].items()},
            elements={text(role): _amount(count) for role, count in data["elements"].items()},
            products=tuple(map(Product.from_dict, data["products"])),
            parameter=None if data["parameter"] is None else text(data["parameter"]),
            calls=_amount(data["calls"]),
            parameter_shape=None if data["parameter_shape"] is None else shape_of(data["parameter_shape"]),
        )


@dataclass(frozen=True)
class Evidence:
    """What the scored steps of a window measured of one slot; each part is None or empty where nothing could be.

    curvature       Σ E[g²] over the slot's elements, g the gradient of a Gauss-Newton draw; loss units, mean a step.
                    Where the window's `curvature_from` is "gradient": of the training gradient, times the batch size
    directional     cast → ½·Σ_samples (g·δ)² with the cast's real error δ, and `beyond`; loss units, mean of draws
    directional_se  cast → standard error of that mean
    beyond          cast → the part of `directional` that is the network's own second derivative; empty where only the
                    Gauss-Newton part could be had
    first_order     cast → ⟨g, δ⟩ with the training's own gradient: what the loss changes by in the first order, signed,
                    loss units, mean over the scored steps
    first_order_se  cast → standard error of that mean over the steps; empty with fewer than two
    relative_noise  cast → energy of the error that the cast puts into the site's gradients, over those gradients'; of a
                    product without a weight that of the weight beneath that it hits hardest, in proportion to
                    `batch_noise` here and there
    systematic_noise  cast of a gradient → energy of the mean of its errors in the weight's gradient, over that
                    gradient's: what is alike in all batches. Without bias, and so below zero by chance; of two scored
                    steps or more, a step's micro-batches together (`mean_error.py`). Of ranks that were joined it is
                    empty where `batch_noise` is None (`joining.py`)
    systematic_noise_se  cast → its standard error
    batch_noise     energy of the minibatch noise in the site's weight gradient, over that gradient's
    whole_batch     samples mix behind this site (BatchNorm, MoE), so the batch was taken as one sample
    """

    curvature: float | None = None
    directional: dict[str, float] = field(default_factory=dict)
    directional_se: dict[str, float] = field(default_factory=dict)
    beyond: dict[str, float] = field(default_factory=dict)
    first_order: dict[str, float] = field(default_factory=dict)
    first_order_se: dict[str, float] = field(default_factory=dict)
    relative_noise: dict[str, float] = field(default_factory=dict)
    systematic_noise: dict[str, float] = field(default_factory=dict)
    systematic_noise_se: dict[str, float] = field(default_factory=dict)
    batch_noise: float | None = None
    whole_batch: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evidence:
        def number(value: Any) -> float | None:
            return None if value is None else float(from_json(value))

        def numbers(values: Mapping[str, Any]) -> dict[str, float]:
            return {text(key): float(from_json(value)) for key, value in values.items()}

        directional, spread = numbers(data["directional"]), numbers(data["directional_se"])
        if directional.keys() != spread.keys():
            raise ValueError("directional and directional_se are of different casts")
        return cls(
            curvature=number(data["curvature"]),
            directional=directional,
            directional_se=spread,
            beyond=numbers(data.get("beyond", {})),
            first_order=numbers(data.get("first_order", {})),
            first_order_se=numbers(data.get("first_order_se", {})),
            relative_noise=numbers(data["relative_noise"]),
            systematic_noise=numbers(data.get("systematic_noise", {})),
            systematic_noise_se=numbers(data.get("systematic_noise_se", {})),
            batch_noise=number(data["batch_noise"]),
            whole_batch=bool(data["whole_batch"]),
        )


@dataclass(frozen=True)
class Coverage:
    """Share of the matrix FLOPs of forward and backward that the sites hold, 0 to 1, and what was met but not seen.

    `unseen`: {"where": module path, "op": aten operator, "flops": a step}; "(outside)" is what the loss multiplies
    outside the model. An entry that has a "site" too is that site's, and in the share: products inside a fused
    recurrent call, between tensors that no slot holds. NaN where no step was counted.
    """

    share: float
    unseen: tuple[dict[str, Any], ...] = ()

    @property
    def unseen_flops(self) -> float:
        """FLOPs a step, forward and backward, of the products that no site holds."""
        return float(sum(entry["flops"] for entry in self.unseen if "site" not in entry))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Coverage:
        unseen = tuple(
            {
                "where": text(entry["where"]),
                "op": text(entry["op"]),
                "flops": _amount(entry["flops"]),
                **({"site": text(entry["site"])} if "site" in entry else {}),
            }
            for entry in data["unseen"]
        )
        return cls(float(from_json(data["share"])), unseen)


MOST = 1e30
"""No FLOPs, elements or calls a step come near this: what a file may claim without overflowing a sum."""


def _amount(value: Any) -> float:
    amount = float(value)
    if not 0 <= amount <= MOST:
        raise ValueError(f"{value!r} is no amount between 0 and {MOST:g}")
    return amount


def shape_of(sizes: Any) -> tuple[int, ...]:
    """A tensor's shape; raises ValueError for what is none."""
    shape = tuple(map(int, sizes))
    if len(shape) > 16 or not all(0 <= size < 2**48 for size in shape):
        raise ValueError(f"{shape} is no shape of a tensor")
    return shape


def text(value: Any) -> str:
    """A string that any file or database can hold; raises TypeError or ValueError (lone surrogates) for others."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()
    return value


def list_of(value: Any) -> list[Any]:
    """A JSON array; raises TypeError for anything else."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{value!r} is no list")
    return list(value)


def read_record(kind: Any, data: Any) -> Any:
    """`kind.from_dict(data)`, with MalformedWindow for anything that is missing or of the wrong type."""
    try:
        return kind.from_dict(data)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise MalformedWindow(f"the window's header has a {kind.__name__} that cannot be read: {error!r}") from error
