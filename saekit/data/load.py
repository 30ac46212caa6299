"""Load a data set by name, from the hub, local files or files of token ids, or look at its first rows."""

from __future__ import annotations

import dataclasses
import glob
import os
import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saekit.config import DataConfig
from saekit.data.batches import Sequences, sequences
from saekit.data.compressed import readable
from saekit.data.files import find_files, is_all_text
from saekit.data.pack import chunk_and_tokenize
from saekit.data.token_files import MemmapSequences, say_type
from saekit.errors import UserError, first_line
from saekit.hub import asking_hub, check_data_name, is_path, nothing_at, path_of, unreachable, why_not_found

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


def load_sequences(
    cfg: DataConfig, tokenizer: PreTrainedTokenizerBase | None, ctx_len: int, token: str | None = None, rows: Any = None
) -> Sequences:
    """Load a data set, tokenize it if necessary, and cut it into sequences of `ctx_len` tokens.

    Args:
        cfg: Which data set.
        tokenizer: The language model's tokenizer. None if it has none; the data must then be tokenized.
        ctx_len: Tokens per sequence.
        token: An access token, for a private or gated data set on the hub.
        rows: The data, if it is in memory. See `rows_in_memory`.

    Raises:
        UserError: If the data set is not found, has no usable column, or is too short for one sequence.
    """
    if rows is None and cfg.dataset.endswith(".bin"):
        return memmap(cfg, tokenizer, ctx_len)
    data = load_rows(cfg, token) if rows is None else rows_in_memory(rows, cfg)
    if cfg.max_examples is not None:
        data = data.select(range(min(cfg.max_examples, len(data))))
    if "input_ids" in data.column_names:
        return sequences(data, ctx_len)
    packed = chunk_and_tokenize(
        data, needed(tokenizer), text_key=cfg.text_column, max_seq_len=ctx_len, num_proc=cfg.num_proc
    )
    return sequences(packed, ctx_len)


def needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """Return the tokenizer, which a data set of text needs.

    Raises:
        UserError: If it is None.
    """
    if tokenizer is None:
        raise UserError(
            "the data set is text, but the model has no tokenizer: add its tokenizer to the model's folder, pass it "
            "(saekit.train(..., tokenizer=...)), or use tokenized data (a column input_ids, or a .bin file)"
        )
    return tokenizer


def rows_in_memory(rows: Any, cfg: DataConfig) -> Dataset:
    """Return data in memory as a data set with rows.

    Args:
        rows: A data set, a stream (the first `cfg.max_examples` rows are used), splits by name (`cfg.split` is used),
            or a list of texts.
        cfg: How to read it.

    Raises:
        UserError: If it is something else.
    """
    from datasets import Dataset, DatasetDict, IterableDataset

    if isinstance(rows, DatasetDict):
        rows = _one_split(rows, cfg.split)
    if isinstance(rows, IterableDataset):
        return _materialize(rows, cfg)
    if isinstance(rows, (list, tuple)) and all(isinstance(text, str) for text in rows):
        return Dataset.from_dict({cfg.text_column: list(rows)})
    if not isinstance(rows, Dataset):
        raise UserError(f"the data set is a {type(rows).__name__}: pass a datasets.Dataset, a list of texts, or a name")
    return rows


def memmap(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase | None, ctx_len: int) -> MemmapSequences:
    """Open a `.bin` file of token ids.

    Raises:
        UserError: If the type of its ids is unclear, if an option does not apply to it, or if it is not such a file.
    """
    if cfg.max_examples is not None:
        raise UserError(f"--max-examples {cfg.max_examples}: a .bin file has no rows. Use --max-tokens")
    size = 0 if tokenizer is None else len(tokenizer)
    if "dtype" not in cfg.data_args and size > 2**16:
        raise UserError(say_type(cfg.dataset, size))
    options = {"dtype": "uint16", "check_type": True, **cfg.data_args}
    unknown = set(options) - {"dtype", "check_type"}
    if unknown:
        raise UserError(f"--data-args {min(unknown)}=...: a .bin file takes only dtype and check_type")
    return MemmapSequences(
        _existing(cfg.dataset),
        str(options["dtype"]),
        ctx_len,
        check_type=bool(options["check_type"]),
        assumed="dtype" not in cfg.data_args and tokenizer is None,
    )


