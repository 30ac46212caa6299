"""The live model, a source that computes activations on the fly and drops them after their step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from saekit.activations.chosen import chosen_in
from saekit.activations.lm import context_length, excluded_tokens, resolve_ctx_len, vocabulary
from saekit.activations.pair import models_of, tap_all
from saekit.activations.sites import hookpoints_of
from saekit.activations.source import Activations, Source, Tokens
from saekit.config import TrainConfig
from saekit.data import StepBatches, check_tokens, sequences
from saekit.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Micro(NamedTuple):
    """A rank's micro-batch of token ids."""

    places: range
    """The positions of its sequences in the run's order."""
    ids: Tensor
    """int64 `[sequences, tokens]`, on the CPU. Without sequences if the rank has no share of the step."""
    whole: bool
    """Whether all ranks have equal shares of the step. Only the last step of a run can have unequal ones."""


class LiveModel(Source):
    """Gives the activations of a frozen language model on token ids.

    The model does not learn, so the next step's activations do not depend on this step. They can be started before this
    step is over.

    Args:
        model: The language model. It is not modified.
        dataset: A `datasets.Dataset` with a column `input_ids`, or `saekit.data.Sequences`.
        tokenizer: Its special tokens are excluded. Without a tokenizer, those in the model's config are.
        eval_data: The data set that `eval_every` evaluates on, of the same kind as `dataset`.
        name: The model's name. By default the name in its config.
        data_name: The data set's name.
        fixed_rows: Whether to mask excluded tokens instead of dropping them. All steps then have the same shapes,
            except the last one if it is shorter.
        other: The second model, for crosscoders of two models (`crosscode_models`). It reads the same token ids. The
            caller must make sure that they mean the same to both models.
        other_name: The second model's name.
        other_tokenizer: The second model's tokenizer. Its special tokens are excluded too.

    Raises:
        UserError: If a model or a tokenizer is not one of transformers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dataset: Any,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eval_data: Any = None,
        name: str | None = None,
        data_name: str = "tokenized data",
        fixed_rows: bool = False,
        other: PreTrainedModel | None = None,
        other_name: str | None = None,
        other_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.models = models_of(model, other)
        for each in self.models.values():
            if not hasattr(each, "base_model") or not hasattr(each, "config"):
                raise UserError(
                    f"the model is a {type(each).__name__}: pass a loaded transformers model, or pass its name to "
                    "saekit.train"
                )
        for each in (tokenizer, other_tokenizer):
            if each is not None and not hasattr(each, "all_special_ids"):
                raise UserError(f"the tokenizer is a {type(each).__name__}: pass a loaded tokenizer of transformers")
        self.model, self.other = model, other
        self.tokenizer = tokenizer
        self._tokenizers = [tokenizer, other_tokenizer][: len(self.models)]
        self.name = name or model.name_or_path or type(model).__name__
        if other is not None:
            self.other_name = other_name or other.name_or_path or type(other).__name__
        self.data_name = data_name
        self.dtype = functools.reduce(torch.promote_types, (each.dtype for each in self.models.values()))
        self.dataset, self.eval_data = dataset, eval_data
        self.fixed_rows = fixed_rows
        self._begun: tuple[Micro, Activations] | None = None

    def begin(self, cfg: TrainConfig, device: torch.device, rank: int, world_size: int) -> None:
        """Find the modules to read, cut the data into steps, and check the token ids that will be read.

        Raises:
            UserError: If there is no such hookpoint, or if the data does not fit the model or the run.
        """
        self.device, self._rank, self._world_size, self._micro_batches = device, rank, world_size, cfg.grad_acc_steps
        if (cfg.crosscode_models is None) != (self.other is None):
            given, missing = "crosscode_models", "a second model"
            if self.other is not None:
                given, missing = missing, given
            raise UserError(f"{given} is given without {missing}: crosscoders of two models need both")
        self.sites = chosen_in(cfg, self.model, self.other)
        self.hookpoints = hookpoints_of(self.sites)
        data = sequences(self.dataset, cfg.ctx_len)
        self.ctx_len = data.ctx_len
        excluded: set[int] = set()
        for model, tokenizer in zip(self.models.values(), self._tokenizers, strict=True):
            resolve_ctx_len(self.ctx_len, context_length(model.config))
            excluded.update(excluded_tokens(cfg, model, tokenizer))
        self.excluded = torch.tensor(sorted(excluded), dtype=torch.int64)
        global_batch = cfg.batch_size * cfg.grad_acc_steps * world_size
        self.batches = StepBatches(data, global_batch, cfg.order_seed, cfg.max_tokens)
        self.global_batch = global_batch
        self.num_sequences = self.batches.num_sequences
        check_tokens(data, self.vocabulary, self.batches.order)

    @cached_property
    def vocabulary(self) -> int:
        """Return the number of tokens in the model's vocabulary, or in the smaller one's of two models."""
        return min(map(vocabulary, self.models.values()))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Register the hooks on the modules, and remove them afterwards."""
        with tap_all(self.models, [each.name for each in self.hookpoints]) as self._read_taps:
            try:
                yield
            finally:
                self.forget()
                del self._read_taps

    def read(self, step: int) -> list[Micro]:
        """Read this rank's token ids."""
        whole = (step + 1) * self.global_batch <= self.num_sequences
        cut = (step, self._rank, self._world_size, self._micro_batches)
        shares = zip(self.batches.shares(*cut), self.batches.step(*cut), strict=True)
        return [Micro(places, ids, whole) for places, ids in shares]

    def checksum(self, step: int) -> str:
        """Return a checksum of the step's token ids."""
        return self.batches.checksum(step)

    def counted(self, input_ids: Tensor) -> Tensor:
        """Return which tokens are counted: bool, of the shape of `input_ids`, on the CPU."""
        return ~torch.isin(input_ids, self.excluded)

    def count(self, batch: Micro) -> int:
        """Return the number of counted tokens in a micro-batch."""
        return int(self.counted(batch.ids).sum())

    @property
    def language_model(self) -> LiveModel:
        """Return itself."""
        return self

    def tokens(self, batch: Micro) -> Tokens:
        """Return which tokens have rows: the counted ones, or all if excluded tokens are masked."""
        counted = self.counted(batch.ids)
        if self.fixed_rows and batch.whole:
            return Tokens(batch.places, torch.ones_like(counted), counted)
        return Tokens(batch.places, counted, None)

    @property
    def runs_behind(self) -> bool:
        """Return True on a GPU."""
        return self.device.type == "cuda"

    def prefetch(self, batch: Micro) -> None:
        """Queue the forward pass on the device."""
        self._begun = (batch, self._run(batch))

    def forget(self) -> None:
        """Drop the activations that `prefetch` began."""
        self._begun = None

    def __call__(self, batch: Micro) -> Activations:
        """Run the model up to the last hookpoint. Two models run one after the other.

        Raises:
            UserError: If a token id is not in the model's vocabulary.
        """
        if self._begun is not None and self._begun[0] is batch:
            acts, self._begun = self._begun[1], None
            return acts
        return self._run(batch)

    def _run(self, batch: Micro) -> Activations:
        input_ids = batch.ids
        empty = input_ids.shape[0] == 0  # possible in the run's last step
        if empty:  # run the model anyway, since activations must have the same type as the other ranks'
            input_ids = torch.zeros(1, self.ctx_len, dtype=torch.int64)
        check_ids(input_ids, self.vocabulary)  # for a caller's own `Sequences`, which `check_tokens` cannot check
        counted_N = (self.counted(input_ids) & (not empty)).flatten()
        masked = self.fixed_rows and batch.whole
        # Find the rows on the CPU: on a GPU the host would wait, once per layer, to learn how many there are.
        rows = torch.arange(len(counted_N)) if masked else counted_N.nonzero().squeeze(1)
        rows_N = to_device(rows, self.device)
        # `index_select` copies, and so turns inference tensors into ordinary ones.
        of = self._read_taps(
            to_device(input_ids, self.device), keep=lambda acts: acts.flatten(0, 1).index_select(0, rows_N)
        )
        return Activations(of, to_device(counted_N, self.device) if masked else None)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for the copy."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def check_ids(input_ids: Tensor, vocabulary: int, what: str = "the data") -> None:
    """Check that token ids are in the model's vocabulary.

    Args:
        input_ids: The token ids, of any shape.
        vocabulary: Number of tokens in the model's vocabulary.
        what: The name of the data in the message.

    Raises:
        UserError: If one of them is not.
    """
    if int(input_ids.max()) >= vocabulary or int(input_ids.min()) < 0:
        raise UserError(
            f"{what} has token ids from {int(input_ids.min())} to {int(input_ids.max())}, but the model's vocabulary "
            f"has {vocabulary} tokens: it was tokenized for another model"
        )
