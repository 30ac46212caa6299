"""One evaluator for SAEs of either toolkit: both write the same format, so both go through saekit's `Sae`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saekit import Sae
from saekit.activations import tap

EVAL_SEQUENCES = 16
"""Sequences per forward pass of the language model."""


@dataclass(frozen=True)
class Reading:
    """Where activations come from."""

    model: Any
    hookpoints: list[str]
    data: Any
    """Held-out sequences, a data set with `input_ids`."""
    exclude_tokens: list[int]

    @torch.inference_mode()
    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Each hookpoint's activations of the tokens that are not excluded, `[N, D]`, batch by batch."""
        excluded = torch.tensor(self.exclude_tokens)
        with tap(self.model, self.hookpoints) as read:
            for batch in self.data.with_format("torch").iter(EVAL_SEQUENCES):
                input_ids = batch["input_ids"].long()
                kept = ~torch.isin(input_ids, excluded)
                yield {name: acts[kept] for name, acts in read(input_ids).items()}


class _Sums:
    """Sums over tokens for one SAE, in float64."""

    def __init__(self, sae: Sae) -> None:
        self.sae = sae
        self.error = 0.0
        self.tokens = 0
        self.fired_M = torch.zeros(sae.num_latents, dtype=torch.int64)

    def add(self, x_ND: Tensor) -> None:
        out = self.sae(x_ND)
        self.error += float((x_ND.double() - out.recon.double()).square().sum())
        self.tokens += len(x_ND)
        self.fired_M += torch.bincount(out.indices[out.acts > 0], minlength=self.sae.num_latents)


@torch.inference_mode()
def held_out_quality(reading: Reading, runs: dict[str, Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Measure every SAE of several runs over the same held-out tokens.

    Args:
        reading: The tokens' activations.
        runs: Folders with one SAE folder per hookpoint, by name.

    Returns:
        By hookpoint and name of the run: `fvu` = Σ‖x − x̂‖² / Σ‖x − mean‖² over all tokens at once, `l0` the mean
        number of latents above zero per token, `dead` the share of latents that fired on no token.
    """
    saes = {run: Sae.load_many(folder) for run, folder in runs.items()}
    sums = {hook: {run: _Sums(saes[run][hook].eval()) for run in runs} for hook in reading.hookpoints}
    total_D: dict[str, Tensor] = {}
    squares = dict.fromkeys(reading.hookpoints, 0.0)
    for acts in reading.batches():
        for hook, x_ND in acts.items():
            total_D[hook] = total_D.get(hook, 0) + x_ND.double().sum(0)
            squares[hook] += float(x_ND.double().square().sum())
            for each in sums[hook].values():
                each.add(x_ND)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for hook, by_run in sums.items():
        found[hook] = {}
        for run, each in by_run.items():
            deviation = squares[hook] - float(total_D[hook].square().sum()) / each.tokens
            found[hook][run] = {
                "fvu": each.error / deviation,
                "l0": int(each.fired_M.sum()) / each.tokens,
                "dead": float((each.fired_M == 0).double().mean()),
                "tokens": each.tokens,
            }
    return found


@torch.inference_mode()
def first_activations(reading: Reading, file: Path) -> None:
    """Write the first held-out batch's activations, `[N, D]` by hookpoint, to a safetensors file."""
    save_file({name: x_ND.clone() for name, x_ND in next(reading.batches()).items()}, file)


@torch.inference_mode()
def disagreement(saes: Path, activations: Path, theirs: Path) -> dict[str, float]:
    """How far the peer's reconstructions are from ours, with the same SAEs on the same activations.

    Args:
        saes: A folder with one SAE folder per hookpoint.
        activations: `[N, D]` by hookpoint.
        theirs: The peer's reconstructions, of the same shapes.

    Returns:
        By hookpoint, the largest absolute difference divided by the root mean square of our reconstruction.
    """
    x, peer = load_file(activations), load_file(theirs)
    found = {}
    for hook, sae in Sae.load_many(saes).items():
        ours = sae.eval()(x[hook]).recon.double()
        found[hook] = float((ours - peer[hook].double()).abs().max() / ours.square().mean().sqrt())
    return found
