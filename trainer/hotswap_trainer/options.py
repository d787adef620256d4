"""Options as dataclass fields: each is a command-line flag, a YAML key and a line of `training.json`."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml
from hotswap.layout import is_url

from hotswap_trainer.errors import OptionError

OptionsT = TypeVar("OptionsT")

Location = Path | str
"""A directory, or a URL that is kept as text."""

# What an option that has no default has instead of one.
_REQUIRED: Any = dataclasses.MISSING


def option(default: Any = _REQUIRED, *, help: str, group: str = "Method", short: str | None = None) -> Any:
    """A dataclass field that is an option. `short` is a second spelling, such as `--lr`.

    Supported types: bool, int, float, str, Path, `Path | str` (a directory, or a URL as text), Literal of
    strings, `tuple[str, ...]` (comma-separated or a YAML list), `tuple[int, ...]` (likewise, with ranges such
    as `0-5`), `dict[str, int]` and `dict[str, float]` (repeated `KEY=VALUE` or a YAML mapping), and
    `… | None`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "short": short})


@dataclasses.dataclass(frozen=True, slots=True)
class OptionSpec:
    """One option as the command line needs it."""

    name: str
    type: Any  # without `| None`
    default: Any
    help: str
    group: str
    short: str | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED

    @property
    def repeatable(self) -> bool:
        return typing.get_origin(self.type) is dict

    @property
    def metavar(self) -> str:
        if typing.get_origin(self.type) is Literal:
            return "|".join(typing.get_args(self.type))
        names = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT", Location: "DIR|URL"}
        return names.get(self.type, "KEY=VALUE" if self.repeatable else "A,B,…")


def specs(options: type) -> list[OptionSpec]:
    """The options that a dataclass declares, in order."""
    hints = typing.get_type_hints(options)
    return [
        OptionSpec(field.name, _without_none(hints[field.name]), field.default, **field.metadata)
        for field in dataclasses.fields(options)
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, keys spelled as in Python (`learning-rate` is `learning_rate`).

    Raises:
        OptionError: the file is missing, no YAML, or holds no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"--config: cannot read {path}: {_reason(error)}") from error
    except yaml.YAMLError as error:
        raise OptionError(f"--config: {path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise OptionError(f"--config: {path} must hold a mapping of option names to values")
    return {key.replace("-", "_"): value for key, value in content.items()}


def merge(flags: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Flags over YAML. A flag that was not given is None (or an empty list) and leaves the YAML value."""
    given = {name: value for name, value in flags.items() if value is not None and value != []}
    return {**config, **given}


def build(options: type[OptionsT], values: Mapping[str, Any]) -> OptionsT:
    """An instance of `options` from those of `values` that it declares, checked and converted.

    Raises:
        OptionError: a value has the wrong type, or a required one is missing.
    """
    arguments: dict[str, Any] = {}
    for spec in specs(options):
        if values.get(spec.name) is not None:
            arguments[spec.name] = coerce(spec, values[spec.name])
        elif spec.required:
            raise OptionError(f"{spec.flag}: is required")
    return options(**arguments)


def coerce(spec: OptionSpec, value: Any) -> Any:
    """`value`, from the command line (text) or YAML (typed), as the option's type."""
    try:
        return _COERCIONS.get(typing.get_origin(spec.type) or spec.type, _to_text)(value, spec.type)
    except (ValueError, TypeError) as error:
        raise OptionError(f"{spec.flag}: {error}") from error


def as_json(options: Any) -> dict[str, Any]:
    """An options dataclass as JSON values."""
    return {
        field.name: str(value)
        if isinstance(value, Path)
        else list(value)
        if isinstance(value, tuple)
        else value
        for field in dataclasses.fields(options)
        for value in [getattr(options, field.name)]
    }


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return Location if parts == [Path, str] else parts[0]
    return hint


def _to_bool(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def _to_int(value: Any, _: Any) -> int:
    if isinstance(value, bool | float):
        raise ValueError(f"must be a whole number, got {value!r}")
    try:
        return int(value)
    except (ValueError, TypeError):
        raise ValueError(f"must be a whole number, got {value!r}") from None


def _to_float(value: Any, _: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)  # text too: YAML reads 1e-4 as a string
    except (ValueError, TypeError):
        raise ValueError(f"must be a number, got {value!r}") from None


def _to_text(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, got {value!r}")
    return value


def _to_path(value: Any, hint: Any) -> Path:
    return Path(value) if isinstance(value, Path) else Path(_to_text(value, hint)).expanduser()


def _to_location(value: Any, hint: Any) -> Path | str:
    return value if isinstance(value, str) and is_url(value) else _to_path(value, hint)


def _to_choice(value: Any, hint: Any) -> Any:
    choices = typing.get_args(hint)
    if value not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}; got {value!r}")
    return value


def _to_tuple(value: Any, hint: Any) -> tuple[Any, ...]:
    item_type = typing.get_args(hint)[0]
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    if item_type is str:
        return tuple(_to_text(part, str).strip() for part in parts)
    return tuple(number for part in parts for number in _int_range(part))


def _int_range(value: Any) -> range:
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", str(value))
    first, last = (int(match[1]), int(match[2])) if match else (_to_int(value, int),) * 2
    if last < first:
        raise ValueError(f"the range {value!r} runs backwards")
    return range(first, last + 1)


def _to_dict(value: Any, hint: Any) -> dict[str, Any]:
    convert = _COERCIONS[typing.get_args(hint)[1]]
    if isinstance(value, Mapping):
        pairs = [(str(key), item) for key, item in value.items()]
    else:
        pairs = []
        for entry in value if isinstance(value, list) else [value]:
            key, equals, item = str(entry).rpartition("=")
            if not equals or not key:
                raise ValueError(f"must be KEY=VALUE, got {entry!r}")
            pairs.append((key, item))
    return {key: convert(item, None) for key, item in pairs}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


_COERCIONS: dict[Any, Any] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    str: _to_text,
    Path: _to_path,
    types.UnionType: _to_location,
    Literal: _to_choice,
    tuple: _to_tuple,
    dict: _to_dict,
}
