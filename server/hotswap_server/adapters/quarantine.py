"""Versions that are served no more, because what they compute is not finite."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Final

from hotswap_server.core import AdapterRef
from hotswap_server.errors import AdapterQuarantinedError

_MAX_DIGESTS: Final = 4096


class Quarantine:
    """By content, whatever its name. Unloading a name lets its content out again; safe for threads.

    A newly published version has another content, and so is not in it.
    """

    def __init__(self) -> None:
        self._refs: OrderedDict[str, set[AdapterRef]] = OrderedDict()  # the names asked for, by digest
        self._lock = threading.Lock()
        self.num_added = 0

    def __len__(self) -> int:
        return len(self._refs)

    def __contains__(self, ref: AdapterRef) -> bool:
        return ref.digest in self._refs

    def add(self, ref: AdapterRef) -> None:
        with self._lock:
            self.num_added += ref.digest not in self._refs
            self._refs.setdefault(ref.digest, set()).add(ref)
            if len(self._refs) > _MAX_DIGESTS:
                self._refs.popitem(last=False)

    def check(self, ref: AdapterRef) -> None:
        """Raises AdapterQuarantinedError if `ref` is in it."""
        if ref not in self:
            return
        with self._lock:
            if (refs := self._refs.get(ref.digest)) is not None:
                refs.add(ref)
        raise self.error(ref)

    def release(self, name: str, version: int | None) -> None:
        """Let out a version, or all of a name."""
        with self._lock:
            for digest, refs in list(self._refs.items()):
                if any(ref.name == name and version in (None, ref.version) for ref in refs):
                    del self._refs[digest]

    @staticmethod
    def error(ref: AdapterRef) -> AdapterQuarantinedError:
        return AdapterQuarantinedError(
            f"{ref} gave logits that are not finite and is served no more; publish a sound one, or unload "
            "it to have it tried again",
            adapter=ref.name,
        )
