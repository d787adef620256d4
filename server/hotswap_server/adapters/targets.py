"""Which modules of the base an `adapter_config.json` means, by PEFT's rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from hotswap_server.adapters.patterns import Pattern, ends_with
from hotswap_server.errors import AdapterInvalidError

V = TypeVar("V")

_ALL_LINEAR = "all-linear"  # PEFT resolves it before it saves; others may not


def target_modules(
    config: Mapping[str, object], modules: Iterable[str], *, linears: Iterable[str] | None = None
) -> set[str]:
    """Those of `modules` that the fields `target_modules`, `exclude_modules` and `layers_*` select.

    `linears` are those that `all-linear` means, by default all.

    Raises:
        AdapterInvalidError: a field has the wrong type, a pattern is no regular expression, or a target
            matches nothing.
    """
    names = list(modules)
    targets = _names_or_pattern(config, "target_modules")
    if targets is None or not targets:
        raise AdapterInvalidError("adapter_config.json: target_modules is empty; name the adapted modules")
    if isinstance(targets, str) and targets.lower() == _ALL_LINEAR:
        selected = set(names if linears is None else linears)
    elif isinstance(targets, str):
        pattern = Pattern("target_modules", targets)
        selected = {name for name in names if pattern.fullmatch(name)}
        if config.get("layers_to_transform") is not None:
            raise AdapterInvalidError(
                "adapter_config.json: layers_to_transform needs target_modules to be a list, not a pattern"
            )
    else:
        idle = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names)]
        if idle:
            raise AdapterInvalidError(
                f"adapter_config.json: target_modules {', '.join(sorted(idle))} match no linear layer of the "
                "base; was the adapter trained on another base?"
            )
        ends = tuple(f".{target}" for target in targets)
        selected = {
            name
            for name in names
            if name in targets or (name.endswith(ends) and _layer_selected(config, name))
        }
    excluded = _names_or_pattern(config, "exclude_modules")
    if isinstance(excluded, str) and excluded:
        pattern = Pattern("exclude_modules", excluded)
        selected = {name for name in selected if not pattern.fullmatch(name)}
    elif excluded:
        ends = tuple(f".{name}" for name in excluded)
        selected = {name for name in selected if name not in excluded and not name.endswith(ends)}
    if not selected:
        raise AdapterInvalidError("adapter_config.json: its targets select no linear layer of the base")
    return selected


def matches(config: Mapping[str, object], field: str, module: str) -> bool:
    """Whether `field`, a pattern or a list of name endings as IA³'s `feedforward_modules`, means `module`."""
    given = _names_or_pattern(config, field)
    if isinstance(given, str):
        return Pattern(field, given).fullmatch(module)
    return any(module.endswith(name) for name in given or ())


def by_pattern(field: str, patterns: Mapping[str, V], module: str, default: V) -> V:
    """The value of the first pattern that `module` ends with, as PEFT reads `rank_pattern` and its like."""
    for key, value in patterns.items():
        if ends_with(field, key, module):
            return value
    return default


def _layer_selected(config: Mapping[str, object], name: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    if isinstance(layers, int):
        layers = [layers]
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise AdapterInvalidError(
            "adapter_config.json: layers_to_transform must be a number or a list of numbers"
        )
    patterns = _names_or_pattern(config, "layers_pattern")
    if not patterns:
        expressions = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    else:
        given = [patterns] if isinstance(patterns, str) else patterns
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in given]
    for expression in expressions:
        match = Pattern("layers_pattern", expression).match(name)
        if match is not None:
            if match["idx"] is None:
                raise AdapterInvalidError(
                    f"adapter_config.json: layers_pattern {patterns!r} matches without a layer's number; put "
                    "brackets around its alternatives"
                )
            return int(match["idx"]) in layers
    return False


def _names_or_pattern(config: Mapping[str, object], field: str) -> list[str] | str | None:
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise AdapterInvalidError(f"adapter_config.json: {field} must be a string or a list of strings")
