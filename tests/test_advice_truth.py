"""The benchmark that holds predictions against brute force measures what it says, on models solved by hand."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.advice import data, forward_truth, gradient_truth, training_truth
from benchmarks.advice.agreement import Compared, Target, agreement, group_of, ranking, spearman, within_factor
from benchmarks.advice.data import Batch
from benchmarks.advice.ledger import Ledger, OtherLedger, fingerprint
from benchmarks.advice.models import MODELS, Trainable, fresh, train, trained
from benchmarks.advice.moved import CastBackward, Moved, TrainedWith, casting, slots_of
from benchmarks.advice.page import page
from benchmarks.advice.table import PAGE, RESULT, json_of
from probes.casts import Cast
from probes.records import GRADIENT, Slot

E2M1 = Cast.parse("e2m1")


class Line(nn.Module):
    """y = x·wᵀ, [B, 6] to [B, 4]: squared error is exactly quadratic in w and in x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def line_batch(step: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(1000 * seed + step)
    x = torch.randn(8, 6, generator=generator)
    return Batch(x, x[:, :4].sin())


LINE = Trainable(
    name="line",
    steps=3,
    learning_rate=0.1,
    build=Line,
    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    batch=line_batch,
    held_out=lambda index: line_batch(index, 7),
    loss=lambda model, batch: F.mse_loss(model(batch.inputs), batch.targets.to(model(batch.inputs).dtype)),
)
WEIGHT, INPUT, OUTPUT = (Slot("linear", role) for role in ("weight", "input", GRADIENT))


def ledger_in(folder: Path, of: str = "line") -> Ledger:
    return Ledger(folder / "truth.jsonl", {"model": of})


# Forward roles.


def test_the_symmetric_rise_of_a_quadratic_loss_is_its_second_order_term(tmp_path: Path) -> None:
    model, ledger = fresh(LINE, 0).model, ledger_in(tmp_path)
    forward_truth.measure_forward(LINE, model, [WEIGHT, INPUT], [E2M1], ledger, 0.0, str)
    truths = forward_truth.forward_truths(ledger.of("forward"))
    batches = [LINE.batch(forward_truth.UNSEEN + index, 0) for index in range(2 * forward_truth.ROUND)]
    w = model.linear.weight.detach()
    rises = {
        WEIGHT: [(x @ (E2M1(w) - w).T).square().mean() for x, _ in batches],
        INPUT: [((E2M1(x) - x) @ w.T).square().mean() for x, _ in batches],
    }
    slopes = {
        WEIGHT: [2 * ((x @ w.T - y) * (x @ (E2M1(w) - w).T)).mean() for x, y in batches],
        INPUT: [2 * ((x @ w.T - y) * ((E2M1(x) - x) @ w.T)).mean() for x, y in batches],
    }
    for slot in (WEIGHT, INPUT):
        found = truths[slot, str(E2M1)]
        assert found.batches == 16
        assert found.second == pytest.approx(float(torch.stack(rises[slot]).mean()), rel=1e-4)
        assert found.first == pytest.approx(float(torch.stack(slopes[slot]).mean()), rel=1e-4)
        assert found.second_se == pytest.approx(float(torch.stack(rises[slot]).std()) / 4, rel=1e-4)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    model, ledger = fresh(LINE, 0).model, ledger_in(tmp_path)
    forward_truth.measure_forward(LINE, model, [WEIGHT, INPUT], [E2M1], ledger, 0.0, str)
    whole = [{key: value for key, value in record.items() if key != "seconds"} for record in ledger.records]
    assert len(whole) == 4  # two pairs, two rounds, whatever they take
    lines = ledger.path.read_text().splitlines(keepends=True)
    ledger.path.write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    again = ledger_in(tmp_path)
    assert len(again.records) == 2
    forward_truth.measure_forward(LINE, model, [WEIGHT, INPUT], [E2M1], again, 0.0, str)
    assert [{key: value for key, value in record.items() if key != "seconds"} for record in again.records] == whole


def test_what_is_known_to_a_tenth_gets_no_more_batches(tmp_path: Path) -> None:
    model, ledger = fresh(LINE, 0).model, ledger_in(tmp_path)
    forward_truth.measure_forward(LINE, model, [WEIGHT, INPUT], [E2M1], ledger, math.inf, str)
    truths = forward_truth.forward_truths(ledger.of("forward"))
    for found in truths.values():
        exact = found.second_se <= forward_truth.DECIDED * found.second
        assert exact or found.batches == forward_truth.MOST_BATCHES


def test_a_later_run_goes_on_with_what_is_unsure_though_all_that_had_fewer_batches_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ledger = fresh(LINE, 0).model, ledger_in(tmp_path)
    monkeypatch.setattr(forward_truth, "_is_exact", lambda truth: truth.batches == 24)
    forward_truth.measure_forward(LINE, model, [WEIGHT, INPUT], [E2M1], ledger, math.inf, str)
    lines = ledger.path.read_text().splitlines(keepends=True)
    ledger.path.write_text("".join(lines[:5] + lines[6:]))  # without the weight's last
    again = ledger_in(tmp_path)
    monkeypatch.setattr(forward_truth, "_is_exact", lambda truth: truth.batches in (16, 40))
    forward_truth.measure_forward(LINE, model, [WEIGHT, INPUT], [E2M1], again, math.inf, str)
    found = forward_truth.forward_truths(again.of("forward"))
    assert {slot: truth.batches for (slot, _), truth in found.items()} == {WEIGHT: 16, INPUT: 40}


def test_a_ledger_of_other_weights_is_refused(tmp_path: Path) -> None:
    ledger_in(tmp_path)
    with pytest.raises(OtherLedger, match="remove it to start anew"):
        ledger_in(tmp_path, of="another")
    assert fingerprint(fresh(LINE, 0).model) != fingerprint(fresh(LINE, 1).model)
    assert fingerprint(fresh(LINE, 0).model) == fingerprint(fresh(LINE, 0).model)


def test_moving_ends_with_its_block(tmp_path: Path) -> None:
    model, (x, _) = fresh(LINE, 0).model, LINE.batch(0, 0)
    with torch.no_grad(), Moved(model) as hook:
        before = model(x)
        with casting(hook, INPUT, E2M1):
            assert torch.equal(model(x), E2M1(x) @ model.linear.weight.T)
        assert torch.equal(model(x), before)


# Gradients.


def test_a_cast_in_the_backward_pass_alone() -> None:
    model, batch = fresh(LINE, 0).model, LINE.batch(0, 0)
    w, (x, y) = model.linear.weight, batch
    exact = LINE.loss(model, batch)
    g = 2 * (x @ w.detach().T - y) / y.numel()
    with CastBackward(model) as hook:
        for slot, expected in ((OUTPUT, E2M1(g).T @ x), (INPUT, g.T @ E2M1(x)), (WEIGHT, g.T @ x)):
            with casting(hook, slot, E2M1):
                loss = LINE.loss(model, batch)
                (found,) = torch.autograd.grad(loss, [w])
            assert torch.equal(loss, exact)
            torch.testing.assert_close(found, expected)


def test_a_recurrent_layers_loss_stays_and_its_gradients_move() -> None:
    model = nn.LSTM(5, 7, batch_first=True)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    slots = [met.slot for met in slots_of(model, x)]
    assert Slot("(root)", "weight_hh_l0") in slots
    assert Slot("(root)", "state") not in slots  # zeros: there is nothing to cast
    exact = model(x)[0].square().sum()
    (gradient,) = torch.autograd.grad(exact, [model.weight_hh_l0])
    with CastBackward(model) as hook, casting(hook, Slot("(root)", "weight_hh_l0"), E2M1):
        loss = model(x)[0].square().sum()
        (found,) = torch.autograd.grad(loss, [model.weight_hh_l0])
    assert torch.equal(loss, exact)
    assert 0 < (found - gradient).norm() < gradient.norm()


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_noise_of_a_cast_over_the_minibatchs(tmp_path: Path, adaptive: bool) -> None:
    model, ledger = fresh(LINE, 0).model, ledger_in(tmp_path)
    gradient_truth.measure_gradients(LINE, model, slots_of(model, LINE.batch(0, 0).inputs), [E2M1], ledger, str)
    truths = gradient_truth.gradient_truths(ledger, model, {"linear": "linear.weight"}, adaptive)
    w, exact, errors = model.linear.weight.detach(), [], []
    for index in range(gradient_truth.EXACT_BATCHES):
        x, y = LINE.batch(forward_truth.UNSEEN + index, 0)
        g = 2 * (x @ w.T - y) / y.numel()
        exact.append(g.T @ x)
        errors.append((E2M1(g) - g).T @ x)
    gradients, moved = torch.stack(exact), torch.stack(errors[: gradient_truth.BATCHES])
    size = gradients.square().mean(0).sqrt() if adaptive else torch.ones(4, 6)
    noise = (gradients / size).var(0).sum()
    found = truths[OUTPUT, str(E2M1)]
    assert found.ratio == pytest.approx(float((moved / size).square().sum((1, 2)).mean() / noise), rel=1e-3)
    alike = float(moved.mean(0).square().sum() - moved.var(0).sum() / gradient_truth.BATCHES)
    assert found.alike == pytest.approx(alike / float(gradients.var(0).sum()), rel=1e-3)
    assert truths[WEIGHT, str(E2M1)].ratio == 0  # its error goes to the input's gradient, which nothing learns from


# Trainings.


def test_pairs_are_spread_over_the_noise() -> None:
    ratios = {(Slot(f"s{index}", GRADIENT), "int8"): float(index) for index in range(21)}
    assert [pair[0].site for pair in training_truth.spread_out(ratios)] == ["s20", "s16", "s12", "s8", "s4", "s0"]
    few = dict(list(ratios.items())[:3])
    assert len(training_truth.spread_out(few)) == 3


def test_pairs_with_little_noise_are_those_whose_errors_are_most_alike() -> None:
    ratios = {(Slot(f"s{index}", GRADIENT), "int8"): 0.02 * index for index in range(10)}
    alike = {pair: -float(place) for place, pair in enumerate(ratios)}
    chosen = training_truth.most_alike(ratios, alike, list(ratios)[:1])
    assert [pair[0].site for pair in chosen] == ["s1", "s2", "s3", "s4", "s5"]
    alike[list(ratios)[8]] = 1.0  # but its noise is not small
    assert training_truth.most_alike(ratios, alike, list(ratios)[:1]) == chosen


def test_the_gap_of_paired_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_truth, "STEPS", 20)
    monkeypatch.setattr(training_truth, "LAST", 5)
    ledger, pair = ledger_in(tmp_path), (OUTPUT, str(E2M1))
    training_truth.measure_trainings(LINE, [pair], ledger, 0.0, str)
    (gap,) = training_truth.gaps(ledger).values()
    assert len(gap) == training_truth.FIRST_SEEDS
    count = len(ledger.records)
    training_truth.measure_trainings(LINE, [pair], ledger, 0.0, str)
    assert len(ledger.records) == count
    model, optimizer, _ = fresh(LINE, 1)
    kept: list[float] = []
    with TrainedWith(model, {OUTPUT: E2M1}):
        train(model, optimizer, LINE, 1, 0, training_truth.STEPS, lambda step, loss: kept.append(float(loss)))
    plain: list[float] = []
    model, optimizer, _ = fresh(LINE, 1)
    train(model, optimizer, LINE, 1, 0, training_truth.STEPS, lambda step, loss: plain.append(float(loss)))
    last = slice(-training_truth.LAST, None)
    assert gap[0] == pytest.approx(np.mean(kept[last]) - np.mean(plain[last]), abs=1e-6)


