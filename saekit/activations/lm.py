"""Load a language model up to its last tapped layer, and find the ids of excluded tokens."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from saekit.activations.hookpoints import find_blocks, num_layers, text_config_of, width
from saekit.activations.on_device import loading_arguments
from saekit.config import ModelConfig, TrainConfig
from saekit.errors import UserError, first_line
from saekit.hub import asking_hub, check_model_name, is_path, path_of, why_not_found
from saekit.model_files import check_model_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_CTX_LEN = 2048
TOKENIZER_FILE = re.compile(r"token|vocab|\.model$|^merges\.txt$|^tekken|^bpe\.codes$")
"""Matches the names of files that tokenizers are saved in."""


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes according to its config, known before any weight is loaded."""

    config: PretrainedConfig
    num_layers: int
    d_in: int
    """D, the width of the residual stream."""
    max_ctx_len: int | None
    """The longest sequence that the model can read, in tokens. None without a limit."""


def model_shape(cfg: ModelConfig) -> ModelShape:
    """Read the config of a model.

    Raises:
        UserError: If the model is neither a local folder nor on the hub.
    """
    from transformers import AutoConfig

    return shape_of(from_pretrained(AutoConfig, cfg))


def shape_of(config: PretrainedConfig) -> ModelShape:
    """Read a model's sizes from its config."""
    text = text_config_of(config)
    return ModelShape(config, num_layers(text), width(text), context_length(config))


def hookpoint_names(shape: ModelShape, layers: Sequence[int]) -> list[str]:
    """Return the hookpoint names of these blocks' outputs, without loading any weight."""
    from transformers import AutoModel

    with torch.device("meta"):
        blocks = find_blocks(AutoModel.from_config(cut_config(shape.config, max(layers) + 1)))
    return [blocks.hookpoint(layer) for layer in layers]


def context_length(config: PretrainedConfig) -> int | None:
    """Return the longest sequence that the model's positions allow, in tokens. None if the config gives no limit."""
    limit = getattr(text_config_of(config), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if getattr(config, "pad_token_id", None) is None:
        return limit
    # RoBERTa and its relatives start counting positions after the padding id, so their tables have rows that no token
    # uses. Only the module shows this, not the config. On the meta device it takes no memory.
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(cut_config(config, 1))
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def vocabulary_of(config: PretrainedConfig) -> int:
    """Return the number of tokens in the vocabulary of a model with this config, without loading any weight."""
    from transformers import AutoModel

    with torch.device("meta"):
        return vocabulary(AutoModel.from_config(cut_config(config, 1)))


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens in a language model's vocabulary."""
    embeddings = model.get_input_embeddings().weight
    return getattr(embeddings, "ds_shape", embeddings.shape)[0]  # ds_shape: that of the whole tensor, if it is sharded


def shared_limit(*limits: int | None) -> int | None:
    """Return the longest sequence that all of several models can read, in tokens. None without a limit."""
    return min((each for each in limits if each is not None), default=None)


def resolve_ctx_len(asked: int | None, *limits: int | None) -> int:
    """Return the tokens per sequence: `asked`, or by default 2048 or the model's limit if that is less.

    Args:
        asked: The user's choice, or None.
        limits: The longest sequence that each model can read, in tokens. None is no limit.

    Raises:
        UserError: If `asked` is more than a model can read.
    """
    limit = shared_limit(*limits)
    if asked is None:
        return min(DEFAULT_CTX_LEN, limit or DEFAULT_CTX_LEN)
    if limit is not None and asked > limit:
        raise UserError(
            f"--ctx-len {asked} is more than the {limit} tokens that this model can read: use {limit} or less"
        )
    return asked


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Raises:
        UserError: If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, cfg)


def find_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase | None:
    """Load the model's tokenizer. Return None for a local folder without one.

    Raises:
        UserError: If the tokenizer cannot be loaded, or if the model is neither a local folder nor on the hub.
    """
    path = path_of(cfg.model)
    # Check the files: for some folders without a tokenizer, transformers would create an empty one.
    if path.is_dir() and not any(TOKENIZER_FILE.search(file.name) for file in path.iterdir()):
        return None
    return load_tokenizer(cfg)


