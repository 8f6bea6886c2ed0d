"""Numerics Advisor: which 8-bit and 16-bit formats a PyTorch training can use, measured.

    import advisor
    with advisor.probe(model, optimizer, steps=20) as window:
        train(...)
    plan = advisor.recommend(window, hardware="h100")
    with advisor.apply(plan, model, optimizer):
        train(...)

Names are loaded when they are first asked for, so that the command line answers without importing torch. No module
here has the name of a public function: importing it would put the module in the function's place.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "AdvisorError": "advisor.errors",
    "Cast": "probes.casts",
    "CastState": "probes.casts",
    "Hardware": "advisor.device",
    "Plan": "advisor.plan",
    "Scores": "advisor.scores",
    "Window": "probes.window",
    "alerts": "advisor.alerting",
    "apply": "advisor.emulation",
    "compare": "advisor.comparing",
    "connect": "advisor.client",
    "curvature_of": "probes.losses",
    "diagnose": "advisor.diagnosis",
    "drift": "advisor.drifting",
    "export": "advisor.exports.exporting",
    "load_plan": "advisor.plan",
    "load_window": "probes.windowfile",
    "measured_cpu": "advisor.calibration",
    "probe": "probes.probing",
    "recommend": "advisor.advice",
    "score": "advisor.scores",
    "straight_through": "probes.gradients",
    "uniform": "advisor.recipe",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
