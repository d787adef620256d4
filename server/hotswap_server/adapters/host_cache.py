"""Parsed adapters in host memory: least recently used first out, by bytes, never one that is in use."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from hotswap_server.errors import AdapterInUseError, CapacityError, OverloadedError

V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class HostCacheStats:
    """A moment's contents and the counts since the start. `leased_bytes` of the `bytes` cannot be evicted."""

    bytes: int
    leased_bytes: int
    entries: int
    hits: int
    misses: int
    evictions: int


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    nbytes: int
    leases: int = 0


class HostCache(Generic[V]):
    """Values keyed by content digest, within `budget_bytes`. Every method may be called from any thread.

    `on_evict` is called with the digest of what had to leave for something else, on the thread that brought
    that, and without the cache's lock.
    """

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes must be 0 or more, got {budget_bytes}")
        self.budget_bytes = budget_bytes
        self.on_evict: Callable[[str], None] = lambda digest: None
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry[V]] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._leased_bytes = 0
        self._hits = 0
        self._misses = 0
        self._evictions = 0

    def get(self, digest: str) -> V | None:
        """The value, which becomes the most recently used one, or None."""
        with self._lock:
            entry = self._touch(digest)
            return None if entry is None else entry.value

    def peek(self, digest: str) -> V | None:
        """The value or None; neither its place in the order nor the counts change."""
        with self._lock:
            entry = self._entries.get(digest)
            return None if entry is None else entry.value

    def put(self, digest: str, value: V, nbytes: int) -> None:
        """Keep `value`, evicting what was used least recently. A digest that is here already keeps its value.

        Raises:
            CapacityError: `nbytes` is more than the whole budget.
            OverloadedError: so much is leased that evicting all the rest makes no room. Nothing is evicted.
        """
        if nbytes > self.budget_bytes:
            raise CapacityError(
                f"the adapter takes {nbytes} bytes of host memory and the host cache has "
                f"{self.budget_bytes}; raise --host-cache-bytes"
            )
        with self._lock:
            if digest in self._entries:
                self._entries.move_to_end(digest)
                return
            if self._leased_bytes + nbytes > self.budget_bytes:
                raise OverloadedError(
                    f"{self._leased_bytes} of the host cache's {self.budget_bytes} bytes are in use and "
                    f"{nbytes} more do not fit now; retry later, or raise --host-cache-bytes"
                )
            evicted = self._evict_until(self.budget_bytes - nbytes)
            self._entries[digest] = _Entry(value, nbytes)
            self._bytes += nbytes
        for gone in evicted:
            self.on_evict(gone)

    def pin(self, digest: str) -> V | None:
        """As `get`; a value that is here also stays until `unpin` was called as often as this."""
        with self._lock:
            entry = self._touch(digest)
            if entry is None:
                return None
            if entry.leases == 0:
                self._leased_bytes += entry.nbytes
            entry.leases += 1
            return entry.value

    def unpin(self, digest: str) -> None:
        """Take one `pin` back.

        Raises:
            KeyError: the digest is not pinned.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None or entry.leases == 0:
                raise KeyError(digest)
            entry.leases -= 1
            if entry.leases == 0:
                self._leased_bytes -= entry.nbytes

    @contextmanager
    def lease(self, digest: str) -> Iterator[V]:
        """The value, which stays in the cache for the time of the `with` block.

        Raises:
            KeyError: the digest is not here.
        """
        value = self.pin(digest)
        if value is None:
            raise KeyError(digest)
        try:
            yield value
        finally:
            self.unpin(digest)

    def remove(self, digest: str) -> bool:
        """Drop the value; False when it was not here.

        Raises:
            AdapterInUseError: somebody holds a lease on it.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None:
                return False
            if entry.leases:
                raise AdapterInUseError(
                    "the adapter is in use in host memory; retry when its requests are done", digest=digest
                )
            self._bytes -= self._entries.pop(digest).nbytes
            return True

    @property
    def stats(self) -> HostCacheStats:
        with self._lock:
            return HostCacheStats(
                bytes=self._bytes,
                leased_bytes=self._leased_bytes,
                entries=len(self._entries),
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._entries

    def _touch(self, digest: str) -> _Entry[V] | None:
        entry = self._entries.get(digest)
        if entry is None:
            self._misses += 1
            return None
        self._hits += 1
        self._entries.move_to_end(digest)
        return entry

    def _evict_until(self, nbytes: int) -> list[str]:
        """Evict until at most `nbytes` are held; the caller has checked that the leased ones are fewer."""
        evicted: list[str] = []
        if self._bytes > nbytes:
            # Leased ones are passed over once, not once for each that leaves.
            freed = 0
            for digest, entry in self._entries.items():
                if entry.leases == 0:
                    evicted.append(digest)
                    freed += entry.nbytes
                    if self._bytes - freed <= nbytes:
                        break
        for digest in evicted:
            self._bytes -= self._entries.pop(digest).nbytes
        self._evictions += len(evicted)
        return evicted
