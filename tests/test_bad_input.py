"""What a window meets that nobody would call a training: it goes on, and says what it could not do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import advisor
from probes.errors import WindowError
from probes.probing import probe
from probes.recorder import Recorder
from probes.window import Window
from probes.windowfile import window_from_bytes

WIDTH, CLASSES = 4, 3


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: int = 5, x: Tensor | None = None) -> None:
    logits = model(torch.randn(batch, WIDTH) if x is None else x)
    F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)).backward()
    optimizer.step()
    optimizer.zero_grad()


def watched(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *changes: Callable[[], Any], **inputs: Any
) -> Window:
    """A window of three steps, with a change after each of the first two; it must be scored and go through a file."""
    optimizer = optimizer or sgd(model.parameters())
    with probe(model, optimizer, steps=3) as window:
        for i in range(3):
            step(model, optimizer, **inputs)
            if i < len(changes):
                changes[i]()
    return usable(window)


def usable(window: Window) -> Window:
    advisor.score(window)
    assert window_from_bytes(window.to_bytes()).header() == window.header()
    return window


class Function(nn.Module):
    """A model of one parameter and a function."""

    def __init__(self, function: Callable[[Tensor, nn.Linear], Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(WIDTH, CLASSES), function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.layer)


# Models and steps that lack something.


def test_a_model_without_parameters() -> None:
    model, weight = nn.ReLU(), nn.Parameter(torch.randn(3))
    optimizer = sgd([weight])
    with probe(model, optimizer, steps=1) as window:
        model(weight).sum().backward()
        optimizer.step()
    assert usable(window).steps == (0,)
    assert "no matrix product was met" in window.notes[0]


def test_steps_without_a_forward_or_a_backward() -> None:
    model = layers()
    optimizer = sgd(model.parameters())
    with probe(model, optimizer, steps=2) as window:
        optimizer.step()
        model(torch.randn(5, WIDTH))
        optimizer.step()
    assert usable(window).steps == (0, 1)
    assert all(loss != loss for loss in window.losses)
    assert window.history("0", "input").steps.tolist() == [1]
    assert not any(slot.role == "grad_output" for slot in window.slots)


def test_steps_that_are_never_taken() -> None:
    model = layers()
    with probe(model, sgd(model.parameters()), steps=2) as window:
        model(torch.randn(5, WIDTH)).sum().backward()
    assert usable(window).steps == ()
    assert "0 of 2" in window.notes[0]


def test_gradients_of_each_sample_under_vmap() -> None:
    """As private training takes them: losses and products inside of torch.func's transforms, none of which is kept."""
    model = layers()
    optimizer = sgd(model.parameters())
    names = [name for name, _ in model.named_parameters()]

    def loss_of(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), target[None])

    with probe(model, optimizer, steps=2) as window:
        for _ in range(2):
            held = {name: model.get_parameter(name).detach() for name in names}
            target = torch.zeros(5, dtype=torch.long)
            found = vmap(grad(loss_of), (None, 0, 0))(held, torch.randn(5, WIDTH), target)
            for name in names:
                model.get_parameter(name).grad = found[name].mean(0)
            step(model, optimizer)
    assert usable(window).steps == (0, 1)
    assert window.history("0", "grad_output").steps.tolist() == [0, 1]
    assert any("cross_entropy was called within a transform of torch.func" in note for note in window.notes)
    assert window.coverage.share == 1.0


def test_an_optimizer_of_other_parameters() -> None:
    model, other = layers(), nn.Parameter(torch.zeros(2, 2))
    assert watched(model, sgd([model[0].weight, other])).steps == (0, 1, 2)


def test_parameters_without_a_shape_yet() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(CLASSES))
    window = watched(model, sgd([nn.Parameter(torch.zeros(1))]))
    assert [site.name for site in window.sites] == ["0", "2"]
    never = nn.ModuleList([nn.Linear(2, 2), nn.LazyLinear(3)])
    with probe(never, sgd(never[0].parameters()), steps=1) as window:
        pass
    assert usable(window).parameters["1.weight"] == ()


# Windows that would see the same twice.