def load_rows(cfg: DataConfig, token: str | None = None) -> Dataset:
    """Load the rows of a data set, without tokenizing them."""
    from datasets import IterableDataset

    rows = open_rows(cfg, token)
    return attempt(_materialize, cfg, rows, cfg) if isinstance(rows, IterableDataset) else rows


def open_rows(cfg: DataConfig, token: str | None = None) -> Dataset | IterableDataset:
    """Load the rows of a data set, without tokenizing them. A streamed data set stays a stream."""
    from datasets import load_dataset, load_from_disk

    check_data_name(cfg.dataset)
    path = path_of(cfg.dataset)
    if (path / "state.json").is_file():
        # The folder contains one split, but not its name. Assume that it is the requested one.
        return _one_split({cfg.split.partition("[")[0]: attempt(load_from_disk, cfg, str(path))}, cfg.split)
    if (path / "dataset_dict.json").is_file():
        return _one_split(attempt(load_from_disk, cfg, str(path)), cfg.split)

    arguments: dict[str, Any] = {"split": cfg.split, **cfg.data_args}
    found = find_files(cfg.dataset, cfg.data_args)
    if found is None:
        if path.is_dir() and is_all_text(path):
            arguments.setdefault("sample_by", "document")
        return attempt(load_dataset, cfg, str(path) if path.is_dir() else cfg.dataset, **{"token": token, **arguments})
    if found.format == "text":
        # A text file is one document, not one per line.
        arguments.setdefault("sample_by", "document")
    # Escape the names, because the library treats each as a pattern again.
    data_files = {
        split: [glob.escape(file) for file in files] for split, files in attempt(readable, cfg, found).items()
    }
    return attempt(load_dataset, cfg, found.format, **{"data_files": data_files, **arguments})


