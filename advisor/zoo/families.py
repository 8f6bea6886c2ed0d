"""The families that can be built from a description, and how a config is fitted to its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from advisor.errors import DataMismatch
from advisor.zoo.convnet import ConvNet, ConvNetConfig
from advisor.zoo.datasets import (
    DIGITS_CHANNELS,
    DIGITS_CLASSES,
    DIGITS_SIZE,
    DataConfig,
    DigitsConfig,
    PythonTextConfig,
)
from advisor.zoo.gpt import GPT, GPTConfig

FamilyConfig = GPTConfig | ConvNetConfig


@dataclass(frozen=True)
class Family:
    """config: its pydantic class; module: builds from a fitted one; fit: fills in what the data decides."""

    config: type[GPTConfig] | type[ConvNetConfig]
    module: Callable[[Any], nn.Module]
    fit: Callable[[Any, DataConfig], FamilyConfig]
    default_data: str


def fit_gpt(config: GPTConfig, data: DataConfig) -> GPTConfig:
    """The config with its vocabulary. Raises DataMismatch."""
    if not isinstance(data, PythonTextConfig):
        raise DataMismatch(
            f"the family 'gpt' reads tokens and the data set {data.set!r} has images: "
            "use data.set 'python-text', or the family 'convnet'"
        )
    if data.length is not None and data.length > config.context:
        raise DataMismatch(
            f"sequences of {data.length} characters do not fit a context of {config.context}: "
            f"lower data.length to at most {config.context}, or raise config.context to {data.length}"
        )
    if config.vocabulary is not None and config.vocabulary < data.vocabulary:
        raise DataMismatch(
            f"the data has {data.vocabulary} tokens and the model a vocabulary of {config.vocabulary}: "
            f"raise config.vocabulary to at least {data.vocabulary}, or leave it out"
        )
    return config.model_copy(update={"vocabulary": config.vocabulary or data.vocabulary})


def fit_convnet(config: ConvNetConfig, data: DataConfig) -> ConvNetConfig:
    """The config with channels, image size and classes. Raises DataMismatch."""
    if not isinstance(data, DigitsConfig):
        raise DataMismatch(
            f"the family 'convnet' reads images and the data set {data.set!r} has tokens: "
            "use data.set 'digits', or the family 'gpt'"
        )
    for name, has in (("channels", DIGITS_CHANNELS), ("image_size", DIGITS_SIZE)):
        wants = getattr(config, name)
        if wants not in (None, has):
            raise DataMismatch(
                f"the data set {data.set!r} has {name} {has} and the model wants {wants}: "
                f"set config.{name} to {has}, or leave it out"
            )
    if config.classes is not None and config.classes < DIGITS_CLASSES:
        raise DataMismatch(
            f"the data set {data.set!r} has {DIGITS_CLASSES} classes and the model {config.classes}: "
            f"raise config.classes to at least {DIGITS_CLASSES}, or leave it out"
        )
    if config.smallest_image > DIGITS_SIZE:
        raise DataMismatch(
            f"{len(config.widths)} stages need images of {config.smallest_image}×{config.smallest_image} and "
            f"the data set {data.set!r} has {DIGITS_SIZE}×{DIGITS_SIZE}: give config.widths fewer entries"
        )
    return config.model_copy(
        update={
            "channels": DIGITS_CHANNELS,
            "image_size": DIGITS_SIZE,
            "classes": config.classes or DIGITS_CLASSES,
        }
    )


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gpt": Family(GPTConfig, GPT, fit_gpt, "python-text"),
        "convnet": Family(ConvNetConfig, ConvNet, fit_convnet, "digits"),
    }
)


def build(family: str, config: FamilyConfig) -> nn.Module:
    """The module of a fitted config, its weights drawn from torch's global generator."""
    return FAMILIES[family].module(config)


def parameter_count(family: str, config: FamilyConfig) -> int:
    """Number of parameters (tied ones once), found without allocating any."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(family, config).parameters())
