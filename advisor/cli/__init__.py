"""The command line: one command a file. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable

import typer

from advisor.cli import demo, export, history, output, plan, probe, serve, show, submit, train, worker
from advisor.errors import AdvisorError
from probes.errors import ProbeError

app = typer.Typer(
    name="advisor",
    help="Measures a PyTorch training run and advises which 8-bit and 16-bit formats it can use, layer by layer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS: tuple[tuple[Callable[..., None], str], ...] = (
    (demo.demo, "Do the whole job here, in about two minutes."),
    (serve.serve, "Start the service and a worker."),
    (worker.worker, "Start one more worker."),
    (submit.submit, "Give the service a model, or a window file."),
    (probe.probe, "Record a window of a model's training."),
    (plan.plan, "Make a precision plan, with its reasons."),
    (train.train, "Train with a plan, beside the baseline."),
    (history.history, "One tensor, step by step, in any cast."),
    (export.export, "Write a plan as files for another library."),
    (show.show, "Show a file, or anything in the service."),
)
for command, told in COMMANDS:
    app.command(name=command.__name__, short_help=told)(command)


def main() -> None:
    """Run the command line. Exit status: 0 done, 1 not done (one sentence on stderr), 2 wrongly called."""
    output.keep_stdout_for_results()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows '?', not a traceback
    try:
        app()
    except (AdvisorError, ProbeError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # `advisor … | head` is no fault
            with contextlib.suppress(OSError):
                sys.stdout.close()
            raise SystemExit(1) from error
        typer.echo(f"advisor: {_sentence(error)}", err=True)
        raise SystemExit(1) from error


def _sentence(error: Exception) -> str:
    """What went wrong, without the number that Python puts before an operating system's error."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
