"""Killed at any moment and resumed, a run ends as if nothing had happened, bit for bit."""

import random
import re

import numpy as np
import pytest

from tests.training.killer import Killer
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

MANY, FEW = {"start": 3, "step": 5, "save": 5}, {"start": 1, "step": 2, "save": 3}
"""How often a run is killed amid what, at least."""
KINDS = {
    "mixed": "--optimizer adam --hookpoints layers.0,layers.1.mlp.down_proj:in",
    "skip": "--optimizer signum --skip-connection --reads layers.0.mlp.down_proj:in,layers.0 "
    "--writes layers.0.mlp,layers.1.mlp",
    "cross": "--optimizer adam --mix 4 --crosscode layers.0,layers.1.mlp.down_proj:in",
}
"""SAEs of two widths; transcoders of two widths, one of them from a layer to the next; a crosscoder of mixed
tokens."""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "seed", "kills"), [("mixed", 31, MANY), ("skip", 32, FEW), ("cross", 33, FEW)])
def test_killed_and_resumed_is_bit_identical(tmp_path, model_dir, forked, kind, seed, kills):
    steps = 10 * sum(kills.values())  # twice as many as it gets to through so many kills
    np.random.default_rng(0).integers(2, 250, steps * 4 * 16, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    sizes = ["--ctx-len", 16, "--num-latents", 64, "--k", 4, "--batch-size", 2, "--grad-acc-steps", 2]
    options = [*KINDS[kind].split(), "--dead-feature-threshold", 1000, "--auxk-alpha", 1 / 32]
    options += ["--save-every", 3, "--keep-last", 2]
    command = ["train", model_dir, tmp_path / "tokens.bin", *sizes, *options, "--save-best", "--save-dir", tmp_path]

    assert forked.run([*command, "--run-name", "whole"], None, tmp_path / "whole.log", tmp_path, 120) == [0]
    again = [*command, "--run-name", "r", "--resume", "auto"]
    killed = Killer(forked, tmp_path / "r", again, random.Random(seed)).until_done(kills)
    assert all(killed[amid] >= times for amid, times in kills.items()), f"it was done too early: {killed}"
    resumed_at = re.findall(r"Resuming from .*step_0*(\d+)", (tmp_path / "r.log").read_text())
    assert len(set(resumed_at)) >= sum(kills.values()) / 3, resumed_at
    for link in ("latest", "best"):
        found, expected = (tmp_path / run / link for run in ("r", "whole"))
        assert found.resolve().name == expected.resolve().name
        assert_same_tensors(tensors_of(found), tensors_of(expected))
    metrics = metrics_of(tmp_path / "whole")
    assert [record["step"] for record in metrics] == list(range(1, steps + 1))
    assert metrics_of(tmp_path / "r") == metrics
    assert any(layer["auxk_loss"] > 0 for record in metrics for layer in record["layers"].values())
