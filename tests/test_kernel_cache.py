"""What numba has cached of a kernel is used as long as no source of it has changed."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from numba.core.dispatcher import Dispatcher

from advisor import column_kernels, deviations, exchanges, lost_kernels, moments, pruning
from probes import cast_kernels, compacting, kernel_folder, kernels, lost_updates, relative_kernels
from probes.kernel_cache import keep_to_sources

PACKAGES = Path(column_kernels.__file__).parent, Path(kernels.__file__).parent
MODULES = [column_kernels, deviations, exchanges, lost_kernels, moments, pruning, cast_kernels, compacting, kernels]
MODULES += [lost_updates, relative_kernels]
"""Those that call compiled functions from Python."""
CALLED_BY_KERNELS = {"layout_kernels", "outcome_kernels", "region_kernels"}
CALLED_BY_KERNELS |= {"chunk_counting", "chunk_loops", "chunk_pairs", "chunk_planes"}

HELPER = """
from numba import njit
STEP = {step}
@njit(cache=True, forceinline=True)
def moved(x):
    return x + {step}
"""
KERNEL = """
import sys
from numba import njit
import helper
from helper import STEP, moved
from probes.kernel_cache import keep_to_sources
@njit(cache=True)
def kernel(x):
    return moved(x) * 100 + STEP
{keep}
print(kernel(0), sum(kernel.stats.cache_hits.values()))
"""


def run(folder: Path, step: int, keeps: bool) -> list[int]:
    """Write the helper, run the kernel in a process of its own: its result, and how often numba's cache was hit."""
    (folder / "helper.py").write_text(HELPER.format(step=step))
    if not (folder / "main.py").exists():
        (folder / "main.py").write_text(KERNEL.format(keep="keep_to_sources(kernel, helper)" if keeps else ""))
        (folder / "run.py").write_text("import main")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_CACHE")}
    environment |= {"PYTHONPATH": str(PACKAGES[1].parent), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [sys.executable, "run.py"], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return [int(number) for number in found.stdout.split()]


def test_a_change_elsewhere_is_compiled_anew(tmp_path: Path) -> None:
    assert run(tmp_path, 1, keeps=True) == [101, 0]
    assert run(tmp_path, 1, keeps=True) == [101, 1]
    assert run(tmp_path, 2, keeps=True) == [202, 0]
    assert run(tmp_path, 2, keeps=True) == [202, 1]


def test_which_numba_alone_does_not_see(tmp_path: Path) -> None:
    """If this fails numba has learnt it, and `kernel_cache.py` can go."""
    assert run(tmp_path, 1, keeps=False) == [101, 0]
    assert run(tmp_path, 2, keeps=False) == [101, 1]


def test_where_nothing_can_be_written_nothing_is_done(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "within", tmp_path / "made"):
        kernel = SimpleNamespace(stats=SimpleNamespace(cache_path=str(folder)), py_func=run)
        keep_to_sources(kernel)
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["file", "made", "test_kernel_cache.sources"]


NOWHERE = """
import os, tempfile, warnings
made = tempfile.TemporaryFile
def refusing(*given, dir=None, **named):
    if "numerics-advisor-kernels-" not in str(dir):
        raise PermissionError(dir)
    return made(*given, dir=dir, **named)
tempfile.TemporaryFile = refusing  # numba tries its folders with it, too
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from probes import compacting
assert any("NUMBA_CACHE_DIR" in str(warning.message) for warning in told)
print(compacting._compact.stats.cache_path)
print(os.environ["NUMBA_CACHE_DIR"])
"""


def test_a_read_only_installation_without_a_home_gets_a_folder_for_its_time() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_CACHE")}
    environment |= {"PYTHONPATH": str(PACKAGES[1].parent)}
    made = subprocess.run([sys.executable, "-c", NOWHERE], env=environment, check=True, capture_output=True, text=True)
    used, given = map(Path, made.stdout.split())
    assert given in used.parents
    assert not given.exists()


def test_who_names_a_folder_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel_folder, "_may_write", lambda _: False)
    kernel_folder.provide()
    assert os.environ["NUMBA_CACHE_DIR"] == str(tmp_path)


def test_every_module_with_kernels_is_known_here() -> None:
    compiled = {
        file.stem
        for package in PACKAGES
        for file in package.glob("*.py")
        if any(word in file.read_text() for word in ("njit(", "@inlined"))
    }
    assert compiled == {module.__name__.split(".")[1] for module in MODULES} | CALLED_BY_KERNELS


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_kernels_sources_are_all_watched(module: ModuleType) -> None:
    """Each module that one with kernels has functions or numbers from, also by way of others of ours."""
    watched = watched_by(module)
    assert sources_of(module) <= watched
    for name in watched:
        assert sources_of(importlib.import_module(name)) <= watched | {module.__name__}, name


def watched_by(module: ModuleType) -> set[str]:
    """The modules named in its call of `keep_to_sources`."""
    tree = ast.parse(Path(str(module.__file__)).read_text())
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    kept = [call for call in calls if getattr(call.func, "id", "") == "keep_to_sources"]
    return {getattr(module, argument.id).__name__ for call in kept for argument in call.args[1:]}  # type: ignore[attr-defined]


def sources_of(module: ModuleType) -> set[str]:
    """The modules of ours that compiled functions, and a module's constants, have names from; of one that writes the
    compiler's own code, all."""
    imports: dict[str, str] = {}
    tree = ast.parse(Path(str(module.__file__)).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("advisor", "probes"):
            for name in (alias.asname or alias.name for alias in node.names):
                value = getattr(module, name, None)
                imports[name] = value.__name__ if isinstance(value, ModuleType) else str(node.module)
    kernels = [value for value in vars(module).values() if isinstance(value, Dispatcher)]
    if not kernels and hasattr(module, "ir"):
        return set(imports.values())
    used = {name for kernel in kernels for name in kernel.py_func.__code__.co_names}
    values = [node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    used |= {part.id for value in values for part in ast.walk(value) if isinstance(part, ast.Name)}
    return {imports[name] for name in used if name in imports}
