"""The zoo: descriptions that are sound build and train, the others are refused with what to change."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from advisor.errors import DataMismatch, InvalidModel
from advisor.zoo import datasets
from advisor.zoo.datasets import DigitsConfig, PythonTextConfig
from advisor.zoo.families import FAMILIES
from advisor.zoo.spec import ArchitectureSpec

SMALL_GPT = {"layers": 2, "heads": 2, "width": 16, "context": 12}


def spec(family: str = "gpt", **parts: Any) -> ArchitectureSpec:
    return ArchitectureSpec.parse({"family": family, **parts})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_alone_is_a_whole_description(family: str) -> None:
    built = spec(family)
    assert ArchitectureSpec.parse(built.to_dict()) == built
    assert sum(p.numel() for p in built.build().parameters()) == built.parameters


def test_gpt_gives_logits_and_is_causal() -> None:
    torch.manual_seed(0)
    model = spec(config=SMALL_GPT).build().eval()
    tokens = torch.randint(0, 96, (3, 12))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 96
    before, after = model(tokens), model(changed)
    assert before.shape == (3, 12, 96)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any()


def test_gpt_ties_its_head_only_where_asked() -> None:
    untied, tied = spec(config=SMALL_GPT), spec(config={**SMALL_GPT, "tied": True})
    assert untied.parameters - tied.parameters == 96 * 16
    model = tied.build()
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")


def test_gpt_layers_have_readable_names() -> None:
    names = {name for name, module in spec(config=SMALL_GPT).build().named_modules() if isinstance(module, nn.Linear)}
    block = {f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("attn.qkv", "attn.out", "mlp.up", "mlp.down")}
    assert names == block | {"head"}


def test_convnet_halves_the_image_once_a_stage() -> None:
    model = spec("convnet", config={"widths": [8, 16, 24], "blocks_per_stage": 2}).build()
    seen: list[torch.Size] = []
    model.get_submodule("stages.2").get_submodule("1").register_forward_hook(lambda m, i, o: seen.append(o.shape))
    assert model(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert seen == [torch.Size([5, 24, 2, 2])]


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({"family": "gpt", "data": {"set": "digits"}}, "use data.set 'python-text'"),
        ({"family": "gpt", "data": {"length": 65}}, "context of 64"),
        ({"family": "gpt", "config": {"vocabulary": 95}}, "config.vocabulary to at least 96"),
        ({"family": "convnet", "data": {"set": "python-text"}}, "use data.set 'digits'"),
        ({"family": "convnet", "config": {"channels": 3}}, "config.channels to 1"),
        ({"family": "convnet", "config": {"image_size": 32}}, "config.image_size to 8"),
        ({"family": "convnet", "config": {"classes": 9}}, "config.classes to at least 10"),
        ({"family": "convnet", "config": {"widths": [8, 8, 8, 8]}}, "fewer entries"),
    ],
)
def test_a_model_that_does_not_fit_its_data_is_told_what_to_change(description: dict[str, Any], says: str) -> None:
    with pytest.raises(DataMismatch, match=says):
        ArchitectureSpec.parse(description)


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({}, "family None is not one of: gpt, convnet"),
        ({"family": ["gpt"]}, "is not one of"),
        ({"family": "gpt", "extra": 1}, "extra: no such setting"),
        ({"family": "gpt", "config": [1]}, "config: "),
        ({"family": "gpt", "config": {"width": 10, "heads": 4}}, "multiple of heads 4"),
        ({"family": "gpt", "config": {"widht": 10}}, "config.widht: no such setting"),
        ({"family": "gpt", "config": {"layers": 10**9, "width": -1}}, r"config\.layers: .*; config\.width: "),
        ({"family": "gpt", "config": {"width": 1024, "layers": 24}}, "the limit is 50,000,000"),
        ({"family": "gpt", "training": {"batch_size": 4096}}, "lower training.batch_size"),
        ({"family": "gpt", "training": {"learning_rate": float("nan")}}, r"training\.learning_rate"),
        ({"family": "gpt", "training": {"seed": -1}}, r"training\.seed"),
        ({"family": "gpt", "data": {"set": "imagenet"}}, "not one of: python-text, digits"),
        ({"family": "gpt", "data": 7}, "not one of: python-text, digits"),
        ({"family": "convnet", "config": {"widths": []}}, r"config\.widths"),
    ],
)
def test_a_hostile_or_mistaken_description_is_refused(description: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidModel, match=says):
        ArchitectureSpec.parse(description)


@pytest.mark.parametrize("config", [PythonTextConfig(), DigitsConfig()], ids=lambda config: config.set)
def test_a_batch_is_a_pure_function_of_seed_and_step(config: datasets.DataConfig) -> None:
    data = datasets.load(config)
    torch_stream, numpy_stream = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again = data.batch(3, seed=1, size=8), data.batch(3, seed=1, size=8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (
        data.batch(4, seed=1, size=8),
        data.batch(3, seed=2, size=8),
        data.held_out_batch(3, size=8),
    ):
        assert not torch.equal(first[0], other[0])
    assert torch.equal(torch_stream, torch.get_rng_state())
    assert (numpy_stream == np.random.get_state()[1]).all()  # noqa: NPY002


def test_text_targets_are_the_next_characters() -> None:
    inputs, targets = datasets.load(PythonTextConfig(length=20)).batch(0, seed=0, size=4)
    assert inputs.shape == targets.shape == (4, 20)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_small_vocabulary_keeps_the_commonest_characters() -> None:
    wide, narrow = datasets.load(PythonTextConfig()), datasets.load(PythonTextConfig(vocabulary=8))
    assert isinstance(wide, datasets.TextData)
    assert isinstance(narrow, datasets.TextData)
    assert int(narrow.training.max()) == 7
    common = wide.training <= 7
    np.testing.assert_array_equal(
        narrow.training[common & (wide.training > 0)], wide.training[common & (wide.training > 0)]
    )
    assert not narrow.training[~common].any()
    assert (wide.training == 0).mean() < 0.001


def test_digits_are_split_without_overlap() -> None:
    data = datasets.load(DigitsConfig())
    assert isinstance(data, datasets.ImageData)
    assert len(data.training[1]) + len(data.held_out[1]) == 1797
    assert data.training[0].shape[1:] == (1, 8, 8)
    assert set(data.held_out[1].tolist()) == set(range(10))


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InvalidModel, match=r"pip install 'numerics-advisor\[demo\]'"):
        ArchitectureSpec.parse({"family": "convnet"})


def test_without_sources_the_text_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(datasets, "_standard_library", lambda: tmp_path)
    with pytest.raises(InvalidModel, match="holds no sources"):
        ArchitectureSpec.parse({"family": "gpt"})
