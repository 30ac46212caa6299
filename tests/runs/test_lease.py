"""Whom a lease keeps out, and for how long; what it leaves behind."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from saekit.errors import UserError
from saekit.runs import lock
from saekit.runs.lease import EXPIRES, Writer, read_lease, write_lease
from saekit.runs.lock import hold
from tests.runs.test_lock import DISKS, patch_disk

NETWORKS = list(DISKS)[1:]


def other_writer(**changes):
    """A writer on another machine."""
    return replace(Writer.here(), **{"host": "node7", "machine": "node7 boot", "pid": 77, **changes})


def leave(run, writer, seconds_ago=0.0):
    run.mkdir(exist_ok=True)
    write_lease(run / ".lock", writer)
    then = time.time() - seconds_ago
    os.utime(run / ".lock", (then, then))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_lease_of_another_machine_keeps_out_until_it_expires(tmp_path, monkeypatch, kind):
    patch_disk(monkeypatch, kind)
    run = tmp_path / "run"
    leave(run, other_writer(), EXPIRES - 20)
    told = r"process 77 on node7 has been .* \(if that process is gone, its lock expires in (19|20) seconds\)"
    with pytest.raises(UserError, match=told), hold(run):
        pass
    leave(run, other_writer(), EXPIRES + 1)
    with hold(run):
        assert read_lease(run / ".lock").pid == os.getpid()


@pytest.mark.parametrize("kind", NETWORKS)
def test_of_two_that_write_a_lease_at_once_the_later_one_has_it(tmp_path, monkeypatch, kind):
    patch_disk(monkeypatch, kind)
    run = tmp_path / "run"
    monkeypatch.setattr(time, "sleep", lambda seconds: leave(run, other_writer()))  # while ours settles
    with pytest.raises(UserError, match="in use: process 77 on node7"), hold(run):
        pass
    assert read_lease(run / ".lock").pid == 77


def test_on_a_local_disk_flock_is_enough(tmp_path):
    """The container that had the lock is gone, and its name with it."""
    leave(tmp_path / "run", other_writer())
    with hold(tmp_path / "run"):
        pass


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_later_process_of_the_same_pid_does_not_keep_the_lock(tmp_path, monkeypatch, kind):
    patch_disk(monkeypatch, kind)
    mine = Writer.here()
    leave(tmp_path / "run", mine)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"), hold(tmp_path / "run"):
        pass
    leave(tmp_path / "run", replace(mine, started="1"))
    with hold(tmp_path / "run"):
        pass


def test_a_lease_that_cannot_be_read_expires_like_any(tmp_path, monkeypatch):
    patch_disk(monkeypatch, "no flock")
    (tmp_path / "run").mkdir()
    whole = json.dumps(asdict(Writer.here()))
    for spoilt in ("", "{", "[]", '{"host": 1}', whole.replace('"since": ', '"since": 1e'), whole.replace("pid", "p")):
        (tmp_path / "run" / ".lock").write_text(spoilt)
        with pytest.raises(UserError, match="is in use: another process is training in it"), hold(tmp_path / "run"):
            pass
    os.utime(tmp_path / "run" / ".lock", (0, 0))
    with hold(tmp_path / "run"):
        pass


def test_a_lease_is_renewed_and_one_that_was_deleted_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEWS", 0.02)
    lease = tmp_path / "run" / ".lock"
    with hold(tmp_path / "run") as held:
        os.utime(lease, (0, 0))
        wait_for(lambda: lease.stat().st_mtime > 0)
        assert json.loads(lease.read_text()) == asdict(held.writer)
        lease.unlink()
        wait_for(lambda: read_lease(lease) == held.writer)
        assert held.renew()
    time.sleep(0.1)
    assert not lease.exists()


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_one_that_was_taken_for_dead_notices(tmp_path):
    with hold(tmp_path / "run") as held:
        leave(tmp_path / "run", other_writer())
        assert not held.renew()
    assert read_lease(tmp_path / "run" / ".lock").host == "node7"  # it is not ours to delete


def test_what_killed_processes_left_is_deleted(tmp_path):
    (tmp_path / "run").mkdir()
    for name, seconds in (("old", 2 * EXPIRES), ("new", 0)):
        (tmp_path / "run" / f".lock.{name}").write_text("")
        os.utime(tmp_path / "run" / f".lock.{name}", (time.time() - seconds,) * 2)
    with hold(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == [".lock.new"]


def test_folders_that_cannot_be(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file: see --save-dir and --run-name"), hold(tmp_path / "file"):
        pass
    told = r"cannot be created or written to \(Not a directory\): see --save-dir"
    with pytest.raises(UserError, match=told), hold(tmp_path / "file" / "run"):
        pass

    def full(file, writer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock, "write_lease", full)
    with pytest.raises(UserError, match="No space left on device"), hold(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mounts", "local"),
    [
        ([("/", "ext4")], True),
        ([("/", "ext4"), ("/data", "nfs4")], False),
        ([("/", "nfs4"), ("/data", "xfs")], True),
        ([("/", "ext4"), ("/dat", "nfs4")], True),
        ([("/", "ext4"), ("/data", "ext4"), ("/data", "lustre")], False),
        ([("/", "something new")], False),
        ([], False),
    ],
)
def test_the_disk_of_a_folder(monkeypatch, mounts, local):
    found = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts]
    monkeypatch.setattr(lock.psutil, "disk_partitions", lambda all: found)
    assert lock.is_local_disk(Path("/data/run")) is local
