"""What each watcher's record can tell about underflow: computed from the record it makes, on a model's own gradients.

The question: of a gradient's non-zero elements, which share becomes zero in e4m3 with the tensor's own scale? The truth
is counted on the cast itself. A histogram gives bounds: the bins that lie wholly below the largest magnitude that
rounds to zero are lost for certain, and those that reach below it may be. Smallest, largest, mean and standard
deviation bound nothing: all elements but one may be below the threshold, or all but one above.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from watched import built, loss_of

from probes.casts import Cast
from probes.layout import BINS, ZEROS
from probes.sites import ProductCall, SiteHook
from probes.sketch import BIN_EDGES, SketchArray

CAST = "e4m3fn/tensor/current/nearest"
STEPS = 3  # trained before the gradients are taken

Floats = NDArray[np.float64]
Bounds = tuple[float, float]


class _Gradients(SiteHook):
    """Keeps every grad_output of one backward pass."""

    kept: list[Tensor]

    def on_product(self, call: ProductCall) -> Any:
        result = call.run()
        for part in call.results(result):
            part.register_hook(lambda gradient: self.kept.append(gradient.detach().clone()))
        return result


def gradients(model_name: str) -> list[Tensor]:
    """The gradients at the products' results, after a few steps of training."""
    model, next_batch = built(model_name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(STEPS):
        loss_of(model(**next_batch())).backward()
        optimizer.step()
        optimizer.zero_grad()
    hook = _Gradients(model)
    hook.kept = []
    with hook:
        loss_of(model(**next_batch())).backward()
    return hook.kept


def threshold(gradient: Tensor) -> float:
    """The largest magnitude that the cast makes zero: half of the smallest subnormal, 2^-9, at the tensor's scale."""
    return float(gradient.abs().max()) / 448.0 * 2.0**-10


def underflow_bounds(model_name: str) -> dict[str, Any]:
    """Truth and bounds, in shares of the non-zero elements of all gradients that lose any."""
    found: dict[str, list[float]] = {"truth": []}
    bounds: dict[str, list[Bounds]] = {name: [] for name in RECORDS}
    cast = Cast.parse(CAST)
    for gradient in gradients(model_name):
        nonzero = int(gradient.count_nonzero())
        lost = nonzero - int(cast(gradient).count_nonzero())
        if not lost:
            continue
        found["truth"].append(lost / nonzero)
        for name, record in RECORDS.items():
            counts, low, high = record(gradient)
            below, reaching = _lost(counts, low, high, threshold(gradient))
            zeros = gradient.numel() - nonzero
            bounds[name].append((max(0.0, below - zeros) / nonzero, min(1.0, max(0.0, reaching - zeros) / nonzero)))
    return {
        "gradients": len(found["truth"]),
        "truth": float(np.mean(found["truth"])) if found["truth"] else 0.0,
        "bounds": {name: np.mean(pairs, axis=0).tolist() for name, pairs in bounds.items() if pairs},
    }


def _lost(counts: Floats, low: Floats, high: Floats, limit: float) -> Bounds:
    """Elements in bins [low, high) that lie within ±limit, and in those that reach into it; zeros are in both."""
    within = (low >= -limit) & (high <= limit)
    reaching = (low <= limit) & (high >= -limit)
    return float(counts[within].sum()), float(counts[reaching].sum())


# Records: counts, and where each bin begins and ends.


def _ours(gradient: Tensor) -> tuple[Floats, Floats, Floats]:
    array = SketchArray(1)
    array.add(0, gradient)
    sums = array.sums[0].numpy()
    counts = np.append(sums[:BINS], sums[ZEROS])
    return counts, np.append(BIN_EDGES[:-1], 0.0), np.append(BIN_EDGES[1:], 0.0)


def _histogram_observer(gradient: Tensor) -> tuple[Floats, Floats, Floats]:
    from torch.ao.quantization import HistogramObserver

    observer = HistogramObserver()
    observer(gradient)
    return _linear(observer.histogram, float(observer.min_val), float(observer.max_val))


def _wandb(gradient: Tensor) -> tuple[Floats, Floats, Floats]:
    """wandb.watch calls torch.histc with 64 bins between the smallest and the largest value (0.31)."""
    low, high = float(gradient.min()), float(gradient.max())
    return _linear(torch.histc(gradient.float(), bins=64, min=low, max=high), low, high)


def _linear(counts: Tensor, low: float, high: float) -> tuple[Floats, Floats, Floats]:
    edges = np.linspace(low, high, len(counts) + 1)
    return counts.double().numpy(), edges[:-1], edges[1:]


def _tensorboard(gradient: Tensor) -> tuple[Floats, Floats, Floats]:
    import tempfile

    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import histogram

    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        bins = writer.default_bins
    kept = histogram("gradient", gradient.numpy(), bins).value[0].histo
    limits = np.array(kept.bucket_limit)
    counts = np.array(kept.bucket)
    return counts[1:], limits[:-1], limits[1:]


RECORDS: Mapping[str, Callable[[Tensor], tuple[Floats, Floats, Floats]]] = {
    "ours: log2, 8 bins an octave": _ours,
    "torch.ao HistogramObserver: 2,048 linear bins": _histogram_observer,
    "wandb.watch: 64 linear bins": _wandb,
    **({"TensorBoard: bins 10% apart": _tensorboard} if importlib.util.find_spec("tensorboard") is not None else {}),
}
NOTHING: Sequence[str] = (
    "torch.ao MinMaxObserver",
    "tensor-tracker",
    "nvdlfw-inspect LogTensorStats",
    "DebugUnderflowOverflow",
    "unit_scaling.track_scales",
)


def print_bounds(found: Mapping[str, Any], model_name: str) -> None:
    """A table in Markdown."""
    print(f"\nUnderflow of {found['gradients']} gradients of {model_name} in {CAST}: {found['truth']:.4%} in truth\n")
    print("| record | at least | at most |\n|---|---|---|")
    for name, (least, most) in found["bounds"].items():
        print(f"| {name} | {least:.4%} | {most:.4%} |")
    print(f"| {', '.join(NOTHING)}: no distribution | 0% | 100% |")
