"""The options of a run's activations: where they come from, and how they are spread over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator
from pydantic.dataclasses import dataclass

from saekit.config.inputs import DATA
from saekit.config.options import CONFIG, SourceName, in_one_sentence, option

MixIn = Literal["auto", "device", "host", "disk"]
"""Where `--mix` keeps activations."""


@in_one_sentence
@dataclass(frozen=True, config=CONFIG)
class SourceConfig:
    """Where activations come from. By default the language model, run in every step."""

    source: SourceName = option(
        "live",
        "Where activations come from. live runs the language model in every step; a plug-in can add others.",
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
        "Mix the tokens of N optimizer steps. The language model reads the sequences of all N steps first, and each "
        "step trains on a part of every sequence. 1 does not mix.",
        panel=DATA,
        unit="optimizer steps",
        ge=1,
    )
    mix_in: MixIn = option(
        "auto",
        "Where --mix keeps activations: on the device, in the machine's memory (host), or in a file in --save-dir that "
        "has no name and vanishes with the process (disk). auto chooses the first of them that has room.",
        panel=DATA,
    )
    ctx_len: int | None = option(
        None,
        "Length of each sequence; 2048 by default, or the model's limit if that is smaller.",
        panel=DATA,
        common=True,
        unit="tokens",
        ge=2,
    )
    max_tokens: int | None = option(
        None,
        "Read at most N tokens of the data set; all of it by default.",
        panel=DATA,
        common=True,
        unit="tokens",
        ge=1,
    )

    @model_validator(mode="after")
    def _check_source(self) -> SourceConfig:
        if self.activations is not None and self.source not in ("live", "cached"):
            raise ValueError(
                f"--activations {self.activations} and --source {self.source} both say where activations come from: "
                "give one of them"
            )
        return self
