"""The generated pages are what their scripts write, and what they say of casts is so."""

from __future__ import annotations

import importlib
import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from probes.casts import Cast
from probes.errors import ProbeError
from probes.formats import FORMATS
from probes.scaling import RULES

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
BENCHMARKS = ROOT / "benchmarks"


def casts_in(page: str) -> list[str]:
    """What is written as code and has a granularity in the second place, or a format in the first."""
    words = re.findall(r"`([^`\s]+)`", page) + re.findall(r'"([^"\s]+)"', page) + re.findall(r"# ([^\s]+)$", page, re.M)
    parts = ((word, word.removesuffix(":inf").split("/")) for word in words)
    return [word for word, (first, *rest) in parts if first in FORMATS or (rest and rest[0] in RULES)]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A benchmark as a module; the others beside it can be imported as when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("name", PAGES)
def test_every_cast_on_the_pages_parses(name: str) -> None:
    for text in casts_in(PAGES[name]):
        try:
            cast = Cast.parse(text)
        except ProbeError as error:
            pytest.fail(f"{name} has {text!r}: {error}")
        assert Cast.parse(str(cast)) == cast


def test_what_counts_as_a_cast() -> None:
    page = 'say `e4m3fn`, `e9m9/tensor`, `e5m2/nothing:inf`, "bf16/none"\nbut not `docs/generate.py` or `tensor`'
    assert casts_in(page) == ["e4m3fn", "e9m9/tensor", "e5m2/nothing:inf", "bf16/none"]
    assert len(casts_in(PAGES["formats.md"])) > 30
    assert len(casts_in(PAGES["peers.md"])) > 10


def test_formats_page_is_what_its_script_writes() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["formats_page"]()
    assert PAGES["formats.md"] == page, "run: python docs/generate.py"


def test_the_example_of_the_formats_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGES["formats.md"], re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert capsys.readouterr().out.split() == re.findall(r"print\(\w+\)  # (.*)", block)
    assert len(names["state"].history) == 4
    assert names["read_back"].shape == names["x"].shape


def test_the_numbers_in_the_prose() -> None:
    ones = torch.ones(1, 32)
    ones[0, 0] = 500.0
    assert Cast.parse("e4m3fn/block32/e8m0")(ones)[0, 0] == 448
    assert Cast.parse("e4m3fn/block32/e8m0up")(ones)[0, 0] == 512
    assert Cast.parse("bf16")(torch.tensor(65504.0)) == 65536
    assert Cast.parse("bf16")(torch.tensor(65504.0, dtype=torch.float16)) == 65504
    x = torch.linspace(-3, 3, 997)
    assert torch.equal(Cast.parse("e8m7/none")(x), Cast.parse("bf16")(x))
    assert Cast.parse("e8m7/none") != Cast.parse("bf16")


def test_our_rows_on_the_peers_page_are_what_our_casts_give(script: Callable[[str], ModuleType]) -> None:
    peers, page = script("peers"), PAGES["peers.md"]
    measured = peers.Measured.of([])
    for table in peers.TABLES:
        assert measured.section(table) in page, "run: python benchmarks/peers.py --write docs/peers.md"


def test_the_peers_page_is_complete(script: Callable[[str], ModuleType]) -> None:
    peers, page = script("peers"), PAGES["peers.md"]
    assert page.startswith(peers.HEAD + "\n" + peers.WHY)
    assert "Not installed" not in page
    for library in script("peer_casts").LIBRARIES:
        assert f"\n| {library} `" in page


def test_a_page_with_missing_libraries_is_not_written(
    script: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers, page = script("peers"), tmp_path / "peers.md"

    def absent() -> Iterator[Any]:
        raise ImportError("no such library")
        yield

    only = {"torch": peers.LIBRARIES["torch"], "qtorch": ("qtorch", absent)}
    monkeypatch.setattr(script("peer_casts"), "LIBRARIES", only)
    monkeypatch.setattr(peers, "LIBRARIES", only)
    with pytest.raises(SystemExit, match="--partial"):
        peers.main(["--write", str(page)])
    assert not page.exists()
    peers.main(["--write", str(page), "--partial"])
    assert "Not installed, hence without rows: qtorch" in page.read_text()
    assert "| torch `x.to(torch.float8_e5m2).float()` | 57344 | Inf |" in page.read_text()


def test_every_benchmark_is_described() -> None:
    told = (BENCHMARKS / "README.md").read_text()
    for path in sorted(BENCHMARKS.glob("*.py")):
        assert f"`{path.name}`" in told, path.name
    commands = re.findall(r"^    python (-m )?(\S+)", told, re.M)
    for module, command in commands:
        path = ROOT / (command.replace(".", "/") if module else command)
        assert path.exists() or path.with_suffix(".py").exists() or (path / "__main__.py").exists(), command


def test_cast_speed_measures_and_writes(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    result = tmp_path / "speed.json"
    asked = ["--sizes", "64", "--casts", "e4m3fn", "bf16", "--rounds", "2", "--no-peers", "--json", str(result)]
    script("cast_speed").main(asked)
    assert '"e4m3fn/tensor/current/nearest"' in result.read_text()


def test_cast_speed_times_the_work_of_others(script: Callable[[str], ModuleType]) -> None:
    speed, peer_casts = script("cast_speed"), script("peer_casts")
    work = "e4m3fn/block32/e8m0/nearest"
    peers = [peer for peer in peer_casts._microxcaling() if peer.work == work]
    (row,) = speed.against_peers(peers, work, 4096, 2, torch.device("cpu"), "shuffled")
    assert row["same"] == 1
    assert row["factor"] > 0


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1"])
def test_the_re_expressed_algorithm_does_our_work(script: Callable[[str], ModuleType], name: str) -> None:
    """On finite values within the format, of which it takes ties to even as we do; so what is timed is the same."""
    peer_casts = script("peer_casts")
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    even = peer_casts.elementwise(x, name, "even", saturate=True)
    assert torch.equal(even, Cast.parse(f"{name}/none")(x))
    assert torch.equal(peer_casts.in_blocks(x, name, 32, "even"), Cast.parse(f"{name}/block32/e8m0")(x))
