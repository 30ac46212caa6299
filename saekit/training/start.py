"""Initial weights made of the first global batch: latents that begin where the data are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saekit.placement import Placement
from saekit.sae import Sae
from saekit.sae.kernels.eager import decode, encode_topk
from saekit.sae.model import unit_rows

MAX_ROWS = 8192
"""Tokens whose activations are looked at; each rank holds so many of every layer for a moment, on the CPU."""
SCALED_ON = 256
"""Of them, so many tell how large the encoder's rows should be."""
MIX = 0.5
"""How much of a latent's first direction is a token's; the rest is noise, so that latents of one token differ."""


class Sample:
    """Activations of some tokens of the first global batch: the same tokens for all layers, the same on all ranks.

    Args:
        kept: Tokens that train the SAEs in each of this rank's micro-batches of the step.
        num_latents: M: no more rows are needed.
        seed: Of the choice.
        placement: The ranks. Making a sample is collective.
    """

    def __init__(self, kept: Sequence[int], num_latents: int, seed: int, placement: Placement) -> None:
        self._placement = placement
        everywhere = placement.gather(list(kept))
        # Micro-batches are dealt out first, then ranks: so a token's number does not depend on how many there are.
        starts, total = [], 0
        for micro in range(len(kept)):
            before = sum(of_rank[micro] for of_rank in everywhere[: placement.rank])
            starts.append(total + before)
            total += sum(of_rank[micro] for of_rank in everywhere)
        self._spans = [(start, start + count) for start, count in zip(starts, kept, strict=True)]
        generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.randperm(total, generator=generator)[: min(num_latents, MAX_ROWS)]
        self.rows: dict[str, Tensor] = {}
        """By hookpoint `[R, D]`, float32, on the CPU."""

    def add(self, micro: int, name: str, x_ND: Tensor) -> None:
        """Take what is wanted of a layer's activations of one of this rank's micro-batches."""
        start, stop = self._spans[micro]
        here_R = (self._numbers >= start) & (self._numbers < stop)
        rows_RD = self.rows.setdefault(name, torch.zeros(len(self._numbers), x_ND.shape[1]))
        rows_RD[here_R] = x_ND[(self._numbers[here_R] - start).to(x_ND.device)].float().cpu()

    def complete(self) -> dict[str, Tensor]:
        """Put together what the ranks have taken: by hookpoint `[R, D]`, float32, on the CPU. Collective."""
        for name, rows_RD in self.rows.items():  # one layer at a time
            self.rows[name] = self._placement.sum(rows_RD.to(self._placement.device)).cpu()
        return self.rows


@torch.no_grad()
def start_from_data_(sae: Sae, rows_RD: Tensor, generator: torch.Generator) -> None:
    """Point a fresh SAE's latents to where activations lie, as seen from `b_dec`, in place.

    With a token's activations x and noise n drawn anew for each latent, both scaled to norm 1 after x's distance from
    `b_dec` is taken:

        W_dec = unit(x / 2 + √¾ n)        W_enc = s · W_dec

    where s is the factor by which the first reconstructions of a few tokens fit best (least squares).

    Args:
        sae: A fresh SAE on the CPU whose `b_dec` is the activations' mean.
        rows_RD: `[R, D]`, float32: activations of R tokens, each used for every R-th latent.
        generator: Source of the noise, on the CPU.
    """
    centred_RD = rows_RD - sae.b_dec
    token_M = torch.arange(sae.num_latents) % len(rows_RD)
    noise_MD = unit_rows(torch.randn(sae.W_dec.shape, generator=generator))
    sae.W_dec.copy_(unit_rows(MIX * unit_rows(centred_RD)[token_M] + (1 - MIX**2) ** 0.5 * noise_MD))

    x_ND = centred_RD[:SCALED_ON]
    recon_ND = decode(*encode_topk(x_ND, sae.W_dec, sae.b_enc, sae.k), sae.W_dec)
    fit = float((x_ND * recon_ND).sum() / recon_ND.square().sum().clamp_min(torch.finfo(torch.float32).tiny))
    sae.W_enc.copy_(sae.W_dec * (fit or 1.0))
