"""Accelerate: FP8 layers by torchao, converted before `prepare`; mixed precision for the rest.

Accelerate can convert with torchao by itself (AORecipeKwargs), with one configuration for all layers and a filter by
default that leaves out the first and the last linear layer by name. A plan has several configurations and names its
layers, so they are converted first, and Accelerate is asked for the 16-bit part alone. (accelerate 1.15.)
"""

from __future__ import annotations

from advisor.exports.mixed_precision import mixed_precision_export
from advisor.exports.parts import Parts
from advisor.plan import Plan

USE = (
    "import accelerate_plan\n"
    "accelerator = accelerate_plan.accelerator()    # further arguments of Accelerator may be given\n"
    "accelerate_plan.convert(model)                 # before prepare\n"
    "model, optimizer, loader = accelerator.prepare(model, optimizer, loader)\n"
    "accelerate_plan.check(accelerator, model)      # raises where something is not what was asked\n"
)


def accelerate_export(plan: Plan) -> Parts:
    """The accelerator's settings, torchao's files for the FP8 layers, and the script that checks both."""
    return mixed_precision_export(plan, "Accelerate", "plan_accelerate.json", "accelerate_plan.py", USE)