def attempt(load: Any, cfg: DataConfig, *args: Any, **kwargs: Any) -> Any:
    """Call a function that loads or reads a data set, and turn its errors into messages of one line.

    Raises:
        UserError: If the function fails.
    """
    from datasets.exceptions import DatasetGenerationError

    elsewhere = any("://" in str(value) for value in cfg.data_args.values())  # data files on another server
    try:
        with nullcontext() if elsewhere else asking_hub(cfg.dataset):
            return load(*args, **kwargs)
    except (OSError, EOFError, zlib.error) as error:
        if not is_path(cfg.dataset) and isinstance(error, (ConnectionError, FileNotFoundError)):
            where = why_not_found(cfg.dataset)
            raise UserError(f"data set {cfg.dataset!r} was not found: {where} ({first_line(error)})") from error
        raise UserError(f"data set {cfg.dataset!r} cannot be read: {first_line(error)}") from error
    except (KeyError, AttributeError) as error:  # from `load_from_disk`, if entries are missing in its JSON files
        raise UserError(f"data set {cfg.dataset!r} is damaged ({type(error).__name__}: {error})") from error
    except (IndexError, StopIteration) as error:  # from `load_from_disk` and .jsonl without rows
        raise UserError(f"data set {cfg.dataset!r} is empty: it has no row") from error
    except UserError:
        raise
    except (ValueError, TypeError, DatasetGenerationError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UserError(f"data set {cfg.dataset!r} (--split {cfg.split}): {first_line(reason)}") from error


def _materialize(stream: Any, cfg: DataConfig) -> Dataset:
    """Store the rows of a stream that a run needs, so that any step can be read again by its number."""
    from datasets import Dataset

    if cfg.max_examples is None:
        raise UserError("a streamed data set needs --max-examples, the number of rows to read")
    return Dataset.from_generator(_rows, gen_kwargs={"stream": stream.take(cfg.max_examples)})


def _rows(stream: Any) -> Any:
    yield from stream


def _one_split(splits: Mapping[str, Dataset], split: str) -> Dataset:
    """Return a split of a `save_to_disk` folder, given as a name, a slice, or several joined by `+`."""
    from datasets import ReadInstruction, concatenate_datasets

    if split in splits:
        return splits[split]
    try:
        spans = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except ValueError:
        raise UserError(f"--split {split!r}: there is no such split; the data set has {', '.join(splits)}") from None
    return concatenate_datasets([splits[span.splitname].select(range(span.from_, span.to)) for span in spans])


def _existing(name: str) -> Path:
    file = path_of(name)
    if not os.path.isfile(file):
        several = "pass one .bin file, not a glob"
        raise UserError(f"data set {name!r}: {several if glob.has_magic(name) else nothing_at(name, 'file')}")
    return file


ROWS = 20
"""Rows that `peek` reads."""
IDS = 1024
"""Token ids that `peek` reads from a file without rows."""


@dataclass(frozen=True)
class Peek:
    """The first rows of a data set, and its columns."""

    columns: tuple[str, ...]
    text_columns: tuple[str, ...]
    """Columns that have text in one of the first rows."""
    first: tuple[dict[str, Any], ...]
    """The first rows, at most `ROWS`."""
    count: int | None
    """Total number of rows. None if it is not known without reading everything."""

    @property
    def tokenized(self) -> bool:
        """Return whether the data set contains token ids rather than text."""
        return "input_ids" in self.columns


def peek(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    token: str | None = None,
    vocabulary: int | None = None,
) -> Peek:
    """Read the first rows of a data set. Files and data sets on the hub are streamed, so their size does not matter.

    Args:
        cfg: Which data set.
        tokenizer: The language model's tokenizer, if it has one.
        token: An access token, for a private or gated data set on the hub.
        vocabulary: Number of tokens in the language model's vocabulary, if known. Used to check the type of a `.bin`
            file.

    Raises:
        UserError: If the data set is not found, cannot be read, or is empty.
    """
    if cfg.dataset.endswith(".bin"):
        ids = memmap(cfg, tokenizer, 1)
        if vocabulary is not None:
            ids.check(vocabulary)
        first = ids.read(np.arange(min(IDS, len(ids))))
        return Peek(("input_ids",), (), ({"input_ids": first.flatten().tolist()},), None)
    try:
        # A stream cannot be a slice of a split.
        split = cfg.split.partition("+")[0].partition("[")[0]
        # `datasets` does not accept num_proc for a stream.
        arguments = {name: value for name, value in cfg.data_args.items() if name != "num_proc"}
        return _look(dataclasses.replace(cfg, split=split, data_args={**arguments, "streaming": True}), token)
    except NotImplementedError:  # from `datasets`: some archives cannot be streamed
        return _look(cfg, token)
    except UserError:
        from datasets.config import HF_HUB_OFFLINE

        if not HF_HUB_OFFLINE and (is_path(cfg.dataset) or unreachable() is None):
            raise
        return _look(cfg, token)  # data in the hub's cache cannot be streamed


def _look(cfg: DataConfig, token: str | None) -> Peek:
    rows = open_rows(cfg, token)
    first: list[dict[str, Any]] = attempt(lambda: list(islice(rows, ROWS)), cfg)
    if not first:
        raise UserError(f"data set {cfg.dataset!r} is empty: it has no row")
    columns = tuple(first[0])
    return Peek(
        columns,
        tuple(name for name in columns if any(isinstance(row.get(name), str) for row in first)),
        tuple(first),
        len(rows) if hasattr(rows, "__len__") else None,
    )
