"""What others want done on the engine's thread that may take as long as a step."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from hotswap_server.errors import DrainingError

T = TypeVar("T")


class Chores:
    """One is done after each step, without any lock, so it delays a request by no more than a step.

    `wake` must make the engine's thread come by.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, action: Callable[[], T]) -> Future[T]:
        """The future has the action's result, or DrainingError if the engine stops before it is done."""
        future: Future[T] = Future()

        def act() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self._closed:
                future.set_exception(DrainingError("the server is shutting down"))
                return
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

        with self._lock:
            closed = self._closed
            if not closed:
                self._waiting.append(act)
        if closed:
            act()
        else:
            self._wake()
        return future

    @property
    def waiting(self) -> bool:
        """Whether there is one to be done."""
        with self._lock:
            return bool(self._waiting)

    def run_one(self) -> bool:
        """Do the next one; False if there was none."""
        with self._lock:
            if not self._waiting:
                return False
            act = self._waiting.popleft()
        act()
        return True

    def close(self) -> None:
        """Fail those that wait, and those that come."""
        with self._lock:
            self._closed = True
        while self.run_one():
            pass
