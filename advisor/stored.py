"""Tensors that outlive a step, kept in the format that a plan names: each is rounded to it after every update.

The update itself is calculated in the tensor's own dtype. A master weight in bf16 thus becomes round(w + Δw), with the
sum in float32 as an optimizer's kernel with bf16 weights has it: an update below half a step of the format is lost, as
there. An optimizer's state is rounded after the step that read it. Between two updates nothing changes, so what is
saved and loaded is what the format holds.

Four kinds of tensors and one number, by the role that a plan gives them:

    master      a parameter of the model                              after each step of the optimizer
    exp_avg, …  the optimizer's state of that name for a parameter    after each step of the optimizer
    weight_grad the gradient that a parameter collects                after each backward pass has added to it
    buffer      a buffer of a module, as BatchNorm's running_mean     after each forward of its module, and each step
    epsilon     the optimizer's own `eps`, as a step reads it         during each step; between steps it is the user's

Under a loss scale a gradient is collected scaled: what is rounded is `scale` times it (`loss_scaling.py` divides it
before), so it overflows where a scaled one does, and the step is then skipped.

`epsilon` belongs to a parameter group, so every parameter of the group is to be named with the same cast. In fp16
Adam's usual 1e-8 becomes 0, and what it kept finite does not stay so: 0/0 for a gradient that is 0. (An optimizer
that computes in fp16 has less still: v itself becomes 0 within the step, and m/0 infinite. Here the step computes v in
float32, and m/√v grows to about 1/√(1-β₂).)
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advisor.castnames import keeps
from advisor.errors import InvalidPlan, PlanMismatch
from advisor.plan import Stored
from probes.casts import Cast, CastState
from probes.distributed import is_sharded
from probes.parameter_records import MASTER, WEIGHT_GRADIENT
from probes.records import Slot

BUFFER, EPSILON = "buffer", "epsilon"


class StoredTensors:
    """Rounds the tensors that a plan names, and says how often it did.

    optimizer  None where no row needs one: buffers alone
    seed       of the streams of stochastic rounding, one a tensor; torch's generators are not used
    scale      gives the loss scale of now

    Raises PlanMismatch for a name that the model has not, and for a parameter that the optimizer has not; InvalidPlan
    for a cast that is no format to keep a tensor in (delayed scales, whose history no step of an optimizer has; e8m0),
    a tensor that is named twice, an integer buffer, `epsilon` for part of a group, and sharded parameters.
    """

    def __init__(
        self,
        rows: Sequence[Stored],
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        seed: int,
        scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._scale = scale
        self._model, self._optimizer = model, optimizer
        self._rows = tuple(rows)
        self.casts = {Slot(row.name, row.role): Cast.parse(row.cast) for row in rows}
        self.states = {slot: CastState(seed=zlib.crc32(f"{seed}/{slot}".encode())) for slot in self.casts}
        self.counts: Counter[Slot] = Counter()
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._hooks: list[Any] = []
        self._seen: dict[Slot, Tensor] = {}
        self._own_epsilons: list[tuple[dict[str, Any], Any]] = []
        for slot, cast in self.casts.items():
            _require_storable(slot, cast)
            self._require_there(slot)
        self._require_distinct()
        if rows and is_sharded(model):
            raise InvalidPlan("stored tensors of a model with sharded parameters (FSDP2) cannot be rounded here")
        self._epsilons = self._by_group()

    def enter(self, rounded: bool) -> None:
        """Round everything that is there, unless it is known to be; from now on buffers follow their modules."""
        if not rounded:
            for slot in self.casts:
                self._keep(slot)
        for slot in self.casts:
            if slot.role == BUFFER:
                module = self._model.get_submodule(slot.site.rpartition(".")[0])
                self._hooks.append(module.register_forward_hook(self._following(slot)))
            elif slot.role == WEIGHT_GRADIENT and self._parameters[slot.site].requires_grad:
                parameter = self._parameters[slot.site]
                self._hooks.append(parameter.register_post_accumulate_grad_hook(self._collecting(slot)))

    def leave(self) -> None:
        """Take everything off; the tensors stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._seen.clear()
        self.after_step_alone()

    def before_step(self) -> None:
        """Give the optimizer the epsilon that the plan's format holds."""
        self.after_step_alone()  # of a step that raised
        for group, cast in self._epsilons:
            self._own_epsilons.append((group, group["eps"]))
            group["eps"] = _rounded(group["eps"], cast)

    def after_step_alone(self) -> None:
        """Give it its own back."""
        for group, epsilon in self._own_epsilons:
            group["eps"] = epsilon
        self._own_epsilons.clear()

    def after_step(self, stepped: Callable[[Tensor], bool]) -> None:
        """Round what the step has updated. `stepped` says whether a parameter had a gradient.

        Raises PlanMismatch where the optimizer keeps no such state for a parameter that it has updated.
        """
        self.after_step_alone()
        for slot in self.casts:
            if slot.role == EPSILON:
                self.counts[slot] += 1
            elif slot.role == BUFFER:
                self._follow(slot)
            elif slot.role != WEIGHT_GRADIENT and not self._keep(slot) and stepped(self._parameters[slot.site]):
                assert self._optimizer is not None
                known = ", ".join(map(str, self._optimizer.state.get(self._parameters[slot.site], {}))) or "none"
                raise PlanMismatch(
                    f"{type(self._optimizer).__name__} keeps no tensor {slot.role!r} for {slot.site}, which the plan "
                    f"wants as {self.casts[slot]}; its states: {known}"
                )

    def rows(self) -> Iterator[dict[str, Any]]:
        """site (the tensor's name), role, cast, how ("stored", "kept", "never met") and count, tensor by tensor."""
        for slot, cast in self.casts.items():
            count = self.counts[slot]
            how = "never met" if not count else "kept" if keeps(cast) else "stored"
            yield {"site": slot.site, "role": slot.role, "cast": str(cast), "how": how, "count": count}

    def _keep(self, slot: Slot) -> bool:
        """Round one tensor in place, if it is there."""
        if slot.role in (EPSILON, WEIGHT_GRADIENT):
            return True
        tensor = self._tensor(slot)
        if tensor is None:
            return False
        self.counts[slot] += 1
        if not keeps(self.casts[slot]):
            with torch._C.DisableTorchFunction(), torch.no_grad():
                # BatchNorm keeps its statistics for the backward pass, and does not use them there in training. Changed
                # as data: a change in place autograd would refuse (torch 2.13).
                target = tensor.data if slot.role == BUFFER else tensor
                target.copy_(self.casts[slot](tensor.detach(), self.states[slot]))
        if slot.role == BUFFER:
            self._seen[slot] = tensor.clone()
        return True

    def _tensor(self, slot: Slot) -> Tensor | None:
        if slot.role == BUFFER:
            return self._model.get_buffer(slot.site)
        parameter = self._parameters[slot.site]
        if slot.role == MASTER:
            return parameter
        assert self._optimizer is not None
        state = self._optimizer.state.get(parameter, {}).get(slot.role)
        return state if isinstance(state, Tensor) and state.is_floating_point() else None

    def _following(self, slot: Slot) -> Callable[..., None]:
        return lambda *_: self._follow(slot)

    def _collecting(self, slot: Slot) -> Callable[[Tensor], None]:
        cast, state = self.casts[slot], self.states[slot]

        def collected(parameter: Tensor) -> None:
            gradient, scale = parameter.grad, self._scale()
            if gradient is None:
                return
            if gradient.layout != torch.strided:
                raise InvalidPlan(f"the gradient of {slot.site} is sparse, and the plan keeps it as {cast}")
            self.counts[slot] += 1
            if not keeps(cast):
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    gradient.copy_(cast(gradient.detach() * scale, state) / scale)

        return collected

    def _follow(self, slot: Slot) -> None:
        """Round a buffer that holds other values than when it was last rounded.

        BatchNorm's kernels do not tell of their updates by the tensors' versions (torch 2.13).
        """
        seen, found = self._seen.get(slot), self._tensor(slot)
        with torch._C.DisableTorchFunction():
            if found is not None and (seen is None or seen.shape != found.shape or not torch.equal(seen, found)):
                self._keep(slot)

    def _require_distinct(self) -> None:
        """A tensor that several names mean, as a tied weight, is named once."""
        tensors = {**self._parameters, **dict(self._model.named_buffers(remove_duplicate=False))}
        keys = [(id(tensors[row.name]), row.role) for row in self._rows]
        counts = Counter(keys)
        twice = [f"{row.name} {row.role}" for row, key in zip(self._rows, keys, strict=True) if counts[key] > 1]
        if twice:
            raise InvalidPlan(f"the plan's storage names a tensor twice: {', '.join(twice[:5])}")

    def _require_there(self, slot: Slot) -> None:
        if slot.role == BUFFER:
            found = dict(self._model.named_buffers(remove_duplicate=False)).get(slot.site)
            if found is None:
                raise PlanMismatch(f"the plan keeps the buffer {slot.site} as {self.casts[slot]}: the model has none")
            if not found.is_floating_point():
                raise InvalidPlan(f"the buffer {slot.site} holds {found.dtype}, which no cast can be applied to")
            return
        parameter = self._parameters.get(slot.site)
        if parameter is None:
            raise PlanMismatch(
                f"the plan keeps {slot.role} of {slot.site} as {self.casts[slot]}: the model has no such parameter"
            )
        if slot.role == WEIGHT_GRADIENT:
            return
        if self._optimizer is None:
            raise InvalidPlan(
                f"the plan keeps {slot.role} of {slot.site} as {self.casts[slot]}, after each step of the optimizer: "
                "give apply the optimizer"
            )
        updated = slot.role != MASTER or parameter.requires_grad  # a frozen one is rounded once and stays so
        if updated and not any(one is parameter for one in _parameters_of(self._optimizer)):
            raise PlanMismatch(f"the plan names {slot.role} of {slot.site}, and the optimizer has not that parameter")

    def _by_group(self) -> list[tuple[dict[str, Any], Cast]]:
        """The optimizer's groups whose epsilon has a cast."""
        named = {id(self._parameters[slot.site]): slot for slot in self.casts if slot.role == EPSILON}
        found: list[tuple[dict[str, Any], Cast]] = []
        for group in self._optimizer.param_groups if named and self._optimizer is not None else ():
            slots = [named.get(id(parameter)) for parameter in group["params"]]
            first = next((slot for slot in slots if slot is not None), None)
            if first is None:
                continue
            cast = self.casts[first]
            if "eps" not in group:
                raise PlanMismatch(f"{type(self._optimizer).__name__} has no eps, which the plan wants as {cast}")
            if any(slot is None or self.casts[slot] != cast for slot in slots):
                raise InvalidPlan(
                    f"epsilon belongs to a parameter group of the optimizer, and the plan gives {cast} to "
                    f"{first.site} but not to all {len(slots)} parameters of its group"
                )
            found.append((group, cast))
        return found


def _rounded(epsilon: Any, cast: Cast) -> Any:
    """A number, None, or a tuple of them, as the format holds it."""
    if isinstance(epsilon, tuple | list):
        return type(epsilon)(_rounded(one, cast) for one in epsilon)
    if epsilon is None or keeps(cast):
        return epsilon
    with torch._C.DisableTorchFunction(), torch.no_grad():
        if isinstance(epsilon, Tensor):
            return cast(epsilon.detach())
        return float(cast(torch.tensor(epsilon, dtype=torch.float64)))


def _parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _require_storable(slot: Slot, cast: Cast) -> None:
    what = f"{slot.role} of {slot.site} is to be kept as {cast}"
    if cast.is_delayed:
        raise InvalidPlan(f"{what}, and a delayed scale is of calls before: a stored tensor has its own values' scale")
    if not cast.format.signed:
        raise InvalidPlan(f"{what}, and {cast.format} is a format for scales, without a sign and without zero")
    if slot.role == EPSILON and (cast.is_random or not (cast.granularity == "none" or cast.is_static)):
        raise InvalidPlan(f"{what}: a single number is rounded to nearest or toward zero, and by no scale of its own")
