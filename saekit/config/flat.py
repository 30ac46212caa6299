"""Options by name: one flat set of names, whichever config an option belongs to."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from saekit.config.elsewhere import answer, without_dashes
from saekit.config.options import options_of
from saekit.errors import UserError
from saekit.registry import load_plugin

SIZES = frozenset({"num_latents", "expansion_factor"})
"""Options that size the dictionary, of which a run has one."""
OF_VALUES = (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError)
"""Errors that PyYAML passes on from a value that it cannot make, such as the date 2024-13-45 or `!!bool x`."""
SECRETS = frozenset({"hf_token"})
"""Options that are never written to disk."""


def option_names(*configs: type) -> set[str]:
    """Return the options of these configs; a nested config is none."""
    return {field.name for config in configs for field in dataclasses.fields(config)} - {"sae"}


def make_config(config: type, values: Mapping[str, Any], found: list[str], **nested: Any) -> Any:
    """Make one config of its own options among `values`.

    Args:
        config: The class.
        values: Options by name; those of other configs are ignored.
        found: Every problem is added to this list.
        nested: Configs that are fields of this one.

    Returns:
        The config, or None if there was a problem.
    """
    own = {name: values[name] for name in option_names(config) if name in values}
    numbers = {option.name for option in options_of(config) if option.type in (int, float)}
    if wrong := [name for name in numbers & own.keys() if isinstance(own[name], bool)]:  # which pydantic takes for 1, 0
        found += [f"--{name.replace('_', '-')} {str(own[name]).lower()}: expected a number" for name in sorted(wrong)]
        return None
    try:
        return config(**own, **nested)
    except UserError as error:
        found.append(str(error))
        return None


def unknown_options(given: Iterable[str], known: Collection[str]) -> list[str]:
    """Return a line for each name that is no option: what it is called here, or the options whose names are similar."""
    lines = []
    for name in sorted(set(given) - set(known)):
        if (instead := answer(name)) is not None:
            lines.append(f"there is no option {name!r}: {without_dashes(instead)}")
            continue
        near = difflib.get_close_matches(name.replace("-", "_"), sorted(known), n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        lines.append(f"there is no option {name!r}{hint}")
    return lines


def laid_over(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """`more` over `values`. There are two ways to size the dictionary: the one in `more` replaces the other."""
    kept = {name: value for name, value in values.items() if name not in SIZES or not SIZES & more.keys()}
    return {**kept, **more}


def to_flat(config: Any) -> dict[str, Any]:
    """One config as plain values by option name, nested ones flattened, without secrets."""
    flat: dict[str, Any] = {}
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    for name, value in values.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(getattr(config, name)):
            flat.update(value)
        elif name not in SECRETS:
            flat[name] = value
    return {name: value for name, value in flat.items() if value is not None}


def as_yaml(values: Mapping[str, Any], width: int | None = None) -> str:
    """Return plain values as YAML that `read_yaml` reads back.

    Letters stay as they are, unless PyYAML would read them as something else: it takes U+0085, a line break of
    Unicode's, for a space.

    Args:
        values: By option.
        width: Columns after which lines are broken; by default PyYAML's.
    """
    options: dict[str, Any] = {"sort_keys": False} | ({} if width is None else {"width": width})
    text: str = yaml.safe_dump(values, allow_unicode=True, **options)
    return text if yaml.safe_load(text) == values else yaml.safe_dump(values, **options)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the options in a YAML file; dashes in names count as underscores.

    Raises:
        UserError: If there is no such file or it is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {path}: not a text file") from None
    except (yaml.YAMLError, *OF_VALUES) as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected lines such as `batch_size: 8`, found a {type(values).__name__}")
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def load_plugins(values: Mapping[str, Any]) -> None:
    """Run the plug-ins that a user's own options name, before these are validated.

    Not for the options that a checkpoint or a run's folder holds: those name no code that is run.

    Args:
        values: Options by name, such as those of a `run.yaml`.

    Raises:
        UserError: If a file is missing, or raises an error.
    """
    files = values.get("plugin") or ()
    for file in (files,) if isinstance(files, (str, Path)) else files:
        load_plugin(Path(file))
