"""A window as TensorBoard event files: for each slot, scalars step by step and the histogram of log2|x|.

The histograms are the sketches themselves, half an octave a bucket, over the exponent and not over the value: an axis
on which small gradients are as visible as large weights. A loss scale is taken out, to the next bin.

TensorBoard is no dependency: it is imported when an export is asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.history import SlotHistory
from probes.sketch import BIN_EDGES
from probes.step_table import package, step_table

if TYPE_CHECKING:
    from probes.window import Window

SCALARS = ("amax", "amin", "rms", "nonfinite", "zeros")
_BUCKETS_AN_OCTAVE = 2


def write_events(window: Window, folder: Path) -> None:
    """Write one event file into a folder, which is made where there is none.

    Tags are `site/role/amax` and so on for SCALARS, `site/role/log2` for histograms, and `loss` and `loss_scale`.
    `zeros` and `nonfinite` are shares of the elements; magnitudes of steps without a non-zero element are left out, and
    so are losses that are not known. Raises MissingPackage without tensorboard.
    """
    package("tensorboard", "a TensorBoard event file")
    writer = package("torch.utils.tensorboard", "a TensorBoard event file").SummaryWriter(str(folder))
    try:
        for step, loss, scale in zip(window.steps, window.losses, window.loss_scales, strict=True):
            if not math.isnan(loss):
                writer.add_scalar("loss", loss, step)
            writer.add_scalar("loss_scale", scale, step)
        _write_scalars(writer, step_table(window))
        for slot in window.slots:
            _write_histograms(writer, f"{slot.site}/{slot.role}/log2", window.history(*slot))
    finally:
        writer.close()


def _write_scalars(writer: Any, table: dict[str, list[Any]]) -> None:
    for index, step in enumerate(table["step"]):
        row = {name: values[index] for name, values in table.items()}
        tag, elements = f"{row['site']}/{row['role']}", max(row["elements"], 1)
        nonfinite = row["nans"] + row["positive_infs"] + row["negative_infs"]
        writer.add_scalar(f"{tag}/zeros", row["zeros"] / elements, step)
        writer.add_scalar(f"{tag}/nonfinite", nonfinite / elements, step)
        if row["nonzero"]:
            for name in ("amax", "amin", "rms"):
                writer.add_scalar(f"{tag}/{name}", row[name], step)


def _write_histograms(writer: Any, tag: str, history: SlotHistory) -> None:
    for index, step in enumerate(history.steps.tolist()):
        span = slice(history.offsets[index], history.offsets[index + 1])
        counts = history.counts[span].astype(np.float64)
        if not len(counts):
            continue
        low, high = BIN_EDGES[history.bins[span]], BIN_EDGES[history.bins[span].astype(np.int64) + 1]
        middle = np.log2((low + high) / 2) - math.log2(history.gain[index])
        bucket = np.floor(middle * _BUCKETS_AN_OCTAVE).astype(np.int64)
        held = np.bincount(bucket - bucket.min(), weights=counts)
        limits = (np.arange(len(held)) + bucket.min() + 1) / _BUCKETS_AN_OCTAVE
        writer.add_histogram_raw(
            tag,
            min=float(middle.min()),
            max=float(middle.max()),
            num=float(counts.sum()),
            sum=float(counts @ middle),
            sum_squares=float(counts @ middle**2),
            bucket_limits=limits.tolist(),
            bucket_counts=held.tolist(),
            global_step=step,
        )
