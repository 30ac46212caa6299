"""What `saekit config` writes starts: the printed command, on two real processes, under each placement once."""

import json
import os
import subprocess

import pytest
import yaml
from datasets import Dataset

from saekit.demo import MODEL_DIR
from tests.wizard.test_terminal import ESCAPE, wizard  # noqa: F401  # the last is a fixture

DEMO_LM = MODEL_DIR
SMALL = ("--num-latents", 32, "--k", 2, "--ctx-len", 16, "--batch-size", 2, "--layers", "0,3")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*use of forkpty:DeprecationWarning")]


@pytest.fixture
def data(tmp_path):
    Dataset.from_dict({"input_ids": [[7, 8, 9, 10 + i % 90] * 4 for i in range(24)]}).save_to_disk(tmp_path / "d")
    return "d"


@pytest.fixture
def execute(environment, tmp_path):
    """Run a command in a shell, with `saekit` and `accelerate` on its path."""

    def execute(command):
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    return execute


def steps(folder, name):
    return json.loads((folder / "checkpoints" / name / "latest" / "checkpoint.json").read_text())["step"]


def test_yes_and_the_printed_command(config, execute, tmp_path, data):
    options = (*SMALL, "--run-name", "mine", "--num-processes", 2, "--placement", "ddp")
    done = config("--yes", DEMO_LM, data, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "saekit train --config run.yaml --launch launch.yaml\n"
    said = execute(done.stdout)
    assert ", ddp on 2 ranks" in said
    assert steps(tmp_path, "mine") == 6
    # Again: what it would write next has a folder that is free.
    assert config("--yes").returncode == 0
    assert yaml.safe_load((tmp_path / "run.yaml").read_text())["run_name"] == "mine-2"


def test_typed_answers_and_the_printed_command(execute, tmp_path, data, wizard):  # noqa: F811
    running = wizard()
    running.answer(("machine", "1", "2"), ("model", "", DEMO_LM), ("dataset", "", data), ("hookpoints", "resid", ""))
    running.answer(("layers", "all", "0,3"))
    running.answer(("dictionary", "32x", "32 latents"), ("k", "32", "2"), ("ctx_len", "512", "16"))
    running.answer(("max_tokens", "all", "320"), ("batch_size", "8", "2"))
    running.asks("placement", "layer-map")
    running.send(ESCAPE)
    running.answer(("batch_size", "2", ""), ("placement", "layer-map", "zero3"), ("run", "checkpoints/", ""))
    running.answer(("confirm", "yes", ""))
    command = running.ends(0).splitlines()[-1]
    assert ", zero3 on 2 ranks (" in execute(command)
    assert steps(tmp_path, "model-d") == 5  # 320 tokens, 64 in a step


def test_the_launch_file_is_one_for_accelerate(config, execute, tmp_path, data):
    options = (*SMALL, "--run-name", "mine", "--num-processes", 2, "--placement", "layer-map")
    assert config("--yes", DEMO_LM, data, *options).returncode == 0
    command = "accelerate launch --config_file launch.yaml --main_process_port 0 -m saekit train --config run.yaml"
    assert ", layer-map on 2 ranks" in execute(command)
    assert steps(tmp_path, "mine") == 6


def test_one_process(config, execute, tmp_path, data):
    done = config("--yes", DEMO_LM, data, *SMALL, "--run-name", "mine")
    assert done.stdout == "saekit train --config run.yaml\n"
    assert sorted(os.listdir(tmp_path)) == ["d", "run.yaml"]
    assert ", single," in execute(done.stdout)
    assert steps(tmp_path, "mine") == 12
