"""Which tokens an SAE has nothing to do with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saekit.activations.hookpoints import text_config_of
from saekit.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def excluded_tokens(cfg: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Ids of the tokens to leave out: the user's, and unless switched off the special ones, ascending."""
    ids = set(cfg.exclude_tokens)
    if cfg.exclude_special_tokens and tokenizer is not None:
        ids |= set(tokenizer.all_special_ids)
    elif cfg.exclude_special_tokens:
        config = text_config_of(model.config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"):
            value = getattr(config, name, None)
            ids |= set(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(ids)
