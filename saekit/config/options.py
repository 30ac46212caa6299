"""Documents a config field once, at the field, for `--help`, the YAML file and the docs."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from saekit.errors import UserError
from saekit.registry import SOURCES

CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False)
"""Shared by all configs: an unknown name is an error, not an option that does nothing; numbers are finite."""


Config = TypeVar("Config")


def in_one_sentence(config: type[Config]) -> type[Config]:
    """Let a config's constructor raise a `UserError` that the command line could print, and not pydantic's report."""
    construct = config.__init__

    @functools.wraps(construct)
    def construct_or_say(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            construct(self, *args, **kwargs)
        except ValidationError as error:
            raise UserError("; ".join(problems(error))) from None

    config.__init__ = construct_or_say  # type: ignore[method-assign]
    return config


def option(
    default: Any, help: str, *, panel: str, unit: str | None = None, common: bool = False, **constraints: Any
) -> Any:
    """Return a field that is also a command-line option.

    Args:
        default: Its default; None where the default depends on something else, which `help` then says.
        help: A few sentences. The first stands by itself: it is all that `--help` shows of a common option.
        panel: The group under which `--help-all` lists it.
        unit: What a number counts, in square brackets in `--help`.
        common: Whether most runs need it, so that `--help` shows it, not only `--help-all`.
        constraints: Handed to pydantic (`gt`, `ge`, ...).
    """
    extra: JsonDict = {"panel": panel, "unit": unit, "common": common}
    return Field(default=default, description=help, json_schema_extra=extra, **constraints)


@dataclasses.dataclass(frozen=True)
class Option:
    """One field as the command line sees it."""

    name: str
    type: Any
    """The annotation without None and without pydantic's wrappers."""
    default: Any
    help: str
    panel: str
    unit: str | None
    common: bool


def options_of(config: type) -> Iterator[Option]:
    """Yield the fields of a config that are options, in order; nested configs and others without a panel are not."""
    hints = get_type_hints(config, include_extras=True)
    fields: dict[str, FieldInfo] = config.__pydantic_fields__  # type: ignore[attr-defined]
    for name, info in fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and "panel" in extra:
            unit = extra["unit"]
            yield Option(
                name,
                _plain_type(hints[name]),
                info.default,
                info.description or "",
                str(extra["panel"]),
                None if unit is None else str(unit),
                bool(extra["common"]),
            )


def _plain_type(hint: Any) -> Any:
    """`Annotated[int, ...] | None` → `int`."""
    if get_origin(hint) is Annotated:
        return _plain_type(get_args(hint)[0])
    arguments = [argument for argument in get_args(hint) if argument is not type(None)]
    if type(None) in get_args(hint) and len(arguments) == 1:
        return _plain_type(arguments[0])
    return hint


