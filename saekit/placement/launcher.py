"""What torchrun's agent, which starts the ranks of torchrun and accelerate launch, does with them after a signal.

It passes the signals that it handles on to the ranks, waits, and then kills them. Both could not always be chosen: the
signals can since torch 2.10 (`--signals-to-handle`), the wait since 2.12 (`--shutdown-timeout`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields

import psutil
import torch

STARTED = "TORCHELASTIC_RUN_ID"
"""In the environment of processes that the agent has started."""
WAITS = 30.0
"""Seconds for which the agent waits if it is not told otherwise, or cannot be."""
HANDLED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
"""The signals that it handles if it is not told otherwise, or cannot be."""


def agent_settings() -> frozenset[str]:
    """Return the names of what this torch's agent can be told, among them maybe `shutdown_timeout`."""
    from torch.distributed.launcher.api import LaunchConfig

    return frozenset(field.name for field in fields(LaunchConfig))


def launchers_command() -> list[str]:
    """Return the command line of the process that started this one; empty if that cannot be told."""
    with suppress(psutil.Error):
        parent = psutil.Process().parent()
        return [] if parent is None else parent.cmdline()
    return []


def launcher_warnings(grace: float) -> list[str]:
    """Return `warnings_of_launcher` for the launcher of this process, if one has started it."""
    if STARTED not in os.environ:
        return []
    return warnings_of_launcher(grace, os.environ, launchers_command(), agent_settings())


def warnings_of_launcher(
    grace: float, environment: Mapping[str, str], command: Sequence[str], settings: frozenset[str]
) -> list[str]:
    """Say where the launcher would end a run that a scheduler stops before it has saved.

    Args:
        grace: Seconds that the run may take for it (`--grace`).
        environment: Of a rank.
        command: The launcher's command line.
        settings: See `agent_settings`.

    Returns:
        A sentence for each problem.
    """
    version, problems = torch.__version__, []
    handled = environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", HANDLED).split(",")
    asked = environment.get("PET_SIGNALS_TO_HANDLE")
    if asked is not None and "signals_to_handle" not in settings:
        problems.append(
            f"PET_SIGNALS_TO_HANDLE={asked}, but the launcher of torch {version} always handles {HANDLED}; another "
            "signal, such as SLURM's SIGUSR1, ends it, and the run without saving: install torch 2.10 or newer"
        )
    waits = _waits(environment, command) if "shutdown_timeout" in settings else WAITS
    signals = [name for number, name in (("SIGTERM", "SIGTERM"), ("SIGINT", "Ctrl-C")) if number in handled]
    if signals and waits < grace:
        enough = math.ceil(grace) + 20
        remedy = f"set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={enough} for it (torchrun: also --shutdown-timeout {enough})"
        if "shutdown_timeout" not in settings:
            remedy = f"torch {version} cannot be told otherwise, and 2.12 and newer can"
        problems.append(
            f"the launcher kills the ranks {waits:g} seconds after {' or '.join(signals)}, whether they have saved or "
            f"not, though --grace is {grace:g} seconds: {remedy}"
        )
    return problems


def _waits(environment: Mapping[str, str], command: Sequence[str]) -> float:
    """Return the seconds that the agent was told to wait: on the command line, or else in the environment."""
    said = [environment.get(name) for name in ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "PET_SHUTDOWN_TIMEOUT")]
    for place, argument in enumerate(command):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == "--shutdown-timeout":
            said.append(value if equals else "".join(command[place + 1 : place + 2]))
    for each in reversed(said):
        with suppress(TypeError, ValueError):
            return float(each)  # type: ignore[arg-type]
    return WAITS
