"""The options of what is read: the language model and the data set. `saekit.config.schema` has the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import SecretStr
from pydantic.dataclasses import dataclass

from saekit.config.options import CONFIG, Mapping, in_one_sentence, option

DATA = "Data"
MODEL = "Language model"
EVALUATION = "Evaluation"


@in_one_sentence
@dataclass(frozen=True, config=CONFIG)
class ModelConfig:
    """Which language model, and how it is loaded."""

    model: str
    """A hub id or a local folder."""
    revision: str | None = option(None, "Branch, tag or commit of the model on the hub.", panel=MODEL)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Type of the language model's weights. auto chooses bfloat16 on a GPU or CPU that is fast at it, else "
        "float32. The SAEs are always float32.",
        panel=MODEL,
    )
    load_in_8bit: bool = option(
        False, "Load the language model in 8 bits, with bitsandbytes. This needs a GPU.", panel=MODEL
    )
    hf_token: SecretStr | None = option(
        None, "Token for private or gated repositories on the hub. It is never written to disk.", panel=MODEL
    )

    @property
    def token(self) -> str | None:
        """Return `hf_token` as what reads from the hub takes it."""
        return self.hf_token.get_secret_value() if self.hf_token else None


@in_one_sentence
@dataclass(frozen=True, config=CONFIG)
class DataConfig:
    """Which data set, and how it is read."""

    dataset: str
    """A hub id, a `save_to_disk` folder, a .jsonl, .parquet, .csv, .txt or .md file, glob or folder, or a .bin file."""
    split: str = option("train", "Split of the data set; slices such as train[:1%] work.", panel=DATA)
    text_column: str = option("text", "Column that holds the text, if the data set is not tokenized.", panel=DATA)
    data_args: Mapping = option({}, "Arguments for loading the data set, such as name=en,streaming=true.", panel=DATA)
    max_examples: int | None = option(
        None,
        "Read at most the first N rows of the data set. Required for a streamed data set.",
        panel=DATA,
        unit="rows",
        ge=1,
    )
    num_proc: int | None = option(
        None, "Number of processes that tokenize; one per core by default.", panel=DATA, unit="processes", ge=1
    )
    eval_dataset: str | None = option(
        None,
        "Data set for --eval-every. By default, documents of the run's own data set that the run does not read.",
        panel=EVALUATION,
    )
    eval_split: str | None = option(
        None,
        "Split of --eval-dataset; train by default. Without --eval-dataset, another split of the run's own data set.",
        panel=EVALUATION,
    )

    def for_evaluation(self) -> DataConfig:
        """Return the data set that --eval-every reads: another one, or the run's own with --eval-split."""
        if self.eval_dataset in (None, self.dataset):
            return replace(self, split=self.eval_split or self.split)
        assert self.eval_dataset is not None
        # How to read the run's data set means nothing for another, except for what a token id is.
        both_bin = self.dataset.endswith(".bin") and self.eval_dataset.endswith(".bin")
        return DataConfig(
            dataset=self.eval_dataset,
            split=self.eval_split or "train",
            text_column=self.text_column,
            data_args=self.data_args if both_bin else {},
            num_proc=self.num_proc,
        )
