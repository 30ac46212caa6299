"""The subject of an evaluation: coders, model and data, the model's task, and how far its answers change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saekit.activations.head import predicts
from saekit.activations.pair import Models, models_of
from saekit.activations.sites import Site, common, site_of
from saekit.data import Sequences
from saekit.sae import Sae
from saekit.units import plural

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Total = Callable[[Tensor], Tensor]
"""A tensor summed over all ranks; each has filled in the rows of its own sequences and left the others zero."""

IGNORED = -100
"""The target of a position that is not scored, as torch's cross-entropy has it."""
MASKED_SHARE = 0.15
"""Of an encoder's tokens; Devlin et al. 2019 (BERT, arXiv 1810.04805, section 3.1) train with as many."""
NO_HEAD = "the model's checkpoint has no language modelling head"
"""Why there is no objective, for many encoders."""
BLOCK = {"cpu": 2**20, "cuda": 2**26}
"""Logits that are turned to float32 at a time: on a CPU so few that they stay in the cache."""


class ScoredInput(NamedTuple):
    """The model's input, and the targets to predict."""

    input_ids: Tensor
    """int64 `[B, T]`."""
    targets: Tensor
    """int64 `[B, T]`: the token that the logits of each position should give, `IGNORED` where none is scored."""


class Objective(Protocol):
    """From sequences to questions."""

    def __call__(self, input_ids: Tensor, numbers: Tensor) -> ScoredInput:
        """Return the question of each sequence.

        Args:
            input_ids: int64 `[B, T]`, on the CPU.
            numbers: int64 `[B]`: which sequences of the evaluation they are.
        """


def next_token(input_ids: Tensor, numbers: Tensor) -> ScoredInput:
    """Predict every token from those before it. Implements `Objective`."""
    targets = torch.full_like(input_ids, IGNORED)
    targets[:, :-1] = input_ids[:, 1:]
    return ScoredInput(input_ids, targets)


class MaskedToken:
    """Some tokens are masked and predicted from all others. Implements `Objective`.

    Which ones depends on the sequence's number alone. All are masked, where training leaves or changes a fifth.

    Args:
        mask_id: The mask's token.
        excluded: Ids that are never masked: special tokens, and others that train no SAE.
    """

    def __init__(self, mask_id: int, excluded: Tensor) -> None:
        self.mask_id = mask_id
        self.excluded = excluded

    def __call__(self, input_ids: Tensor, numbers: Tensor) -> ScoredInput:
        """Mask some tokens of each sequence, and ask for those."""
        draws = [
            torch.rand(input_ids.shape[1], generator=torch.Generator().manual_seed(number))
            for number in numbers.tolist()
        ]
        masked = (torch.stack(draws) < MASKED_SHARE) & ~torch.isin(input_ids, self.excluded)
        return ScoredInput(input_ids.masked_fill(masked, self.mask_id), input_ids.masked_fill(~masked, IGNORED))


def choose_objective(
    predicts: str | None, mask_id: int | None, excluded: Tensor, no_head: str
) -> tuple[Objective | None, str]:
    """Choose a model's task, and a name for it: or why there is none.

    Args:
        predicts: "next token", "masked token", or None for a model without a head.
        mask_id: The mask's token, if the tokenizer has one.
        excluded: Ids that are never masked.
        no_head: Why there is no head, where there is none.
    """
    if predicts is None:
        return None, f"none: {no_head}"
    if predicts == "next token":
        return next_token, predicts
    if mask_id is None:
        return None, "none: the tokenizer has no mask token"
    return MaskedToken(mask_id, excluded), predicts


class Answer(NamedTuple):
    """Per sequence, summed over its scored positions, float64 `[B]`."""

    ce: Tensor
    """Cross-entropy with the true token, in nats."""
    kl: Tensor
    """KL(clean ‖ changed) of the predicted distributions, in nats."""
    agree: Tensor
    """Positions at which both models think the same token most likely."""


