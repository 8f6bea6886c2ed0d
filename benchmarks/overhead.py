"""What watching costs: `python benchmarks/overhead.py --json overhead.json`.

What is measured. A model is trained with AdamW once for each way to watch (`watchers.py`), each in a process of its
own, and all with the same batches. They take turns: a round is one step of each, in an order that is shuffled anew, so
that whatever slows the machine slows all of them. A step's time is that of forward, backward, optimizer step and
zero_grad, with all that the watcher does in them and after; opening a window counts to its first step, closing it is
told apart. Every way's losses are compared with the unwatched ones. Threads of one process would not do: each would
have OpenMP threads of its own, together more than there are cores, and such sleep where a training's own wait awake.

`ratio` is the median of a watcher's step times over that of the unwatched steps, the quartiles are those of the ratio
within a round, and `window` is the sum of its step times over that of the unwatched steps, which is what a share of the
time means. Two copies are trained unwatched, and a round's unwatched time is the mean of theirs; A/A is the second over
the first. Where a copy's memory happens to lie makes some percent, so `--repeats` builds all copies anew so many times.
Told is the mean over these, and the lowest and highest ratio. The second table says what each peer's record can tell
about underflow (`underflow.py`).

Two threads that share a core tell nothing: state the threads, and let the machine be quiet. `--clock cpu` counts the
process's CPU time in place of the wall's, which other processes disturb less; with one thread it is nearly the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import platform
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from underflow import print_bounds, underflow_bounds
from watched import MODELS, built, loss_of
from watchers import AGAIN, OURS, PEERS, PLAIN, Watcher

ROUNDS = {False: 40, True: 6}  # whole windows, and for --quick a look
WARMUP = 2
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Failed(Exception):
    """A copy's process has raised this, or has died."""


class _Copy:
    """One copy of the model and its training, in the process that it has for itself."""

    def __init__(self, name: str, watcher: Watcher, threads: int, clock: str) -> None:
        torch.set_num_threads(threads)
        self._watcher, self._clock = watcher, CLOCKS[clock]
        self._model, self._next_batch = built(name)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-4)
        self._open = contextlib.ExitStack()
        self._at = 0
        self._closing: list[float] = []

    def step(self, counts: bool) -> tuple[float, float]:
        """Train one step, and give its seconds and its loss; `counts` is False while warming up, unwatched."""
        batch = self._next_batch()
        self._collect()
        start = self._clock()
        if counts and self._at == 0:
            self._watched, self._after = self._open.enter_context(self._watcher.watch(self._model, self._optimizer))
        elif not counts:
            self._watched, self._after = self._model, lambda: None
        loss = loss_of(self._watched(**batch))
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._after()
        spent = self._clock() - start
        if counts:
            self._at += 1
            if self._at == self._watcher.steps:
                self.close()
        return spent, loss.item()

    def _collect(self) -> None:
        """Leave no garbage to collect within a step.

        What was there when a window began is looked through then and not again: that takes longer than many a step, and
        leaves nothing of the training's code in the processor's caches, as no training does before each step.
        """
        if self._at == 0:
            gc.unfreeze()
            gc.collect()
            gc.freeze()
        else:
            gc.collect()

    def close(self) -> list[float]:
        """End the window; gives the seconds that this took, for each window of all."""
        start = self._clock()
        self._open.close()
        if self._at:
            self._closing.append(self._clock() - start)
        self._at = 0
        return self._closing


