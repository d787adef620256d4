"""What callers see: calls by outcome, and how long they took."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from hotswap_server.core import Trace
from hotswap_server.metrics.families import Families
from hotswap_server.metrics.labels import UNKNOWN, exemplar

_INFERENCE: Final = ("Generate", "GenerateStream", "Score")
_CODES: Final = (
    *("OK", "CANCELLED", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "FAILED_PRECONDITION"),
    *("RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNAUTHENTICATED", "PERMISSION_DENIED", "INTERNAL"),
)


class CallMetrics:
    """Called on the event loop."""

    def __init__(self, make: Families, methods: Iterable[str]) -> None:
        self._requests = make.counter("requests", "Calls that ended.", "rpc", "method", "code")
        self._seconds = make.histogram(
            "request_seconds", "Time from a call's arrival to its end.", "rpc", "method"
        )
        self._in_flight = make.gauge("requests_in_flight", "Calls that have not ended.", "rpc")
        for rpc in _INFERENCE:
            self._in_flight.labels(rpc)
            for method in ("base", *methods, UNKNOWN):
                for code in _CODES:
                    self._requests.labels(rpc, method, code)

    def started(self, rpc: str) -> None:
        self._in_flight.labels(rpc).inc()

    def ended(self, rpc: str, method: str, code: str, seconds: float, trace: Trace | None = None) -> None:
        self._in_flight.labels(rpc).dec()
        self._requests.labels(rpc, method, code).inc()
        self._seconds.labels(rpc, method).observe(seconds, exemplar(trace))
