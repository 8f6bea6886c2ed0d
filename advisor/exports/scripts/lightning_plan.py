"""Carries out a precision plan with Lightning: `Trainer(callbacks=[PlanCallback()], **precision())`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torchao_plan
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

SETTINGS = json.loads((Path(__file__).parent / "plan_lightning.json").read_text(encoding="utf-8"))
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
PlanNotCarriedOut = torchao_plan.PlanNotCarriedOut


def precision(device: str = "cuda") -> dict[str, Any]:
    """The Trainer's arguments for the plan's precision and loss scaling."""
    if SETTINGS["loss_scale"] is None:
        return {"precision": PRECISIONS[SETTINGS["precision"]]}
    import torch
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler(device, **SETTINGS["loss_scale"])
    return {"plugins": [MixedPrecision(PRECISIONS[SETTINGS["precision"]], device, scaler)]}


class PlanCallback(Callback):
    """Converts the plan's layers before the optimizer is made, and checks when training starts.

    of: the attribute of the LightningModule that is the planned model; "" for the module itself.
    options: for each Float8LinearConfig, as `emulate=True`.
    """

    def __init__(self, of: str = "", **options: Any) -> None:
        self._of, self._options = of, options
        self._converted = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert, once."""
        if not self._converted:
            torchao_plan.convert(self._model(pl_module), **self._options)
            self._converted = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the layers and the trainer's precision."""
        asked = PRECISIONS[SETTINGS["precision"]]
        if trainer.precision != asked:
            raise PlanNotCarriedOut(f"the trainer's precision is {trainer.precision!r}, asked for was {asked!r}")
        torchao_plan.check(self._model(pl_module))

    def _model(self, module: LightningModule) -> nn.Module:
        return module.get_submodule(self._of)