def test_the_interval_of_a_gap() -> None:
    mean, width = training_truth.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert width == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # Student's t with two degrees of freedom
    assert training_truth.interval([1.0]) == (1.0, math.inf)
    assert training_truth.is_decided([math.inf, 0.0])
    assert not training_truth.is_decided([-1.0, 1.0, 0.5])


# Agreement.


def test_agreement_counts_what_is_decided() -> None:
    compared = [Compared(2.0**k, 0.1, 2.0 * 2.0**k) for k in range(6)]
    noise = [Compared(0.1, 0.1, 1e9), Compared(-3.0, 0.1, 1e9)]
    found = agreement(compared + noise)
    assert (found.pairs, found.decided, found.predicted) == (8, 6, 6)
    assert (found.spearman, found.ratio) == (pytest.approx(1.0), pytest.approx(2.0))
    assert found.meets(Target(0.95, 0.5, 2.0))
    assert not found.meets(Target(0.95, 0.5, 1.9))


def test_a_pair_without_a_prediction_is_no_success() -> None:
    compared = [Compared(2.0**k, 0.1, 2.0**k) for k in range(6)]
    assert agreement(compared).meets(Target(0.95, 0.7, 1.4))
    assert not agreement([*compared, Compared(1.0, 0.1, None)]).meets(Target(0.95, 0.7, 1.4))
    assert math.isnan(agreement(compared[:3]).spearman)


