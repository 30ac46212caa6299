import dataclasses
import subprocess
import sys

import pytest

from saekit.config import DataConfig, ModelConfig, SaeConfig, TrainConfig

NOT_OPTIONS = {"d_in", "sae", "model", "dataset"}
FIELDS = [
    field.name
    for part in (SaeConfig, ModelConfig, DataConfig, TrainConfig)
    for field in dataclasses.fields(part)
    if field.name not in NOT_OPTIONS
]


@pytest.fixture
def train_help(saekit):
    result = saekit("train", "--help")
    assert result.code == 0
    return result.out


def test_every_field_is_an_option(train_help):
    assert len(FIELDS) > 35
    for name in FIELDS:
        assert f"--{name.replace('_', '-')} " in train_help, name


def test_panels_units_and_defaults(train_help):
    for panel in ("Language model", "Data", "Sparse autoencoder", "Batches", "Optimizer", "Dead latents", "Saving"):
        assert f"─ {panel} ─" in train_help
    for text in ("[sequences] [default: 8]", "[tokens] [default: 16,384]", "<adam|adam8bit|signum|muon>"):
        assert text in train_help


def test_commands(saekit):
    out = saekit("--help").out
    assert all(command in out for command in ("train", "inspect", "demo"))
    assert saekit("--version").out.startswith("saekit 0.")


@pytest.mark.parametrize("command", [["-m", "saekit", "--help"], ["-m", "saekit", "train", "--help"]])
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
