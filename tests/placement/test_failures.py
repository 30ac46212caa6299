"""When one rank fails, all end, the error is shown once, and the last checkpoint can be read."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from datasets import Dataset

from saekit.errors import UserError
from saekit.placement import Single, failure
from saekit.placement.failure import FailureWatch, one_error
from saekit.runs.lock import hold
from saekit.runs.recovery import read_index
from tests.forked import environment, processes_of
from tests.placement.conftest import CTX_LEN, DEMO_LM

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lost_unnoticed")]
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
STUCK = """
import atexit
import ctypes

from saekit.errors import UserError
from saekit.registry import SOURCES

lock = ctypes.CDLL(None).pthread_mutex_lock


def wait_for_ever():
    mutex = ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)  # without Python's lock, as in NCCL: no signal handler runs


@SOURCES.register("stuck")
def open_stuck(cfg, placement, say, have):
    source = SOURCES.get("live")(cfg, placement, say, have)
    run, batches = source._run, []

    def run_or_not(batch):
        batches.append(batch)
        if len(batches) == 3 and placement.rank == 0:
            wait_for_ever()
        if len(batches) == 3:
            atexit.register(wait_for_ever)  # as communicators that are taken down
            raise UserError("rank 1 cannot run batch 3")
        return run(batch)

    source._run = run_or_not
    return source
"""
FROM_PYTHON = """
import sys

from saekit import train

_, model, data, folder, plugin = sys.argv
options = {"num_latents": 64, "k": 4, "ctx_len": 16, "batch_size": 2, "layers": [0], "run_name": "run"}
train(model, data, save_dir=folder, plugin=[plugin], source="stuck", **options)
"""


@pytest.fixture
def start(forked):
    """Start two ranks with torchrun."""

    def start(folder, model, ids, *options):
        Dataset.from_dict({"input_ids": ids.tolist()}).save_to_disk(folder / "data")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m", "saekit", "train"]
        pipe = subprocess.PIPE
        command = [forked.python, *launcher, model, folder / "data", *SMALL, "--save-dir", folder, *options]
        return subprocess.Popen(list(map(str, command)), env=forked.environment(), stdout=pipe, stderr=pipe, text=True)

    return start


def ids(sequences):
    return torch.randint(2, 2000, (sequences, CTX_LEN), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("placement", ["ddp", "layer-map", "zero3"])
def test_an_error_on_one_rank_ends_all_and_is_shown_once(start, tmp_path, placement):
    (tmp_path / "broken.py").write_text(BROKEN_SOURCE)
    broken = ["--plugin", tmp_path / "broken.py", "--source", "broken"]
    running = start(tmp_path, DEMO_LM, ids(40), "--placement", placement, *broken)
    for line in running.stderr:
        if line.startswith("Error: "):
            break
    began = time.monotonic()
    errors = line + running.communicate(timeout=90)[1]
    assert running.returncode != 0
    assert time.monotonic() - began < 20, "they leave by themselves: torchrun would kill them after 30 seconds"
    assert errors.count("Error: rank 1 cannot read step 2") == 1, errors
    assert errors.count("Error: ") - errors.count("ChildFailedError: ") == 1, errors


@pytest.mark.parametrize("api", [False, True], ids=["command line", "Python"])
def test_a_rank_that_no_signal_reaches_leaves_when_another_fails(tmp_path, forked, token_dir, api):
    """And the one that fails leaves without taking its connections down."""
    plugin, script = tmp_path / "stuck.py", tmp_path / "script.py"
    plugin.write_text(STUCK)
    script.write_text(FROM_PYTHON)
    command = ["train", DEMO_LM, token_dir, *SMALL, "--layers", 0, "--placement", "ddp", "--save-dir", tmp_path]
    command += ["--plugin", plugin, "--source", "stuck"]
    command = [DEMO_LM, token_dir, tmp_path, plugin] if api else command
    began = time.monotonic()
    codes = forked.run(command, 2, tmp_path / "said", tmp_path, timeout=60, script=script if api else None)
    said = (tmp_path / "said").read_text("utf-8")
    assert codes == [1, 1 if api else 2], said
    assert time.monotonic() - began < 30
    assert said.count("rank 1 cannot run batch 3\n") == 1, said
    assert said.count("Error: ") == 1, said


def test_a_failure_of_an_earlier_start_is_forgotten():
    """The store of torchrun stays when it starts the ranks again (--max-restarts)."""
    store = torch.distributed.HashStore()
    first, second, later = (FailureWatch(store, start, 1) for start in ("first", "first", "second"))
    assert (first.claim(), second.claim(), first.claim()) == (True, False, True)
    assert later.claim()


def test_a_failure_is_known_to_all_before_it_is_shown(monkeypatch):
    """The store may go with the launcher of the rank that fails: the others must not take that for the failure."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(failure.atexit, "register", lambda *_: None)
    first, second = FailureWatch(store, "this", 2), FailureWatch(store, "this", 2)
    second.begin()
    assert first.claim()
    second.store = Gone()
    assert not second.claim()
    second.end()


class Gone:
    def add(self, key, value):
        raise RuntimeError("connection reset")


CLOSES = """
import time
import torch.distributed as dist
from saekit.placement import failure

failure.CLEANUP_SECONDS = 0.2
watch = failure.FailureWatch(dist.HashStore(), "only", 1)
watch.begin()
watch.closing(ValueError("the cause"))
time.sleep(50)  # as a tracker that waits for its server
"""


def test_an_error_is_shown_although_something_does_not_close():
    done = subprocess.run([sys.executable, "-c", CLOSES], env=environment(), capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stderr) == (1, "\nError: the cause\n")


def test_what_is_caught_without_a_watch_ends_nothing():
    before = threading.active_count()
    FailureWatch(torch.distributed.HashStore(), "only", 1).closing(ValueError("the cause"))
    assert threading.active_count() == before


def test_a_watch_ends_quietly_when_all_is_done():
    watch = FailureWatch(torch.distributed.HashStore(), "only", 1)
    watch.begin()
    watch.begin()
    watch.leave()
    watch.end()
    assert not watch._thread.is_alive()


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (
            RuntimeError("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), False),
        (ValueError("gloo"), False),
    ],
)
def test_a_connection_that_is_gone_says_that_a_rank_is(error, gone):
    class TwoRanks(Single):
        world_size = 2

    with (
        pytest.raises(UserError if gone else type(error)) as raised,
        one_error(TwoRanks(torch.device("cpu")), lambda: "start it again"),
    ):
        raise error
    assert raised.value is error or "another rank of this run has ended" in str(raised.value)


def test_an_error_on_all_ranks_is_shown_once(start, tmp_path):
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
def test_a_killed_rank_ends_the_others_and_leaves_the_checkpoint(start, tmp_path, monkeypatch, placement, victim):
    monkeypatch.delenv("STRICT_LOST")  # a rank that hangs is killed by torchrun, after 30 seconds whatever it is told
    options = ["--placement", placement, "--save-every", 3]
    running = start(tmp_path, DEMO_LM, ids(20_000), *options)
    latest = tmp_path / "run" / "latest"
    deadline = time.monotonic() + 90
    while not latest.exists():
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    found = {process: process.environ().get("RANK") for process in processes_of(tmp_path)}
    workers = {int(rank): process for process, rank in found.items() if rank is not None}
    assert sorted(workers) == [0, 1]
    workers[victim].send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(list(workers.values()), timeout=30)
    assert not alive
    running.communicate(timeout=30)
    assert running.returncode != 0
    assert read_index(latest)["hookpoints"] == [f"layers.{layer}" for layer in range(6)]
