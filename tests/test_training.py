"""Trainer: deterministic, resumable bit for bit, and no disturber of the process around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from advisor.errors import InvalidModel, TrainingDiverged
from advisor.training import Trainer, learning_rate_at
from advisor.zoo.spec import ArchitectureSpec, TrainingConfig

GPT = {
    "family": "gpt",
    "config": {"layers": 2, "heads": 2, "width": 16, "context": 12, "dropout": 0.2},
    "training": {"batch_size": 4, "warmup_steps": 6},
}
CONVNET = {
    "family": "convnet",
    "config": {"widths": [8]},
    "training": {"batch_size": 8, "optimizer": "sgd", "learning_rate": 0.05},
}


def trainer(description: dict[str, Any], seed: int | None = None) -> Trainer:
    return Trainer(ArchitectureSpec.parse(description), seed=seed)


def assert_same_weights(a: Trainer, b: Trainer) -> None:
    for (name, left), right in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("description", [GPT, CONVNET], ids=["gpt", "convnet"])
def test_a_resumed_training_is_bit_identical(description: dict[str, Any], tmp_path: Path) -> None:
    straight = trainer(description)
    losses = [straight.step() for _ in range(10)]
    halted = trainer(description)
    first = [halted.step() for _ in range(5)]
    halted.save(tmp_path / "half.pt")
    torch.manual_seed(999)  # another process has another random stream
    resumed = trainer(description, seed=77)
    resumed.load(tmp_path / "half.pt")
    assert first + [resumed.step() for _ in range(5)] == losses
    assert resumed.step_index == 10
    assert_same_weights(straight, resumed)
    assert straight.evaluate(2) == resumed.evaluate(2)


def test_two_trainings_side_by_side_do_not_disturb_each_other() -> None:
    alone = trainer(GPT)
    losses = [alone.step() for _ in range(4)]
    one, two = trainer(GPT), trainer(GPT, seed=5)
    assert [(one.step(), two.step())[0] for _ in range(4)] == losses


def test_the_random_stream_of_the_caller_is_left_alone() -> None:
    before = torch.get_rng_state()
    training = trainer(GPT)
    training.step()
    training.evaluate(1)
    assert torch.equal(before, torch.get_rng_state())


def test_dropout_differs_from_step_to_step() -> None:
    training = trainer({**GPT, "training": {"batch_size": 4, "learning_rate": 1e-30, "weight_decay": 0}})
    batch = training.data.batch(0, 0, 4)
    object.__setattr__(training, "data", type("Same", (), {"batch": lambda *a: batch})())
    assert training.step() != training.step()


def test_a_seed_decides_weights_and_batches() -> None:
    assert trainer(GPT, seed=1).step() == trainer(GPT, seed=1).step() != trainer(GPT, seed=2).step()


def test_evaluation_is_the_same_always_and_changes_nothing() -> None:
    training, other = trainer(CONVNET), trainer(CONVNET)
    assert training.evaluate(3) == training.evaluate(3)
    assert training.evaluate(4)[:3] == training.evaluate(3)
    assert training.model.training
    assert training.step() == other.step()
    assert_same_weights(training, other)


def test_it_learns() -> None:
    training = trainer({**CONVNET, "config": {"widths": [16]}, "training": {"learning_rate": 0.01}})
    losses = [training.step() for _ in range(60)]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_loss_that_is_nan_stops_the_training_before_it_touches_a_weight() -> None:
    training, untouched = trainer(GPT), trainer(GPT)
    for each in (training, untouched):
        with torch.no_grad():
            each.model.get_parameter("head.weight")[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match=r"the loss is nan at step 0: lower training\.learning_rate"):
        training.step()
    for left, right in zip(training.model.parameters(), untouched.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, equal_nan=True, rtol=0, atol=0)
    assert training.step_index == 0
    assert training.step(require_finite=False) != 0
    assert training.step_index == 1


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04 not a zip"])
def test_a_file_that_is_no_training_state_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(InvalidModel, match="is not a file that"):
        trainer(GPT).load(path)


def test_a_state_that_could_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"schema": Path("x")}, tmp_path / "state.pt")
    with pytest.raises(InvalidModel, match="is not a file that"):
        trainer(GPT).load(tmp_path / "state.pt")


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    trainer(CONVNET).save(tmp_path / "state.pt")
    with pytest.raises(InvalidModel, match="differs from this one in: family, config, data, training"):
        trainer(GPT).load(tmp_path / "state.pt")


def test_a_failed_save_leaves_the_older_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = trainer(GPT)
    training.save(tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()

    def broken(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="no space"):
        training.save(tmp_path / "state.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]
    assert (tmp_path / "state.pt").read_bytes() == before


def test_the_learning_rate_rises_to_its_value() -> None:
    config = TrainingConfig(learning_rate=0.8, warmup_steps=3)
    assert [learning_rate_at(step, config) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
