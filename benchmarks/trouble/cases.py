"""The cases: what is planted where, which uniform recipe fails of it, and which finding the window must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

import advisor
from advisor.plan import Plan, Stored
from benchmarks.trouble import models
from probes.window import Window

NARROW_STORAGE: Mapping[str, Any] = MappingProxyType({"master_weights": "auto", "optimizer_state": "auto"})
"""A plan may narrow master weights and optimizer state where the window lets it: the traps are open to it."""

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def adam(rate: float, **more: Any) -> MakeOptimizer:
    """AdamW without decay."""
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, **more)


@dataclass(frozen=True)
class Case:
    """One training with one planted cause.

    build       the model, initial weights drawn from torch's seeded stream
    text        trained on python-text, otherwise on digits
    steps       all arms; the first `start` are fp32 in every arm, and the window is of the `window` steps before
                `start`, of a training with a seed of its own
    factor      on the loss
    cause       and `site`, `role`: the finding that the window must give
    recipe      the uniform recipe in words, and `uniform` makes it from the window
    advice      what `advisor.recommend` is asked for beside its defaults
    held_out    judged by the held-out loss in evaluation mode instead of the training loss of the last quarter
    """

    name: str
    planted: str
    build: Callable[[], nn.Module]
    optimizer: MakeOptimizer
    cause: str
    site: str
    role: str
    recipe: str
    uniform: Callable[[Window], Plan]
    text: bool = False
    steps: int = 300
    start: int = 40
    window: int = 16
    factor: float = 1.0
    held_out: bool = False
    advice: Mapping[str, Any] = field(default_factory=lambda: NARROW_STORAGE)


def stored(window: Window, cast: str, roles: Sequence[str]) -> Plan:
    """A plan that casts no product and keeps every stored tensor of these roles in one format."""
    role = window.sites[0].roles[0]
    kept = advisor.uniform(window, **{role: "fp32"})
    said = f"{cast} as asked for all"
    rows = [
        Stored(name=record.name, role=one, cast=cast, reason=said)
        for record in (*window.parameter_records, *window.buffer_records)
        for one in roles
        if one in record.roles or (one == "epsilon" and record.epsilon is not None)
    ]
    return kept.model_copy(update={"storage": tuple(rows)})


CASES: Mapping[str, Case] = MappingProxyType(
    {
        case.name: case
        for case in (
            Case(
                name="outlier channels",
                planted="three of 64 channels of a norm's gain are 300 times the others",
                build=models.WideChannels,
                optimizer=adam(1e-3),
                cause="channel_outliers",
                site="up",
                role="input",
                recipe="int8, one scale a tensor, for inputs and weights",
                uniform=lambda window: advisor.uniform(window, input="int8", weight="int8"),
                text=True,
            ),
            Case(
                name="heavy tails",
                planted="a squared ReLU on tokens of log-normal length, without a norm before it",
                build=models.SquaredReLU,
                optimizer=adam(2e-3),
                cause="heavy_tails",
                site="down",
                role="input",
                recipe="int8, one scale a tensor, for inputs and weights",
                uniform=lambda window: advisor.uniform(window, input="int8", weight="int8"),
                text=True,
            ),
            Case(
                name="small gradients",
                planted="the loss is divided by 2^17, as a mean over very many terms is",
                build=models.DigitModel,
                optimizer=adam(1e-3, eps=1e-20),
                cause="small_gradients",
                site="first",
                role="grad_output",
                recipe="gradients in e5m2 without a scale",
                uniform=lambda window: advisor.uniform(window, grad_output="e5m2/none"),
                factor=2.0**-17,
            ),
            Case(
                name="small gradients, scales forbidden",
                planted="the same",
                build=models.DigitModel,
                optimizer=adam(1e-3, eps=1e-20),
                cause="small_gradients",
                site="second",
                role="grad_output",
                recipe="gradients in fp16 without a scale",
                uniform=lambda window: advisor.uniform(window, grad_output="fp16/none"),
                factor=2.0**-17,
                advice={**NARROW_STORAGE, "casts": ("e4m3fn/none", "e5m2/none", "fp16/none")},
            ),
            Case(
                name="growing largest value",
                planted="features double every third step, ten times over",
                build=models.Rising,
                optimizer=adam(1e-3),
                cause="growing_amax",
                site="head",
                role="input",
                recipe="e4m3fn with delayed scaling for inputs",
                uniform=lambda window: advisor.uniform(window, input="e4m3fn/tensor/delayed"),
                start=48,
                steps=318,
            ),
            Case(
                name="Adam's epsilon",
                planted="nothing: AdamW with its default epsilon of 1e-8",
                build=models.DigitModel,
                optimizer=adam(1e-3),
                cause="epsilon_vanishes",
                site="first.weight",
                role="exp_avg_sq",
                recipe="optimizer state and epsilon in fp16",
                uniform=lambda window: stored(window, "fp16/none/nearest:inf", ("exp_avg", "exp_avg_sq", "epsilon")),
            ),
            Case(
                name="lost updates",
                planted="weights of variance 1, and a learning rate of 3e-4",
                build=models.UnitDigits,
                optimizer=adam(3e-4),
                cause="lost_updates",
                site="second.weight",
                role="master",
                recipe="master weights in bf16",
                uniform=lambda window: stored(window, "bf16", ("master",)),
                steps=400,
            ),
            Case(
                name="BatchNorm statistics",
                planted="raw counts of a 16-bit sensor before the BatchNorm",
                build=models.Sensor,
                optimizer=adam(1e-3),
                cause="narrow_buffer",
                site="norm.running_var",
                role="buffer",
                recipe="buffers in fp16",
                uniform=lambda window: stored(window, "fp16/none/nearest:inf", ("buffer",)),
                held_out=True,
                steps=200,
            ),
            Case(
                name="tied head",
                planted="the head is the embedding, which holds a large constant in two channels",
                build=models.Tied,
                optimizer=adam(1e-3),
                cause="tied_parameter",
                site="head",
                role="weight",
                recipe="int8, one scale a tensor, for inputs and weights",
                uniform=lambda window: advisor.uniform(window, input="int8", weight="int8"),
                text=True,
            ),
        )
    }
)
