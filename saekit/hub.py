"""What the name of a model or a data set means, a path or a repository on the hub, and whether the hub answers.

The libraries ask the hub for every file, and when it does not answer they try again for up to a minute each. So it is
asked once here, for a few seconds, and where it does not answer the libraries only look into their cache.
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
"""Seconds within which the hub has to answer; the libraries' own variable, HF_HUB_ETAG_TIMEOUT, takes precedence."""
REMEMBER = 60.0
"""Seconds for which it is not asked again."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?:{_PART}/)?{_PART}")
_LONGEST = 96
_FILE_ENDINGS = frozenset(
    {".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".text", ".md", ".yaml", ".yml"}
    | {".bin", ".npy", ".safetensors", ".pt", ".pth", ".ckpt", ".gguf"}
    | {".gz", ".zst", ".xz", ".bz2", ".zip", ".tar"}
)


def may_be_repository(name: str) -> bool:
    """Tell whether the hub could have a repository of that name: `name` or `owner/name`."""
    fits = _REPOSITORY.fullmatch(name) is not None and len(name) <= _LONGEST
    return fits and "--" not in name and ".." not in name and not name.endswith(".git")


def path_of(name: str) -> Path:
    """Return the path that a name is, with `~` resolved."""
    return Path(os.path.expanduser(name))  # unlike Path.expanduser, no error for a user that does not exist


def is_path(name: str) -> bool:
    """Tell whether a name means a path: something is there, it ends as files do, or the hub could not call it so."""
    path = path_of(name)
    return os.path.exists(path) or not may_be_repository(name) or path.suffix.lower() in _FILE_ENDINGS


def nothing_at(name: str, what: str = "file or folder") -> str:
    """Say that there is nothing at a path, and which path that exists is similar.

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
    """Ask the hub for a sign of life, unless it has been asked a moment ago.

    Returns:
        Why it does not answer; None if it does, or if the libraries are told not to ask it (HF_HUB_OFFLINE).
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return None
    asked = _answers.get(constants.ENDPOINT)
    if asked is None or time.monotonic() - asked[0] > REMEMBER:
        asked = _answers[constants.ENDPOINT] = (time.monotonic(), _ask(constants.ENDPOINT))
    return asked[1]


_answers: dict[str, tuple[float, str | None]] = {}
"""By endpoint: when it was asked, and what `unreachable` found."""


def _ask(endpoint: str) -> str | None:
    from huggingface_hub import constants, get_session

    seconds = constants.HF_HUB_ETAG_TIMEOUT if os.environ.get("HF_HUB_ETAG_TIMEOUT") else ASK
    problem: list[str | None] = [f"no answer within {seconds:g} s; HF_HUB_ETAG_TIMEOUT can be longer"]

    def request() -> None:
        try:
            get_session().head(endpoint, timeout=2 * seconds, follow_redirects=False)
            problem[0] = None  # whatever it says
        except Exception as error:  # noqa: BLE001  # of the HTTP library that huggingface_hub has chosen, which changes
            problem[0] = first_line(error)

    # In a thread, because looking up a name in a broken network has no time limit of its own.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(seconds)
    return None if problem[0] is None else f"the hub at {endpoint} cannot be reached ({problem[0]})"


@contextmanager
def asking_hub(name: str) -> Iterator[None]:
    """Let what is inside ask the hub for a repository, if it answers, and otherwise only use the hub's cache.

    Args:
        name: What it loads. For a path, the hub is never asked.
    """
    problem = None if (local := is_path(name)) else unreachable()
    if not local and problem is None:
        yield
        return
    with _offline():
        yield
    if problem is not None and os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).warning("%s is taken from the cache on this machine: %s", name, problem)


def why_not_found(name: str) -> str:
    """Say where a repository was looked for without success."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "it is not in the hub's cache on this machine, and HF_HUB_OFFLINE forbids to ask the hub"
    if (problem := unreachable()) is not None:
        return f"it is not in the hub's cache on this machine, and {problem}"
    return "it is neither on this machine nor on the hub"


def check_names(model: str | None = None, *data: str | None, revision: str | None = None) -> None:
    """Check the names of a model and of data sets, as far as they are given: `check_model_name`, `check_data_name`."""
    for name in data:
        if name is not None:
            check_data_name(name)
    if model is not None:
        check_model_name(model, revision)


def check_model_name(name: str, revision: str | None = None) -> None:
    """Refuse a model's name, without loading a library, where that is enough to see that it leads nowhere.

    Raises:
        UserError: If it is a path with nothing there, or a repository that is not in the cache while the hub does not
            answer.
    """
    if is_path(name):
        path = path_of(name)
        if os.path.isfile(path):
            raise UserError(f"model {name!r} is a file: give the folder that it is in, {path.parent}")
        if not os.path.isdir(path):
            raise UserError(f"model {name!r}: {nothing_at(name, 'folder')}")
    elif unreachable() is not None:
        from huggingface_hub import try_to_load_from_cache

        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            raise UserError(f"model {name!r} could not be loaded: {why_not_found(name)}")


def check_data_name(name: str) -> None:
    """Refuse a data set's name, without loading a library, if it is a path or pattern with nothing there.

    Raises:
        UserError: If so.
    """
    if is_path(name) and not os.path.exists(path_of(name)) and not glob.glob(str(path_of(name)), recursive=True):
        raise UserError(f"data set {name!r}: {nothing_at(name)}")


@contextmanager
def _offline() -> Iterator[None]:
    """Tell the libraries that are loaded not to use the network, as HF_HUB_OFFLINE does before they are loaded."""
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
