"""Evaluates the SAEs of all toolkits with saekit: loads the other toolkits' weights into `Sae` first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Job

from saekit import Sae
from saekit.activations import tap
from saekit.activations.sites import CROSSCODER
from saekit.analysis.evaluate import evaluate
from saekit.analysis.results import Evaluation
from saekit.analysis.subject import NO_HEAD, Subject, choose_objective
from saekit.data import sequences
from saekit.sae.model import around
from saekit.sae.selection.batchtopk import BatchTopK

LENGTHS_FROM = 64
"""The number of sequences that the norm limits are measured on."""
GRAFTED_TOKENS = 25_000
"""The number of tokens that are read with reconstructions spliced in, which takes three passes per layer."""


@dataclass(frozen=True)
class Reading:
    """The language model and the data that activations come from."""

    model: Any
    predicts: Any
    """What the model's head predicts; None without a head."""
    mask_token: int | None
    hookpoints: list[str]
    data: Any
    """Held-out sequences, a data set with `input_ids`."""
    exclude_tokens: list[int]

    def evaluate(self, saes: dict[str, Sae], tokens: int | None) -> Evaluation:
        """Return what `saekit eval` finds on the first `tokens`, spliced in, or on all tokens without splicing."""
        data, excluded = self.data, torch.tensor(self.exclude_tokens)
        objective, name = None, "none"
        if tokens is not None:
            data = data.select(range(min(len(data), tokens // len(data[0]["input_ids"]))))
            objective, name = choose_objective(self.predicts, self.mask_token, excluded, NO_HEAD)
        subject = Subject(
            model=self.model,
            saes=saes,
            data=sequences(data),
            excluded=excluded,
            objective=objective,
            objective_name=name,
            batch_size=16,
        )
        return evaluate(subject)


@torch.inference_mode()
def longest(reading: Reading) -> dict[str, float]:
    """Return the norm above which tokens are excluded from the evaluation of all toolkits: 10 median norms."""
    first = sequences(reading.data.select(range(min(LENGTHS_FROM, len(reading.data)))))
    ids = first.read(np.arange(len(first)))
    kept = ~torch.isin(ids, torch.tensor(reading.exclude_tokens))
    with tap(reading.model, reading.hookpoints) as read:
        return {name: 10 * float(acts[kept].norm(dim=1).median()) for name, acts in read(ids).items()}


def measure(reading: Reading, saes: dict[str, Sae]) -> dict[str, dict[str, float | None]]:
    """Evaluate each layer's SAE on held-out tokens.

    Returns:
        By hookpoint: `fvu`, `l0` and `dead` (the share of latents that never fired) over all held-out tokens;
        `ce_recovered` and `kl` over the first `GRAFTED_TOKENS`, None for a language model without a head. For a
        crosscoder, one entry, which also has the FVU of each of its hookpoints.
    """
    if set(saes) != {CROSSCODER}:
        for name, limit in longest(reading).items():
            saes[name].max_norm = limit
    whole = reading.evaluate(saes, None)
    grafted = reading.evaluate(saes, GRAFTED_TOKENS) if reading.predicts else whole
    found: dict[str, dict[str, float | None]] = {}
    for layer, answers in zip(whole.layers, (each.grafted for each in grafted.layers), strict=True):
        recon = layer.reconstruction
        found[layer.hookpoint] = {
            "fvu": recon.fvu.value,
            "l0": recon.l0.value,
            "dead": recon.dead / recon.num_latents,
            "ce_recovered": None if answers is None else answers.ce_recovered.value,
            "kl": None if answers is None else answers.kl.value,
            **{part.hookpoint: part.fvu.value for part in layer.parts},
        }
    return found


def load_saes(folder: Path, job: Job) -> dict[str, Sae]:
    """Load the SAEs that any toolkit's training script has saved, by hookpoint in the job's order."""
    if (folder / "latest").exists():
        folder = folder / "latest"
    if job.crosscode:
        file = folder / CROSSCODER / "ae.pt"
        sae = _of_the_fork(file, job) if file.exists() else Sae.load_from_disk(folder / CROSSCODER)
        return {CROSSCODER: sae.eval()}
    if (folder / job.hookpoints[0] / "ae.pt").exists():
        found = {name: _of_dictionary_learning(folder / name / "ae.pt", job) for name in job.hookpoints}
    else:
        found = {name: Sae.load_from_disk(folder / name) for name in job.hookpoints}
    return {name: sae.eval() for name, sae in found.items()}


def _of_dictionary_learning(file: Path, job: Job) -> Sae:
    """Load dictionary-learning's TopK or BatchTopK SAE, which has the same equations and a transposed decoder.

    For BatchTopK, `Sae` keeps the 4k largest values of a token. Only rare tokens have more.
    """
    state = torch.load(file, weights_only=True)
    tensors = {
        "W_enc": state["encoder.weight"],
        "b_enc": state["encoder.bias"],
        "W_dec": state["decoder.weight"].T.contiguous(),
        "b_dec": state["b_dec"],
    }
    num_latents, d_in = tensors["W_enc"].shape
    # TopK SAEs are saved with a threshold, too, but do not use it.
    by_threshold = job.settings.get("sae", {}).get("activation") == "batchtopk"
    selection = BatchTopK(job.k, num_latents, float(state["threshold"])) if by_threshold else "topk"
    return around(tensors, d_in=d_in, num_latents=num_latents, k=job.k, selection=selection)


def _of_the_fork(file: Path, job: Job) -> Sae:
    """Load the fork's BatchTopK crosscoder, with its normalization folded into the weights.

    The fork centers and scales its input. It compares the threshold with a latent's value times the sum of the norms of
    the latent's decoder rows. Here the encoder is multiplied by that sum, and the decoder is divided by it.
    """
    state = torch.load(file, weights_only=True)
    mean_LD, scale_L = state["mean"], state["scale"]
    W_enc_LDM, W_dec_LMD = state["encoder.weight"], state["decoder.weight"]
    norms_M = W_dec_LMD.norm(dim=2).sum(0)
    layers, width, num_latents = W_enc_LDM.shape
    read_MLD = (W_enc_LDM * scale_L[:, None, None] * norms_M).permute(2, 0, 1)
    W_enc = read_MLD.reshape(num_latents, -1).contiguous()
    b_dec = (state["decoder.bias"] / scale_L[:, None] + mean_LD).flatten()
    tensors = {
        "W_enc": W_enc,
        "b_enc": state["encoder.bias"] * norms_M + W_enc @ (b_dec - mean_LD.flatten()),
        "W_dec": (W_dec_LMD / scale_L[:, None, None] / norms_M[:, None])
        .permute(1, 0, 2)
        .reshape(num_latents, -1)
        .contiguous(),
        "b_dec": b_dec,
    }
    selection = BatchTopK(job.k, num_latents, float(state["threshold"]))
    around_them = dict.fromkeys(job.hookpoints, width)
    return around(
        tensors,
        d_in=layers * width,
        num_latents=num_latents,
        k=job.k,
        selection=selection,
        reads=around_them,
        writes=around_them,
    )