def compare_answers(clean: Tensor, changed: Tensor, targets: Tensor) -> Answer:
    """Score a changed model's logits against the truth and against the clean model's.

    Args:
        clean: Logits `[B, T, V]` of the model as it is, in any float type.
        changed: Logits of the same model with something in place of its activations.
        targets: int64 `[B, T]`.
    """
    rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)
    scored, block = targets != IGNORED, BLOCK.get(targets.device.type, BLOCK["cpu"])
    answer = Answer(*(torch.zeros(len(targets), dtype=torch.float64, device=targets.device) for _ in Answer._fields))
    places = scored.flatten().nonzero().squeeze(1)
    for some in places.split(max(1, block // clean.shape[-1])):
        p_NV = clean.flatten(0, 1)[some].float().log_softmax(-1)
        row, target = rows.flatten()[some], targets.flatten()[some]
        if changed is clean:
            q_NV, kl_N = p_NV, p_NV.new_zeros(len(some))
        else:
            q_NV = changed.flatten(0, 1)[some].float().log_softmax(-1)
            kl_N = (p_NV - q_NV).mul_(p_NV.exp()).sum(-1)
        answer.ce.index_add_(0, row, F.nll_loss(q_NV, target, reduction="none").double())
        answer.kl.index_add_(0, row, kl_N.double())
        answer.agree.index_add_(0, row, (p_NV.argmax(-1) == q_NV.argmax(-1)).double())
    return answer


def _alone(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Subject:
    """Coders, model and data of an evaluation, and this rank's part of it."""

    model: PreTrainedModel
    saes: Mapping[str, Sae]
    """By name, on the model's device; if `whole` is given, only their sizes are read."""
    data: Sequences
    excluded: Tensor
    """int64: ids of excluded tokens. They keep their true activations, as do those that `Sae.max_norm` excludes."""
    objective: Objective | None
    """None for a model without a head."""
    objective_name: str
    batch_size: int = 8
    rank: int = 0
    world_size: int = 1
    total: Total = _alone
    whole: Callable[[str], Sae] | None = None
    """Gives an SAE for one use, if no rank holds them all. All ranks ask for the same ones in the same order."""
    other: PreTrainedModel | None = None
    """The second model, if the coders are crosscoders of two."""
    other_name: str | None = None

    @property
    def device(self) -> torch.device:
        """Return where everything is computed."""
        return self.model.device

    @property
    def models(self) -> Models:
        """Return the model, or both."""
        return models_of(self.model, self.other)

    @property
    def answering(self) -> int:
        """Return how many of the models have a head for the task, the first of two first."""
        if self.objective is None:
            return 0
        return 1 if self.other is None or predicts(self.other) != self.objective_name else 2

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Return what each coder reads and writes.

        Raises:
            ValueError: If the files of a transcoder do not say it.
        """
        return {name: site_of(name, sae) for name, sae in self.saes.items()}

    def sae(self, hookpoint: str) -> Sae:
        """One of them, to be used and forgotten."""
        return self.saes[hookpoint] if self.whole is None else self.whole(hookpoint)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give this rank's sequence numbers `[B]`, their token ids `[B, T]` on the CPU, and which are counted `[B, T]`.

        All ranks have the same number of batches, so that they make the same calls. A rank with fewer sequences gets
        batches of one sequence without a number, in which no token is counted.
        """
        mine = np.arange(self.rank, len(self.data), self.world_size)
        for start in range(0, self.num_batches * self.batch_size, self.batch_size):
            numbers = mine[start : start + self.batch_size]
            input_ids = self.data.read(numbers if len(numbers) else np.zeros(1, dtype=np.int64))
            counted = ~torch.isin(input_ids, self.excluded) & bool(len(numbers))
            yield torch.from_numpy(numbers), input_ids, counted

    @property
    def num_batches(self) -> int:
        """Return the number of batches of each rank: as many as the first rank's share makes."""
        return -(-len(range(0, len(self.data), self.world_size)) // self.batch_size)


def misplaced(subject: Subject) -> tuple[str, ...]:
    """Say which coders were trained on another model, or elsewhere in this one, where that is known."""
    said = []
    for name, sae in subject.saes.items():
        known = sae.trained_on
        if known is not None and not known.is_at(name):
            said.append(f"the {subject.sites[name].kind} that is evaluated at {name} was trained at {known.hookpoint}")
    name = subject.model.name_or_path
    known_all = [sae.trained_on for sae in subject.saes.values() if sae.trained_on is not None]
    others = dict.fromkeys(known.model for known in known_all if not known.is_of(name, type(subject.model).__name__))
    what = common(site.kind for site in subject.sites.values())
    said += [f"the {what}s were trained on {other}, and this model is {name}" for other in others]
    if subject.other is not None:
        name, kind = str(subject.other_name), type(subject.other).__name__
        seconds = dict.fromkeys(known.other for known in known_all if not known.is_of_other(name, kind))
        said += [f"the {what}s were trained on {other} as the second model, and it is {name}" for other in seconds]
    return tuple(said)


def of_kinds(kinds: Sequence[str]) -> str:
    """Count coders of these kinds, in words: 3 SAEs, 1 crosscoder."""
    return plural(len(kinds), common(kinds))
