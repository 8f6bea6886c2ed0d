"""Lightning: FP8 layers by torchao in a callback, mixed precision for the rest.

Lightning's own TransformerEnginePrecision has one recipe for every layer and no list of layers. A callback's `setup`
runs before the optimizer is made and before a strategy wraps the model, which is where layers can still be converted.
(lightning 2.6.)
"""

from __future__ import annotations

from advisor.exports.mixed_precision import mixed_precision_export
from advisor.exports.parts import Parts
from advisor.plan import Plan

USE = (
    "import lightning_plan\n"
    "trainer = lightning.Trainer(callbacks=[lightning_plan.PlanCallback()], **lightning_plan.precision())\n"
    "trainer.fit(module)     # converts in setup, checks at the start of training, raises where it is not as asked\n"
    "# PlanCallback(of='model') where the planned model is an attribute of the LightningModule\n"
)


def lightning_export(plan: Plan) -> Parts:
    """The trainer's precision, torchao's files for the FP8 layers, and the callback that converts and checks."""
    return mixed_precision_export(plan, "Lightning", "plan_lightning.json", "lightning_plan.py", USE)
