"""`saekit doctor` as a user meets it: both outputs, the exit code, and what must never be in them."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

import saekit
from saekit.cli.first_steps import doctor
from saekit.doctor import Finding, can_train, checks, findings_to_json, libraries, limits
from saekit.doctor.findings import AREAS
from saekit.doctor.probes import Outcome
from saekit.views.doctor import render_findings

TOKEN = "hf_QzWxEcRvTbYnUm"
FINDING_KEYS = {"area", "name", "state", "found", "remedy", "blocks"}
MENDED = Finding("hub", "cache", "problem", "cannot be written", "export HF_HOME=FOLDER")
BLOCKED = Finding("libraries", "torch", "problem", "not installed", 'pip install "torch>=2.6,<2.14"', blocks=True)
NOTED = Finding("devices", "threads", "note", "1 for 64 cores", "unset OMP_NUM_THREADS")
WELL = Finding("saekit", "Python", "ok", "3.11.7")


class NoProbes:
    """In place of `Probes`, which take seconds."""

    def __init__(self, codes):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def outcome(self, name):
        return Outcome({"ranks": 2, "seconds": 0.1, "address": "10.0.0.1", "device": "cpu", "moved": True})


@pytest.fixture
def call(monkeypatch, tmp_path):
    """`call("--json")` runs the command in an empty folder, with nothing tried in other processes."""
    app = typer.Typer()
    app.command()(doctor)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "Probes", NoProbes)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments: CliRunner().invoke(app, arguments)


def as_process(*arguments, before="", **variables):
    """The command in a process of its own, as it is started from a shell."""
    code = f"{before}\nimport typer\nfrom saekit.cli.first_steps import doctor\ntyper.run(doctor)"
    environment = {**os.environ, "PYTHONPATH": str(Path(saekit.__file__).parents[1]), "COLUMNS": "80", **variables}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_json_has_a_schema(call):
    result = call("--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 0
    assert set(said) == {"saekit", "can_train", "problems", "notes", "versions", "findings"}
    assert said["saekit"] == saekit.__version__
    assert said["can_train"] is True
    assert {"python", "saekit", "torch"} <= set(said["versions"])
    for finding in said["findings"]:
        assert set(finding) == FINDING_KEYS
        assert finding["area"] in AREAS
        assert finding["state"] in ("ok", "note", "problem")
        assert isinstance(finding["name"], str)
        assert isinstance(finding["found"], str)
        assert (finding["remedy"] is None) == (finding["state"] == "ok"), finding
        assert "could not be checked" not in finding["found"], finding
    assert [area for area in AREAS if any(finding["area"] == area for finding in said["findings"])] == list(AREAS)
    for state, number in (("problem", said["problems"]), ("note", said["notes"])):
        assert sum(finding["state"] == state for finding in said["findings"]) == number


def test_everything_is_looked_at(call):
    names = {(each["area"], each["name"]) for each in json.loads(call("--json").stdout)["findings"]}
    expected = {
        "saekit": {"version", "Python", "system"},
        "libraries": {"torch", "accelerate", "transformers", "datasets", "tokenizers", "numpy", "triton", "typer"},
        "devices": {"GPUs", "CPU", "threads", "bf16", "kernels"},
        "ranks": {"gloo", "compiler"},
        "hub": {"cache", "cached", "data sets", "token", "access"},
        "resources": {"memory", "swap", "save-dir", "open files"},
    }
    assert {(area, name) for area, own in expected.items() for name in own} <= names


def test_one_failing_check_leaves_the_others_their_turn(call, monkeypatch):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(limits, "open_file_limits", broken)
    monkeypatch.setattr(libraries, "about", broken)
    found = {finding["name"]: finding for finding in json.loads(call("--json").stdout)["findings"]}
    assert "RuntimeError: no such thing" in found["version"]["found"]
    assert "RuntimeError: no such thing" in found["open files"]["found"]
    assert found["memory"]["area"] == "resources"
    assert found["gloo"]["state"] == "ok"
    assert call("--json").exit_code == 0
    assert isinstance(call("--debug").exception, RuntimeError)


def test_the_view_has_all_findings_and_leaves_nothing_behind(call, tmp_path):
    found = json.loads(call("--json").stdout)["findings"]
    result = call()
    assert result.exit_code == 0
    names = [line[4:].split("  ")[0] for line in result.stdout.splitlines() if line[2:3] in ("✓", "!", "✗")]
    assert names == [each["name"] for each in found]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", [(), ("--json",)])
def test_no_part_of_a_token_is_shown(call, monkeypatch, tmp_path, output):
    file = tmp_path / "home" / "token"
    file.parent.mkdir()
    file.write_text(TOKEN[::-1])
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(file))
    from_file = call(*output).output
    assert "a token is set (from the token file)" in from_file
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    from_variable = call(*output).output
    assert "a token is set (from HF_TOKEN)" in from_variable
    for secret in (TOKEN, TOKEN[::-1]):
        assert leaked(secret, from_file + from_variable) == []


def leaked(secret, text):
    """The parts of a secret, four letters long, that are in a text."""
    return [part for start in range(3, len(secret) - 3) if (part := secret[start : start + 4]) in text]


def test_a_leak_would_be_noticed():
    assert leaked(TOKEN, f"token: {TOKEN[:8]}...")
    assert not leaked(TOKEN, "a token is set (from HF_TOKEN)")


FIRST_AS_JSON = """
from functools import cache
import typer
import saekit.doctor
from saekit.cli.first_steps import doctor

