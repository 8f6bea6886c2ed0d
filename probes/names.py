"""Where in the model we are: the stack of modules being run, and which module owns which parameter.

A site's name comes from here. Forward hooks keep one stack a thread, because activation checkpointing runs modules
again in the backward pass, on CUDA in a thread of autograd's.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

ROOT = "(root)"


@dataclass(eq=False, slots=True)
class Frame:
    """One entry into a module's forward: its path, and how often each operation has been met in it.

    `trains`: gradients were enabled on entry. `recomputes`: it was entered in the backward pass.
    `routed`: rows have been picked by index in it, so that they may be in another order than the batch's.
    """

    path: str
    module: nn.Module
    trains: bool
    recomputes: bool
    met: dict[str, int] = field(default_factory=dict)
    leave: Callable[[], None] | None = None
    routed: bool = False


class Owned(NamedTuple):
    """Where a parameter lives: the module's path, the parameter's own name, and the site of a product with it."""

    path: str
    site: str
    dotted: str | None  # the name that `model.named_parameters()` gives it: of a tied parameter, its first owner's


class ParameterOwners:
    """Which modules own a tensor: by identity, views included, tied parameters with every owner.

    A parameter that is met and not known makes it look through the model again: modules may have been put in since,
    and FSDP2 puts a gathered parameter in its shard's place for the time of a forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._owned: dict[int, tuple[ref[Tensor], list[Owned]]] = {}
        self._by_name: dict[tuple[str, str], Owned] = {}
        self._look()

    def of(self, tensor: Tensor, current: Frame) -> Owned | None:
        """The owner of the parameter that this tensor is, or is a view of; the current module if it is one of them.

        A tensor that stands in a parameter's place for the time of a call (`torch.func.functional_call`) counts as it.
        """
        base = tensor._base
        owners = self._of(tensor)
        if owners is None and base is not None:
            owners = self._of(base)
        if owners is None:
            return self._standing_in(tensor, base, current)
        return next((owned for owned in owners if owned.path == current.path), owners[0])

    def _standing_in(self, tensor: Tensor, base: Tensor | None, current: Frame) -> Owned | None:
        for name, parameter in current.module._parameters.items():
            if parameter is not None and (parameter is tensor or parameter is base):
                return self._by_name.get((current.path, name))
        return None

    def _of(self, tensor: Tensor) -> list[Owned] | None:
        found = self._known(tensor)
        if found is None and isinstance(tensor, nn.Parameter):
            self._owned[id(tensor)] = ref(tensor), []  # a stranger, unless it is found now
            self._look()
            found = self._known(tensor)
        return found or None

    def _known(self, tensor: Tensor) -> list[Owned] | None:
        known, owners = self._owned.get(id(tensor), (None, None))
        return owners if known is not None and known() is tensor else None

    def _look(self) -> None:
        dotted = {id(parameter): written_parameter(name) for name, parameter in self._model.named_parameters()}
        found: dict[int, tuple[ref[Tensor], list[Owned]]] = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            several = len(_matrix_parameters(module)) > 1
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                where = written(path)
                owned = Owned(where, f"{where}/{name}" if several else where, dotted[id(parameter)])
                found.setdefault(id(parameter), (ref(parameter), []))[1].append(owned)
                self._by_name[where, name] = owned
        self._owned.update(found)


