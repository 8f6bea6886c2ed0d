"""Real data for small trainings: tiny Shakespeare and Fashion-MNIST, read from a folder that the caller has.

The folder is named by `--data` or the environment variable ADVISOR_DATA. Nothing is downloaded. It holds

    tinyshakespeare/input.txt           1,115,394 characters, 65 distinct: public-domain text
    fashion_mnist/*-ubyte.gz            Fashion-MNIST as published (MIT licence): four IDX files, 28×28, 10 classes

A batch is a pure function of (step, seed), drawn from a generator of its own. The last tenth of the text and the test
images are held out.
"""

from __future__ import annotations

import functools
import gzip
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

VARIABLE = "ADVISOR_DATA"
HELD_OUT_SHARE = 0.1
HELD_OUT_STREAM = 1  # third word of a held-out batch's seed; training batches have 0 there
IDX_HEADER_BYTES = {"images": 16, "labels": 8}
SIDE = 28  # pixels
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530  # of the training images, in 0 to 1


class DataMissing(Exception):
    """The folder of real data was not named, or does not hold a file that is needed."""


class Batch(NamedTuple):
    """What a model reads and what it should say; both have the batch first."""

    inputs: Tensor
    targets: Tensor


class Text(NamedTuple):
    """Characters as numbers, uint8; `letters` says which is which."""

    training: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.uint8]
    letters: str


class Images(NamedTuple):
    """float32 [N, 1, 28, 28], mean 0 and variance 1 over the training set; int64 [N]."""

    training: Batch
    held_out: Batch


def use(folder: str | os.PathLike[str] | None) -> Path:
    """Take the data from this folder from now on (None: as ADVISOR_DATA says), in child processes too.

    Raises DataMissing where none is named or it is no folder.
    """
    if folder is not None:
        os.environ[VARIABLE] = os.fspath(folder)
    named = os.environ.get(VARIABLE)
    if not named:
        raise DataMissing(f"give --data FOLDER, or set {VARIABLE}: a folder with tinyshakespeare/ and fashion_mnist/")
    if not Path(named).is_dir():
        raise DataMissing(f"{named}, named by --data or {VARIABLE}, is no folder")
    return Path(named)


def text_batch(step: int, seed: int, size: int, length: int, held_out: bool = False) -> Batch:
    """Spans of the text and the same moved by one character: int64 [B, T] twice."""
    text = shakespeare()
    characters = text.held_out if held_out else text.training
    starts = _generator(step, seed, held_out).integers(0, len(characters) - length, size=size)
    spans = torch.from_numpy(characters[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    return Batch(spans[:, :-1].contiguous(), spans[:, 1:].contiguous())


def image_batch(step: int, seed: int, size: int, held_out: bool = False) -> Batch:
    """Images float32 [B, 1, 28, 28] and classes int64 [B]."""
    images = fashion()
    examples = images.held_out if held_out else images.training
    chosen = torch.from_numpy(_generator(step, seed, held_out).integers(0, len(examples.targets), size=size))
    return Batch(examples.inputs[chosen], examples.targets[chosen])


def halves_batch(step: int, seed: int, size: int, held_out: bool = False) -> Batch:
    """The upper half of images and the lower one, which is to be told from it: float32 [B, 392] twice."""
    flat = image_batch(step, seed, size, held_out).inputs.reshape(size, 2, SIDE * SIDE // 2)
    return Batch(flat[:, 0].contiguous(), flat[:, 1].contiguous())


def shakespeare() -> Text:
    """Tiny Shakespeare; held in memory from the first call on. Raises DataMissing."""
    return _shakespeare(use(None))


def fashion() -> Images:
    """Fashion-MNIST; held in memory from the first call on. Raises DataMissing."""
    return _fashion(use(None))


@functools.lru_cache(maxsize=1)
def _shakespeare(folder: Path) -> Text:
    characters = _bytes(folder / "tinyshakespeare" / "input.txt").decode("ascii")
    letters = "".join(sorted(set(characters)))
    table = np.zeros(128, dtype=np.uint8)
    table[np.frombuffer(letters.encode("ascii"), dtype=np.uint8)] = np.arange(len(letters))
    codes = table[np.frombuffer(characters.encode("ascii"), dtype=np.uint8)]
    kept = round(len(codes) * (1 - HELD_OUT_SHARE))
    return Text(codes[:kept], codes[kept:], letters)


@functools.lru_cache(maxsize=1)
def _fashion(folder: Path) -> Images:
    def examples(part: str) -> Batch:
        pixels = _idx(folder, part, "images").reshape(-1, 1, SIDE, SIDE).astype(np.float32) / 255
        classes = torch.from_numpy(_idx(folder, part, "labels").astype(np.int64))
        return Batch((torch.from_numpy(pixels) - PIXEL_MEAN) / PIXEL_STD, classes)

    return Images(examples("train"), examples("t10k"))


def _idx(folder: Path, part: str, kind: str) -> npt.NDArray[np.uint8]:
    dimensions = "idx3" if kind == "images" else "idx1"
    packed = _bytes(folder / "fashion_mnist" / f"{part}-{kind}-{dimensions}-ubyte.gz")
    return np.frombuffer(gzip.decompress(packed), dtype=np.uint8, offset=IDX_HEADER_BYTES[kind])


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataMissing(f"{path} is missing: the folder named by --data or {VARIABLE} should hold it") from error


def _generator(step: int, seed: int, held_out: bool) -> np.random.Generator:
    """Held-out batches are the same for every seed: all trainings are judged on the same examples."""
    words = [0, step, HELD_OUT_STREAM] if held_out else [seed, step, 0]
    return np.random.default_rng(words)
