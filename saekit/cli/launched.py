"""What a launch file decides about a run that is only planned: its placement, and what is offloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from saekit.cli.launch import launch_file
from saekit.config.ranks import AUTO
from saekit.errors import UserError

if TYPE_CHECKING:
    from saekit.planning import Offload


def placement_of(name: str, asked: str) -> str | None:
    """The placement under `--launch NAME`; None where there is one process.

    Args:
        name: A shipped launch file's name, or a file.
        asked: `--placement`.
    """
    from saekit.placement.choose import launched_as

    said = _read(name)
    decided = launched_as(said)
    return decided if decided is None or asked == AUTO else asked


def offload_of(name: str) -> Offload:
    """What DeepSpeed is to keep in the machine's memory under `--launch NAME`."""
    from saekit.planning import Offload

    zero = _section(_read(name), "deepspeed_config")
    return Offload(*(zero.get(f"offload_{what}_device") == "cpu" for what in ("optimizer", "param")))


def _read(name: str) -> dict[str, object]:
    try:
        said = yaml.safe_load(launch_file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--launch {name}: not a launch file that can be read ({reason})") from None
    return said if isinstance(said, dict) else {}


def _section(said: dict[str, object], name: str) -> dict[str, object]:
    section = said.get(name)
    return section if isinstance(section, dict) else {}
