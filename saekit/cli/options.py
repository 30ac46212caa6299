"""Command-line options made from the configuration, so that `--help` cannot disagree with it."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, get_args, get_origin

import typer

from saekit.cli.completion import VALUES
from saekit.cli.help import print_all
from saekit.config.flat import laid_over, load_plugins, read_yaml
from saekit.config.options import Option, options_of
from saekit.config.ranks import placement_names
from saekit.config.run import PARTS
from saekit.errors import UserError

Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="FILE.py", help="Run a Python file that registers kinds, such as selections."),
]
"""For commands that open checkpoints: the only plug-ins that these run."""
HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=print_all, help="Show every option, by group, and exit.")
]
VALUE_NAMES = {
    "resume": "[auto|PATH]",
    "layer_map": "LAYERS:RANK,...",
    "eval_dataset": "DATASET",
    "crosscode_models": "MODEL",
    "hf_token": "TOKEN",
    "matryoshka": "X,X,...",
}
"""What help calls the values of options whose type does not say it."""
THEM = {1: "it", 2: "both"}


def with_config_options(command: Callable[..., None], only: frozenset[str] | None = None) -> Callable[..., None]:
    """Replace a command's `**options` by one option per configuration field, and `--help-all`, which lists them.

    Every option defaults to None, which means that it was not given: the command sees only what the user typed, and
    can lay it over a file's values. The real defaults stand in the help.

    Args:
        command: The command.
        only: Names of the fields that it has, if not all; its help then shows them without `--help-all`.
    """
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    fields = [option for part in PARTS for option in options_of(part)]
    from_config = [_parameter(option) for option in fields if only is None or option.name in only]
    help_all = inspect.Parameter("help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=HelpAll)

    def call(help_all: bool = False, **values: Any) -> None:
        known = {parameter.name: values.pop(parameter.name) for parameter in own}
        command(**known, **{name: value for name, value in values.items() if value not in (None, [])})

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    parameters = [
        parameter.replace(kind=parameter.KEYWORD_ONLY)
        for parameter in (*own, *from_config, *([help_all] if only is None else []))
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _parameter(option: Option) -> inspect.Parameter:
    flag = "--" + option.name.replace("_", "-")
    info = typer.Option(
        f"{flag}/--no-{flag.removeprefix('--')}" if option.type is bool else flag,
        help=option.help,
        rich_help_panel=option.panel,
        show_default=_note(option) or False,
        metavar=_metavar(option),
        autocompletion=VALUES.get(option.name),
    )
    annotation = Annotated[Optional[_option_type(option)], info]  # type: ignore[valid-type]  # noqa: UP045
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option_type(option: Option) -> Any:
    """Return the type that Typer parses. The configuration parses the rest, and reports all wrong values together."""
    if option.type in (bool, Path) or get_origin(option.type) is Literal:
        return option.type
    return list[Path] if option.type == tuple[Path, ...] else str


def _metavar(option: Option) -> str | None:
    if get_origin(option.type) is Literal:
        return "|".join(get_args(option.type))
    if option.name == "placement":
        return "|".join(placement_names())
    if option.name in VALUE_NAMES:
        return VALUE_NAMES[option.name]
    if option.type == tuple[Path, ...]:
        return "FILE.py"
    if option.type == tuple[str, ...]:
        return "PATTERN,..."
    if isinstance(option.type, types.GenericAlias):
        return "KEY=VALUE,..." if option.type.__origin__ is dict else "N,N,..."
    return {int: "N", float: "X", Path: "PATH"}.get(option.type, "NAME")


def options_given(config: Path | None, typed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the typed options, and a file's values updated with them. Plug-ins among them are run.

    Args:
        config: `--config`.
        typed: Every option by its name, None where it was not given.
    """
    given = {name: value for name, value in typed.items() if value is not None}
    values = laid_over(read_yaml(config) if config else {}, given)
    load_plugins(values)
    return given, values


def require(values: Mapping[str, Any], names: tuple[str, ...], usage: str) -> None:
    """Check that these options have a value.

    Raises:
        UserError: If one has none.
    """
    for name in names:
        if values.get(name) in (None, ""):
            raise UserError(f"{name.upper()} is missing: {usage}, or a --config that names {THEM[len(names)]}")


def check_machine(gpus: int | None, gpu_memory: str | None, num_processes: int | None) -> None:
    """Check that a machine is described completely, or this one is meant.

    Raises:
        UserError: If it is half of each.
    """
    if (gpus is None) != (gpu_memory is None):
        raise UserError("--gpus and --gpu-memory describe a machine together: give both, or neither for this machine")
    if gpus is not None and num_processes is not None:
        raise UserError("--num-processes is for this machine: leave it out with --gpus")


def with_resume_value(arguments: list[str]) -> list[str]:
    """Return the command line with `--resume=latest` where `--resume` has no value; Typer knows no optional values."""
    following = [*arguments, "--"][1:]
    return [
        f"{argument}=latest" if argument == "--resume" and after.startswith("-") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def _note(option: Option) -> str:
    """Return what a number counts, and the default: `tokens; default: 2,048`."""
    shown = _shown_default(option)
    return "; ".join(filter(None, (option.unit, f"default: {shown}" if shown else "")))


def _shown_default(option: Option) -> str:
    if option.default in (None, (), {}) or option.name == "resume":
        return ""
    if option.type is bool:
        return "on" if option.default else "off"
    return f"{option.default:,}" if option.type is int else str(option.default)
