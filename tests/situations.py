"""Trainings of every kind that a window must not change: `SITUATIONS` names them.

Each is a function that trains a small model of its own from the global random stream, with the window that it is given
around a part of its steps, and gives the outcome.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.architectures import build as architecture_of
from tests.outcomes import WINDOWS, Outcome, Training, Watch, changed_by, outcome, train

BATCH, LENGTH, WIDTH, CLASSES = 6, 5, 8, 4
SCALE = 1024.0


class Block(nn.Module):
    """What disturbs most easily: dropout, in-place activation, BatchNorm, attention, products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout, self.activation = nn.Dropout(0.1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.transpose(1, 2)).transpose(1, 2)
        h = F.scaled_dot_product_attention(h, h, h, dropout_p=0.1 * self.training) + (h @ h.transpose(1, 2)) @ h
        return x + self.dropout(self.down(self.activation(self.up(h))))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


Builder = Callable[[], nn.Module]


def inputs() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH)


def loss_of(model: nn.Module, x: Tensor | None = None) -> Tensor:
    logits = model(inputs() if x is None else x)
    return F.cross_entropy(logits.flatten(0, -2), torch.randint(0, CLASSES, (logits.shape[:-1].numel(),)))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def ordinary(
    watch: Watch,
    build: Builder = Small,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    loss: Callable[[nn.Module], Tensor] = loss_of,
    backward: Callable[[Tensor], Any] = Tensor.backward,
    after_backward: Callable[[nn.Module], Any] = lambda model: None,
    set_to_none: bool = True,
    accumulate: int = 1,
) -> Outcome:
    """The usual loop, with one of its parts in another form."""
    model = build()
    stepper = optimizer(model)

    def step() -> list[Tensor]:
        losses = []
        for _ in range(accumulate):
            losses.append(loss(model) / accumulate)
            backward(losses[-1])
        after_backward(model)
        stepper.step()
        stepper.zero_grad(set_to_none=set_to_none)
        return [part.detach() for part in losses]

    return train(model, stepper, step, watch)


# Precision and scales.


def autocast(watch: Watch, dtype: torch.dtype) -> Outcome:
    def loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return loss_of(model)

    return ordinary(watch, loss=loss)


def grad_scaler(watch: Watch, skips: bool) -> Outcome:
    model = Small()
    optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
    steps = 0

    def step() -> Tensor:
        nonlocal steps
        steps += 1
        x = inputs() * (float("inf") if skips and steps in (2, 4) else 1.0)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, x)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return torch.stack([loss.detach(), torch.tensor(scaler.get_scale())])

    return train(model, optimizer, step, watch)


def constant_scale(watch: Watch) -> Outcome:
    def unscale(model: nn.Module) -> None:
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(SCALE)

    return ordinary(watch, backward=lambda loss: (loss * SCALE).backward(), after_backward=unscale)


# Forwards.


class Checkpointed(Small):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.reentrant else x
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Shared(nn.Module):
    """A tied embedding and a layer that is called twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.again = self.layer
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.again(F.gelu(self.layer(self.embedding(tokens)))))


def tokens_loss(model: nn.Module) -> Tensor:
    return loss_of(model, torch.randint(0, CLASSES, (BATCH, LENGTH)))


def evaluating(model: nn.Module, how: Callable[[], Any], training: bool) -> Tensor:
    model.train(training)
    with how():
        loss_of(model)
    model.train()
    return loss_of(model)


def compiled(watch: Watch, in_place: bool = False) -> Outcome:
    def build() -> nn.Module:
        torch._dynamo.reset()
        model = Small()
        if in_place:
            model.compile(backend="aot_eager")
            return model
        return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]

    try:
        return ordinary(watch, build=build)
    finally:
        torch._dynamo.reset()


def frozen(watch: Watch) -> Outcome:
    def build() -> nn.Module:
        model = Small()
        model.blocks[0].requires_grad_(False)  # type: ignore[union-attr, operator]
        model.head.bias.requires_grad_(False)  # type: ignore[union-attr, operator]
        return model

    return ordinary(watch, build=build)


class Exportable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.first(x))
        return self.second(h + torch.matmul(torch.matmul(h, h.transpose(1, 2)), h))


def exported(watch: Watch) -> Outcome:
    def build() -> nn.Module:
        return torch.export.unflatten(torch.export.export(Exportable(), (inputs(),)))

    return ordinary(watch, build=build)


class FixedAttention(nn.Module):
    """transformers-like use of `F.multi_head_attention_forward`, a composite call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


