"""The loss functions whose curvature the window knows: torch's own by what they are given, others by declaration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function

from probes.contents import is_wrapped
from probes.errors import WindowError
from probes.likelihoods import LIKELIHOODS
from probes.losscall import Given, LossCall, signs
from probes.residuals import RESIDUALS

Factor = Tensor | Callable[[torch.Generator], Tensor | Sequence[Tensor]]

WITHOUT_CURVATURE: frozenset[Any] = frozenset({F.l1_loss})
"""Losses whose second derivative is zero wherever there is one: a window that meets no other knows no damage."""


def curvature_of(loss: Tensor, outputs: Tensor | Sequence[Tensor], factor: Factor) -> Tensor:
    """Tell an open window the curvature of a loss that it does not know by itself; without a window, nothing happens.

        loss = advisor.curvature_of(my_loss(z, target), z, factor=lambda generator: ...)

    loss       the loss as it came out of its function: one number, or one a sample (its shape leads that of outputs)
    outputs    of the model, what the loss is a function of; any number of tensors
    factor     F with F·Fᵀ = H, the Hessian of the loss in the outputs, never negative in any direction: a tensor of
               the shape of the (single) output, the root of a diagonal H; or one with a last dimension more, [..., n,
               k], whose H lies in blocks of n by n along the output's last dimension; or a function that is given a
               torch.Generator on the loss's device and returns a random v with E[v·vᵀ] = H, one for each output

    Returns `loss`, to be trained with as before. Known losses that take the same outputs inside count no more. Raises
    WindowError for outputs that do not hang together with the loss or the factor; what `factor` itself raises, or a
    v of another shape, becomes a note of the window.
    """
    if has_torch_function((loss,)):
        told: Tensor = handle_torch_function(curvature_of, (loss,), loss, outputs, factor)
        return told
    return loss


def loss_call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossCall | None:
    """What is known of a call of a loss function; None where it is none, or its outputs need no gradient.

    Raises WindowError for one that cannot be followed.
    """
    if function is curvature_of:
        return _declared(**inspect.signature(curvature_of).bind(*args, **kwargs).arguments)
    read = _KNOWN.get(function)
    if read is None:
        return None
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    if given.get("size_average") is not None or given.get("reduce") is not None:
        given["reduction"] = _reduction.legacy_get_string(given["size_average"], given["reduce"], emit_warning=False)
    call = read(given)
    if call is not None and any(map(is_wrapped, call.outputs)):
        raise WindowError(
            f"{function.__name__} was called within a transform of torch.func (vmap, grad), out of which no tensor may "
            "be kept: it adds to no damage"
        )
    return call if call is not None and any(output.requires_grad for output in call.outputs) else None


def _declared(loss: Tensor, outputs: Tensor | Sequence[Tensor], factor: Factor) -> LossCall | None:
    taken = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    for output in taken:
        if loss.shape != output.shape[: loss.dim()] and loss.numel() != 1:
            raise WindowError(
                f"curvature_of: a loss of shape {tuple(loss.shape)} does not lead outputs of {tuple(output.shape)}; "
                "give one number, or one a sample"
            )
    if isinstance(factor, Tensor) and (len(taken) != 1 or factor.shape[: taken[0].dim()] != taken[0].shape):
        raise WindowError(
            f"curvature_of: a factor of shape {tuple(factor.shape)} for outputs of "
            f"{[tuple(output.shape) for output in taken]}: give one of the output's shape, or with one dimension more"
        )

    def draw(generator: torch.Generator, counts: Tensor) -> tuple[Tensor, ...]:
        if isinstance(factor, Tensor):
            root = factor.detach().float()
            if factor.dim() > taken[0].dim():  # a vector of k numbers for each block, the same in all its n rows
                noise = torch.randn(
                    *factor.shape[:-2], 1, factor.shape[-1], generator=generator, device=generator.device
                )
                vectors: Sequence[Tensor] = [(root * noise).sum(-1)]
            else:
                vectors = [root * signs(factor.shape, generator)]
        else:
            made = factor(generator)
            vectors = [made] if isinstance(made, Tensor) else list(made)
        found = []
        for vector, output in zip(vectors, taken, strict=True):
            if vector.shape != output.shape:
                raise WindowError(f"the factor gave {tuple(vector.shape)} for an output of {tuple(output.shape)}")
            lead = counts.sqrt()
            lead = lead.reshape(()) if lead.numel() == 1 else lead
            found.append(vector.detach().float() * lead.reshape(*lead.shape, *[1] * (output.dim() - lead.dim())))
        return tuple(found)

    return LossCall("declared", taken, draw) if any(output.requires_grad for output in taken) else None


_KNOWN: dict[Callable[..., Any], Callable[[Given], LossCall | None]] = {**LIKELIHOODS, **RESIDUALS}

FUNCTIONS = frozenset({*_KNOWN, curvature_of})
"""Those of which `loss_call` may know something."""

KNOWN_NAMES = tuple(function.__name__ for function in _KNOWN)
