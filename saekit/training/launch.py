"""A run from its configuration: check, load, train."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saekit.activations import (
    ModelShape,
    check_device,
    choose_attention,
    load_model,
    load_tokenizer,
    load_with_head,
    model_shape,
    no_bars,
    resolve_ctx_len,
    resolve_dtype,
    select_layers,
    shape_of,
)
from saekit.config import RunConfig
from saekit.data import Sequences, load_sequences
from saekit.errors import SILENCE, Interrupted, UserError
from saekit.placement import Placement, Single, connect
from saekit.report import Reporter, Reporters, terminal_reporter
from saekit.training.evaluating import load_eval_data
from saekit.training.plan import default_run_name
from saekit.training.run_folder import check_run_folder, run_folder
from saekit.training.trainer import SaeTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class InMemory:
    """What the caller has loaded already; the configuration then has only a name for it."""

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    """Of that model; None takes it from where the model was loaded from."""
    rows: Any = None
    """To train on: see `saekit.data.load.rows_in_memory`."""
    eval_rows: Any = None
    """To evaluate on every `eval_every` steps."""


def train_from_config(cfg: RunConfig, reporter: Reporter | None = None, have: InMemory | None = None) -> Path:
    """Load what the configuration names, unless the caller has it, and train; returns the last checkpoint's folder.

    The order is from cheap to dear: first the run's folder, then what the model's config says of layers and context,
    then the data, and only then the weights. What `SaeTrainer` refuses besides (trackers, `--finetune`) comes last.

    Raises:
        UserError: If something in the configuration cannot be used.
    """
    have = have or InMemory()
    placement = connect(cfg.train.placement, cfg.train.layer_map)
    if have.model is not None and isinstance(placement, Single):
        placement = Single(have.model.device)
    if placement.rank > 0 or not sys.stderr.isatty():
        no_bars()
    with _one_error(placement):
        watcher: Reporter = (reporter or terminal_reporter()) if placement.rank == 0 else Reporters()
        return _train(cfg, placement, watcher, have)


@contextmanager
def _one_error(placement: Placement) -> Iterator[None]:
    """An error on one rank ends them all; the one that came first is shown, by the rank that had it.

    The others find their connections closed: they wait a moment, so that the launcher, which stops all ranks when the
    first has ended, does not stop that one before it has spoken, and leave in silence.
    """
    try:
        yield
    except Exception as error:
        if not placement.first_to_fail():
            time.sleep(SILENCE)
            raise SystemExit(1) from error
        if placement.world_size > 1 and isinstance(error, RuntimeError) and "gloo" in str(error).lower():
            raise UserError(
                "another rank of this run has ended without a word (killed, out of memory, or its machine is gone); "
                "--resume goes on from the last checkpoint"
            ) from error
        raise


def _train(cfg: RunConfig, placement: Placement, watcher: Reporter, have: InMemory) -> Path:
    try:
        train = cfg.train
        if placement.rank == 0:
            check_run_folder(train, run_folder(train, default_run_name(cfg.model.model, cfg)))
        check_device(cfg.model, placement.device)
        if train.shard_lm and placement.name != "zero3":
            raise UserError(f"--shard-lm, but the placement is {placement.name}: only --placement zero3 shards")
        if train.shard_lm and cfg.model.load_in_8bit:
            raise UserError("--shard-lm and --load-in-8bit contradict each other: eight-bit weights cannot be sharded")
        watcher.status(f"Reading the configuration of {cfg.model.model}")
        shape = model_shape(cfg.model) if have.model is None else shape_of(have.model.config)
        layers = select_layers(shape.num_layers, train.layers, train.layer_stride)
        try:
            train.sae.resolve_num_latents(shape.d_in)
        except ValueError as error:
            raise UserError(str(error)) from None
        ctx_len = resolve_ctx_len(cfg.train.ctx_len, shape.max_ctx_len)
        tokenizer = _tokenizer(cfg, have)

        watcher.status(f"Reading and tokenising {cfg.data.dataset}")
        # One rank tokenises, the others read what it left in the cache.
        if placement.rank > 0:
            placement.gather(None)
        data, eval_data = _load_data(cfg, have, tokenizer, ctx_len)
        if placement.rank == 0:
            placement.gather(None)
        watcher.status(f"{len(data):,} sequences of {ctx_len:,} tokens")
        if have.model is None:
            part = "whole" if cfg.train.loads_whole_model else f"up to layer {layers[-1]} of {shape.num_layers}"
            watcher.status(f"Loading {cfg.model.model} {part}")
            model = _load(cfg, placement, shape, layers)
            choose_attention(model, ctx_len)
        else:
            model = have.model if have.model.device == placement.device else have.model.to(placement.device)
        trainer = SaeTrainer(
            train,
            data,
            model,
            tokenizer=tokenizer,
            source=cfg,
            reporter=watcher,
            placement=placement,
            eval_data=eval_data,
        )
        try:
            last = trainer.fit()
        except Interrupted:
            placement.close()
            raise
        placement.close()
        return last
    finally:
        watcher.finish()


def _tokenizer(cfg: RunConfig, have: InMemory) -> PreTrainedTokenizerBase | None:
    """The language model's tokenizer; None for a loaded model that does not say where it came from."""
    if have.tokenizer is not None or (have.model is not None and not have.model.name_or_path):
        return have.tokenizer
    return load_tokenizer(cfg.model)


def _load_data(
    cfg: RunConfig, have: InMemory, tokenizer: PreTrainedTokenizerBase | None, ctx_len: int
) -> tuple[Sequences, Sequences | None]:
    """What the run trains on, and what it evaluates on."""
    token = cfg.model.hf_token.get_secret_value() if cfg.model.hf_token else None
    data = load_sequences(cfg.data, tokenizer, ctx_len, token, have.rows)
    if have.eval_rows is not None and cfg.train.eval_every is not None:
        return data, load_sequences(cfg.data.for_evaluation(), tokenizer, ctx_len, token, have.eval_rows)
    return data, load_eval_data(cfg, data, tokenizer, ctx_len)


def _load(cfg: RunConfig, placement: Placement, shape: ModelShape, layers: list[int]) -> PreTrainedModel:
    def load() -> PreTrainedModel:
        return load_model(cfg.model, shape, layers, placement.device)

    if cfg.train.loads_whole_model:  # the tap stops it after the last tapped layer all the same
        return load_with_head(cfg.model, shape, placement.device).model
    if not cfg.train.shard_lm:
        return load()
    from saekit.placement.deepspeed import load_sharded

    return load_sharded(load, resolve_dtype(cfg.model.dtype, placement.device))
