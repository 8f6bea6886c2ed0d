"""Built-in data, made from what every machine has: nothing is downloaded.

A batch is a pure function of (seed, step), drawn from a generator of its own: a training that resumes sees
exactly the batches that it would have seen, and a user's random stream is never touched.

DATASETS
├── "python-text"   characters of the sources of Python's own standard library
└── "digits"        scikit-learn's 8×8 images of handwritten digits (1,797 of them)
"""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from advisor.errors import InvalidModel

TEXT_LIMIT_BYTES = 4_000_000  # ours: more than any short training reads; about 200 files
TEXT_SKIPPED = frozenset(
    # Test data, tables and other people's packages: not the text of programs.
    ("test", "tests", "idlelib", "encodings", "pydoc_data", "lib2to3", "site-packages", "dist-packages")
)
HELD_OUT_EVERY = 10  # each tenth file (text) or image (digits) is kept for evaluation
HELD_OUT_STREAM = 1  # third word of a held-out batch's seed; training batches have 0 there

Batch = tuple[Tensor, Tensor]


class PythonTextConfig(BaseModel):
    """Which characters, and how long a sequence. `length` null: the model's whole context."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    set: Literal["python-text"] = "python-text"
    length: Annotated[int, Field(ge=2, le=1024, description="characters a sequence")] | None = None
    vocabulary: Annotated[
        int, Field(ge=8, le=256, description="tokens: the commonest characters and one for all others")
    ] = 96


class DigitsConfig(BaseModel):
    """There is nothing to choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    set: Literal["digits"] = "digits"


DataConfig = PythonTextConfig | DigitsConfig
DATASETS: Mapping[str, type[PythonTextConfig] | type[DigitsConfig]] = MappingProxyType(
    {"python-text": PythonTextConfig, "digits": DigitsConfig}
)
DIGITS_CHANNELS, DIGITS_SIZE, DIGITS_CLASSES = 1, 8, 10


@dataclass(frozen=True)
class TextData:
    """Sequences of a token array, and the same moved by one character as targets: int64 [B, T] twice."""

    training: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.uint8]
    length: int

    def batch(self, step: int, seed: int, size: int) -> Batch:
        return self._draw(self.training, [seed, step, 0], size)

    def held_out_batch(self, index: int, size: int) -> Batch:
        """The same for every seed: all trainings are judged on the same text."""
        return self._draw(self.held_out, [0, index, HELD_OUT_STREAM], size)

    def _draw(self, text: npt.NDArray[np.uint8], seed: list[int], size: int) -> Batch:
        starts = np.random.default_rng(seed).integers(0, len(text) - self.length, size=size)
        spans = torch.from_numpy(text[starts[:, None] + np.arange(self.length + 1)].astype(np.int64))
        return spans[:, :-1].contiguous(), spans[:, 1:].contiguous()


@dataclass(frozen=True)
class ImageData:
    """Images float32 [B, C, H, W], mean 0 and variance 1 over the set, and classes int64 [B]."""

    training: Batch
    held_out: Batch

    def batch(self, step: int, seed: int, size: int) -> Batch:
        return self._draw(self.training, [seed, step, 0], size)

    def held_out_batch(self, index: int, size: int) -> Batch:
        """The same for every seed: all trainings are judged on the same images."""
        return self._draw(self.held_out, [0, index, HELD_OUT_STREAM], size)

    def _draw(self, examples: Batch, seed: list[int], size: int) -> Batch:
        images, classes = examples
        chosen = torch.from_numpy(np.random.default_rng(seed).integers(0, len(classes), size=size))
        return images[chosen], classes[chosen]


def load(config: DataConfig, length: int | None = None) -> TextData | ImageData:
    """The data set of this config; held in memory from the first call on.

    length: characters a sequence, where the config leaves it to the model.
    Raises InvalidModel where this machine lacks what the set is made of.
    """
    require(config)
    if isinstance(config, DigitsConfig):
        return _digits()
    training, held_out = _python_text(config.vocabulary)
    return TextData(training, held_out, config.length or length or 64)


def require(config: DataConfig) -> None:
    """Raises InvalidModel, saying what to install, where this machine lacks what the set is made of.

    Quick.
    """
    if config.set == "digits" and importlib.util.find_spec("sklearn") is None:
        raise InvalidModel(
            "the data set 'digits' comes with scikit-learn, which is not installed here: "
            "pip install 'numerics-advisor[demo]', or use the data set 'python-text'"
        )
    if config.set == "python-text" and not _standard_library().joinpath("argparse.py").is_file():
        raise InvalidModel(
            f"the data set 'python-text' is made of the standard library, and {_standard_library()} "
            "holds no sources of it: use a Python with its .py files, or the data set 'digits'"
        )


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


@functools.lru_cache(maxsize=4)
def _python_text(vocabulary: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Training and held-out tokens, uint8. Token 0 is any character outside the vocabulary."""
    training, held_out = _python_files()
    codes, counts = np.unique(training, return_counts=True)
    # Commonest first, equal counts by code, so that the tokens do not depend on how a sort breaks ties.
    commonest = codes[np.lexsort((codes, -counts))][: vocabulary - 1]
    table = np.zeros(256, dtype=np.uint8)
    table[commonest] = np.arange(1, len(commonest) + 1)
    return table[training], table[held_out]


@functools.lru_cache(maxsize=1)
def _python_files() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Training and held-out characters as latin-1 codes, uint8 ('?' stands for what latin-1 lacks)."""
    root = _standard_library()
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    taken_bytes = 0
    kept = (path for path in paths if not TEXT_SKIPPED.intersection(path.split("/")[:-1]))
    for index, path in enumerate(kept):
        if taken_bytes >= TEXT_LIMIT_BYTES:
            break
        text = root.joinpath(path).read_text(encoding="utf-8", errors="replace").encode("latin-1", "replace")
        parts[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(text)
        taken_bytes += len(text)
    training, held_out = (np.frombuffer(b"".join(part), dtype=np.uint8) for part in parts)
    if min(len(training), len(held_out)) <= 4 * 1024:
        raise InvalidModel(f"{root} holds too little Python source for the data set 'python-text'")
    return training, held_out


@functools.lru_cache(maxsize=1)
def _digits() -> ImageData:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32))[:, None]
    images = (images - images.mean()) / images.std()
    classes = torch.from_numpy(bunch.target.astype(np.int64))
    held_out = torch.arange(len(classes)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    return ImageData((images[~held_out], classes[~held_out]), (images[held_out], classes[held_out]))
