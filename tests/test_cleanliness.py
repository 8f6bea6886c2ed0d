"""After a window nothing is left: no hook, no mode, no patch, no reference, however it ends."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import probes
from probes.probing import probe
from probes.window import Window

WIDTH, CLASSES = 6, 3


class Interrupting(nn.Module):
    """Raises what it is told to, when it is told to: in its forward or in the backward pass behind it."""

    error: BaseException | None = None
    where = "nowhere"

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            self.throw()
        if self.where == "backward":
            x.register_hook(lambda gradient: self.throw())
        return x.relu()

    def throw(self) -> None:
        assert self.error is not None
        raise self.error


class Stepper(torch.optim.Adam):
    error: BaseException | None = None

    def step(self, closure: Any = None) -> Any:
        if self.error is not None:
            raise self.error
        return super().step(closure)


class BrokenLosses(TorchFunctionMode):
    """The user's own mode around the window's: what raises is called by the window's hook."""

    error: BaseException | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.cross_entropy and self.error is not None:
            raise self.error
        return func(*args, **(kwargs or {}))


def build() -> tuple[nn.Module, Interrupting, Stepper]:
    inner = Interrupting()
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.Sequential(nn.BatchNorm1d(8), inner), nn.Linear(8, CLASSES))
    return model, inner, Stepper(model.parameters())


