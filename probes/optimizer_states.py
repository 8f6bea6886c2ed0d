"""What an optimizer holds: its parameters by name, and each one's state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from probes.names import written_parameter
from probes.sketch import FLOATING


@dataclass(frozen=True)
class Held:
    """A parameter that the model or the optimizer has. `group` is the optimizer's, None where it does not hold it."""

    name: str
    parameter: Tensor
    group: dict[str, Any] | None


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside wrappers that call its step, as accelerate's and some libraries' do: it announces steps."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def held_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Held]:
    """The trainable ones, each once: the model's in its order, then what the optimizer alone has.

    Those of the optimizer's that no module owns are called `optimizer.group0.param3`.
    """
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    met = set()
    for name, parameter in model.named_parameters():
        met.add(id(parameter))
        if parameter.requires_grad:
            yield Held(written_parameter(name), parameter, groups.get(id(parameter)))
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if id(parameter) not in met and parameter.requires_grad:
                met.add(id(parameter))
                yield Held(f"optimizer.group{group_index}.param{index}", parameter, group)


def states_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a parameter's state by name, as many times as there are; counters and other scalars left out."""
    for name, value in optimizer.state.get(parameter, {}).items():
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, Tensor) and (tensor.dim() > 0 or (parameter.dim() == 0 and name not in _COUNTERS)):
                yield str(name), tensor


_COUNTERS = frozenset({"step", "mu_product", "eta", "mu"})  # of torch 2.13's optimizers, beside a scalar parameter


def is_floating(tensor: Tensor) -> bool:
    """Whether its elements are floats that can be read: not those of a quantized tensor, whatever dtype it claims."""
    return _is_plain(tensor) and tensor.layout == torch.strided and (tensor.dtype in FLOATING or tensor.is_complex())


def kind_of(tensor: Tensor) -> str:
    """What its elements are: "float32", "uint8"; the class's name where it is no plain tensor."""
    return str(tensor.dtype).removeprefix("torch.") if _is_plain(tensor) else type(tensor).__name__


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) or hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, apart from any graph: a DTensor's shard. Complex numbers as pairs."""
    held: Any = tensor.detach()
    if hasattr(held, "to_local"):
        held = held.to_local()
    if held.is_complex():
        held = torch.view_as_real(held.resolve_conj())
    result: Tensor = held
    return result


def epsilon_of(group: dict[str, Any] | None) -> float | None:
    """The optimizer's epsilon for these parameters, None where it has none. Of Adafactor's pair the first, for g²."""
    found = None if group is None else group.get("eps")
    if isinstance(found, (list, tuple)):
        found = found[0] if found else None
    return None if found is None else float(found)
