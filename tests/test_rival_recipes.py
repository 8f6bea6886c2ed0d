"""Recipes from practice and papers, as plans that are carried out."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import batches, convnet, mlp, train
from torch import nn

import advisor
from advisor.errors import InvalidPlan
from advisor.plan import LossScaling, Plan
from advisor.storage import storage_of
from probes.window import Window

SGD = partial(torch.optim.SGD, momentum=0.9)


def recipe(window: Window, roles: dict[str, str], **parts: Any) -> Plan:
    present = {role for site in window.sites for role in site.roles}
    return advisor.uniform(window, **parts, **{role: cast for role, cast in roles.items() if role in present})


def pure_bf16(window: Window) -> Plan:
    states = {"master": "bf16", "weight_grad": "bf16", "exp_avg": "bf16", "exp_avg_sq": "bf16"}
    roles = dict.fromkeys(("input", "weight", "grad_output"), "bf16")
    return recipe(window, roles, storage=storage_of(window, **states))


def mellempudi(window: Window) -> Plan:
    """Mellempudi et al. (2019): e5m2 everywhere, master weights in fp16, a loss scale with a rising minimum."""
    cast = "e5m2/none/stochastic"
    scaling = LossScaling(
        kind="dynamic", reason="sec. 3.2", scale=1024.0, growth_interval=4, minimums=((4, 512.0), (8, 2048.0))
    )
    roles = {"input": cast, "weight": cast, "grad_output": f"{cast}:inf"}
    storage = storage_of(window, master="fp16/none/stochastic", weight_grad=f"{cast}:inf")
    return recipe(window, roles, storage=storage, loss_scaling=scaling)


def int8(window: Window) -> Plan:
    return recipe(window, dict.fromkeys(("input", "weight", "grad_output"), "int8"))


def hybrid(window: Window) -> Plan:
    """TransformerEngine's default: e4m3 forward, e5m2 backward, delayed scaling."""
    delayed = "tensor/delayed(len=1024,margin=0)"
    return recipe(
        window, {"input": f"e4m3fn/{delayed}", "weight": f"e4m3fn/{delayed}", "grad_output": f"e5m2/{delayed}"}
    )


def mx(window: Window) -> Plan:
    """MXFP8: e4m3 in blocks of 32 with e8m0 scales, for every tensor."""
    return recipe(window, dict.fromkeys(("input", "weight", "grad_output"), "e4m3fn/block32/e8m0up"))


@pytest.mark.parametrize("build", [mlp, convnet])
@pytest.mark.parametrize("rival", [pure_bf16, mellempudi, int8, hybrid, mx])
def test_a_recipe_trains_and_comes_back_from_its_file(build: Any, rival: Any, tmp_path: Any) -> None:
    optimizer = SGD if rival is mellempudi else torch.optim.AdamW
    _, plain, window = train(
        build,
        10,
        lambda model, stepper: advisor.probe(model, stepper, steps=2, curvature_steps=0, finer=("block32",)),
        optimizer,
    )
    rival(window).save(tmp_path / "plan.json")
    plan = advisor.load_plan(tmp_path / "plan.json")
    _, losses, applied = train(build, 10, lambda model, stepper: advisor.apply(plan, model, stepper), optimizer)
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.1)
    assert {row["how"].partition(",")[0] for row in applied.report()} <= {"emulated", "stored", "loss scaled"}
    if rival is mellempudi:
        assert applied.loss_scaler.scale >= 2048


def test_pure_bf16_is_near_a_model_that_is_bf16() -> None:
    _, _, window = train(mlp, 3, lambda model, stepper: advisor.probe(model, stepper, steps=2, curvature_steps=0))
    model, losses, _ = train(mlp, 10, lambda model, stepper: advisor.apply(pure_bf16(window), model, stepper))
    assert all(torch.equal(one, one.bfloat16().float()) for one in model.parameters())
    torch.manual_seed(0)
    real: nn.Module = mlp().bfloat16()
    stepper = torch.optim.AdamW(real.parameters(), lr=1e-2)
    found = []
    for x, target in batches(mlp, 10):
        loss = F.cross_entropy(real(x.bfloat16()).float(), target)
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        found.append(loss.item())
    assert losses == pytest.approx(found, rel=0.05)


def test_a_role_that_is_not_there_is_refused() -> None:
    _, _, window = train(
        mlp, 3, lambda model, stepper: advisor.probe(model, stepper, steps=2, curvature_steps=0), optimizer=SGD
    )
    with pytest.raises(InvalidPlan, match="no parameter with 'exp_avg'; it has epsilon, master, momentum_buffer"):
        storage_of(window, exp_avg="bf16")
    with pytest.raises(InvalidPlan, match="no parameter with 'buffer'"):
        storage_of(window, buffer="fp16")
    rows = storage_of(window, buffers=["1.running_mean"], buffer="fp16")
    assert [(row.name, row.role, row.cast) for row in rows] == [("1.running_mean", "buffer", "fp16/none/nearest")]
