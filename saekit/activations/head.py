"""A whole language model with its head, and what it was trained to predict."""

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
    """A model that gives logits, if its checkpoint has what that needs."""

    model: PreTrainedModel
    objective: ObjectiveName | None
    """The task of its logits; None if it has no head."""


def load_with_head(cfg: ModelConfig, shape: ModelShape, device: torch.device) -> WithHead:
    """Load a model with its head, frozen, in eval mode, on `device`.

    A checkpoint without a head (many encoders') gives the bare model: a head of random weights would give numbers that
    mean nothing.

    Raises:
        UserError: As `load_model`.
    """
    from transformers import AutoModel

    kwargs = loading_arguments(cfg, device)
    asked = {"config": shape.config, "output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
    objective: ObjectiveName | None = objective_of(shape.config)
    with quietly():
        model, info = from_pretrained(auto_with_head(shape.config), cfg, weights=True, **asked)
        if info["missing_keys"]:  # tied weights do not count
            objective = None
            model, info = from_pretrained(AutoModel, cfg, weights=True, **asked)
    check_loaded(cfg, model, info)
    if not cfg.load_in_8bit:
        model.to(device)
    return WithHead(model.eval().requires_grad_(False), objective)


def auto_with_head(config: PretrainedConfig) -> Any:
    """Return the Auto class that gives a model of this config its head."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    return AutoModelForCausalLM if objective_of(config) == "next token" else AutoModelForMaskedLM


def predicts(model: PreTrainedModel) -> ObjectiveName | None:
    """Tell what a loaded model's logits predict; None if it has no head."""
    return None if model.get_output_embeddings() is None else objective_of(model.config)


def objective_of(config: PretrainedConfig) -> ObjectiveName:
    """Tell what a model with this config predicts: by the class it was saved as, else by whether it has a mask."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    saved_as = " ".join(config.architectures or [])
    if "CausalLM" in saved_as or "LMHead" in saved_as or getattr(config, "is_decoder", False):
        return "next token"
    return "masked token" if type(config) in MODEL_FOR_MASKED_LM_MAPPING else "next token"
