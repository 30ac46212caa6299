"""The language model's part of an optimiser step: from token ids to each layer's activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saekit.errors import UserError
from saekit.placement import Placement
from saekit.training.plan import RunPlan
from saekit.training.readback import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReadResidual = Callable[[Tensor], dict[str, Tensor]]


class Forward:
    """Runs the language model over micro-batches.

    It does not learn, so nothing that a step finds out about the SAEs is needed for the next step's activations: they
    can be begun before the step is over.

    Args:
        model: The language model.
        read_residual: From `saekit.activations.tap`, on that model.
        plan: What is read, and which tokens are left out.
        placement: Where the activations go.
    """

    def __init__(
        self, model: PreTrainedModel, read_residual: ReadResidual, plan: RunPlan, placement: Placement
    ) -> None:
        self.vocabulary = vocabulary(model)
        self.read_residual = read_residual
        self.plan = plan
        self.placement = placement
        self._begun: tuple[Tensor, dict[str, Tensor]] | None = None

    def __call__(self, input_ids: Tensor) -> dict[str, Tensor]:
        """Each hookpoint's activations of the kept tokens, `[N, D]`, in the language model's type.

        Args:
            input_ids: int64 `[sequences, tokens]`, on the CPU; without a sequence where a rank has no share.

        Raises:
            UserError: If they are not of the model's vocabulary.
        """
        if self._begun is not None and self._begun[0] is input_ids:
            acts, self._begun = self._begun[1], None
            return acts
        return self._run(input_ids)

    @property
    def runs_behind(self) -> bool:
        """Whether the device works through a queue: then what is begun early fills the time in which the host waits."""
        return self.placement.device.type == "cuda"

    def begin(self, input_ids: Tensor) -> None:
        """Put the work for a micro-batch into the device's queue; calling with it later gives what comes out."""
        self._begun = (input_ids, self._run(input_ids))

    def count_tokens(self, batches: Sequence[Tensor]) -> int:
        """Tokens of an optimiser step that train the SAEs, over all ranks. Collective."""
        kept = sum(int(self.plan.kept(input_ids).sum()) for input_ids in batches)
        # Ranks tell each other plain numbers: a tensor's sum would wait for everything that a GPU still has to do.
        return sum(self.placement.gather(kept))

    def _run(self, input_ids: Tensor) -> dict[str, Tensor]:
        device = self.placement.device
        empty = input_ids.shape[0] == 0  # a rank's share of the run's last step can be
        if empty:  # its activations must have the type that the other ranks' have: the model tells it
            input_ids = torch.zeros(1, self.plan.ctx_len, dtype=torch.int64)
        check_ids(input_ids, self.vocabulary)
        kept = self.plan.kept(input_ids) & (not empty)
        # Found on the CPU: a GPU would have to be waited for, once a layer, to know how many there are.
        places_N = to_device(kept.flatten().nonzero().squeeze(1), device)
        raw = self.read_residual(to_device(input_ids, device))
        # Selecting copies, which makes ordinary tensors of inference tensors; `pop` frees the originals one by one.
        return {name: raw.pop(name).to(device).flatten(0, 1).index_select(0, places_N) for name in self.plan.hookpoints}


def vocabulary(model: PreTrainedModel) -> int:
    """Tokens that a language model knows."""
    embeddings = model.get_input_embeddings().weight
    return getattr(embeddings, "ds_shape", embeddings.shape)[0]  # the whole's, where it is a shard


def check_ids(input_ids: Tensor, vocabulary: int, what: str = "the data") -> None:
    """See that token ids are of the model's vocabulary.

    Raises:
        UserError: If one of them is not; it says of what data.
    """
    if int(input_ids.max()) >= vocabulary or int(input_ids.min()) < 0:
        raise UserError(
            f"{what} has token ids from {int(input_ids.min())} to {int(input_ids.max())}, but the model knows "
            f"{vocabulary}: it was tokenised for another model, or a .bin file has another --data-args dtype"
        )
