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
    """Chooses which latents of a token are active, and with what value.

    A kind is a subclass in a file of its own, registered under its `name` in `saekit.registry.SELECTIONS`. It must say
    how it chooses (`encode`); everything else has a default. Each `Sae` has an instance of its own. An instance is no
    module: what it learns between steps, such as a threshold, is a tensor that no gradient reaches.

    Args:
        k: The number that `--k` sets: how many latents a token has, exactly or on average.
        num_latents: M.

    Raises:
        ValueError: If these sizes cannot be (`check`).
    """

    name: ClassVar[str]
    """As in `--activation` and `cfg.json`."""
    lr_factor: ClassVar[float] = 1.0
    """Factor on Adam's default learning rate."""
    multi_topk: ClassVar[bool] = False
    """Whether there is a `wider` code, for Multi-TopK."""
    num_sums: ClassVar[int] = 0
    """The number of values that `sums` gives per token."""
    fits: ClassVar[bool] = False
    """Whether a kind defines `fit_`: only then is a sample of the first batch taken for it. Found out by itself."""
    moves: ClassVar[bool] = False
    """Whether a kind defines `move_`: only then are firings and `sums` added up over the ranks. Found out by itself."""

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
        """Check that a dictionary of this size can be used with this k.

        Raises:
            ValueError: If it cannot.
        """
        if k > num_latents:
            raise ValueError(f"k = {k} is larger than num_latents = {num_latents}: choose a smaller k or more latents")

    @property
    def max_active(self) -> int:
        """Return K, the largest number of active latents of a token: the width of its code."""
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
            centre_D: `[D]`; None subtracts nothing.
            kernels: What to compute with, where it has what is needed.

        Returns:
            Values and the latents' numbers (int64), both `[N, K]`. A place that is not used has the value 0. Gradients
            reach `W_enc`, `b_enc` and `centre` by autograd.
        """
        raise NotImplementedError(f"{type(self).__qualname__} does not say how it chooses latents: define `encode`")

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
        """Encode, then sum the chosen decoder rows; kinds for which there are fused kernels use them.

        Args:
            x_ND: As for `encode`, like those behind it.
            W_enc_MD: `[M, D]`.
            b_enc_M: `[M]`.
            W_dec_MD: `[M, D]`.
            centre_D: `[D]`.
            kernels: What to compute with.
            prefixes: Sizes of a Matryoshka's nested dictionaries, ascending; empty for none.

        Returns:
            The sum `[N, D]`, or one sum for each prefix, of the chosen latents below it: `[G, N, D]`; values and
            latents, both `[N, K]`.
        """
        acts_NK, indices_NK = self.encode(x_ND, W_enc_MD, b_enc_M, centre_D, kernels)
        if not prefixes:
            return kernels.decode(acts_NK, indices_NK, W_dec_MD), acts_NK, indices_NK
        rows = [kernels.decode(acts_NK * (indices_NK < prefix), indices_NK, W_dec_MD) for prefix in prefixes]
        return torch.stack(rows), acts_NK, indices_NK

    def wider(self) -> Selection:
        """Return the selection of Multi-TopK's second code, whose first K latents are this one's.

        Raises:
            NotImplementedError: If there is none: `multi_topk` is False.
        """
        raise NotImplementedError(f"{self.name} has no wider code: see `multi_topk`")

    def fired(self, acts: Tensor) -> Tensor:
        """Tell which values count as firings, bool of the same shape; 0 never does."""
        return acts > 0

    def penalty(self, acts: Tensor, indices: Tensor) -> Tensor | None:
        """Return an extra term of the loss for each token, `[...]` from `[..., K]`; None for none.

        It is added up over tokens and divided by what the squared error is divided by, so that how a batch is split
        changes nothing.
        """
        return None

    # What changes between steps

    def fit_(self, scores_RM: Tensor, rms: float) -> None:
        """Fit a fresh selection to a sample of the first batch, in place.

        Args:
            scores_RM: `[R, M]`, float32: pre-activations of R tokens.
            rms: The activations' root mean square, centred: the unit of pre-activations.
        """

    def before_fit(self) -> Selection:
        """Return the selection with which initial weights are fitted, before this one is."""
        return self

    def sums(self, acts: Tensor) -> Tensor:
        """Return the numbers that `move_` needs of each token's code, `[..., K]`: int64 `[..., num_sums]`."""
        return acts.new_zeros(*acts.shape[:-1], self.num_sums, dtype=torch.int64)

    def move_(self, firings: Tensor, tokens: Tensor, sums: Tensor, rms: Tensor) -> None:
        """Change what changes between steps, in place, after an optimizer step that counts.

        Everything stays on the device: nothing is read on the host. The counts are whole numbers, so that all ranks
        move alike. A bank moves all of its units of one kind at once: `state` is stacked then, and every argument has
        units in front, so this must be made of operations on each unit by itself.

        Args:
            firings: How many latents fired in the step, over its tokens on all ranks: int64 `[...]`.
            tokens: Tokens of the step over all ranks that count for this coder: int64 `[...]`.
            sums: `sums` added up over these tokens: int64 `[..., num_sums]`.
            rms: float64 `[...]`, as in `fit_`.
        """

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that change between steps, by attribute; they go where the SAE's parameters go."""
        return {}

    def load_(self, other: Selection) -> None:
        """Take over the state of another selection of the same kind, in place."""
        for name, tensor in other.state().items():
            self.state()[name].copy_(tensor)

    @staticmethod
    def stack_(selections: Sequence[Selection]) -> Selection:
        """Make one selection whose state is that of several of one kind and k, `[units, ...]`; they become views of it.

        Moving it moves them all.
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
        """Return an independent copy, on the CPU: small enough to be sent to other ranks."""
        other = copy.copy(self)
        for name, tensor in self.state().items():
            plain = tensor.detach()  # one on the meta device has nothing to copy
            setattr(other, name, plain if plain.is_meta else plain.to("cpu", copy=True))
        return other

    # Files and views

    def to_config(self) -> dict[str, Any]:
        """Return its own entries of `cfg.json`, besides `activation` and `k`: plain values, exact to the last bit."""
        return {}

    @classmethod
    def from_config(cls, k: int, num_latents: int, config: Mapping[str, Any]) -> Selection:
        """Make the selection that a `cfg.json` describes.

        Raises:
            ValueError: If one of its entries is missing or cannot be.
        """
        return cls(k, num_latents)

    @classmethod
    def facts(cls, config: Mapping[str, Any]) -> list[tuple[str, float, str]]:
        """Return numbers of a `cfg.json` that `saekit inspect` shows: name, value and a remark."""
        return []

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return SAELens' architecture for these codes: entries of its `cfg.json`, and tensors besides the weights.

        Raises:
            ValueError: If it has none.
        """
        raise ValueError(f"SAELens has no architecture that chooses latents as {self.name} does")

    def __repr__(self) -> str:
        """For `print(sae)`."""
        return self.name


def make_selection(kind: str | Selection, k: int, num_latents: int) -> Selection:
    """Make a fresh selection from its name; an instance is taken as it is.

    Raises:
        UserError: If there is none of that name.
        ValueError: If the sizes cannot be, or are not the instance's.
    """
    if isinstance(kind, str):
        made: Selection = SELECTIONS.get(kind)(k, num_latents)
        return made
    if (kind.k, kind.num_latents) != (k, num_latents):
        raise ValueError(
            f"the selection is for k = {kind.k} of {kind.num_latents} latents, not for k = {k} of {num_latents}"
        )
    return kind
