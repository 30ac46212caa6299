"""Ranks that wait for a slow one: not in a collective of the training, whose time is limited."""

import json

import pytest

from tests.placement.conftest import DEMO_LM

SLOW = """
import json
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import _world

from saekit.placement import world
from saekit.runs import checkpoint
from saekit.training import live

world.AT_WORK = timedelta(seconds=5)
load, write = live._load_data, checkpoint._write_layer


def slow_load(*arguments):
    time.sleep(10 * int(os.environ["RANK"]))
    return load(*arguments)


def slow_write(folder, record):
    if os.environ["RANK"] == "1" and not Path("timeouts").exists():
        backends = [group._get_backend(torch.device("cpu")) for group in _world.pg_map]
        Path("timeouts").write_text(json.dumps([each.options._timeout.total_seconds() for each in backends]))
        time.sleep(10)
    return write(folder, record)


live._load_data, checkpoint._write_layer = slow_load, slow_write
"""
"""Collectives of the training may take 5 seconds. Rank 1 takes 10 to read its data, and 10 to write its first layer."""


@pytest.mark.slow
def test_a_slow_disk_and_a_slow_tokenizer_are_waited_for(tmp_path, forked, token_dir):
    """The language model and six layers are sharded over two ranks: a save has three waves."""
    (tmp_path / "slow.py").write_text(SLOW)
    sizes = ["--num-latents", 64, "--k", 4, "--ctx-len", 16, "--batch-size", 2, "--max-tokens", 128]
    place = ["--placement", "zero3", "--shard-lm", "--save-dir", tmp_path, "--run-name", "run"]
    command = ["train", DEMO_LM, token_dir, *sizes, *place, "--plugin", tmp_path / "slow.py"]
    codes = forked.run(command, 2, tmp_path / "said", tmp_path, timeout=90)
    assert codes == [0, 0], (tmp_path / "said").read_text("utf-8")
    assert (tmp_path / "run" / "latest" / "checkpoint.json").exists()
    timeouts = json.loads((tmp_path / "timeouts").read_text())
    assert set(timeouts) == {5, 24 * 3600}
    assert timeouts.count(24 * 3600) == 1
