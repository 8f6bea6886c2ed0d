"""Fixtures that several files of tests share. Their imports wait: most tests need no service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from service import Service

    from db.session import Database


def pytest_configure() -> None:
    """Settings that libraries read once, when they are imported.

    Without a device Triton's kernels run on its interpreter. Workers of pytest-xdist share the cores, so each has one
    thread, and so do the processes that it starts; a test about several threads asks torch for them.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_sessionstart() -> None:
    """The first two workers compile the largest kernels, half each; later tests read both from numba's cache.

    Otherwise each worker compiles all, at the same time as the other.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker == "gw0":
        _compile_the_score_kernel()
    elif worker == "gw1":
        _compile_the_sketch_kernels()


def _compile_the_score_kernel() -> None:
    import advisor
    from probes.records import Coverage
    from probes.window import Contents, Window

    advisor.score(Window(Contents("None", "SGD", {}, (), (), (), Coverage(1.0), {}, {})))


def _compile_the_sketch_kernels() -> None:
    import torch

    from probes import relative_kernels
    from probes.relative import size_of
    from probes.sketch import SketchArray
    from probes.tiles import Axis, Tiling

    values = torch.ones(2, 4)
    SketchArray(1).add(0, values)
    tiling = Tiling("row", "current", Axis(-1, False))
    relative_kernels.add(torch.zeros(size_of(tiling.classes), dtype=torch.float64), values, tiling)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server without a worker; windows are pushed."""
    from service import quick_settings, serving

    with serving(quick_settings(tmp_path_factory.mktemp("service"), json_limit_bytes=20_000)) as running:
        yield running


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An empty database at the newest migration."""
    from db import migrate
    from db.session import Database

    opened = Database(f"sqlite:///{tmp_path / 'folder' / 'advisor.sqlite'}")
    migrate.upgrade(opened)
    yield opened
    opened.close()
