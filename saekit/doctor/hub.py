"""Checks of the hub: the cache, the token, and offline mode. Nothing here uses the network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from saekit.doctor.findings import HUB, Finding
from saekit.units import size

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Environment variables that hold a token; the first one that is set is used."""
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""Environment variables that forbid access to the hub."""
MOST_FILES = 20_000
"""A cache with more files is not measured, since that takes long on a network file system."""


def token(environment: Mapping[str, str], file: Path) -> Iterator[Finding]:
    """Check whether and where a token is set. The token itself is neither stored nor read from its file.

    Args:
        environment: Environment variables, which may hold the token.
        file: The file to which `hf auth login` writes it.
    """
    variable = next((name for name in TOKENS if environment.get(name, "").strip()), None)
    if variable is not None:
        found = f"a token is set (from {variable})"
    elif file.is_file() and file.stat().st_size > 0:
        found = "a token is set (from the token file)"
    else:
        found = "none: public repositories only"
    if _on(environment, "HF_HUB_DISABLE_IMPLICIT_TOKEN") and not found.startswith("none"):
        found += ", but HF_HUB_DISABLE_IMPLICIT_TOKEN prevents its use"
        yield Finding(HUB, "token", "note", found, "unset HF_HUB_DISABLE_IMPLICIT_TOKEN, or use --hf-token")
    else:
        yield Finding(HUB, "token", "ok", found)


def offline(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Check whether an environment variable forbids access to the hub."""
    said = [f"{name}={environment[name]}" for name in OFFLINE if _on(environment, name)]
    if said:
        remedy = f"unset {' '.join(each.partition('=')[0] for each in said)}"
        found = f"{', '.join(said)}: only local and cached models and data sets can be used"
        yield Finding(HUB, "access", "note", found, remedy)
    else:
        yield Finding(HUB, "access", "ok", "allowed (the network was not tried)")


def contents(cache: Path) -> Iterator[Finding]:
    """Report the size of the cache.

    Args:
        cache: The hub's cache, with one folder per repository.
    """
    if not cache.is_dir():
        yield Finding(HUB, "cached", "ok", "nothing yet")
        return
    repositories = [each for each in cache.iterdir() if each.name.startswith(("models--", "datasets--"))]
    n_bytes = blob_bytes(repositories)
    much = f"more than {MOST_FILES:,} files" if n_bytes is None else size(n_bytes)
    number = len(repositories)
    found = f"{number} repository" if number == 1 else f"{number} repositories"
    yield Finding(HUB, "cached", "ok", f"{found}, {much}")


def blob_bytes(repositories: list[Path], most: int = MOST_FILES) -> int | None:
    """Return the bytes of downloaded files, each counted once; None if there are more than `most` files."""
    total = files = 0
    for repository in repositories:
        if not (repository / "blobs").is_dir():
            continue
        with os.scandir(repository / "blobs") as entries:
            for entry in entries:
                files += 1
                if files > most:
                    return None
                total += entry.stat(follow_symlinks=False).st_size
    return total


def _on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
