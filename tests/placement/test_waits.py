"""Ranks that wait for a slow one: not in a collective of the training, whose time is limited."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from saekit.placement import Single
from tests.placement.conftest import DEMO_LM
from tests.together import Together

SLOW = """
import json
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed.distributed_c10d import _world

from saekit.placement import world
from saekit.runs import checkpoint
from saekit.training import live

world.COLLECTIVE_TIMEOUT = timedelta(seconds=5)
load, write = live._load_data, checkpoint._write_layer


socket.gethostname = lambda: "first" if os.environ["RANK"] == "0" else "second"


def slow_load(*arguments):
    began = time.time()
    time.sleep([0, 2, 8][int(os.environ["RANK"])])
    data = load(*arguments)
    Path("read" + os.environ["RANK"]).write_text(json.dumps([began, time.time()]))
    return data


def slow_write(folder, record):
    if os.environ["RANK"] == "1" and not Path("timeouts").exists():
        backends = [group._get_backend(torch.device("cpu")) for group in _world.pg_map]
        Path("timeouts").write_text(json.dumps([each.options._timeout.total_seconds() for each in backends]))
        time.sleep(10)
    return write(folder, record)


live._load_data, checkpoint._write_layer = slow_load, slow_write
"""
"""Collectives of the training may take 5 seconds. Rank 2 takes 8 to read its data, rank 1 10 to write its first layer.

Rank 0 is on a machine of its own.
"""


@pytest.mark.slow
def test_a_slow_disk_and_a_slow_tokenizer_are_waited_for(tmp_path, forked, token_dir):
    """The language model and six layers are sharded over three ranks: a save has two waves."""
    (tmp_path / "slow.py").write_text(SLOW)
    sizes = ["--num-latents", 64, "--k", 4, "--ctx-len", 16, "--batch-size", 2, "--max-tokens", 128]
    place = ["--placement", "zero3", "--shard-lm", "--save-dir", tmp_path, "--run-name", "run"]
    command = ["train", DEMO_LM, token_dir, *sizes, *place, "--plugin", tmp_path / "slow.py"]
    codes = forked.run(command, 3, tmp_path / "said", tmp_path, timeout=90)
    assert codes == [0, 0, 0], (tmp_path / "said").read_text("utf-8")
    read = [json.loads((tmp_path / f"read{rank}").read_text()) for rank in range(3)]
    assert read[0][1] <= read[1][0], "the second machine reads what the first one has left in the cache"
    assert read[1][1] <= read[2][0], "and its other rank what its first one has"
    assert (tmp_path / "run" / "latest" / "checkpoint.json").exists()
    timeouts = json.loads((tmp_path / "timeouts").read_text())
    assert set(timeouts) == {5, 24 * 3600}
    assert timeouts.count(24 * 3600) == 1


@pytest.mark.parametrize(
    ("machines", "shared", "expected"),
    [("aabb", False, [0, 2]), ("aabb", True, [0]), ("abab", False, [0, 1]), ("aaaa", False, [0])],
)
def test_each_cache_is_filled_once(monkeypatch, machines, shared, expected):
    together, caches, filled, here = Together(4), {}, [], threading.local()
    monkeypatch.setattr(socket, "gethostname", lambda: here.machine)

    def rank_of(rank):
        here.machine = machines[rank]
        placement = Single(torch.device("cpu"))
        placement.rank, placement.gather = rank, together.gather(rank)
        with placement.in_turn():
            cache = "all" if shared else here.machine
            if cache not in caches:
                time.sleep(0.05)  # the others of this turn come here, too
                caches[cache] = filled.append(rank)

    with ThreadPoolExecutor(4) as ranks:
        list(ranks.map(rank_of, range(4)))
    assert sorted(filled) == expected
