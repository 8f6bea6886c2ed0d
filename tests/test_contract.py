"""The contract as a user writes it, in process, on a Hugging Face GPT-2 and on a plain nn.Sequential."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import advisor
from probes.formats import FORMATS
from probes.rounding import ROUNDINGS
from probes.scaling import RULES

PUBLIC = [
    "AdvisorError",
    "Cast",
    "CastState",
    "Hardware",
    "Plan",
    "Scores",
    "Window",
    "alerts",
    "apply",
    "compare",
    "connect",
    "curvature_of",
    "diagnose",
    "drift",
    "export",
    "load_plan",
    "load_window",
    "measured_cpu",
    "probe",
    "recommend",
    "score",
    "straight_through",
    "uniform",
]

Loop = Callable[[Any], float]


def gpt2() -> tuple[nn.Module, Callable[[], Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))

    def loss() -> Tensor:
        start = torch.randint(0, 64, (8, 1))
        ids = (start + 3 * torch.arange(24)) % 64
        batch = {"input_ids": ids, "labels": ids}
        found: Tensor = model(**batch).loss
        return found

    return model, loss


def sequential() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))

    def loss() -> Tensor:
        x = torch.randn(64, 16)
        return nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))

    return model, loss


@pytest.mark.parametrize("build", [gpt2, sequential])
def test_probe_score_recommend_apply(build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, loss_of_a_batch = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def steps() -> Iterator[float]:
        for _ in range(1000):
            loss = loss_of_a_batch()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    with advisor.probe(model, optimizer, steps=8) as window:
        for _ in steps():
            if window.done:
                break
    assert len(window.steps) == 8
    assert window.coverage.share == 1
    scores = advisor.score(window, casts=None)
    assert {"site", "role", "cast", "underflow", "subnormal", "overflow", "sqnr_db", "dynamic_range_bits"} <= set(
        scores.rows[0]
    )
    assert {"amax", "damage", "lost_batch_share"} <= set(scores.rows[0])
    plan = advisor.recommend(window, hardware="h100", tolerance=0.01, max_lost_batch=0.02)
    assert plan.predicted.share_8bit > 0.3
    assert "e4m3fn" in str(plan) or "int8" in str(plan)
    plan.save(tmp_path / "plan.json")
    plan = advisor.load_plan(tmp_path / "plan.json")
    told = plan.to_dict()
    assert told["schema"] == "numerics-advisor/plan/1"
    assert {"site", "role", "cast", "damage", "reason"} <= set(told["assignments"][0])
    assert {"damage", "share_8bit", "speedup", "memory_bytes"} <= set(told["predicted"])
    assert {"loss_scaling", "master_weights", "optimizer_state", "hardware", "front"} <= set(told)
    with advisor.apply(plan, model, optimizer) as applied:
        losses = [loss for _, loss in zip(range(40), steps(), strict=False)]
    assert losses[-1] < losses[0]
    assert {row["how"] for row in applied.report()} <= {"emulated", "kept"}
    assert all(row["count"] >= 40 for row in applied.report())


def test_the_readme_has_the_whole_vocabulary_of_casts() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    scales = {rule.replace("delayed", "delayed(len=16,margin=0)") for rules in RULES.values() for rule in rules}
    words = {*FORMATS, *RULES, *scales, *ROUNDINGS} - {"static"} | {"static=0.013"}
    assert not [word for word in words if f"`{word}`" not in readme]


def test_the_public_names() -> None:
    assert sorted(advisor.__all__) == PUBLIC
    assert all(getattr(advisor, name) is not None for name in PUBLIC)


def test_importing_a_module_never_hides_a_public_function() -> None:
    import importlib
    import pkgutil

    modules = {name for _, name, _ in pkgutil.iter_modules(advisor.__path__)}
    assert not modules & set(PUBLIC)
    importlib.import_module("advisor.emulation")
    assert callable(advisor.apply)
