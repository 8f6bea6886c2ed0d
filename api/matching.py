"""Whether a window or a plan is of a model that the service trains, found without training or allocating anything."""

import functools
import json
from typing import Any

import torch
from torch import nn

import advisor
from advisor.training import build_optimizer
from advisor.zoo.spec import ArchitectureSpec
from probes.errors import WindowError
from probes.window import Window

CACHED_MODELS = 32  # on the meta device a model is names and shapes only
TOLD = 3  # differences that a refusal names


def require_window(spec: dict[str, Any], window: Window, name: str) -> None:
    """Raises WindowError where the window's parameters are not those of the model `name` with this spec."""
    has = {path: tuple(parameter.shape) for path, parameter in _model(spec).named_parameters()}
    recorded = {path: tuple(shape) for path, shape in window.parameters.items()}
    differences = [
        _difference(path, has.get(path), recorded.get(path))
        for path in (*has, *(path for path in recorded if path not in has))
        if has.get(path) != recorded.get(path)
    ]
    if differences:
        more = f" and {len(differences) - TOLD} more" if len(differences) > TOLD else ""
        raise WindowError(
            f"the window is of another model than {name!r}: {'; '.join(differences[:TOLD])}{more}. Push it to an "
            "external model, or record a window of this one with POST /v1/models/{id}/windows"
        )


def require_plan(spec: dict[str, Any], plan: advisor.Plan) -> None:
    """Raises PlanMismatch, which names the sites, for a plan that this spec's model cannot be trained with."""
    model = _model(spec)
    # A plan that scales the loss or keeps tensors narrow needs the optimizer; this one never steps.
    advisor.apply(plan, model, build_optimizer(model, ArchitectureSpec.parse(spec).training))


def _difference(path: str, has: tuple[int, ...] | None, recorded: tuple[int, ...] | None) -> str:
    if recorded is None:
        return f"the window lacks {path}"
    if has is None:
        return f"the model has no {path}"
    return f"{path} is {list(has)} in the model and {list(recorded)} in the window"


def _model(spec: dict[str, Any]) -> nn.Module:
    return _built(json.dumps(spec, sort_keys=True))


@functools.lru_cache(CACHED_MODELS)
def _built(spec: str) -> nn.Module:
    with torch.device("meta"):
        return ArchitectureSpec.parse(json.loads(spec)).build()
