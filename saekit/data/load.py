"""A data set by name: from the hub, from local files, or pre-tokenized; all of it, or a look at its first rows."""

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
    """Find the data set, tokenize it unless it is tokenized already, and cut it into sequences of `ctx_len` tokens.

    Args:
        cfg: Which data set.
        tokenizer: The language model's; None if there is none, for data that is tokenized already.
        ctx_len: Tokens per sequence.
        token: For a private or gated data set on the hub.
        rows: The data, if it is in memory: see `rows_in_memory`.

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
    """Return the tokenizer, for a data set that is text.

    Raises:
        UserError: If there is none.
    """
    if tokenizer is None:
        raise UserError(
            "the data set is text, and the model has no tokenizer: give its tokenizer (in the model's folder, or "
            "saekit.train(..., tokenizer=...)), or data that is tokenized already (a column input_ids, or a .bin file)"
        )
    return tokenizer


def rows_in_memory(rows: Any, cfg: DataConfig) -> Dataset:
    """Return the rows of data that a caller has loaded.

    Args:
        rows: A data set, a stream of which `cfg.max_examples` rows are taken, splits by name of which `cfg.split` is
            taken, or a list of texts.
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
        raise UserError(f"the data set is a {type(rows).__name__}: give a datasets.Dataset, a list of texts, or a name")
    return rows


def memmap(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase | None, ctx_len: int) -> MemmapSequences:
    """Return a `.bin` file, as far as what it holds is beyond doubt."""
    if cfg.max_examples is not None:
        raise UserError(f"--max-examples {cfg.max_examples}: a .bin file has no rows; use --max-tokens")
    size = 0 if tokenizer is None else len(tokenizer)
    if "dtype" not in cfg.data_args and size > 2**16:
        raise UserError(say_type(cfg.dataset, size))
    options = {"dtype": "uint16", "check_type": True, **cfg.data_args}
    unknown = set(options) - {"dtype", "check_type"}
    if unknown:
        raise UserError(f"--data-args {min(unknown)}=...: a .bin file takes dtype and check_type only")
    return MemmapSequences(
        _existing(cfg.dataset),
        str(options["dtype"]),
        ctx_len,
        check_type=bool(options["check_type"]),
        assumed="dtype" not in cfg.data_args and tokenizer is None,
    )


def load_rows(cfg: DataConfig, token: str | None = None) -> Dataset:
    """Return the rows of a data set as they are, before any tokenizing."""
    from datasets import IterableDataset

    rows = open_rows(cfg, token)
    return attempt(_materialize, cfg, rows, cfg) if isinstance(rows, IterableDataset) else rows


def open_rows(cfg: DataConfig, token: str | None = None) -> Dataset | IterableDataset:
    """Return the same, where a streamed data set is left a stream."""
    from datasets import load_dataset, load_from_disk

    check_data_name(cfg.dataset)
    path = path_of(cfg.dataset)
    if (path / "state.json").is_file():
        # One split, whose name the folder does not tell: it is the one that was asked for.
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
    # The library takes each name for a pattern again.
    data_files = {
        split: [glob.escape(file) for file in files] for split, files in attempt(readable, cfg, found).items()
    }
    return attempt(load_dataset, cfg, found.format, **{"data_files": data_files, **arguments})


def attempt(load: Any, cfg: DataConfig, *args: Any, **kwargs: Any) -> Any:
    """Call what loads a data set, or reads of it, and say in one line what went wrong, if something did."""
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
    except (KeyError, AttributeError) as error:  # from `load_from_disk`, whose files of JSON lack something
        raise UserError(f"data set {cfg.dataset!r} is damaged ({type(error).__name__}: {error})") from error
    except (IndexError, StopIteration) as error:  # from `load_from_disk` and .jsonl, where there is no row
        raise UserError(f"data set {cfg.dataset!r} is empty: it has no row") from error
    except UserError:
        raise
    except (ValueError, TypeError, DatasetGenerationError) as error:
        reason = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        raise UserError(f"data set {cfg.dataset!r} (--split {cfg.split}): {first_line(reason)}") from error


def _materialize(stream: Any, cfg: DataConfig) -> Dataset:
    """Take as much of a streamed data set as the run needs, so that every step can be read again by its number."""
    from datasets import Dataset

    if cfg.max_examples is None:
        raise UserError("a streamed data set needs --max-examples, to know how many rows to take")
    return Dataset.from_generator(_rows, gen_kwargs={"stream": stream.take(cfg.max_examples)})


def _rows(stream: Any) -> Any:
    yield from stream


def _one_split(splits: Mapping[str, Dataset], split: str) -> Dataset:
    """Take a split of a `save_to_disk` folder: a name, a slice, or several joined by `+`."""
    from datasets import ReadInstruction, concatenate_datasets

    if split in splits:
        return splits[split]
    try:
        spans = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    except ValueError:
        raise UserError(f"--split {split!r}: the data set has no such split; it has {', '.join(splits)}") from None
    return concatenate_datasets([splits[span.splitname].select(range(span.from_, span.to)) for span in spans])


def _existing(name: str) -> Path:
    file = path_of(name)
    if not os.path.isfile(file):
        several = "a .bin file is named alone, not by a glob"
        raise UserError(f"data set {name!r}: {several if glob.has_magic(name) else nothing_at(name, 'file')}")
    return file


ROWS = 20
"""Rows that `peek` reads."""
IDS = 1024
"""Token ids that `peek` reads of a file without rows."""


@dataclass(frozen=True)
class Peek:
    """The first rows of a data set, and what they show."""

    columns: tuple[str, ...]
    text_columns: tuple[str, ...]
    """Those with text in one of the first rows."""
    first: tuple[dict[str, Any], ...]
    """At most `ROWS` rows."""
    count: int | None
    """Total number of rows; None if only reading everything would tell."""

    @property
    def tokenized(self) -> bool:
        """Tell whether it holds token ids rather than text."""
        return "input_ids" in self.columns


def peek(
    cfg: DataConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    token: str | None = None,
    vocabulary: int | None = None,
) -> Peek:
    """Look at the first rows; files and data sets on the hub are streamed, so that size does not matter.

    Args:
        cfg: Which data set.
        tokenizer: The language model's, if it has one.
        token: For a private or gated data set on the hub.
        vocabulary: Number of tokens that the language model knows, if its config says it: shows the type of a `.bin`.

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
        # A slice of a split has no meaning for a stream.
        split = cfg.split.partition("+")[0].partition("[")[0]
        # Processes are for reading everything; datasets refuses them for a stream.
        arguments = {name: value for name, value in cfg.data_args.items() if name != "num_proc"}
        return _look(dataclasses.replace(cfg, split=split, data_args={**arguments, "streaming": True}), token)
    except NotImplementedError:  # of datasets: some archives cannot be streamed, online or not
        return _look(cfg, token)
    except UserError:
        from datasets.config import HF_HUB_OFFLINE

        if not HF_HUB_OFFLINE and (is_path(cfg.dataset) or unreachable() is None):
            raise
        return _look(cfg, token)  # what lies in the hub's cache cannot be streamed


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
