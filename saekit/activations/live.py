"""The live model: activations computed on the fly, and forgotten after their step."""

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
    """A micro-batch of a rank."""

    places: range
    """Of its sequences in the run's order."""
    ids: Tensor
    """int64 `[sequences, tokens]`, on the CPU; without a sequence where a rank has no share."""
    whole: bool
    """Whether all ranks have equal shares of its step, as in all steps but possibly the last of a run."""


class LiveModel(Source):
    """A frozen language model that reads token ids.

    It does not learn, so nothing that a step finds out about the units is needed for the next step's activations: they
    can be begun before the step is over.

    Args:
        model: The language model; it is only read, and left as it was.
        dataset: `datasets.Dataset` with a column `input_ids`, or `saekit.data.Sequences`.
        tokenizer: Where the special tokens to exclude come from; without it, the ids in the model's config.
        eval_data: The data set that `eval_every` evaluates on, of the same kind as `dataset`.
        name: The model's; by default what its config says.
        data_name: The text's.
        fixed_rows: Whether excluded tokens are masked instead of dropped, so that all steps have the same shapes. A
            last step that is shorter is the exception.
        other: The second model, if crosscoders of two are trained (`crosscode_models`). It reads the same token ids,
            which must mean the same to it: the caller has made sure of that.
        other_name: The second model's name.
        other_tokenizer: Of the second model, whose special tokens are excluded, too.

    Raises:
        UserError: If the model or the tokenizer is none.
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
                    f"the model is a {type(each).__name__}: give a model of transformers that is loaded, or its name "
                    "to saekit.train"
                )
        for each in (tokenizer, other_tokenizer):
            if each is not None and not hasattr(each, "all_special_ids"):
                raise UserError(f"the tokenizer is a {type(each).__name__}: give one of transformers that is loaded")
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
        """Find the modules to read, cut the data into steps, and look through the ids that will be read.

        Raises:
            UserError: If there is no such hookpoint, or the data does not suit the model or the run.
        """
        self.device, self._rank, self._world_size, self._micro_batches = device, rank, world_size, cfg.grad_acc_steps
        if (cfg.crosscode_models is None) != (self.other is None):
            given, missing = ("crosscode_models", "a second model")
            given, missing = (given, missing) if self.other is None else (missing, given)
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
        self.batches = StepBatches(data, global_batch, cfg.data_seed if cfg.shuffle else None, cfg.max_tokens)
        self.global_batch = global_batch
        self.num_sequences = self.batches.num_sequences
        check_tokens(data, self.vocabulary, self.batches.order)

    @cached_property
    def vocabulary(self) -> int:
        """Return the number of tokens in the model's vocabulary; of two models the smaller one's."""
        return min(map(vocabulary, self.models.values()))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Hook the modules."""
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
        """Tell which tokens are counted: bool, of the shape of `input_ids`, on the CPU."""
        return ~torch.isin(input_ids, self.excluded)

    def count(self, batch: Micro) -> int:
        """Count a micro-batch's tokens that are not excluded."""
        return int(self.counted(batch.ids).sum())

    @property
    def language_model(self) -> LiveModel:  # type: ignore[override]
        """Return itself."""
        return self

    def tokens(self, batch: Micro) -> Tokens:
        """Tell which tokens have rows: those that are not excluded, or all where they are masked."""
        counted = self.counted(batch.ids)
        if self.fixed_rows and batch.whole:
            return Tokens(batch.places, torch.ones_like(counted), counted)
        return Tokens(batch.places, counted, None)

    @property
    def runs_behind(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"

    def prefetch(self, batch: Micro) -> None:
        """Put the forward pass into the device's queue."""
        self._begun = (batch, self._run(batch))

    def forget(self) -> None:
        """Drop the activations."""
        self._begun = None

    def __call__(self, batch: Micro) -> Activations:
        """Run the model up to the last hookpoint; of two models one after the other.

        Raises:
            UserError: If the token ids are not of the model's vocabulary.
        """
        if self._begun is not None and self._begun[0] is batch:
            acts, self._begun = self._begun[1], None
            return acts
        return self._run(batch)

    def _run(self, batch: Micro) -> Activations:
        input_ids = batch.ids
        empty = input_ids.shape[0] == 0  # a rank's share of the run's last step can be
        if empty:  # its activations must have the type that the other ranks' have: the model tells it
            input_ids = torch.zeros(1, self.ctx_len, dtype=torch.int64)
        check_ids(input_ids, self.vocabulary)  # of sequences that `check_tokens` cannot look through
        counted_N = (self.counted(input_ids) & (not empty)).flatten()
        masked = self.fixed_rows and batch.whole
        # Found on the CPU: a GPU would have to be waited for, once a layer, to know how many there are.
        rows = torch.arange(len(counted_N)) if masked else counted_N.nonzero().squeeze(1)
        rows_N = to_device(rows, self.device)
        # Selecting copies, which makes ordinary tensors of inference tensors.
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

    Raises:
        UserError: If one of them is not; it says of what data.
    """
    if int(input_ids.max()) >= vocabulary or int(input_ids.min()) < 0:
        raise UserError(
            f"{what} has token ids from {int(input_ids.min())} to {int(input_ids.max())}, but the model knows "
            f"{vocabulary}: it was tokenized for another model"
        )
