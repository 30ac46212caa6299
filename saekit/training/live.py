"""The live model of a run, from its configuration: check, read the data, and only then load the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
from saekit.config import RunConfig
from saekit.data import Sequences, check_tokens, load_sequences, numbers_read
from saekit.errors import UserError
from saekit.placement import Placement
from saekit.training.early import check_inputs, check_units
from saekit.training.evaluating import load_eval_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class InMemory:
    """Objects that the caller has loaded already; the configuration then has only names for them."""

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    """Of that model; None takes it from where the model was loaded from."""
    rows: Any = None
    """To train on: see `saekit.data.load.rows_in_memory`."""
    eval_rows: Any = None
    """To evaluate on every `eval_every` steps."""


def open_live(cfg: RunConfig, placement: Placement, say: Callable[[str], None], have: InMemory) -> LiveModel:
    """Load what the configuration names, unless the caller has it. Collective.

    The cheapest comes first: what the model's config says of layers and context, then the data, then the weights.

    Args:
        cfg: The run.
        placement: The ranks; one of each machine tokenizes, the others read what it left in the cache.
        say: Told what is done.
        have: What is loaded already.

    Raises:
        UserError: If something in the configuration cannot be used.
    """
    train = cfg.train
    check_inputs(cfg, placement.device, have)
    if train.shard_lm and cfg.model.load_in_8bit:
        raise UserError("--shard-lm and --load-in-8bit contradict each other: eight-bit weights cannot be sharded")
    say(f"Reading the configuration of {cfg.model.model}")
    shape = model_shape(cfg.model) if have.model is None else shape_of(have.model.config)
    sites, depth = chosen(train, shape) if have.model is None else (chosen_in(train, have.model), 0)
    check_units(cfg, placement, sites)
    ctx_len = resolve_ctx_len(train.ctx_len, shape.max_ctx_len)
    tokenizer = _tokenizer(cfg, have)
    if tokenizer is None:
        say(f"{cfg.model.model} has no tokenizer: its config says which tokens are special")

    say(f"Reading and tokenizing {cfg.data.dataset}")
    with placement.in_turn():
        data, eval_data = _load_data(cfg, have, tokenizer, ctx_len)
        known = vocabulary_of(shape.config) if have.model is None else vocabulary(have.model)
        check_tokens(data, known, numbers_read(train, data), repr(cfg.data.dataset))
    say(f"{len(data):,} sequences of {ctx_len:,} tokens")
    if have.model is None:
        part = "whole" if train.loads_whole_model else f"up to layer {depth - 1} of {shape.num_layers}"
        say(f"Loading {cfg.model.model} {part}")
        model = _load(cfg, placement, shape, depth)
        choose_attention(model, ctx_len)
    else:
        model = have.model if have.model.device == placement.device else have.model.to(placement.device)
    return LiveModel(
        model, data, tokenizer=tokenizer, eval_data=eval_data, name=cfg.model.model, data_name=cfg.data.dataset
    )


def _tokenizer(cfg: RunConfig, have: InMemory) -> PreTrainedTokenizerBase | None:
    """Return the language model's tokenizer; None if it has none, or does not say where it was loaded from."""
    if have.tokenizer is not None or (have.model is not None and not have.model.name_or_path):
        return have.tokenizer
    return find_tokenizer(cfg.model)


def _load_data(
    cfg: RunConfig, have: InMemory, tokenizer: PreTrainedTokenizerBase | None, ctx_len: int
) -> tuple[Sequences, Sequences | None]:
    """Load the data to train on and the data to evaluate on."""
    token = cfg.model.token
    data = load_sequences(cfg.data, tokenizer, ctx_len, token, have.rows)
    if have.eval_rows is not None and cfg.train.eval_every is not None:
        return data, load_sequences(cfg.data.for_evaluation(), tokenizer, ctx_len, token, have.eval_rows)
    return data, load_eval_data(cfg, data, tokenizer, ctx_len)


def _load(cfg: RunConfig, placement: Placement, shape: ModelShape, depth: int) -> PreTrainedModel:
    device, sharded = placement.device, cfg.train.shard_lm
    model = agreed_type(cfg.model, device, placement.gather)
    if cfg.train.loads_whole_model:  # the tap stops it after the last tapped layer all the same
        return load_with_head(model, shape, device).model

    def load() -> PreTrainedModel:
        return load_model(model, shape, depth, device, sharded=sharded)

    if not sharded:
        return load()
    # Ranks of another machine, with a cache of its own, may still be tokenizing: for longer than a collective may take.
    placement.gather(None)
    return placement.load_sharded(load, resolve_dtype(model.dtype, device))
