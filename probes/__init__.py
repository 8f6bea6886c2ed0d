"""The probing engine: formats, casts, sketches, and the window that watches training.

Names are loaded when they are first asked for, so that reading the format table does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from probes import kernel_folder

kernel_folder.provide()  # before the first kernel is defined

_HOME = {
    "BINS": "layout",
    "BIN_EDGES": "sketch",
    "Cast": "casts",
    "CastState": "casts",
    "Evidence": "records",
    "FORMATS": "formats",
    "Format": "formats",
    "Product": "records",
    "Scale": "scaling",
    "Site": "records",
    "SlotHistory": "history",
    "Window": "window",
    "curvature_of": "losses",
    "format_named": "format_names",
    "load_window": "windowfile",
    "probe": "probing",
    "straight_through": "gradients",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
