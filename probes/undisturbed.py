"""Work of our own in the middle of the user's step, of which the training notices nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def undisturbed() -> Iterator[None]:
    """No modes, no autocast, no graph, and the random streams put back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with (
        torch.random.fork_rng(devices=list(devices)),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        torch.no_grad(),
    ):
        yield


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers back: what checkpointing recomputes updates BatchNorm's running statistics again.

    Through `.data`, whose version autograd does not watch, and only where something changed.
    """
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if buffer.layout == torch.strided]
    try:
        yield
    finally:
        for buffer, kept in before:
            if not torch.equal(buffer, kept):
                buffer.data.copy_(kept)
