"""Two processes that want one run's folder: one trains in it, the other says why it does not, or waits."""

import signal

import numpy as np
import pytest

from saekit.runs.recovery import read_index
from tests.training.rivals import Rivals
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of

PLAN = [
    ["held", "start", "goes on"],
    ["held", "overwrite", "is killed"],
    ["held", "resume", "goes on"],
    ["held", "auto", "is killed"],
    *(["race", way, way] for way in ("start", "overwrite", "resume", "auto")),
]


@pytest.fixture(scope="module")
def came(tmp_path_factory, model_dir, forked):
    """The folder, and what came of each part of the plan."""
    root = tmp_path_factory.mktemp("rivals")
    np.random.default_rng(0).integers(2, 250, 480 * 16, dtype=np.uint16).tofile(root / "tokens.bin")
    options = ["--ctx-len", 16, "--num-latents", 64, "--k", 4, "--batch-size", 4, "--layers", 1]
    options += ["--save-every", 25, "--keep-last", 2, "--save-dir", root, "--grace", 90]
    command = ["train", model_dir, root / "tokens.bin", *options]
    rivals = Rivals(forked, root, command)
    rivals.prepare()
    return root, {(part, *arguments): getattr(rivals, part)(*arguments) for part, *arguments in PLAN}


def assert_one_run(root, name):
    """Everything in a run's folder is of one run, which went as if it had been alone."""
    run, whole = root / name, root / "whole"
    assert metrics_of(run) == metrics_of(whole)
    assert [record["step"] for record in metrics_of(run)] == list(range(1, 121))
    for folder in run.glob("step_*"):
        read_index(folder)
    assert_same_tensors(tensors_of(run / "latest"), tensors_of(whole / "latest"))
    assert not list(run.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [part[1:] for part in PLAN if part[0] == "held"])
def test_the_one_that_trains_is_not_disturbed(came, first, then):
    root, found = came
    found = found["held", first, then]
    assert found["same"]
    assert found["code"] == (0 if then == "goes on" else -signal.SIGKILL)
    for second in ("start", "overwrite", "resume"):
        said = found["said"][second]
        assert found["codes"][second] == 2, said
        (error,) = [line for line in said.splitlines() if line.startswith("Error: ")]
        assert f"is in use: process {found['pid']} on" in error
    said = found["said"]["auto"]
    assert found["codes"]["auto"] == 0, said
    assert f"for up to 90 seconds (--grace): process {found['pid']} on" in said
    # One that was killed before its first checkpoint is started again.
    assert ("Resuming from" in said) == (found["saved"] or then == "goes on")
    assert_one_run(root, found["run"])


@pytest.mark.slow
@pytest.mark.parametrize("ways", [tuple(part[1:]) for part in PLAN if part[0] == "race"], ids="-".join)
def test_of_two_that_begin_at_once_one_wins(came, ways):
    root, found = came
    found = found[("race", *ways)]
    codes = sorted(found["codes"])
    assert codes == ([0, 0] if "auto" in ways else [0, 2]), found["said"]
    loser = found["said"][found["codes"].index(codes[-1])]
    assert "is in use: process" in loser or "auto" in ways, loser
    assert_one_run(root, found["run"])
