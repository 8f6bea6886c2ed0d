"""`advisor show` of a window file: everything is there, at any width, and two files are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import advisor
from advisor.cli import window_report
from probes.window import Window
from tests.test_alerts import window_with
from tests.test_cli import Run, run  # noqa: F401


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("windows")
    window_with().save(folder / "a.safetensors")
    window_with(lambda step, x: x * (float("nan") if step == 3 else 1.0)).save(folder / "b.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def printed(window: Window, width: int) -> list[str]:
    with open("/dev/null", "w") as nowhere:
        console = Console(width=width, record=True, file=nowhere, markup=False, highlight=False)
        window_report.WindowReport(window).print_on(console, "w")
        return console.export_text().splitlines()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_it_fits_and_names_every_tensor(files: tuple[Path, Path], width: int) -> None:
    lines = printed(advisor.load_window(files[1]), width)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "NaN first seen in down input at step 3" in text
    assert "confidence of the scores" in text
    for site in ("up", "middle", "down"):
        at = next(index for index, line in enumerate(lines) if line.split()[:1] == [site])
        assert [line.split()[0] for line in lines[at + 1 : at + 4]] == ["input", "weight", "grad_output"]


def test_a_file_is_shown_and_as_json_holds_all(files: tuple[Path, Path], run: Run) -> None:  # noqa: F811
    status, out, _ = run("show", str(files[0]))
    assert status == 0
    assert "Net, 6 steps, 27 tensors" in out
    assert "Alerts\n  none" in out
    assert "What would fail, and why\n" in out
    assert "loss noise from step to step: " in out
    assert "up.weight  s/n\N{NO-BREAK SPACE}" in out
    status, out, _ = run("show", str(files[1]), "--json")
    told = json.loads(out)
    assert told["alerts"][0]["site"] == "down"
    assert all(finding["sentence"] and finding["remedy"]["says"] for finding in told["findings"])
    assert len(told["scores"]) == 27 * 5  # 9 slots of products; master, gradient and update of 6 parameters
    assert len(told["statistics"]["amax"]) == 9 * 6 + 18 * 4
    assert told["drift"]["slots"]
    assert told["schema"] == "numerics-advisor/window/2"


def test_against_another_file(files: tuple[Path, Path], run: Run) -> None:  # noqa: F811
    status, out, _ = run("show", str(files[0]), "--against", str(files[1]))
    assert status == 0
    assert "the first difference is in down input at step 3" in out
    status, out, _ = run("show", str(files[0]), "--against", str(files[0]), "--json")
    told = json.loads(out)
    assert (told["first"], told["steps"], len(told["slots"])) == (None, [0, 1, 2, 3, 4, 5], 27)


def test_exports_are_written(files: tuple[Path, Path], run: Run, tmp_path: Path) -> None:  # noqa: F811
    parquet, events = tmp_path / "w.parquet", tmp_path / "events"
    status, out, _ = run("show", str(files[0]), "--parquet", str(parquet), "--tensorboard", str(events))
    assert status == 0
    assert parquet.stat().st_size > 0
    assert [path.name.startswith("events.out") for path in events.iterdir()] == [True]
    assert f"written: {parquet}" in out


def test_only_window_files_are_compared(run: Run) -> None:  # noqa: F811
    status, _, err = run("show", "plan.json", "--against", "b.safetensors")
    assert status == 2
    assert "window files" in err


@pytest.mark.parametrize("width", [100, 200])
def test_backward_errors_have_a_table(width: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with advisor.probe(model, optimizer, steps=2, curvature_steps=1) as window:
        for _ in range(2):
            F.cross_entropy(model(torch.randn(32, 16)), torch.randint(0, 8, (32,))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert window.backward_errors
    lines = printed(window, width)
    assert max(map(len, lines)) <= width
    at = lines.index("Backward error of the products")
    assert any(line.split()[:2] == ["(root)", "forward"] for line in lines[at:])
    error = next(
        e for e in window.backward_errors if (e.product, e.cast) == ("forward", str(advisor.Cast.parse("int8")))
    )
    assert any(f"{error.errors.quantile(0.5):.2g} {error.errors.quantile(0.99):.2g}" in line for line in lines[at:])
