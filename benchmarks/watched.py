"""The models that `overhead.py` trains, of a size that a CPU trains in earnest: transformers' classes by configuration.

Each is built from seed 0 and gives a batch of its inputs, labels included, so that its first output is the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

Batch = dict[str, Tensor]
Built = tuple[nn.Module, Callable[[torch.Generator], Batch]]

VOCABULARY, WIDTH, HEADS, LAYERS, BATCH, LENGTH = 8192, 256, 4, 4, 8, 128
CLASSES, IMAGES, PIXELS = 100, 16, 64


def gpt2() -> Built:
    """4 layers, width 256, batch 8 of 128 tokens, vocabulary 8,192, no dropout."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, use_cache=False, bos_token_id=1, eos_token_id=1)), _tokens


def llama() -> Built:
    """4 layers, width 256, grouped-query attention, the same batch and vocabulary."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=LENGTH,
        use_cache=False,
    )
    return LlamaForCausalLM(config), _tokens


def vit() -> Built:
    """4 layers, width 256, 16 images of 64 × 64 in patches of 8."""
    config = ViTConfig(
        image_size=PIXELS,
        patch_size=8,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_labels=CLASSES,
    )
    return ViTForImageClassification(config), _images


def resnet() -> Built:
    """ResNet-18's four stages of basic blocks, with BatchNorm, 16 images of 64 × 64."""
    config = ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config), _images


MODELS: dict[str, Callable[[], Built]] = {"gpt2": gpt2, "llama": llama, "vit": vit, "resnet": resnet}


def built(name: str) -> tuple[nn.Module, Callable[[], Batch]]:
    """The model in training mode, and a function that gives its next batch: the same ones each time it is built."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    return model.train(), lambda: batch(generator)


def loss_of(output: Any) -> Tensor:
    """A transformers model's loss."""
    loss: Tensor = output["loss"]
    return loss


def _tokens(generator: torch.Generator) -> Batch:
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


def _images(generator: torch.Generator) -> Batch:
    return {
        "pixel_values": torch.randn(IMAGES, 3, PIXELS, PIXELS, generator=generator),
        "labels": torch.randint(0, CLASSES, (IMAGES,), generator=generator),
    }
