"""Failed loads, remembered for a while, so that a broken adapter does not keep the store busy."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Final

from hotswap_server.adapters.checkpoint import AdapterChangedError
from hotswap_server.errors import AdapterInvalidError, CapacityError, HotswapError, StoreUnavailableError

_MAX_FAILURES: Final = 4096


class FailureMemory:
    """Errors by content digest, so new content under an old name starts afresh. Safe for threads.

    What is wrong with the adapter itself, or with its access rights, is kept `lasting_s` seconds; a storage
    failure that outlasted all tries `transient_s`.
    """

    def __init__(self, lasting_s: float, transient_s: float) -> None:
        self._lasting_s = lasting_s
        self._transient_s = transient_s
        self._lock = threading.Lock()
        self._failures: OrderedDict[str, tuple[float, HotswapError]] = OrderedDict()

    def remember(self, digest: str, error: Exception) -> None:
        """Keep `error` if it is of a kind that the next load would most likely meet too."""
        if isinstance(error, AdapterChangedError):  # the next look at the store finds another digest
            return
        if not isinstance(error, AdapterInvalidError | CapacityError | StoreUnavailableError):
            return
        kept_s = self._transient_s if error.transient else self._lasting_s
        with self._lock:
            self._failures[digest] = (time.monotonic() + kept_s, _fresh(error))
            self._failures.move_to_end(digest)
            if len(self._failures) > _MAX_FAILURES:
                self._failures.popitem(last=False)

    def recall(self, digest: str) -> HotswapError | None:
        """An error like the remembered one; None when there is none or its time is over."""
        with self._lock:
            failure = self._failures.get(digest)
            if failure is None:
                return None
            until, error = failure
            if time.monotonic() >= until:
                del self._failures[digest]
                return None
            return _fresh(error)

    def forget(self, digest: str) -> None:
        with self._lock:
            self._failures.pop(digest, None)


def _fresh(error: HotswapError) -> HotswapError:
    """The same error without its traceback: the frames of that hold the file's bytes."""
    fresh = type(error).__new__(type(error))
    fresh.args = error.args
    fresh.__dict__.update(error.__dict__)
    return fresh
