"""Which versions lie in the host cache, which itself knows nothing but content digests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from itertools import chain

from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.adapters.method import MethodAdapter
from hotswap_server.core import AdapterRef
from hotswap_server.errors import AdapterInUseError


class HostCopies:
    """Versions by the digest of their content, which may have several names. Safe for threads.

    `evicted` is told of one of them when their content had to leave, without a lock.
    """

    def __init__(self, cache: HostCache[MethodAdapter], evicted: Callable[[AdapterRef], None]) -> None:
        self._cache = cache
        self._evicted = evicted
        self._lock = threading.Lock()
        self._refs: dict[str, set[AdapterRef]] = {}
        cache.on_evict = self._on_evict

    def note(self, ref: AdapterRef) -> None:
        """Remember that `ref` was brought to host memory."""
        with self._lock:
            if ref.digest in self._cache:
                self._refs.setdefault(ref.digest, set()).add(ref)

    def drop(self, ref: AdapterRef) -> None:
        """Let go of the content, unless it has another name here, or is used."""
        with self._lock:
            refs = self._refs.get(ref.digest, set())
            if ref not in refs:
                return
            refs.discard(ref)
            if not refs:
                del self._refs[ref.digest]
                with suppress(AdapterInUseError):
                    self._cache.remove(ref.digest)

    def of(self, name: str, version: int | None) -> set[AdapterRef]:
        """A version, or all of a name."""
        return {ref for ref in self.all() if ref.name == name and version in (None, ref.version)}

    def all(self) -> set[AdapterRef]:
        with self._lock:
            return set(chain.from_iterable(self._refs.values()))

    def _on_evict(self, digest: str) -> None:
        with self._lock:
            refs = set() if digest in self._cache else self._refs.pop(digest, set())
        for ref in sorted(refs, key=str)[:1]:
            self._evicted(ref)
