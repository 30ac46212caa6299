"""What ranks say of the launcher that started them: whether a stopped run has the time to save."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from saekit.placement.launcher import agent_settings, launcher_warnings, warnings_of_launcher
from tests.forked import environment

NEW, BETWEEN, OLD = (
    frozenset({"run_id", *more}) for more in (("signals_to_handle", "shutdown_timeout"), ("signals_to_handle",), ())
)
HANDLED = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT"}
HANDED_ON = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGINT,SIGHUP,SIGQUIT"}
"""As under `saekit train --launch`, which hands a scheduler's signals on itself."""


def found(grace, settings=NEW, command=(), **variables):
    return warnings_of_launcher(grace, {**HANDLED, **variables}, command, settings)


def test_thirty_seconds_are_too_few_for_a_longer_grace():
    (said,) = found(120)
    assert "kills the ranks 30 seconds after SIGTERM or Ctrl-C" in said
    assert "--grace is 120 seconds: set TORCH_ELASTIC_SHUTDOWN_TIMEOUT=140 " in said
    assert found(30) == []


def test_without_a_launcher_there_is_nothing_to_say(monkeypatch):
    monkeypatch.setattr("saekit.placement.launcher.agent_settings", lambda: NEW)
    monkeypatch.setattr("saekit.placement.launcher.launchers_command", list)
    for name in ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SHUTDOWN_TIMEOUT", "TORCHELASTIC_SIGNALS_TO_HANDLE"):
        monkeypatch.delenv(name, raising=False)
    assert launcher_warnings(120) == []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert len(launcher_warnings(120)) == 1


@pytest.mark.parametrize(
    ("command", "variables", "waits"),
    [
        ((), {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "170"}, 170),
        ((), {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "170", "PET_SHUTDOWN_TIMEOUT": "50"}, 50),
        (("torchrun", "--shutdown-timeout", "170", "-m", "saekit"), {"PET_SHUTDOWN_TIMEOUT": "50"}, 170),
        (("torchrun", "--shutdown_timeout=40", "-m", "saekit"), {}, 40),
    ],
)
def test_a_wait_that_was_asked_for_is_believed(command, variables, waits):
    assert found(waits, command=command, **variables) == []
    (said,) = found(waits + 1, command=command, **variables)
    assert f"kills the ranks {waits} seconds after" in said


def test_a_launcher_that_knows_no_wait_has_thirty_seconds():
    (said,) = found(120, BETWEEN, ["torchrun"], TORCH_ELASTIC_SHUTDOWN_TIMEOUT="170")
    assert "kills the ranks 30 seconds after SIGTERM" in said
    assert f"torch {torch.__version__} cannot change that" in said
    (said,) = found(120, BETWEEN, **HANDED_ON)
    assert "30 seconds after Ctrl-C, " in said


def test_a_launcher_that_knows_no_choice_of_signals_says_so():
    asked = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGUSR1"}
    said = warnings_of_launcher(20, asked, [], OLD)
    assert len(said) == 1
    assert said[0].startswith("PET_SIGNALS_TO_HANDLE=SIGTERM,SIGUSR1, but the launcher of torch ")
    assert warnings_of_launcher(20, {}, [], OLD) == []


ONE_RANK = """
import os, signal, sys, time
from saekit.placement.launcher import agent_settings, launchers_command, warnings_of_launcher
print(warnings_of_launcher(float(sys.argv[1]), os.environ, launchers_command(), agent_settings()), flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif("shutdown_timeout" not in agent_settings(), reason="this torch's launcher cannot be told to wait")
def test_torchruns_agent_is_as_we_read_it(tmp_path):
    """It kills what is there after the seconds that were asked for, and tells the ranks what we look for."""
    (tmp_path / "rank.py").write_text(ONE_RANK)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--shutdown-timeout", "3"]
    variables = {**environment(), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "50"}
    for name in [name for name in os.environ if name.startswith(("TORCHELASTIC", "PET_"))]:
        del variables[name]
    running = subprocess.Popen(
        [*launcher, tmp_path / "rank.py", "4"], env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert "kills the ranks 3 seconds after SIGTERM or Ctrl-C" in running.stdout.readline()
    assert running.stdout.readline() == "ready\n"
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=20)
    assert running.returncode != 0
    assert "forcefully exiting" in errors
