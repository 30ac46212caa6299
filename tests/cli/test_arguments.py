"""Command lines of other tools, as they stand."""

import shlex

import pytest
import typer
import yaml

from saekit.cli.arguments import LISTS, SWITCHES, rewritten
from tests.cli.test_launch import settings
from tests.placement.conftest import torchrun

COMMANDS = {"train", "eval", "inspect", "report", "demo", "config", "plan", "doctor"}


@pytest.mark.parametrize(
    ("typed", "becomes"),
    [
        ("train M D --layers 16 24", "train M D --layers 16,24"),
        ("train --layers 16 24 M D", "train --layers 16,24 M D"),
        ("train M D --layers=16 24 --k 3", "train M D --layers=16,24 --k 3"),
        ("train M D --layers 0-11:2 16,18 20", "train M D --layers 0-11:2,16,18,20"),
        ("train M D --exclude_tokens 0 50256", "train M D --exclude_tokens 0,50256"),
        ("train M D --matryoshka 0.125 0.25 1", "train M D --matryoshka 0.125,0.25,1"),
        ("train M D --layers all 3", "train M D --layers all 3"),
        ("train M D --hookpoints layers.0.mlp h.{1,2}:in", "train M D --hookpoints layers.0.mlp,h.{1,2}:in"),
        ("train --hookpoints layers.*.mlp h.1 gpt2 a.jsonl", "train --hookpoints layers.*.mlp,h.1 gpt2 a.jsonl"),
        ("train --reads h.0 h.1 --writes=h.2 h.3 M D", "train --reads h.0,h.1 --writes=h.2,h.3 M D"),
        ("train --hookpoints h.0 --lr=0.3 M D", "train --hookpoints h.0 --lr=0.3 M D"),
        ("train --crosscode h.0 h.1 gpt2 a.jsonl", "train --crosscode h.0,h.1 gpt2 a.jsonl"),
        ("train --hookpoints mlp owner/model D", "train --hookpoints mlp owner/model D"),
        ("train M D --layers", "train M D --layers"),
        ("train M D --k 3 4", "train M D --k 3 4"),
        ("train M D --save_best True --multi_topk=False", "train M D --save_best --no-multi-topk"),
        ("train M -- --layers 1 2", "train M -- --layers 1 2"),
        # Without a command.
        ("owner/model owner/data --k 3", "train owner/model owner/data --k 3"),
        ("owner/model", "train owner/model"),
        ("gpt2 data.jsonl", "train gpt2 data.jsonl"),
        ("--layers 16 24 M D", "train --layers 16,24 M D"),
        ("--load_in_8bit M D", "train --load_in_8bit M D"),
        ("--no-shuffle M D", "train --no-shuffle M D"),
        ("--transcode M D", "train --transcode M D"),
        # A command, or nearly.
        ("trian M D", "trian M D"),
        ("evaluate run", "evaluate run"),
        ("gpt2", "gpt2"),
        ("--version", "--version"),
        ("--help", "--help"),
        ("-h", "-h"),
        ("--no-such-option", "--no-such-option"),
        ("--k 3 train M D", "--k 3 train M D"),
        ("inspect runs/r", "inspect runs/r"),
        ("", ""),
    ],
)
def test_rewritten(typed, becomes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rewritten(shlex.split(typed), COMMANDS) == shlex.split(becomes)


def test_a_folder_is_a_model_even_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained").mkdir()
    assert rewritten(["trained"], COMMANDS) == ["train", "trained"]


def test_lists_and_switches_are_found_in_the_configuration():
    assert {"--layers", "--exclude-tokens", "--matryoshka"} == LISTS
    assert {"--save-best", "--shuffle", "--load-in-8bit"} < SWITCHES


@pytest.fixture
def shown(saekit, monkeypatch):
    """Return the configuration that a command line comes to, without planning it."""

    def call(*arguments):
        monkeypatch.setattr("saekit.cli.train._show", lambda cfg, *_: typer.echo(yaml.safe_dump(cfg.to_flat())))
        result = saekit(*arguments, "--dry-run")
        assert result.code == 0, result.err
        return yaml.safe_load(result.out)

    return call


@pytest.mark.parametrize("command", [[], ["train"]])
def test_the_command_lines_of_the_reference(shown, model_dir, text_file, command):
    line = (
        "--batch_size 1 --layers 16 24 --k 192 --grad_acc_steps 8 --ctx_len 2048 --distribute_layers --auxk_alpha 0 "
        "--load_in_8bit --micro_acc_steps 2"
    )
    values = shown(*command, model_dir, text_file, *line.split())
    expected = {"batch_size": 1, "layers": [16, 24], "k": 192, "grad_acc_steps": 8, "ctx_len": 2048, "auxk_alpha": 0}
    expected |= {"placement": "layer-map", "load_in_8bit": True, "micro_acc_steps": 2}
    assert {name: values[name] for name in expected} == expected


def test_eight_bits_without_a_gpu_are_refused_in_one_sentence(train):
    result = train("--load_in_8bit")
    assert result.code == 2
    assert "--load-in-8bit needs a CUDA GPU, but the device is cpu" in result.err


def test_no_data_set_is_taken_by_default(saekit):
    result = saekit("owner/model", "--k", "3")
    assert result.code == 2
    assert "DATASET is missing: saekit train MODEL DATASET" in result.err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_under_torchrun_without_a_command(tmp_path, forked, ranks):
    model, data, *options = map(str, settings(tmp_path))
    options[options.index("--layers") : options.index("--layers") + 2] = ["--layers", "0", "1"]
    reference = shlex.split("--distribute_layers --auxk_alpha 0 --micro_acc_steps 2")
    done = torchrun(forked, "-m", "saekit", model, data, *options, *reference, ranks=ranks)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run" / "latest").glob("layers.*")} == {"layers.0", "layers.1"}
