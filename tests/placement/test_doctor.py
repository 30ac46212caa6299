"""`saekit doctor` on several ranks: what it finds on a cluster that works, and on ones that do not."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
KINDS = ["all_reduce", "broadcast", "all_gather", "gather", "all_gather_into_tensor", "reduce_scatter_tensor"]
KINDS += ["all_to_all_single", "all_gather_object"]


@pytest.fixture
def doctor(forked, tmp_path):
    """`doctor(fault)` runs it on two ranks and returns their exit codes and what they said."""

    def run(fault, *options):
        script = Path(__file__).with_name("doctor_rank.py")
        codes = forked.run([fault, "doctor", *options], 2, tmp_path / "said", tmp_path, timeout=120, script=script)
        return codes, (tmp_path / "said").read_text("utf-8")

    return run


def test_ranks_that_can_train_together(doctor, tmp_path):
    codes, said = doctor("none", "--json")
    assert codes == [0, 0], said
    report = json.loads(said[said.index("{") :])
    found = {each["name"]: each for each in report["findings"]}
    assert set(found) > {"join", "devices", "backends", "cores", "save-dir", "data sets", "clocks", "versions", *KINDS}
    assert report["problems"] == 0
    assert "2 ranks on 1 machine, --placement ddp" in found["join"]["found"]
    assert found["devices"]["found"] == "cpu: ranks 0-1"
    assert found["backends"]["found"] == "strict for tensors, gloo for small values"  # see `tests.strict`
    assert "each rank sends " in found["all_reduce speed"]["found"]
    assert str(tmp_path / "checkpoints") in found["save-dir"]["found"]
    assert [path.name for path in tmp_path.iterdir()] == ["said"], "it leaves nothing behind"


def test_a_rank_that_does_not_come_is_named_when_time_runs_out(doctor):
    began = time.monotonic()
    codes, said = doctor("stuck", "--limit", "600")
    assert time.monotonic() - began < 60
    assert codes[0] == 1, said
    assert codes[1] != 0, said
    assert said.count("did not finish within 600 s") == 1, said
    text = " ".join(said.split())
    assert "ranks 0-1 are at all_gather" in text, said
    assert "→ name the network's interface" in text, said
    assert "✓ broadcast" in text, "earlier findings are shown"


@pytest.mark.usefixtures("lost_unnoticed")
def test_an_error_on_one_rank_ends_all_and_is_shown_once(doctor):
    codes, said = doctor("raising")
    assert codes[0] == 1, said
    assert codes[1] != 0, said
    assert said.count("rank 1: RuntimeError: out of memory") == 1, said
    assert "Traceback" not in said


def test_machines_that_are_not_alike(doctor):
    codes, said = doctor("apart")
    assert codes[0] == 1, said
    assert codes[1] in (0, -signal.SIGTERM), (
        "it finds nothing wrong, unless it is ended with the first before it is done"
    )
    text = " ".join(said.split())
    assert "rank 1 (other) does not see rank 0's" in text, said
    assert "use --save-dir FOLDER, an absolute path on a disk that all machines see" in text
    assert "2.0.0: rank 1" in text
    assert "other (rank 1) differs from rank 0 by +90" in text
    assert "2 things to fix: save-dir, torch." in text


def test_the_ranks_of_a_launch_file(tmp_path, forked):
    done = forked.complete("-m", "saekit", "doctor", "--launch", "zero3-cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--placement zero3" in done.stdout
    assert "✓ reduce_scatter_tensor" in done.stdout
    assert "These processes can train together." in done.stdout
    assert os.listdir(tmp_path) == []
