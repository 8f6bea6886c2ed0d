"""Training with a plan, emulated: the site hook casts each operand, and each gradient that comes back.

A product y = x·w is run as Q(x)·Q(w). With one scale a tensor, or none, what autograd saves for the backward products
are the cast operands, and a hook on the result casts the gradient before both of them: the three products of the plan,
on any device, with the model's own code. A bias or an addend is given the cast gradient too. The gradient passes a cast
unchanged (straight-through; saturated elements are given theirs); the master weights, which the optimizer updates, are
the model's own parameters.

Each slot has a CastState: its place in a random stream, and delayed scaling's history. Every time the slot is cast goes
into it, so a history counts calls and not steps: a module that is entered twice in a step, a weight that is used twice,
evaluation inside the block, and what activation checkpointing recomputes, which is then cast with a later scale and
other draws than it was at first. `state_dict` and `load_state_dict` carry it from one process to the next.

Scales by row, column or block run along a product's inner dimension, which is another for each of the three products:
there an operand is cast anew, from its own values, for each of them (`product_casts.py`), and each counts as a call.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from advisor.castnames import keeps
from advisor.errors import InvalidPlan, PlanMismatch
from advisor.loss_scaling import BACKWARDS, LossScaler
from advisor.plan import Plan
from advisor.product_casts import FOLLOWED, Dimensions, cast_along, run_by_product
from advisor.stepping import Steps
from advisor.stored import StoredTensors
from probes.casts import Cast, CastState
from probes.distributed import is_sharded
from probes.edges import await_gradient
from probes.names import ROOT, unwrapped
from probes.ops import Operation
from probes.optimizer_states import innermost
from probes.records import GRADIENT, Slot
from probes.sites import ProductCall, SiteHook

LOSS_SCALE = Slot("(loss)", "scale")


class apply(SiteHook):  # noqa: N801 - used as a function: with apply(plan, model) as applied
    """Carry out a plan while the block runs: emulated casts at every site the plan names.

    `report()` says, slot by slot, how each cast is carried out and how often it was; then the same of tensors that are
    stored (`advisor.stored`) and of the loss scale (`advisor.loss_scaling`), if the plan has them. `seed` starts the
    streams of stochastic rounding, which are the plan's own. The optimizer may be left away where the plan stores
    nothing of its parameters and scales no loss; its dtypes stay, and tensors are rounded in place: when the block is
    entered, and after each step. What torch.compile has compiled runs uncompiled in the block, for a cast cannot be
    traced. Wrappers of torch (torch.compile's, DistributedDataParallel) change no site's name.

    Outside the block everything is as it was, but that stored tensors keep their rounded values.

    One plan at a time: entering a block within another on the same model raises InvalidPlan.

    Raises PlanMismatch at once if the plan's sites or tensors are not the model's and the optimizer's, and InvalidPlan
    for what cannot be carried out here.
    """

    def __init__(
        self, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, seed: int = 0
    ) -> None:
        model = unwrapped(model)
        super().__init__(model)
        self.heeded = frozenset()
        _require_match(plan, model)
        self._uncompiled = ExitStack()
        self.plan = plan
        optimizer = None if optimizer is None else innermost(optimizer)
        self.loss_scaler = None if plan.loss_scaling.kind == "none" else LossScaler(plan.loss_scaling)
        self._stored = StoredTensors(plan.storage, model, optimizer, seed, self._loss_scale)
        if self.loss_scaler is not None:
            _require_scalable(model, optimizer)
        self._steps = Steps(optimizer, self._stored, self.loss_scaler)
        self._optimizer, self._resumed = optimizer, False
        self.casts = {Slot(one.site, one.role): Cast.parse(one.cast) for one in plan.assignments}
        _require_possible(plan, self.casts)
        self.states = {slot: CastState(seed=zlib.crc32(f"{seed}/{slot}".encode())) for slot in self.casts}
        self.counts: Counter[Slot] = Counter()
        self.unplanned: Counter[str] = Counter()
        self.unplaced = 0

    def __enter__(self) -> Any:
        modes = _get_current_function_mode_stack()
        if any(isinstance(mode, apply) and mode.model is self.model for mode in modes):
            raise InvalidPlan(
                "a plan is carried out on this model already, and tensors would be cast twice: leave that block first"
            )
        if self._depth == 0:
            try:
                self._attach()
            except BaseException:
                self._detach()
                raise
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        left = super().__exit__(*error)
        if self._depth == 0:
            self._detach()
        return left

    def _attach(self) -> None:
        self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
        self._stored.enter(rounded=self._resumed)
        self._resumed = False
        self._steps.enter()
        if self.loss_scaler is not None:
            self.loss_scaler.enter(self._leaves())

    def _detach(self) -> None:
        self._uncompiled.close()
        self._steps.leave()
        self._stored.leave()
        if self.loss_scaler is not None:
            self.loss_scaler.leave()

    def report(self) -> list[dict[str, Any]]:
        """site, role, cast, how and count, slot by slot. How is one of

        emulated         the tensor was cast
        kept             the plan leaves it as it is
        never met        the plan names the slot, and no such product was run
        not in the plan  a product was run that the plan does not name: nothing was cast (cast None)
        not placed       a product was recomputed in the backward pass outside any module's forward, so its site is
                         unknown and nothing was cast (site None)
        stored           the tensor (site is its name) was rounded in place, or an epsilon lent to the optimizer
        loss scaled, …   site (loss): how many steps were, and were `skipped`; its `changes`, as `LossScaler` has them
        """
        rows: list[dict[str, Any]] = [
            {
                "site": slot.site,
                "role": slot.role,
                "cast": str(cast),
                "how": "never met" if not self.counts[slot] else "kept" if keeps(cast) else "emulated",
                "count": self.counts[slot],
            }
            for slot, cast in self.casts.items()
        ]
        rows += [
            {"site": site, "role": None, "cast": None, "how": "not in the plan", "count": count}
            for site, count in self.unplanned.items()
        ]
        rows += self._stored.rows()
        if self.loss_scaler is not None:
            rows.append(self.loss_scaler.row())
        if self.unplaced:
            rows.append({"site": None, "role": None, "cast": None, "how": "not placed", "count": self.unplaced})
        return rows

    def state_dict(self) -> list[dict[str, Any]]:
        """Each slot's and stored tensor's site, role, `calls` and `history`, and the loss scale's, as JSON can hold it.

        With it a training goes on bit-equal: load the model's, the optimizer's and this before the block is entered.
        """
        rows: list[dict[str, Any]] = [
            {**slot._asdict(), "calls": state.calls, "history": [float(amax) for amax in state.history]}
            for slot, state in self._all_states().items()
        ]
        if self.loss_scaler is not None:
            rows.append({**LOSS_SCALE._asdict(), **self.loss_scaler.state_dict()})
        return rows

    def load_state_dict(self, saved: Iterable[Mapping[str, Any]]) -> None:
        """Go on from what `state_dict` gave, under the same plan and seed. Raises PlanMismatch for another plan's.

        Before the block is entered it also says that stored tensors have been rounded: they are then left as they are.
        """
        found = {Slot(one["site"], one["role"]): one for one in saved}
        states = self._all_states()
        scaled = set() if self.loss_scaler is None else {LOSS_SCALE}
        if found.keys() != states.keys() | scaled:
            raise PlanMismatch(
                "the saved state of the casts is of another plan: its sites and roles are not this one's"
            )
        if self.loss_scaler is not None:
            self.loss_scaler.load_state_dict(found.pop(LOSS_SCALE))
        for slot, one in found.items():
            states[slot].calls, states[slot].history = one["calls"], deque(one["history"])
        self._resumed = self._depth == 0

    def _all_states(self) -> dict[Slot, CastState]:
        return {**self.states, **self._stored.states}

    def _loss_scale(self) -> float:
        return 1.0 if self.loss_scaler is None else self.loss_scaler.scale

    def _leaves(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        for group in () if self._optimizer is None else self._optimizer.param_groups:
            yield from group["params"]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Where a backward pass of the user's starts, it starts with the loss scale."""
        starts = func in BACKWARDS and not self._nested and not torch.compiler.is_compiling()
        if self.loss_scaler is None or not starts:
            return super().__torch_function__(func, types, args, kwargs)
        with self.loss_scaler.scaled(func, args, kwargs or {}) as (scaled_args, scaled_kwargs):
            return super().__torch_function__(func, types, scaled_args, scaled_kwargs)

    def on_backward(self, root: Any) -> None:
        """A backward pass starts: what the optimizer's next step does is a step of its own."""
        self._steps.backward()

    def on_unplaced(self, operation: Operation) -> None:
        """Count what is recomputed where no site can be told."""
        self.unplaced += 1

    def on_product(self, call: ProductCall) -> Any:
        """Cast the operands, run the product, and see that its gradient is cast."""
        if Slot(call.site, call.roles[0]) not in self.casts:
            self.unplanned[call.site] += 1
            return call.run()
        slots = [Slot(call.site, role) for role in call.roles]
        arriving = Slot(call.site, GRADIENT)
        once = frozenset(slot.role for slot in (*slots, arriving) if self._has_one_scale(slot))
        if len(once) < len({*call.roles, GRADIENT}):
            return run_by_product(call, partial(self._cast_role, call.site), once)
        result = call.run([self._cast(slot, operand) for slot, operand in zip(slots, call.operands, strict=True)])
        for part in call.results(result) if arriving in self.casts else ():
            # A hook and no autograd function: what the model then does to the result in place stays allowed.
            await_gradient(part, lambda gradient: None if gradient is None else self._cast(arriving, gradient))
        return result

    def _cast_role(self, site: str, role: str, values: Tensor, dimensions: Dimensions) -> Tensor:
        slot = Slot(site, role)
        return self._cast(slot, values, dimensions) if slot in self.casts else values

    def _has_one_scale(self, slot: Slot) -> bool:
        return slot not in self.casts or self.casts[slot].has_one_scale

    def _cast(self, slot: Slot, values: Tensor, dimensions: Dimensions = (-1,)) -> Tensor:
        cast = self.casts[slot]
        self.counts[slot] += 1
        if keeps(cast):
            return values
        with torch._C.DisableTorchFunction():
            return cast_along(cast, values, dimensions, self.states[slot])

    def __str__(self) -> str:
        rows = self.report()
        width = max((len(row["site"] or "") for row in rows), default=4)
        lines = [f"{'site':<{width}}  {'role':<11}  {'how':<15}  {'count':>7}  cast"]
        for row in rows:
            site, role, cast = row["site"] or "", row["role"] or "", row["cast"] or ""
            lines.append(f"{site:<{width}}  {role:<11}  {row['how']:<15}  {row['count']:>7}  {cast}")
        if self.loss_scaler is not None:
            lines.append(str(self.loss_scaler))
        return "\n".join(lines)


def _require_possible(plan: Plan, casts: Mapping[Slot, Cast]) -> None:
    """Raises InvalidPlan, naming the first slot whose cast cannot be carried out."""
    sites = {site.site: site for site in plan.sites}
    for slot, cast in casts.items():
        if not cast.format.signed:
            raise InvalidPlan(
                f"{slot.site} {slot.role} is to be cast as {cast}, and {cast.format} is a format for scales, without a "
                "sign and without zero"
            )
        op = sites[slot.site].op
        if not cast.has_one_scale and op not in FOLLOWED:
            raise InvalidPlan(
                f"{slot.site} {slot.role} is to be cast as {cast}, and scales for every {cast.granularity} run along "
                f"the inner dimension of each product by itself, which {op!r} does not show. Granularity 'none' and "
                "'tensor' can be applied there"
            )


def _require_scalable(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises InvalidPlan where a loss scale cannot be carried out."""
    if optimizer is None:
        raise InvalidPlan("the plan scales the loss, and steps may be skipped: give apply the optimizer")
    if is_sharded(model):
        raise InvalidPlan("the plan scales the loss, which cannot be done here for sharded parameters (FSDP2)")


def _require_match(plan: Plan, model: nn.Module) -> None:
    """Every site's place is in the model, and every weight has its shape. Raises PlanMismatch naming those that not."""
    modules = {path or ROOT for path, _ in model.named_modules(remove_duplicate=False)}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    wrong = []
    for site in plan.sites:
        if site.parameter is not None:
            found = shapes.get(site.parameter)
            if found is None:
                wrong.append(f"{site.site} (the model has no parameter {site.parameter})")
            elif site.parameter_shape is not None and found != site.parameter_shape:
                wrong.append(f"{site.site} (its weight is {list(found)}, the plan's {list(site.parameter_shape)})")
        elif site.site.rsplit("/", 1)[0] not in modules:
            wrong.append(f"{site.site} (the model has no module {site.site.rsplit('/', 1)[0]})")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise PlanMismatch(
            f"the plan was made for another model ({plan.model}); {len(wrong)} of its {len(plan.sites)} sites do not "
            f"match: {'; '.join(wrong[:8])}{more}. Probe this model and ask for a plan of its own"
        )
