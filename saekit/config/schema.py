"""What a user can choose. Validated and serialisable, with no side effects; each option documented once.

The training stands here, what is read (the language model, the data) in `saekit.config.inputs`, the shape of an SAE in
`saekit.config.sae`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator
from pydantic.dataclasses import dataclass

from saekit.config.inputs import EVALUATION
from saekit.config.options import CONFIG, LayerList, Resume, TokenIds, option
from saekit.config.ranks import AUTO, PlacementName, check_placement
from saekit.config.sae import SAE, SaeConfig

BATCH = "Batches"
OPTIMIZER = "Optimiser"
DEAD = "Dead latents"
SPEED = "Speed"
PLACEMENT = "Several ranks"
SAVING = "Saving"
LOGGING = "Logging"


@dataclass(frozen=True, config=CONFIG)
class TrainConfig:
    """How SAEs are trained, whatever the model and data."""

    sae: SaeConfig = SaeConfig()
    layers: LayerList | None = option(
        None, "Layers to train on, counted from 0: 16,24 or ranges 0-31:2. All by default.", panel=SAE
    )
    layer_stride: int = option(1, "Train on every so-manieth layer.", panel=SAE, unit="layers", ge=1)
    init: Literal["uniform", "fit"] = option(
        "fit",
        "How long the encoder's rows are at first: uniform, as they come when drawn from ±1/√D; fit, so that "
        "reconstructions of the first batch fit best.",
        panel=SAE,
    )
    init_seed: int = option(0, "Seed of the SAEs' initial weights.", panel=SAE)
    finetune: Path | None = option(
        None,
        "Start from the SAEs in this run, checkpoint or folder instead of random ones; this run's options say how "
        "latents are chosen.",
        panel=SAE,
    )

    batch_size: int = option(8, "Sequences per rank and micro-batch.", panel=BATCH, unit="sequences", ge=1)
    grad_acc_steps: int = option(
        1,
        "Micro-batches per optimiser step; the global batch is batch-size × grad-acc-steps × ranks.",
        panel=BATCH,
        unit="micro-batches",
        ge=1,
    )
    micro_acc_steps: int = option(
        1,
        "Chunks into which each micro-batch's activations are cut before the encoder: less memory, same result.",
        panel=BATCH,
        unit="chunks",
        ge=1,
    )
    shuffle: bool = option(True, "Visit the sequences in a random order.", panel=BATCH)
    data_seed: int = option(42, "Seed of that order.", panel=BATCH, ge=0)
    exclude_tokens: TokenIds = option(
        (), "More token ids to leave out of the SAEs' training, such as 0,50256.", panel=BATCH
    )
    exclude_special_tokens: bool = option(
        True, "Leave the tokenizer's special tokens (BOS, EOS, padding, ...) out of the SAEs' training.", panel=BATCH
    )
    max_norm_multiple: float = option(
        10.0,
        "Leave out of a layer's training what is longer than so many times the median norm of its activations, such as "
        "attention sinks; 0 leaves nothing out.",
        panel=BATCH,
        ge=0,
    )

    optimizer: Literal["adam", "adam8bit", "signum", "muon"] = option(
        "adam",
        "adam (fused), adam8bit (bitsandbytes), signum (schedule-free) or muon (matrices; Adam for the biases).",
        panel=OPTIMIZER,
    )
    moments_dtype: Literal["fp32", "bf16"] = option(
        "fp32",
        "Type of Adam's moments at rest; bf16 halves them, and the second is rounded stochastically.",
        panel=OPTIMIZER,
    )
    lr: float | None = option(
        None,
        "Learning rate. By default adam and adam8bit 1.75e-3 / √(latents / 2¹⁴ · width / 128) and twice that for "
        "batchtopk, signum 5e-3 / √(latents / 2¹⁴), muon 2e-3.",
        panel=OPTIMIZER,
        gt=0,
    )
    lr_warmup_steps: int | None = option(
        None,
        "Steps of linear warm-up, after which the rate falls linearly to zero at the end of the run (signum: stays). "
        "By default three tenths of the run (signum: a tenth).",
        panel=OPTIMIZER,
        unit="optimiser steps",
        ge=0,
    )
    decoder_lr_ratio: float | None = option(
        None,
        "The decoder's learning rate over the encoder's; 4 for adam and adam8bit, else 1.",
        panel=OPTIMIZER,
        gt=0,
    )
    encoder_bias_lr_ratio: float | None = option(
        None,
        "The learning rate of the encoder's biases over that of its matrix, to let dead latents rise; 6 √(width / 128) "
        "for adam and adam8bit, else 1.",
        panel=OPTIMIZER,
        gt=0,
    )
    beta2: float = option(
        0.95, "Decay per step of Adam's second moment (adam, adam8bit, muon's biases).", panel=OPTIMIZER, gt=0, lt=1
    )
    scale_biases: bool = option(
        True,
        "Multiply the biases' learning rate by the layer's root mean square, so that one rate suits activations of any "
        "size.",
        panel=OPTIMIZER,
    )

    max_bad_steps: int = option(
        10,
        "A step with NaN or Inf in the loss or gradient of a layer is skipped, for all layers; so many in a row "
        "end the run.",
        panel=OPTIMIZER,
        unit="optimiser steps",
        ge=1,
    )

    revive_alpha: float = option(
        1e-4,
        "Weight of the loss that raises the biases of dead latents until they fire again; 0 is off. To Adam only its "
        "sign matters where nothing else reaches a latent.",
        panel=DEAD,
        ge=0,
    )
    auxk_alpha: float = option(
        0.0,
        "Weight of the AuxK loss, in which dead latents predict what the others leave unexplained (1/32 in Gao et al. "
        "2024); 0 is off.",
        panel=DEAD,
        ge=0,
    )
    auxk_relative_to: Literal["variance", "residual"] = option(
        "variance",
        "What the AuxK loss is divided by: the layer's variance, as the main loss is, or the mean squared error of the "
        "step before, so that it keeps its weight as the SAEs get better.",
        panel=DEAD,
    )
    dead_feature_threshold: int | None = option(
        None,
        "A latent is dead when it fired for none of so many last tokens. By default 300 times latents / k, or ten "
        "steps where that is more, but a fiftieth of the run's tokens or 10,000,000 at most.",
        panel=DEAD,
        unit="tokens",
        ge=1,
    )

    kernels: Literal["auto", "eager", "cpu", "native", "triton"] = option(
        "auto",
        "What computes the SAEs: eager, the readable reference; cpu, sparse operations of torch; native, fused "
        "ones that this machine's C++ compiler makes at first use; triton, fused ones on a GPU. auto takes triton on a "
        "GPU, native on a CPU that has a compiler, else cpu.",
        panel=SPEED,
    )
    select_dtype: Literal["auto", "fp32", "bf16", "int8"] = option(
        "auto",
        "In what precision the encoder's scores name candidates for the k latents, which are chosen by their values in "
        "float32. auto is what the hardware is fast at: bf16 on GPUs and CPUs with fast bfloat16, int8 on other CPUs "
        "with VNNI; fp32 is for bit-exact work.",
        panel=SPEED,
    )

    placement: PlacementName = option(
        AUTO,
        "Where SAEs live: ddp, on every rank; zero3, each cut among all ranks; layer-map, each layer on one rank. auto "
        "takes what the launch file says, or ddp; a plug-in can add others.",
        panel=PLACEMENT,
    )
    layer_map: str | None = option(
        None,
        "Which rank trains which layers under layer-map, such as 0-5:0,6-11:1; by default as even as possible.",
        panel=PLACEMENT,
    )
    shard_lm: bool = option(
        False,
        "Under zero3, cut the language model among the ranks as well: slower, for one too large for a GPU.",
        panel=PLACEMENT,
    )

    save_dir: Path = option(Path("checkpoints"), "Folder that holds the runs.", panel=SAVING)
    run_name: str | None = option(
        None,
        "Folder of this run inside --save-dir; by default made of the model's and the data set's name.",
        panel=SAVING,
    )
    save_every: int = option(
        1000, "Steps between checkpoints; one is also written at the end.", panel=SAVING, unit="optimiser steps", ge=1
    )
    keep_last: int = option(1, "Checkpoints to keep, besides the best.", panel=SAVING, unit="checkpoints", ge=1)
    save_best: bool = option(
        False, "Also keep the checkpoint with the lowest mean FVU since the one before it, as `best`.", panel=SAVING
    )
    save_best_effort: bool = option(
        False,
        "When a checkpoint cannot be written (disk full, say), warn and train on, instead of stopping.",
        panel=SAVING,
    )
    grace: float = option(
        120,
        "After SIGTERM or SIGUSR1 (a scheduler's), the step in hand must be done and saved within so many seconds, "
        "else the process ends as it is.",
        panel=SAVING,
        unit="seconds",
        gt=0,
    )
    overwrite: bool = option(False, "Replace an existing run of that name.", panel=SAVING)
    resume: Resume = option(
        False,
        "Go on from the newest whole checkpoint of the run of that name, or of the run or checkpoint at PATH, whose "
        "options need not be repeated; auto: go on if there is one, else start.",
        panel=SAVING,
    )

    log_every: int = option(
        1, "Steps between reports; numbers are means over them.", panel=LOGGING, unit="optimiser steps", ge=1
    )
    log_with: str | None = option(
        None, "One of accelerate's trackers: wandb, tensorboard, mlflow, comet_ml, aim, ...", panel=LOGGING
    )

    eval_every: int | None = option(
        None,
        "Steps between evaluations as saekit eval makes them, on documents that the run never reads, and after the "
        "last step. Off by default. The whole language model is loaded for it, but with --shard-lm, under which only "
        "the reconstruction is evaluated.",
        panel=EVALUATION,
        unit="optimiser steps",
        ge=1,
    )
    eval_tokens: int = option(
        16_384, "How much is read for each, always the same.", panel=EVALUATION, unit="tokens", ge=1
    )

    @property
    def revives(self) -> bool:
        """Whether a loss reaches dead latents."""
        return self.revive_alpha > 0 or self.auxk_alpha > 0

    @property
    def loads_whole_model(self) -> bool:
        """Whether the blocks after the last tapped one and the head are loaded, too: evaluations need them.

        Where the language model is cut among the ranks they are not, and evaluations are of the reconstruction only: it
        would be gathered three times per layer for every batch, and DeepSpeed, which learns in which order modules run,
        would have to learn it anew each time.
        """
        return self.eval_every is not None and not self.shard_lm

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and not layers:
            raise ValueError("no layer is named: give at least one, or leave it out for all")
        return layers

    @field_validator("run_name")
    @classmethod
    def _check_run_name(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip("./ ") or "/" in name or "\\" in name):
            raise ValueError("a run's name is one folder's name, without slashes")
        return name

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.layers is not None and self.layer_stride != 1:
            raise ValueError(
                f"--layers and --layer-stride {self.layer_stride} both choose layers: give one of them "
                "(a range such as 0-31:2 has a stride of its own)"
            )
        if 0 < self.max_norm_multiple < 1:
            raise ValueError(
                f"--max-norm-multiple {self.max_norm_multiple:g} would leave out ordinary tokens: give at least 1, or "
                "0 to leave nothing out"
            )
        check_placement(self.placement, self.layer_map, self.shard_lm)
        if self.moments_dtype != "fp32" and self.optimizer != "adam":
            raise ValueError(f"--moments-dtype {self.moments_dtype} is for --optimizer adam, not {self.optimizer}")
        if self.kernels == "eager" and self.select_dtype in ("bf16", "int8"):
            raise ValueError(f"--kernels eager selects in float32 only: leave out --select-dtype {self.select_dtype}")
        if self.overwrite and self.resume:
            raise ValueError("--overwrite and --resume contradict each other: give one of them")
        return self
