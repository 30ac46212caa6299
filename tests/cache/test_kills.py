"""`saekit cache` that SIGKILL ends at any moment leaves nothing that the next one does not put right."""

import random
import signal
import time

import numpy as np

T, SHARDS = 16, 40
AIMS = ("start", "shards", "shards", "file", "file")
"""Killed before the index is there, after some more shards, amid a shard's file."""


def test_a_cache_that_was_killed_has_the_same_shards(tmp_path, model_dir, forked):
    np.random.default_rng(0).integers(2, 250, SHARDS * 4 * T, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    out, log, chance = tmp_path / "cache", tmp_path / "log", random.Random(5)
    command = ["cache", model_dir, tmp_path / "tokens.bin", "--ctx-len", T, "--batch-size", 4, "--shard-size", "10KiB"]
    command += ["--hookpoints", "layers.0,layers.1.mlp", "--dtype", "float32", "--out"]
    assert forked.run([*command, tmp_path / "whole"], None, log, tmp_path, 120) == [0], log.read_text()
    whole = sorted((tmp_path / "whole").glob("shard_*"))
    assert len(whole) == SHARDS

    def moment(aim, before):
        if aim == "start":
            return out.exists()
        if aim == "file":
            return any(out.glob(".shard_*.tmp"))
        return len(list(out.glob("shard_*"))) >= before + 3

    killed = []
    for aim in AIMS:
        child = forked.start("-m", "saekit", *command, out, log=log, cwd=tmp_path)
        before = len(list(out.glob("shard_*")))
        while child.poll() is None and not moment(aim, before):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0.0, 0.003))
        child.kill()
        assert child.wait() == -signal.SIGKILL, log.read_text()
        killed.append(len(list(out.glob("shard_*"))))
    assert 0 < killed[-1] < SHARDS, killed
    assert forked.run([*command, out], None, log, tmp_path, 120) == [0], log.read_text()
    assert {each.name for each in out.iterdir()} == {each.name for each in (tmp_path / "whole").iterdir()}
    for shard in whole:
        assert (out / shard.name).read_bytes() == shard.read_bytes()