def load_model(
    cfg: ModelConfig, shape: ModelShape, depth: int, device: torch.device, *, sharded: bool = False
) -> PreTrainedModel:
    """Load a model's first blocks, frozen, in eval mode, on `device`.

    Later blocks are neither loaded nor run, because the config is cut before the weights are read.

    Args:
        cfg: Which model, and in which type.
        shape: Its sizes.
        depth: The number of blocks to load.
        device: Where it goes.
        sharded: Whether DeepSpeed shards it over the ranks while it is loaded.

    Raises:
        UserError: If 8-bit weights are requested on a device without them, or if weights are missing from the
            checkpoint, damaged, or of another shape than the config says.
    """
    from transformers import AutoModel

    kwargs = loading_arguments(cfg, device, sharded=sharded)
    config = cut_config(shape.config, depth)
    with quietly():
        # Let wrong shapes pass here: `check_loaded` names them in its message.
        asked = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
        model, info = from_pretrained(AutoModel, cfg, weights=True, **asked)
    check_loaded(cfg, model, info)
    if not cfg.load_in_8bit:
        model.to(device)
    return model.eval().requires_grad_(False)


def check_loaded(cfg: ModelConfig, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Check that the checkpoint has all weights up to the end of the blocks. Later weights do not matter.

    Raises:
        UserError: If one of these weights is missing or has a wrong shape.
    """
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"model {cfg.model!r}: {name!r} has shape {list(found)} in the checkpoint, but config.json says "
            f"{list(expected)}"
        )
    outer = "" if model.base_model is model else f"{model.base_model_prefix}."
    names, blocks = [outer + name for name in model.base_model.state_dict()], f"{outer}{find_blocks(model).prefix}."
    end = 1 + max(number for number, name in enumerate(names) if name.startswith(blocks))
    missing = [name for name in names[:end] if name in info["missing_keys"]]
    if missing:
        raise UserError(f"model {cfg.model!r}: weights such as {missing[0]!r} are missing from its checkpoint")


def cut_config(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """Return a copy of a config whose text model has only its first `depth` layers."""
    cut = copy.deepcopy(config)
    text = text_config_of(cut)
    full = num_layers(text)
    for name, value in list(vars(text).items()):
        # transformers compares the length of lists with an entry per layer, such as kinds of attention, with the depth.
        per_layer = isinstance(value, (list, tuple)) and len(value) == full and not name.endswith("token_id")
        if per_layer and full != depth:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return cut


def from_pretrained(auto: Any, cfg: ModelConfig, *, weights: bool = False, **kwargs: Any) -> Any:
    """Call `from_pretrained` of an Auto class, and turn its errors into messages of one line.

    Code from the model's repository never runs: by default transformers would ask for that on the terminal.

    Args:
        auto: The class.
        cfg: Which model.
        weights: Whether weights are read too.
        kwargs: Passed to `from_pretrained`.

    Raises:
        UserError: If the model does not exist or cannot be loaded.
    """
    local = is_path(cfg.model)
    if local:
        check_model_name(cfg.model)
        check_model_folder(cfg.model, path_of(cfg.model), weights=weights)
    name = str(path_of(cfg.model)) if local else cfg.model
    try:
        with asking_hub(cfg.model):
            asked = {"revision": cfg.revision or "main", "token": cfg.token, "trust_remote_code": False}
            return auto.from_pretrained(name, **asked, **kwargs)
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        where = "" if local else f"{why_not_found(cfg.model)}: "
        raise UserError(f"model {cfg.model!r} could not be loaded: {where}{first_line(error)}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Stop transformers from reporting weights that we leave out on purpose (later layers, a head) as unexpected."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "utils.loading_report")]

    # A filter, not a level: transformers decides by this level whether to make further checks, which warn as well.
    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    for logger in loggers:
        logger.addFilter(errors_only)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(errors_only)


def excluded_tokens(cfg: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Return the ids of excluded tokens, ascending: the user's and, unless switched off, the special tokens."""
    ids = set(cfg.exclude_tokens)
    if cfg.exclude_special_tokens and tokenizer is not None:
        ids |= set(tokenizer.all_special_ids)
    elif cfg.exclude_special_tokens:
        config = text_config_of(model.config)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"):
            value = getattr(config, name, None)
            ids |= set(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(ids)


def no_bars() -> None:
    """Disable the libraries' progress bars, which are noise in a log and on all but one rank."""
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars as disable_hub_bars

    datasets.disable_progress_bars()
    disable_hub_bars()
    transformers.utils.logging.disable_progress_bar()
