"""The subject of an evaluation: coders, model and data, the model's task, and the comparison of its answers."""

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
"""Sums a tensor over all ranks. Each rank has filled in the rows of its own sequences and left the others zero."""

IGNORED = -100
"""The target of a position that is not scored, as in torch's cross-entropy."""
MASKED_SHARE = 0.15
"""The share of an encoder's tokens to mask, as in training BERT (Devlin et al. 2019, arXiv 1810.04805, section 3.1)."""
NO_HEAD = "the model's checkpoint has no language modeling head"
"""Why many encoders have no objective."""
BLOCK = {"cpu": 2**20, "cuda": 2**26}
"""Logits that are converted to float32 at a time. On a CPU they should stay in the cache."""


class ScoredInput(NamedTuple):
    """The model's input, and the targets to predict."""

    input_ids: Tensor
    """int64 `[B, T]`."""
    targets: Tensor
    """int64 `[B, T]`: the token that the logits at each position should predict, or `IGNORED`."""


class Objective(Protocol):
    """Turns sequences into inputs with targets: the task of a language model."""

    def __call__(self, input_ids: Tensor, numbers: Tensor) -> ScoredInput:
        """Return the input and the targets for each sequence.

        Args:
            input_ids: int64 `[B, T]`, on the CPU.
            numbers: int64 `[B]`: the sequences' numbers in the evaluation.
        """


def next_token(input_ids: Tensor, numbers: Tensor) -> ScoredInput:
    """Ask for every token from those before it. Implements `Objective`."""
    targets = torch.full_like(input_ids, IGNORED)
    targets[:, :-1] = input_ids[:, 1:]
    return ScoredInput(input_ids, targets)


class MaskedToken:
    """Masks some tokens and asks for them from all others. Implements `Objective`.

    The choice depends only on the sequence's number. All chosen tokens are masked. BERT's training leaves or replaces a
    fifth of them instead.

    Args:
        mask_id: The id of the mask token.
        excluded: Ids that are never masked: those of excluded tokens.
    """

    def __init__(self, mask_id: int, excluded: Tensor) -> None:
        self.mask_id = mask_id
        self.excluded = excluded

    def __call__(self, input_ids: Tensor, numbers: Tensor) -> ScoredInput:
        """Mask some tokens of each sequence, and make them the targets."""
        draws = [
            torch.rand(input_ids.shape[1], generator=torch.Generator().manual_seed(number))
            for number in numbers.tolist()
        ]
        masked = (torch.stack(draws) < MASKED_SHARE) & ~torch.isin(input_ids, self.excluded)
        return ScoredInput(input_ids.masked_fill(masked, self.mask_id), input_ids.masked_fill(~masked, IGNORED))


def choose_objective(
    predicts: str | None, mask_id: int | None, excluded: Tensor, no_head: str
) -> tuple[Objective | None, str]:
    """Choose a model's task. Return it with its name, or None with the reason why there is none.

    Args:
        predicts: "next token", "masked token", or None for a model without a head.
        mask_id: The id of the mask token, if the tokenizer has one.
        excluded: Ids that are never masked.
        no_head: The reason to give if there is no head.
    """
    if predicts is None:
        return None, f"none: {no_head}"
    if predicts == "next token":
        return next_token, predicts
    if mask_id is None:
        return None, "none: the tokenizer has no mask token"
    return MaskedToken(mask_id, excluded), predicts


class Answer(NamedTuple):
    """Scores of each sequence, summed over its scored positions: float64 `[B]`."""

    ce: Tensor
    """Cross-entropy with the true token, in nats."""
    kl: Tensor
    """KL(clean ‖ changed) of the predicted distributions, in nats."""
    agree: Tensor
    """The number of positions at which both models predict the same token as most likely."""


