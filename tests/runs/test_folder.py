"""A run that replaces another: whatever stops it, one of the two is there, whole."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from saekit import SaeConfig, TrainConfig, UserError
from saekit.runs.folder import new_run_folder, put_back
from saekit.runs.layout import contents

CFG = TrainConfig(SaeConfig(), overwrite=True)


class Killed(BaseException):
    pass


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    (run / "step_00000002" / "layers.0").mkdir(parents=True)
    (run / "step_00000002" / "layers.0" / "cfg.json").write_text("old")
    (run / "latest").symlink_to("step_00000002")
    for name in ("config.yaml", "metrics.jsonl", "notes.txt"):
        (run / name).write_text("old")
    (run / ".lock").write_text("mine")
    return run


def tree(folder):
    """Every file by its path, links as where they lead; without the lock."""
    files = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_symlink() or f.is_file()}
    return {n: os.readlink(f) if f.is_symlink() else f.read_text() for n, f in files.items() if n != ".lock"}


def begin(run, fails=False):
    with new_run_folder(CFG, run):
        (run / "config.yaml").write_text("new")
        (run / "metrics.jsonl").write_text("new")
        (run / "trackers").mkdir()
        if fails:
            raise UserError("no login")


def test_it_takes_the_place_of_the_old_one_and_leaves_the_lock(run):
    folder = run.stat().st_ino
    begin(run)
    assert tree(run) == {"config.yaml": "new", "metrics.jsonl": "new"}
    assert (run.stat().st_ino, (run / ".lock").read_text()) == (folder, "mine")
    assert sorted(os.listdir(run.parent)) == ["run"]


def test_one_that_fails_to_begin_leaves_the_old_one(run):
    before = tree(run)
    with pytest.raises(UserError, match="no login"):
        begin(run, fails=True)
    assert tree(run) == before
    assert sorted(os.listdir(run)) == sorted([".lock", *(each.name for each in contents(run))])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("strike", [Killed(), OSError(5, "Input/output error")], ids=["killed", "failed"])
def test_whatever_change_of_the_disk_it_ends_at(run, monkeypatch, fails, strike):
    """The next process that takes the lock finds the old run or the new one."""
    start, old = run.with_name("start"), tree(run)
    shutil.copytree(run, start, symlinks=True)
    ends = []
    for at in range(1, 1000):
        shutil.rmtree(run)
        shutil.copytree(start, run, symlinks=True)
        changes = 0

        def counted(real, at=at):
            def call(*args, **kwargs):
                nonlocal changes
                changes += 1
                if changes >= at:  # a process that was killed does nothing afterwards, nor does a broken disk
                    raise strike
                return real(*args, **kwargs)

            return call

        with pytest.MonkeyPatch.context() as patch, suppress(Killed, UserError, OSError):
            for owner, names in ((Path, ("rename", "mkdir", "unlink")), (os, ("replace",)), (shutil, ("rmtree",))):
                for name in names:
                    patch.setattr(owner, name, counted(getattr(owner, name)))
            begin(run, fails)
        put_back(run)
        found = tree(run)
        assert found in (old, {"config.yaml": "new", "metrics.jsonl": "new"}), f"change {at}"
        ends.append("old" if found == old else "new")
        assert sorted(os.listdir(run.parent)) == ["run", "start"]
        if changes < at:
            break
    assert len(ends) > 8
    assert ends[-1] == ("old" if fails else "new")
    assert "old" in ends
