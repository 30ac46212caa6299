"""A whole run's configuration: one flat set of names, on the command line, in `run.yaml` and in Python alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saekit.config.flat import as_yaml, make_config, option_names, read_yaml, to_flat, unknown_options
from saekit.config.inputs import DataConfig, ModelConfig
from saekit.config.sae import SaeConfig
from saekit.config.schema import TrainConfig
from saekit.errors import UserError

__all__ = ["PARTS", "RunConfig", "to_flat"]

PARTS = (ModelConfig, DataConfig, SaeConfig, TrainConfig)
"""The configs whose fields are options, in the order in which they are shown."""
OF_EVAL_EVERY = ("eval_dataset", "eval_split")
"""Options that say nothing by themselves. (The tokens have a default, which is written down with every run.)"""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Model, data and training of one run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> RunConfig:
        """Validate a flat mapping of option names to values.

        Raises:
            UserError: With every problem that was found, one after the other.
        """
        found = unknown_options(values, option_names(*PARTS))
        model = make_config(ModelConfig, values, found)
        data = make_config(DataConfig, values, found)
        sae = make_config(SaeConfig, values, found)
        train = make_config(TrainConfig, values, found, **({} if sae is None else {"sae": sae}))
        if values.get("eval_every") is None:
            given = [f"--{name.replace('_', '-')} {values[name]}" for name in OF_EVAL_EVERY if name in values]
            found += [f"{option} needs --eval-every" for option in given]
        if found:
            raise UserError("; ".join(found))
        return cls(model, data, train)

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Read a run's options from a YAML file: what `saekit train --config` reads, or a run's own `config.yaml`.

        Raises:
            UserError: If the file cannot be read, lacks `model` or `dataset`, or holds something that is no option;
                with every problem that was found.
        """
        return cls.from_flat(read_yaml(Path(path)))

    @property
    def other_model(self) -> ModelConfig | None:
        """Return which model is the second of two (`--crosscode-models`), loaded as the first is."""
        name = self.train.crosscode_models
        if name is None:
            return None
        return dataclasses.replace(self.model, model=name, revision=self.train.crosscode_revision)

    def to_flat(self) -> dict[str, Any]:
        """Return the same as plain YAML-able values, without secrets; `from_flat` reads it back."""
        return {**to_flat(self.model), **to_flat(self.data), **to_flat(self.train)}

    def to_yaml(self, path: str | Path) -> None:
        """Write all options to a YAML file, defaults included and secrets left out; `from_yaml` reads it back.

        Raises:
            UserError: If the file cannot be written.
        """
        try:
            Path(path).write_text(as_yaml(self.to_flat()), encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror})") from None
