"""An adapter's way to the device: which version sits in which slot, who uses it, and what leaves for it."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum

import structlog

from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.adapters.loader import Loader
from hotswap_server.adapters.method import AdapterBank, ClearableBank, MethodAdapter
from hotswap_server.adapters.residency import AdapterObserver
from hotswap_server.core import AdapterRef
from hotswap_server.errors import CapacityError, HotswapError

_FAILURE_KEPT_S = 5.0

_log = structlog.get_logger(__name__)


class State(StrEnum):
    """How far a version has come."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Resident:
    """A version that has, or had, a claim on a slot."""

    ref: AdapterRef
    slot: int
    state: State = State.LOADING
    users: int = 0
    last_used: int = 0
    leaving: bool = False  # unloaded: nobody new may use it
    error: HotswapError | None = None
    since: float = field(default_factory=time.monotonic)
    adapter: MethodAdapter | None = None
    on_loaded: list[Future[None]] = field(default_factory=list)
    on_left: list[Future[None]] = field(default_factory=list)


class Placement:
    """The slots of all methods. A version is known by its digest; loading runs on the loader's threads.

    `changed` is called, on any thread, when something that a waiting request needs may be there. What says so
    is called with `lock` held.
    """

    def __init__(
        self,
        banks: Mapping[str, AdapterBank],
        cache: HostCache[MethodAdapter],
        loader: Loader[MethodAdapter],
        observer: AdapterObserver | None,
        changed: Callable[[], None],
    ) -> None:
        self._banks = banks
        self._cache = cache
        self._loader = loader
        self._observer = observer
        self._changed = changed
        self._free = {name: list(range(bank.num_slots))[::-1] for name, bank in banks.items()}
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copier")
        self._clock = itertools.count(1)
        self._wanted: Counter[AdapterRef] = Counter()  # requests that have no slot yet
        self.residents: dict[AdapterRef, Resident] = {}
        self.host_copies: set[AdapterRef] = set()  # loaded once, and perhaps still in the cache
        self.lock = threading.RLock()

    def close(self) -> None:
        """End the copying; the loader must have ended."""
        self._copier.shutdown(wait=True)

    # What the engine's scheduler asks, see `AdapterResidency`; never blocks.

    def expect(self, ref: AdapterRef) -> None:
        with self.lock:
            self._wanted[ref] += 1
            self.bring(ref)

    def forget(self, ref: AdapterRef) -> None:
        with self.lock:
            self._unwant(ref)

    def try_acquire(self, ref: AdapterRef) -> int | None:
        with self.lock:
            resident = self.bring(ref)
            if resident is None or resident.leaving or resident.state is State.LOADING:
                return None
            if resident.state is State.FAILED:
                del self.residents[ref]
                raise resident.error or CapacityError(f"{ref} could not be loaded")
            resident.users += 1
            resident.last_used = next(self._clock)
            self._unwant(ref)
            return resident.slot

    def release(self, ref: AdapterRef) -> None:
        with self.lock:
            resident = self.residents[ref]
            resident.users -= 1
            idle = resident.users == 0
            if idle and resident.leaving:
                self.leave(resident)
        if idle:
            # A slot may be free for somebody who waits for one.
            self._changed()

    def bring(self, ref: AdapterRef) -> Resident | None:
        """The entry of `ref`, whose load is begun if it has none; None when every slot is in use.

        With the lock held.
        """
        resident = self.residents.get(ref)
        if resident is not None and resident.state is State.FAILED:
            if time.monotonic() - resident.since < _FAILURE_KEPT_S:
                return resident
            del self.residents[ref]
            resident = None
        if resident is not None:
            return resident
        slot = self._take_slot(ref.method)
        if slot is None:
            return None
        resident = self.residents[ref] = Resident(ref, slot)
        entry = resident
        # Never on the calling thread, where a cached adapter's future would call back at once.
        self._loader.load(ref).add_done_callback(
            lambda future: self._copier.submit(self._loaded, entry, future)
        )
        return resident

    def leave(self, resident: Resident) -> None:
        """Forget a version without users; with the lock held."""
        del self.residents[resident.ref]
        if resident.state is State.READY:
            bank = self._banks[resident.ref.method]
            if isinstance(bank, ClearableBank):
                bank.clear(resident.slot)
            self._free[resident.ref.method].append(resident.slot)
            if self._observer is not None:
                self._observer.evicted(resident.ref)
        if resident.on_left:
            self._cache.remove(resident.ref.digest)
            self._loader.forget_failure(resident.ref.digest)
        for promise in resident.on_left:
            promise.set_result(None)

    def slot_counts(self) -> dict[str, tuple[int, int]]:
        """Slots taken and in all, by method."""
        with self.lock:
            return {
                name: (bank.num_slots - len(self._free[name]), bank.num_slots)
                for name, bank in self._banks.items()
            }

    def users(self) -> int:
        """Requests that hold a slot now."""
        with self.lock:
            return sum(resident.users for resident in self.residents.values())

    def _unwant(self, ref: AdapterRef) -> None:
        self._wanted[ref] -= 1
        if self._wanted[ref] <= 0:
            del self._wanted[ref]

    def _take_slot(self, method: str) -> int | None:
        free = self._free[method]
        if not free:
            idle = [
                resident
                for resident in self.residents.values()
                if resident.ref.method == method and resident.users == 0 and resident.state is State.READY
            ]
            if not idle:
                return None
            self.leave(min(idle, key=lambda resident: resident.last_used))
        return free.pop()

    def _loaded(self, resident: Resident, future: Future[MethodAdapter]) -> None:
        """On the copying thread. The slot is this adapter's alone, so the bank is filled outside the lock."""
        error: HotswapError | None = None
        try:
            adapter = future.result()
            self._banks[resident.ref.method].put(resident.slot, adapter)
        except HotswapError as failure:
            error = failure
        except Exception as failure:
            _log.exception("adapter_not_loaded", adapter=str(resident.ref))
            error = HotswapError(f"{resident.ref} could not be loaded: {type(failure).__name__}")
        seconds = time.monotonic() - resident.since
        with self.lock:
            resident.since = time.monotonic()
            resident.last_used = next(self._clock)
            if error is None:
                resident.state, resident.adapter = State.READY, adapter
                self.host_copies = {ref for ref in self.host_copies if ref.digest in self._cache} | {
                    resident.ref
                }
            else:
                resident.state, resident.error = State.FAILED, error
                self._free[resident.ref.method].append(resident.slot)
            waiting, resident.on_loaded = resident.on_loaded, []
            if resident.leaving:
                self.leave(resident)
        if self._observer is not None:
            if error is None:
                self._observer.loaded(resident.ref, seconds)
            else:
                self._observer.failed(resident.ref, error)
        for promise in waiting:
            if error is None:
                promise.set_result(None)
            else:
                promise.set_exception(error)
        self._changed()
