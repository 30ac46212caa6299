"""`saekit train --launch NAME`: what it refuses, what it passes on, and real runs on two processes."""

import json
import os
import shlex
import signal
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import saekit
from saekit.cli.launch import launch_file, launch_files, without_launch
from saekit.demo import MODEL_DIR
from saekit.errors import UserError

ROOT = Path(saekit.__file__).parent.parent
DEMO_LM = MODEL_DIR


@pytest.fixture
def saekit_train(forked):
    """Start the command, by default with processes that need not import anything (`tests.forked`)."""

    def start(*arguments, from_nothing=False, **variables):
        python = sys.executable if from_nothing else forked.python
        command = [str(part) for part in (python, "-m", "saekit", "train", *arguments)]
        pipe = subprocess.PIPE
        environment = forked.environment(**variables)
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    return start


def settings(folder, sequences=24):
    Dataset.from_dict({"input_ids": [[7, 8, 9, 10 + i % 90] * 4 for i in range(sequences)]}).save_to_disk(folder / "d")
    options = ["--num-latents", 32, "--k", 2, "--ctx-len", 16, "--batch-size", 2, "--layers", 0]
    return [DEMO_LM, folder / "d", *options, "--save-dir", folder, "--run-name", "run"]


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("train --launch ddp M D", "train M D"),
        ("train M D --launch=ddp --num-processes=2 --k 4", "train M D --k 4"),
        ("train --num_processes 2 --overwrite M D", "train --overwrite M D"),
        ("train --overwrite --launch ddp M D", "train --overwrite M D"),
        # Values that read like our options, and names behind the dash.
        ("train --run-name --launch M D", "train --run-name --launch M D"),
        ("train --launch ddp -- --launch D", "train -- --launch D"),
    ],
)
def test_the_workers_are_told_all_but_how_they_are_started(typed, kept):
    assert without_launch(shlex.split(typed), frozenset({"--overwrite"})) == shlex.split(kept)


@pytest.mark.parametrize("name", ["zero3", "layer_map", "layer-map", "ddp-cpu"])
def test_shipped_launch_files_have_short_names(name):
    assert launch_file(name) == ROOT / "accelerate_configs" / f"{name.replace('-', '_')}.yaml"


def test_a_launch_file_of_ones_own(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert launch_file(str(own)) == own
    with pytest.raises(UserError, match="neither a file nor one of cpu, ddp, "):
        launch_file(str(tmp_path / "other.yaml"))


def test_every_launch_file_can_be_read_by_accelerate():
    from accelerate.commands.config.config_args import load_config_from_file

    names = {"cpu", "single_gpu", "ddp", "ddp_cpu", "zero3", "zero3_offload", "zero3_cpu", "layer_map", "layer_map_cpu"}
    assert set(launch_files()) == names | {"multi_node"}
    for name, file in launch_files().items():
        said = load_config_from_file(str(file))
        assert said.mixed_precision == "no", name
        assert (said.distributed_type.value == "DEEPSPEED") == name.startswith("zero3"), name
        assert yaml.safe_load(file.read_text())["num_processes"] >= 1


def test_every_package_is_shipped():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "saekit").rglob("__init__.py")}
    assert listed == found


@pytest.mark.parametrize(
    ("options", "variables", "parts"),
    [
        (["--num-processes", "2"], {}, ["--num-processes 2", "--launch"]),
        (["--launch", "zero3"], {}, ["--launch zero3 would start 8 processes", "zero3_cpu"]),
        (["--launch", "multi_node"], {}, ["for 2 machines", "accelerate launch --config_file"]),
        (["--launch", "cpu", "--num-processes", "2"], {}, ["starts one process", "--num-processes 2"]),
        (["--launch", "ddp-cpu"], {"RANK": "0", "WORLD_SIZE": "2"}, ["RANK=0, WORLD_SIZE=2", "--launch ddp-cpu"]),
        (["--launch", "no-such"], {}, ["--launch 'no-such'", "layer_map_cpu"]),
    ],
)
def test_what_cannot_be_started_is_refused_in_one_line(saekit_train, tmp_path, options, variables, parts):
    running = saekit_train(*settings(tmp_path), *options, **variables)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert errors.count("\n") == 1, errors
    assert all(part in errors for part in parts), errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "zero3-cpu"])  # the others: the signals below
def test_a_launch_file_by_name_trains(saekit_train, tmp_path, name):
    running = saekit_train(*settings(tmp_path), "--launch", name, from_nothing=name == "zero3-cpu")
    _, errors = running.communicate(timeout=200)
    assert running.returncode == 0, errors
    assert {"cpu": ", single,", "zero3-cpu": ", zero3 on 2 ranks ("}[name] in errors, errors
    steps = json.loads((tmp_path / "run" / "latest" / "checkpoint.json").read_text())["step"]
    assert steps == (12 if name == "cpu" else 6)
    assert "Traceback" not in errors
    assert "warning" not in errors.lower(), errors


@pytest.mark.slow
def test_an_error_of_the_workers_is_shown_once_and_its_code_is_passed_on(saekit_train, tmp_path):
    running = saekit_train(*settings(tmp_path), "--launch", "ddp-cpu", "--placement", "zero3")
    _, errors = running.communicate(timeout=100)
    assert running.returncode == 2
    assert errors.count("Error: ") == errors.count("\n") == 1, errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "number", "code"),
    [
        ("ddp-cpu", signal.SIGINT, 130),
        ("zero3-cpu", signal.SIGTERM, 0),
        ("layer-map-cpu", signal.SIGUSR1, 0),
    ],
)
def test_a_signal_saves_and_says_how_to_go_on(saekit_train, tmp_path, name, number, code):
    running = saekit_train(*settings(tmp_path, sequences=40_000), "--launch", name)
    before = "".join(takewhile(lambda line: not line.startswith("step "), running.stderr))
    assert f", {name.removesuffix('-cpu')} on 2 ranks" in before, before
    if number == signal.SIGINT:
        os.killpg(running.pid, number)  # what a terminal does: everybody in the foreground gets it
    else:
        running.send_signal(number)  # a scheduler: only the process that it started
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code, errors
    assert errors.count("Stopped after step ") == 1, errors
    assert "Traceback" not in errors
    assert "death signal" not in errors
    command = errors.strip().splitlines()[-1].split()
    assert command[:6] == ["saekit", "train", "--launch", name, "--num-processes", "2"]
    assert command[-2:] == ["--resume", str(tmp_path / "run")]
    assert (tmp_path / "run" / "latest" / "checkpoint.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distribute-layers", "--placement", "ddp"], "--distribute-layers contradicts --placement ddp"),
        (["--distribute-layers"], "--placement layer-map needs several processes"),
    ],
)
def test_distribute_layers_is_the_layer_map(saekit_train, tmp_path, options, message):
    running = saekit_train(*settings(tmp_path), *options)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 2
    assert message in errors
