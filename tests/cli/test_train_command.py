"""`saekit train` and `saekit inspect` as a user calls them."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

SMALL = ["--ctx-len", "32", "--num-latents", "64", "--k", "4", "--batch-size", "4"]


def test_underscores_are_dashes(train, tmp_path):
    assert train("--grad_acc_steps", "2", "--run_name", "r").code == 0
    assert yaml.safe_load((tmp_path / "checkpoints/r/config.yaml").read_text())["grad_acc_steps"] == 2


def test_file_gives_defaults_and_the_command_line_overrides(train, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("grad-acc-steps: 2\nlr: 0.01\nexpansion_factor: 2\nrun_name: r\n")
    assert train("--config", file, "--lr", "0.02", "--num-latents", "48").code == 0
    saved = yaml.safe_load((tmp_path / "checkpoints/r/config.yaml").read_text())
    assert (saved["grad_acc_steps"], saved["lr"], saved["num_latents"]) == (2, 0.02, 48)
    assert "expansion_factor" not in saved


def test_the_saved_configuration_repeats_the_run(saekit, train, tmp_path):
    assert train("--run-name", "first", "--multi-topk", "--exclude-tokens", "5").code == 0
    result = saekit("train", "--config", "checkpoints/first/config.yaml", "--run-name", "second")
    assert result.code == 0, result.err
    runs = tmp_path / "checkpoints"
    assert_same_tensors(tensors_of(runs / "second/latest"), tensors_of(runs / "first/latest"))
    assert metrics_of(runs / "second") == metrics_of(runs / "first")


def test_the_token_is_written_nowhere(train, tmp_path):
    secret = "hf_thisIsVerySecret"
    result = train("--hf-token", secret, "--run-name", "r")
    assert result.code == 0
    assert secret not in result.out + result.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_default_run_name(train, tmp_path, model_dir):
    assert train().code == 0
    assert (tmp_path / "checkpoints" / f"{model_dir.name}-text.jsonl").is_dir()


def test_plain_lines_on_a_pipe(train):
    result = train("--run-name", "r")
    assert result.out == ""
    assert "\x1b" not in result.err
    assert "step 16/16" in result.err
    assert "layers.1" in result.err
    looks = [f"  saekit {verb} checkpoints/r" for verb in ("inspect", "eval", "report")]
    assert result.err.splitlines()[-4:] == ["Look at it with:", *looks]


def test_inspect_text_and_json(saekit, train, tmp_path):
    assert train("--run-name", "r", "--layers", "0,2").code == 0
    for path in ("checkpoints/r", "checkpoints/r/latest", "checkpoints/r/latest/layers.2"):
        shown = saekit("inspect", path)
        assert shown.code == 0, shown.err
        assert "layers.2" in shown.out
    data = json.loads(saekit("inspect", "checkpoints/r", "--json", "--layer", "2").out)
    text = json.dumps(data)
    assert "layers.2" in text
    assert "layers.0" not in text


@pytest.fixture(scope="module")
def spawn(forked):
    """Start `saekit`, by default as a process that need not import anything (`tests.forked`)."""
    environment = {name: value for name, value in forked.environment().items() if name != "CI"}

    def start(arguments, cwd, from_nothing=False, **kwargs):
        python = sys.executable if from_nothing else forked.python
        command = [str(part) for part in (python, "-m", "saekit", *arguments)]
        return subprocess.Popen(command, cwd=cwd, env=environment, **kwargs)

    return start


def wait_for(condition, process, seconds=120):
    """Poll until a condition holds; fail if the process ends first or time runs out."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def arguments(model_dir, text_file):
    return ["train", model_dir, text_file, *SMALL, "--run-name", "r", "--grad-acc-steps", "4", "--layers", "0-2"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, arguments, spawn):
    """The folder of a run that no signal reaches."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert spawn(arguments, folder, stderr=subprocess.DEVNULL).wait(timeout=200) == 0
    return folder / "checkpoints/r"


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, arguments, uninterrupted, spawn, number, code):
    """A real process, a real signal; the command it prints is then really run, and ends as if nothing had happened."""
    real = number == signal.SIGINT
    process = spawn(arguments, tmp_path, from_nothing=real, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "checkpoints/r/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "Traceback" not in err
    command = err.strip().splitlines()[-1].split()
    assert command[0] == "saekit"
    assert command[-2:] == ["--resume", "checkpoints/r"]
    stopped_at = json.loads((tmp_path / "checkpoints/r/latest/checkpoint.json").read_text())["step"]

    resumed = spawn(command[1:], tmp_path, stderr=subprocess.PIPE, text=True)
    _, err = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, err
    whole, parts = uninterrupted, tmp_path / "checkpoints/r"
    assert stopped_at < len(metrics_of(whole))
    assert metrics_of(parts) == metrics_of(whole)
    assert_same_tensors(tensors_of(parts / "latest"), tensors_of(whole / "latest"))


@pytest.mark.slow
def test_the_live_view_on_a_terminal(tmp_path, model_dir, text_file, spawn):
    """On a pseudo-terminal the run draws, and gives the cursor back."""
    master, slave = pty.openpty()
    arguments = ["train", model_dir, text_file, *SMALL, "--max-tokens", "8192", "--run-name", "r"]
    process = spawn(arguments, tmp_path, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        seen += piece
    assert process.wait(timeout=60) == 0
    text = seen.decode()
    for part in ("layers.0", "layers.2", "FVU", "dead", "\x1b[?25l", "saved step"):
        assert part in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.slow
def test_python_api_of_the_readme(tmp_path, model_dir, text_file, forked):
    """The lines that users of this recipe know, as they stand, in a fresh process."""
    code = f"""
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
gpt = AutoModelForCausalLM.from_pretrained({str(model_dir)!r})
tokenizer = AutoTokenizer.from_pretrained({str(model_dir)!r})
dataset = load_dataset("json", data_files={str(text_file)!r}, split="train")

from saekit import Sae, SaeConfig, SaeTrainer, TrainConfig
from saekit.data import chunk_and_tokenize
tokenized = chunk_and_tokenize(dataset, tokenizer)
cfg = TrainConfig(SaeConfig(gpt.config.hidden_size), batch_size=16)
checkpoint = SaeTrainer(cfg, tokenized, gpt).fit()
saes = Sae.load_many(checkpoint)
assert list(saes) == ["layers.0", "layers.1", "layers.2"], saes
assert saes["layers.1"].num_latents == 32 * 16
acts, indices = saes["layers.1"].encode(gpt.get_input_embeddings().weight[:5])
assert saes["layers.1"].decode(acts, indices).shape == (5, 16)
"""
    done = forked.complete("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["-m", "saekit"], ["-m", "accelerate.commands.launch", "--cpu", "-m", "saekit"]])
def test_launchers(tmp_path, model_dir, text_file, forked, launcher):
    command = ["train", model_dir, text_file, *SMALL, "--max-tokens", "2048", "--run-name", "r"]
    done = forked.complete(*launcher, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path / "checkpoints/r/latest/layers.2/sae.safetensors").is_file()