def test_rankings_and_factors() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    assert math.isnan(spearman([1, 2, 3], [5, 5, 5]))
    compared = [Compared(float(k), 0.1, None) for k in range(1, 6)]
    assert ranking(compared, [None, 4.0, 3.0, 2.0, 1.0]) == (pytest.approx(-1.0), 4)
    assert within_factor(2.0, 1.0, 0.0)
    assert not within_factor(2.1, 1.0, 0.0)
    assert within_factor(2.1, 1.0, 0.1)
    assert not within_factor(0.4, 1.0, 0.05)
    assert [group_of(role) for role in ("input", "weight_hh_l0", GRADIENT, "query")] == [
        "input",
        "weight",
        GRADIENT,
        "other",
    ]


# Data, models, pages.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the data comes, with 40 images and a little text."""
    (tmp_path / "tinyshakespeare").mkdir()
    letters = "".join(map(chr, range(33, 33 + 65)))
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(letters * 40)
    (tmp_path / "fashion_mnist").mkdir()
    random = np.random.default_rng(0)
    for part in ("train", "t10k"):
        pixels, classes = random.integers(0, 256, (40, 784), dtype=np.uint8), np.arange(40, dtype=np.uint8) % 10
        for kind, values, header in (("images-idx3", pixels, 16), ("labels-idx1", classes, 8)):
            path = tmp_path / "fashion_mnist" / f"{part}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(bytes(header) + values.tobytes()))
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_what_training_gives(name: str, folder: Path) -> None:
    cached = trained(name, seed=3, steps=2, cache=folder / "cache")
    read = trained(name, seed=3, steps=2, cache=folder / "cache")
    anew = trained(name, seed=3, steps=2, cache=None)
    for other in (read, anew):
        train(other.model, other.optimizer, MODELS[name], 3, other.step, 1)
    train(cached.model, cached.optimizer, MODELS[name], 3, cached.step, 1)
    assert fingerprint(cached.model) == fingerprint(read.model) == fingerprint(anew.model)


