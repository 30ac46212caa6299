"""Checks of what several ranks and 8 bits need: the outcomes of probes, compilers and headers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from saekit.doctor.findings import EIGHT_BITS, RANKS, Finding
from saekit.doctor.libraries import install
from saekit.doctor.probes import Outcome
from saekit.units import plural

HOSTS = "or add this host's name and address to /etc/hosts"

GLOO_SOURCE = re.compile(r"\[enforce fail at [^]]*\] (\S+ != nullptr\. )?")
"""The place in gloo's source that precedes the message of an error."""


def gloo(outcome: Outcome, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check whether ranks can connect over gloo, which every run on several ranks needs, also on GPUs."""
    if outcome.failed is not None:
        interface = environment.get("GLOO_SOCKET_IFNAME")
        remedy = f"export GLOO_SOCKET_IFNAME=lo (or the network's interface, see ip addr), {HOSTS}"
        if interface:
            remedy = f"unset GLOO_SOCKET_IFNAME (now {interface}), or name an interface that ip addr lists"
        reason = GLOO_SOURCE.sub("", outcome.failed)
        yield Finding(RANKS, "gloo", "problem", f"tried: ranks cannot meet ({reason})", remedy)
        return
    address, seconds = outcome.said.get("address"), outcome.said["seconds"]
    met = f"tried: {plural(outcome.said['ranks'], 'rank')} met in {seconds:.2f} s"
    if environment.get("GLOO_SOCKET_IFNAME"):
        yield Finding(RANKS, "gloo", "ok", f"{met} over {environment['GLOO_SOCKET_IFNAME']}")
    elif address is None:
        found = f"{met}, but only within this machine: its host name does not resolve to one of its addresses"
        remedy = f"for several machines: export GLOO_SOCKET_IFNAME=eth0 (the network's interface, see ip addr), {HOSTS}"
        yield Finding(RANKS, "gloo", "note", found, remedy)
    else:
        reach = " (one machine)" if address.startswith("127.") else ""
        yield Finding(RANKS, "gloo", "ok", f"{met} over {address}{reach}")


def nccl(version: Callable[[], object], gpus: int) -> Iterator[Finding]:
    """Check NCCL, which ranks on several GPUs use.

    Args:
        version: `torch.cuda.nccl.version`.
        gpus: The number of GPUs.
    """
    try:
        found = version()
    except (AttributeError, RuntimeError):  # torch is built without NCCL
        found = None
    if isinstance(found, tuple):
        yield Finding(RANKS, "NCCL", "ok", ".".join(map(str, found[:3])) + " (not tried)")
    elif gpus > 1:
        remedy = f"on Linux: {install('torch', '--force-reinstall')}; on Windows, which has no NCCL: use WSL or one GPU"
        yield Finding(RANKS, "NCCL", "problem", f"not in this torch: {gpus} GPUs cannot train together", remedy)
    else:
        yield Finding(RANKS, "NCCL", "ok", "not in this torch; only several GPUs need it")


def deepspeed(outcome: Outcome) -> Iterator[Finding]:
    """Check whether DeepSpeed can be imported, for `--placement zero3`."""
    if outcome.failed is not None:
        found = f"cannot be imported ({outcome.failed}): --placement zero3 cannot be used"
        remedy = f"{install('deepspeed', '--force-reinstall', '--no-deps')}, or use --placement layer-map"
        yield Finding(RANKS, "DeepSpeed", "problem", found, remedy)
    else:
        yield Finding(RANKS, "DeepSpeed", "ok", "imported: --placement zero3 can be used")


def compilers(which: Callable[[str], str | None], environment: Mapping[str, str], *, triton: bool) -> Iterator[Finding]:
    """Check compilers, which Triton and native kernels need.

    saekit uses none of the operations that DeepSpeed can compile, such as CPU Adam: zero3 trains with saekit's own
    optimizers, offloaded or not, and disables DeepSpeed's shared-memory operation (see `saekit.placement.deepspeed`).

    Args:
        which: `shutil.which`.
        environment: Environment variables; CC and CXX may name compilers.
        triton: Whether this machine uses Triton's kernels.
    """
    c = next(filter(which, [environment.get("CC") or "gcc", "gcc", "clang"]), None)
    missing = [name for name in (environment.get("CXX") or "c++", "ninja") if not which(name)]
    if triton and c is None:
        remedy = "apt install gcc (or name a C compiler in CC), or use --kernels cpu"
        yield Finding(RANKS, "compiler", "problem", "no C compiler, which Triton needs to launch kernels", remedy)
    elif missing:
        found = f"no {' and no '.join(missing)}: only DeepSpeed's CPU Adam needs it, which saekit does not use"
        remedy = " and ".join("pip install ninja" if name == "ninja" else "apt install g++" for name in missing)
        yield Finding(RANKS, "compiler", "note", found, f"nothing, or {remedy}")
    else:
        need = f"; {c} starts Triton's kernels" if triton else ", which compiles native kernels"
        yield Finding(RANKS, "compiler", "ok", f"ninja and C++{need}")


def headers(include: Path) -> Iterator[Finding]:
    """Check Python's headers, which Triton compiles against.

    Args:
        include: The folder of the headers.
    """
    if (include / "Python.h").is_file():
        yield Finding(RANKS, "Python headers", "ok", "installed, for Triton")
    else:
        remedy = "apt install python3-dev (of this Python's version), or use --kernels cpu"
        found = "missing, but Triton needs them to launch kernels"
        yield Finding(RANKS, "Python headers", "problem", found, remedy)


def load_in_8bit(outcome: Outcome, *, cuda: bool) -> Iterator[Finding]:
    """Check `--load-in-8bit`, which needs a GPU."""
    if not cuda:
        found = "cannot be used: it needs a CUDA GPU, and there is none"
        yield Finding(
            EIGHT_BITS, "load-in-8bit", "note", found, "leave it out; --dtype bfloat16 takes half of float32's memory"
        )
    elif outcome.failed is not None:
        found = f"cannot be used: bitsandbytes fails ({outcome.failed})"
        yield Finding(EIGHT_BITS, "load-in-8bit", "problem", found, install("bitsandbytes", "--upgrade"))
    else:
        yield Finding(EIGHT_BITS, "load-in-8bit", "ok", "can be used")


def adam8bit(outcome: Outcome) -> Iterator[Finding]:
    """Check `--optimizer adam8bit`, which recent versions of bitsandbytes also run on a CPU."""
    device = outcome.said.get("device")
    if outcome.failed is None and outcome.said.get("moved"):
        yield Finding(EIGHT_BITS, "adam8bit", "ok", f"tried: one step on the {'GPU' if device == 'cuda' else 'CPU'}")
        return
    reason = outcome.failed or "its step changed nothing"
    found = f"cannot be used{f' on {device}' if device else ''} ({reason})"
    remedy = f"{install('bitsandbytes', '--upgrade')}, or use --optimizer adam --moments-dtype bf16"
    yield Finding(EIGHT_BITS, "adam8bit", "problem", found, remedy)
