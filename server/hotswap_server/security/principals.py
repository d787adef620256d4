"""Who calls: a name, a role, the adapters it may use, and its limits."""

from __future__ import annotations

import fnmatch
import functools
import re
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from hotswap.names import AdapterName, InvalidAdapterNameError

ALL_ADAPTERS: Final = "*"
_PATTERN_PART: Final = re.compile(r"[A-Za-z0-9._*?-]{1,64}", re.ASCII)


class Role(IntEnum):
    """What kinds of calls a principal may make; each role includes those before it."""

    USER = 1  # inference, and looking at adapters
    PUBLISHER = 2  # moving its own adapters between store and memory, publishing
    ADMIN = 3  # what others feel too: pins, merges

    @classmethod
    def of(cls, text: str) -> Role:
        """Raises ValueError with the roles there are."""
        try:
            return cls[text.upper()]
        except KeyError:
            raise ValueError(f"must be {', '.join(map(str, cls))}, got {text!r}") from None

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Limits:
    """What a principal may ask of the server; None is without limit.

    `requests_per_second` allows bursts of one second's worth, and at least one request.
    `tokens_per_minute` counts tokens read and generated; the request that uses up the last may finish.
    """

    requests_per_second: float | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterPatterns:
    """Which adapters: `*` for all, else `TENANT/NAME` with `*` and `?` in either part, letter case counting.

    Raises:
        ValueError: a pattern is neither; the message shows it.
    """

    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            parts = pattern.split("/")
            if pattern != ALL_ADAPTERS and not (
                len(parts) == 2 and all(_PATTERN_PART.fullmatch(part) for part in parts)
            ):
                raise ValueError(
                    "an adapter pattern is * or TENANT/NAME, with * and ? for any characters, got "
                    f"{pattern!r}"
                )

    @property
    def all(self) -> bool:
        return ALL_ADAPTERS in self.patterns

    def match(self, name: str) -> bool:
        """Whether `name` is a well-formed `tenant/name` that a pattern means."""
        try:
            parsed = AdapterName.parse(name)
        except InvalidAdapterNameError:
            return False
        return self.all or any(
            expression.fullmatch(parsed.tenant) and own.fullmatch(parsed.name)
            for expression, own in map(_compile, self.patterns)
        )


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody who may call. Limits and logs go by `name`, which several keys can share."""

    name: str
    role: Role
    adapters: AdapterPatterns
    limits: Limits = Limits()


ANYBODY: Final = Principal("anonymous", Role.ADMIN, AdapterPatterns((ALL_ADAPTERS,)))
"""Every caller of a server without a keys file."""


@functools.lru_cache(maxsize=4096)
def _compile(pattern: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    tenant, _, name = pattern.partition("/")
    return re.compile(fnmatch.translate(tenant)), re.compile(fnmatch.translate(name))
