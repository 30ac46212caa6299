"""Checks of GPUs and the CPU: in which precision they are fast, and which kernels they use."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.doctor.findings import DEVICES, Finding, describe_error
from saekit.doctor.libraries import install
from saekit.units import plural, size

if TYPE_CHECKING:
    import torch

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that set the number of torch's threads."""
BUILDS = "https://pytorch.org/get-started"
"""Where to find torch's builds."""


def nvidia_gpus() -> list[str]:
    """Return the NVIDIA GPUs that the system has, independently of torch: name and driver, as nvidia-smi shows them."""
    if command := shutil.which("nvidia-smi"):
        query = [command, "--query-gpu=name,driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            pass  # nvidia-smi exists but the driver does not work: count the device files
        else:
            return [line.strip() for line in answer.stdout.splitlines() if "," in line]
    return ["of unknown name" for _ in Path("/dev").glob("nvidia[0-9]*")]


def cuda(torch: Any, seen: Sequence[str], environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check whether torch can use the machine's GPUs.

    Args:
        torch: The module.
        seen: What `nvidia_gpus` returned.
        environment: Environment variables; CUDA_VISIBLE_DEVICES may hide GPUs.
    """
    if torch.cuda.is_available():
        built_for = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        yield Finding(DEVICES, "GPUs", "ok", f"{torch.cuda.device_count()}, with {built_for}")
        return
    if not seen:
        yield Finding(DEVICES, "GPUs", "ok", "none; SAEs train on the CPU")
        return
    there = f"{plural(len(seen), 'NVIDIA GPU')} ({seen[0]})"
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        found = f"{there}, but this torch is built without CUDA: training would use the CPU"
        remedy = f"{install('torch', '--force-reinstall')} (on Linux; for other systems see {BUILDS})"
        yield Finding(DEVICES, "GPUs", "problem", found, remedy)
    elif hidden is not None and (not hidden.strip() or hidden.strip().startswith("-")):
        found = f"{there}, hidden by CUDA_VISIBLE_DEVICES={hidden!r}"
        yield Finding(DEVICES, "GPUs", "note", found, "unset CUDA_VISIBLE_DEVICES")
    else:
        reason = _why_not(torch)
        remedy = f"run nvidia-smi; if it fails, reboot or reinstall the driver (this torch is for CUDA {{}}: {BUILDS})"
        if re.search(r"driver.*(too old|insufficient)", reason):
            remedy = f"update the NVIDIA driver to one for CUDA {{}}, or install a torch for an older CUDA: {BUILDS}"
        found = f"{there} that torch cannot use ({reason})"
        yield Finding(DEVICES, "GPUs", "problem", found, remedy.format(torch.version.cuda))


def _why_not(torch: Any) -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError, OSError) as error:
        return describe_error(error).partition(". ")[0]  # without the advice and addresses that follow
    return "torch gives no reason"


def gpu(torch: Any, number: int) -> Iterator[Finding]:
    """Check one GPU: name, memory, capability, speed in bfloat16, and whether this torch is built for it."""
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    major, minor = properties.major, properties.minor
    fast = "fast in bf16" if (major, minor) >= (8, 0) else "float32 instead of bf16"
    name = f"GPU {number}"
    found = f"{properties.name}, {size(free)} of {size(total)} free, capability {major}.{minor}, {fast}"
    if not torch.version.hip and not _built_for(major, minor, torch.cuda.get_arch_list()):
        remedy = f"install a torch that is built for it ({BUILDS}), or hide the GPU: CUDA_VISIBLE_DEVICES=..."
        yield Finding(DEVICES, name, "problem", f"{found}; this torch has no code for it", remedy)
    elif free < total / 4:
        remedy = "see in nvidia-smi what uses the memory, or choose another GPU: CUDA_VISIBLE_DEVICES=..."
        yield Finding(DEVICES, name, "note", found, remedy)
    else:
        yield Finding(DEVICES, name, "ok", found)


def _built_for(major: int, minor: int, architectures: Sequence[str]) -> bool:
    """Tell whether torch has machine code of the same major capability, or PTX of an older one to compile."""
    for architecture in architectures:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", architecture)
        if parts is None:
            continue
        has = (int(parts[2]), int(parts[3]))
        if has <= (major, minor) and (parts[1] == "compute" or has[0] == major):
            return True
    return not architectures


def cpu(torch: Any, model: str, cores: int) -> Iterator[Finding]:
    """Report the CPU's name, and check which vector instructions torch uses."""
    level = torch.backends.cpu.get_cpu_capability()
    extras = {
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "VNNI": torch.cpu._is_vnni_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    vectors = ", ".join([level, *(name for name, there in extras.items() if there)])
    found = f"{model}, {plural(cores, 'core')}; {vectors}"
    if level == "DEFAULT":
        found = f"{model}, {plural(cores, 'core')}; no vector instructions that torch can use"
        remedy = "unset ATEN_CPU_CAPABILITY if it is set; otherwise use another machine, since this one is slow"
        yield Finding(DEVICES, "CPU", "note", found, remedy)
    else:
        yield Finding(DEVICES, "CPU", "ok", found)


def threads(number: int, cores: int, allowed: int, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check the number of torch's threads on the CPU.

    Args:
        number: `torch.get_num_threads()`.
        cores: Physical cores that this process may use.
        allowed: Threads that it may run at once; more than `cores` if a core runs two threads.
        environment: Environment variables, which may set the number of threads.
    """
    said = [f"{variable}={environment[variable]}" for variable in THREADS if environment.get(variable)]
    found = f"{number} for {plural(cores, 'core')}" + (f" ({', '.join(said)})" if said else "")
    names = " ".join(each.partition("=")[0] for each in said)
    if 2 * number <= cores:
        remedy = f"unset {names}, or export OMP_NUM_THREADS={cores}" if said else f"export OMP_NUM_THREADS={cores}"
        yield Finding(DEVICES, "threads", "note", f"{found}: the other cores are idle", remedy)
    elif number > allowed:
        found += f", but only {allowed} can run at once, so they wait for each other"
        yield Finding(DEVICES, "threads", "note", found, f"export OMP_NUM_THREADS={cores}")
    else:
        yield Finding(DEVICES, "threads", "ok", found)


def kernels(device: torch.device, *, triton: bool, capability: tuple[int, int] | None) -> Iterator[Finding]:
    """Report what `--kernels auto`, `--select-dtype auto` and `--dtype auto` choose on the device that would train.

    Args:
        device: That device.
        triton: Whether Triton is installed.
        capability: The GPU's capability; None for a CPU.
    """
    from saekit.sae.kernels import SELECT_DTYPES, choose_kernels, has_fast_bf16
    from saekit.sae.kernels.native_build import why_not

    dtype = "fast here: --dtype auto is bfloat16" if has_fast_bf16(device) else "slow here: --dtype auto is float32"
    yield Finding(DEVICES, "bf16", "ok", dtype)
    chosen = choose_kernels("auto", "auto", device)
    found = f"auto is {chosen.name}"
    if device.type != "cpu":
        found += f", selecting in {next(name for name, kind in SELECT_DTYPES.items() if kind == chosen.select_dtype)}"
    if device.type == "cuda" and not triton:
        found += ": the GPU kernels need Triton, which is not installed"
        yield Finding(DEVICES, "kernels", "note", found, "pip install triton")
    elif chosen.name == "triton" and capability is not None and capability < (8, 0):
        found += f"; Triton supports GPUs of capability 8.0 and newer, but this one has {capability[0]}.{capability[1]}"
        yield Finding(DEVICES, "kernels", "note", found, "use --kernels cpu if they fail")
    elif chosen.name == "cpu" and device.type == "cpu":
        found += f"; the faster native kernels cannot be used: {why_not()}"
        yield Finding(DEVICES, "kernels", "note", found, "apt install g++ (or name a C++ compiler in CXX)")
    else:
        yield Finding(DEVICES, "kernels", "ok", found)
    if device.type == "cpu":
        yield Finding(DEVICES, "selecting", "ok", selecting(chosen.name))


def selecting(backend: str) -> str:
    """Return the type in which `auto` selects on this CPU, in words, for the sizes that runs have measured.

    Args:
        backend: The name of the kernels on this CPU.
    """
    from saekit.sae.kernels.fastest import fastest, known, types

    measured = known(backend)
    if not measured:
        return f"auto takes the fastest of {', '.join(types())}; each run measures this at its sizes, but none has yet"
    told = []
    for work, seconds in measured.items():
        best = fastest(seconds)
        others = ", ".join(f"{name} {each / seconds[best]:.1f} ×" for name, each in seconds.items() if name != best)
        told.append(f"{best} for {work}" + (f" ({others} its time)" if others else ""))
    return f"auto is {'; '.join(told)}, as measured on this machine"
