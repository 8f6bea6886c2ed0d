"""What the optimizer's steps show of each parameter: master weight, gradient, state, update, and how noisy it is.

At a few recorded steps of the window (it changes slowly) each trainable parameter is *followed*: read before the
optimizer's step and after it. Parameters take turns, so that each step follows about as many elements as any other.

    master        the parameter before the step
    weight_grad   its gradient as the optimizer takes it: unscaled and clipped. A fused optimizer under a GradScaler
                  unscales by itself; here the same division is made. Of a sparse gradient, the coalesced values alone.
                  Where `step` was given a closure, which computes gradients within, the last that it left behind
    update        the parameter after the step less before it, in its own dtype
    exp_avg, …    each floating tensor of the optimizer's state after the step, by its own name

each into its slot's sketch, and weight and update together into a joint one (`lost_updates.py`). For this a step copies
the parameters that it follows, into memory that the window keeps. Gradient noise (`gradient_noise.py`) comes from the
moments at these steps, or from a sample of the gradients at every recorded step. Nothing waits for a device: what was
found stays there until the window is closed. (Coalescing a sparse gradient on an accelerator does wait.)

A DTensor (FSDP2) is read as this process holds it; shards add up over ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from probes.apart import Apart, Copies, whole_lines
from probes.gradient_noise import DIFFERENCES, MOMENTS, Differences, Moments, noise_from_moments
from probes.gradient_noise import SAMPLE as NOISE_SAMPLE
from probes.lost_updates import SAMPLE, UpdateSketch, update_over
from probes.optimizer_states import Held, epsilon_of, held_parameters, is_floating, kind_of, local, states_of
from probes.pace import Rota
from probes.parameter_records import MASTER, UPDATE, WEIGHT_GRADIENT, ParameterRecord
from probes.records import Slot
from probes.rows import SlotRows
from probes.strided import strided


@dataclass
class _Seen:
    """What has been found of one parameter."""

    held: tuple[tuple[int, ...], str, int]  # shape, dtype, elements of this process
    roles: dict[str, None] = field(default_factory=dict)
    states: dict[str, str] = field(default_factory=dict)
    epsilon: float | None = None
    sparse: bool = False
    cells: dict[int, Tensor] = field(default_factory=dict)  # step → cell of each sampled element
    moments: list[Moments] = field(default_factory=list)


class ParameterWatch:
    """Follows the parameters of a model through the optimizer's steps, as the rota says."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rota: Rota,
        rows: SlotRows,
        note: Callable[[str], None],
    ) -> None:
        self._model, self._optimizer, self._rota, self._rows, self._note = model, optimizer, rota, rows, note
        self._seen: dict[str, _Seen] = {}
        self._before: dict[str, Tensor] = {}
        self._energy: dict[str, Tensor | float] = {}
        self._differences = Differences()
        self._kept, self._copies = Apart(), Copies()
        self._divisor: Tensor | None = None
        self._held: list[Held] = []  # of the step under way
        self._followed: list[Held] = []  # of these
        self._closure = False

    def before_step(self, step: int, recorded: bool, closure: bool = False) -> None:
        """The optimizer is about to step: gradients are as it will use them, unless a closure will compute them."""
        if not recorded:
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            # Set by a GradScaler on an optimizer that unscales by itself; torch 2.9 to 2.13.
            scale = getattr(self._optimizer, "grad_scale", None)
            self._divisor = scale.detach().clone() if isinstance(scale, Tensor) else None
            self._closure = closure
            self._held = list(held_parameters(self._model, self._optimizer))
            due = set(self._rota.due(step, {one.name: _elements(one.parameter) for one in self._held}))
            self._followed = [one for one in self._held if one.name in due]
            if not closure:
                self._read_gradients()
            self._copies.begin(sum(_bytes_on_host(one.parameter) for one in self._followed))
            for one in self._followed:
                self._read_master(one)

    def after_step(self, step: int, recorded: bool) -> None:
        """The optimizer has stepped."""
        if not recorded:
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if self._closure:
                self._read_gradients()
            for one in self._followed:
                self._rota.had(one.name)
                if one.group is not None:
                    self._guarded(one.name, self._read_update, one, step)
                    self._guarded(one.name, self._read_states, one)
        self._let_go()

    def forget(self) -> None:
        """Let go of every tensor of the training, and of what a step that is under way needed."""
        self._let_go()
        self._differences.forget()
        self._copies.forget()

    def records(self) -> tuple[ParameterRecord, ...]:
        """What was found, one record a parameter; waits for the device. Asked when the window is closed."""
        return tuple(self._found[0].values())

    def batch_noise(self, parameters: Sequence[str]) -> float | None:
        """Minibatch noise over gradient energy: of these parameters together, or of all where nothing is known of them.

        None where nothing is known of any.
        """
        records, energies = self._found
        if len(parameters) == 1 and parameters[0] in records and records[parameters[0]].gradient_noise is not None:
            return records[parameters[0]].gradient_noise
        for names in (parameters, list(records)):
            weighed = [(records[name].gradient_noise, energies.get(name, 0.0)) for name in names if name in records]
            known = [(noise, energy) for noise, energy in weighed if noise is not None]
            energy = sum(energy for _, energy in known)
            if energy:
                return sum(noise * energy for noise, energy in known) / energy
        return None

    # What is read.

    def _let_go(self) -> None:
        self._held, self._followed, self._before, self._energy, self._divisor = [], [], {}, {}, None

    def _guarded(self, name: str, read: Callable[..., None], *args: Any) -> None:
        try:
            read(*args)
        except Exception as error:  # a kind of tensor nobody thought of: the training goes on, and the window says so
            self._note(f"parameter {name} could not be followed: {type(error).__name__}: {error}")

    def _of(self, one: Held) -> _Seen:
        seen = self._seen.get(one.name)
        if seen is None:
            dtype = str(one.parameter.dtype).removeprefix("torch.")
            shape = (tuple(one.parameter.shape), dtype, local(one.parameter).numel())
            seen = self._seen[one.name] = _Seen(shape)
        return seen

    def _sketch(self, one: Held, role: str, values: Tensor) -> None:
        self._rows.add(Slot(one.name, role), values)
        self._of(one).roles[role] = None

    def _read_gradients(self) -> None:
        dense: dict[str, Tensor] = {}
        for one in self._held:
            gradient = one.parameter.grad
            if gradient is None:
                continue
            if gradient.layout == torch.strided:
                values = local(gradient)
                if values.is_floating_point() and not values.is_meta:
                    dense[one.name] = values
        for one in self._followed:
            if one.parameter.grad is not None:
                self._guarded(one.name, self._read_gradient, one, one.parameter.grad)
        try:
            self._differences.add(dense, self._divisor)
        except Exception as error:  # as in `_guarded`
            self._note(f"no gradient noise from differences: {type(error).__name__}: {error}")

    def _read_gradient(self, one: Held, gradient: Tensor) -> None:
        seen = self._of(one)
        if gradient.layout != torch.strided:
            seen.sparse = True
            gradient = gradient.detach().coalesce().values()
        values = local(gradient)
        if self._divisor is not None:
            values = values / self._divisor.to(values.device, non_blocking=True)
        self._sketch(one, WEIGHT_GRADIENT, values)
        if not seen.sparse:
            self._energy[one.name] = _sampled_squares(values)

    def _read_master(self, one: Held) -> None:
        def read() -> None:
            values = local(one.parameter)
            self._sketch(one, MASTER, values)
            if one.group is not None:
                self._before[one.name] = self._copies.of(values)

        self._guarded(one.name, read)

    def _read_update(self, one: Held, step: int) -> None:
        before = self._before.pop(one.name, None)
        if before is None:
            return
        update, cells = update_over(before, local(one.parameter), self._kept)
        self._sketch(one, UPDATE, update)
        self._of(one).cells[step] = cells

    def _read_states(self, one: Held) -> None:
        seen = self._of(one)
        seen.epsilon = epsilon_of(one.group)
        found: dict[str, list[Tensor]] = defaultdict(list)
        for name, tensor in states_of(self._optimizer, one.parameter):
            seen.states[name] = kind_of(tensor)
            if is_floating(tensor):
                found[name].append(local(tensor))
        for name, tensors in found.items():
            for tensor in tensors:
                self._sketch(one, name, tensor)
        state = self._optimizer.state.get(one.parameter, {})
        if {"exp_avg", "exp_avg_sq"} <= found.keys() and "step" in state and one.name in self._energy:
            (first,), (second,) = found["exp_avg"], found["exp_avg_sq"]
            step, betas = state["step"], one.group.get("betas") if one.group else None
            if isinstance(betas, (tuple, list)) and len(betas) == 2:
                counted = _number(step.detach().clone()) if isinstance(step, Tensor) else float(step)
                pair = (float(betas[0]), float(betas[1]))
                total = _number(strided(second, SAMPLE).sum(dtype=torch.float64))
                seen.moments.append(Moments(_sampled_squares(first), total, self._energy[one.name], counted, pair))

    @cached_property
    def _found(self) -> tuple[dict[str, ParameterRecord], dict[str, float]]:
        """The records by name, and the energy of each gradient, summed over pairs of recorded steps."""
        differences = self._differences.sums()
        records = {name: self._record(name, seen, differences.get(name)) for name, seen in self._seen.items()}
        energies = {
            name: energy * max(1.0, records[name].elements / NOISE_SAMPLE)
            for name, (_, energy) in differences.items()
            if name in records
        }
        return records, energies

    def _record(self, name: str, seen: _Seen, differences: tuple[float, float] | None) -> ParameterRecord:
        shape, dtype, elements = seen.held
        noise, source = noise_from_moments(seen.moments), MOMENTS
        if noise is None and differences is not None and differences[1] > 0:
            noise, source = differences[0] / differences[1], DIFFERENCES
        return ParameterRecord(
            name=name,
            dtype=dtype,
            roles=tuple(seen.roles),
            shape=shape,
            elements=elements,
            states=dict(seen.states),
            epsilon=seen.epsilon,
            gradient_noise=noise,
            noise_from=None if noise is None else source,
            sparse=seen.sparse,
            packed_updates={step: UpdateSketch.of(cells.cpu().numpy()).pack() for step, cells in seen.cells.items()},
        )


def _elements(parameter: Tensor) -> int:
    """Of all ranks together; 0 while a lazy one has no shape."""
    return 0 if is_lazy(parameter) else parameter.numel()


def _bytes_on_host(parameter: Tensor) -> int:
    return whole_lines(_elements(parameter) * parameter.dtype.itemsize) if parameter.device.type == "cpu" else 0


def _sampled_squares(values: Tensor) -> Tensor | float:
    return _number(strided(values, SAMPLE).to(torch.float64).square().sum())


def _number(value: Tensor) -> Tensor | float:
    """A scalar: itself where it is only known when its device gets there. On the host a number, which takes no heap."""
    return value.item() if value.is_cpu else value
