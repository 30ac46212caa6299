"""A whole run's configuration: one flat set of names, on the command line and in `run.yaml` alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from saekit.config.inputs import DataConfig, ModelConfig
from saekit.config.options import problems
from saekit.config.sae import SaeConfig
from saekit.config.schema import TrainConfig
from saekit.errors import UserError
from saekit.registry import load_plugin

SECRETS = frozenset({"hf_token"})
"""Options that are never written to disk."""
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
        parts: dict[type, Any] = {}
        found: list[str] = []
        unknown = set(values) - set().union(
            *(_names(part) for part in (ModelConfig, DataConfig, SaeConfig, TrainConfig))
        )
        found += [f"there is no option {name!r}" for name in sorted(unknown)]
        for part in (ModelConfig, DataConfig, SaeConfig, TrainConfig):
            own = {name: values[name] for name in _names(part) if name in values}
            if part is TrainConfig and SaeConfig in parts:
                own["sae"] = parts[SaeConfig]
            try:
                parts[part] = part(**own)
            except ValidationError as error:
                found += problems(error)
        if values.get("eval_every") is None:
            given = [f"--{name.replace('_', '-')} {values[name]}" for name in OF_EVAL_EVERY if name in values]
            found += [f"{option} has no meaning without --eval-every" for option in given]
        if found:
            raise UserError("; ".join(found))
        return cls(parts[ModelConfig], parts[DataConfig], parts[TrainConfig])

    def to_flat(self) -> dict[str, Any]:
        """The same as plain YAML-able values, without secrets; `from_flat` reads it back."""
        return {**to_flat(self.model), **to_flat(self.data), **to_flat(self.train)}


def to_flat(config: Any) -> dict[str, Any]:
    """One config as plain values by option name, nested ones flattened, without secrets."""
    flat: dict[str, Any] = {}
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    for name, value in values.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(getattr(config, name)):
            flat.update(value)
        elif name not in SECRETS:
            flat[name] = value
    return {name: value for name, value in flat.items() if value is not None}


def read_yaml(path: Path) -> dict[str, Any]:
    """The options in a YAML file; dashes in names count as underscores.

    Raises:
        UserError: If there is no such file or it is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a text file") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected lines such as `batch_size: 8`, found a {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def load_plugins(values: Mapping[str, Any]) -> None:
    """Run the plug-ins that somebody's own options name, before these are validated.

    Not for the options that a checkpoint or a run's folder holds: those name no code that is run.

    Args:
        values: Options by name, such as those of a `run.yaml`.

    Raises:
        UserError: If a file is missing, or raises an error.
    """
    files = values.get("plugin") or ()
    for file in (files,) if isinstance(files, (str, Path)) else files:
        load_plugin(Path(file))


def _names(part: type) -> set[str]:
    return {field.name for field in dataclasses.fields(part)} - {"sae"}
