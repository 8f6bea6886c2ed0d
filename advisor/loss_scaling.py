"""Loss scaling: the gradients of a backward pass are `scale` times larger from the loss on, and as they are at the end.

Where the user's backward pass starts, the gradient it starts from is multiplied by the scale; where a gradient reaches
a leaf of the graph (a parameter, or whatever else keeps a `.grad`), it is divided by it before it is added up. So the
casts of a plan see scaled gradients, and accumulation, clipping and the optimizer true ones. Scales are powers of two:
neither changes a mantissa. But the gradient of a parameter in fp16 is an fp16 number, below 2^-14 a subnormal one or 0,
however the loss was scaled: torch's GradScaler refuses such parameters, here the report says it. Tensors in the middle
of the graph (`retain_grad`, hooks of modules), and hooks that were on a parameter before the block, see scaled
gradients, as with torch's GradScaler; `torch.autograd.grad` is the user's own and is not scaled.

Dynamic scaling: a step with a gradient that is not finite is skipped and the scale is halved; after `growth_interval`
steps without one it is doubled. Skipped means that the optimizer sees no gradient at all: no moment, no weight decay
and no count moves. (An optimizer that evaluates its closure several times a step, as LBFGS, has moved already when a
later evaluation overflows: it ends the step there.) A minimum that rises with the steps holds against halving
(Mellempudi et al. 2019, sec. 3.2); a step that overflows at it is skipped all the same. A gradient overflows only where
a cast lets it: with casts that saturate the scale grows up to `LARGEST`.

Static scaling skips nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from advisor.errors import InvalidPlan
from advisor.plan import LossScaling
from probes.loss_scale import tell
from probes.operation import argument, replaced

START = 2.0**16  # where no scale is given; as torch's GradScaler (torch 2.13)
GROWTH_INTERVAL = 2000  # where none is given; the same
LARGEST = 2.0**24  # growth ends here, unless it starts above; as NVIDIA's apex (max_loss_scale)

BACKWARDS = {torch.Tensor.backward: 1, torch.autograd.backward: 1}
"""A function that starts a backward pass, and the position of the gradients that it starts from."""


def first_scale(plan: LossScaling) -> float:
    """The scale of the first step."""
    least = max((float(least) for start, least in plan.minimums if start <= 0), default=0.0)
    return max(START if plan.scale is None else float(plan.scale), least)


class LossScaler:
    """The scale of each step, what it does to gradients, and what became of it.

    scale    the current factor
    steps    steps that were met, skipped ones included
    skipped  steps that were skipped
    changes  (step before which it holds, scale): the first one, and one for every change
    bare     steps whose gradients came from no backward pass that was met here, so nothing was scaled

    Raises InvalidPlan for a scale that is no power of two, an interval below 1, and minimums that do not rise.
    """

    def __init__(self, plan: LossScaling) -> None:
        require_usable(plan)
        self.plan = plan
        self.steps = self.skipped = self.bare = self._good = 0
        self.scale = first_scale(plan)
        self.changes: list[tuple[int, float]] = [(0, self.scale)]
        self._dividing: float | None = None
        self._met = False
        self._overflowed: list[Tensor] = []
        self._hooks: list[Any] = []
        self._hooked: set[int] = set()
        self._halves = False

    @property
    def is_dynamic(self) -> bool:
        return self.plan.kind == "dynamic"

    @property
    def minimum(self) -> float:
        """The smallest scale at this step; 0 where none is set."""
        return max((float(least) for start, least in self.plan.minimums if self.steps >= start), default=0.0)

    def enter(self, parameters: Iterable[Tensor]) -> None:
        """From now on gradients that reach these leaves are divided."""
        for parameter in parameters:
            if parameter.requires_grad and parameter.is_leaf and id(parameter) not in self._hooked:
                self._hooked.add(id(parameter))
                self._halves |= parameter.dtype == torch.float16
                self._hooks.append(parameter.register_hook(self._divided))

    def leave(self) -> None:
        """Divide nothing any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._hooked.clear()
        self._overflowed.clear()

    @contextmanager
    def scaled(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The call of a backward function with its gradients scaled; while entered, leaves divide."""
        roots: Any = args[0] if args else kwargs.get("tensors")
        single = isinstance(roots, Tensor)
        tensors: list[Tensor] = [roots] if single else list(roots or ())
        keyword = "gradient" if function is torch.Tensor.backward else "grad_tensors"
        given = argument(args, kwargs, BACKWARDS[function], keyword)
        gradients = [given] if single and not isinstance(given, tuple | list) else list(given or [None] * len(tensors))
        with torch._C.DisableTorchFunction():
            scaled = [self._multiplied(root, one) for root, one in zip(tensors, gradients, strict=True)]
            tell(self.scale)
            others = [leaf.register_hook(self._divided) for leaf in _leaves(tensors) if id(leaf) not in self._hooked]
        before, self._dividing, self._met = self._dividing, self.scale, True
        new = scaled[0] if single else scaled
        try:
            yield replaced(args, kwargs, {(BACKWARDS[function], keyword): new})
        finally:
            self._dividing = before
            for hook in others:
                hook.remove()

    def overflowed(self, gradients: Iterable[Tensor]) -> bool:
        """Whether this step is to be skipped. Waits for the device."""
        if not self.is_dynamic:
            return False
        with torch._C.DisableTorchFunction(), torch.no_grad():
            found = [_is_finite(gradient) for gradient in gradients]
            if not _has_ranks():  # of several ranks, each would tell of its own: they agree on what was reduced
                found += self._overflowed
            return not all(bool(one) for one in found)

    def after_step(self, skipped: bool, had_gradients: bool) -> None:
        """Count a step, and find the next one's scale."""
        self.bare += had_gradients and not self._met
        self._overflowed.clear()
        self._met = False
        self.steps += 1
        self.skipped += skipped
        scale = self.scale
        if self.is_dynamic and skipped:
            scale, self._good = scale / 2, 0
        elif self.is_dynamic:
            self._good += 1
            if self._good >= (self.plan.growth_interval or GROWTH_INTERVAL):
                scale, self._good = max(scale, min(2 * scale, LARGEST)), 0
        scale = max(scale, self.minimum)
        if scale != self.scale:
            self.scale = scale
            self.changes.append((self.steps, scale))

    def state_dict(self) -> dict[str, Any]:
        """All that goes on in another process, as JSON can hold it."""
        return {
            "scale": self.scale,
            "good": self._good,
            "steps": self.steps,
            "skipped": self.skipped,
            "bare": self.bare,
            "changes": [list(one) for one in self.changes],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.scale, self._good = float(saved["scale"]), int(saved["good"])
        self.steps, self.skipped, self.bare = int(saved["steps"]), int(saved["skipped"]), int(saved["bare"])
        self.changes = [(int(step), float(scale)) for step, scale in saved["changes"]]

    def row(self) -> dict[str, Any]:
        """For the report: the scale as `cast`, steps as `count`, and what else became of it."""
        how = f"loss scaled, {self.plan.kind}"
        if not self.steps:
            how = "never met"
        elif self.bare:
            how += f"; {self.bare} steps had gradients from no backward pass that was met, and were not scaled"
        if self._halves:
            how += "; gradients of fp16 parameters are divided in fp16, where those below 2^-25 become 0"
        return {
            "site": "(loss)",
            "role": "scale",
            "cast": f"x{self.scale:.16g}",
            "how": how,
            "count": self.steps,
            "skipped": self.skipped,
            "changes": [list(one) for one in self.changes],
        }

    def __str__(self) -> str:
        changes = [f"{scale:.16g} from step {step} on" for step, scale in self.changes]
        shown = changes if len(changes) <= 8 else [*changes[:3], "…", *changes[-4:]]
        return f"loss scale: {', '.join(shown)}; {self.skipped} of {self.steps} steps skipped"

    def _multiplied(self, root: Tensor, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:
            if root.numel() != 1:
                return None  # torch says what is wrong with that
            return torch.full_like(root, self.scale, requires_grad=False)
        return gradient * self.scale

    def _divided(self, gradient: Tensor) -> Tensor | None:
        if self._dividing is None:
            return None
        with torch._C.DisableTorchFunction():
            if self.is_dynamic:
                self._overflowed.append(_is_finite(gradient))
            return gradient / self._dividing


def _is_finite(gradient: Tensor) -> Tensor:
    values = gradient.detach()
    if values.layout == torch.sparse_coo:
        values = values._values()
    return values.isfinite().all()


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _leaves(roots: Iterable[Tensor]) -> Iterator[Tensor]:
    """Every leaf of the graph behind these tensors that a gradient is added up in."""
    seen: set[Any] = set()
    waiting: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    yield from (root for root in roots if root.grad_fn is None and root.requires_grad)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions if following is not None]


def require_usable(plan: LossScaling) -> None:
    """Raises InvalidPlan for a scale that is no power of two, an interval below 1, and minimums that do not rise."""
    if plan.kind == "none":
        return
    if plan.scale is None and plan.kind == "static":
        raise InvalidPlan("the plan's loss scaling is static and has no scale")
    for scale in [*([] if plan.scale is None else [plan.scale]), *(least for _, least in plan.minimums)]:
        if not (math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5):
            raise InvalidPlan(f"a loss scale is a power of two, so that it changes no mantissa; the plan has {scale}")
    if plan.growth_interval is not None and plan.growth_interval < 1:
        raise InvalidPlan(f"a loss scale's growth interval is 1 step or more; the plan has {plan.growth_interval}")
    steps = [start for start, _ in plan.minimums]
    if sorted(set(steps)) != steps or any(step < 0 for step in steps):
        raise InvalidPlan(f"the steps of the loss scale's minimums rise from 0 on; the plan has {steps}")
    if plan.kind == "static" and (plan.minimums or plan.growth_interval is not None):
        raise InvalidPlan("a static loss scale has neither minimums nor a growth interval; the plan gives one")
