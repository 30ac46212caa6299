"""Checks of saekit, Python, and the libraries that saekit requires."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from saekit._version import __version__
from saekit.doctor.findings import LIBRARIES, SAEKIT, Finding, describe_error

if TYPE_CHECKING:
    from packaging.requirements import Requirement

NAMES = (
    "torch",
    "accelerate",
    "transformers",
    "datasets",
    "deepspeed",
    "bitsandbytes",
    "triton",
    "safetensors",
    "tokenizers",
    "typer",
    "rich",
    "numpy",
)
INDISPENSABLE = frozenset(NAMES) - {"deepspeed", "bitsandbytes", "triton"}
"""Libraries without which saekit cannot train. `ranks` and `devices` check the others."""
UNKNOWN = "of unknown version"
BOUND_BY = {"tokenizers": "transformers", "triton": "torch"}
"""Libraries that saekit does not require itself, and the library whose requirement is checked instead."""
SERVES = {"deepspeed": "--placement zero3", "bitsandbytes": "--load-in-8bit and --optimizer adam8bit"}
"""The options that need a library."""


def about() -> Iterator[Finding]:
    """Report the version of saekit, and check whether its requirements are known."""
    try:
        version("saekit")
    except PackageNotFoundError:
        found = f"{__version__}, run from a folder without installation: the versions it requires are unknown"
        yield Finding(SAEKIT, "version", "note", found, "pip install -e . in that folder")
    else:
        yield Finding(SAEKIT, "version", "ok", __version__)


def python(running: str, bounds: str | None) -> Iterator[Finding]:
    """Check Python's version against `Requires-Python`."""
    from packaging.specifiers import SpecifierSet

    if bounds and not SpecifierSet(bounds).contains(running, prereleases=True):
        remedy = f"create an environment with Python {bounds}"
        yield Finding(SAEKIT, "Python", "problem", f"{running}; saekit needs {bounds}", remedy)
    else:
        yield Finding(SAEKIT, "Python", "ok", running)


def system() -> Iterator[Finding]:
    """Report the operating system, for bug reports."""
    yield Finding(SAEKIT, "system", "ok", platform.platform())


def python_bounds() -> str | None:
    """Return `Requires-Python` of the installed saekit; None if it is not installed."""
    try:
        return metadata("saekit")["Requires-Python"]
    except (PackageNotFoundError, KeyError):
        return None


def requirements(distribution: str) -> dict[str, Requirement]:
    """Return the requirements of an installed distribution on this system, without extras; empty if not installed."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        asked = [Requirement(line) for line in requires(distribution) or ()]
    except PackageNotFoundError:
        return {}
    fitting = (each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""}))
    return {canonicalize_name(each.name): each for each in fitting}


def library(name: str, asked: Mapping[str, Requirement]) -> Iterator[Finding]:
    """Check that a library is installed, within its bounds, and importable.

    Args:
        name: The name of the distribution and of the module.
        asked: What saekit requires on this system, by name.
    """
    requirement = (requirements(BOUND_BY[name]) if name in BOUND_BY else asked).get(name)
    bounds = _bounds(requirement)
    installed = installed_version(name)
    if installed is None:
        yield _missing(name, bounds, asked_for=requirement is not None)
    elif name in INDISPENSABLE and (error := _import_error(name)) is not None:
        found = f"{installed} cannot be imported ({error})"
        yield Finding(LIBRARIES, name, "problem", found, _pip(name, bounds, "--force-reinstall"), blocks=True)
    elif requirement is not None and not _within(installed, requirement):
        found = f"{installed}, but {BOUND_BY.get(name, 'saekit')} needs {bounds}"
        yield Finding(LIBRARIES, name, "problem", found, _pip(name, bounds))
    else:
        yield Finding(LIBRARIES, name, "ok", f"{installed} ({bounds})" if bounds else installed)


def install(name: str, *flags: str) -> str:
    """Return the command that installs a version of a library that saekit supports."""
    return _pip(name, _bounds(requirements("saekit").get(name)), *flags)


def _pip(name: str, bounds: str, *flags: str) -> str:
    return " ".join(["pip install", *flags, f'"{name}{bounds}"' if bounds else name])


def _within(installed: str, requirement: Requirement) -> bool:
    return installed == UNKNOWN or requirement.specifier.contains(installed, prereleases=True)


def _missing(name: str, bounds: str, *, asked_for: bool) -> Finding:
    remedy = _pip(name, bounds)
    if name == "triton":  # only GPUs need it, see `devices.kernels`
        return Finding(LIBRARIES, name, "ok", "not installed; only GPUs need it")
    if name in INDISPENSABLE:
        return Finding(LIBRARIES, name, "problem", "not installed", remedy, blocks=True)
    found = f"not installed: {SERVES[name]} cannot be used"
    if not asked_for:
        return Finding(LIBRARIES, name, "note", f"{found}; saekit does not require it on this system", remedy)
    return Finding(LIBRARIES, name, "problem", found, remedy)


def _bounds(requirement: Requirement | None) -> str:
    """Return the bounds of a requirement with the lower bound first: `>=2.6,<2.14`."""
    if requirement is None:
        return ""
    return ",".join(sorted(str(requirement.specifier).split(","), key=lambda bound: not bound.startswith(">")))


def installed_version(name: str) -> str | None:
    """Return the version of a library; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        pass
    try:
        # Some builds have another name: ROCm's Triton is pytorch-triton-rocm.
        return UNKNOWN if find_spec(name) is not None else None
    except ValueError:  # a module without a file has taken the name
        return None


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # noqa: BLE001  # a library that is built for another torch can raise anything
        return describe_error(error)
    return None
