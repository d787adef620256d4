"""An adapter's way to the device: which version sits in which slot, who uses it, and what leaves for it."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import structlog

from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.adapters.loader import Loader
from hotswap_server.adapters.method import (
    AdapterBank,
    BankOptions,
    ClearableBank,
    MethodAdapter,
    available_methods,
    method_of,
)
from hotswap_server.adapters.residency import AdapterInfo, AdapterObserver, InUse, Residency
from hotswap_server.adapters.store import AdapterStore
from hotswap_server.core import AdapterRef
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import AdapterInUseError, CapacityError, HotswapError

_FAILURE_KEPT_S = 5.0

_log = structlog.get_logger(__name__)


class _State(StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(slots=True)
class _Resident:
    """A version that has, or had, a claim on a slot."""

    ref: AdapterRef
    slot: int
    state: _State = _State.LOADING
    users: int = 0
    last_used: int = 0
    leaving: bool = False  # unloaded: nobody new may use it
    error: HotswapError | None = None
    since: float = field(default_factory=time.monotonic)
    adapter: MethodAdapter | None = None
    on_loaded: list[Future[AdapterInfo]] = field(default_factory=list)
    on_left: list[Future[None]] = field(default_factory=list)


class AdapterManager:
    """Slots of all methods. A version is known by its digest; loading runs on the loader's threads.

    `on_change` is called, on any thread, when something that a waiting request needs may be there.
    `cancel_users` must make the engine end the requests that use a version.
    """

    def __init__(
        self,
        store: AdapterStore,
        base: BaseModel,
        options: BankOptions | None = None,
        *,
        host_cache_bytes: int = 2**30,
        load_workers: int = 2,
        load_deadline_s: float = 60.0,
        observer: AdapterObserver | None = None,
    ) -> None:
        options = options or BankOptions()
        methods = available_methods()
        self._store = store
        self._base = base
        self._observer = observer
        self._banks: dict[str, AdapterBank] = {
            name: method.create_bank(base, options) for name, method in methods.items()
        }
        self._free = {name: list(range(bank.num_slots))[::-1] for name, bank in self._banks.items()}
        self._cache: HostCache[MethodAdapter] = HostCache(host_cache_bytes)
        self._loader: Loader[MethodAdapter] = Loader(
            store,
            self._cache,
            lambda raw: methods[raw.ref.method].parse(raw, base, options),
            workers=load_workers,
            deadline_s=load_deadline_s,
        )
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copier")
        self._host_copies: set[AdapterRef] = set()  # loaded once, and perhaps still in the cache
        self._residents: dict[AdapterRef, _Resident] = {}
        self._clock = itertools.count(1)
        self._lock = threading.RLock()
        self.on_change: Callable[[], None] = lambda: None
        self.cancel_users: Callable[[AdapterRef], None] = lambda ref: None

    @classmethod
    def open_store(cls, url: str) -> AdapterStore:
        """The store at `url`, read by the methods that are served here."""
        return AdapterStore(url, method_of)

    def close(self) -> None:
        """End the loading, and leave the base without adapters; its engine must have stopped."""
        self._loader.close()
        self._copier.shutdown(wait=True)
        self._base.detach_adapters()

    # What the engine's scheduler asks; never blocks.

    def try_acquire(self, ref: AdapterRef) -> int | None:
        """See `AdapterResidency.try_acquire`."""
        with self._lock:
            resident = self._resident(ref)
            if resident is None or resident.leaving or resident.state is _State.LOADING:
                return None
            if resident.state is _State.FAILED:
                del self._residents[ref]
                raise resident.error or CapacityError(f"{ref} could not be loaded")
            resident.users += 1
            resident.last_used = next(self._clock)
            return resident.slot

    def release(self, ref: AdapterRef) -> None:
        with self._lock:
            resident = self._residents[ref]
            resident.users -= 1
            idle = resident.users == 0
            if idle and resident.leaving:
                self._leave(resident)
        if idle:
            # A slot may be free for somebody who waits for one.
            self.on_change()

    # What the services ask; may block on the store.

    def resolve(self, name: str, version: int | None) -> AdapterRef:
        """The version that a request gets now; see `AdapterStore.resolve`."""
        return self._store.resolve(name, version)

    def list(self) -> list[AdapterInfo]:
        """Every version in the store, by name. One that cannot be read says why in `error`."""
        infos = []
        for stored in self._store.list():
            for version in stored.versions:
                try:
                    infos.append(self.get(stored.name, version))
                except HotswapError as error:
                    ref = AdapterRef(stored.name, version, "", "")
                    infos.append(AdapterInfo(ref, Residency.STORE, 0, 0, False, 0, {}, str(error)))
        return infos

    def get(self, name: str, version: int | None) -> AdapterInfo:
        return self._info(self._store.resolve(name, version))

    def load(self, name: str, version: int | None) -> Future[AdapterInfo]:
        """Bring a version to the device, without a request. The future holds the error if that fails.

        Raises:
            CapacityError: every slot of its method is in use.
        """
        ref = self._store.resolve(name, version)
        future: Future[AdapterInfo] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            resident = self._resident(ref)
            if resident is None:
                raise CapacityError(
                    f"{ref}: all {ref.method} slots are in use; start the server with more of them"
                )
            if resident.state is _State.LOADING:
                resident.on_loaded.append(future)
                return future
        self._tell(resident, future)
        return future

    def unload(self, name: str, version: int | None, *, in_use: InUse) -> Future[int]:
        """Take a version, or all of a name, from device and host.

        The future gives the number of versions that were in memory.

        Raises:
            AdapterInUseError: requests use it and `in_use` is REFUSE.
        """
        done: Future[int] = Future()
        done.set_running_or_notify_cancel()
        with self._lock:
            leaving = [
                resident
                for resident in self._residents.values()
                if resident.ref.name == name and version in (None, resident.ref.version)
            ]
            users = sum(resident.users for resident in leaving)
            if users and in_use is InUse.REFUSE:
                raise AdapterInUseError(
                    f"{users} running requests use {name}; wait for them, or set in_use to wait or cancel",
                    adapter=name,
                )
            host_only = self._drop_host_copies(name, version, {resident.ref for resident in leaving})
            parts: list[Future[None]] = []
            waited_for: list[AdapterRef] = []
            for resident in leaving:
                part: Future[None] = Future()
                parts.append(part)
                resident.leaving = True
                resident.on_left.append(part)
                if resident.users == 0 and resident.state is not _State.LOADING:
                    self._leave(resident)
                else:
                    waited_for.append(resident.ref)
        # Without the lock: the engine takes its own first, and this one when it lets go of a slot.
        for ref in waited_for if in_use is InUse.CANCEL else []:
            self.cancel_users(ref)
        if not parts:
            done.set_result(host_only)
        remaining = itertools.count(len(parts) - 1, -1)

        def one_left(_: Future[None]) -> None:
            if next(remaining) == 0:
                done.set_result(len(parts) + host_only)

        for part in parts:
            part.add_done_callback(one_left)
        if len(waited_for) < len(parts):
            # What the engine keeps for a version that has left, it can let go of.
            self.on_change()
        return done

    def _drop_host_copies(self, name: str, version: int | None, kept: set[AdapterRef]) -> int:
        """Forget versions that are in host memory alone; with the lock held."""
        dropped = 0
        for ref in [ref for ref in self._host_copies if ref.name == name and version in (None, ref.version)]:
            self._host_copies.discard(ref)
            if ref not in kept:
                dropped += self._cache.remove(ref.digest)
        return dropped

    def slot_counts(self) -> dict[str, tuple[int, int]]:
        """Slots taken and in all, by method."""
        with self._lock:
            return {
                name: (bank.num_slots - len(self._free[name]), bank.num_slots)
                for name, bank in self._banks.items()
            }

    def users(self) -> int:
        """Requests that hold a slot now."""
        with self._lock:
            return sum(resident.users for resident in self._residents.values())

    def _resident(self, ref: AdapterRef) -> _Resident | None:
        """The entry of `ref`, whose load is begun if it has none; None when every slot is in use."""
        resident = self._residents.get(ref)
        if resident is not None and resident.state is _State.FAILED:
            if time.monotonic() - resident.since < _FAILURE_KEPT_S:
                return resident
            del self._residents[ref]
            resident = None
        if resident is not None:
            return resident
        slot = self._take_slot(ref.method)
        if slot is None:
            return None
        resident = self._residents[ref] = _Resident(ref, slot)
        entry = resident
        # Never on the calling thread, where a cached adapter's future would call back at once.
        self._loader.load(ref).add_done_callback(
            lambda future: self._copier.submit(self._loaded, entry, future)
        )
        return resident

    def _take_slot(self, method: str) -> int | None:
        free = self._free[method]
        if not free:
            idle = [
                resident
                for resident in self._residents.values()
                if resident.ref.method == method and resident.users == 0 and resident.state is _State.READY
            ]
            if not idle:
                return None
            self._leave(min(idle, key=lambda resident: resident.last_used))
        return free.pop()

    def _loaded(self, resident: _Resident, future: Future[MethodAdapter]) -> None:
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
        with self._lock:
            resident.since = time.monotonic()
            resident.last_used = next(self._clock)
            if error is None:
                resident.state, resident.adapter = _State.READY, adapter
                self._host_copies = {ref for ref in self._host_copies if ref.digest in self._cache} | {
                    resident.ref
                }
            else:
                resident.state, resident.error = _State.FAILED, error
                self._free[resident.ref.method].append(resident.slot)
            waiting, resident.on_loaded = resident.on_loaded, []
            if resident.leaving:
                self._leave(resident)
        if self._observer is not None:
            if error is None:
                self._observer.loaded(resident.ref, seconds)
            else:
                self._observer.failed(resident.ref, error)
        for promise in waiting:
            self._tell(resident, promise)
        self.on_change()

    def _leave(self, resident: _Resident) -> None:
        """Forget a version without users; with the lock held."""
        del self._residents[resident.ref]
        if resident.state is _State.READY:
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

    def _tell(self, resident: _Resident, promise: Future[AdapterInfo]) -> None:
        if resident.error is not None:
            promise.set_exception(resident.error)
        else:
            promise.set_result(self._info(resident.ref))

    def _info(self, ref: AdapterRef) -> AdapterInfo:
        with self._lock:
            resident = self._residents.get(ref)
            adapter: Any = None if resident is None else resident.adapter
            residency = Residency.STORE if adapter is None else Residency.DEVICE
            if adapter is None:
                adapter = self._cache.get(ref.digest)
                residency = Residency.STORE if adapter is None else Residency.HOST
            failed = resident is not None and resident.state is _State.FAILED
            return AdapterInfo(
                ref=ref,
                residency=residency,
                nbytes=0 if adapter is None else adapter.nbytes,
                num_parameters=0 if adapter is None else adapter.num_parameters,
                pinned=False,
                running=0 if resident is None else resident.users,
                details={} if adapter is None else adapter.details,
                error=str(resident.error) if resident is not None and failed else None,
            )
