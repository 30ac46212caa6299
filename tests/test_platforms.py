"""Systems without what POSIX has: modules that need it only for part of their work can be imported there."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

import saekit

ROOT = Path(saekit.__file__).parent


@pytest.mark.parametrize("file", ["runs/lock.py", "training/interrupt.py", "cli/launch.py", "doctor/limits.py"])
def test_a_module_can_be_imported_without_posix(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.delattr(signal, "SIGUSR1")
    monkeypatch.delattr(os, "register_at_fork")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    name = f"saekit.{file.removesuffix('.py').replace('/', '.')}_without_posix"
    spec = importlib.util.spec_from_file_location(name, ROOT / file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    if file == "training/interrupt.py":
        assert module.SCHEDULER_SIGNALS == (signal.SIGTERM,)


def test_without_flock_the_lease_alone_keeps_others_out(tmp_path, monkeypatch):
    from saekit.errors import UserError
    from saekit.runs import lock
    from saekit.runs.lease import Writer, write_lease

    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "SETTLES", 0.0)
    with lock.hold(tmp_path / "run") as held:
        assert held.renew()
    (tmp_path / "run").mkdir(exist_ok=True)
    write_lease(tmp_path / "run" / ".lock", Writer("node7", "another", 7, "then", 1.0, "t"))
    with pytest.raises(UserError, match="process 7 on node7"), lock.hold(tmp_path / "run"):
        pass
