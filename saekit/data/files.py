"""Find the files that a data set's name means, with their splits, format and compression."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from saekit.errors import UserError
from saekit.hub import path_of

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".csv": "csv"}
"""The name of the format in `datasets.load_dataset`, by file name ending."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""The libraries' name of the compression, by the ending that follows the format's."""
NOT_DATA = ("readme.md", "license", "licence", "notice", "config.json", "dataset_info.json", "dataset_infos.json")
"""Names, in lower case, of files in a data folder that are not data."""
LIBRARY = frozenset(("name", "data_files", "data_dir"))
"""Arguments of `datasets.load_dataset` that say which files of a folder to read."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words in names of files and folders that mean a split, as in `datasets`."""
WORD = re.compile(
    rf"(?:^|(?<=[-._ 0-9]))({'|'.join(word for words in SPLITS.values() for word in words)})(?=[-._ 0-9]|$)"
)
SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


class Ending(NamedTuple):
    """The ending of a file's name, in lower case: `.jsonl` and `.gz` for `a.jsonl.gz`."""

    format: str
    compression: str
    """Empty if the file is not compressed."""


class Files(NamedTuple):
    """Local files of one format."""

    format: str
    """The format's name in `datasets.load_dataset`."""
    by_split: dict[str, list[str]]
    """Sorted paths, by split."""

    @property
    def compressions(self) -> set[str]:
        """Return the compressions of the files, by the libraries' names."""
        return {COMPRESSED[end] for files in self.by_split.values() for file in files if (end := ending(file)[1])}


def ending(name: str) -> Ending:
    """Split off the ending of a file's name."""
    root, last = os.path.splitext(name.lower())
    return Ending(os.path.splitext(root)[1], last) if last in COMPRESSED else Ending(last, "")


def find_files(name: str, given: Iterable[str] = ()) -> Files | None:
    """Find the files that the name of a file, a glob or a folder means.

    A folder means the files of one data format in it and below it, except hidden ones. Their names or folders say which
    split they belong to (`train.jsonl`, `test/`). If none does, all belong to `train`.

    Args:
        name: The data set's name.
        given: Names of the arguments that the data set is loaded with.

    Returns:
        The files. None if `datasets` should find them itself: a name on the hub, or a folder that describes itself.

    Raises:
        UserError: If the files differ in format, or if a file's split is unclear.
    """
    path = path_of(name)
    if path.is_dir():
        if LIBRARY & set(given) or _describes_itself(path):
            return None
        files = _data_files(name, path)
        return Files(_one_format(name, files), _by_split(name, path, files)) if files else None
    # An existing file is taken literally, even if its name looks like a pattern.
    pattern = glob.escape(str(path)) if path.is_file() else str(path)
    files = sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
    return Files(_one_format(name, files), {"train": files}) if files else None


def is_all_text(folder: Path) -> bool:
    """Return whether all data files in a folder are .txt files."""
    endings = {ending(file).format for file in _files_below(folder) if os.path.basename(file).lower() not in NOT_DATA}
    return endings == {".txt"}


def _files_below(folder: Path) -> list[str]:
    """Return the sorted paths of all files that are neither hidden nor in a folder such as `__pycache__`."""
    below = glob.glob(os.path.join(glob.escape(str(folder)), "**", "*"), recursive=True)
    inner = len(folder.parts)
    return sorted(
        file
        for file in below
        if os.path.isfile(file) and not any(part.startswith("__") for part in Path(file).parts[inner:-1])
    )


def _data_files(name: str, folder: Path) -> list[str]:
    """Return a folder's data files. Empty if none of them has a format of `FORMATS`."""
    files = _files_below(folder)
    data = [file for file in files if os.path.basename(file).lower() not in NOT_DATA]
    if data and all(ending(file).format == ".md" for file in data):  # then README.md is a document too
        data = [file for file in files if ending(file).format == ".md"]
    if any(ending(file).format in FORMATS for file in data):
        return data
    if any(ending(file).format == ".bin" for file in data):
        raise UserError(f"data set {name!r} is a folder with .bin files: pass one of the files")
    return []


def _one_format(name: str, files: Sequence[str]) -> str:
    """Return the format that all files share, and check that no file is there both plain and compressed."""
    first: dict[str | None, str] = {}
    plain: dict[str, str] = {}
    for file in files:
        end = ending(file)
        first.setdefault(FORMATS.get(end.format), file)
        other = plain.setdefault(file[: len(file) - len(end.compression)], file)
        if other != file:
            raise UserError(
                f"data set {name!r}: {os.path.basename(other)} and {os.path.basename(file)} are the same file, plain "
                "and compressed: remove one, or pass the files to read as a glob"
            )
    if None in first:
        of = f"files of one format ({', '.join(FORMATS)}, optionally followed by {' or '.join(COMPRESSED)})"
        unpack = ", or one .bin file, not compressed" if ending(first[None]).format == ".bin" else ""
        raise UserError(f"data set {name!r}: {os.path.basename(first[None])} has an unknown format: pass {of}{unpack}")
    if len(first) > 1:
        one, two = [os.path.basename(file) for file in first.values()][:2]
        raise UserError(
            f"data set {name!r}: {one} and {two} have different formats: pass the files of one of them as a glob, such "
            f"as '{Path(name) if Path(name).is_dir() else Path(name).parent}/*{ending(one).format}'"
        )
    return next(each for each in first if each is not None)


def _by_split(name: str, folder: Path, files: list[str]) -> dict[str, list[str]]:
    """Sort a folder's files into splits, by `data/SPLIT-00000-of-00002`, words in folders, or words in file names."""
    inside = {file: Path(file).relative_to(folder).as_posix() for file in files}
    for look in (_of_shard, _of_folders, _of_name):
        splits = {file: look(path) for file, path in inside.items()}
        if any(splits.values()):
            break
    else:
        return {"train": files}
    found = sorted(set().union(*splits.values()))
    unclear = next((file for file in files if len(splits[file]) != 1), None)
    if unclear is not None:
        raise UserError(
            f"data set {name!r}: by its name, {inside[unclear]} belongs to {'several' if splits[unclear] else 'none'} "
            f"of the splits ({', '.join(found)}): pass the files to read as a glob, such as "
            f"'{folder}/**/*{ending(unclear).format}'"
        )
    return {split: [file for file in files if split in splits[file]] for split in found}


def _of_shard(path: str) -> set[str]:
    found = SHARD.fullmatch(path)
    return {found[1]} if found else set()


def _of_folders(path: str) -> set[str]:
    return _splits_of(path.split("/")[:-1])


def _of_name(path: str) -> set[str]:
    return _splits_of(path.split("/")[-1:])


def _splits_of(names: Iterable[str]) -> set[str]:
    """Return the splits that words in the names of files or folders mean."""
    words = {word for name in names for word in WORD.findall(name)}
    return {split for split, of in SPLITS.items() if words & set(of)}


def _describes_itself(folder: Path) -> bool:
    """Return whether a folder describes its own files, as data sets on the hub do with `configs` in README.md."""
    file = folder / "README.md"
    if (folder / ".huggingface.yaml").exists():
        return True
    try:
        head = file.read_text(encoding="utf-8").split("---\n") if file.is_file() else []
        return len(head) > 2 and not head[0] and "configs" in (yaml.safe_load(head[1]) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError):
        return False
