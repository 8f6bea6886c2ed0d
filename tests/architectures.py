"""Real architectures, small: transformers' classes by configuration, and our own where it has none.

Each builder gives a model in training mode and a step: a function that draws the next batch from a stream of its own
and returns the loss. `ARCHITECTURES` names them all; attention is `eager` or `sdpa`, experts by each implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, Callable[[], Tensor]]

VOCABULARY, WIDTH, HEADS, LAYERS, BATCH, LENGTH = 96, 64, 4, 2, 4, 24


def gpt2(attention: str = "sdpa") -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=1,
        eos_token_id=1,
        attn_implementation=attention,
    )
    return _language_model(GPT2LMHeadModel(config))


def llama(attention: str = "sdpa") -> Built:
    """With grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _language_model(LlamaForCausalLM(LlamaConfig(**_decoder(attention))))


def mixtral(attention: str = "sdpa", experts: str = "grouped_mm") -> Built:
    """A mixture of experts; `experts`: eager, batched_mm or grouped_mm."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**_decoder(attention), num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    config._experts_implementation = experts
    return _language_model(MixtralForCausalLM(config))


def bert(attention: str = "sdpa") -> Built:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
        attn_implementation=attention,
    )
    return _language_model(BertForMaskedLM(config))


def t5(attention: str = "sdpa") -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=WIDTH // HEADS,
        d_ff=2 * WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        decoder_start_token_id=0,
        attn_implementation=attention,
    )
    model, draw = T5ForConditionalGeneration(config).train(), _draws()

    def step() -> Tensor:
        return model(input_ids=draw.tokens(), labels=draw.tokens(LENGTH // 2)).loss

    return model, step


def vit(attention: str = "sdpa") -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        num_labels=10,
        attn_implementation=attention,
    )
    model, draw = ViTForImageClassification(config).train(), _draws()

    def step() -> Tensor:
        return model(pixel_values=draw.normal(BATCH, 3, 16, 16), labels=draw.classes(10)).loss

    return model, step


def whisper(attention: str = "sdpa") -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_source_positions=LENGTH,
        max_target_positions=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        attn_implementation=attention,
    )
    model, draw = WhisperForConditionalGeneration(config).train(), _draws()

    def step() -> Tensor:
        return model(input_features=draw.normal(BATCH, 8, 2 * LENGTH), labels=draw.tokens(LENGTH // 2)).loss

    return model, step


def mamba() -> Built:
    """A state-space model, in its plain form: a scan in Python, depthwise convolutions."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, state_size=8, num_hidden_layers=LAYERS)
    return _language_model(MambaForCausalLM(config))


def mamba2() -> Built:
    """A state-space model whose scan is made of products over chunks."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        state_size=16,
        num_hidden_layers=LAYERS,
        expand=2,
        num_heads=8,
        head_dim=16,
        n_groups=1,
        chunk_size=8,
    )
    return _language_model(Mamba2ForCausalLM(config))


def unet() -> Built:
    """A diffusion model: it learns the noise that was added to an image."""
    model, draw = _UNet(3, 32), _draws()

    def step() -> Tensor:
        clean, noise = draw.normal(BATCH, 3, 16, 16), draw.normal(BATCH, 3, 16, 16)
        times = draw.uniform(BATCH)
        kept = torch.cos(times * torch.pi / 2)[:, None, None, None]
        noisy = kept * clean + (1 - kept.square()).sqrt() * noise
        return F.mse_loss(model(noisy, times), noise)

    return model, step


def resnet() -> Built:
    """With BatchNorm; of transformers."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic", num_labels=10)
    model, draw = ResNetForImageClassification(config).train(), _draws()

    def step() -> Tensor:
        return model(pixel_values=draw.normal(BATCH, 3, 32, 32), labels=draw.classes(10)).loss

    return model, step


def lstm() -> Built:
    model, draw = _RecurrentLanguageModel(), _draws()

    def step() -> Tensor:
        tokens = draw.tokens(LENGTH + 1)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return model, step


def graph(adjacency: str = "dense") -> Built:
    """A graph network; neighbours are added up by a dense or a sparse product, or by scattering."""
    draw = _draws()
    near = (draw.uniform(40, 40) < 0.15).float() + torch.eye(40)
    weights = near / near.sum(1, keepdim=True)
    model = _GraphNetwork({"dense": weights, "sparse": weights.to_sparse(), "scatter": near.nonzero().t()}[adjacency])

    def step() -> Tensor:
        return F.cross_entropy(model(draw.normal(40, WIDTH)), draw.classes(5, 40))

    return model, step


def dlrm() -> Built:
    """A recommender: embedding bags, and dot products of every pair of features."""
    model, draw = _Recommender(), _draws()

    def step() -> Tensor:
        bags = [draw.integers(50, BATCH * 8, 3) for _ in range(3)]
        return F.binary_cross_entropy_with_logits(
            model(draw.normal(BATCH * 8, 13), bags), draw.integers(2, BATCH * 8).float()
        )

    return model, step


