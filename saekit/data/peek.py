"""A data set's first rows, without loading or tokenising the rest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from saekit.config import DataConfig
from saekit.data.load import attempt, memmap, open_rows
from saekit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 20
"""How many are looked at."""
IDS = 1024
"""How many token ids of a file without rows."""


@dataclass(frozen=True)
class Peek:
    """What a data set looks like."""

    columns: tuple[str, ...]
    text_columns: tuple[str, ...]
    """Those with text in one of the first rows."""
    first: tuple[dict[str, Any], ...]
    """At most `ROWS` rows."""
    count: int | None
    """Rows in all, None where only reading all of it would tell."""

    @property
    def tokenised(self) -> bool:
        """Whether it holds token ids rather than text."""
        return "input_ids" in self.columns


def peek(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase, token: str | None = None) -> Peek:
    """Look at the first rows; files and data sets on the hub are streamed, so that size does not matter.

    Raises:
        UserError: If the data set is not found, cannot be read, or is empty.
    """
    if cfg.dataset.endswith(".bin"):
        ids = memmap(cfg, tokenizer, 1)
        first = ids.read(np.arange(min(IDS, len(ids))))
        return Peek(("input_ids",), (), ({"input_ids": first.flatten().tolist()},), None)
    try:
        # A slice of a split has no meaning for a stream.
        split = cfg.split.partition("+")[0].partition("[")[0]
        return _look(dataclasses.replace(cfg, split=split, data_args={**cfg.data_args, "streaming": True}), token)
    except (UserError, NotImplementedError):
        from datasets.config import HF_HUB_OFFLINE

        if not HF_HUB_OFFLINE:
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
