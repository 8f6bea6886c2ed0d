"""The command line: what it sends, what it prints, and its exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_server import Server, serving, stream
from typer.main import get_command

from advisor.cli import app, curves, main, numbers_text, tables
from advisor.cli.curves import Curve
from advisor.cli.submit import is_window_file
from advisor.client import connect

Run = Callable[..., tuple[int, str, str]]

# Every command's arguments and options. A change here is a change of what users type.
FLAGS = {
    "demo": "--model --keep --json",
    "serve": "--host --port --data-dir --json",
    "worker": "--data-dir --json",
    "submit": "file --name --family --data --set --url --json",
    "probe": "model --steps --warmup --every --curvature-steps --cast --finer --overhead --seed -o --output --detach "
    "--url --json",
    "plan": "model --hardware --tolerance --max-lost-batch --window --cast --objective --budget --keep --only "
    "--first-last --uniform-roles --native-only --master-weights --optimizer-state --uniform -o --output --url --json",
    "train": "what --steps --baseline --no-baseline --baseline-run --window --evaluate-batches --seed --detach "
    "--url --json",
    "export": "plan --target -o --output --url --json",
    "history": "model site role --cast --metric --window --url --json",
    "show": "what --against --parquet --tensorboard --self-check --url --json",
}

MODEL = {"id": "mdl_1", "name": "m", "kind": "architecture", "family": "gpt", "parameters": 123_456}
WINDOW = {
    "id": "win_1",
    "state": "recorded",
    "steps": [5, 6],
    "sites": 3,
    "slots": 9,
    "coverage": {"share": 1.0, "unseen": []},
    "bytes_stored": 12_345,
    "notes": [],
}
FINDINGS = [
    {
        "cause": "channel_outliers",
        "site": site,
        "role": "input",
        "cast": "int8/tensor/current/nearest",
        "severe": True,
        "numbers": {"ratio": 80.0},
        "sentence": f"{site} input: 3 of 64 channels hold values 80× the others'",
        "remedy": {
            "kind": "cast",
            "says": "e4m3fn keeps it",
            "casts": ["e4m3fn"],
            "loss_scale": None,
            "said_by": "a later service",
        },
        "said_by": "a later service",
    }
    for site in ("head", "up")
]
JOB = {"id": "job_1", "kind": "window", "state": "queued", "error": None}
STEP = {"phase": "window", "step": 1, "steps": 2, "loss": 1.5, "steps_per_s": 3.0, "seconds_left": 61.0}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `advisor …` in this process: its exit status, stdout and stderr."""

    def command(*arguments: str, server: Server | None = None) -> tuple[int, str, str]:
        monkeypatch.setenv("ADVISOR_URL", server.url if server else "http://127.0.0.1:9")
        monkeypatch.setattr(sys, "argv", ["advisor", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


def posted(server: Server, path: str) -> Any:
    return next(json.loads(seen.body) for seen in server.seen if (seen.method, seen.path) == ("POST", path))


def job_answers(ends: str = "succeeded", error: Any = None) -> dict[str, list[Any]]:
    return {
        "GET /v1/jobs/job_1/events": [stream((1, "step", STEP), (2, "state", {"state": ends}))],
        "GET /v1/jobs/job_1": [(200, {**JOB, "state": ends, "error": error})],
    }


def test_flags_are_as_agreed() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    found = {}
    for name, command in commands.items():
        flags = [flag for one in command.params for flag in (*one.opts, *one.secondary_opts)]
        found[name] = " ".join(flags)
    assert found == FLAGS


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['advisor', '--help']; from advisor.cli import main\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'numpy', 'httpx', 'pydantic', 'api') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in FLAGS)
    assert done.stdout.splitlines()[-1] == "[]"