def _attentions(name: str, build: Callable[..., Built], **options: Any) -> dict[str, Callable[[], Built]]:
    return {f"{name}-{kind}": partial(build, kind, **options) for kind in ("eager", "sdpa")}


ARCHITECTURES: dict[str, Callable[[], Built]] = {
    **_attentions("gpt2", gpt2),
    **_attentions("llama", llama),
    **_attentions("mixtral-eager", mixtral, experts="eager"),
    **_attentions("mixtral-batched", mixtral, experts="batched_mm"),
    **_attentions("mixtral-grouped", mixtral, experts="grouped_mm"),
    **_attentions("bert", bert),
    **_attentions("t5", t5),
    **_attentions("vit", vit),
    **_attentions("whisper", whisper),
    "mamba": mamba,
    "mamba2": mamba2,
    "unet": unet,
    "resnet": resnet,
    "lstm": lstm,
    "graph-dense": partial(graph, "dense"),
    "graph-sparse": partial(graph, "sparse"),
    "graph-scatter": partial(graph, "scatter"),
    "dlrm": dlrm,
}


def build(name: str) -> Built:
    """A model and its step, always with the same weights and batches."""
    torch.manual_seed(0)
    return ARCHITECTURES[name]()


class _Draws:
    """Random batches from a stream of their own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def tokens(self, length: int = LENGTH) -> Tensor:
        return self.integers(VOCABULARY - 3, BATCH, length) + 3

    def classes(self, count: int, batch: int = BATCH) -> Tensor:
        return self.integers(count, batch)

    def integers(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)


_draws = _Draws


def _decoder(attention: str) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "max_position_embeddings": LENGTH,
        "attn_implementation": attention,
    }


def _language_model(model: nn.Module) -> Built:
    model, draw = model.train(), _draws()

    def step() -> Tensor:
        tokens = draw.tokens()
        return model(input_ids=tokens, labels=tokens).loss

    return model, step


class _ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, time: int) -> None:
        super().__init__()
        self.first_norm, self.first = nn.GroupNorm(8, channels_in), nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time = nn.Linear(time, channels)
        self.second_norm, self.second = nn.GroupNorm(8, channels), nn.Conv2d(channels, channels, 3, padding="same")
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(F.silu(self.first_norm(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.second(F.dropout(F.silu(self.second_norm(hidden)), 0.1, self.training))


class _SelfAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(8, channels), nn.Conv1d(channels, 3 * channels, 1)
        self.out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm(x).flatten(2)).chunk(3, dim=1)
        weights = torch.einsum("bcq,bck->bqk", query, key * query.shape[1] ** -0.5).softmax(-1)
        return x + self.out(torch.einsum("bqk,bck->bcq", weights, value)).view_as(x)


class _UNet(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList([_ResBlock(width, width, 2 * width), _ResBlock(width, 2 * width, 2 * width)])
        self.shrink = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.middle, self.attention = _ResBlock(2 * width, 2 * width, 2 * width), _SelfAttention(2 * width)
        self.grow = nn.ConvTranspose2d(2 * width, 2 * width, 4, stride=2, padding=1)
        self.up = _ResBlock(3 * width, width, 2 * width)
        self.sharpen = nn.Conv2d(width, width, 3, padding=1)
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1))
        self.width = width

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        rates = torch.exp(-torch.arange(self.width // 2) * 9.2 / (self.width // 2))
        angles = 1000 * times[:, None] * rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        fine = self.down[0](self.enter(x), time)
        coarse = self.down[1](self.shrink(fine), time)
        coarse = self.attention(self.middle(coarse, time))
        joined = self.up(torch.cat([self.grow(coarse), fine], dim=1), time)
        return self.leave(self.sharpen(F.interpolate(F.avg_pool2d(joined, 2), scale_factor=2, mode="nearest")))


class _RecurrentLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, LAYERS, batch_first=True, dropout=0.1)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


class _GraphLayer(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.neighbours, self.own = nn.Linear(width_in, width), nn.Linear(width_in, width, bias=False)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        messages = self.neighbours(x)
        if adjacency.layout != torch.strided:
            gathered = torch.sparse.mm(adjacency, messages)
        elif adjacency.is_floating_point():
            gathered = adjacency @ messages
        else:
            to, frm = adjacency
            gathered = torch.zeros_like(messages).index_add_(0, to, messages[frm])
        return self.own(x) + gathered


class _GraphNetwork(nn.Module):
    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_GraphLayer(WIDTH, WIDTH), _GraphLayer(WIDTH, 5)])
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x, self.adjacency))
        return self.layers[-1](x, self.adjacency)


class _Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.tables = nn.ModuleList([nn.EmbeddingBag(50, 16, mode="sum") for _ in range(3)])
        self.top = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, bags: list[Tensor]) -> Tensor:
        dense = self.bottom(dense)
        features = torch.stack([dense, *(table(bag) for table, bag in zip(self.tables, bags, strict=True))], dim=1)
        products = torch.bmm(features, features.transpose(1, 2))
        above, right = torch.triu_indices(4, 4, offset=1)
        return self.top(torch.cat([dense, products[:, above, right]], dim=1)).squeeze(1)