class Own(torch.autograd.Function):
    """A linear layer by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Own.apply(x, self.weight).relu_())


# Optimizers.


def sparse_embedding(watch: Watch) -> Outcome:
    model = nn.Sequential(nn.Embedding(16, WIDTH, sparse=True), nn.Linear(WIDTH, CLASSES))
    sparse = torch.optim.SparseAdam(list(model[0].parameters()), lr=1e-2)
    dense = adamw(model[1])

    def step() -> Tensor:
        loss = loss_of(model, torch.randint(0, 16, (BATCH, LENGTH)))
        loss.backward()
        dense.step()
        sparse.step()
        model.zero_grad()
        return loss.detach()

    found = train(model, sparse, step, watch)
    return found | {f"dense.{name}": value for name, value in outcome([], [], [dense]).items()}


def lbfgs(watch: Watch) -> Outcome:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def step() -> Any:
        x = inputs()
        target = torch.randint(0, CLASSES, (BATCH * LENGTH,))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, -2), target)
            loss.backward()
            return loss

        return optimizer.step(closure).detach()

    return train(model, optimizer, step, watch)


def _by(kind: Any, **options: Any) -> Training:
    return partial(ordinary, optimizer=lambda model: kind(model.parameters(), **{"lr": 1e-2, **options}))


def clipped_with_average(watch: Watch) -> Outcome:
    """Gradient clipping, a schedule, and a moving average of the weights that is a copy of the model."""
    model = Small()
    optimizer = adamw(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    last: list[nn.Module] = []

    def step() -> list[Tensor]:
        loss = loss_of(model)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        last[:] = [copy.deepcopy(model).eval()]
        with torch.no_grad():
            return [loss.detach(), norm, loss_of(last[0]), loss_of(average)]

    found = train(model, optimizer, step, watch)
    return found | {f"average.{name}": value for name, value in outcome([], [average, last[0]], []).items()}


# Backward passes.


def retained(loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    (0.5 * loss).backward()


def towards(model: nn.Module) -> Tensor:
    """Backward passes towards some leaves, given as an iterator, which can be asked once."""
    (0.1 * loss_of(model)).backward(inputs=model.blocks[1].parameters())  # type: ignore[index, union-attr, operator]
    return loss_of(model)


def gradient_penalty(model: nn.Module) -> Tensor:
    x = inputs().requires_grad_()
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    return F.mse_loss(logits, torch.zeros_like(logits)) + gradient.square().sum()


def plain_attention() -> nn.Module:
    """Twice differentiable, as CPU attention is not (2.13)."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, CLASSES))


def by_autograd_grad(watch: Watch) -> Outcome:
    model = Small()
    optimizer = adamw(model)

    def step() -> Tensor:
        loss = loss_of(model)
        parameters = list(model.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, model.parameters()), strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train(model, optimizer, step, watch)


