"""A window as a plain table, one line a slot and step, and that table as pandas and Parquet hold it.

All of it is read off the sketches: no cast is scored here (`advisor.score` does that). pandas and pyarrow are no
dependencies: they are imported when they are asked for.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probes.errors import MissingPackage

if TYPE_CHECKING:
    from probes.window import Window

HEADER_KEY = b"numerics-advisor"  # where a Parquet file's metadata holds the window's header


def step_table(window: Window) -> dict[str, list[Any]]:
    """Columns of equal length, one entry a slot and recorded step, slots in the window's order.

    site, role, step       the slot and the optimizer step
    dtype                  the tensor's own, None where it is not known
    elements               of the tensor; of several tensors together where the slot met several in the step
    nonzero, zeros         finite elements that are not zero; that are
    nans, positive_infs, negative_infs
    amax, amin             largest and smallest non-zero finite magnitude; 0 where there is none
    mean_square, rms       over the finite elements; NaN where there are none
    dynamic_range_bits     log2(amax/amin), NaN where there is no non-zero element
    significant_bits       the most mantissa bits that an element uses
    distinct               estimated distinct magnitudes in a sample
    loss_scale             what the recorded values were multiplied by; it is taken out of the magnitudes here
    """
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for slot in window.slots:
        history = window.history(*slot)
        gain = history.gain
        finite = (history.nonzero + history.zeros).astype(np.float64)
        amax, amin = history.amax.astype(np.float64) / gain, history.amin.astype(np.float64) / gain
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_square = history.sum_of_squares / gain**2 / np.where(finite > 0, finite, np.nan)
            bits = np.log2(np.where(amax > 0, amax, np.nan) / amin)
        of_slot: dict[str, Any] = {
            "site": [slot.site] * len(gain),
            "role": [slot.role] * len(gain),
            "dtype": [window.dtype(slot)] * len(gain),
            "step": history.steps,
            "elements": history.elements,
            "nonzero": history.nonzero,
            "zeros": history.zeros,
            "nans": history.nans,
            "positive_infs": history.positive_infs,
            "negative_infs": history.negative_infs,
            "amax": amax,
            "amin": amin,
            "mean_square": mean_square,
            "rms": np.sqrt(mean_square),
            "dynamic_range_bits": bits,
            "significant_bits": history.significant_bits,
            "distinct": history.distinct,
            "loss_scale": gain,
        }
        for name, values in of_slot.items():
            columns[name] += values if isinstance(values, list) else values.tolist()
    return columns


COLUMNS = (
    "site",
    "role",
    "step",
    "dtype",
    "elements",
    "nonzero",
    "zeros",
    "nans",
    "positive_infs",
    "negative_infs",
    "amax",
    "amin",
    "mean_square",
    "rms",
    "dynamic_range_bits",
    "significant_bits",
    "distinct",
    "loss_scale",
)


def data_frame(columns: Any) -> Any:
    """A pandas.DataFrame of columns or rows. Raises MissingPackage without pandas."""
    return package("pandas", "to_pandas()").DataFrame(columns)


def write_parquet(window: Window, path: Path) -> None:
    """`step_table` as a Parquet file; its metadata holds the window's header under HEADER_KEY, as JSON.

    Raises MissingPackage without pyarrow, OSError where nothing can be written.
    """
    pyarrow = package("pyarrow", "a Parquet file")
    parquet = import_module("pyarrow.parquet")
    table = pyarrow.table(step_table(window))
    header = json.dumps(window.header(), allow_nan=False).encode()
    parquet.write_table(table.replace_schema_metadata({HEADER_KEY: header}), path)


def package(name: str, what: str) -> Any:
    """The imported package. Raises MissingPackage, naming what to install, where there is none."""
    try:
        return import_module(name)
    except ImportError as error:
        extra = "pip install 'numerics-advisor[tables]'"
        raise MissingPackage(f"{what} needs {name}: pip install {name}, or {extra} for all of them") from error
