"""When one rank fails, all end, the error is shown once, and the last checkpoint can be read."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from datasets import Dataset

from saekit.runs.lock import hold
from saekit.runs.recovery import read_index
from tests.forked import environment
from tests.placement.conftest import CTX_LEN, DEMO_LM

pytestmark = pytest.mark.slow
SMALL = ["--num-latents", 64, "--k", 4, "--ctx-len", CTX_LEN, "--batch-size", 2, "--no-shuffle", "--run-name", "run"]
BROKEN_SOURCE = """
from saekit.errors import UserError
from saekit.registry import SOURCES


@SOURCES.register("broken")
def open_broken(cfg, placement, say, have):
    source = SOURCES.get("live")(cfg, placement, say, have)
    read = source.read

    def read_or_not(step):
        if (placement.rank, step) == (1, 1):
            raise UserError("rank 1 cannot read step 2")
        return read(step)

    source.read = read_or_not
    return source
"""
PLACEMENTS = ["ddp", "layer-map", "zero3"]


def start(folder, model, ids, *options):
    Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(folder / "data")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "saekit", "train"]
    command = [sys.executable, *launcher, model, folder / "data", *SMALL, "--save-dir", folder, *options]
    parts = [str(part) for part in command]
    return subprocess.Popen(parts, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ids(sequences):
    return torch.randint(2, 2000, (sequences, CTX_LEN), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_an_error_on_one_rank_ends_all_and_is_shown_once(tmp_path, placement):
    (tmp_path / "broken.py").write_text(BROKEN_SOURCE)
    broken = ["--plugin", tmp_path / "broken.py", "--source", "broken"]
    running = start(tmp_path, DEMO_LM, ids(40), "--placement", placement, *broken)
    _, errors = running.communicate(timeout=90)
    assert running.returncode != 0
    assert errors.count("Error: rank 1 cannot read step 2") == 1, errors
    assert errors.count("Error: ") - errors.count("ChildFailedError: ") == 1, errors


def test_an_error_on_all_ranks_is_shown_once(tmp_path):
    running = start(tmp_path, tmp_path / "no-such-model", ids(40))
    _, errors = running.communicate(timeout=90)
    assert running.returncode != 0
    assert errors.count("there is no such folder") == 1, errors


def test_a_folder_in_use_is_refused_on_all_ranks_and_said_once(tmp_path, forked, token_dir):
    command = ["train", DEMO_LM, token_dir, *SMALL, "--placement", "ddp", "--save-dir", tmp_path]
    with hold(tmp_path / "run"):
        codes = forked.run(command, 2, tmp_path / "said", tmp_path, timeout=90)
    said = (tmp_path / "said").read_text("utf-8")
    assert 2 in codes, said
    assert 0 not in codes, said
    assert said.count("Error: ") == said.count(f"is in use: process {os.getpid()} on") == 1, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("placement", "victim"), [("ddp", 0), ("ddp", 1), ("layer-map", 0), ("zero3", 1)])
def test_a_killed_rank_ends_the_others_and_leaves_the_checkpoint(tmp_path, placement, victim):
    running = start(tmp_path, DEMO_LM, ids(20_000), "--placement", placement, "--save-every", 3)
    latest = tmp_path / "run" / "latest"
    deadline = time.monotonic() + 90
    while not latest.exists():
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = {int(child.environ()["RANK"]): child for child in psutil.Process(running.pid).children()}
    workers[victim].send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(list(workers.values()), timeout=30)
    assert not alive
    running.communicate(timeout=30)
    assert running.returncode != 0
    assert read_index(latest)["hookpoints"] == [f"layers.{layer}" for layer in range(6)]
