"""Compile `native.cpp` once on the machine that runs it, and load it.

Compiling here rather than in a wheel lets it use every instruction of this CPU. It shares the threads of torch's OpenMP
runtime. A second thread pool would compete with torch's, whose threads spin for milliseconds after each operation.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from saekit.machine import cache_folder

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("native_*.h")))
"""`native.cpp` and the files that it includes."""
FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
THIS_CPU = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}
"""The compiler's flag for all instructions of this CPU, by architecture."""
COMPILERS = ("c++", "g++", "clang++")
RUNTIMES = ("libgomp", "libiomp5", "libomp")
"""OpenMP runtimes with the entry points that compilers call. torch has loaded one of them."""
LONGEST_S = 120
"""Seconds after which a compiler is stopped."""


class NoNativeKernelsError(RuntimeError):
    """Raised if the native kernels cannot be built or loaded on this machine. The message says why."""


@cache
def why_not() -> str | None:
    """Return why the native kernels cannot be used here, or None if they can. The first call may compile them."""
    try:
        library()
    except NoNativeKernelsError as error:
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels, from the cache if this source was compiled before for this CPU and compiler.

    Raises:
        NoNativeKernelsError: If there is no compiler, if it fails, or if torch uses an unknown OpenMP runtime.
    """
    runtime, compiler = _openmp_runtime(), _compiler()
    flags = (*FLAGS, THIS_CPU[platform.machine()]) if platform.machine() in THIS_CPU else FLAGS
    sources = (source.read_text("utf-8") for source in SOURCES)
    name = hashlib.sha256("\0".join((*sources, _version(compiler), *flags, _cpu())).encode())
    path = cache_folder() / f"native-{name.hexdigest()[:16]}.so"
    if not path.exists():
        _compile(compiler, flags, path)
    ctypes.CDLL(runtime, mode=ctypes.RTLD_GLOBAL)  # resolves the kernels' OpenMP calls; they link to no runtime
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NoNativeKernelsError(f"the compiled kernels cannot be loaded: {error}") from error
    loaded.all_below.restype = loaded.amx_ready.restype = ctypes.c_bool
    return loaded


def _openmp_runtime() -> str:
    """Return the file of torch's OpenMP runtime, which importing torch has loaded."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise NoNativeKernelsError(f"native kernels need Linux, but this is {sys.platform}") from None
    loaded = {line.split(maxsplit=5)[5].strip() for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    found = sorted(file for file in loaded if Path(file).name.startswith(RUNTIMES))
    torchs = [file for file in found if Path(file).is_relative_to(Path(torch.__file__).parent)] or found
    if not torchs:
        raise NoNativeKernelsError("torch uses an OpenMP runtime that native kernels cannot share threads with")
    return torchs[0]


def _compiler() -> str:
    named = os.environ.get("CXX")
    found = next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
    if found is None:
        raise NoNativeKernelsError(f"there is no C++ compiler ({named or ', '.join(COMPILERS)})")
    return found


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoNativeKernelsError(f"the C++ compiler does not run: {error}") from error


def _cpu() -> str:
    """Describe the CPU, since different machines may share a cache in a home directory."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    telling = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(telling)}))


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compile to `path` atomically, since other ranks may compile at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        object_file, shared = Path(directory, "native.o"), Path(directory, "native.so")
        # Link without -fopenmp, which would bind the kernels to another runtime than torch's.
        for command in (
            [compiler, *flags, "-c", str(SOURCE), "-o", str(object_file)],
            [compiler, "-shared", str(object_file), "-o", str(shared)],
        ):
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, check=False)
            except (OSError, subprocess.SubprocessError) as error:
                raise NoNativeKernelsError(f"{compiler} failed: {error}") from error
            if done.returncode:
                raise NoNativeKernelsError(f"{compiler} failed: {done.stderr.strip() or done.returncode}")
        shared.replace(path)
