"""Adapter names: `tenant/name`, and `tenant/name@3` or `tenant/name@stable` for one version or an alias.

A name becomes a path in a store and a label of a metric, so the alphabet is small on purpose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_PART_LENGTH = 64
"""Characters of a tenant or of a name."""

MAX_VERSION = 2**31 - 1

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_ALIAS = re.compile(r"[a-z][a-z0-9_-]*", re.ASCII)
_VERSION = re.compile(r"[1-9][0-9]{0,9}", re.ASCII)


class InvalidAdapterNameError(ValueError):
    """A string is not an adapter's name; the message says which rule it breaks."""


@dataclass(frozen=True, slots=True, order=True)
class AdapterName:
    """`tenant/name`, checked when made.

    Each part is 1 to 64 ASCII letters, digits, `.`, `_` or `-`, starts with a letter or a digit, does not
    end with a dot and has no two dots in a row.

    Raises:
        InvalidAdapterNameError: a part breaks a rule; the message names the part and the rule.
    """

    tenant: str
    name: str

    def __post_init__(self) -> None:
        _check_part("tenant", self.tenant)
        _check_part("name", self.name)

    def __str__(self) -> str:
        return f"{self.tenant}/{self.name}"

    @classmethod
    def parse(cls, text: str) -> AdapterName:
        """The name that `text` spells as `tenant/name`.

        Raises:
            InvalidAdapterNameError: `text` is anything else.
        """
        parts = text.split("/")
        if len(parts) != 2:
            raise InvalidAdapterNameError(f"an adapter is named tenant/name, got {_shown(text)}")
        return cls(parts[0], parts[1])

    @classmethod
    def parse_versioned(cls, text: str) -> tuple[AdapterName, int | None]:
        """The name and version that `text` spells as `tenant/name@3`; the version is None without an `@`.

        Raises:
            InvalidAdapterNameError: `text` is anything else, or the version is no number from 1 to 2**31-1.
        """
        name, at, version = text.partition("@")
        if not at:
            return cls.parse(name), None
        number = parse_version(version)
        if number is None:
            raise InvalidAdapterNameError(
                f"a version is a number from 1 to {MAX_VERSION} without leading zeros, got {_shown(version)}"
            )
        return cls.parse(name), number


@dataclass(frozen=True, slots=True)
class AdapterReference:
    """What a request calls an adapter: its name, and a version, or an alias, or neither."""

    name: AdapterName
    version: int | None = None
    alias: str | None = None

    def __str__(self) -> str:
        selector = self.alias if self.version is None else self.version
        return str(self.name) if selector is None else f"{self.name}@{selector}"

    @classmethod
    def parse(cls, text: str) -> AdapterReference:
        """What `text` spells as `tenant/name`, `tenant/name@3` or `tenant/name@stable`.

        Raises:
            InvalidAdapterNameError: `text` is anything else; the message says which rule it breaks.
        """
        name, at, selector = text.partition("@")
        parsed = AdapterName.parse(name)
        if not at:
            return cls(parsed)
        if selector[:1].isascii() and selector[:1].isdigit():
            return cls(*AdapterName.parse_versioned(text))
        return cls(parsed, alias=check_alias(selector))


def check_alias(text: str) -> str:
    """`text`, if it may name an alias: 1 to 64 of `a` to `z`, digits, `_` and `-`, a letter first.

    Raises:
        InvalidAdapterNameError: it is anything else.
    """
    if len(text) > MAX_PART_LENGTH or _ALIAS.fullmatch(text) is None:
        raise InvalidAdapterNameError(
            f"an alias is 1 to {MAX_PART_LENGTH} lower-case ASCII letters, digits, '_' and '-', and starts "
            f"with a letter, got {_shown(text)}"
        )
    return text


def parse_version(text: str) -> int | None:
    """The version that `text` is the canonical spelling of, or None (`03`, `+3`, `0` and `٣` are none)."""
    if _VERSION.fullmatch(text) is None:
        return None
    version = int(text)
    return version if version <= MAX_VERSION else None


def _check_part(part: str, value: str) -> None:
    def refuse(rule: str) -> InvalidAdapterNameError:
        return InvalidAdapterNameError(f"the {part} of an adapter's name {rule}, got {_shown(value)}")

    if not value:
        raise refuse("must not be empty")
    if len(value) > MAX_PART_LENGTH:
        raise refuse(f"has at most {MAX_PART_LENGTH} characters")
    if not (value[0].isascii() and value[0].isalnum()):
        raise refuse("must start with an ASCII letter or digit")
    if _PART.fullmatch(value) is None:
        raise refuse("may hold only ASCII letters, digits, '.', '_' and '-'")
    if ".." in value:
        raise refuse("must not hold two dots in a row")
    if value.endswith("."):
        raise refuse("must not end with a dot")


def _shown(text: str) -> str:
    """`text` as it may stand in a message: escaped, ASCII, and short."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
