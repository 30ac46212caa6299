"""Configuration: validated dataclasses that `--help`, YAML and Python share.

Internal: may change in any release; the API is what `saekit` names.
"""

from saekit.config.inputs import DataConfig, ModelConfig
from saekit.config.run import RunConfig
from saekit.config.sae import SaeConfig
from saekit.config.schema import TrainConfig

__all__ = ["DataConfig", "ModelConfig", "RunConfig", "SaeConfig", "TrainConfig"]
