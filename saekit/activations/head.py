"""Load a whole language model with its head, and find out what it was trained to predict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from saekit.activations.lm import ModelShape, check_loaded, from_pretrained, quietly
from saekit.activations.on_device import loading_arguments
from saekit.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ObjectiveName = Literal["next token", "masked token"]


class WithHead(NamedTuple):
    """A model with its head, if its checkpoint has one."""

    model: PreTrainedModel
    objective: ObjectiveName | None
    """What its logits predict. None if it has no head."""


def load_with_head(cfg: ModelConfig, shape: ModelShape, device: torch.device) -> WithHead:
    """Load a model with its head, frozen, in eval mode, on `device`.

    If the checkpoint has no head, as with many encoders, load the model without one: the results of a head with random
    weights would be meaningless.

    Raises:
        UserError: See `load_model`.
    """
    from transformers import AutoModel

    kwargs = loading_arguments(cfg, device)
    asked = {"config": shape.config, "output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
    objective: ObjectiveName | None = objective_of(shape.config)
    with quietly():
        model, info = from_pretrained(auto_with_head(shape.config), cfg, weights=True, **asked)
        if info["missing_keys"]:  # tied weights are not in this list
            objective = None
            model, info = from_pretrained(AutoModel, cfg, weights=True, **asked)
    check_loaded(cfg, model, info)
    if not cfg.load_in_8bit:
        model.to(device)
    return WithHead(model.eval().requires_grad_(False), objective)


def auto_with_head(config: PretrainedConfig) -> Any:
    """Return the Auto class that loads a model of this config with its head."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForCausalLM if objective_of(config) == "next token" else AutoModelForMaskedLM


def predicts(model: PreTrainedModel) -> ObjectiveName | None:
    """Return what a loaded model's logits predict. None if it has no head."""
    return None if model.get_output_embeddings() is None else objective_of(model.config)


def objective_of(config: PretrainedConfig) -> ObjectiveName:
    """Return what a model with this config predicts, judging by the class it was saved as and by its type."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    saved_as = " ".join(config.architectures or [])
    if "CausalLM" in saved_as or "LMHead" in saved_as or getattr(config, "is_decoder", False):
        return "next token"
    return "masked token" if type(config) in MODEL_FOR_MASKED_LM_MAPPING else "next token"
