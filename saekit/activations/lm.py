"""Load a language model, no deeper than its last tapped layer; which of its tokens train no SAE."""

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
"""Parts of the names of files in which tokenizers are saved."""


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes according to its config, before any weight is loaded."""

    config: PretrainedConfig
    num_layers: int
    d_in: int
    """D, the width of the residual stream."""
    max_ctx_len: int | None
    """The model's limit in tokens, None where it has none."""


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
    """Return what the outputs of these blocks are called, before any weight is loaded."""
    from transformers import AutoModel

    with torch.device("meta"):
        blocks = find_blocks(AutoModel.from_config(cut_config(shape.config, max(layers) + 1)))
    return [blocks.hookpoint(layer) for layer in layers]


def context_length(config: PretrainedConfig) -> int | None:
    """Return the longest sequence in tokens that the model's positions allow, None if the config names no limit."""
    limit = getattr(text_config_of(config), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if getattr(config, "pad_token_id", None) is None:
        return limit
    # RoBERTa and its relatives count positions from the padding's number on, so their tables have rows that no token
    # reaches. The module says so, the config does not; on the meta device it costs no memory.
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(cut_config(config, 1))
    for name, module in model.named_modules():
        if "position" in name and isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            limit = min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def vocabulary_of(config: PretrainedConfig) -> int:
    """Return the number of tokens in the vocabulary of a model with this config, before any weight is loaded."""
    from transformers import AutoModel

    with torch.device("meta"):
        return vocabulary(AutoModel.from_config(cut_config(config, 1)))


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of tokens in a language model's vocabulary."""
    embeddings = model.get_input_embeddings().weight
    return getattr(embeddings, "ds_shape", embeddings.shape)[0]  # the whole's, where it is a shard


def shared_limit(*limits: int | None) -> int | None:
    """Return the most tokens per sequence that several models can read; None without a limit."""
    return min((each for each in limits if each is not None), default=None)


def resolve_ctx_len(asked: int | None, *limits: int | None) -> int:
    """Return tokens per sequence: what was asked for, or 2048 or the model's limit if that is less.

    Args:
        asked: What was asked for.
        limits: The most that the model can read, or that each of several can; None is no limit.

    Raises:
        UserError: If more was asked for than the model can read.
    """
    limit = shared_limit(*limits)
    if asked is None:
        return min(DEFAULT_CTX_LEN, limit or DEFAULT_CTX_LEN)
    if limit is not None and asked > limit:
        raise UserError(
            f"--ctx-len {asked} is more than the {limit} tokens that this model can read: give {limit} or less"
        )
    return asked


def load_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to the model."""
    from transformers import AutoTokenizer

    return from_pretrained(AutoTokenizer, cfg)


def find_tokenizer(cfg: ModelConfig) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that belongs to the model; None for a local folder in which none was saved.

    Raises:
        UserError: If there is one that cannot be loaded, or the model is neither a local folder nor on the hub.
    """
    path = path_of(cfg.model)
    # By its files: transformers would make an empty tokenizer of some folders without any.
    if path.is_dir() and not any(TOKENIZER_FILE.search(file.name) for file in path.iterdir()):
        return None
    return load_tokenizer(cfg)


def load_model(
    cfg: ModelConfig, shape: ModelShape, depth: int, device: torch.device, *, sharded: bool = False
) -> PreTrainedModel:
    """Load a model's first blocks, frozen, in eval mode, on `device`.

    Other blocks are neither loaded nor run: the config is cut before the weights are read.

    Args:
        cfg: Which model, and in which type.
        shape: Its sizes.
        depth: How many blocks.
        device: Where it goes.
        sharded: Whether DeepSpeed cuts it among the ranks while it is loaded.

    Raises:
        UserError: If 8 bits are asked for without a device for them, or weights are missing from the checkpoint,
            damaged, or of another shape than its config says.
    """
    from transformers import AutoModel

    kwargs = loading_arguments(cfg, device, sharded=sharded)
    config = cut_config(shape.config, depth)
    with quietly():
        # Other shapes are let through here to be refused by name below.
        asked = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
        model, info = from_pretrained(AutoModel, cfg, weights=True, **asked)
    check_loaded(cfg, model, info)
    if not cfg.load_in_8bit:
        model.to(device)
    return model.eval().requires_grad_(False)


def check_loaded(cfg: ModelConfig, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Check that the checkpoint had all weights up to the end of the blocks; weights after them do not matter."""
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"model {cfg.model!r}: {name!r} has shape {list(found)} in the checkpoint, but by config.json "
            f"{list(expected)}"
        )
    outer = "" if model.base_model is model else f"{model.base_model_prefix}."
    names, blocks = [outer + name for name in model.base_model.state_dict()], f"{outer}{find_blocks(model).prefix}."
    end = 1 + max(number for number, name in enumerate(names) if name.startswith(blocks))
    missing = [name for name in names[:end] if name in info["missing_keys"]]
    if missing:
        raise UserError(f"model {cfg.model!r}: its checkpoint lacks weights such as {missing[0]!r}")


def cut_config(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """Return a copy of a config whose text model has only its first `depth` layers."""
    cut = copy.deepcopy(config)
    text = text_config_of(cut)
    full = num_layers(text)
    for name, value in list(vars(text).items()):
        # Lists with an entry per layer (kinds of attention, say) are validated against the depth.
        per_layer = isinstance(value, (list, tuple)) and len(value) == full and not name.endswith("token_id")
        if per_layer and full != depth:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return cut


def from_pretrained(auto: Any, cfg: ModelConfig, *, weights: bool = False, **kwargs: Any) -> Any:
    """Call an Auto class and say in one line what went wrong, if something did.

    Code from the model's repository never runs: by default transformers would ask for that on the terminal.

    Args:
        auto: The class.
        cfg: Which model.
        weights: Whether weights are read, too.
        kwargs: Passed to the class.
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
    """Keep transformers from listing weights that are not loaded on purpose (cut layers, a head) as unexpected."""
    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "utils.loading_report")]

    # A filter and not a level: transformers reads this level to decide on more checks, and warns about those.
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
    """Return the ids of excluded tokens: the user's and, unless switched off, the special ones, ascending."""
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
    """Switch off the progress bars of the libraries: in a log they are noise, and one rank's are enough."""
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars as disable_hub_bars

    datasets.disable_progress_bars()
    disable_hub_bars()
    transformers.utils.logging.disable_progress_bar()
