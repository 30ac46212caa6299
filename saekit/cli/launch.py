"""`saekit train --launch NAME`: the same command on several processes, without typing `accelerate launch`."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import typer
import yaml

import saekit
from saekit.cli.output import EXIT_FAULT, LAUNCHED, fail, leave
from saekit.config.ranks import AUTO
from saekit.errors import UserError, first_line

if TYPE_CHECKING:
    from saekit.planning import Offload

OWN_OPTIONS = ("--launch", "--num-processes")
"""Options that `saekit train` does not pass on to the processes that it starts."""

STARTABLE = ("NO", "MULTI_GPU", "DEEPSPEED")
"""Kinds of launch file (accelerate's distributed_type) that start as many processes as they say."""

SECONDS_TO_SAVE = "600"
"""Seconds after Ctrl-C in which processes finish and save their step; torchrun's own 30 s are too few."""


def launch_files() -> dict[str, Path]:
    """Return the launch files that come with saekit, by name."""
    package = Path(saekit.__file__).parent
    # An installed saekit carries them inside; in a checkout they are next to the package, for `accelerate launch`.
    for folder in (package / "accelerate_configs", package.parent / "accelerate_configs"):
        if files := sorted(folder.glob("*.yaml")):
            return {file.stem: file for file in files}
    return {}


def launch_file(name: str) -> Path:
    """Return the file that `--launch` means: a shipped one by its name (`zero3`, `layer-map`), or else the user's own.

    Raises:
        UserError: If there is neither.
    """
    shipped = launch_files()
    file = shipped.get(name.replace("-", "_"), Path(name))
    if not file.is_file():
        raise UserError(f"--launch {name!r}: neither a file nor one of {', '.join(shipped)}")
    return file


def without_launch(arguments: Sequence[str], flags: frozenset[str]) -> list[str]:
    """Return the command line less `--launch` and `--num-processes`, in whichever way they were written.

    Args:
        arguments: What was typed after `saekit`.
        flags: The command's options that take no value: behind every other option the next argument is its value,
            also when it reads like one of ours.
    """
    kept: list[str] = []
    left = iter(arguments)
    for argument in left:
        if argument == "--":
            return [*kept, argument, *left]
        name, equals, _ = argument.partition("=")
        name = name.replace("_", "-")
        takes_next = name.startswith("--") and not equals and name not in flags
        taken = [argument, *([next(left)] if takes_next else [])]
        if name not in OWN_OPTIONS:
            kept += taken
    return kept


def relaunch(context: typer.Context, name: str, num_processes: int | None) -> None:
    """Run the command that was typed on the processes of a launch file, and leave as they do.

    Returns only when all of them have ended well.

    Raises:
        UserError: If the launch file, or this machine, cannot start these processes.
    """
    _refuse_workers(os.environ, name)
    file = launch_file(name)
    processes = _processes(file, name, num_processes)
    flags = frozenset(flag for option in context.command.params for flag in _flags(option))
    command = ["-m", "saekit", *without_launch(sys.argv[1:], flags)]
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it has found no GPU
    # The total is all cores; accelerate would give one to each process. It matters to DeepSpeed's optimizer, too.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // processes)))
    os.environ[LAUNCHED] = shlex.join(["--launch", name, "--num-processes", str(processes)])
    # Port 0: any that is free, so that two runs on one machine do not meet.
    head = ["--config_file", str(file), "--num_processes", str(processes), "--main_process_port", "0"]
    _start([*head, *command])


def processes_of(name: str, num_processes: int | None) -> int:
    """Return the number of processes that `--launch NAME` would start.

    Raises:
        UserError: If the launch file, or this machine, cannot start them.
    """
    return _processes(launch_file(name), name, num_processes)


def _refuse_workers(environment: Mapping[str, str], name: str) -> None:
    said = [f"{variable}={environment[variable]}" for variable in ("RANK", "WORLD_SIZE") if variable in environment]
    if said:
        raise UserError(
            f"--launch {name}, but a launcher has started this process already ({', '.join(said)} in the environment): "
            "give only one of the two"
        )


def _flags(option: Any) -> list[str]:
    return [*option.opts, *option.secondary_opts] if getattr(option, "is_flag", False) else []


def _processes(file: Path, name: str, asked: int | None) -> int:
    """Return the number of processes to start; refuses what accelerate would start differently, or not at all."""
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        said = load_config_from_file(str(file))
        kind, machines, number = said.distributed_type.value, said.num_machines, said.num_processes
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = first_line(error)
        raise UserError(f"--launch {name}: not a launch file that accelerate can read ({reason})") from None
    if kind not in STARTABLE:
        # MULTI_CPU, for one, starts a single process whatever num_processes says.
        raise UserError(
            f"--launch {name}: its distributed_type {kind} is not one of {', '.join(STARTABLE)}; "
            "on CPUs, write MULTI_GPU as in ddp_cpu"
        )
    if machines > 1:
        raise UserError(
            f"--launch {name} is for {machines} machines: run `accelerate launch --config_file {file} ... "
            "-m saekit train ...` on each of them"
        )
    number = number if asked is None else asked
    if number < 1:
        raise UserError(f"--launch {name}: the file has no num_processes; add --num-processes")
    if kind == "NO" and number > 1:
        raise UserError(f"--launch {name} starts one process, not --num-processes {number}: choose another launch file")
    if file in launch_files().values() and not (said.use_cpu or said.gpu_ids == "-1,-1"):
        _refuse_too_many(name, number)
    return number


def _refuse_too_many(name: str, processes: int) -> None:
    """Refuse more processes than GPUs: CUDA would say so once per process, and only after loading everything."""
    import torch

    devices = torch.accelerator.device_count()
    if processes > devices:
        hint = f"add --num-processes {devices}, or use" if devices else "use"
        raise UserError(
            f"--launch {name} would start {processes} processes, one per GPU, but this machine has {devices}: "
            f"{hint} one of {', '.join(each for each in launch_files() if each.endswith('cpu'))}"
        )


def _start(arguments: list[str]) -> None:
    """`accelerate launch` in this process, as far as starting goes; its way of failing is replaced by ours."""
    from accelerate.commands import launch

    _hush()
    parsed = launch.launch_command_parser().parse_args(arguments)
    if launch.load_config_from_file(parsed.config_file).distributed_type.value == "NO":
        _become(parsed)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    # torchrun would stop its processes and call that a failure; ours save, end well, and torchrun with them.
    parsed.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _hand_on)
    try:
        launch.launch_command(parsed)
    except Exception as error:
        _leave_like(error)
        raise


