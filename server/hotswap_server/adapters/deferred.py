"""A lock, and calls to others that wait until it is free."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import structlog

_log = structlog.get_logger(__name__)


class Deferred:
    """What is handed to `later` within `acting` is called after it, in order and without the lock.

    Others may hold locks of their own while they wait for this one, so calling them with it could be a
    deadlock. `last` is called with the lock at the end of each `acting`.
    """

    def __init__(self, last: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self._last = last
        self._calls: list[Callable[[], None]] = []

    @contextmanager
    def acting(self) -> Iterator[None]:
        """With the lock. Does not nest."""
        calls: list[Callable[[], None]] = []
        try:
            with self.lock:
                try:
                    yield
                    self._last()
                finally:
                    calls, self._calls = self._calls, []
        finally:
            for call in calls:
                try:
                    call()
                except Exception:
                    _log.exception("deferred_call_failed")

    def later(self, call: Callable[[], None]) -> None:
        self._calls.append(call)

    def settle(self, promises: list[Future[None]], error: Exception | None = None) -> None:
        """Fulfil all, or fail them; they are taken from the list."""
        settled = list(promises)
        promises.clear()

        def tell() -> None:
            for promise in settled:
                if error is None:
                    promise.set_result(None)
                else:
                    promise.set_exception(error)

        self.later(tell)
