"""Fused recurrent layers: one call, many products, most of them between tensors that nobody outside the kernel sees.

Such a call is one site. Its roles are what goes in and comes out: `input`, `state` (and `cell` of an LSTM), each weight
under its own name (`weight_ih_l0`, `weight_hh_l0`, `weight_hr_l0` with a projection, `_reverse` of the second
direction; `weight_ih`, `weight_hh` of a single cell), and `grad_output`, the gradients at all of its results. Its
products have the FLOPs that follow from the shapes. "hidden" (the states between the steps, and the input of deeper
layers) and "gates_grad" live inside: no slot holds them, so no cast reaches them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from probes.names import ROOT
from probes.operation import Arguments, Operation
from probes.records import Product

HIDDEN, GATES = "hidden", "gates_grad"
INSIDE = frozenset({HIDDEN, GATES})
STATES = ("state", "cell")


class Weight(NamedTuple):
    """A matrix of a recurrent layer: its name, where it stands among the call's weights, and what it multiplies."""

    role: str
    place: int
    from_input: bool  # the layer's input, and not a state


@dataclass(frozen=True)
class Recurrent(Operation):
    """`lstm`, `gru`, `rnn_tanh`, `rnn_relu` over a sequence, padded or packed.

    In a scored step it is calculated again as a whole, its results side by side, [B, everything of a sample]: not where
    it is packed, and not with dropout between its layers, which would draw anew.
    """

    multilinear: ClassVar[bool] = False

    def can_replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        after = _state_at(args) + 2
        return not _is_packed(args) and not (args[after + 2] and args[after + 3])

    def plain(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        operands: Sequence[Tensor],
    ) -> Tensor:
        """Its results, joined."""
        changed, keywords = self.replace(args, kwargs, operands)
        return self.joined(self.results(function(*_in_dtype(changed, operands[0].dtype), **keywords)), args)

    def batch_dimension(self, place: int, values: Tensor, args: tuple[Any, ...]) -> int | None:
        if place == 0:
            return None if values.dim() < 3 else int(not args[-1])
        return 1 if values.dim() == 3 and place <= len(self._states(args)) else None

    def joined(self, results: Sequence[Tensor], args: tuple[Any, ...]) -> Tensor:
        parts = [self._by_sample(one, at, args) for at, one in enumerate(results)]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def apart(self, joined: Tensor, shapes: Sequence[torch.Size], args: tuple[Any, ...]) -> list[Tensor]:
        found = []
        for at, shape in enumerate(shapes):
            like = self._by_sample(joined.new_empty(shape), at, args)
            part, joined = joined.split([like[0].numel(), joined.shape[1] - like[0].numel()], dim=1)
            dimension = self._dimension(len(shape), at, args)
            part = part.reshape(like.shape)
            found.append(part[0] if dimension is None else part.movedim(0, dimension))
        return found

    def _by_sample(self, result: Tensor, at: int, args: tuple[Any, ...]) -> Tensor:
        dimension = self._dimension(result.dim(), at, args)
        return result[None] if dimension is None else result.movedim(dimension, 0)

    def _dimension(self, dimensions: int, at: int, args: tuple[Any, ...]) -> int | None:
        """The batch's, of a result: the sequence comes first, then the last states."""
        if dimensions < 3:
            return None
        return int(not args[-1]) if at == 0 else 1

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        if kwargs or len(args) < _ARGUMENTS:
            return None  # torch's own modules pass everything by position
        weights = self._weights(args)
        return [args[0], *self._states(args), *(self._flat(args)[one.place] for one in weights)]

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tensor]) -> Arguments:
        states = len(self._states(args))
        flat = list(self._flat(args))
        for one, weight in zip(self._weights(args), operands[1 + states :], strict=True):
            flat[one.place] = weight
        new = tuple(operands[1 : 1 + states])
        state: Any = new if isinstance(args[_state_at(args)], (list, tuple)) else new[0]
        if _is_packed(args):
            return (operands[0], args[1], state, flat, *args[4:]), kwargs
        return (operands[0], state, flat, *args[3:]), kwargs

    def fixed_roles(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...] | None:
        states = STATES[: len(self._states(args))]
        return ("input", *states, *(one.role for one in self._weights(args)))

    def results(self, result: Any) -> list[Tensor]:
        return list(result)

    def products(
        self,
        roles: Sequence[str],
        operands: Sequence[Tensor],
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Product]:
        """For each weight the forward product, the gradient of what it multiplies, and its own."""
        states = len(self._states(args))
        entries = operands[0].numel() / max(operands[0].shape[-1], 1)  # steps × batch
        weights = self._weights(args)
        trained = any(operand.requires_grad for operand in operands)
        found = []
        for one, weight in zip(weights, operands[1 + states :], strict=True):
            flops = 2.0 * entries * weight.numel()
            first = one.from_input and not _layer(one.role)
            left = "input" if first else HIDDEN
            found.append(Product(f"{one.role}_forward", (left, one.role), flops))
            if trained and (not first or operands[0].requires_grad):
                found.append(Product(f"{one.role}_{left}_grad", (GATES, one.role), flops))
            if weight.requires_grad:
                found.append(Product(f"{one.role}_grad", (left, GATES), flops))
        return found

    def _states(self, args: tuple[Any, ...]) -> list[Tensor]:
        state = args[_state_at(args)]
        return list(state) if isinstance(state, (list, tuple)) else [state]

    def _flat(self, args: tuple[Any, ...]) -> Sequence[Tensor]:
        weights: Sequence[Tensor] = args[_state_at(args) + 1]
        return weights

    def _weights(self, args: tuple[Any, ...]) -> list[Weight]:
        after = _state_at(args) + 2
        biased, layers, bidirectional = bool(args[after]), int(args[after + 1]), bool(args[after + 4])
        directions = 2 if bidirectional else 1
        each = len(self._flat(args)) // max(layers * directions, 1)
        found = []
        for layer in range(layers):
            for direction in range(directions):
                start = (layer * directions + direction) * each
                ending = f"l{layer}" + "_reverse" * direction
                found += [Weight(f"weight_ih_{ending}", start, True), Weight(f"weight_hh_{ending}", start + 1, False)]
                if each == (5 if biased else 3):
                    found.append(Weight(f"weight_hr_{ending}", start + each - 1, False))
        return found


