"""The values that labels have, of which there must never be many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from hotswap_server.core import BASE_METHOD, FinishReason, ServingPath, Trace
from hotswap_server.errors import EngineError, HotswapError, RequestCancelledError

UNKNOWN: Final = "unknown"
"""Method of a call that ended before its adapter was found."""

OTHER: Final = "_other"
"""What names share beyond the first ones; no adapter or tenant can be called so."""

MAX_NAMES: Final = 64

SCORED: Final = "scored"

FINISH_REASONS: Final = (
    *(reason.value for reason in FinishReason),
    SCORED,
    RequestCancelledError.reason.lower(),
    EngineError.reason.lower(),
)
"""Why most requests leave the engine; errors add their own reasons."""


def method_label(method: str) -> str:
    return "base" if method == BASE_METHOD else method


def error_reason(error: BaseException) -> str:
    return error.reason if isinstance(error, HotswapError) else "INTERNAL"


def exemplar(trace: Trace | None) -> dict[str, str] | None:
    """What a histogram, scraped as OpenMetrics, shows beside a bucket: a trace that fell into it."""
    return None if trace is None else {"trace_id": trace.id}


def methods_and_paths(methods: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The base, and each of `methods` by the paths that its requests can take."""
    yield "base", ServingPath.BASE.value
    for method in methods:
        yield method, ServingPath.BATCHED.value
        if method == "lora":
            yield method, ServingPath.MERGED.value


class FirstNames:
    """Labels for names that others choose: the first `limit` have their own, the rest share OTHER."""

    def __init__(self, limit: int = MAX_NAMES) -> None:
        self._limit = limit
        self._names: set[str] = set()

    def label(self, name: str) -> str:
        if name in self._names:
            return name
        if len(self._names) >= self._limit:
            return OTHER
        self._names.add(name)
        return name
