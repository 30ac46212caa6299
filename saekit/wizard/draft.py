"""What is known of a run while it is being asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from saekit.activations import ModelShape
from saekit.config import RunConfig
from saekit.config.flat import load_plugins, read_yaml
from saekit.data import Peek
from saekit.errors import UserError
from saekit.planning import Advice, Machine, Plan
from saekit.wizard.draft import Launch, Targets, read_launch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Known = TypeVar("Known")

EITHER_OR = (("num_latents", "expansion_factor"), ("layers", "layer_stride"))
"""Options that say the same in two ways: giving one takes the other out."""


@dataclass(frozen=True)
class Draft:
    """The answers so far. Each makes a new one, so that going back is taking an older one.

    What is found while checking an answer is kept beside it, for the questions that follow.
    """

    values: Mapping[str, Any]
    """Options by name, as in `run.yaml`. Where SAEs live is not among them: the launch file says it."""
    typed: frozenset[str]
    """Those that stood on the command line."""
    targets: Targets
    earlier: Launch = field(default_factory=Launch)
    """What the launch file says that is to be replaced."""
    processes: str = ""
    """As they were asked for on the command line."""
    placement: str = ""
    """Chosen, or asked for on the command line; empty for neither."""

    machine: Machine | None = None
    shape: ModelShape | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    peek: Peek | None = None
    in_the_way: str = ""
    """Why the data set could not be opened as it was named, if another answer can mend that."""
    plan: Plan | None = None
    advice: tuple[Advice, ...] = ()
    """What would make the plan fit, where it does not."""

    def setting(self, **values: Any) -> Draft:
        """The same with other values; None takes one out."""
        changed = {**self.values, **values}
        return replace(self, values={name: value for name, value in changed.items() if value is not None})

    def config(self) -> RunConfig:
        """All values, validated, with defaults for those that are missing.

        Raises:
            UserError: As `saekit train` would raise it.
        """
        return RunConfig.from_flat({"model": "", "dataset": "", **self.values})


def start(typed: Mapping[str, Any], targets: Targets, processes: str = "") -> Draft:
    """What is known before the first question: an existing `run.yaml`, and over it what was typed.

    Raises:
        UserError: If one of them cannot be used.
    """
    if targets.run.resolve() == targets.launch.resolve():
        raise UserError(f"--output and --launch-file are both {targets.run}: give two files")
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
        raise UserError(f"{targets.run}: {error} (mend it, or write to another file: --output)") from None
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
    """What an earlier question has found out."""
    assert value is not None
    return value
