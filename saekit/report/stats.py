"""The finished numbers that reporters see: plain floats and ints, never tensors, never the trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from saekit.units import active, decimal, plural, size, span


@dataclass(frozen=True)
class LayerStats:
    """One layer over the optimizer steps since the last report."""

    fvu: float
    """Fraction of variance unexplained: summed squared error over summed squared deviation from the mean."""
    l0: float
    """Mean number of latents per token whose value is above zero."""
    dead: int
    """Latents that fired for none of the last `dead_feature_threshold` tokens, at the end of the step."""
    num_latents: int
    """All latents of the layer; `dead / num_latents` is the dead fraction."""
    loss: float
    """The training loss per token (main + weighted AuxK + weighted Multi-TopK), in units of the layer's variance."""
    auxk_loss: float
    """The AuxK term before its weight, in the same units; 0 when no latent was dead."""
    multi_topk_fvu: float | None = None
    """FVU of the reconstruction from 4k latents; None without Multi-TopK."""
    too_long: float = 0.0
    """Share of the tokens whose activations are longer than `max_norm_multiple` allows, which trained nothing."""

    @property
    def dead_fraction(self) -> float:
        """Dead latents over all latents, from 0 to 1."""
        return self.dead / self.num_latents


class Lowest(NamedTuple):
    """The lowest FVU that the reports of an SAE had."""

    fvu: float
    step: int
    """Of that report."""

    def __str__(self) -> str:
        return f"{decimal(self.fvu)} at step {self.step:,}"


@dataclass(frozen=True)
class StepStats:
    """Everything that is reported about the optimizer steps since the last report."""

    step: int
    """Optimizer steps done, from 1."""
    tokens: int
    """Tokens that trained the SAEs so far (excluded tokens are not counted)."""
    tokens_per_second: float
    """Rate since the last report."""
    learning_rate: float
    """Learning rate of the last step, after warm-up and decay, of the first layer."""
    memory_bytes: int
    """Peak memory: allocated by the GPU's allocator where there is one, else the process's resident set."""
    layers: dict[str, LayerStats]
    """By hookpoint, in model order. Without a step that was not skipped, their numbers are NaN."""
    skipped_steps: int = 0
    """Optimizer steps skipped so far because of NaN or Inf."""
    bad_in_row: int = 0
    """Those of them that are in a row, up to this step."""
    diverged: Mapping[str, Lowest | None] = field(default_factory=dict)
    """By hookpoint, the layers whose FVU is above 1 or NaN and was better, with their lowest; None in the last report
    for a layer of which no report came before."""

    @property
    def mean_fvu(self) -> float:
        """Mean over the layers."""
        return fmean(layer.fvu for layer in self.layers.values())

    @property
    def worst(self) -> str:
        """The layer with the highest FVU, see `worst`."""
        return worst({name: layer.fvu for name, layer in self.layers.items()})

    @property
    def divergence(self) -> str:
        """In a few words, which layers diverged, with the worst one's FVU now and before; empty without any."""
        if not self.diverged:
            return ""
        name = worst({name: self.layers[name].fvu for name in self.diverged})
        before = self.diverged[name]
        was = "" if before is None else f", was {before}"
        count = f"{len(self.diverged)} of {plural(len(self.layers), 'layer')} diverged"
        return f"{count}: {name} FVU {decimal(self.layers[name].fvu)}{was}"


def worst(fvus: Mapping[str, float]) -> str:
    """Return the name with the highest FVU; NaN is worse than any number."""
    return max(fvus, key=lambda name: (math.isnan(fvus[name]), fvus[name]))


def ending(info: RunInfo, stats: StepStats | None, saved: int | None) -> str:
    """Say how a run ended, for its duration to follow: `done in`, `stopped after` or `failed after`.

    Args:
        info: The run.
        stats: Its last report; None if it made no step.
        saved: The step of its newest checkpoint; None if it saved none. A run is done once its last one is in place.
    """
    if (stats.step if stats else info.start_step) < info.total_steps:
        return "stopped after"
    if stats is None:
        return "done in"
    return "failed after" if stats.bad_in_row or saved != info.total_steps else "done in"