saekit.doctor.diagnose = cache(saekit.doctor.diagnose)
app = typer.Typer()
app.command()(doctor)
app(["--json"], standalone_mode=False)
print("THEN", flush=True)
"""


@pytest.mark.slow
def test_the_whole_command_with_a_token_in_both_places(tmp_path):
    """Looked at once, shown in both ways."""
    (tmp_path / "token").write_text(TOKEN[::-1])
    done = as_process(before=FIRST_AS_JSON, HF_HOME=str(tmp_path), HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for secret in (TOKEN, TOKEN[::-1]):
        assert leaked(secret, done.stdout + done.stderr) == []
    as_json, as_text = done.stdout.split("THEN\n")
    for shown in (as_json, as_text):
        assert "ranks met in" in shown
        assert "a token is set (from HF_TOKEN)" in shown
        assert "unset HF_HUB_OFFLINE" in shown
    assert json.loads(as_json)["can_train"]
    assert not [line for line in as_text.splitlines() if len(line) > 80 and " " in line.strip()]


def test_without_torch_it_still_reports_and_the_exit_code_is_1():
    done = as_process(before="import sys; sys.modules['torch'] = None")
    assert done.returncode == 1, done.stderr
    assert "cannot be imported (ModuleNotFoundError" in done.stdout
    assert "pip install --force-reinstall" in done.stdout
    assert "not checked: torch cannot be imported" in done.stdout
    assert "saekit train cannot run" in done.stdout
    assert "free of" in done.stdout  # what needs no torch has been checked


def test_a_problem_that_does_not_keep_from_training_is_no_failure(call, monkeypatch):
    monkeypatch.setattr("saekit.doctor.diagnose", lambda debug: [WELL, MENDED])
    result = call()
    assert result.exit_code == 0
    assert "1 thing to fix: cache." in result.stdout


def test_a_problem_that_keeps_from_training_is_exit_code_1(call, monkeypatch):
    monkeypatch.setattr("saekit.doctor.diagnose", lambda debug: [WELL, BLOCKED])
    assert call().exit_code == 1
    assert call("--json").exit_code == 1


def test_debug_reaches_the_checks(call, monkeypatch):
    asked = []
    monkeypatch.setattr("saekit.doctor.diagnose", lambda debug: asked.append(debug) or [WELL])
    call()
    call("--debug")
    assert asked == [False, True]


def shown(*findings, width=80, encoding="utf-8"):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    render_findings(findings, Console(file=file, width=width))
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def test_marks_remedies_and_the_last_line():
    text = shown(WELL, BLOCKED, NOTED, MENDED)
    assert text.splitlines()[:6] == [
        "saekit",
        "  ✓ Python   3.11.7",
        "",
        "Libraries",
        "  ✗ torch    not installed",
        '             → pip install "torch>=2.6,<2.14"',
    ]
    assert "\x1b" not in text
    end = " ".join(text.split("\n\n")[-1].split())
    assert end == (
        "2 things to fix: torch, cache. saekit train cannot run until torch can be imported. 1 note (marked !)."
    )


def test_when_all_is_well():
    assert shown(WELL).splitlines()[-1] == "This machine has everything that saekit needs."


def test_long_findings_wrap_beneath_themselves():
    long = Finding("hub", "cache", "problem", "word " * 40, "do " * 60)
    lines = shown(long, WELL).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(line == line.rstrip() for line in lines)
    column = lines[lines.index("Hub") + 1].index("word")
    assert lines[lines.index("Hub") + 2].index("word") == column
    remedy = next(number for number, line in enumerate(lines) if "→" in line)
    assert lines[remedy].index("→") == column
    assert lines[remedy].index("do") == lines[remedy + 1].index("do") == column + 2


def test_no_word_is_broken():
    path = "/a/long/path/to/a/cache/that-has-" + "x" * 70
    finding = Finding("hub", "cache", "problem", f"not writable: {path}", f"chmod u+w {path}")
    lines = shown(finding, width=60).splitlines()
    assert sum(line.strip() == path for line in lines) == 2


def test_square_brackets_are_no_markup():
    assert "[bold]" in shown(Finding("hub", "cache", "ok", "[bold] and [/bold]"))


def test_a_terminal_without_such_letters():
    text = shown(WELL, NOTED, MENDED, encoding="ascii")
    for part in ("  + Python ", "  x cache ", "  > unset OMP_NUM_THREADS"):
        assert part in text


def test_to_json_counts():
    said = findings_to_json([WELL, BLOCKED, NOTED, MENDED])
    assert (said["problems"], said["notes"], said["can_train"]) == (2, 1, False)
    assert said["findings"][1]["remedy"] == BLOCKED.remedy
    assert can_train([WELL, NOTED, MENDED])


def test_the_command_itself_imports_nothing_heavy():
    code = (
        "import sys, saekit.cli.first_steps\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy', 'saekit.doctor'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(saekit.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
