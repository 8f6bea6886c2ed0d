"""Imports point one way (probes ← advisor ← api → db), and a user's own `api` or `db` package is never touched."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "probes": {"probes"},
    "db": {"db"},
    "advisor": {"advisor", "probes"},
    "api": {"api", "advisor", "db", "probes"},
}
LAZY = {"advisor/cli/serve.py", "advisor/cli/worker.py", "advisor/cli/demo.py"}
FOREIGN = {
    "probes": {"fastapi", "starlette", "sqlalchemy", "alembic"},
    "db": {"torch", "fastapi", "starlette", "numpy"},
}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Top-level packages that a file imports, and whether it does so inside a function."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            yield name.split(".")[0], id(node) in inside


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_down(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        where = path.relative_to(ROOT).as_posix()
        for name, inside in imports(path):
            allowed = name in MAY_IMPORT[package] or (name == "api" and inside and where in LAZY)
            assert name not in MAY_IMPORT or allowed, f"{where} imports {name}"
            assert name not in FOREIGN.get(package, ()), f"{where} imports {name}"


def test_a_training_process_may_have_its_own_api_and_db(tmp_path: Path) -> None:
    for name in ("api", "db"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the user owns this name')\n")
    script = """
import torch, advisor
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with advisor.probe(model, optimizer, steps=2) as window:
    while not window.done:
        torch.nn.functional.mse_loss(model(torch.randn(8, 4)), torch.zeros(8, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
plan = advisor.recommend(window)
with advisor.apply(plan, model, optimizer):
    model(torch.randn(8, 4)).sum().backward()
advisor.connect("http://127.0.0.1:9")
print("trained")
"""
    (tmp_path / "train.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        check=False,
    )
    assert done.stdout.strip() == "trained", done.stderr


def test_the_package_answers_without_torch() -> None:
    script = "import sys, advisor, advisor.cli, probes.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=60).returncode == 0