class ModuleStack:
    """The modules being run in each thread, kept by forward hooks on every module of a model."""

    def __init__(self, model: nn.Module, entered: Callable[[Frame, tuple[Any, ...], dict[str, Any]], None]) -> None:
        self._model = model
        self._entered = entered
        self._local = _Frames()
        self._hooked: dict[int, _Hooked] = {}

    def attach(self) -> list[str]:
        """Put the hooks on; again, follow what has become of the model: gives the paths of what came, went or moved.

        A module that stands at several paths is named by the first. Where the user took a hook of ours off, both are
        put on anew. TorchScript's modules take no hooks and call no torch function: what they multiply is not seen.
        """
        changed, gone = [], dict(self._hooked)
        for path, module in self._model.named_modules():
            if isinstance(module, (torch.jit.ScriptModule, torch._dynamo.OptimizedModule)):
                continue
            hooked = gone.pop(id(module), None)
            if hooked is not None and hooked.path == path and hooked.is_whole:
                continue
            if hooked is not None:
                hooked.take_off()
            handles = (
                module.register_forward_pre_hook(_Push(self, written(path)), with_kwargs=True, prepend=True),
                module.register_forward_hook(_Pop(self), always_call=True),
            )
            self._hooked[id(module)] = _Hooked(path, module, handles)
            changed.append(written(path))
        for key, hooked in gone.items():
            hooked.take_off()
            del self._hooked[key]
            changed.append(written(hooked.path))
        return changed

    def detach(self) -> None:
        """Take the hooks off; again is harmless."""
        for hooked in self._hooked.values():
            hooked.take_off()
        self._hooked.clear()

    @contextmanager
    def put_aside(self) -> Iterator[None]:
        """Without the hooks, for torch.compile to trace: it remembers each, and would compile anew for other ones."""
        self.detach()
        try:
            yield
        finally:
            self.attach()

    def unwind(self, keep: Frame | None = None) -> None:
        """Leave the modules of this thread that a KeyboardInterrupt has left without running their hooks (2.13).

        All of them; or, when `keep` has just been entered, those beneath it whose forward does not run any more.
        """
        running = [] if keep is None else _running()
        for frame in reversed(tuple(self.frames)):
            if frame.module in running:
                del running[: running.index(frame.module) + 1]
            else:
                self.frames.remove(frame)
                self._leave(frame)

    @property
    def frames(self) -> list[Frame]:
        """This thread's stack, outermost first."""
        return self._local.frames

    def push(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is entered."""
        if is_compiling():
            return
        frame = Frame(path, module, torch.is_grad_enabled(), torch._C._current_graph_task_id() != -1)
        self._local.frames.append(frame)
        self._entered(frame, args, kwargs)

    def pop(self, module: nn.Module) -> None:
        """Leave this module, and those within that were left without their hooks."""
        if is_compiling():
            return
        frames = self._local.frames
        if not any(frame.module is module for frame in reversed(frames)):
            return
        while True:
            frame = frames.pop()
            self._leave(frame)
            if frame.module is module:
                return

    def _leave(self, frame: Frame) -> None:
        if frame.leave is not None:
            frame.leave()


class _Frames(threading.local):
    def __init__(self) -> None:
        self.frames: list[Frame] = []


@dataclass(frozen=True)
class _Hooked:
    """A module that has our hooks, kept alive until they are taken off."""

    path: str
    module: nn.Module
    handles: tuple[RemovableHandle, RemovableHandle]

    @property
    def is_whole(self) -> bool:
        """Whether the hooks are still there: a user may clear a module's."""
        return all(handle.id in (handle.hooks_dict_ref() or ()) for handle in self.handles)

    def take_off(self) -> None:
        for handle in self.handles:
            handle.remove()


def _running() -> list[nn.Module]:
    """The modules whose forward this thread is in, innermost first, by Python's own stack."""
    found, frame = [], sys._getframe(1).f_back
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found


class _Hook:
    """A hook of ours. A module that is copied or pickled while it is watched gets an idle one: a copy is not watched,
    and keeps nothing of the window."""

    def __init__(self, stack: ModuleStack) -> None:
        self._stack = stack

    def __deepcopy__(self, memo: Any) -> Callable[..., None]:
        return idle

    def __reduce__(self) -> Any:
        return _idle_hook, ()


class _Push(_Hook):
    def __init__(self, stack: ModuleStack, path: str) -> None:
        super().__init__(stack)
        self._path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stack.push(self._path, module, args, kwargs)


class _Pop(_Hook):
    def __call__(self, module: nn.Module, *_: Any) -> None:
        self._stack.pop(module)


def idle(*_: Any) -> None:
    """What stands in a copy of a watched module where the hook was."""


def _idle_hook() -> Callable[..., None]:
    return idle


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own model within torch's wrappers, so that sites have the same names with and without them."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def written(path: str) -> str:
    """A module's path as sites have it: the root's has a name, and torch.compile's wrappers none."""
    return path.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix(".") or ROOT


def written_parameter(name: str) -> str:
    """A parameter's dotted name, without torch.compile's wrappers."""
    return name.replace("_orig_mod.", "")


def in_backward() -> bool:
    """Whether this thread is running a node of autograd's: a product met there is a recomputation.

    Not while torch.compile traces the hook: it cannot follow the question (2.13), and compiles no backward that way.
    """
    if is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def _matrix_parameters(module: nn.Module) -> list[str]:
    """Names of the module's own parameters that can be an operand of a matrix product.

    One that is registered but absent counts (MultiheadAttention's `q_proj_weight`, present when its widths differ),
    so that a site's name does not depend on a module's options; an absent bias does not. A lazy one, whose shape is not
    known yet, is taken for what its name says, too.
    """
    return [
        name
        for name, parameter in module._parameters.items()
        if (name.endswith("weight") if parameter is None or is_lazy(parameter) else parameter.dim() > 1)
    ]