def test_batches_are_told_by_step_and_seed(folder: Path) -> None:
    one, again, other = (data.image_batch(step, 5, 4) for step in (1, 1, 2))
    assert torch.equal(one.inputs, again.inputs)
    assert not torch.equal(one.inputs, other.inputs)
    text = data.text_batch(0, 0, 3, 10)
    assert torch.equal(text.inputs[:, 1:], text.targets[:, :-1])
    upper, lower = data.halves_batch(1, 5, 4)
    assert torch.equal(torch.cat([upper, lower], 1), one.inputs.flatten(1))


def test_data_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data.VARIABLE, raising=False)
    with pytest.raises(data.DataMissing, match="--data FOLDER"):
        data.use(None)
    monkeypatch.setenv(data.VARIABLE, str(tmp_path))
    with pytest.raises(data.DataMissing, match=r"input\.txt is missing"):
        data.shakespeare()


def test_the_page_is_what_its_table_gives() -> None:
    result = json.loads(RESULT.read_text())
    assert PAGE.read_text() == page(result), "run: python -m benchmarks.advice.table --page-only"
    assert RESULT.read_text() == json_of(result)


def test_each_models_scored_steps_are_told_with_what_all_of_them_cost() -> None:
    result = json.loads(RESULT.read_text())
    assert result["models"]["convnet"]["scored_steps"] == result["mixed_steps"] > result["scored_steps"]
    result["models"]["vit"] |= {"scored_steps": 3, "scored_step_in_plain_steps": 20.0}
    assert re.search(r"^\| vit \| [0-9.]+ \| 3 \| 20 \| 60 \|$", page(result), re.MULTILINE)
