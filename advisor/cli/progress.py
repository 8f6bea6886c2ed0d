"""A bar for each phase of a job, from its events: step, loss, steps a second, time left. On stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from advisor.cli import numbers_text, output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from advisor.client import Client
    from advisor.event_stream import Event

PHASES = {
    "warmup": "ordinary training",
    "window": "training, probed",
    "baseline": "training, baseline",
    "plan": "training, with the plan",
}


def follow(
    client: Client,
    job_id: str,
    quiet: bool = False,
    names: dict[str, str] | None = None,
    where: Console | None = None,
) -> dict[str, Any]:
    """Show a job's progress to its end and return it. Ctrl-C cancels the job. Raises ServiceError if it
    failed.

    names: what a phase is called here, where the usual name says too little. where: default stderr.
    """
    try:
        if quiet:
            return client.wait(job_id)
        with bars({**PHASES, **(names or {})}, where) as show:
            return client.wait(job_id, show)
    except KeyboardInterrupt:
        client.cancel(job_id)
        raise


@contextlib.contextmanager
def bars(names: dict[str, str], where: Console | None = None) -> Iterator[Callable[[Event], None]]:
    """A function that takes a job's events and moves the bars."""
    from rich.progress import BarColumn, Progress, TextColumn

    progress = Progress(
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:>5.0f}/{task.total:<5.0f}"),
        TextColumn("{task.fields[loss]:<12}"),
        TextColumn("{task.fields[rate]:>12}"),
        TextColumn("{task.fields[left]:>6}"),
        console=where or output.console(error=True),
    )
    tasks: dict[str, TaskID] = {}

    def show(event: Event) -> None:
        if event.kind == "step":
            _move(progress, tasks, names, event.data)
        elif event.kind == "log" and event.data.get("message"):
            progress.console.print(str(event.data["message"]))

    with progress:
        yield show


def _move(progress: Progress, tasks: dict[str, TaskID], names: dict[str, str], data: dict[str, Any]) -> None:
    """One step event.

    A phase gets its bar when its first step comes; the time left is that of the whole job.
    """
    phase = data["phase"]
    if phase == "evaluate":  # a second or two, in two pieces: no bar
        return
    if phase not in tasks:
        for task in tasks.values():  # phases follow each other: what came before is over
            progress.update(task, left="")
        tasks[phase] = progress.add_task(names.get(phase, phase), total=data["steps"], loss="", rate="", left="")
    loss, rate = data.get("loss"), data.get("steps_per_s")
    done = data["step"]
    progress.update(
        tasks[phase],
        completed=done,
        total=data["steps"],
        loss="" if loss is None else f"loss {numbers_text.loss(loss)}",
        rate="" if rate is None else f"{rate:.1f} steps/s",
        left="" if done >= data["steps"] else numbers_text.seconds(data.get("seconds_left")),
    )