def _hand_on(number: int, _frame: FrameType | None) -> None:
    """Send a scheduler's signal to the processes of the run."""
    for process in psutil.Process().children():
        with suppress(psutil.Error):  # it has ended meanwhile
            if "RANK" in process.environ():
                process.send_signal(number)


def _become(parsed: Any) -> None:
    """Turn into the one process there is: its signals, its terminal and its exit code need no passing on then."""
    from accelerate.commands.launch import _validate_launch_command
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    settings, _, _ = _validate_launch_command(parsed)
    command, environment = prepare_simple_launcher_cmd_env(settings)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, environment)


def _leave_like(error: Exception) -> None:
    """Leave with the code of the process that failed first, if that is what the error is about.

    The processes have said themselves what was wrong, except for one that was killed. torchrun's exceptions are told by
    what they carry, because only `placement/` may import torch.distributed.
    """
    if isinstance(error, subprocess.CalledProcessError):
        leave(_shell_code(error.returncode))
    if isinstance(number := getattr(error, "sigval", None), signal.Signals):  # SignalException: this process got one
        leave(128 + number)
    if hasattr(error, "get_first_failure"):  # ChildFailedError
        rank, failure = error.get_first_failure()
        code = _shell_code(failure.exitcode)
        if failure.exitcode in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT):
            killer = signal.Signals(-failure.exitcode).name
            memory = " (out of memory?)" if killer == "SIGKILL" else ""
            fail(f"the process of rank {rank} was ended by {killer}{memory}", code)
        leave(code)


def _shell_code(code: int) -> int:
    """Return a process's exit code as a shell shows it: 128 + N for one that signal N has ended."""
    return 128 - code if code < 0 else code or EXIT_FAULT


def _hush() -> None:
    """Silence what torchrun logs about a run that failed or was stopped: the processes have said it in one line."""
    for logger in (
        "torch.distributed.elastic.multiprocessing.api",  # "failed (exitcode: 2)", "Sending process N closing signal"
        "torch.distributed.elastic.agent.server.api",  # "Received 2 death signal, shutting down workers"
    ):
        logging.getLogger(logger).addFilter(lambda record: False)  # torchrun sets the level itself


def placement_of(name: str, asked: str) -> str | None:
    """Return the placement under `--launch NAME`; None where there is one process.

    Args:
        name: A shipped launch file's name, or a file.
        asked: `--placement`.
    """
    from saekit.placement.choose import launched_as

    decided = launched_as(_read_launch_file(name))
    return decided if decided is None or asked == AUTO else asked


def offload_of(name: str) -> Offload:
    """Return what DeepSpeed keeps in the machine's memory under `--launch NAME`."""
    from saekit.planning import Offload

    zero = _section(_read_launch_file(name), "deepspeed_config")
    return Offload(*(zero.get(f"offload_{what}_device") == "cpu" for what in ("optimizer", "param")))


def _read_launch_file(name: str) -> dict[str, object]:
    try:
        said = yaml.safe_load(launch_file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = first_line(error)
        raise UserError(f"--launch {name}: not a launch file that can be read ({reason})") from None
    return said if isinstance(said, dict) else {}


def _section(said: dict[str, object], name: str) -> dict[str, object]:
    section = said.get(name)
    return section if isinstance(section, dict) else {}