def test_what_libraries_print_does_not_reach_the_json_on_stdout() -> None:
    """HiGHS 1.12 prints in the middle of this plan; a child process prints too."""
    code = """
import subprocess, sys
from advisor import cli
from advisor.cli import output
from advisor.hardware import hardware_named
from advisor.objectives import Budget, Task
from advisor.planner import plan_from_rows
from benchmarks.plan_speed import instance

def planned() -> None:
    sites, rows, tolerance = instance("unlike", 14, seed=6)
    limits = {"tolerance": tolerance, "max_lost_batch": 0.002, "total_flops": sum(site.flops for site in sites)}
    task = Task("damage", Budget(share_8bit=0.4))
    plan = plan_from_rows(sites, rows, hardware=hardware_named("h100"), mean_loss=2.0, task=task, **limits)
    subprocess.run(["echo", "a child"], check=True)
    output.print_json(plan.to_dict())

cli.app.command(name="planned")(planned)
sys.argv = ["advisor", "planned"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["objective"] == "damage"
    assert "a child" in done.stderr
    assert "transformNewIntegerFeasibleSolution" in done.stderr, "an instance in which HiGHS prints nothing"


@pytest.mark.parametrize("command", FLAGS)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert f"Usage: advisor {command}" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "mdl_1"], "start one with `advisor serve`"),
        (["show", "nothing.json"], "nothing.json: No such file"),
        (["show", "nothing.safetensors"], "nothing.safetensors"),
        (["submit", "nothing.toml"], "nothing.toml: No such file"),
        (["submit", "nothing.safetensors", "--name", "m"], "nothing.safetensors: No such file"),
        (["plan", "m", "-o", "/nonexistent/x.json"], "/nonexistent/x.json: there is no folder /nonexistent"),
        (["probe", "m", "-o", "/nonexistent/x.st"], "/nonexistent/x.st: there is no folder /nonexistent"),
        (["plan", "m", "-o", "/tmp"], "/tmp: this is a folder"),
        (["serve", "--host", "0.0.0.0"], "does not bind '0.0.0.0'"),
        (["probe", "m", "--url", "localhost"], "is no URL of a service"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_status_1(
    run: Run, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advisor.client.FIRST_PAUSE_S", 0.0)
    status, out, err = run(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("advisor: ")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["probe"],
        ["probe", "m", "--steps", "0"],
        ["probe", "m", "--detach", "-o", "x"],
        ["submit"],
        ["submit", "--family", "gpt", "--set", "layers=2"],
        ["submit", "--family", "gpt", "--set", "config.layers"],
        ["plan", "m", "--max-lost-batch", "1"],
        ["plan", "m", "--objective", "speed"],
        ["plan", "m", "--budget", "share_8bit"],
        ["plan", "m", "--budget", "share_8bit=much"],
        ["plan", "m", "--first-last", "-1"],
        ["plan", "m", "--max-lost-batch", "-0.1"],
        ["plan", "m", "--max-lost-batch", "nan"],
        ["plan", "m", "--tolerance", "nan"],
        ["plan", "m", "--uniform", "int8"],
        ["demo", "--model", "llama"],
    ],
)
def test_a_wrong_call_is_status_2(run: Run, arguments: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Usage: advisor" in err


def test_the_problem_of_the_service_is_what_the_user_reads(run: Run) -> None:
    problem = {"title": "No such model", "status": 404, "detail": "there is no model 'm'"}
    with serving({"POST /v1/models/m/windows": [(404, problem)]}) as server:
        assert run("probe", "m", server=server) == (1, "", "advisor: No such model: there is no model 'm'\n")


def test_submit_by_options(run: Run) -> None:
    with serving({"POST /v1/models": [(201, MODEL)]}) as server:
        options = ["--set", "config.layers=2", "--set", "training.optimizer=sgd", "--data", "python-text"]
        status, out, _ = run("submit", "--family", "gpt", "--name", "m", *options, server=server)
    assert status == 0
    assert "123k parameters" in out
    assert posted(server, "/v1/models") == {
        "kind": "architecture",
        "name": "m",
        "family": "gpt",
        "config": {"layers": 2},
        "data": {"set": "python-text"},
        "training": {"optimizer": "sgd"},
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("spec.json", '{"family": "gpt", "config": {"layers": 3, "width": 32}}'),
        ("spec.toml", 'family = "gpt"\n[config]\nlayers = 3\nwidth = 32'),
    ],
)
def test_submit_a_file_and_change_one_setting(run: Run, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with serving({"POST /v1/models": [(201, MODEL)]}) as server:
        status, out, _ = run("submit", str(tmp_path / name), "--set", "config.width=64", "--json", server=server)
    assert status == 0
    assert json.loads(out) == MODEL
    assert posted(server, "/v1/models")["config"] == {"layers": 3, "width": 64}
    assert posted(server, "/v1/models")["name"] == "gpt"


# safetensors: the length of the header in eight bytes, the header, the arrays.
SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize("name", ["w.safetensors", "w.st", "w", "w.json"])
def test_submit_knows_a_window_file_by_its_content(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(SAFETENSORS)
    with serving({"POST /v1/models/m/windows?create=true": [(201, WINDOW)]}) as server:
        status, out, _ = run("submit", str(tmp_path / name), "--name", "m", server=server)
        nameless = run("submit", str(tmp_path / name), server=server)
    assert (status, out) == (0, "win_1: 2 steps of 3 sites, model 'm'\n")
    assert [seen.body for seen in server.seen] == [SAFETENSORS]
    assert nameless[0] == 2
    assert "goes with --name alone" in nameless[2]


def test_json_with_a_brace_in_the_ninth_place_is_no_window_file(tmp_path: Path) -> None:
    text = b'{"data":{"set": "digits"}}'
    assert text[8:9] == b"{"
    assert not is_window_file(tmp_path / "a.json", text)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.toml", 'family = "gpt"\nname = 2020-01-01', "holds a date or a time"),
        ("a.json", '{"family": "gpt", "config": null}', "config is None; settings by name are expected"),
    ],
)
def test_submit_a_file_with_a_wrong_part(run: Run, tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    status, out, err = run("submit", str(tmp_path / name), "--set", "config.layers=1")
    assert (status, out) == (1, "")
    assert says in err
    assert err.count("\n") == 1


def test_submit_a_file_that_is_no_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "w.st").write_bytes(b"\x80\x02}q\x00.")
    status, out, err = run("submit", str(tmp_path / "w.st"), "--name", "m")
    assert (status, out) == (1, "")
    assert err.startswith(f"advisor: {tmp_path / 'w.st'} is neither a window file nor text in UTF-8 (byte 0 is 0x80)")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("name", "text"), [("a.json", "{"), ("a.toml", "=")])
def test_submit_a_broken_file(run: Run, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    status, _, err = run("submit", str(tmp_path / name))
    assert status == 1
    assert f"{name} is not {name[2:].upper()}" in err


def test_probe_shows_progress_and_writes_the_file(run: Run, tmp_path: Path) -> None:
    answers = {
        "POST /v1/models/m/windows": [(202, {"window": {"id": "win_1"}, "job": JOB})],
        "GET /v1/windows/win_1": [(200, WINDOW)],
        "GET /v1/windows/win_1/findings?severe=true": [(200, {"items": FINDINGS, "next": None})],
        "GET /v1/windows/win_1/file": [(200, b"sketches")],
        **job_answers(),
    }
    with serving(answers) as server:
        status, out, err = run("probe", "m", "--steps", "2", "-o", str(tmp_path / "w.safetensors"), server=server)
    assert status == 0
    assert "win_1: 2 steps, 3 sites, 100% of the matrix FLOPs seen" in out
    told = "head input: 3 of 64 channels hold values 80× the others'; e4m3fn keeps it (1 more of the cause"
    assert told in " ".join(out.split())
    assert "down input" not in out
    assert "training, probed" in err
    assert "loss 1.5000" in err
    assert (tmp_path / "w.safetensors").read_bytes() == b"sketches"
    assert posted(server, "/v1/models/m/windows")["steps"] == 2


def test_with_json_stdout_is_json_and_stderr_is_silent(run: Run) -> None:
    answers = {
        "POST /v1/models/m/windows": [(202, {"window": {"id": "win_1"}, "job": JOB})],
        "GET /v1/windows/win_1": [(200, {**WINDOW, "losses": ["NaN", 1.0]})],
        **job_answers(),
    }
    with serving(answers) as server:
        status, out, err = run("probe", "m", "--json", server=server)
    assert (status, err) == (0, "")
    assert json.loads(out)["losses"] == ["NaN", 1.0]


def test_a_failed_job_is_status_1_with_its_reason(run: Run) -> None:
    error = {"title": "Training diverged", "detail": "the loss is nan at step 1"}
    answers = {
        "POST /v1/models/m/windows": [(202, {"window": {"id": "win_1"}, "job": JOB})],
        **job_answers("failed", error),
    }
    with serving(answers) as server:
        status, out, err = run("probe", "m", "--json", server=server)
    assert (status, out) == (1, "")
    assert "Training diverged: the loss is nan at step 1" in err


PLAN_ID = "pln_0123456789abcdef"
RUN_ANSWER = (202, {"run": {"id": "run_1"}, "job": {**JOB, "kind": "run"}})


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        (["--uniform", "input=int8/none"], {"uniform": {"input": "int8/none"}}),
        (["--max-lost-batch", "0.1"], {"max_lost_batch": 0.1}),
        ([], {}),
    ],
)
def test_plan_sends_only_the_limits_that_were_given(run: Run, options: list[str], sent: dict[str, Any]) -> None:
    refused = (422, {"title": "Stop here", "detail": "what was sent is enough"})
    with serving({"POST /v1/models/m/plans": [refused]}) as server:
        run("plan", "m", *options, server=server)
    body = posted(server, "/v1/models/m/plans")
    assert {name: value for name, value in body.items() if value is not None and name != "hardware"} == sent


def test_train_takes_a_plan(run: Run) -> None:
    with serving({f"POST /v1/plans/{PLAN_ID}/runs": [RUN_ANSWER]}) as server:
        status, out, _ = run("train", PLAN_ID, "--detach", server=server)
    assert (status, out) == (0, f"started job_1, the job of run_1 with {PLAN_ID}\n")
    assert len(server.seen) == 1


def test_train_takes_a_model_and_its_latest_plan(run: Run) -> None:
    answers = {
        "GET /v1/models/m": [(200, MODEL)],
        "GET /v1/models/mdl_1/plans?limit=1": [(200, {"items": [{"id": PLAN_ID}], "next": "older"})],
        f"POST /v1/plans/{PLAN_ID}/runs": [RUN_ANSWER],
    }
    with serving(answers) as server:
        status, out, _ = run("train", "m", "--detach", "--steps", "3", server=server)
    assert (status, out) == (0, f"started job_1, the job of run_1 with {PLAN_ID}\n")
    assert posted(server, f"/v1/plans/{PLAN_ID}/runs")["steps"] == 3


def test_train_a_model_without_a_plan_says_how_to_make_one(run: Run) -> None:
    answers = {
        "GET /v1/models/m": [(200, MODEL)],
        "GET /v1/models/mdl_1/plans?limit=1": [(200, {"items": [], "next": None})],
    }
    with serving(answers) as server:
        status, _, err = run("train", "m", server=server)
    assert (status, err) == (1, "advisor: the model 'm' has no plan yet: `advisor plan m` makes one\n")


@pytest.mark.parametrize("command", ["show", "train"])
def test_an_id_of_nothing_is_told_what_ids_look_like(run: Run, command: str) -> None:
    missing = (404, {"title": "Not Found", "detail": "there is no model with the id or name 'job_x'"})
    with serving({"GET /v1/models/job_x": [missing]}) as server:
        status, out, err = run(command, "job_x", server=server)
    assert (status, out) == (1, "")
    assert "nothing here is called 'job_x'" in err
    assert all(prefix in err for prefix in ("mdl_", "win_", "pln_", "run_", "job_"))


def test_worker_with_json_says_who_it_is(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.jobs.worker.work", lambda settings: None)
    status, out, _ = run("worker", "--json", "--data-dir", str(tmp_path))
    assert status == 0
    assert json.loads(out) == {"worker": os.getpid(), "data_dir": str(tmp_path.resolve())}
    assert out.count("\n") == 1


def test_serve_with_json_prints_its_address_when_it_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "advisor.cli", "serve", "--port", "0", "--data-dir", str(tmp_path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            said = json.loads(process.stdout.readline())
            with connect(said["url"]) as client:
                assert client.get("/healthz") == {"status": "ok"}
        finally:
            process.terminate()
        assert process.stdout.read() == ""
    assert list(said) == ["url"]


def test_the_help_says_what_is_checked(run: Run) -> None:
    _, out, _ = run("plan", "--help")
    assert "0 or more, below 1" in " ".join(out.split())
    assert "0<=x<=1" not in out.replace(".0", "")


def test_worker_without_a_database_is_one_sentence(run: Run, tmp_path: Path) -> None:
    status, out, err = run("worker", "--data-dir", str(tmp_path / "none"))
    assert (status, out) == (1, "")
    assert err.startswith("advisor: ")
    assert "start `advisor serve` once" in err
    assert err.count("\n") == 1


def test_history_prints_a_line_a_step(run: Run) -> None:
    found = {
        "site": "a/b.0",
        "role": "lhs",
        "cast": "e5m2/none/nearest",
        "window": "win_1",
        "steps": [4, 5],
        "metrics": {"underflow": [0.25, 0.5], "sqnr_db": [31.26, "Infinity"], "amax": ["NaN", 2.0]},
    }
    with serving({"GET /v1/models/m/layers/a/b.0/history?role=lhs&cast=e5m2%2Fnone": [(200, found)]}) as server:
        status, out, _ = run("history", "m", "a/b.0", "lhs", "--cast", "e5m2/none", server=server)
        missing = run("history", "m", "a/b.0", "lhs", "--cast", "e5m2/none", server=server)
    assert status == missing[0] == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["step", "underflow", "sqnr_db", "amax"] in lines
    four, five = (next(line for line in lines if line[:1] == [step]) for step in ("4", "5"))
    assert (four[1], four[3]) == ("25%", "31.3")
    assert five[1] == "50%"
    assert len(five[2]) == 2 * len(four[2])  # twice the value, twice the bar


# Numbers, curves, tables


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-9, "<.01%"), (0.0003, "0.03%"), (0.0123, "1.2%"), (0.4711, "47%"), (1.0, "100%"), (None, "-")],
)
def test_shares(value: float | None, text: str) -> None:
    assert numbers_text.share(value) == text


@pytest.mark.parametrize(
    ("canonical", "text"),
    [
        ("e4m3fn/tensor/current/nearest", "e4m3fn"),
        ("bf16/none/nearest", "bf16"),
        ("e5m2/none/nearest", "e5m2/none"),
        ("int8/tensor/current/stochastic", "int8/tensor/current/stochastic"),
    ],
)
def test_casts_lose_their_defaults(canonical: str, text: str) -> None:
    assert numbers_text.short_cast(canonical) == text


def test_counts_and_seconds() -> None:
    assert [numbers_text.count(value) for value in (999, 9_999, 12_345, 4_560_000)] == [
        "999",
        "9,999",
        "12.3k",
        "4.56M",
    ]
    assert [numbers_text.seconds(value) for value in (0.4, 61, 3725, None)] == ["0:00", "1:01", "1:02:05", "-:--"]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_panels_fit_and_show_where_each_curve_goes(width: int) -> None:
    falling = Curve("falls", [(step, 4.0 - step / 50) for step in range(1, 101)])
    flat = Curve("stays", [(step, 4.0) for step in range(1, 101)])
    lost = Curve("breaks", [(step, 4.0 if step < 9 else float("nan")) for step in range(1, 101)])
    lines = curves.panels([falling, flat, lost], width).plain.splitlines()
    assert max(map(len, lines)) <= width
    assert "NaN or inf fro" in lines[-1]
    rows = [line.split("│") for line in lines[1 : 1 + curves.ROWS]]
    drawn = [[any(character > "\u2800" for character in row[panel]) for row in rows] for panel in (1, 2, 3)]
    assert all(drawn[0])  # through the whole height
    assert [row for row, seen in enumerate(drawn[1]) if seen] == [0]  # along the top
    assert [row for row, seen in enumerate(drawn[2]) if seen] == [0]


def test_a_wild_value_does_not_flatten_the_other_curves() -> None:
    falling = Curve("falls", [(step, 4.0 - step / 50) for step in range(1, 101)])
    wild = Curve("wild", [(step, 1e9) for step in range(1, 31)])
    lines = curves.panels([falling, wild], 80).plain.splitlines()
    assert float(lines[1].split("│")[0]) == pytest.approx(2 * 3.98)


def test_curves_without_a_number() -> None:
    assert "no loss is finite" in curves.panels([Curve("a", [(1, float("inf"))])], 80).plain


def row(site: str, role: str, cast: str, underflow: float, sqnr_db: float) -> dict[str, Any]:
    return {"site": site, "role": role, "cast": cast, "underflow": underflow, "sqnr_db": sqnr_db}


def printed(renderable: Any, width: int = 100) -> list[list[str]]:
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return [line.split() for line in console.export_text().splitlines()]


def test_the_worst_of_each_role_names_the_layer() -> None:
    rows = [
        row("a", "input", "int8/tensor/current/nearest", 0.1, 30.0),
        row("b", "input", "int8/tensor/current/nearest", 0.2, 40.0),
        row("c", "input", "int8/tensor/current/nearest", float("nan"), float("nan")),
        row("a", "weight", "int8/tensor/current/nearest", 0.0, 50.0),
    ]
    lines = printed(tables.worst_table(rows))
    assert ["input", "int8", "20%", "b", "30", "a"] in lines
    assert ["weight", "int8", "0", "50", "a"] in lines


def test_the_layer_table_has_a_line_a_slot_and_a_column_a_cast() -> None:
    casts = ["e4m3fn/tensor/current/nearest", "bf16/none/nearest"]
    rows = [row("blocks.0.mlp.up", role, cast, 0.0123, 31.4) for role in ("input", "weight") for cast in casts]
    lines = printed(tables.layers_table(rows))
    assert ["tensor", "e4m3fn", "bf16"] in lines
    at = lines.index(["blocks.0.mlp.up"])
    assert lines[at + 1 : at + 3] == [[role, "1.2%", "31", "1.2%", "31"] for role in ("input", "weight")]


def test_what_is_said_of_a_whole_site_stands_once() -> None:
    whole = "e4m3fn throughout this site (h100 does not multiply it with int8) would cost 4.3× the loss"
    assignments = [
        {"site": "a", "role": "input", "reason": f"int8: 40.0 dB; {whole}."},
        {"site": "a", "role": "weight", "reason": f"int8: 41.0 dB; {whole}; flagged: few values."},
        {"site": "a", "role": "grad_output", "reason": "int8: 30.0 dB; flagged: few values."},
        {"site": "b", "role": "input", "reason": f"int8: 42.0 dB; {whole}."},
    ]
    sites = [{"site": "a", "flops": 3.0}, {"site": "b", "flops": 1.0}]
    assert tables.plan_text({"sites": sites, "assignments": assignments}, 130).plain.splitlines() == [
        "a  75% of FLOPs",
        f"  {whole}.",
        "  input        int8: 40.0 dB.",
        "  weight       int8: 41.0 dB; flagged: few values.",
        "  grad_output  int8: 30.0 dB; flagged: few values.",
        "b  25% of FLOPs",
        f"  input        int8: 42.0 dB; {whole}.",
    ]


def test_a_short_training_is_drawn_without_holes() -> None:
    lines = curves.panels([Curve("a", [(1, 4.0), (2, 3.0), (3, 2.0)])], 60).plain.splitlines()
    rows = [line.split("│")[1] for line in lines[1 : 1 + curves.ROWS]]
    drawn = {column for row in rows for column, character in enumerate(row) if character > "\u2800"}
    assert drawn == set(range(max(drawn) + 1))
    assert len(drawn) > 40


def test_losses_of_any_size_fit() -> None:
    assert [numbers_text.loss(value) for value in (2.5, 3e10, float("nan"))] == ["2.5000", "3e+10", "NaN"]
    assert numbers_text.loss(0.01, signed=True) == "+0.0100"


def test_show_of_nothing_says_what_can_be_shown(run: Run) -> None:
    status, _, err = run("show")
    assert status == 2
    assert "--self-check" in err


@pytest.mark.slow
def test_the_self_check_agrees_with_what_is_known(run: Run) -> None:
    status, out, _ = run("show", "--self-check", "--json")
    assert status == 0
    assert json.loads(out)["disagreements"] == []
