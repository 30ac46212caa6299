"""What Typer itself refuses looks like every other problem: one line, code 2."""

import subprocess
import sys

import pytest

from saekit.cli.output import messages
from tests.cli.test_bad_input import assert_refused


def test_a_pipe_gets_no_spinner_where_jupyter_forces_colors(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with messages().status("Loading libraries"):
        messages().print("A message")
    assert capsys.readouterr().err == "A message\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "m", "d", "--no-such-option"], ["--no-such-option", "saekit train --help"]),
        (["train", "m", "d", "--batch-siz", "8"], ["--batch-siz", "--batch-size"]),
        (["train", "m", "d", "extra"], ["extra", "saekit train --help"]),
        (["train", "m", "d", "--dtype", "float99"], ["--dtype", "float99", "bfloat16"]),
        (["train", "m", "d", "--k"], ["--k"]),
        (["trian", "m", "d"], ["trian", "train"]),
        (["--no-such-option"], ["--no-such-option", "saekit --help"]),
        (["inspect"], ["path", "saekit inspect --help"]),
    ],
    ids=" ".join,
)
def test_one_line(saekit, tmp_path, arguments, says):
    result = saekit(*arguments)
    assert_refused(result, *says, folder=tmp_path)
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--k", "many"], "--k 'many'"),
        (["--lr", "fast"], "--lr 'fast'"),
        (["--lr", "inf"], "--lr 'inf'"),
        (["--auxk-alpha", "nan"], "--auxk-alpha 'nan'"),
        (["--batch-size", "1.5"], "--batch-size '1.5'"),
        (["--data-args", "name"], "--data-args 'name'"),
        (["--data-args", "name=["], "--data-args 'name=['"),
    ],
)
def test_the_value_is_named(saekit, tmp_path, arguments, says):
    assert_refused(saekit("train", "m", "d", *arguments), says, folder=tmp_path)


def test_without_arguments_there_is_help(saekit):
    result = saekit()
    assert result.code == 0
    assert "train" in result.out
    assert result.err == ""


def test_exit_codes_of_the_process(tmp_path):
    """What a shell sees; the tests above call the same function."""
    for arguments, code in ((["--version"], 0), (["train", "--help"], 0), (["train", "--nosuch"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "saekit", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_debug_shows_where_the_line_was_refused(tmp_path):
    command = [sys.executable, "-m", "saekit", "train", "m", "d", "--k", "0", "--debug"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "--k" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"a: \x00\n"], ids=["not UTF-8", "not text"])
def test_a_configuration_that_is_no_text(saekit, tmp_path_factory, tmp_path, content):
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_bytes(content)
    assert_refused(saekit("train", "m", "d", "--config", file), f"--config {file}", folder=tmp_path)


def test_a_folder_as_configuration(saekit, tmp_path):
    assert_refused(saekit("train", "m", "d", "--config", tmp_path), f"--config {tmp_path}", folder=tmp_path)
