"""Ways to watch a model while it trains, ours and other libraries': what `overhead.py` times.

Each is used as its documentation says, on what it is made for; where it takes single tensors (torch.ao's observers,
nvdlfw-inspect), they are given the inputs and outputs of every layer that multiplies by a weight. A watcher is a
context manager that gives the module to call and a function to call after each optimizer step.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probes import probe

WINDOW = 20  # steps

Watched = tuple[nn.Module, Callable[[], object]]
Watch = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[Watched]]


@dataclass(frozen=True)
class Watcher:
    """One way to watch.

    gives     what its user has at the end
    needs     the package that must be there
    steps     how many a window has, before it is opened anew
    at        the step of a window whose time counts; None: each
    """

    name: str
    gives: str
    watch: Watch
    needs: str = "torch"
    steps: int = WINDOW
    at: int | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the library is there."""
        return importlib.util.find_spec(self.needs) is not None


# Ours.


def _window(**options: Any) -> Watch:
    @contextmanager
    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Watched]:
        with probe(model, optimizer, **{"steps": WINDOW, "curvature_steps": 0, **options}):
            yield model, _nothing

    return watch


@contextmanager
def _unwatched(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Watched]:
    yield model, _nothing


def _nothing() -> None:
    pass


# Other libraries.


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that multiply by a weight: torch's linear layers and convolutions, and transformers' Conv1D."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) or type(module).__name__ == "Conv1D":
            yield name, module


def _observers(kind: str) -> Watch:
    @contextmanager
    def watch(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Watched]:
        from torch.ao import quantization

        make = getattr(quantization, kind)
        with ExitStack() as stack:
            for _name, module in _layers(model):
                before, after = make(), make()

                def observe(
                    _: nn.Module, inputs: Any, output: Tensor, before: nn.Module = before, after: nn.Module = after
                ) -> None:
                    before(inputs[0].detach())
                    after(output.detach())

                stack.callback(module.register_forward_hook(observe).remove)
            yield model, _nothing

    return watch


@contextmanager
def _tensor_tracker(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Watched]:
    import tensor_tracker

    with tensor_tracker.track(model, stash_value=lambda tensor: tensor.detach().std().cpu()) as tracker:
        yield model, tracker.clear


@contextmanager
def _inspect(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Watched]:
    import nvdlfw_inspect.api as api

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config = folder / "stats.yaml"
        config.write_text(_INSPECT)
        api.initialize(config_file=str(config), log_dir=str(folder), statistics_logger=None)
        stack.callback(api.end_debug)
        logging.getLogger().setLevel(logging.WARNING)
        api.infer_and_assign_layer_names(model)

        def log(name: str, kind: str, tensor: Tensor) -> None:
            api.log_tensor_stats(name, tensor=tensor.detach(), tensor_name=kind, skip_reduction=True)

        for name, module in _layers(model):

            def forward(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                log(name, "activation", inputs[0])
                log(name, "weight", module.weight)
                if output.requires_grad:
                    output.register_hook(lambda gradient: log(name, "gradient", gradient))

            stack.callback(module.register_forward_hook(forward).remove)
        yield model, api.step


_INSPECT = """
everything:
  enabled: True
  layers:
    layer_name_regex_pattern: .*
  LogTensorStats:
    enabled: True
    tensors: [activation, weight, gradient]
    stats: [min, max, mean, std]
    freq: 1
"""


@contextmanager
def _wandb(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Watched]:
    import wandb

    with tempfile.TemporaryDirectory() as folder:
        run = wandb.init(mode="offline", dir=folder, settings=wandb.Settings(silent=True, console="off"))
        run.watch(model, log="all", log_freq=1)
        try:
            yield model, lambda: run.log({})
        finally:
            run.unwatch(model)
            run.finish()


@contextmanager
def _underflow_overflow(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Watched]:
    from transformers.debug_utils import DebugUnderflowOverflow

    before = {module: dict(module._forward_hooks) for module in model.modules()}
    DebugUnderflowOverflow(model)
    try:
        yield model, _nothing
    finally:  # it has no way to take its hooks off (transformers 5)
        for module, hooks in before.items():
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


@contextmanager
def _tensorboard(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Watched]:
    from torch.utils.tensorboard import SummaryWriter

    step = 0
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        writer = SummaryWriter(folder)
        stack.callback(writer.close)
        for name, module in _layers(model):

            def forward(_: nn.Module, __: Any, output: Tensor, name: str = name) -> None:
                writer.add_histogram(f"{name}/activation", output.detach(), step)

            stack.callback(module.register_forward_hook(forward).remove)
        for name, parameter in model.named_parameters():

            def received(parameter: Tensor, name: str = name) -> None:
                assert parameter.grad is not None
                writer.add_histogram(f"{name}/gradient", parameter.grad, step)

            stack.callback(parameter.register_post_accumulate_grad_hook(received).remove)

        def after() -> None:
            nonlocal step
            for name, parameter in model.named_parameters():
                writer.add_histogram(name, parameter.detach(), step)
            step += 1

        yield model, after


@contextmanager
def _track_scales(model: nn.Module, _: torch.optim.Optimizer) -> Iterator[Watched]:
    from unit_scaling.transforms import track_scales

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield track_scales(model), _nothing
    torch._dynamo.reset()


PLAIN = Watcher("plain", "the same steps, unwatched", _unwatched)
AGAIN = Watcher("plain again (A/A)", "the noise of this table", _unwatched)

OURS = (
    AGAIN,
    Watcher("ours: the mode alone", "nothing, but for a first recorded step", _window(every=2 * WINDOW)),
    Watcher("ours: every slot, every step", "a log2 sketch of each tensor of each product", _window()),
    Watcher("ours: overhead=0.05", "the same, of fewer steps", _window(overhead=0.05)),
    Watcher("ours: a window's first step", "the same, and coverage", _window(steps=3), steps=3, at=0),
    Watcher(
        "ours: one scored step", "curvature and damage of casts", _window(steps=6, curvature_steps=1), steps=6, at=3
    ),
)

PEERS = (
    Watcher("torch.ao MinMaxObserver", "min, max; layers' inputs, outputs", _observers("MinMaxObserver")),
    Watcher("torch.ao HistogramObserver", "2,048 linear bins; the same", _observers("HistogramObserver")),
    Watcher("tensor-tracker", "std; outputs and their gradients", _tensor_tracker, "tensor_tracker"),
    Watcher("nvdlfw-inspect LogTensorStats", "min, max, mean, std; the same and weights", _inspect, "nvdlfw_inspect"),
    Watcher("wandb.watch", "64 linear bins; parameters and their gradients", _wandb, "wandb"),
    Watcher(
        "DebugUnderflowOverflow",
        "smallest, largest; weights, inputs, outputs",
        _underflow_overflow,
        "transformers",
    ),
    Watcher(
        "TensorBoard histograms",
        "bins 10% apart; outputs, parameters, their gradients",
        _tensorboard,
        "tensorboard",
    ),
    Watcher("unit_scaling.track_scales", "std and more; every operation's result", _track_scales, "unit_scaling"),
)