@dataclass(frozen=True)
class EvalStats:
    """An evaluation of the SAEs as they are after an optimizer step, on data that trains nothing."""

    step: int
    """Optimizer steps done, from 1."""
    seconds: float
    """It took; training waited for it."""
    record: Mapping[str, Any]
    """As in `eval.json`: what was found of each layer and of all together, with 95% intervals."""

    def of_layers(self, number: str) -> dict[str, float]:
        """Return a number's value by hookpoint, in model order; empty where it needs a head that the model lacks.

        Args:
            number: A field of `Reconstruction` (`fvu`, `l0`, ...) or of `Grafted` (`ce_recovered`, `kl`, ...), which
                stand in `saekit.analysis.results`; and `dead_fraction`.
        """
        found = {}
        for layer in self.record["layers"]:
            reconstruction = layer["reconstruction"]
            share = reconstruction["dead"] / reconstruction["num_latents"]
            numbers = {**reconstruction, **(layer["grafted"] or {}), "dead_fraction": {"value": share}}
            if number in numbers:
                found[layer["hookpoint"]] = float(numbers[number]["value"])
        return found

    def together(self, number: str) -> float | None:
        """Return a field of `Grafted` with all layers replaced at once; None without a head."""
        grafted = self.record["together"]
        return None if grafted is None else float(grafted[number]["value"])

    @property
    def summary(self) -> list[str]:
        """In a few words: means over layers, what it costs to replace all at once, and the worst layer."""
        fvu, recovered, kl = (self.of_layers(number) for number in ("fvu", "ce_recovered", "kl"))
        parts = [f"FVU {decimal(fmean(fvu.values()))}"]
        if recovered:
            parts += [f"CE recovered {decimal(fmean(recovered.values()))}", f"KL {decimal(fmean(kl.values()))}"]
            parts.append(f"all at once {decimal(self.together('ce_recovered'))}, KL {decimal(self.together('kl'))}")
        if len(fvu) > 1:
            name = worst(fvu)
            parts.append(f"worst FVU {decimal(fvu[name])} in {name}")
        return parts

    @property
    def ce_clean(self) -> float | None:
        """Cross-entropy of the language model as it is, nats per scored token; None without a head."""
        clean = self.record["ce_clean"]
        return None if clean is None else float(clean["value"])


@dataclass(frozen=True)
class RunInfo:
    """The facts that are known before the first step."""

    run_dir: Path
    model: str
    dataset: str
    hookpoints: tuple[str, ...]
    widths: tuple[int, ...]
    """D of each hookpoint's SAE, in the same order."""
    latents: tuple[int, ...]
    """M of each."""
    k: int
    total_steps: int
    total_sequences: int
    """Sequences that the run will see."""
    ctx_len: int
    """Tokens per sequence."""
    start_step: int
    """0, or the step that a resumed run goes on from."""
    device: str
    placement: str
    dtype: str
    """The language model's dtype."""
    global_batch: int
    """Sequences per optimizer step over all ranks."""
    config: dict[str, object]
    """The resolved configuration, without secrets."""
    world_size: int = 1
    """Ranks that train together."""
    owners: Mapping[str, int] = field(default_factory=dict)
    """By hookpoint, the rank that holds the layer's SAE; empty where each rank holds all."""
    shard_bytes: int | None = None
    """Bytes of one SAE's parameters on each rank, where they are sharded."""
    kernels: str = "eager"
    """The kernels: eager, cpu, native or triton."""
    select_dtype: str = "fp32"
    """In what precision latents are selected: fp32, bf16 or int8."""
    eval_every: int | None = None
    """Optimizer steps between evaluations; None without."""
    activation: str = "topk"
    """The selection: topk, batchtopk, groupmax or a plug-in's."""
    with_auxk: bool = False
    """Whether dead latents are trained with AuxK; if not, its loss is 0 and need not be shown."""

    coder: str = "SAE"
    """"SAE", "transcoder" or "crosscoder"."""

    @property
    def code(self) -> str:
        """Describe the SAEs: `4,096 latents, k 32`, with the selection unless it is TopK."""
        return f"{span(self.latents)} latents, k {active(self.k, self.activation)}"

    @property
    def width(self) -> str:
        """Return the width of the SAEs: `512`, or `512 to 2,048` where they differ."""
        return span(self.widths)

    @property
    def place(self) -> str:
        """Return where it runs, in a few words: `cpu, single`, or `cuda:0, zero3 on 4 ranks (24 MiB of each SAE)`."""
        ranks = f" on {self.world_size} ranks" if self.world_size > 1 else ""
        shard = f" ({size(self.shard_bytes)} of each {self.coder})" if self.shard_bytes is not None else ""
        return f"{self.device}, {self.placement}{ranks}{shard}"

    @property
    def computed_by(self) -> str:
        """By what: `triton kernels, selecting in bf16`."""
        return f"{self.kernels} kernels, selecting in {self.select_dtype}"

    @property
    def layout(self) -> str:
        """Tell which rank holds which layers, such as `rank 0: layers.0-layers.2`; empty where each holds all."""
        parts = []
        for rank in range(self.world_size if self.owners else 0):
            own = [name for name in self.hookpoints if self.owners[name] == rank]
            at = [self.hookpoints.index(name) for name in own]
            joined = at == list(range(at[0], at[-1] + 1)) if at else False
            shown = f"{own[0]}-{own[-1]}" if joined and len(own) > 1 else ", ".join(own) or "none"
            parts.append(f"rank {rank}: {shown}")
        return "; ".join(parts)

    @property
    def total_tokens(self) -> int:
        """Return tokens the run will read, excluded ones included: an upper bound of what trains the SAEs."""
        return self.total_sequences * self.ctx_len