def compare_answers(clean: Tensor, changed: Tensor, targets: Tensor) -> Answer:
    """Compare a changed model's logits with the targets and with the clean model's logits.

    Args:
        clean: Logits `[B, T, V]` of the clean model, in any float type.
        changed: Logits `[B, T, V]` of the same model with replaced activations.
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
    """The coders by name, on the model's device. If `whole` is given, only their sizes are used."""
    data: Sequences
    excluded: Tensor
    """int64: ids of excluded tokens. They keep their true activations, as do tokens excluded by `Sae.max_norm`."""
    objective: Objective | None
    """None for a model without a head."""
    objective_name: str
    batch_size: int = 8
    rank: int = 0
    world_size: int = 1
    total: Total = _alone
    whole: Callable[[str], Sae] | None = None
    """Returns a coder for one use, if no rank holds them all. All ranks must call it with the same names in order."""
    other: PreTrainedModel | None = None
    """The second model, for crosscoders of two models."""
    other_name: str | None = None

    @property
    def device(self) -> torch.device:
        """Return the model's device, on which everything is computed."""
        return self.model.device

    @property
    def models(self) -> Models:
        """Return the model, or both models."""
        return models_of(self.model, self.other)

    @property
    def answering(self) -> int:
        """Return how many of the models have a head for the task. If only one has, it is the first."""
        if self.objective is None:
            return 0
        return 1 if self.other is None or predicts(self.other) != self.objective_name else 2

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Return the site of each coder, by name.

        Raises:
            ValueError: If a transcoder's files do not say what it reads.
        """
        return {name: site_of(name, sae) for name, sae in self.saes.items()}

    def sae(self, hookpoint: str) -> Sae:
        """Return a coder for one use. Do not keep it."""
        return self.saes[hookpoint] if self.whole is None else self.whole(hookpoint)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this rank's sequence numbers `[B]`, token ids `[B, T]` on the CPU, and counted tokens, bool `[B, T]`.

        All ranks get the same number of batches, so that they make the same collective calls. A rank with fewer
        sequences gets padding batches at the end: one sequence without a number, in which no token is counted.
        """
        mine = np.arange(self.rank, len(self.data), self.world_size)
        for start in range(0, self.num_batches * self.batch_size, self.batch_size):
            numbers = mine[start : start + self.batch_size]
            input_ids = self.data.read(numbers if len(numbers) else np.zeros(1, dtype=np.int64))
            counted = ~torch.isin(input_ids, self.excluded) & bool(len(numbers))
            yield torch.from_numpy(numbers), input_ids, counted

    @property
    def num_batches(self) -> int:
        """Return the number of batches on each rank, which is that of the first rank's share."""
        return -(-len(range(0, len(self.data), self.world_size)) // self.batch_size)


def misplaced(subject: Subject) -> tuple[str, ...]:
    """Return a sentence for each coder that is known to be trained on another model or hookpoint."""
    said = []
    for name, sae in subject.saes.items():
        known = sae.trained_on
        if known is not None and not known.is_at(name):
            said.append(f"the {subject.sites[name].kind} that is evaluated at {name} was trained at {known.hookpoint}")
    name = subject.model.name_or_path
    known_all = [sae.trained_on for sae in subject.saes.values() if sae.trained_on is not None]
    others = dict.fromkeys(known.model for known in known_all if not known.is_of(name, type(subject.model).__name__))
    what = common(site.kind for site in subject.sites.values())
    said += [f"the {what}s were trained on {other}, but this model is {name}" for other in others]
    if subject.other is not None:
        name, kind = str(subject.other_name), type(subject.other).__name__
        seconds = dict.fromkeys(known.other for known in known_all if not known.is_of_other(name, kind))
        said += [f"the {what}s were trained on {other} as the second model, but it is {name}" for other in seconds]
    return tuple(said)


def of_kinds(kinds: Sequence[str]) -> str:
    """Format the number of coders of these kinds: `3 SAEs`, `1 crosscoder`."""
    return plural(len(kinds), common(kinds))
