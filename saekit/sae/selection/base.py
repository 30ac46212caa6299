"""The protocol of selections, with defaults that suit a code of k latents."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from saekit.registry import SELECTIONS
from saekit.sae.kernels import Kernels


class Selection:
    """Chooses which latents of a token are active, and their values.

    A kind is a subclass in its own file, registered under its `name` in `saekit.registry.SELECTIONS`. It must implement
    `encode`; everything else has a default. Each `Sae` has its own instance. An instance is not a module: what it
    learns between steps, such as a threshold, is a tensor without a gradient.

    Args:
        k: The value of `--k`: the number of active latents per token, exactly or on average.
        num_latents: M.

    Raises:
        ValueError: If the selection does not allow these sizes (`check`).
    """

    name: ClassVar[str]
    """The name in `--activation` and `cfg.json`."""
    lr_factor: ClassVar[float] = 1.0
    """A factor on Adam's default learning rate."""
    multi_topk: ClassVar[bool] = False
    """Whether the kind implements `wider`, for Multi-TopK."""
    num_sums: ClassVar[int] = 0
    """The number of values that `sums` returns per token."""
    fits: ClassVar[bool] = False
    """Whether the kind implements `fit_`, which needs a sample of the first batch. Set automatically."""
    moves: ClassVar[bool] = False
    """Whether the kind implements `move_`, which needs firings and `sums` of all ranks. Set automatically."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.fits = cls.fit_ is not Selection.fit_
        cls.moves = cls.move_ is not Selection.move_

    def __init__(self, k: int, num_latents: int) -> None:
        self.check(k, num_latents)
        self.k = k
        self.num_latents = num_latents

    @classmethod
    def check(cls, k: int, num_latents: int) -> None:
        """Check that the selection allows these sizes.

        Raises:
            ValueError: If it does not.
        """
        if k > num_latents:
            raise ValueError(f"k = {k} is larger than num_latents = {num_latents}: choose a smaller k or more latents")

    @property
    def max_active(self) -> int:
        """Return K, the largest number of active latents per token and the width of its code."""
        return self.k

    # The choice

    def encode(
        self, x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, centre_D: Tensor | None, kernels: Kernels
    ) -> tuple[Tensor, Tensor]:
        """Choose latents by the pre-activations `W_enc (x − centre) + b_enc`.

        Args:
            x_ND: `[N, D]`.
            W_enc_MD: `[M, D]`.
            b_enc_M: `[M]`.
            centre_D: `[D]`, subtracted from `x`. None subtracts nothing.
            kernels: The kernels to compute with, as far as they have what the selection needs.

        Returns:
            Values and indices of the latents (int64), both `[N, K]`. Unused places have the value 0. Gradients reach
            `W_enc`, `b_enc` and `centre` by autograd.
        """
        raise NotImplementedError(f"{type(self).__qualname__} does not implement encode, which chooses the latents")

    def autoencode(
        self,
        x_ND: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        W_dec_MD: Tensor,
        centre_D: Tensor | None,
        kernels: Kernels,
        prefixes: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encode, then sum the chosen decoder rows. Kinds with fused kernels override this to use them.

        Args:
            x_ND: `[N, D]`.
            W_enc_MD: `[M, D]`.
            b_enc_M: `[M]`.
            W_dec_MD: `[M, D]`.
            centre_D: `[D]`, subtracted from `x`. None subtracts nothing.
            kernels: The kernels to compute with.
            prefixes: Sizes of a Matryoshka's nested dictionaries, ascending. Empty for none.

        Returns:
            The sum `[N, D]`, or with prefixes one sum of the chosen latents in each prefix, `[G, N, D]`. Then values
            and indices of the latents, both `[N, K]`.
        """
        acts_NK, indices_NK = self.encode(x_ND, W_enc_MD, b_enc_M, centre_D, kernels)
        if not prefixes:
            return kernels.decode(acts_NK, indices_NK, W_dec_MD), acts_NK, indices_NK
        rows = [kernels.decode(acts_NK * (indices_NK < prefix), indices_NK, W_dec_MD) for prefix in prefixes]
        return torch.stack(rows), acts_NK, indices_NK

    def wider(self) -> Selection:
        """Return the selection of Multi-TopK's second code, whose first K latents are those of this selection.

        Raises:
            NotImplementedError: If there is none (`multi_topk` is False).
        """
        raise NotImplementedError(f"{self.name} has no wider code (multi_topk is False)")

    def fired(self, acts: Tensor) -> Tensor:
        """Return which values count as firings, bool of the same shape. 0 never counts."""
        return acts > 0

    def penalty(self, acts: Tensor, indices: Tensor) -> Tensor | None:
        """Compute an extra loss term for each token, `[...]` from `[..., K]`. None if the kind has no such term.

        The loss sums it over tokens and divides it like the squared error, so the split of a batch changes nothing.
        """
        return None

    # What changes between steps

    def fit_(self, scores_RM: Tensor, rms: float) -> None:
        """Fit a new selection to a sample of the first batch, in place.

        Args:
            scores_RM: `[R, M]`, float32: pre-activations of R tokens.
            rms: The root mean square of the centred activations, which is the unit of pre-activations.
        """

    def before_fit(self) -> Selection:
        """Return the selection used while initial weights are fitted, before `fit_`."""
        return self

    def sums(self, acts: Tensor) -> Tensor:
        """Compute what `move_` needs of each token's code, `[..., K]`, as integers: int64 `[..., num_sums]`."""
        return acts.new_zeros(*acts.shape[:-1], self.num_sums, dtype=torch.int64)

    def move_(self, firings: Tensor, tokens: Tensor, sums: Tensor, rms: Tensor) -> None:
        """Update the selection's state in place, after an optimizer step that was not skipped.

        Compute everything on the device, without reading a value on the host. The counts are integers, so that all
        ranks compute the same update. A bank updates all its units of one kind at once, with their `state` stacked and
        a leading dimension of units in every argument. The operations must therefore act on each unit separately.

        Args:
            firings: How many latents fired in the step, over its tokens on all ranks: int64 `[...]`.
            tokens: Counted tokens of the step over all ranks: int64 `[...]`.
            sums: The result of `sums`, added up over these tokens: int64 `[..., num_sums]`.
            rms: float64 `[...]`, as in `fit_`.
        """

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that change between steps, by attribute. They move with the SAE's parameters."""
        return {}

    def load_(self, other: Selection) -> None:
        """Copy the state of another selection of the same kind, in place."""
        for name, tensor in other.state().items():
            self.state()[name].copy_(tensor)

    @staticmethod
    def stack_(selections: Sequence[Selection]) -> Selection:
        """Stack the state of several selections of one kind and k, `[units, ...]`, in one selection.

        The selections' own state becomes views of it, so that `move_` updates all of them.
        """
        whole = copy.copy(selections[0])
        for name in whole.state():
            stacked = torch.stack([each.state()[name] for each in selections])
            setattr(whole, name, stacked)
            for number, each in enumerate(selections):
                setattr(each, name, stacked[number])
        return whole

    def to(self, device: torch.device | str) -> Selection:
        """Move the state to a device."""
        for name, tensor in self.state().items():
            setattr(self, name, tensor.to(device))
        return self

    def clone(self) -> Selection:
        """Return an independent copy on the CPU, which can be sent to other ranks."""
        other = copy.copy(self)
        for name, tensor in self.state().items():
            plain = tensor.detach()  # a tensor on the meta device has no data to copy
            setattr(other, name, plain if plain.is_meta else plain.to("cpu", copy=True))
        return other

    # Files and views

    def to_config(self) -> dict[str, Any]:
        """Return its entries of `cfg.json`, other than `activation` and `k`, as plain values without rounding."""
        return {}

    @classmethod
    def from_config(cls, k: int, num_latents: int, config: Mapping[str, Any]) -> Selection:
        """Make the selection that a `cfg.json` describes.

        Raises:
            ValueError: If one of its entries is missing or invalid.
        """
        return cls(k, num_latents)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> list[tuple[str, float, str]]:
        """Return the numbers of a `cfg.json` that `saekit inspect` shows: name, value and a remark each."""
        return []

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens' architecture for this selection: entries of `cfg.json`, and tensors other than the weights.

        Raises:
            ValueError: If SAELens has no such architecture.
        """
        raise ValueError(f"SAELens has no architecture for {self.name}: save it without format")

    def __repr__(self) -> str:
        """Return the name, for `print(sae)`."""
        return self.name


def make_selection(kind: str | Selection, k: int, num_latents: int) -> Selection:
    """Make a new selection from its name, or return the instance if one is given.

    Raises:
        UserError: If there is no selection of this name.
        ValueError: If the selection does not allow these sizes, or the instance has others.
    """
    if isinstance(kind, str):
        made: Selection = SELECTIONS.get(kind)(k, num_latents)
        return made
    if (kind.k, kind.num_latents) != (k, num_latents):
        raise ValueError(
            f"the selection is for k = {kind.k} of {kind.num_latents} latents, not for k = {k} of {num_latents}"
        )
    return kind
