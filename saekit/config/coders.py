"""The options of a run's coders: their shape, and what they read and write in the language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator, model_validator
from pydantic.dataclasses import dataclass

from saekit.config.options import CONFIG, LayerList, Patterns, in_one_sentence, option
from saekit.config.sae import SAE, SaeConfig


@in_one_sentence
@dataclass(frozen=True, config=CONFIG)
class CodersConfig:
    """Which coders are trained. By default SAEs of the blocks' outputs."""

    sae: SaeConfig = SaeConfig()
    hookpoints: Patterns | None = option(
        None,
        "Train on these hookpoints: paths such as layers.*.mlp, or resid (the default), resid_pre, mlp, attn. Paths "
        "name modules, relative to the base model. * matches one part and ** any number of parts; {0-11:2} and {q,k} "
        "list alternatives; :in after a path means the module's input. resid means the outputs of the blocks, "
        "resid_pre their inputs. With --transcode the default is mlp.",
        panel=SAE,
        common=True,
    )
    layers: LayerList | None = option(
        None, "Train on these layers, counted from 0, such as 16,24 or 0-31:2; all by default.", panel=SAE, common=True
    )
    layer_stride: int = option(1, "Train on every Nth layer.", panel=SAE, unit="layers", ge=1)
    transcode: bool = option(
        False,
        "Train transcoders, which read a module's input and predict its output. --hookpoints names the modules.",
        panel=SAE,
        common=True,
    )
    reads: Patterns | None = option(
        None,
        "Train transcoders that read these hookpoints and predict those of --writes. The first hookpoint, in model "
        "order, is paired with the first of --writes, and so on.",
        panel=SAE,
    )
    writes: Patterns | None = option(None, "Hookpoints that the transcoders of --reads predict.", panel=SAE)
    crosscode: Patterns | None = option(
        None,
        "Train one crosscoder on all of these hookpoints together. It reads and reconstructs them all, each scaled to "
        "the same variance.",
        panel=SAE,
    )
    crosscode_models: str | None = option(
        None,
        "Compare MODEL with this model, a hub id or a local folder with the same tokenizer. Each hookpoint of "
        "--hookpoints gets a crosscoder that reads and reconstructs it in both models, each scaled to the same "
        "variance.",
        panel=SAE,
    )
    crosscode_revision: str | None = option(
        None, "Branch, tag or commit on the hub of the model of --crosscode-models.", panel=SAE
    )
    init: Literal["uniform", "fit"] = option(
        "fit",
        "Initial length of the encoder's rows: uniform, as drawn from ±1/√D; fit, the length that reconstructs "
        "the first batch best.",
        panel=SAE,
    )
    init_seed: int = option(0, "Seed of the SAEs' initial weights.", panel=SAE)
    finetune: Path | None = option(
        None,
        "Start from the SAEs in this run, checkpoint or folder instead of random weights. The options of the new run "
        "decide how latents are selected.",
        panel=SAE,
    )

    @property
    def transcodes(self) -> bool:
        """Tell whether coders predict other hookpoints than they read."""
        return self.transcode or self.reads is not None

    @property
    def coder(self) -> str:
        """Return the kind of coder: SAE, transcoder or crosscoder."""
        if self.transcodes:
            return "transcoder"
        return "SAE" if self.crosscode is None and self.crosscode_models is None else "crosscoder"

    @property
    def asked(self) -> list[str]:
        """Return the options that ask for other coders than SAEs."""
        options = {
            "--crosscode": self.crosscode,
            "--crosscode-models": self.crosscode_models,
            "--transcode": self.transcode or None,
            "--reads": self.reads,
        }
        return [name for name, value in options.items() if value is not None]

    @field_validator("layers", "hookpoints", "reads", "writes", "crosscode")
    @classmethod
    def _check_some(cls, named: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if named is not None and not named:
            raise ValueError("none is named: name at least one, or leave the option out")
        return named

    @model_validator(mode="after")
    def _check_coders(self) -> CodersConfig:
        if self.layers is not None and self.layer_stride != 1:
            raise ValueError(
                f"--layers and --layer-stride {self.layer_stride} both choose layers: give one of them "
                "(a range such as 0-31:2 has a stride of its own)"
            )
        if self.sae.skip_connection and not self.transcodes:
            raise ValueError("--skip-connection is for transcoders: give --transcode, or --reads and --writes")
        if (self.reads is None) != (self.writes is None):
            given, missing = ("--reads", "--writes") if self.writes is None else ("--writes", "--reads")
            raise ValueError(f"{given} is given without {missing}: a transcoder needs both")
        several = {
            "--hookpoints": self.hookpoints,
            "--reads and --writes": self.reads,
            "--crosscode": self.crosscode,
        }
        named = [name for name, patterns in several.items() if patterns is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} each say what to train on: give one of them")
        if self.transcode and named and named != ["--hookpoints"]:
            raise ValueError(f"--transcode goes with --hookpoints, not with {named[0]}")
        self._check_two_models()
        return self

    def _check_two_models(self) -> None:
        if self.crosscode_models is None:
            if self.crosscode_revision is not None:
                raise ValueError("--crosscode-revision needs --crosscode-models")
            return
        if not self.crosscode_models:
            raise ValueError("--crosscode-models is empty: give a hub id or a local folder")
        if others := [name for name in self.asked if name != "--crosscode-models"]:
            raise ValueError(
                f"--crosscode-models goes with --hookpoints, not with {others[0]}: its crosscoders read and write the "
                "same hookpoint of both models"
            )