@pytest.mark.parametrize("pick", [lambda model: model, lambda model: model[0], lambda model: nn.Sequential(model)])
def test_modules_that_are_watched_are_not_watched_again(pick: Callable[[nn.Sequential], nn.Module]) -> None:
    model, refused = layers(), []
    optimizer = sgd(model.parameters())

    def second() -> None:
        with pytest.raises(WindowError, match="another open window"):
            probe(pick(model), optimizer, steps=1).__enter__()
        refused.append(True)

    with probe(model, optimizer, steps=2) as window:
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        step(model, optimizer)
        step(model, optimizer)
    assert refused == [True, True]
    assert window.steps == (0, 1)
    with probe(pick(model), optimizer, steps=1) as after:
        step(pick(model), optimizer) if pick(model) is not model[0] else None
    assert after.done


# A model that changes.


class Adapted(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_is_put_in() -> None:
    model = layers()
    window = watched(model, None, lambda: model.__setitem__(0, Adapted(model[0])))
    assert {"0", "2", "0.down", "0.up"} <= {site.name for site in window.sites}
    assert "modules came, went, moved" in window.notes[0]
    assert window.history("0.up", "grad_output").steps.tolist() == [1, 2]


def test_a_module_is_replaced_and_one_is_deleted() -> None:
    model = layers()
    window = watched(
        model, None, lambda: model.__setitem__(0, nn.Linear(WIDTH, 8)), lambda: model.__delitem__(slice(1, 2))
    )
    assert window.history("0", "input").steps.tolist() == [0, 1, 2]
    assert window.site("2").parameter_shape == (CLASSES, 8)  # which is not in the model any more under this name


def test_hooks_that_a_user_clears_come_back() -> None:
    model = layers()

    def clear() -> None:
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()

    window = watched(model, None, clear)
    assert window.history("0", "input").steps.tolist() == [0, 1, 2]  # its parameter names a product without them, too
    assert "lost their hooks in step 1" in window.notes[0]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_parameters_change_their_shape_and_dtype() -> None:
    model = layers()

    def wider() -> None:
        model[0].weight.data, model[0].bias.data = torch.randn(16, WIDTH), torch.randn(16)
        model[2].weight.data = torch.randn(CLASSES, 16)

    assert watched(model, None, wider).steps == (0, 1, 2)


# Tensors of every kind.


def test_nan_from_the_first_step() -> None:
    window = watched(layers(), torch.optim.Adam(layers().parameters()), x=torch.full((5, WIDTH), float("nan")))
    history = window.history("0", "input")
    assert history.nans.tolist() == [20] * 3


def test_batches_of_nothing_and_of_one() -> None:
    window = watched(layers(), batch=0)
    assert window.steps == (0, 1, 2)
    assert window.site("0").elements["input"] == 0
    assert watched(layers(), batch=1).history("0", "input").elements.tolist() == [WIDTH] * 3


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_of_no_width() -> None:
    window = watched(nn.Sequential(nn.Linear(WIDTH, 0), nn.Linear(0, CLASSES)))
    assert window.steps == (0, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_models_of_another_dtype(dtype: torch.dtype) -> None:
    window = watched(layers().to(dtype), x=torch.randn(5, WIDTH, dtype=dtype))
    assert window.site("0").dtypes["input"] == str(dtype).removeprefix("torch.")


def test_devices_without_values() -> None:
    """Of several devices, and of one where nothing can be read."""
    mixed = Function(lambda x, layer: (other(x.to("meta")), layer(x))[1])
    other = nn.Linear(WIDTH, WIDTH, device="meta")
    mixed.other = other
    window = watched(mixed, sgd(mixed.layer.parameters()))
    assert {"layer"} <= {site.name for site in window.sites}
    assert any("meta device" in note for note in window.notes)
    assert window.history("layer", "weight").steps.tolist() == [0, 1, 2]
    assert watched(layers().to("meta"), x=torch.randn(5, WIDTH, device="meta")).sites == ()


def whole_numbers(x: Tensor, layer: nn.Linear) -> Tensor:
    whole = torch.arange(16).reshape(4, 4)
    assert torch.equal(whole @ torch.eye(4, dtype=torch.long), whole)
    return layer(x)


def complex_numbers(x: Tensor, layer: nn.Linear) -> Tensor:
    return layer(x) + torch.fft.irfft(torch.fft.rfft(x) @ torch.eye(3, dtype=torch.complex64), n=4)[:, :CLASSES]


@pytest.mark.parametrize("function", [whole_numbers, complex_numbers])
def test_products_of_other_numbers_are_no_sites(function: Any) -> None:
    assert [site.name for site in watched(Function(function)).sites] == ["layer"]


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
def test_quantized_tensors() -> None:
    def function(x: Tensor, layer: nn.Linear) -> Tensor:
        return layer(torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize())

    assert [site.name for site in watched(Function(function)).sites] == ["layer"]


def test_a_model_that_returns_no_tensor() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits, self.nothing = logits, None

    model = Function(lambda x, layer: Output(layer(x)))
    optimizer = sgd(model.parameters())
    with probe(model, optimizer, steps=1) as window:
        F.cross_entropy(model(torch.randn(5, WIDTH)).logits, torch.zeros(5, dtype=torch.long)).backward()
        optimizer.step()
    assert usable(window).history("layer", "grad_output").elements.tolist() == [15]


def test_a_training_in_another_thread() -> None:
    model = layers()
    optimizer = sgd(model.parameters())
    with probe(model, optimizer, steps=2) as window:
        for _ in range(2):
            thread = threading.Thread(target=step, args=(model, optimizer))
            thread.start()
            thread.join()
    assert usable(window).history("2", "grad_output").steps.tolist() == [0, 1]


# Calls that fail by themselves fail as they would.


@pytest.mark.parametrize(
    "wrong",
    [
        lambda model: F.cross_entropy(model(torch.randn(5, WIDTH))),
        lambda model: F.cross_entropy(model(torch.randn(5, WIDTH)), torch.full((5,), 7)),
        lambda model: F.cross_entropy(model(torch.randn(5, WIDTH)), torch.zeros(5).long(), reduction="none"),
        lambda model: F.mse_loss(model(torch.randn(5, WIDTH)), 2),
        lambda model: model(torch.randn(5, 7)),
        lambda model: torch.matmul(model[0].weight, 3),
        lambda model: F.linear(model[0].weight),
        lambda model: torch.einsum("ab,bc->ac", model[0].weight),
        lambda model: model(torch.randn(5, WIDTH)).backward(),
    ],
)
def test_the_users_own_errors_are_the_users(wrong: Callable[[nn.Module], Any]) -> None:
    class Wrong(nn.Sequential):
        ask = False

        def forward(self, x: Tensor) -> Tensor:
            if self.ask:
                self.ask = False
                wrong(self)
            return super().forward(x)

    def said(model: nn.Module) -> str:
        try:
            model.ask = True  # type: ignore[assignment]
            model(torch.randn(5, WIDTH))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    model = Wrong(*layers())
    plain = said(model)
    optimizer = sgd(model.parameters())
    with probe(model, optimizer, steps=1) as window:
        assert said(model) == plain
        step(model, optimizer)
    assert usable(window).steps == (0,)


# Whatever fails in the window's own work is a note.


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Recorder, "_tally"),
        (Recorder, "_tilings"),
        (Recorder, "_count"),
        (Recorder, "_product_call"),
        (Recorder, "on_forward"),
        (Recorder, "on_backward"),
        (Recorder, "end_step"),
        ("probes.recorder", "loss_call"),
        ("probes.parameters.ParameterWatch", "before_step"),
        ("probes.parameters.ParameterWatch", "after_step"),
        ("probes.probing", "contents_of"),
    ],
)
@pytest.mark.filterwarnings("ignore:the window could not be closed:RuntimeWarning")
def test_no_failure_of_ours_stops_the_training(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise LookupError("broken on purpose")

    def weights(watch: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = layers()
        optimizer = sgd(model.parameters())
        if watch:
            with probe(model, optimizer, steps=2) as window:
                for _ in range(3):
                    step(model, optimizer)
            assert any("broken on purpose" in note for note in window.notes)
        else:
            for _ in range(3):
                step(model, optimizer)
        return list(model.parameters())

    plain = weights(watch=False)
    monkeypatch.setattr(owner if isinstance(owner, type) else f"{owner}.{name}", *_named(owner, name), broken)
    for one, other in zip(weights(watch=True), plain, strict=True):
        assert torch.equal(one, other)


def _named(owner: Any, name: str) -> tuple[str, ...]:
    return (name,) if isinstance(owner, type) else ()
