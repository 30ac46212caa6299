"""The draft of a run during the questions, and the files that start the run: read as defaults, written at the end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from saekit.activations import ModelShape
from saekit.activations.lm import shared_limit
from saekit.config import RunConfig
from saekit.config.flat import SECRETS, as_yaml, load_plugins, read_yaml
from saekit.data import Peek
from saekit.errors import UserError
from saekit.placement.choose import launched_as
from saekit.planning import Advice, Machine, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST = (
    "model",
    "dataset",
    "split",
    "data_args",
    "text_column",
    "hookpoints",
    "transcode",
    "layers",
    "expansion_factor",
    "num_latents",
    "k",
    "ctx_len",
    "max_tokens",
    "batch_size",
    "save_dir",
    "run_name",
)
"""The first options in `run.yaml`, in the order of the questions. Options without a question follow."""


@dataclass(frozen=True)
class Targets:
    """The files to write."""

    run: Path
    """The run's configuration (`run.yaml`)."""
    launch: Path
    """The launch file."""
    templates: Mapping[str, Path]
    """The launch files that are included in saekit, by name: `ddp`, `zero3_cpu`, ..."""


@dataclass(frozen=True)
class Launch:
    """The values of a launch file that the wizard writes."""

    processes: int | None = None
    placement: str = ""
    on_gpu: bool = False


def run_text(values: Mapping[str, Any], cfg: RunConfig) -> str:
    """Return the text of `run.yaml`: answers, options of the command line and kept values, without secrets."""
    plain = cfg.to_flat()
    plain = {name: plain[name] for name in (*FIRST, *plain) if name in values and name in plain}
    if isinstance(values.get("layers"), str):
        plain["layers"] = values["layers"]  # 0-31:2 reads better than sixteen numbers
    return as_yaml(plain, width=1000)


def secrets_in(values: Mapping[str, Any]) -> list[str]:
    """Return the options that are secrets, which are not written."""
    return sorted(SECRETS & set(values))


def launch_text(template: Path, processes: int) -> str:
    """Return the text of a launch file: one that is included in saekit, with this number of processes."""
    said = yaml.safe_load(template.read_text(encoding="utf-8"))
    said["num_processes"] = processes
    return yaml.safe_dump(said, sort_keys=False)


def template_for(targets: Targets, placement: str, *, on_gpu: bool) -> Path:
    """Return the launch file of a placement that is included in saekit."""
    return targets.templates[placement.replace("-", "_") + ("" if on_gpu else "_cpu")]


def read_launch(path: Path) -> Launch:
    """Read an earlier launch file; an empty `Launch` if there is none, or if the wizard did not write it."""
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        processes, _ = int(said["num_processes"]), said["distributed_type"]  # every file of accelerate has both
        placement = launched_as(said)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return Launch()
    return Launch(processes, placement or "", on_gpu=said.get("gpu_ids") != "-1,-1")


def write_files(files: Mapping[Path, str]) -> None:
    """Write all files or none: all are complete under other names before the first is renamed.

    Args:
        files: The text of each file, by path.

    Raises:
        UserError: If a file cannot be written.
    """
    ready = {path: path.with_name(f".{path.name}.partial") for path in files}
    try:
        for path, partial in ready.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(files[path], encoding="utf-8")
        for path, partial in ready.items():
            os.replace(partial, path)
    except OSError as error:
        for partial in ready.values():
            with suppress(OSError):  # it was not written, or cannot be deleted either
                partial.unlink()
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


Known = TypeVar("Known")

EITHER_OR = (
    ("num_latents", "expansion_factor"),
    ("layers", "layer_stride"),
    *(("crosscode", part, other) for part in ("reads", "writes") for other in ("hookpoints", "transcode")),
    *(("crosscode_models", "crosscode_revision", other) for other in ("crosscode", "reads", "writes", "transcode")),
)
"""Groups of options that exclude each other: an option on the command line removes the others from earlier values."""


@dataclass(frozen=True)
class Draft:
    """The answers so far. Each answer makes a new draft, so going back means returning to an older draft.

    Results of checks are stored with the answers, for the questions that follow.
    """

    values: Mapping[str, Any]
    """Options by name, as in `run.yaml`. The placement is not one of them, since the launch file names it."""
    typed: frozenset[str]
    """The options that were given on the command line."""
    targets: Targets
    earlier: Launch = field(default_factory=Launch)
    """The values of the launch file that will be replaced."""
    processes: str = ""
    """The number of processes on the command line; empty if it was not given."""
    placement: str = ""
    """The placement, as answered or given on the command line; empty if neither."""

    machine: Machine | None = None
    shape: ModelShape | None = None
    other: ModelShape | None = None
    """The shape of the second model, if the options name one."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """The model's tokenizer; also None if the model has none."""
    peek: Peek | None = None
    """The first rows of the data set."""
    open_error: str = ""
    """The error from opening the data set, if the answer to a later question can fix it."""
    plan: Plan | None = None
    advice: tuple[Advice, ...] = ()
    """Changes that would make the plan fit, if it does not."""

    @property
    def max_ctx_len(self) -> int | None:
        """Return the largest context, in tokens, that the model (or both models) can read; None without a limit."""
        return shared_limit(known(self.shape).max_ctx_len, None if self.other is None else self.other.max_ctx_len)

    def setting(self, **values: Any) -> Draft:
        """Return a draft with these values changed; None removes a value."""
        changed = {**self.values, **values}
        return replace(self, values={name: value for name, value in changed.items() if value is not None})

    def config(self) -> RunConfig:
        """Return the validated configuration, with defaults for missing values.

        Raises:
            UserError: As `saekit train` raises it.
        """
        return RunConfig.from_flat({"model": "", "dataset": "", **self.values})


def start(typed: Mapping[str, Any], targets: Targets, processes: str = "") -> Draft:
    """Make the draft before the first question: an existing `run.yaml`, updated by the command line's options.

    Args:
        typed: The options of the command line.
        targets: The files to write.
        processes: The number of processes on the command line; empty if it was not given.

    Raises:
        UserError: If the file or an option cannot be used.
    """
    if targets.run.resolve() == targets.launch.resolve():
        raise UserError(f"--output and --launch-file both name {targets.run}: give two different files")
    kept = read_yaml(targets.run) if targets.run.exists() else {}
    kept.pop("placement", None)
    load_plugins(kept)
    values = dict(typed)
    placement = str(values.pop("placement", "auto"))
    for pair in EITHER_OR:
        if any(name in values for name in pair):
            for name in pair:
                kept.pop(name, None)
    try:
        Draft(kept, frozenset(), targets).config()
    except UserError as error:
        raise UserError(f"{targets.run}: {error} (fix it, or choose another file with --output)") from None
    draft = Draft(
        values={**kept, **values},
        typed=frozenset(typed),
        targets=targets,
        earlier=read_launch(targets.launch),
        processes=processes,
        placement="" if placement == "auto" else placement,
    )
    draft.config()
    return draft


def known(value: Known | None) -> Known:
    """Return the result of an earlier question, which must be there."""
    assert value is not None
    return value
