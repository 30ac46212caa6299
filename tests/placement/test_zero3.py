"""What only sharding promises."""

import subprocess
import sys

import pytest

from tests.forked import environment
from tests.placement.conftest import DEMO_LM

pytestmark = pytest.mark.slow


def torchrun(*command, ranks=2, **variables):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    parts = [str(part) for part in (*launcher, *command)]
    return subprocess.run(
        parts, env=environment() | variables, capture_output=True, text=True, timeout=200, check=False
    )


def test_no_more_than_one_layer_is_whole_at_a_time(tmp_path):
    result = torchrun("-m", "tests.placement.whole_layers", tmp_path)
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if "WHOLE" in line)
    forward, backward, between, forwards, backwards, _ = (int(word) for word in line.split()[1:])
    assert forwards == backwards == 3 * 6  # 24 sequences in steps of 2 x 4, for 6 layers
    assert (forward, backward, between) == (1, 1, 0)


def test_a_sharded_language_model_says_what_the_whole_one_does(gpt2_dir):
    result = torchrun("-m", "tests.placement.sharded_lm", gpt2_dir)
    assert result.returncode == 0, result.stderr
    share, furthest = next(line for line in result.stdout.splitlines() if "SHARE" in line).split()[1:]
    assert float(share) == 0.5
    assert float(furthest) == 0


@pytest.mark.parametrize("placement", ["ddp", "layer-map"])
def test_nobody_else_shards_the_language_model(tmp_path, token_dir, placement):
    options = ["--num-latents", 64, "--k", 4, "--ctx-len", 16, "--save-dir", tmp_path, "--batch-size", 2]
    named = ["--placement", placement] if placement == "layer-map" else []  # ddp is what torchrun alone means
    result = torchrun("-m", "saekit", "train", DEMO_LM, token_dir, *named, "--shard-lm", *options)
    assert result.returncode != 0
    assert result.stderr.count("Error: --shard-lm") == 1, result.stderr
    assert placement in result.stderr


def test_an_optimizer_that_needs_whole_matrices_is_refused(tmp_path, token_dir):
    options = ["--num-latents", 64, "--k", 4, "--ctx-len", 16, "--save-dir", tmp_path, "--batch-size", 2]
    result = torchrun(
        "-m", "saekit", "train", DEMO_LM, token_dir, "--placement", "zero3", "--optimizer", "muon", *options
    )
    assert result.returncode != 0
    assert result.stderr.count("zero3 cannot train with --optimizer muon") == 1, result.stderr
