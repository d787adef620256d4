"""What the services ask of adapters: what there is and where, and that it be brought or taken away."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.adapters.loader import Loader
from hotswap_server.adapters.method import (
    AdapterBank,
    BankOptions,
    MethodAdapter,
    available_methods,
    method_of,
)
from hotswap_server.adapters.placement import Placement, State
from hotswap_server.adapters.residency import AdapterInfo, AdapterObserver, InUse, Residency
from hotswap_server.adapters.store import AdapterStore
from hotswap_server.core import AdapterRef
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import AdapterInUseError, CapacityError, HotswapError


class AdapterManager:
    """Adapters from store to slot: an `AdapterResidency` for the engine, and the services' face.

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
        self._banks: dict[str, AdapterBank] = {
            name: method.create_bank(base, options) for name, method in methods.items()
        }
        self._cache: HostCache[MethodAdapter] = HostCache(host_cache_bytes)
        self._loader: Loader[MethodAdapter] = Loader(
            store,
            self._cache,
            lambda raw: methods[raw.ref.method].parse(raw, base, options),
            workers=load_workers,
            deadline_s=load_deadline_s,
        )
        self._placement = Placement(
            self._banks, self._cache, self._loader, observer, lambda: self.on_change()
        )
        # The engine's face; none of them blocks.
        self.expect = self._placement.expect
        self.forget = self._placement.forget
        self.try_acquire = self._placement.try_acquire
        self.release = self._placement.release
        self.on_change: Callable[[], None] = lambda: None
        self.cancel_users: Callable[[AdapterRef], None] = lambda ref: None

    @classmethod
    def open_store(cls, url: str) -> AdapterStore:
        """The store at `url`, read by the methods that are served here."""
        return AdapterStore(url, method_of)

    def close(self) -> None:
        """End the loading, and leave the base without adapters; its engine must have stopped."""
        self._loader.close()
        self._placement.close()
        self._base.detach_adapters()

    def slot_counts(self) -> dict[str, tuple[int, int]]:
        """Slots taken and in all, by method."""
        return self._placement.slot_counts()

    def users(self) -> int:
        """Requests that hold a slot now."""
        return self._placement.users()

    # The rest may block on the store.

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
        loaded: Future[None] = Future()
        loaded.set_running_or_notify_cancel()
        with self._placement.lock:
            resident = self._placement.bring(ref)
            if resident is None:
                raise CapacityError(
                    f"{ref}: all {ref.method} slots are in use; start the server with more of them"
                )
            if resident.state is State.LOADING:
                resident.on_loaded.append(loaded)
            elif resident.error is not None:
                loaded.set_exception(resident.error)
            else:
                loaded.set_result(None)
        return self._described(ref, loaded)

    def unload(self, name: str, version: int | None, *, in_use: InUse) -> Future[int]:
        """Take a version, or all of a name, from device and host.

        The future gives the number of versions that were in memory.

        Raises:
            AdapterInUseError: requests use it and `in_use` is REFUSE.
        """
        done: Future[int] = Future()
        done.set_running_or_notify_cancel()
        placement = self._placement
        with placement.lock:
            leaving = [
                resident
                for resident in placement.residents.values()
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
                if resident.users == 0 and resident.state is not State.LOADING:
                    placement.leave(resident)
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
        copies = self._placement.host_copies
        dropped = 0
        for ref in [ref for ref in copies if ref.name == name and version in (None, ref.version)]:
            copies.discard(ref)
            if ref not in kept:
                dropped += self._cache.remove(ref.digest)
        return dropped

    def _described(self, ref: AdapterRef, done: Future[None]) -> Future[AdapterInfo]:
        """Where `ref` is once `done` is, or what that failed with."""
        described: Future[AdapterInfo] = Future()
        described.set_running_or_notify_cancel()

        def describe(done: Future[None]) -> None:
            if (error := done.exception()) is not None:
                described.set_exception(error)
            else:
                described.set_result(self._info(ref))

        done.add_done_callback(describe)
        return described

    def _info(self, ref: AdapterRef) -> AdapterInfo:
        with self._placement.lock:
            resident = self._placement.residents.get(ref)
            adapter: Any = None if resident is None else resident.adapter
            residency = Residency.STORE if adapter is None else Residency.DEVICE
            if adapter is None:
                adapter = self._cache.get(ref.digest)
                residency = Residency.STORE if adapter is None else Residency.HOST
            failed = resident is not None and resident.state is State.FAILED
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
