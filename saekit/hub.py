"""Decide whether the name of a model or data set is a path or a hub repository, and whether the hub answers.

The libraries ask the hub for every file, and retry for up to a minute each if it does not answer. saekit therefore asks
the hub once, for a few seconds. If it does not answer, the libraries only look in their cache.
"""

from __future__ import annotations

import difflib
import glob
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saekit.errors import UserError, first_line

ASK = 2.5
"""Seconds that the hub has to answer. The libraries' own variable, HF_HUB_ETAG_TIMEOUT, takes precedence."""
REMEMBER = 60.0
"""Seconds until the hub is asked again."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?:{_PART}/)?{_PART}")
_LONGEST = 96
_FILE_ENDINGS = frozenset(
    {".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".text", ".md", ".yaml", ".yml"}
    | {".bin", ".npy", ".safetensors", ".pt", ".pth", ".ckpt", ".gguf"}
    | {".gz", ".zst", ".xz", ".bz2", ".zip", ".tar"}
)


def may_be_repository(name: str) -> bool:
    """Return whether the hub allows a repository of this name: `name` or `owner/name`."""
    fits = _REPOSITORY.fullmatch(name) is not None and len(name) <= _LONGEST
    return fits and "--" not in name and ".." not in name and not name.endswith(".git")


def path_of(name: str) -> Path:
    """Return a name as a path, with `~` resolved."""
    return Path(os.path.expanduser(name))  # unlike Path.expanduser, raises nothing if the user does not exist


def is_path(name: str) -> bool:
    """Return whether a name is a path: the path exists, it has a file's suffix, or the hub does not allow the name."""
    path = path_of(name)
    return os.path.exists(path) or not may_be_repository(name) or path.suffix.lower() in _FILE_ENDINGS


def nothing_at(name: str, what: str = "file or folder") -> str:
    """Return a message that nothing is at a path, with a similar path that exists.

    Args:
        name: The path as the user wrote it.
        what: What was expected there.
    """
    if any(character in name for character in "*?["):
        return f"no {what} matches that pattern"
    path = path_of(name)
    try:
        there = sorted(os.listdir(path.parent))
    except (OSError, ValueError):  # no such folder, or a name that no file can have
        there = []
    near = difflib.get_close_matches(path.name, there, n=1)
    hint = f" (did you mean {path.parent / near[0]}?)" if near else ""
    return f"there is no such {what}{hint}"


def unreachable() -> str | None:
    """Check that the hub answers; the result is kept for `REMEMBER` seconds.

    Returns:
        Why it does not answer. None if it does, or if HF_HUB_OFFLINE tells the libraries not to ask.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    asked = _answers.get(constants.ENDPOINT)
    if asked is None or time.monotonic() - asked[0] > REMEMBER:
        asked = _answers[constants.ENDPOINT] = (time.monotonic(), _ask(constants.ENDPOINT))
    return asked[1]


_answers: dict[str, tuple[float, str | None]] = {}
"""By endpoint: when it was last asked, and the result of `unreachable`."""


def _ask(endpoint: str) -> str | None:
    from huggingface_hub import constants, get_session

    seconds = constants.HF_HUB_ETAG_TIMEOUT if os.environ.get("HF_HUB_ETAG_TIMEOUT") else ASK
    problem: list[str | None] = [f"no answer within {seconds:g} s; set HF_HUB_ETAG_TIMEOUT to wait longer"]

    def request() -> None:
        try:
            get_session().head(endpoint, timeout=2 * seconds, follow_redirects=False)
            problem[0] = None  # any answer will do
        except Exception as error:  # noqa: BLE001  # huggingface_hub's HTTP library, and so its errors, can change
            problem[0] = first_line(error)

    # In a thread, because a DNS lookup in a broken network has no timeout of its own.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(seconds)
    return None if problem[0] is None else f"the hub at {endpoint} cannot be reached ({problem[0]})"


@contextmanager
def asking_hub(name: str) -> Iterator[None]:
    """Let the code inside download from the hub if the hub answers, and otherwise only use the cache.

    Args:
        name: The model or data set that the code loads. For a path, the hub is never asked.
    """
    problem = None if (local := is_path(name)) else unreachable()
    if not local and problem is None:
        yield
        return
    with _offline():
        yield
    if problem is not None and os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning("using %s from the cache on this machine: %s", name, problem)


def why_not_found(name: str) -> str:
    """Return where a repository was searched for and not found, for a message."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "it is not in the hub's cache on this machine, and HF_HUB_OFFLINE is set"
    if (problem := unreachable()) is not None:
        return f"it is not in the hub's cache on this machine, and {problem}"
    return "it is neither on this machine nor on the hub"


def check_names(model: str | None = None, *data: str | None, revision: str | None = None) -> None:
    """Check the names that are given with `check_model_name` and `check_data_name`."""
    for name in data:
        if name is not None:
            check_data_name(name)
    if model is not None:
        check_model_name(model, revision)


def check_model_name(name: str, revision: str | None = None) -> None:
    """Reject a model's name early, before heavy libraries are loaded, if it clearly leads nowhere.

    Raises:
        UserError: If it is a path that does not exist, or a repository that is not in the cache while the hub does not
            answer.
    """
    if is_path(name):
        path = path_of(name)
        if os.path.isfile(path):
            raise UserError(f"model {name!r} is a file: pass the folder that contains it, {path.parent}")
        if not os.path.isdir(path):
            raise UserError(f"model {name!r}: {nothing_at(name, 'folder')}")
    elif unreachable() is not None:
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            raise UserError(f"model {name!r} could not be loaded: {why_not_found(name)}")


def check_data_name(name: str) -> None:
    """Reject a data set's name early, before heavy libraries are loaded, if it is a path or pattern of no file.

    Raises:
        UserError: If the path does not exist or the pattern matches no file.
    """
    if is_path(name) and not os.path.exists(path_of(name)) and not glob.glob(str(path_of(name)), recursive=True):
        raise UserError(f"data set {name!r}: {nothing_at(name)}")


@contextmanager
def _offline() -> Iterator[None]:
    """Stop libraries that are already loaded from using the network; HF_HUB_OFFLINE only works before that."""
    from huggingface_hub import constants

    modules: list[Any] = [constants]
    if "datasets" in sys.modules:
        modules.append(sys.modules["datasets"].config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