def adversaries(watch: Watch, both: bool) -> Outcome:
    """Two models that are trained in turns, with a window on one or on both."""
    generator = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH))
    critic = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2, inplace=True), nn.Linear(WIDTH, 1))
    makes, judges = adamw(generator), adamw(critic)

    def step() -> list[Tensor]:
        made = generator(torch.randn(BATCH, 4))
        real, fake = critic(torch.randn(BATCH, WIDTH)), critic(made.detach())
        doubt = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
        doubt = doubt + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
        doubt.backward()
        judges.step()
        judges.zero_grad()
        judged = critic(made)
        loss = F.binary_cross_entropy_with_logits(judged, torch.ones_like(judged))
        loss.backward()
        makes.step()
        makes.zero_grad()
        critic.zero_grad()
        return [doubt.detach(), loss.detach()]

    def outer() -> list[Any]:
        if not both:
            return [step() for _ in range(3)]
        with watch(critic, judges):
            return [step() for _ in range(3)]

    first = step()
    with watch(generator, makes):
        losses = outer()
    return outcome([first, losses, step()], [generator, critic], [makes, judges])


# What users put around and inside.


class CountingFunctions(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


class CountingOperators(TorchDispatchMode):
    """Of the operators themselves: what a window adds of its own is seen there, and the results must not be."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def modes_around(watch: Watch, kind: Any) -> Outcome:
    with kind():
        return ordinary(watch)


def modes_inside(watch: Watch, kind: Any) -> Outcome:
    def loss(model: nn.Module) -> Tensor:
        with kind():
            return loss_of(model)

    return ordinary(watch, loss=loss)


def users_hooks(watch: Watch) -> Outcome:
    """Hooks on modules, tensors, parameters and optimizer, some of which change what they are given."""
    heard: list[Tensor] = []

    def build() -> nn.Module:
        model = Small()
        first: Any = model.blocks[0]
        first.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
        first.register_forward_hook(lambda module, args, result: result + 0.25)
        first.down.register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))
        first.down.register_full_backward_pre_hook(lambda module, out: (out[0] * 2,))
        first.up.weight.register_hook(lambda gradient: gradient * 3)
        first.up.weight.register_post_accumulate_grad_hook(lambda p: heard.append(p.grad.clone()))
        return model

    def loss(model: nn.Module) -> Tensor:
        x = inputs()
        h = model.blocks[0](x)  # type: ignore[index, operator]
        h.register_hook(lambda gradient: gradient.clamp(-1, 1))
        return loss_of(model, x) + h.square().mean()

    found = ordinary(watch, build=build, loss=loss)
    return found | {f"heard.{i}": gradient for i, gradient in enumerate(heard)}


def anomalies(watch: Watch) -> Outcome:
    with torch.autograd.set_detect_anomaly(True):
        return ordinary(watch)


def in_double(watch: Watch) -> Outcome:
    """A script that sets default dtype and device itself."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("cpu")
    try:
        return ordinary(watch)
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def saved_on_host(watch: Watch) -> Outcome:
    def loss(model: nn.Module) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return loss_of(model)

    return ordinary(watch, loss=loss)


def weights_by_data(watch: Watch) -> Outcome:
    """Weights that are changed in the middle of a step, behind autograd's back."""

    def loss(model: nn.Module) -> Tensor:
        found = loss_of(model)
        with torch.no_grad():
            model.head.weight.data.mul_(0.999)  # type: ignore[union-attr, operator]
        return found

    return ordinary(watch, loss=loss)


def not_finite(watch: Watch) -> Outcome:
    """NaN from the first step."""
    return ordinary(watch, loss=lambda model: loss_of(model, inputs() * float("nan")))


def architecture(watch: Watch, name: str) -> Outcome:
    """A model of `architectures.py`, as its step trains it."""
    model, loss = architecture_of(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> Tensor:
        found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    return train(model, optimizer, step, watch)


# Two processes.


def data_parallel(watch: Watch) -> Outcome:
    return ordinary(watch, build=lambda: nn.parallel.DistributedDataParallel(Small()))


def data_parallel_accumulating(watch: Watch) -> Outcome:
    """The first micro-batch of each step without exchange of gradients."""

    def loss(model: nn.Module) -> Tensor:
        with model.no_sync():  # type: ignore[operator]
            loss_of(model).backward()
        return loss_of(model)

    return ordinary(watch, build=lambda: nn.parallel.DistributedDataParallel(Small()), loss=loss)


def sharded(watch: Watch) -> Outcome:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def shards() -> nn.Module:
        model, mesh = Small(), init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    return ordinary(watch, build=shards)


RANKS: dict[str, Training] = {
    "data-parallel": data_parallel,
    "data-parallel-accumulating": data_parallel_accumulating,
    "sharded": sharded,
}


def ranks_changed(rank: int, name: str, windows: tuple[str, ...]) -> list[str]:
    """What windows change in a training of several processes, on this one."""
    return [f"{window}: {one}" for window in windows for one in changed_by(RANKS[name], WINDOWS[window])]


OPTIMIZERS: dict[str, Training] = {
    "sgd": _by(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adam": _by(torch.optim.Adam, amsgrad=True),
    "adamw": _by(torch.optim.AdamW),
    "adafactor": _by(torch.optim.Adafactor),
    "rmsprop": _by(torch.optim.RMSprop, centered=True, momentum=0.5),
    "adagrad": _by(torch.optim.Adagrad),
    "nadam": _by(torch.optim.NAdam),
    "adadelta": _by(torch.optim.Adadelta),
    "rprop": _by(torch.optim.Rprop),
    "sgd-foreach": _by(torch.optim.SGD, momentum=0.9, foreach=True),
    "adamw-foreach": _by(torch.optim.AdamW, foreach=True),
    "sgd-fused": _by(torch.optim.SGD, momentum=0.9, fused=True),
    "adamw-fused": _by(torch.optim.AdamW, fused=True),
    "adagrad-fused": _by(torch.optim.Adagrad, fused=True),
    "sparse-adam": sparse_embedding,
    "lbfgs": lbfgs,
}

SITUATIONS: dict[str, Training] = {
    "ordinary": ordinary,
    "autocast-bf16": partial(autocast, dtype=torch.bfloat16),
    "autocast-fp16": partial(autocast, dtype=torch.float16),
    "scaler": partial(grad_scaler, skips=False),
    "scaler-skips": partial(grad_scaler, skips=True),
    "constant-scale": constant_scale,
    "accumulation": partial(ordinary, accumulate=3),
    "checkpoint": partial(ordinary, build=partial(Checkpointed, False)),
    "checkpoint-reentrant": partial(ordinary, build=partial(Checkpointed, True)),
    "shared": partial(ordinary, build=Shared, loss=tokens_loss),
    "evaluation-no-grad": partial(ordinary, loss=partial(evaluating, how=torch.no_grad, training=True)),
    "evaluation-inference": partial(ordinary, loss=partial(evaluating, how=torch.inference_mode, training=False)),
    "compiled": compiled,
    "compiled-in-place": partial(compiled, in_place=True),
    "frozen": frozen,
    "exported": exported,
    "composite": partial(ordinary, build=FixedAttention),
    "custom-function": partial(ordinary, build=ByHand),
    "clipped-with-average": clipped_with_average,
    "retained": partial(ordinary, backward=retained),
    "towards-leaves": partial(ordinary, loss=towards),
    "gradient-penalty": partial(ordinary, build=plain_attention, loss=gradient_penalty),
    "autograd-grad": by_autograd_grad,
    "adversaries-one": partial(adversaries, both=False),
    "adversaries-both": partial(adversaries, both=True),
    "zeroed-gradients": partial(ordinary, set_to_none=False),
    "function-mode-around": partial(modes_around, kind=CountingFunctions),
    "function-mode-inside": partial(modes_inside, kind=CountingFunctions),
    "dispatch-mode-around": partial(modes_around, kind=CountingOperators),
    "dispatch-mode-inside": partial(modes_inside, kind=CountingOperators),
    "users-hooks": users_hooks,
    "anomaly-detection": anomalies,
    "default-dtype": in_double,
    "saved-on-host": saved_on_host,
    "weights-by-data": weights_by_data,
    "not-finite": not_finite,
    **{f"optimizer-{name}": training for name, training in OPTIMIZERS.items()},
}
