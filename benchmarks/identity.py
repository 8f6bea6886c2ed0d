"""Whether a window changes any bit of a training: the whole matrix of `tests/test_identity.py`, written down.

    python benchmarks/identity.py

Every architecture of `tests/architectures.py` and every situation of `tests/situations.py`, each with every kind of
window (`WINDOWS` in `tests/outcomes.py`), deterministic algorithms on, and DistributedDataParallel and FSDP2 on two
processes of gloo. A cell compares two trainings of six steps, one with a window and one without: losses, weights,
buffers, gradients, optimizer state and random streams, bit for bit. Writes `identity.json` beside this file: of each
cell "identical", the names of what differs, or the error that ended it. The exit status is 0 where every cell is
identical.

Takes some ten minutes on two cores. `--only TEXT` runs the cells whose name contains it, and only prints.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch
from rich.progress import MofNCompleteColumn, Progress

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tests' models and situations, without installing them

from tests.architectures import ARCHITECTURES
from tests.outcomes import WINDOWS, changed_by
from tests.ranks import on_ranks
from tests.situations import RANKS, SITUATIONS, architecture, ranks_changed

IDENTICAL = "identical"
NAMED = 5  # differences that are written down of a cell


def found_of(kind: str, name: str, window: str) -> str | list[str]:
    """The result of one cell."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        if kind == "processes":
            with tempfile.TemporaryDirectory() as folder:
                changed = [one for rank in on_ranks(2, ranks_changed, Path(folder), name, (window,)) for one in rank]
        else:
            training = SITUATIONS[name] if kind == "situations" else partial(architecture, name=name)
            changed = changed_by(training, WINDOWS[window])
    except Exception as error:  # of the training or of ours: the matrix goes on
        return f"{type(error).__name__}: {error}"
    return changed[:NAMED] or IDENTICAL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name contains this; nothing is written")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    names = {"architectures": ARCHITECTURES, "situations": SITUATIONS, "processes": RANKS}
    cells = [(kind, name, window) for kind in names for name in names[kind] for window in WINDOWS]
    cells = [cell for cell in cells if options.only in "/".join(cell)]
    results: dict[tuple[str, str, str], str | list[str]] = {}
    context = multiprocessing.get_context("spawn")
    with (
        Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress,
        ProcessPoolExecutor(options.processes, mp_context=context) as pool,
    ):
        task = progress.add_task("cells", total=len(cells))
        running = {pool.submit(found_of, *cell): cell for cell in cells}
        for future in as_completed(running):
            cell = running[future]
            results[cell] = future.result()
            progress.advance(task)
            if results[cell] != IDENTICAL:
                progress.console.print("/".join(cell), results[cell], markup=False)
    same = sum(result == IDENTICAL for result in results.values())
    print(f"{same} of {len(cells)} cells are identical, torch {torch.__version__}")
    if not options.only:
        written = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "windows": {
                name: {key: list(v) if isinstance(v, tuple) else v for key, v in kind.items()}
                for name, kind in WINDOWS.items()
            },
            "cells": len(cells),
            "identical": same,
            **{
                kind: {name: {window: results[kind, name, window] for window in WINDOWS} for name in names[kind]}
                for kind in names
            },
        }
        options.out.write_text(json.dumps(written, indent=1) + "\n")
    return 0 if same == len(cells) else 1


if __name__ == "__main__":
    sys.exit(main())