def _serve(connection: Connection, *arguments: Any) -> None:
    """Do what is asked of a copy until it has been closed or has failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's, which takes its children along
    warnings.simplefilter("ignore")  # peers' deprecations
    try:
        with contextlib.closing(_Copy(*arguments)) as trained:
            connection.send(None)
            asked = None
            while asked != "close":
                asked, *given = connection.recv()
                connection.send(getattr(trained, asked)(*given))
    except Exception as error:
        connection.send(Failed(f"{type(error).__name__}: {error}"))


class Trained:
    """A copy of the model, watched in one way, and what its steps took. Its process does something only when asked."""

    def __init__(self, watcher: Watcher, name: str, clock: str) -> None:
        self.watcher = watcher
        self.seconds: list[float] = []
        self.losses: list[float] = []
        forked = multiprocessing.get_context("fork")  # this process computes nothing, so torch has no threads in it
        self._connection, theirs = forked.Pipe()
        arguments = (theirs, name, watcher, torch.get_num_threads(), clock)
        forked.Process(target=_serve, args=arguments, daemon=True).start()
        theirs.close()
        self._answer()

    def step(self, counts: bool) -> None:
        """Train one step. Raises Failed."""
        seconds, loss = self._ask("step", counts)
        self.losses.append(loss)
        if counts:
            self.seconds.append(seconds)

    def close(self) -> list[float]:
        """End the window and the process; gives the seconds that closing took, for each window. Raises Failed."""
        closing: list[float] = self._ask("close")
        return closing

    @property
    def counted(self) -> slice:
        """Which of the steps count."""
        return slice(None) if self.watcher.at is None else slice(self.watcher.at, None, self.watcher.steps)

    def _ask(self, *what: Any) -> Any:
        self._connection.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise Failed("its process died") from None
        if isinstance(answer, Failed):
            raise answer
        return answer


def measured(name: str, watchers: Sequence[Watcher], rounds: int, clock: str) -> list[dict[str, Any]]:
    """A row for each watcher on one model."""
    plain, *others = copies = [Trained(watcher, name, clock) for watcher in (PLAIN, *watchers)]
    shuffler, failed, closing = random.Random(0), {}, {}

    def tried(one: Trained, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except Failed as error:  # a peer's: it is told, and the others go on
            if one.watcher not in PEERS:
                raise
            failed[one.watcher.name] = str(error)

    for round_ in range(-WARMUP, rounds):
        print(f"\r{name}: round {round_ + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
        for one in shuffler.sample(copies, len(copies)):
            if one.watcher.name not in failed:
                tried(one, partial(one.step, round_ >= 0))
    for one in copies:
        if one.watcher.name not in failed:
            closing[one.watcher.name] = tried(one, one.close)
    unwatched = np.array(plain.seconds)
    again = next((np.array(one.seconds) for one in others if one.watcher is AGAIN), unwatched)
    rows: list[dict[str, Any]] = []
    for one in others:
        row = {"model": name, "watcher": one.watcher.name}
        if one.watcher.name in failed:
            rows.append({**row, "failed": failed[one.watcher.name]})
            continue
        base = (unwatched if one.watcher is AGAIN else (unwatched + again) / 2)[one.counted]
        seconds = np.array(one.seconds)[one.counted]
        rows.append(
            {
                **row,
                "ratio": float(np.median(seconds) / np.median(base)),
                "quartiles": np.quantile(seconds / base, (0.25, 0.75)).tolist(),
                "window": float(seconds.sum() / base.sum()),
                "closing_steps": float(np.median(closing[one.watcher.name]) / np.median(base)),
                "step_ms": float(np.median(seconds)) * 1e3,
                "steps": len(seconds),
                "same_losses": one.losses == plain.losses,
                "gives": one.watcher.gives,
            }
        )
    return rows


def joined(repeats: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of several runs as one of each watcher: means, and the ratios they are of; who failed once has failed."""
    rows = []
    for first in repeats[0]:
        same = [row for found in repeats for row in found if row["watcher"] == first["watcher"]]
        failed = [row for row in same if "failed" in row]
        row = dict(*failed[:1] or [first])
        if not failed:
            for figure in ("ratio", "window", "closing_steps", "step_ms"):
                row[figure] = float(np.mean([each[figure] for each in same]))
            row["quartiles"] = np.mean([each["quartiles"] for each in same], axis=0).tolist()
            row["ratios"] = [each["ratio"] for each in same]
            row["same_losses"] = all(each["same_losses"] for each in same)
        rows.append(row)
    return rows


def print_ratios(rows: Sequence[Mapping[str, Any]], models: Sequence[str]) -> None:
    """A table in Markdown for each model, and what differed."""
    for model in models:
        found = [row for row in rows if row["model"] == model and "failed" not in row]
        print(f"\n{model}: {MODELS[model].__doc__}\n")
        print(
            "| watched by | ratio | lowest, highest | quartiles | window | closing, in steps | what it gives |\n"
            "|---|---|---|---|---|---|---|"
        )
        for row in found:
            low, high = row["quartiles"]
            cells = (
                f"{row['ratio']:.3f}",
                f"{min(row['ratios']):.3f}, {max(row['ratios']):.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{row['window']:.3f}",
                f"{row['closing_steps']:.2f}",
                row["gives"],
            )
            print(f"| {row['watcher']} | {' | '.join(cells)} |")
    for row in (row for row in rows if row["model"] in models):
        if "failed" in row:
            print(f"\n{row['watcher']} failed on {row['model']}: {row['failed']}")
        elif not row["same_losses"]:
            print(f"\n{row['watcher']} changed the losses of {row['model']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Time, and print."""
    known = (*OURS, *PEERS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME")
    parser.add_argument("--variants", nargs="+", metavar="TEXT", help="only those whose names contain one of these")
    parser.add_argument("--rounds", type=int, help=f"steps of each; default {ROUNDS[False]}, windows of 20")
    parser.add_argument("--repeats", type=int, default=1, help="times that all is built and measured")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="see above")
    parser.add_argument("--quick", action="store_true", help=f"a look: {ROUNDS[True]} rounds")
    parser.add_argument("--no-peers", action="store_true", help="ours alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there as well")
    asked = parser.parse_args(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    wanted = list(OURS if asked.no_peers else known)
    if asked.variants:
        chosen = [one for one in wanted if any(text.lower() in one.name.lower() for text in asked.variants)]
        wanted = chosen and [AGAIN, *(one for one in chosen if one is not AGAIN)]
    if not wanted:
        parser.error(f"no variant has such a name; there are: {', '.join(one.name for one in known)}")
    missing = [one.name for one in wanted if not one.is_installed]
    wanted = [one for one in wanted if one.is_installed]
    rounds = asked.rounds or ROUNDS[asked.quick]
    warnings.simplefilter("ignore")  # peers' deprecations

    where = (
        f"{_processor()}, threads: {torch.get_num_threads()}; Python {platform.python_version()}, "
        f"torch {torch.__version__}; {asked.repeats} × {rounds} rounds, {asked.clock} clock"
    )
    print(where)
    if missing:
        print(f"not installed: {', '.join(missing)}")
    rows = []
    for name in asked.models:
        print(f"training {name} …", file=sys.stderr)
        rows += joined([measured(name, wanted, rounds, asked.clock) for _ in range(asked.repeats)])
        print_ratios(rows, [name])
    bounds = {} if asked.no_peers else underflow_bounds(asked.models[0])
    if bounds:
        print_bounds(bounds, asked.models[0])
    if asked.json:
        told = {"where": where, "missing": missing, "rows": rows, "underflow": bounds}
        asked.json.write_text(json.dumps(told, indent=2) + "\n")


def _processor() -> str:
    """The CPU's name, where the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
