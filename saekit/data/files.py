"""The files that a data set's name stands for: which they are, in which split, of what format, compressed or not."""

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
"""File name endings and the name that `datasets.load_dataset` has for their format."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
"""Endings that can follow, and the name that libraries have for the compression."""
BESIDE = ("readme.md", "license", "licence", "notice", "config.json", "dataset_info.json", "dataset_infos.json")
"""Files, in small letters, that lie next to the data in a folder and are none."""
LIBRARY = frozenset(("name", "data_files", "data_dir"))
"""Arguments that say which files of a folder to read, in the library's own way."""

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Splits, and the words in names of files and folders that stand for them, as `datasets` has them."""
WORD = re.compile(
    rf"(?:^|(?<=[-._ 0-9]))({'|'.join(word for words in SPLITS.values() for word in words)})(?=[-._ 0-9]|$)"
)
SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")


class Ending(NamedTuple):
    """The end of a file's name, in small letters: `.jsonl` and `.gz` of `a.jsonl.gz`."""

    format: str
    compression: str
    """Empty if it is not compressed."""


class Files(NamedTuple):
    """Local files of one format."""

    format: str
    """As `datasets.load_dataset` calls it."""
    by_split: dict[str, list[str]]
    """Paths, sorted."""

    @property
    def compressions(self) -> set[str]:
        """Return the compressions among them, as libraries call them."""
        return {COMPRESSED[end] for files in self.by_split.values() for file in files if (end := ending(file)[1])}


def ending(name: str) -> Ending:
    """Return the end of a file's name."""
    root, last = os.path.splitext(name.lower())
    return Ending(os.path.splitext(root)[1], last) if last in COMPRESSED else Ending(last, "")


def find_files(name: str, given: Iterable[str] = ()) -> Files | None:
    """Find the files that a file, a glob or a folder stands for.

    A folder stands for the files of a data format that lie in it and below it, hidden ones left out. They are in the
    splits that their names or folders say (`train.jsonl`, `test/`), all in `train` if none does.

    Args:
        name: The data set's.
        given: Names of arguments to load it with.

    Returns:
        None if these are no files of ours: a name on the hub, or a folder that the library knows better how to read.

    Raises:
        UserError: If the files are not of one format, or their names leave open what is in which split.
    """
    path = path_of(name)
    if path.is_dir():
        if LIBRARY & set(given) or _describes_itself(path):
            return None
        files = _data_files(name, path)
        return Files(_one_format(name, files), _by_split(name, path, files)) if files else None
    # A file whose own name looks like a pattern is meant as it is.
    pattern = glob.escape(str(path)) if path.is_file() else str(path)
    files = sorted(file for file in glob.glob(pattern, recursive=True) if os.path.isfile(file))
    return Files(_one_format(name, files), {"train": files}) if files else None


def is_all_text(folder: Path) -> bool:
    """Tell whether the data of a folder that describes itself is in .txt files."""
    endings = {ending(file).format for file in _files_below(folder) if os.path.basename(file).lower() not in BESIDE}
    return endings == {".txt"}


def _files_below(folder: Path) -> list[str]:
    """Paths of all files that are neither hidden nor in a folder such as `__pycache__`, sorted."""
    below = glob.glob(os.path.join(glob.escape(str(folder)), "**", "*"), recursive=True)
    inner = len(folder.parts)
    return sorted(
        file
        for file in below
        if os.path.isfile(file) and not any(part.startswith("__") for part in Path(file).parts[inner:-1])
    )


def _data_files(name: str, folder: Path) -> list[str]:
    """Return a folder's files without those that lie next to the data; none if none of them is of a format of ours."""
    files = _files_below(folder)
    data = [file for file in files if os.path.basename(file).lower() not in BESIDE]
    if data and all(ending(file).format == ".md" for file in data):  # then README.md is a document as well
        data = [file for file in files if ending(file).format == ".md"]
    if any(ending(file).format in FORMATS for file in data):
        return data
    if any(ending(file).format == ".bin" for file in data):
        raise UserError(f"data set {name!r}: a folder with .bin files: name one of them")
    return []


def _one_format(name: str, files: Sequence[str]) -> str:
    """Return the format that all files share; none of them may be there twice, once compressed."""
    first: dict[str | None, str] = {}
    plain: dict[str, str] = {}
    for file in files:
        end = ending(file)
        first.setdefault(FORMATS.get(end.format), file)
        other = plain.setdefault(file[: len(file) - len(end.compression)], file)
        if other != file:
            raise UserError(
                f"data set {name!r}: {os.path.basename(other)} and {os.path.basename(file)} are one file, once "
                "compressed: take one away, or name the others by a glob"
            )
    if None in first:
        of = f"files of one format ({', '.join(FORMATS)}, also with {' or '.join(COMPRESSED)} behind)"
        unpack = ", or one .bin file, not compressed" if ending(first[None]).format == ".bin" else ""
        raise UserError(
            f"data set {name!r}: {os.path.basename(first[None])} is of no format that can be read: give {of}{unpack}"
        )
    if len(first) > 1:
        one, two = [os.path.basename(file) for file in first.values()][:2]
        raise UserError(
            f"data set {name!r}: {one} and {two} are of different formats: name the files of one by a glob, such as "
            f"'{Path(name) if Path(name).is_dir() else Path(name).parent}/*{ending(one).format}'"
        )
    return next(each for each in first if each is not None)


def _by_split(name: str, folder: Path, files: list[str]) -> dict[str, list[str]]:
    """Put a folder's files into splits: by `data/SPLIT-00000-of-00002`, or words in folders, or words in file names."""
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
            f"data set {name!r}: by its name, {inside[unclear]} is of {'several' if splits[unclear] else 'none'} of "
            f"the splits that files are of ({', '.join(found)}): name the files to read by a glob, such as "
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
    """Return the splits that words in the names of files or folders stand for."""
    words = {word for name in names for word in WORD.findall(name)}
    return {split for split, of in SPLITS.items() if words & set(of)}


def _describes_itself(folder: Path) -> bool:
    """Tell whether a folder says itself what its files are, as data sets on the hub do: by `configs` in README.md."""
    file = folder / "README.md"
    if (folder / ".huggingface.yaml").exists():
        return True
    try:
        head = file.read_text(encoding="utf-8").split("---\n") if file.is_file() else []
        return len(head) > 2 and not head[0] and "configs" in (yaml.safe_load(head[1]) or {})
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError):
        return False