@dataclass(frozen=True)
class Cell(Recurrent):
    """`lstm_cell`, `gru_cell`, `rnn_tanh_cell`, `rnn_relu_cell`: one step of one layer."""

    def can_replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return True

    def batch_dimension(self, place: int, values: Tensor, args: tuple[Any, ...]) -> int | None:
        return 0 if values.dim() == 2 and place <= len(self._states(args)) else None

    def _dimension(self, dimensions: int, at: int, args: tuple[Any, ...]) -> int | None:
        return 0 if dimensions == 2 else None

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor] | None:
        return None if kwargs or len(args) < 4 else [args[0], *self._states(args), *args[2:4]]

    def replace(self, args: tuple[Any, ...], kwargs: dict[str, Any], operands: Sequence[Tensor]) -> Arguments:
        new = tuple(operands[1:-2])
        state = new if isinstance(args[1], (list, tuple)) else new[0]
        return (operands[0], state, *operands[-2:], *args[4:]), kwargs

    def results(self, result: Any) -> list[Tensor]:
        return list(result) if isinstance(result, tuple) else [result]

    def products(
        self,
        roles: Sequence[str],
        operands: Sequence[Tensor],
        result: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> list[Product]:
        found = []
        for left, right in ((0, len(operands) - 2), (1, len(operands) - 1)):
            flops = 2.0 * operands[left].numel() * operands[right].shape[0]
            found.append(Product(f"{roles[right]}_forward", (roles[left], roles[right]), flops))
            if operands[left].requires_grad:
                found.append(Product(f"{roles[left]}_grad", (GATES, roles[right]), flops))
            if operands[right].requires_grad:
                found.append(Product(f"{roles[right]}_grad", (roles[left], GATES), flops))
        return found

    def _states(self, args: tuple[Any, ...]) -> list[Tensor]:
        return list(args[1]) if isinstance(args[1], (list, tuple)) else [args[1]]

    def _weights(self, args: tuple[Any, ...]) -> list[Weight]:
        return [Weight("weight_ih", 2, True), Weight("weight_hh", 3, False)]


def parameters_of(site: str, roles: Sequence[str]) -> tuple[str, ...]:
    """Dotted names of a recurrent site's weights, which are called as its roles; of any other site none."""
    module = "" if site == ROOT else f"{site}."
    return tuple(f"{module}{role}" for role in roles if role.startswith("weight_"))


_ARGUMENTS = 9


def _in_dtype(values: Any, dtype: torch.dtype) -> Any:
    """Every floating tensor in it of this dtype: biases are no operands."""
    if isinstance(values, Tensor):
        return values.to(dtype) if values.is_floating_point() else values
    return type(values)(_in_dtype(one, dtype) for one in values) if isinstance(values, (list, tuple)) else values


def _is_packed(args: tuple[Any, ...]) -> bool:
    """A packed call has the batch sizes second, then the state and the weights; a padded one has batch_first last."""
    return isinstance(args[3], (list, tuple))


def _state_at(args: tuple[Any, ...]) -> int:
    return 2 if _is_packed(args) else 1


def _layer(role: str) -> int:
    return int(role.split("_l")[1].split("_")[0])
