"""Regular expressions of an `adapter_config.json`, which anybody may have written: matched in bounded time.

The `re` module can take for ever over a short pattern, and holds the interpreter meanwhile; `regex` reads the
same patterns and stops when told.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, TypeVar

import regex  # type: ignore[import-untyped]

from hotswap_server.errors import AdapterInvalidError

BUDGET_S: Final = 2.0
"""Seconds that the patterns of one adapter may take together."""

_MAX_LENGTH: Final = 2000  # characters
_MAX_EXPANDED: Final = 100_000  # characters, if counted repeats were written out
_COUNTED: Final = regex.compile(r"\{(\d{0,9})(?:,(\d{0,9}))?\}")
_PLAIN: Final = regex.compile(r"[A-Za-z0-9_.-]+")
# A brace that counts nothing, or a class within a class: `re` and `regex` read these differently.
_AMBIGUOUS: Final = regex.compile(r"\[\[|\{(?!\d*(?:,\d*)?\})")

T = TypeVar("T")

_spent: ContextVar[list[float] | None] = ContextVar("hotswap_patterns_spent", default=None)


@contextmanager
def pattern_budget() -> Iterator[None]:
    """Within it all patterns share one budget; without it each match has one."""
    token = _spent.set([0.0])
    try:
        yield
    finally:
        _spent.reset(token)


class Pattern:
    """A pattern of the field `field`.

    Raises:
        AdapterInvalidError: it is no regular expression, or takes too long.
    """

    __slots__ = ("_compiled", "_field")

    def __init__(self, field: str, text: str) -> None:
        self._field = field
        self._compiled = self._timed(lambda limit: _compile(field, text))

    def fullmatch(self, name: str) -> bool:
        """Whether the whole of `name` matches."""
        return self._timed(lambda limit: self._compiled.fullmatch(name, timeout=limit)) is not None

    def match(self, name: str) -> regex.Match[str] | None:
        """How `name` begins, or None."""
        return self._timed(lambda limit: self._compiled.match(name, timeout=limit))

    def _timed(self, work: Callable[[float], T]) -> T:
        spent = _spent.get()
        left = BUDGET_S if spent is None else BUDGET_S - spent[0]
        started = time.perf_counter()
        try:
            if left > 0:
                return work(left)
        except TimeoutError:
            pass
        finally:
            if spent is not None:
                spent[0] += time.perf_counter() - started
        raise AdapterInvalidError(
            f"adapter_config.json: {self._field} holds patterns that take over {BUDGET_S:g} s to match; "
            "write simpler ones, or the modules' names"
        )


def ends_with(field: str, pattern: str, module: str) -> bool:
    """Whether `module` is, or ends after a dot with, what the pattern means.

    Raises:
        AdapterInvalidError: as of `Pattern`.
    """
    if _PLAIN.fullmatch(pattern) is None:
        return Pattern(field, rf"(.*\.)?({pattern})$").match(module) is not None
    # Hundreds of these are usual; a dot still stands for any character.
    start = len(module) - len(pattern)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    return all(want in (".", got) for want, got in zip(pattern, module[start:], strict=True))


@functools.lru_cache(maxsize=2048)
def _compile(field: str, text: str) -> regex.Pattern[str]:
    if len(text) > _MAX_LENGTH:
        raise AdapterInvalidError(
            f"adapter_config.json: {field} holds a pattern of over {_MAX_LENGTH} characters"
        )
    counts = [max(int(number or 1) for number in found.groups()) for found in _COUNTED.finditer(text)]
    if len(text) * math.prod(max(1, count) for count in counts) > _MAX_EXPANDED:
        raise AdapterInvalidError(f"adapter_config.json: {field} holds a pattern that repeats too much")
    if _AMBIGUOUS.search(text):
        raise AdapterInvalidError(
            f"adapter_config.json: {field} holds {text!r}; in its patterns braces only count repeats, and "
            "classes do not nest"
        )
    try:
        return regex.compile(text, regex.V0, cache_pattern=False)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise AdapterInvalidError(
            f"adapter_config.json: {field} holds {text!r}, no regular expression: {reason}"
        ) from None
