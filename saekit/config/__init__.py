"""Configuration: validated dataclasses that `--help`, YAML and Python share."""

from saekit.config.run import RunConfig
from saekit.config.schema import DataConfig, ModelConfig, SaeConfig, TrainConfig

__all__ = ["DataConfig", "ModelConfig", "RunConfig", "SaeConfig", "TrainConfig"]
