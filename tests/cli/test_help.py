"""`--help` shows what most users need, `--help-all` everything, and a terminal of any width cuts nothing."""

import dataclasses
import re
import shlex
import subprocess
import sys

import pytest

from saekit.cli.arguments import rewritten
from saekit.cli.examples import EXAMPLES
from saekit.cli.options import with_resume_value
from saekit.cli.reference import COMMON, sections, visible_commands
from saekit.config import DataConfig, ModelConfig, RunConfig, SaeConfig, TrainConfig
from saekit.config.options import options_of
from saekit.config.run import PARTS
from tests.cli.conftest import built

NOT_OPTIONS = {"d_in", "sae", "model", "dataset"}
FIELDS = [
    field.name
    for part in (SaeConfig, ModelConfig, DataConfig, TrainConfig)
    for field in dataclasses.fields(part)
    if field.name not in NOT_OPTIONS
]
NAMES = sorted(visible_commands(built()))


def spelled(text):
    """The options that a text spells in full, switches with both of their names."""
    found = set(re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9-]*", text))
    return found | {f"{each}{name}" for name in re.findall(r"--\[no-\]([a-z0-9-]+)", text) for each in ("--", "--no-")}


@pytest.fixture
def train_help(saekit):
    result = saekit("train", "--help-all")
    assert result.code == 0
    return result.out


def test_every_field_is_an_option(train_help):
    assert len(FIELDS) > 35
    assert {f"--{name.replace('_', '-')}" for name in FIELDS} <= spelled(train_help)


def test_panels_units_and_defaults(train_help):
    for panel in ("Language model", "Data", "Sparse autoencoder", "Batches", "Optimizer", "Dead latents", "Saving"):
        assert f"\n{panel}\n" in train_help
    for text in ("[sequences; default: 8]", "[tokens; default: 16,384]", "--optimizer adam|adam8bit|signum|muon\n"):
        assert text in train_help
    assert "--[no-]normalize-decoder" in train_help


def test_most_runs_need_few_options(saekit):
    """In one or two lines each on 80 columns, with examples and the way to the others at the end."""
    shown = saekit("train", "--help").out
    options = shown.partition("\nOptions\n")[2].partition("\nExamples\n")[0]
    entries = [line for line in options.splitlines() if line.startswith("  -")]
    assert 14 <= len(entries) <= 20
    assert {f"--{name.replace('_', '-')}" for name in COMMON} <= spelled(options)
    assert "--revive-alpha" not in shown
    assert shown.splitlines()[-1].startswith("saekit train --help-all shows ")


def test_the_first_sentence_says_what_a_common_option_does():
    entries = [entry for section in sections(built().commands["train"].params) for entry in section.entries]
    common = [each for each in entries if each.names[0].removeprefix("--").replace("-", "_") in COMMON]
    assert len(common) == len(COMMON)
    for entry in common:
        assert entry.help.startswith(entry.brief)
        assert len(f"{entry.brief} {entry.note}") <= 2 * 54, entry.brief
        assert not entry.brief.endswith("...")  # an ellipsis is no end of a sentence


@pytest.mark.parametrize("columns", [30, 80, 120])
@pytest.mark.parametrize("command", NAMES)
def test_no_name_is_cut(saekit, monkeypatch, command, columns):
    """In spite of any width: a name that needs more room has a line of its own."""
    monkeypatch.setenv("COLUMNS", str(columns))
    has_more = "--help-all" in spelled(saekit(command, "--help").out)
    shown = saekit(command, "--help-all" if has_more else "--help").out
    options = {name for each in built().commands[command].params for name in (*each.opts, *each.secondary_opts)}
    assert {name for name in options if name.startswith("--")} <= spelled(shown)
    assert "…" not in shown
    if columns >= 80:
        assert max(map(len, shown.splitlines())) <= min(columns, 100)


def test_commands(saekit):
    out = saekit("--help").out
    listed = out.partition("\nCommands\n")[2].partition("\nOptions\n")[0]
    assert set(re.findall(r"^  (\w+) ", listed, re.MULTILINE)) == set(NAMES)
    assert set(NAMES) == EXAMPLES.keys() - {"saekit", "man"}
    assert saekit("--version").out.startswith("saekit 0.")


@pytest.mark.parametrize(("command", "line"), [(name, line) for name in EXAMPLES for _, line in EXAMPLES[name]])
def test_examples_can_be_typed(command, line):
    """They parse, and name a run that is valid, on one line of 80 columns."""
    assert len(line) <= 78
    program, *arguments = shlex.split(line)
    assert program == "saekit"
    name, *given = rewritten(with_resume_value(arguments), built().commands)
    assert command in (name, "saekit")
    context = built().commands[name].make_context(name, given)
    options = {option.name for part in PARTS for option in options_of(part)} | {"model", "dataset"}
    values = {key: value for key, value in context.params.items() if key in options and value not in (None, [])}
    if name in ("train", "plan"):
        RunConfig.from_flat({"dataset": "", **values})


@pytest.mark.parametrize("command", [["-m", "saekit", "--help"], ["-m", "saekit", "train", "--help-all"]])
def test_help_imports_nothing_heavy(command):
    """What makes `saekit --help` answer at once."""
    code = (
        f"import sys, runpy; sys.argv = ['saekit', *{command[2:]}]\n"
        "try:\n    runpy.run_module('saekit', run_name='__main__')\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: saekit" in done.stdout
