"""Checks what torchrun's agent does after a signal. It starts the ranks of torchrun and of accelerate launch.

The agent passes the signals that it handles to the ranks, waits, and then kills them. Which signals can be chosen since
torch 2.10 (`--signals-to-handle`), how long it waits since torch 2.12 (`--shutdown-timeout`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields

import psutil
import torch

AGENT_VARIABLE = "TORCHELASTIC_RUN_ID"
"""An environment variable of processes that the agent has started."""
DEFAULT_TIMEOUT = 30.0
"""Seconds that the agent waits by default, or if they cannot be chosen."""
DEFAULT_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
"""The signals that the agent handles by default, or if they cannot be chosen."""


def agent_settings() -> frozenset[str]:
    """Return the names of the settings of this torch's agent, such as `shutdown_timeout`."""
    from torch.distributed.launcher.api import LaunchConfig

    return frozenset(field.name for field in fields(LaunchConfig))


def launchers_command() -> list[str]:
    """Return the command line of the process that started this one; empty if it is unknown."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    return []


def launcher_warnings(grace: float) -> list[str]:
    """Return `warnings_of_launcher` for the launcher of this process; empty if torchrun's agent has not started it."""
    if AGENT_VARIABLE not in os.environ:
        return []
    return warnings_of_launcher(grace, os.environ, launchers_command(), agent_settings())


def warnings_of_launcher(
    grace: float, environment: Mapping[str, str], command: Sequence[str], settings: frozenset[str]
) -> list[str]:
    """Warn if the launcher would kill a run after a scheduler's signal before it has saved.

    Args:
        grace: Seconds that the run may take to save (`--grace`).
        environment: The environment of a rank.
        command: The launcher's command line.
        settings: See `agent_settings`.

    Returns:
        A message for each problem.
    """
    version, problems = torch.__version__, []
    handled = environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", DEFAULT_SIGNALS).split(",")
    asked = environment.get("PET_SIGNALS_TO_HANDLE")
    if asked is not None and "signals_to_handle" not in settings:
        problems.append(
            f"PET_SIGNALS_TO_HANDLE={asked}, but the launcher of torch {version} always handles {DEFAULT_SIGNALS}. "
            "Another signal, such as SLURM's SIGUSR1, ends the run without saving: install torch 2.10 or newer"
        )
    waits = _timeout(environment, command) if "shutdown_timeout" in settings else DEFAULT_TIMEOUT
    signals = [name for number, name in (("SIGTERM", "SIGTERM"), ("SIGINT", "Ctrl-C")) if number in handled]
    if signals and waits < grace:
        enough = math.ceil(grace) + 20
        remedy = f"set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={enough} for it (torchrun: also --shutdown-timeout {enough})"
        if "shutdown_timeout" not in settings:
            remedy = f"torch {version} cannot change that; install torch 2.12 or newer, or lower --grace"
        problems.append(
            f"the launcher kills the ranks {waits:g} seconds after {' or '.join(signals)}, even if they have not saved "
            f"yet, but --grace is {grace:g} seconds: {remedy}"
        )
    return problems


def _timeout(environment: Mapping[str, str], command: Sequence[str]) -> float:
    """Return the seconds that the agent waits: from its command line, the environment, or the default."""
    said = [environment.get(name) for name in ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SHUTDOWN_TIMEOUT")]
    for place, argument in enumerate(command):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == "--shutdown-timeout":
            said.append(value if equals else "".join(command[place + 1 : place + 2]))
    for each in reversed(said):
        with suppress(TypeError, ValueError):
            return float(each)  # type: ignore[arg-type]
    return DEFAULT_TIMEOUT
