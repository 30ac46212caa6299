"""The options of a run's activations: where they come from, and how they are spread over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from saekit.config.inputs import DATA
from saekit.config.options import CONFIG, SourceName, in_one_sentence, option


@in_one_sentence
@dataclass(frozen=True, config=CONFIG)
class SourceConfig:
    """Where activations come from. By default the language model, run in every step."""

    source: SourceName = option(
        "live",
        "Where activations come from: live, the language model, run in every step; a plug-in can add others.",
        panel=DATA,
    )
    activations: Path | None = option(
        None,
        "Train on the cache in this folder, which saekit cache has made, instead of running the language model. MODEL "
        "and DATASET may be left out.",
        panel=DATA,
    )
    mix: int = option(
        1,
        "Mix the tokens of N optimizer steps: the language model reads the sequences of all N first, and each step "
        "trains on a part of every sequence. 1 does not mix.",
        panel=DATA,
        unit="optimizer steps",
        ge=1,
    )
    mix_in: Literal["auto", "device", "host", "disk"] = option(
        "auto",
        "Where --mix keeps activations: on the device, in the machine's memory, or in a file in --save-dir that has no "
        "name and vanishes with the process. auto takes the first of them that has room.",
        panel=DATA,
    )
    ctx_len: int | None = option(
        None,
        "Length of each sequence; by default 2048, or the model's limit if that is less.",
        panel=DATA,
        unit="tokens",
        ge=2,
    )
    max_tokens: int | None = option(None, "Read at most N tokens of the data set.", panel=DATA, unit="tokens", ge=1)
