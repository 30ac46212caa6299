"""The options of a run: validated and serializable, without side effects; each is documented once.

This file has the options of training. `saekit.config.inputs` has those of the language model and the data set,
`saekit.config.sae` those of an SAE's shape, `saekit.config.coders` those of its place in the language model,
`saekit.config.sources` those of its activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator
from pydantic.dataclasses import dataclass

from saekit.config.coders import CodersConfig
from saekit.config.flat import make_config, option_names, read_yaml, unknown_options
from saekit.config.inputs import EVALUATION, DataConfig, ModelConfig
from saekit.config.options import CONFIG, Resume, TokenIds, in_one_sentence, option
from saekit.config.ranks import AUTO, PlacementName, check_placement
from saekit.config.sae import SaeConfig
from saekit.config.sources import SourceConfig
from saekit.errors import UserError

BATCH = "Batches"
OPTIMIZER = "Optimizer"
DEAD = "Dead latents"
SPEED = "Speed"
PLACEMENT = "Several ranks"
SAVING = "Saving"
LOGGING = "Logging"


@in_one_sentence
@dataclass(frozen=True, config=CONFIG)
class TrainConfig(SourceConfig, CodersConfig):
    """The options of training, for any model and data."""

    batch_size: int = option(
        8, "Sequences per micro-batch on each rank.", panel=BATCH, common=True, unit="sequences", ge=1
    )
    grad_acc_steps: int = option(
        1,
        "Micro-batches per optimizer step. The global batch is batch-size × grad-acc-steps × ranks.",
        panel=BATCH,
        common=True,
        unit="micro-batches",
        ge=1,
    )
    micro_acc_steps: int = option(
        1,
        "Split each micro-batch's activations into N chunks before the encoder. This saves memory and does not change "
        "the result.",
        panel=BATCH,
        unit="chunks",
        ge=1,
    )
    shuffle: bool = option(True, "Read the sequences in random order.", panel=BATCH)
    data_seed: int = option(42, "Seed of the random order of the sequences.", panel=BATCH, ge=0)
    exclude_tokens: TokenIds = option((), "Also exclude these token ids from training, such as 0,50256.", panel=BATCH)
    exclude_special_tokens: bool = option(
        True, "Exclude the tokenizer's special tokens (BOS, EOS, padding, ...) from training.", panel=BATCH
    )
    max_norm_multiple: float = option(
        10.0,
        "Exclude tokens whose activation norm exceeds X times the layer's median, such as attention sinks. 0 excludes "
        "none.",
        panel=BATCH,
        ge=0,
    )

    optimizer: Literal["adam", "adam8bit", "signum", "muon"] = option(
        "adam",
        "Optimizer: adam (fused), adam8bit (bitsandbytes), signum (schedule-free) or muon (for matrices; Adam for the "
        "biases).",
        panel=OPTIMIZER,
    )
    moments_dtype: Literal["fp32", "bf16"] = option(
        "fp32",
        "Type in which Adam's moments are stored. bf16 halves their memory; the second moment is then rounded "
        "stochastically.",
        panel=OPTIMIZER,
    )
    lr: float | None = option(
        None,
        "Learning rate. The default of adam and adam8bit is 1.75e-3 / √(latents / 2¹⁴ · width / 128), twice that for "
        "batchtopk and four times that for transcoders; of signum 5e-3 / √(latents / 2¹⁴); of muon 2e-3.",
        panel=OPTIMIZER,
        gt=0,
    )
    lr_warmup_steps: int | None = option(
        None,
        "Steps of linear warm-up. The learning rate then falls linearly to zero at the end of the run; under signum "
        "it stays constant. The default is 30% of the run, and 10% under signum.",
        panel=OPTIMIZER,
        unit="optimizer steps",
        ge=0,
    )
    decoder_lr_ratio: float | None = option(
        None,
        "Learning rate of the decoder divided by that of the encoder. The default is 4 for adam and adam8bit, and 1 "
        "for the others.",
        panel=OPTIMIZER,
        gt=0,
    )
    encoder_bias_lr_ratio: float | None = option(
        None,
        "Learning rate of the encoder's biases divided by that of its matrix. A high ratio revives dead latents. The "
        "default is 6 √(width / 128) for adam and adam8bit, and 1 for the others.",
        panel=OPTIMIZER,
        gt=0,
    )
    beta2: float = option(
        0.95, "Decay of Adam's second moment per step (adam, adam8bit, and muon's biases).", panel=OPTIMIZER, gt=0, lt=1
    )
    scale_biases: bool = option(
        True,
        "Multiply the biases' learning rate by the root mean square of the layer's activations, so that one rate suits "
        "activations of any size.",
        panel=OPTIMIZER,
    )

    max_bad_steps: int = option(
        10,
        "Stop the run after N skipped steps in a row. A step is skipped for all layers if the loss or gradient of any "
        "layer has NaN or Inf. The run fails if its last step is skipped.",
        panel=OPTIMIZER,
        unit="optimizer steps",
        ge=1,
    )

    revive_alpha: float = option(
        1e-4,
        "Weight of the loss that raises the biases of dead latents until they fire again; 0 turns it off. Under Adam "
        "its size does not matter while a latent has no other gradient.",
        panel=DEAD,
        ge=0,
    )
    auxk_alpha: float = option(
        0.0,
        "Weight of the AuxK loss, in which dead latents predict the error of the others (1/32 in Gao et al. 2024); 0 "
        "turns it off.",
        panel=DEAD,
        ge=0,
    )
    auxk_relative_to: Literal["variance", "residual"] = option(
        "variance",
        "Divide the AuxK loss by the layer's variance, as the main loss (variance), or by the mean squared error of "
        "the previous step, which keeps the loss's weight as the SAEs improve (residual).",
        panel=DEAD,
    )
    dead_feature_threshold: int | None = option(
        None,
        "Count a latent as dead if it has not fired in the last N tokens. The default is 300 × latents / k or ten "
        "steps, whichever is more, but at most 2% of the run's tokens and at most 10,000,000.",
        panel=DEAD,
        unit="tokens",
        ge=1,
    )

    kernels: Literal["auto", "eager", "cpu", "native", "triton"] = option(
        "auto",
        "Code that computes the SAEs: eager, the readable reference; cpu, torch's sparse operations; native, fused "
        "operations that this machine's C++ compiler builds on first use; triton, fused operations on a GPU. auto "
        "chooses triton on a GPU; on a CPU it chooses native if there is a compiler, else cpu.",
        panel=SPEED,
    )
    select_dtype: Literal["auto", "fp32", "bf16", "int8"] = option(
        "auto",
        "Precision of the scores that find candidates for the k latents. The choice among the candidates is always "
        "made in float32. auto chooses bf16 on GPUs that are fast at it; on a CPU it times fp32, bf16 and int8 once, "
        "at the run's own sizes, and a resumed run keeps that choice. Use fp32 for bit-exact work.",
        panel=SPEED,
    )

    placement: PlacementName = option(
        AUTO,
        "Where the SAEs live: ddp, a replica on every rank; zero3, each SAE sharded over all ranks; layer-map, each "
        "layer on one rank. auto follows the launch file, or chooses ddp if that says nothing. A plug-in can add "
        "others.",
        panel=PLACEMENT,
    )
    layer_map: str | None = option(
        None,
        "Assign layers to ranks under layer-map, such as 0-5:0,6-11:1. By default they are spread evenly.",
        panel=PLACEMENT,
    )
    shard_lm: bool = option(
        False,
        "Also shard the language model over the ranks, under zero3. This is slower, and for a model that is too large "
        "for one GPU.",
        panel=PLACEMENT,
    )

    save_dir: Path = option(Path("checkpoints"), "Folder that holds the runs.", panel=SAVING)
    run_name: str | None = option(
        None,
        "Name of the run's folder in --save-dir; by default the names of the model and the data set.",
        panel=SAVING,
        common=True,
    )
    save_every: int = option(
        1000, "Steps between checkpoints. The last step is always saved.", panel=SAVING, unit="optimizer steps", ge=1
    )
    keep_last: int = option(
        1, "Keep the last N checkpoints, in addition to the best.", panel=SAVING, unit="checkpoints", ge=1
    )
    save_best: bool = option(
        False,
        "Also keep the best checkpoint, as `best`: the one with the lowest mean FVU since the checkpoint before it.",
        panel=SAVING,
    )
    save_best_effort: bool = option(
        False,
        "Warn and continue if a checkpoint cannot be written, for example because the disk is full. By default the "
        "run stops.",
        panel=SAVING,
    )
    grace: float = option(
        120,
        "After SIGTERM or SIGUSR1 from a scheduler, finish and save the current step within this time, or stop "
        "without saving. --resume auto waits this long for the previous job if that still trains in the run's folder.",
        panel=SAVING,
        unit="seconds",
        gt=0,
    )
    overwrite: bool = option(False, "Replace an existing run of the same name.", panel=SAVING)
    resume: Resume = option(
        False,
        "Continue the run from its newest complete checkpoint, or the run or checkpoint at PATH. The options of PATH "
        "need not be repeated. auto continues if there is a checkpoint, and starts a new run otherwise.",
        panel=SAVING,
        common=True,
    )

    log_every: int = option(
        1, "Steps between reports. The numbers are means over these steps.", panel=LOGGING, unit="optimizer steps", ge=1
    )
    log_with: str | None = option(
        None,
        "Log to a tracker of accelerate: wandb, tensorboard, mlflow, comet_ml, aim and others.",
        panel=LOGGING,
        common=True,
    )

    eval_every: int | None = option(
        None,
        "Steps between evaluations on documents that the run never reads, as saekit eval makes them. The last step is "
        "always evaluated. Off by default. The whole language model is loaded for them; with --shard-lm it is not, "
        "and only the reconstruction is evaluated.",
        panel=EVALUATION,
        unit="optimizer steps",
        ge=1,
    )
    eval_tokens: int = option(
        16_384, "Tokens per evaluation; the same tokens each time.", panel=EVALUATION, unit="tokens", ge=1
    )

    @classmethod
    def from_yaml(cls, path: str | Path) -> TrainConfig:
        """Read the options of training from a YAML file such as `saekit train --config` reads.

        Options of the language model and the data set may stand in it, as in a run's `config.yaml`; they are ignored.

        Raises:
            UserError: If the file cannot be read, or holds something that is no option; with every problem.
        """
        values = read_yaml(Path(path))
        found = unknown_options(values, option_names(ModelConfig, DataConfig, SaeConfig, cls))
        sae = make_config(SaeConfig, values, found)
        cfg: TrainConfig | None = make_config(cls, values, found, **({} if sae is None else {"sae": sae}))
        if found or cfg is None:
            raise UserError(f"{path}: {'; '.join(found)}")
        return cfg

    @property
    def order_seed(self) -> int | None:
        """Return the seed of the order of the sequences; None for the data set's own order."""
        return self.data_seed if self.shuffle else None

    @property
    def revives(self) -> bool:
        """Tell whether a loss reaches dead latents."""
        return self.revive_alpha > 0 or self.auxk_alpha > 0

    @property
    def loads_whole_model(self) -> bool:
        """Tell whether the blocks after the last hookpoint and the head are loaded, too: evaluations need them.

        If the language model is sharded they are not, and evaluations are of the reconstruction only. It would be
        gathered three times per layer for every batch, and DeepSpeed, which learns in which order modules run, would
        learn it again each time.
        """
        return self.eval_every is not None and not self.shard_lm

    @field_validator("run_name")
    @classmethod
    def _check_run_name(cls, name: str | None) -> str | None:
        if name is not None and (not name.strip("./ ") or "/" in name or "\\" in name):
            raise ValueError("a run's name is one folder's name, without slashes")
        return name

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if 0 < self.max_norm_multiple < 1:
            raise ValueError(
                f"--max-norm-multiple {self.max_norm_multiple:g} would exclude ordinary tokens: give at least 1, or "
                "0 to exclude none"
            )
        check_placement(self.placement, self.layer_map, self.shard_lm)
        if self.moments_dtype != "fp32" and self.optimizer != "adam":
            raise ValueError(f"--moments-dtype {self.moments_dtype} is for --optimizer adam, not {self.optimizer}")
        if self.kernels == "eager" and self.select_dtype in ("bf16", "int8"):
            raise ValueError(f"--kernels eager selects in float32 only: leave out --select-dtype {self.select_dtype}")
        if self.overwrite and self.resume:
            raise ValueError("--overwrite and --resume contradict each other: give one of them")
        return self