def problems(error: ValidationError) -> list[str]:
    """Return one line per problem that pydantic found, with the option and its value."""
    lines = []
    for item in error.errors(include_url=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "unexpected_keyword_argument":
            lines.append(f"there is no option {name!r}")
        elif item["type"] in ("missing", "missing_argument"):
            lines.append(f"{name} is missing")
        elif name:
            lines.append(f"--{name.replace('_', '-')} {item['input']!r}: {message[0].lower()}{message[1:]}")
        else:
            lines.append(message)
    return lines


MOST_LAYERS = 10_000
"""More than any model has: a range of more is a slip of the finger, which would fill the memory."""


def _parse_layers(value: Any) -> Any:
    """`"3,7,10-20:2"` → `(3, 7, 10, 12, 14, 16, 18, 20)`; ranges include their end."""
    if _is_number(value):
        return (value,)
    if not isinstance(value, str):
        return _without_bools(value)
    numbers: list[int] = []
    for part in _parts(re.sub(r"\s*([-:])\s*", r"\1", value)):
        numbers.extend(numbers_in(part))
    return tuple(numbers)


def numbers_in(part: str) -> range:
    """`"10-20:2"` → 10, 12, ..., 20; `"3"` → 3. A range includes its end.

    Raises:
        ValueError: If it is neither, is empty, or goes further than any model has layers.
    """
    span, _, stride = part.partition(":")
    first, dash, last = span.partition("-")
    try:
        start, stop, step = int(first), int(last if dash else first), int(stride or 1)
    except ValueError:
        raise ValueError("expected numbers and ranges such as 16,24 or 0-31:2") from None
    if step < 1 or stop < start:
        raise ValueError(f"the range {part!r} is empty")
    if stop >= MOST_LAYERS:
        raise ValueError(f"no model has {stop + 1:,} layers")
    return range(start, stop + 1, step)


def _parse_patterns(value: Any) -> Any:
    """`"layers.{0,3}.mlp,resid"` → `("layers.{0,3}.mlp", "resid")`: commas in braces belong to their pattern.

    Spaces are as good as commas.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(isinstance(each, str) for each in texts):
        return value
    return tuple(part for text in texts for part in re.split(r"[,\s](?![^{}]*\})", text) if part)


def _parse_ids(value: Any) -> Any:
    """`"0,50256"` → `(0, 50256)`."""
    if _is_number(value):
        return (value,)
    if not isinstance(value, str):
        return _without_bools(value)
    try:
        return tuple(int(part) for part in _parts(value) if part)
    except ValueError:
        raise ValueError("expected token ids such as 0,50256") from None


def _check_ids(ids: tuple[int, ...]) -> tuple[int, ...]:
    if any(each < 0 for each in ids):
        raise ValueError("a token id is at least 0")
    return ids


def _parts(text: str) -> list[str]:
    """Split at commas or, as other tools write lists, at spaces."""
    return re.split(r"\s*,\s*|\s+", text.strip())


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _without_bools(values: Any) -> Any:
    """Refuse true and false, which pydantic takes for 1 and 0."""
    if isinstance(values, (list, tuple)) and any(isinstance(each, bool) for each in values):
        raise ValueError("expected numbers, found true or false")
    return values


def _parse_shares(value: Any) -> Any:
    """`"0.125,0.25,1"` → `(0.125, 0.25, 1.0)`."""
    if not isinstance(value, str):
        return value
    try:
        return tuple(float(part) for part in _parts(value))
    except ValueError:
        raise ValueError("expected shares such as 0.125,0.25,1") from None


def _parse_mapping(value: Any) -> Any:
    """`"name=en,streaming=true"` → `{"name": "en", "streaming": True}`, values read as YAML."""
    if isinstance(value, dict):
        return {name: str(each) if isinstance(each, date) else each for name, each in value.items()}
    if not isinstance(value, str):
        return value
    mapping: dict[str, Any] = {}
    for part in filter(None, value.split(",")):
        name, equals, text = part.partition("=")
        if not equals or not name.strip():
            raise ValueError("expected pairs such as name=en,streaming=true")
        if name.strip() in mapping:
            raise ValueError(f"{name.strip()!r} is given twice")
        mapping[name.strip()] = _plain_value(text.strip())
    return mapping


def _plain_value(text: str) -> Any:
    """Read a value as YAML, but `no` is Norwegian and `2023-11-01` a snapshot: names of configurations, not values."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # a ValueError is that of a day which does not exist
        raise ValueError(f"the value {text!r} cannot be read as YAML") from None
    other_word = isinstance(value, bool) and text.lower() not in ("true", "false")
    return text if other_word or isinstance(value, date) else value


def _parse_resume(value: Any) -> Any:
    """`"latest"` is what `--resume` without a value comes to; any other word than `auto` is a path."""
    if not isinstance(value, str) or value == "auto":
        return value
    if not value:
        raise ValueError("expected auto or the path of a run or checkpoint")
    return True if value == "latest" else Path(value)


LayerList = Annotated[tuple[int, ...], BeforeValidator(_parse_layers)]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_parse_patterns)]
TokenIds = Annotated[tuple[int, ...], BeforeValidator(_parse_ids), AfterValidator(_check_ids)]


def _parse_files(value: Any) -> Any:
    """One file or a list of them."""
    return (value,) if isinstance(value, (str, Path)) else value


Files = Annotated[tuple[Path, ...], BeforeValidator(_parse_files)]
Shares = Annotated[tuple[float, ...], BeforeValidator(_parse_shares)]
Resume = Annotated[bool | Literal["auto"] | Path, BeforeValidator(_parse_resume)]
Mapping = Annotated[dict[str, Any], BeforeValidator(_parse_mapping)]


def _check_source(name: str) -> str:
    if name not in SOURCES:
        raise ValueError(f"there is no source of that name: choose one of {', '.join(SOURCES.names())}")
    return name


SourceName = Annotated[str, AfterValidator(_check_source)]
"""A name in `saekit.registry.SOURCES`; the source is not imported."""
