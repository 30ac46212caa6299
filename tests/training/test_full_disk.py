"""A checkpoint that cannot be written: in the middle of a run, and at its end, where hours of training depend on it."""

import errno
import os
import signal
import stat

import pytest

from saekit.errors import Interrupted, SaveError, UserError
from saekit.runs.recovery import read_index
from saekit.training import saving
from tests.training.conftest import Recorder
from tests.training.runs import assert_same_tensors, metrics_of, tensors_of


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that is full while the second checkpoint's second layer is written, and has space again afterwards."""
    from saekit.runs import checkpoint

    written, write = [], checkpoint.save_file

    def save_file(tensors, file):
        written.append(file)
        if len(written) == 5:  # there are three layers
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(make_trainer, tmp_path, full_disk):
    run = tmp_path / "run"
    with pytest.raises(SaveError) as stopped:
        make_trainer(save_every=2).fit()
    for words in ("step 4 could not be written", "No space left on device", f"{run / 'step_00000002'}, is whole"):
        assert words in str(stopped.value)
    assert (run / "latest").resolve().name == "step_00000002"
    read_index(run / "latest")
    assert not list(run.glob(".*"))
    resumed = make_trainer(resume=True, save_every=2).fit()
    assert_same_tensors(tensors_of(resumed), tensors_of(make_trainer("whole").fit()))


def test_with_best_effort_a_full_disk_is_a_warning(make_trainer, tmp_path, full_disk):
    watcher = Recorder()
    last = make_trainer(save_every=2, save_best_effort=True, save_best=True, reporter=watcher).fit()
    assert watcher.saves == [2, 6, 7]
    (warning,) = [said for said in watcher.said if said.startswith("Warning")]
    assert "step 4 could not be written (No space left on device)" in warning
    assert "training goes on" in warning
    assert_same_tensors(tensors_of(last), tensors_of(make_trainer("whole").fit()))
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_the_last_save_is_tried_again_until_the_disk_has_room(make_trainer, monkeypatch, full_disk):
    """Hours of training are in memory only."""
    paused = []
    monkeypatch.setattr(saving.time, "sleep", paused.append)
    watcher = Recorder()
    last = make_trainer(save_every=5, reporter=watcher).fit()
    assert paused == [saving.PAUSE]
    assert watcher.saves == [5, 7]
    (warning,) = [said for said in watcher.said if said.startswith("Warning")]
    for words in ("step 7 could not be written (No space left", "only in memory", "every 30 seconds for 60 minutes"):
        assert words in warning
    assert_same_tensors(tensors_of(last), tensors_of(make_trainer("whole").fit()))


@pytest.fixture
def broken_disk(monkeypatch):
    """A disk that takes no checkpoint."""

    def save_file(tensors, file):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(saving.checkpoint, "save_file", save_file)


def test_the_last_save_is_given_up_after_an_hour(make_trainer, monkeypatch, broken_disk):
    clock = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(saving.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))
    watcher = Recorder()
    with pytest.raises(SaveError, match="step 7 could not be written"):
        make_trainer(save_best_effort=True, reporter=watcher).fit()
    assert clock == [saving.PATIENCE]
    assert sum(said.startswith("Warning") for said in watcher.said) == 1


def test_ctrl_c_twice_gives_the_last_save_up(make_trainer, tmp_path, broken_disk):
    class Impatient(Recorder):
        def status(self, message):
            if "Ctrl-C twice gives up" in message:
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        make_trainer(reporter=Impatient()).fit()
    assert not isinstance(stopped.value, Interrupted)
    assert not list((tmp_path / "run").glob(".*"))


def test_a_layer_that_went_to_another_disk_is_missed_at_once(make_trainer, tmp_path, monkeypatch):
    """Two machines with a folder of the same name each: the index would promise what is not there."""
    monkeypatch.setattr(saving.time, "sleep", None)  # no other try makes one disk of two
    real = saving.checkpoint.write_layers

    def elsewhere(run_dir, step, layers):
        written = real(run_dir, step, layers)
        (run_dir / f".step_{step:08d}.partial" / "layers.1" / "sae.safetensors").unlink()
        return written

    monkeypatch.setattr(saving.checkpoint, "write_layers", elsewhere)
    with pytest.raises(SaveError, match=r"another rank has written layers\.1/sae\.safetensors, and it is not here"):
        make_trainer().fit()
    assert not list((tmp_path / "run").glob("*step*"))


@pytest.fixture
def refused(monkeypatch):
    """`refused(kind, code)`: a file system that refuses to flush files, or folders; counts how often."""
    flush, times = os.fsync, []

    def refuse(kind, code):
        def fsync(descriptor):
            if kind(os.fstat(descriptor).st_mode):
                times.append(descriptor)
                raise OSError(code, os.strerror(code))
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(saving, "PATIENCE", 0.0)
        return times

    return refuse


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_flush_folders_keeps_checkpoints(make_trainer, refused, code):
    """Some FUSE mounts: they write the files all the same."""
    times = refused(stat.S_ISDIR, code)
    read_index(make_trainer().fit())
    assert times


@pytest.mark.parametrize(("kind", "code"), [(stat.S_ISDIR, errno.EIO), (stat.S_ISREG, errno.EINVAL)])
def test_a_flush_that_a_disk_refuses_is_an_error(make_trainer, refused, kind, code):
    refused(kind, code)
    with pytest.raises((OSError, UserError), match=os.strerror(code)):
        make_trainer().fit()
