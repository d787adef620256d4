"""Aliases: names for versions of one adapter, such as `stable`, kept in one small file of the store.

An alias points at a version, and may send a share of its requests, a canary, to another one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from hotswap.names import MAX_VERSION, InvalidAdapterNameError, check_alias

LATEST: Final = "latest"
"""The highest version, unless somebody set it."""
STABLE: Final = "stable"
"""What a bare `tenant/name` means, if somebody set it; otherwise that means `latest`."""

MAX_ALIASES_BYTES: Final = 1 << 20

_FORMAT = 1
_MAX_ALIASES = 64
_MAX_HISTORY = 8  # earlier targets of an alias that `rolled_back` can go back to


class AliasFileError(ValueError):
    """Bytes are no alias file; the message says why, and holds nothing of them."""


class AliasHistoryError(ValueError):
    """There is no earlier target to go back to."""


@dataclass(frozen=True, slots=True)
class Target:
    """What an alias points at: `version`, and `canary` for `percent` of the requests, if there is one.

    Raises:
        ValueError: a number is out of range; the message says which.
    """

    version: int
    canary: int | None = None
    percent: float = 0.0

    def __post_init__(self) -> None:
        for what, number in (("version", self.version), ("canary", self.canary)):
            if number is not None and not 1 <= number <= MAX_VERSION:
                raise ValueError(f"the {what} must be between 1 and {MAX_VERSION}, got {number}")
        if self.canary is None:
            if self.percent != 0:
                raise ValueError("a share in per cent needs a canary's version")
            return
        if self.canary == self.version:
            raise ValueError("the canary must be another version than the alias itself")
        if not (math.isfinite(self.percent) and 0 < self.percent < 100):
            raise ValueError(f"the canary's share must be over 0 and under 100 per cent, got {self.percent}")

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that a request may get."""
        return (self.version,) if self.canary is None else (self.version, self.canary)

    def choose(self, key: str | None, salt: str) -> int:
        """The version that the request with this key gets; without a key, `version`.

        Equal keys get the same version of the same target. As the share grows, keys only ever move to the
        canary. `salt` tells adapters and aliases apart, so that no key is in the canary of all of them.
        """
        if self.canary is None or key is None:
            return self.version
        hashed = hashlib.sha256(f"{salt}\0{key}".encode()).digest()
        share = int.from_bytes(hashed[:8], "big") / 2**64 * 100
        return self.canary if share < self.percent else self.version

    def __str__(self) -> str:
        if self.canary is None:
            return str(self.version)
        return f"{self.version}, and {self.canary} for {self.percent:g} % of the requests"


@dataclass(frozen=True, slots=True)
class AliasTable:
    """All aliases of one adapter, and what each pointed at before, oldest first (None: it was not set)."""

    targets: Mapping[str, Target] = field(default_factory=lambda: MappingProxyType({}))
    history: Mapping[str, tuple[Target | None, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def default(self) -> str:
        """The alias that a bare name means."""
        return STABLE if STABLE in self.targets else LATEST

    def pointing_at(self, version: int) -> list[str]:
        """The aliases under which a request may get a version."""
        return sorted(alias for alias, target in self.targets.items() if version in target.versions)

    def set(self, alias: str, target: Target | None) -> AliasTable:
        """The table with one alias changed; None removes it, and what it was before stays known."""
        before = self.targets.get(alias)
        if before == target:
            return self
        history = (*self.history.get(alias, ()), before)[-_MAX_HISTORY:]
        return self._with(alias, target, history)

    def rolled_back(self, alias: str) -> AliasTable:
        """The table with one alias as it was before its last change.

        Raises:
            AliasHistoryError: there was none.
        """
        history = self.history.get(alias, ())
        if not history:
            raise AliasHistoryError(f"alias {alias} has no earlier version to go back to")
        return self._with(alias, history[-1], history[:-1])

    def to_json(self) -> bytes:
        content = {
            "hotswap": _FORMAT,
            "aliases": {alias: _plain(target) for alias, target in sorted(self.targets.items())},
            "history": {alias: [_plain(t) for t in was] for alias, was in sorted(self.history.items())},
        }
        return json.dumps(content, indent=2).encode() + b"\n"

    @classmethod
    def parse(cls, data: bytes) -> AliasTable:
        """The table that `to_json` wrote.

        Raises:
            AliasFileError: `data` is anything else.
        """
        try:
            content = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            raise AliasFileError("is no JSON object in UTF-8") from None
        if not isinstance(content, dict) or content.get("hotswap") != _FORMAT:
            raise AliasFileError(f'must be a JSON object with "hotswap": {_FORMAT}')
        targets = {alias: _parse_target(alias, target) for alias, target in _aliases(content, "aliases")}
        history = {
            alias: tuple(None if target is None else _parse_target(alias, target) for target in was)
            for alias, was in _aliases(content, "history")
            if isinstance(was, list)
        }
        return cls(MappingProxyType(targets), MappingProxyType(history))

    def _with(self, alias: str, target: Target | None, history: tuple[Target | None, ...]) -> AliasTable:
        targets = {name: kept for name, kept in self.targets.items() if name != alias}
        if target is not None:
            targets[alias] = target
        if len(targets) > _MAX_ALIASES:
            raise ValueError(f"an adapter has at most {_MAX_ALIASES} aliases; remove one first")
        histories = {name: was for name, was in self.history.items() if name != alias}
        if len(histories) >= 2 * _MAX_ALIASES:  # the file stays small: those of aliases long gone go
            histories = {name: was for name, was in histories.items() if name in targets}
        if history:
            histories[alias] = history
        return AliasTable(MappingProxyType(targets), MappingProxyType(histories))


def _plain(target: Target | None) -> dict[str, object] | None:
    if target is None:
        return None
    if target.canary is None:
        return {"version": target.version}
    return {"version": target.version, "canary": {"version": target.canary, "percent": target.percent}}


def _aliases(content: Mapping[str, Any], part: str) -> Iterator[tuple[str, Any]]:
    found = content.get(part, {})
    if not isinstance(found, dict):
        raise AliasFileError(f'must have an object in "{part}"')
    for alias, value in found.items():
        try:
            yield check_alias(alias), value
        except InvalidAdapterNameError as error:
            raise AliasFileError(f'holds in "{part}" what is no alias: {error}') from None


def _parse_target(alias: str, value: Any) -> Target:
    canary = value.get("canary") if isinstance(value, dict) else None
    try:
        if canary is None:
            return Target(_number(value["version"]))
        percent = canary["percent"]
        if isinstance(percent, bool) or not isinstance(percent, int | float):
            raise ValueError("the canary's share is no number")
        return Target(_number(value["version"]), _number(canary["version"]), float(percent))
    except (TypeError, KeyError):
        raise AliasFileError(f'must give alias {alias} a "version", and a "percent" to its canary') from None
    except ValueError as error:
        raise AliasFileError(f"has for alias {alias}: {error}") from None


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a version is no whole number")
    return value
