"""Open a run's live model from its configuration: check, read the data, then load the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from saekit.activations import (
    ModelShape,
    agreed_type,
    choose_attention,
    find_tokenizer,
    load_model,
    load_with_head,
    model_shape,
    resolve_ctx_len,
    resolve_dtype,
    shape_of,
    vocabulary,
    vocabulary_of,
)
from saekit.activations.chosen import chosen, chosen_in
from saekit.activations.live import LiveModel
from saekit.activations.same_tokens import check_same_tokens
from saekit.config import ModelConfig, RunConfig, TrainConfig
from saekit.data import Sequences, check_tokens, load_sequences, numbers_read
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.training.early import InMemory, check_inputs, check_units
from saekit.training.evaluating import load_eval_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_live(cfg: RunConfig, placement: Placement, say: Callable[[str], None], have: InMemory) -> LiveModel:
    """Load the model and the data that the configuration names, unless the caller has loaded them. Collective.

    Cheap steps come first: the model's config (layers, context), then the data, then the weights.

    Args:
        cfg: The run.
        placement: The ranks. One rank per machine tokenizes; the others read its cache.
        say: Receives progress messages.
        have: What the caller has loaded already.

    Raises:
        UserError: If the model, the data or an option cannot be used.
    """
    train = cfg.train
    check_inputs(cfg, placement.device, have)
    if train.shard_lm and cfg.model.load_in_8bit:
        raise UserError("--shard-lm cannot shard the 8-bit weights of --load-in-8bit: leave out one of the two")
    models = [_Model(cfg.model, have.model, have.tokenizer)]
    if cfg.other_model is not None:
        models.append(_Model(cfg.other_model, have.other_model, have.other_tokenizer))
    for each in models:
        say(f"Reading the configuration of {each.cfg.model}")
        each.read()
    sites, *depths = _chosen(cfg, models)
    check_units(cfg, placement, sites)
    ctx_len = resolve_ctx_len(train.ctx_len, *(each.shape.max_ctx_len for each in models))
    for each in models:
        each.find_tokenizer()
        if each.tokenizer is None:
            say(f"{each.cfg.model} has no tokenizer: taking the special tokens from its config")
    if len(models) == 2:
        one, other = models
        sizes = one.vocabulary, other.vocabulary
        check_same_tokens((one.tokenizer, other.tokenizer), sizes, other.cfg.model, say)

    say(f"Reading and tokenizing {cfg.data.dataset}")
    with placement.in_turn():
        data, eval_data = _load_data(cfg, have, models[0].tokenizer, ctx_len)
        known = min(each.vocabulary for each in models)
        check_tokens(data, known, numbers_read(train, data), repr(cfg.data.dataset))
    say(f"{len(data):,} sequences of {ctx_len:,} tokens")
    loaded = []
    for each, depth in zip(models, depths, strict=True):
        if each.loaded is None:
            part = "all layers" if train.loads_whole_model else f"up to layer {depth - 1} of {each.shape.num_layers}"
            say(f"Loading {each.cfg.model} ({part})")
            loaded.append(_load(each.cfg, train, placement, each.shape, depth))
            choose_attention(loaded[-1], ctx_len)
        else:
            there = each.loaded.device == placement.device
            loaded.append(each.loaded if there else each.loaded.to(placement.device))
    return LiveModel(
        loaded[0],
        data,
        tokenizer=models[0].tokenizer,
        eval_data=eval_data,
        name=cfg.model.model,
        data_name=cfg.data.dataset,
        other=loaded[1] if len(loaded) == 2 else None,
        other_name=models[-1].cfg.model,
        other_tokenizer=models[-1].tokenizer,
    )


class _Model:
    """One language model of a run, before its weights are loaded.

    Args:
        cfg: Its name and how to load it.
        loaded: The model, if the caller has loaded it.
        tokenizer: Its tokenizer, if the caller has loaded that.
    """

    def __init__(
        self, cfg: ModelConfig, loaded: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        self.cfg, self.loaded, self.tokenizer = cfg, loaded, tokenizer

    def read(self) -> None:
        """Read the model's config."""
        self.shape = model_shape(self.cfg) if self.loaded is None else shape_of(self.loaded.config)

    def find_tokenizer(self) -> None:
        """Find the model's tokenizer. There is none if the model has none, or does not know where it came from."""
        if self.tokenizer is None and (self.loaded is None or self.loaded.name_or_path):
            self.tokenizer = find_tokenizer(self.cfg)

    @cached_property
    def vocabulary(self) -> int:
        """Return the size of the model's vocabulary, in tokens."""
        return vocabulary_of(self.shape.config) if self.loaded is None else vocabulary(self.loaded)


def _chosen(cfg: RunConfig, models: Sequence[_Model]) -> tuple[Any, ...]:
    """Return the sites, and for each model the number of blocks to load for them."""
    loaded = [each.loaded for each in models if each.loaded is not None]
    if len(loaded) == len(models):
        return chosen_in(cfg.train, *loaded), *(0 for _ in models)
    found = chosen(cfg.train, *(each.shape for each in models))
    return found.sites, *(found.depth, found.other_depth)[: len(models)]


def _load_data(
    cfg: RunConfig, have: InMemory, tokenizer: PreTrainedTokenizerBase | None, ctx_len: int
) -> tuple[Sequences, Sequences | None]:
    """Load the data to train on and the data to evaluate on."""
    token = cfg.model.token
    data = load_sequences(cfg.data, tokenizer, ctx_len, token, have.rows)
    if have.eval_rows is not None and cfg.train.eval_every is not None:
        return data, load_sequences(cfg.data.for_evaluation(), tokenizer, ctx_len, token, have.eval_rows)
    return data, load_eval_data(cfg, data, tokenizer, ctx_len)


def _load(cfg: ModelConfig, train: TrainConfig, placement: Placement, shape: ModelShape, depth: int) -> PreTrainedModel:
    device, sharded = placement.device, train.shard_lm
    model = agreed_type(cfg, device, placement.gather)
    if train.loads_whole_model:  # the tap still stops it after the last tapped layer
        return load_with_head(model, shape, device).model

    def load() -> PreTrainedModel:
        return load_model(model, shape, depth, device, sharded=sharded)

    if not sharded:
        return load()
    # Ranks on another machine have their own cache and may still be tokenizing, for longer than a collective may take.
    placement.gather(None)
    return placement.load_sharded(load, resolve_dtype(model.dtype, device))