def loss_of(model: nn.Module, x: Tensor | None = None) -> Tensor:
    return F.cross_entropy(model(torch.randn(5, WIDTH) if x is None else x), torch.randint(0, CLASSES, (5,)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def attributes(model: nn.Module) -> dict[int, dict[str, Any]]:
    """What every module has of its own, its hooks included; a changed method would be an entry more."""
    return {
        id(module): {
            name: copy.copy(value) if "hooks" in name else id(value)
            for name, value in vars(module).items()
            if name not in ("error", "where")
        }
        for module in model.modules()
    }


@contextmanager
def nothing_stays(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """What the block leaves of a window: the objects, modes and patches must be as they were."""
    before = attributes(model)
    methods = (torch.amp.GradScaler.scale, torch.amp.GradScaler.update, torch.nn.Module.__call__)
    hooks = {name: dict(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")}
    stance = torch._dynamo.eval_frame._stance.stance
    yield
    assert attributes(model) == before
    assert {name: dict(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")} == hooks
    assert (torch.amp.GradScaler.scale, torch.amp.GradScaler.update, torch.nn.Module.__call__) == methods
    assert _get_current_function_mode_stack() == []
    assert _get_current_dispatch_mode_stack() == []
    assert torch._dynamo.eval_frame._stance.stance == stance
    assert torch.is_grad_enabled()
    assert not probes.probing._watched


@pytest.mark.parametrize("where", ["forward", "loss", "backward", "step", "between"])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupt_anywhere_leaves_nothing(where: str, kind: type[BaseException], at: int) -> None:
    model, inner, optimizer = build()
    watching, losses = probe(model, optimizer, steps=4, curvature_steps=2), BrokenLosses()

    def training() -> None:
        with losses, watching:
            for i in range(4):
                if i == at:
                    inner.where, inner.error = where, kind("ours")
                    optimizer.error = kind("ours") if where == "step" else None
                    losses.error = kind("ours") if where == "loss" else None
                    if where == "between":
                        raise kind("ours")
                step(model, optimizer)

    with nothing_stays(model, optimizer), pytest.raises(kind, match="ours"):
        training()
    window = watching.window
    assert window.steps == tuple(range(at))
    assert f"cut short by {kind.__name__} in step {at}" in window.notes[-1]
    inner.where, optimizer.error = "nowhere", None
    step(model, optimizer)
    with probe(model, optimizer, steps=1) as again:
        step(model, optimizer)
    assert again.steps == (0,)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_interrupt_that_the_user_catches_is_a_step_gone_wrong(kind: type[BaseException]) -> None:
    """Out of memory in a forward, caught and tried again, as some training loops do."""
    model, inner, optimizer = build()
    with nothing_stays(model, optimizer), probe(model, optimizer, steps=3) as window:
        for _again in range(3):
            inner.where, inner.error = "forward", kind("ours")
            with pytest.raises(kind, match="ours"):
                step(model, optimizer)
            inner.where = "nowhere"
            step(model, optimizer)
    assert window.steps == (0, 1, 2)
    assert {site.name for site in window.sites} == {"0", "2"}
    assert window.coverage.share == 1


def test_a_window_that_cannot_open_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, optimizer = build()

    def refused(hook: Any) -> Any:
        raise RuntimeError("no hooks today")

    monkeypatch.setattr(optimizer, "register_step_post_hook", refused)
    with nothing_stays(model, optimizer), pytest.raises(RuntimeError, match="no hooks today"):
        probe(model, optimizer, steps=1).__enter__()


def test_a_window_that_is_left_before_a_mode_within_leaves_that_mode() -> None:
    model, _, optimizer = build()
    watching, other = probe(model, optimizer, steps=1), BrokenLosses()
    with nothing_stays(model, optimizer):
        watching.__enter__()
        other.__enter__()
        step(model, optimizer)
        watching.__exit__(None, None, None)
        assert _get_current_function_mode_stack() == [other]
        other.__exit__(None, None, None)


def ended_by_itself(model: nn.Module, optimizer: torch.optim.Optimizer, keep: Callable[[Tensor], None]) -> Any:
    watching = probe(model, optimizer, steps=3, curvature_steps=2)
    with watching:
        for _ in range(4):
            one_step(model, optimizer, keep)
    return watching


def left_early(model: nn.Module, optimizer: torch.optim.Optimizer, keep: Callable[[Tensor], None]) -> Any:
    watching = probe(model, optimizer, steps=3, curvature_steps=2)
    with watching:
        one_step(model, optimizer, keep)
        x = torch.randn(5, WIDTH)
        keep(x)
        keep(loss_of(model, x))  # and no backward pass
    return watching


def broken_off(model: nn.Module, optimizer: torch.optim.Optimizer, keep: Callable[[Tensor], None]) -> Any:
    watching = probe(model, optimizer, steps=3, curvature_steps=2)
    try:
        with watching:
            one_step(model, optimizer, keep)
            keep(loss_of(model))
            raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        return watching, error  # its traceback holds this frame, and the window's


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, keep: Callable[[Tensor], None]) -> None:
    x = torch.randn(5, WIDTH)
    keep(x)
    hook = model[1].register_forward_hook(lambda module, args, result: keep(result))  # type: ignore[index, operator]
    loss = loss_of(model, x)
    hook.remove()
    keep(loss)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("way", [ended_by_itself, left_early])
def test_the_window_keeps_no_tensor_no_model_and_no_optimizer(way: Callable[..., Any]) -> None:
    seen: list[weakref.ref[Any]] = []
    model, _, optimizer = build()
    held = way(model, optimizer, lambda tensor: seen.append(weakref.ref(tensor)))
    seen += [weakref.ref(one) for one in (model, optimizer, *model.modules(), *model.parameters(), *model.buffers())]
    assert isinstance(held.window, Window)
    del model, optimizer, _
    gc.collect()
    assert [found for ref in seen if (found := ref()) is not None] == []


def test_nor_does_one_that_an_exception_broke_off() -> None:
    """The traceback holds the frame of the training, and so the model; of the step's own tensors it holds nothing."""
    seen: list[weakref.ref[Any]] = []
    model, _, optimizer = build()
    watching, error = broken_off(model, optimizer, lambda tensor: seen.append(weakref.ref(tensor)))
    gc.collect()
    assert [found for ref in seen if (found := ref()) is not None] == []
    refs = [weakref.ref(one) for one in (model, optimizer)]
    assert error.__traceback__ is not None
    error.__traceback__.tb_frame.clear()
    del model, optimizer, _
    gc.collect()
    assert [found for ref in refs if (found := ref()) is not None] == []
    assert watching.window.done


def test_tensors_are_let_go_when_the_window_ends_itself_and_not_when_the_block_is_left() -> None:
    seen: list[weakref.ref[Any]] = []
    model, _, optimizer = build()
    with probe(model, optimizer, steps=2) as window:
        for _ in range(2):
            one_step(model, optimizer, lambda tensor: seen.append(weakref.ref(tensor)))
        assert window.done
        gc.collect()
        assert [found for ref in seen if (found := ref()) is not None] == []


def test_a_graph_that_outlives_the_window_can_still_go_backward() -> None:
    model, _, optimizer = build()
    with probe(model, optimizer, steps=2) as window:
        step(model, optimizer)
        kept = loss_of(model)
    before = window.header()
    kept.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert window.header() == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_within_the_window_is_not_watched(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with probe(model, optimizer, steps=2) as window:
        for _ in range(2):
            another = copied(model)
            loss_of(another).backward()
            step(model, optimizer)
        recorder = weakref.ref(_get_current_function_mode_stack()[-1])
    assert window.history("0", "input").elements.tolist() == [5 * WIDTH] * 2
    gc.collect()
    assert recorder() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert loss_of(another).isfinite()


def test_an_optimizer_is_copied_and_saved_within_the_window() -> None:
    model, _, optimizer = build()
    with probe(model, optimizer, steps=2):
        step(model, optimizer)
        copies = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    for another in copies:
        assert not getattr(another, "_optimizer_step_post_hooks", None)


def test_other_threads_are_left_clean() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    together, left = threading.Barrier(3), []

    def meet(*_: Any) -> None:
        together.wait()

    model[1].register_forward_hook(meet)

    def forward(results: list[Tensor], i: int) -> None:
        results[i] = model(torch.randn(5, WIDTH))
        left.append((_get_current_function_mode_stack(), _get_current_dispatch_mode_stack()))

    with probe(model, optimizer, steps=2) as window:
        for _ in range(2):
            results: list[Any] = [None] * 3
            threads = [threading.Thread(target=forward, args=(results, i)) for i in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            F.cross_entropy(torch.cat(results), torch.zeros(15, dtype=torch.long)).backward()
            optimizer.step()
    assert left == [([], [])] * 6
    assert window.history("0", "input").elements.tolist() == [15 * WIDTH] * 2
    assert window.history("2", "grad_output").elements.tolist() == [15 * CLASSES] * 2
    assert window.coverage.share == 1


def test_a_window_that_another_thread_opened_can_be_left_here() -> None:
    model, _, optimizer = build()
    watching: AbstractContextManager[Window] = probe(model, optimizer, steps=2)
    thread = threading.Thread(target=watching.__enter__)
    thread.start()
    thread.join()
    step(model, optimizer)
    watching.__exit__(None, None, None)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert _get_current_function_mode_stack() == []


def test_a_process_that_is_killed_in_the_window_leaves_no_file(tmp_path: Any) -> None:
    import os
    import signal
    import subprocess
    import sys
    from pathlib import Path

    script = (
        "import os, signal, torch; from torch import nn; from probes.probing import probe\n"
        "model = nn.Linear(4, 4); optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "with probe(model, optimizer, steps=2):\n"
        "    model(torch.randn(2, 4)).sum().backward(); optimizer.step()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert list(tmp_path.iterdir()) == []
