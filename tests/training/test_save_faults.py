"""Whatever fails during a save, and wherever the process dies in it, the newest whole checkpoint is found and loads."""

import copy
import errno
import json
import os
import shutil
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import safetensors.torch
import torch

from saekit import SaeConfig
from saekit.errors import Interrupted, SaveError, UserError
from saekit.runs.checkpoint import fingerprint
from saekit.runs.layout import INDEX_FILE
from saekit.runs.recovery import find_checkpoint
from saekit.training import trainer as trainer_module
from saekit.training.saving import Saver
from tests.together import Together
from tests.training.conftest import KINDS, Recorder
from tests.training.runs import tensors_of

CALLS = {
    os: ["fsync", "replace", "mkdir", "symlink", "unlink", "rmdir"],
    safetensors.torch: ["serialize_file"],
    Path: ["write_text"],
}
"""Everything through which a save changes the disk."""


@dataclass
class Fault:
    """Strikes at the `at`-th change of the disk: before it, or in the middle of it.

    Of a change that has no middle `torn` is after it.
    """

    at: int
    when: str
    strike: Callable[[], None]
    seen: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def install(self, monkeypatch):
        for owner, names in CALLS.items():
            for name in names:
                monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name, real):
        def call(*args, **kwargs):
            with self.lock:
                self.seen.append(name)
                strikes = len(self.seen) == self.at
            if strikes and self.when == "before":
                self.strike()
            try:
                return real(*args, **kwargs)
            finally:  # also after one that found nothing to delete
                if strikes:
                    self.tear(name, args)
                    self.strike()

        return call

    def tear(self, name, args):
        if self.when == "torn" and name in ("serialize_file", "write_text"):
            file = args[0] if name == "write_text" else args[1]
            os.truncate(file, os.path.getsize(file) // 2)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class StopsAtFour(Recorder):
    def step(self, stats):
        super().step(stats)
        if stats.step == 3:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def saver(request, make_trainer, monkeypatch):
    """Of a run that stopped after step 4 and has that checkpoint; of SAEs of two widths unless a kind is asked for."""
    options, of_sae = KINDS[getattr(request, "param", "mixed")]
    options = {**options, "sae": SaeConfig(num_latents=64, k=4, **of_sae)}
    made = []
    monkeypatch.setattr(trainer_module, "Saver", lambda *args: made.append(Saver(*args)) or made[0])
    with pytest.raises(Interrupted):
        make_trainer(reporter=StopsAtFour(), **options).fit()
    return made[0]


def train_a_little(saver, step):
    """Stands in for the steps up to `step`: other weights."""
    saver.run.step = step
    for name in saver.placement.layers():
        with torch.no_grad():
            saver.placement.sae(name).W_dec.add_(0.001 * step)


def next_step(saver):
    """The ordinary save."""
    train_a_little(saver, 5)


def the_same_step_again(saver):
    """The run was at step 5 before, went back to step 3, and passes step 5 again."""
    for step in (5, 3):
        train_a_little(saver, step)
        saver.save()
    train_a_little(saver, 5)


def whole_ones(run):
    """The oracle: the serial number of every folder that is whole, by its name, whatever that is."""
    found = {}
    for index_file in run.glob(f"*/{INDEX_FILE}"):
        index = json.loads(index_file.read_text())
        files = {f.relative_to(index_file.parent).as_posix() for f in index_file.parent.rglob("*") if f.is_file()}
        if files - {INDEX_FILE} == set(index["files"]) and all(
            fingerprint(index_file.parent / name) == each for name, each in index["files"].items()
        ):
            found[index_file.parent.name] = index["serial"]
    return found


def in_a_child(work):
    """Run something in a copy of this process; how it ended."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except SaveError:
            os._exit(3)
        finally:
            traceback.print_exc()
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saver", "prepare", "when", "strike"),
    [
        # Dying in the middle of each change, or after it, is dying before the next one, too.
        ("crosscoder", next_step, "torn", die),
        ("mixed", the_same_step_again, "torn", die),
        ("mixed", next_step, "torn", disk_full),
        ("transcoder", the_same_step_again, "before", disk_full),
    ],
    indirect=["saver"],
)
def test_the_newest_whole_checkpoint_is_found(saver, tmp_path, monkeypatch, prepare, when, strike):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it is struck as any change; what it waits for is the machine's
    prepare(saver)
    run, start = saver.plan.run_dir, tmp_path / "start"
    shutil.copytree(run, start, symlinks=True)
    before = max(whole_ones(run).values())

    def count():
        fault = Fault(0, when, strike)
        with pytest.MonkeyPatch.context() as patches:
            fault.install(patches)
            saver.save()
        (tmp_path / "count").write_text(json.dumps(fault.seen))

    assert in_a_child(count) == 0
    names = json.loads((tmp_path / "count").read_text())
    assert {"fsync", "replace", "mkdir", "symlink", "unlink", "rmdir", "serialize_file", "write_text"} == set(names)
    assert max(whole_ones(run).values()) == before + 1

    ends = set()
    for at in range(1, len(names) + 1):
        shutil.rmtree(run)
        shutil.copytree(start, run, symlinks=True)

        def save_with_fault(at=at):
            with pytest.MonkeyPatch.context() as patches:
                Fault(at, when, strike).install(patches)
                saver.save()

        ended = in_a_child(save_with_fault)
        ends.add(ended)
        serials = whole_ones(run)
        visible = {folder.name for folder in run.glob("step_*")}
        assert visible <= serials.keys(), f"fault {at} ({names[at - 1]}) left a part in {visible}"
        newest = max(serials, key=serials.get)
        assert serials[newest] in (before, before + 1), f"fault {at} ({names[at - 1]}): {sorted(run.iterdir())}"
        whole = tensors_of(run / newest)
        found = find_checkpoint(run)
        assert found.index["serial"] == serials[newest], f"fault {at} ({names[at - 1]})"
        assert all(torch.equal(tensor, whole[name]) for name, tensor in tensors_of(found.folder).items())
        if strike is disk_full and ended == 3 and serials[newest] == before:
            assert not list(run.glob(".step_*.partial")), "the space was not given back"
        # And the save after it tidies up.
        assert in_a_child(saver.save) == 0
        assert not list(run.glob(".*")), f"fault {at} ({names[at - 1]})"
        assert (run / "latest").resolve() == find_checkpoint(run).folder.resolve()
    assert ends <= ({-signal.SIGKILL} if strike is die else {0, 3})
    assert -signal.SIGKILL in ends or 3 in ends


def saver_of(rank, together, saver):
    """The saver of one of two ranks, which leads every second unit."""
    placement = copy.copy(saver.placement)
    each_whole = placement.each_whole
    placement.rank, placement.taken = rank, []

    def my_whole():
        for number, (name, *rest) in enumerate(each_whole()):
            placement.taken.append(name)
            if number % 2 == rank:
                yield (name, *rest)

    placement.gather, placement.each_whole = together.gather(rank), my_whole
    bank = copy.copy(saver.bank)
    bank.placement = placement
    return Saver(saver.plan, bank, copy.copy(saver.run), saver.warn)


@pytest.mark.parametrize("broken", ["layers.0", "layers.1.mlp.down_proj:in"])
def test_weights_that_are_not_finite_on_one_rank_end_the_save_on_all(saver, broken):
    """A rank takes part in putting together the units that others write, whatever its own are like."""
    run = saver.plan.run_dir
    train_a_little(saver, 5)
    with torch.no_grad():
        saver.placement.sae(broken).W_enc[3, 2] = float("nan")
    together = Together(2)
    savers = [saver_of(rank, together, saver) for rank in range(2)]
    with ThreadPoolExecutor(2) as ranks:
        ended = [each.exception() for each in [ranks.submit(each.save) for each in savers]]
    assert [type(each) for each in ended] == [UserError] * 2, ended
    assert {str(each) for each in ended} == {
        f"{broken}: NaN or Inf in the SAE's weights at step 5, so this step is not saved: try a smaller --lr"
    }
    assert all(each.placement.taken == list(saver.placement.layers()) for each in savers)
    assert not list(run.glob(".step_*.partial"))
    assert find_checkpoint(run).index["step"] == 4
