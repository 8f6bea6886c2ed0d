"""What the README and the docs say is run or checked against the code."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import advisor
from advisor.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")} | {"README.md": README}


def indented_commands(program: str) -> list[list[str]]:
    """The lines of indented blocks that call a program, without their comments."""
    lines = [line.split("#")[0].split() for line in README.splitlines() if line.startswith(f"    {program} ")]
    assert lines
    return lines


def test_the_python_examples_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    exec("\n".join(blocks), {})
    assert {path.name for path in tmp_path.iterdir()} == {"plan.json", "window.safetensors"}
    assert "emulated" in capsys.readouterr().out


@pytest.mark.parametrize("command", indented_commands("advisor"), ids=" ".join)
def test_the_commands_exist_with_their_options(command: list[str]) -> None:
    known = typer.main.get_command(app).commands[command[1]]
    options = {name for parameter in known.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in command if word.startswith("-")} <= options
    assert {"--help", "--json"} <= options | {"--help"} or command[1] == "serve"
    assert CliRunner().invoke(app, [command[1], "--help"]).exit_code == 0


@pytest.mark.parametrize("name", re.findall(r"`advisor\.(\w+)", "\n".join(DOCS.values())))
def test_the_public_names_exist(name: str) -> None:
    assert hasattr(advisor, name)


@pytest.mark.parametrize("name", DOCS)
def test_the_files_that_are_named_exist(name: str) -> None:
    folder = ROOT if name == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\(([^)#]+)\)", DOCS[name]):
        assert (folder / link).exists(), link
    for path in re.findall(r"`((?:advisor|probes|api|db|tests|docs)/[\w/.-]*)`", DOCS[name]):
        assert (ROOT / path).exists(), path


def test_ci_runs_the_very_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    found = re.search(r"\$\((sed -n .*? README\.md \| head -n 1)\)", script)
    assert found
    told = subprocess.run(["bash", "-c", found.group(1)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert told.strip() == commands[1]
    assert commands[1].endswith("&& .venv/bin/pytest -n 2 --dist worksteal")
    assert commands[0].endswith("&& .venv/bin/advisor demo")
