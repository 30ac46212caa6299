"""Runs all checks of this machine, in the order in which their findings are shown."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from saekit._version import __version__
from saekit.config import TrainConfig
from saekit.doctor import devices, hub, libraries, limits, ranks
from saekit.doctor.findings import DEVICES, EIGHT_BITS, HUB, LIBRARIES, RANKS, RESOURCES, SAEKIT, Finding, make_check
from saekit.doctor.probes import ADAM8BIT, DEEPSPEED, GLOO, Outcome, Probes
from saekit.machine import cpu_model, free_memory, library_versions, usable_cores

Check = Callable[[], Iterable[Finding]]

TRIED = {"gloo": GLOO, "deepspeed": DEEPSPEED, "adam8bit": ADAM8BIT}
"""The code of each probe, by name."""


def diagnose(*, debug: bool = False) -> list[Finding]:
    """Check this machine. Takes a few seconds, mostly to import libraries.

    Args:
        debug: Raise the error of a failed check instead of turning it into a finding.
    """
    with Probes(TRIED) as probes:  # they run while this process imports the libraries
        found: list[Finding] = []
        for area, name, check in _libraries():
            found += make_check(area, name, check, debug=debug)
        torch = _torch()
        gpus = _gpus(torch)
        if torch is None:
            remedy = "fix torch first (see above)"
            found.append(Finding(DEVICES, "devices", "note", "not checked: torch cannot be imported", remedy))
            rest = [*_hub(), *_resources(gpus)]
        else:
            rest = [*_devices(torch, gpus), *_ranks(torch, gpus, probes.outcome), *_hub(), *_resources(gpus)]
        for area, name, check in rest:
            found += make_check(area, name, check, debug=debug)
    return found


def can_train(findings: Iterable[Finding]) -> bool:
    """Tell whether `saekit train` can run on this machine at all."""
    return not any(finding.blocks for finding in findings)


def findings_to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings and a summary as plain values, for a bug report."""
    return {
        "saekit": __version__,
        "can_train": can_train(findings),
        "problems": sum(finding.state == "problem" for finding in findings),
        "notes": sum(finding.state == "note" for finding in findings),
        "versions": library_versions(),
        "findings": [asdict(finding) for finding in findings],
    }


def _libraries() -> Iterator[tuple[str, str, Check]]:
    yield SAEKIT, "version", libraries.about
    yield SAEKIT, "Python", lambda: libraries.python(platform.python_version(), libraries.python_bounds())
    yield SAEKIT, "system", libraries.system
    for name in libraries.NAMES:
        yield LIBRARIES, name, partial(_library, name)


def _library(name: str) -> Iterator[Finding]:
    return libraries.library(name, libraries.requirements("saekit"))


def _torch() -> Any:
    """Return the module torch; None if it cannot be imported, which `libraries` reports."""
    try:
        return importlib.import_module("torch")
    except Exception:  # noqa: BLE001  # a broken library can raise anything
        return None


def _gpus(torch: Any) -> int:
    """Count the GPUs that torch can use. If there are none, `devices.cuda` reports why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.cuda.device_count() if torch.cuda.is_available() else 0
        except Exception:  # noqa: BLE001  # a broken driver can raise anything
            return 0


def _devices(torch: Any, gpus: int) -> Iterator[tuple[str, str, Check]]:
    yield DEVICES, "GPUs", lambda: devices.cuda(torch, [] if gpus else devices.nvidia_gpus(), os.environ)
    for number in range(gpus):
        yield DEVICES, f"GPU {number}", partial(devices.gpu, torch, number)
    yield DEVICES, "CPU", lambda: devices.cpu(torch, cpu_model(), usable_cores()[0])
    yield DEVICES, "threads", lambda: devices.threads(torch.get_num_threads(), *usable_cores(), os.environ)
    yield DEVICES, "kernels", partial(_kernels, torch, gpus)


def _kernels(torch: Any, gpus: int) -> Iterator[Finding]:
    device = torch.device("cuda", 0) if gpus else torch.device("cpu")
    capability = torch.cuda.get_device_capability(0) if gpus else None
    return devices.kernels(device, triton=_has("triton"), capability=capability)


def _ranks(torch: Any, gpus: int, outcome: Callable[[str], Outcome]) -> Iterator[tuple[str, str, Check]]:
    triton = gpus > 0 and _has("triton")
    yield RANKS, "gloo", lambda: ranks.gloo(outcome("gloo"), os.environ)
    if gpus:
        yield RANKS, "NCCL", lambda: ranks.nccl(torch.cuda.nccl.version, gpus)
    if _has("deepspeed"):  # if not, `libraries` reports it
        yield RANKS, "DeepSpeed", lambda: ranks.deepspeed(outcome("deepspeed"))
    yield RANKS, "compiler", lambda: ranks.compilers(shutil.which, os.environ, triton=triton)
    if triton:
        yield RANKS, "Python headers", lambda: ranks.headers(Path(sysconfig.get_paths()["include"]))
    if _has("bitsandbytes"):
        yield EIGHT_BITS, "load-in-8bit", lambda: ranks.load_in_8bit(outcome("adam8bit"), cuda=gpus > 0)
        yield EIGHT_BITS, "adam8bit", lambda: ranks.adam8bit(outcome("adam8bit"))


def _has(name: str) -> bool:
    return libraries.installed_version(name) is not None


def _hub() -> Iterator[tuple[str, str, Check]]:
    yield HUB, "cache", lambda: limits.folder(HUB, "cache", _hub_path("HF_HUB_CACHE"), _elsewhere("HF_HUB_CACHE"))
    yield HUB, "cached", lambda: hub.contents(_hub_path("HF_HUB_CACHE"))
    yield HUB, "data sets", lambda: limits.folder(HUB, "data sets", datasets_folder(), _elsewhere("HF_DATASETS_CACHE"))
    yield HUB, "token", lambda: hub.token(os.environ, _hub_path("HF_TOKEN_PATH"))
    yield HUB, "access", lambda: hub.offline(os.environ)


def _hub_path(constant: str) -> Path:
    """Return a path that huggingface_hub has derived from the environment."""
    return Path(getattr(importlib.import_module("huggingface_hub.constants"), constant)).expanduser()


def datasets_folder() -> Path:
    """Return the folder in which `datasets` stores downloaded and tokenized data."""
    said = os.environ.get("HF_DATASETS_CACHE")
    return Path(said).expanduser() if said else _hub_path("HF_HOME") / "datasets"


def _elsewhere(variable: str) -> str:
    """Say how to move a cache: with the variable that sets it now, or with HF_HOME."""
    return f"export {variable if variable in os.environ else 'HF_HOME'}=FOLDER, a writable folder with free space"


def _resources(gpus: int) -> Iterator[tuple[str, str, Check]]:
    saves = TrainConfig().save_dir
    move = "use --save-dir FOLDER, a writable folder with free space"
    yield RESOURCES, "memory", lambda: limits.memory(*free_memory())
    yield RESOURCES, "swap", lambda: limits.swap(psutil.swap_memory().total, psutil.swap_memory().used)
    yield RESOURCES, "save-dir", lambda: limits.folder(RESOURCES, "save-dir", saves, move)
    yield RESOURCES, "/dev/shm", lambda: limits.shared_memory(gpus)
    yield RESOURCES, "open files", lambda: limits.open_files(*limits.open_file_limits())
