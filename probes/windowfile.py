"""The window file: safetensors, arrays plus a JSON header. Nothing in it can run.

The header is the metadata entry "window"; each field of the slots' histories is one array, the slots one after
another, with "lengths" (int64 [slots, 2]: steps and occupied bins) to cut them apart again. "finer" (uint8) holds the
slots' packed sketches by tiling one after another, and "finer_lengths" (int64 [slots, 2]: how many, bytes) cuts it.
safetensors has no type for 16-bit unsigned integers that every version of its bindings writes, so bins are stored as
int32. A file of version 1 has no "gain", "finer" or "finer_lengths".
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from probes.errors import MalformedWindow, WindowError
from probes.history import BIN_ARRAYS, STEP_ARRAYS, SlotHistory, pack_finer, unpack_finer
from probes.window import FIRST_SCHEMA, Window

_IN_MEMORY: dict[str, Any] = {"offsets": np.int64, **STEP_ARRAYS, **BIN_ARRAYS}
_DTYPES: dict[str, Any] = {**_IN_MEMORY, "bins": np.int32}


def window_to_bytes(window: Window) -> bytes:
    """The window as a safetensors file."""
    histories = [window.history(*slot) for slot in window.slots]
    arrays = {
        name: np.concatenate([np.zeros(0, dtype), *(getattr(history, name) for history in histories)]).astype(dtype)
        for name, dtype in _DTYPES.items()
    }
    arrays["lengths"] = _pairs([(len(history.steps), len(history.bins)) for history in histories])
    finer = [pack_finer(history.finer) for history in histories]
    arrays["finer"] = np.frombuffer(b"".join(finer), dtype=np.uint8)
    arrays["finer_lengths"] = _pairs(
        [(len(history.finer), len(packed)) for history, packed in zip(histories, finer, strict=True)]
    )
    data: bytes = save(arrays, metadata={"window": json.dumps(window.header(), allow_nan=False)})
    return data


def write_window(window: Window, path: Path) -> None:
    """Write the file beside its place and move it there: an existing one is replaced whole or not at all."""
    data = window_to_bytes(window)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def load_window(path: str | Path) -> Window:
    """Read a window file. Raises MalformedWindow if it is none, WindowError if it cannot be read."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise WindowError(f"cannot read the window file {path}: {error.strerror}") from error
    return window_from_bytes(data)


def window_from_bytes(data: bytes) -> Window:
    """A window from the bytes of its file. Raises MalformedWindow on anything else."""
    header = _header(data)
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise MalformedWindow(f"this is no safetensors file: {error}") from error
    if isinstance(header, dict) and header.get("schema") == FIRST_SCHEMA:
        arrays = _upgraded(arrays)
    for name, dtype in {**_DTYPES, "lengths": np.int64, "finer": np.uint8, "finer_lengths": np.int64}.items():
        if name not in arrays or arrays[name].dtype != dtype:
            raise MalformedWindow(f"a window file has an array {name!r} of {np.dtype(dtype)}; this one does not")
    return Window.from_parts(header, _cut(arrays))


def _header(data: bytes) -> Any:
    """The metadata's window entry. safetensors files start with the length of a JSON header, then that header."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise MalformedWindow("this is no safetensors file: it is shorter than its header says")
    try:
        return json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["window"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedWindow("this safetensors file has no window in its metadata; window.save writes one") from error


def _pairs(pairs: list[tuple[int, int]]) -> Any:
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def _upgraded(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a file of version 1 as this version has them: nothing was multiplied, nothing finer was kept."""
    steps = arrays["steps"].size if "steps" in arrays else 0
    slots = len(arrays["lengths"]) if "lengths" in arrays else 0
    missing = {
        "gain": np.ones(steps),
        "finer": np.zeros(0, dtype=np.uint8),
        "finer_lengths": np.zeros((slots, 2), dtype=np.int64),
    }
    return {**missing, **arrays}


def _cut(arrays: dict[str, Any]) -> list[SlotHistory]:
    lengths, finer_lengths = arrays["lengths"], arrays["finer_lengths"]
    for pairs in (lengths, finer_lengths):
        if pairs.ndim != 2 or pairs.shape[1] != 2 or (pairs < 0).any() or len(pairs) != len(lengths):
            raise MalformedWindow("a window file's lengths are arrays of [slots, 2], none negative")
    packed = arrays["finer"]
    if packed.ndim != 1 or len(packed) != finer_lengths[:, 1].sum():
        raise MalformedWindow("a window file's finer sketches are not as long as their lengths say")
    finer = np.split(packed, np.cumsum(finer_lengths[:, 1])[:-1])
    if (arrays["bins"] < 0).any() or (arrays["bins"] > np.iinfo(np.uint16).max).any():
        raise MalformedWindow("a window file holds a bin out of range")
    steps, bins = lengths[:, 0], lengths[:, 1]
    sizes = dict.fromkeys(_DTYPES, steps) | {"offsets": steps + 1, "bins": bins, "counts": bins}
    for name, size in sizes.items():
        if arrays[name].ndim != 1 or len(arrays[name]) != size.sum():
            raise MalformedWindow(f"a window file's array {name!r} has {len(arrays[name])} entries, not {size.sum()}")
    pieces = {name: np.split(arrays[name], np.cumsum(size)[:-1]) for name, size in sizes.items()}
    return [
        SlotHistory(
            **{name: pieces[name][i].astype(_IN_MEMORY[name]) for name in _DTYPES},
            finer=unpack_finer(finer[i].tobytes(), int(finer_lengths[i, 0])),
        )
        for i in range(len(lengths))
    ]
