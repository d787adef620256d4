"""What the services ask of adapters: what there is and where, and that it be brought or taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace

from hotswap_server.adapters.checkpoint import RawCheckpoint
from hotswap_server.adapters.finite import check_finite
from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.adapters.lending import Lender
from hotswap_server.adapters.loader import Loader
from hotswap_server.adapters.method import (
    AdapterBank,
    BankOptions,
    MethodAdapter,
    available_methods,
    method_of,
)
from hotswap_server.adapters.patterns import pattern_budget
from hotswap_server.adapters.placement import Placement
from hotswap_server.adapters.quarantine import Quarantine
from hotswap_server.adapters.residency import (
    AdapterInfo,
    AdapterObserver,
    HostStats,
    InUse,
    NullAdapterObserver,
    Residency,
    SlotStats,
)
from hotswap_server.adapters.slots import Facts, State
from hotswap_server.adapters.store import AdapterStore
from hotswap_server.adapters.unloading import unload
from hotswap_server.core import AdapterRef
from hotswap_server.engine.base import BaseModel
from hotswap_server.errors import (
    AdapterInUseError,
    AdapterNotFoundError,
    CapacityError,
    HotswapError,
)


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

        def parse(raw: RawCheckpoint) -> MethodAdapter:
            with pattern_budget():
                adapter = methods[raw.ref.method].parse(raw, base, options)
            check_finite(adapter)
            return adapter

        self._store = store
        self._base = base
        self._observer = observer or NullAdapterObserver()
        self._banks: dict[str, AdapterBank] = {
            name: method.create_bank(base, options) for name, method in methods.items()
        }
        self._bank_bytes = {name: method.bank_bytes(base, options) for name, method in methods.items()}
        self._cache: HostCache[MethodAdapter] = HostCache(host_cache_bytes)
        self._loader: Loader[MethodAdapter] = Loader(
            store,
            self._cache,
            parse,
            workers=load_workers,
            deadline_s=load_deadline_s,
            on_retry=self._observer.retried,
        )
        self._placement = Placement(
            self._banks,
            self._cache,
            self._loader,
            self._observer,
            lambda: self.on_change(),
            base.device,
        )
        # The engine's face; none of them blocks.
        self.expect = self._placement.expect
        self.forget = self._placement.forget
        self.try_acquire = self._placement.try_acquire
        self.prefer = self._placement.prefer
        self.take_changes = self._placement.take_changes
        self.release = self._placement.release
        self.lender = Lender(base, methods, options, self._placement)
        self.adapters_in_memory = self._placement.adapters_in_memory
        self.quarantine = Quarantine()
        """What is not served though the store has it; for the engine to fill and to ask."""
        self.on_change: Callable[[], None] = lambda: None
        self.cancel_users: Callable[[AdapterRef], None] = lambda ref: None

    @classmethod
    def open_store(cls, url: str, refresh_s: float = 0.0) -> AdapterStore:
        """The store at `url`, read by the methods that are served here; see `AdapterStore`."""
        return AdapterStore(url, method_of, refresh_s=refresh_s)

    def close(self) -> None:
        """End the loading, and leave the base without adapters; its engine must have stopped."""
        self._loader.close()
        self._placement.close()
        self._base.detach_adapters()

    def slot_counts(self) -> dict[str, tuple[int, int]]:
        """Slots taken and in all, by method."""
        return {name: (stats.taken, stats.total) for name, stats in self.slot_stats().items()}

    def slot_stats(self) -> dict[str, SlotStats]:
        """By method."""
        return {
            name: replace(stats, bank_bytes=self._bank_bytes[name])
            for name, stats in self._placement.slot_stats().items()
        }

    def host_stats(self) -> HostStats:
        stats = self._cache.stats
        return HostStats(stats.bytes, self._cache.budget_bytes, stats.entries, stats.hits, stats.misses)

    def users(self) -> int:
        """Requests that hold a slot now."""
        return self._placement.users()

    # The rest may block on the store.

    def resolve(self, name: str, version: int | None, *, key: str | None = None) -> AdapterRef:
        """The version that a request gets now; see `AdapterStore.resolve`."""
        return self._store.resolve(name, version, key=key)

    def known(self) -> Sequence[tuple[str, int]]:
        """Name and version of all that the store or memory has, ascending; none of it is read."""
        stored = {(stored.name, version) for stored in self._store.list() for version in stored.versions}
        return sorted(stored | self.all_in_memory().keys())

    def list(self, versions: Iterable[tuple[str, int]] | None = None) -> list[AdapterInfo]:
        """These, or all that are known. One that cannot be read says why in `error`.

        Nothing is fetched to be hashed: a version without a manifest may have no digest yet.
        """
        infos = []
        wanted = tuple(self.known() if versions is None else versions)
        self._store.survey(wanted)
        in_memory = self.all_in_memory()
        for name, version in wanted:
            try:
                infos.append(self.describe(self._store.peek(name, version)))
            except HotswapError as error:
                if isinstance(error, AdapterNotFoundError) and (name, version) in in_memory:
                    infos.append(self.describe(in_memory[name, version]))
                    continue
                ref = AdapterRef(name, version, "", "")
                infos.append(AdapterInfo(ref, Residency.STORE, 0, 0, False, 0, {}, str(error)))
        return infos

    def get(self, name: str, version: int | None) -> AdapterInfo:
        return self.describe(self._store.resolve(name, version))

    def describe(self, ref: AdapterRef) -> AdapterInfo:
        """Where a version is now; the store is not asked."""
        with self._placement.lock:
            resident = self._placement.residents.get(ref)
            ready = resident is not None and resident.state is State.READY
            facts = resident.facts if resident is not None and ready else None
            residency = Residency.DEVICE if ready else Residency.STORE
            error = None if resident is None else resident.error
            if facts is None and (adapter := self._cache.peek(ref.digest)) is not None:
                facts, residency = Facts.of(adapter), Residency.HOST
        error = error or self._loader.failure(ref.digest)
        if error is None and ref in self.quarantine:
            error = self.quarantine.error(ref)
        return AdapterInfo(
            ref=ref,
            residency=residency,
            nbytes=0 if facts is None else facts.nbytes,
            num_parameters=0 if facts is None else facts.num_parameters,
            pinned=resident is not None and resident.pinned,
            running=0 if resident is None else resident.users,
            details={} if facts is None else facts.details,
            error=None if error is None else str(error),
            merged=self._base.merged.ref == ref,
        )

    def load(self, name: str, version: int | None) -> Future[AdapterInfo]:
        """Bring a version to the device, without a request; it waits for a slot in its turn.

        The future holds the error if that fails.
        """
        ref = self._store.resolve(name, version)
        loaded = _promise()
        with self._placement.acting():
            self._placement.bring(ref, loaded=loaded)
        return self._described(ref, loaded)

    def prefetch(self, name: str, version: int | None) -> Future[AdapterInfo]:
        """Bring a version to host memory, where it waits for its first request as long as there is room.

        The future holds the error if that fails.
        """
        ref = self._store.resolve(name, version)
        fetched = self._loader.load(ref)
        done = _promise()

        def note(fetched: Future[MethodAdapter]) -> None:
            if (error := fetched.exception()) is not None:
                self._observer.failed(
                    ref, error if isinstance(error, Exception) else HotswapError(str(error))
                )
                done.set_exception(error)
                return
            self._placement.host_copies.note(ref)
            done.set_result(None)

        fetched.add_done_callback(note)
        return self._described(ref, done)

    def pin(self, name: str, version: int | None) -> Future[AdapterInfo]:
        """Bring a version to the device and keep it there until `unpin`. It stays that version.

        Raises:
            CapacityError: it would take the last slot of its method that others can have.
            AdapterInUseError: it is being unloaded.
        """
        return self._keep(self._store.resolve(name, version), pinned=True)

    def hold(self, ref: AdapterRef, *, instead_of: AdapterRef | None = None) -> Future[AdapterInfo]:
        """`pin`, for a version that is to be merged, until `let_go`. An error makes that needless.

        `instead_of` is let go of soon, so unless it is pinned too its slot counts as one for others.
        """
        return self._keep(ref, held=True, instead_of=instead_of)

    def let_go(self, ref: AdapterRef) -> None:
        """End a `hold`."""
        with self._placement.acting():
            self._placement.let_go(ref)

    def content(self, ref: AdapterRef) -> Future[MethodAdapter]:
        """An adapter's tensors, from host memory or from the store."""
        return self._loader.load(ref)

    def _keep(
        self,
        ref: AdapterRef,
        *,
        pinned: bool = False,
        held: bool = False,
        instead_of: AdapterRef | None = None,
    ) -> Future[AdapterInfo]:
        loaded = _promise()
        placement = self._placement
        with placement.acting():
            resident = placement.residents.get(ref)
            if resident is not None and resident.leaving:
                raise AdapterInUseError(f"{ref} is being unloaded; retry when it is gone", adapter=ref.name)
            slots = self._banks[ref.method].num_slots
            kept = {r.ref for r in placement.residents.values() if r.kept and r.ref.method == ref.method}
            if instead_of is not None and not placement.residents[instead_of].pinned:
                kept.discard(instead_of)
            # While one merge replaces another both are held, so even what is kept already may not be pinned.
            if not (resident is not None and resident.pinned) and len(kept | {ref}) >= slots:
                others = len(kept - {ref})
                raise CapacityError(
                    f"{ref}: {others} of {slots} {ref.method} slots hold adapters that are pinned or merged, "
                    "and one must be left for the others; unpin one, or start the server with more "
                    "--adapter-slots"
                )
            placement.bring(ref, pinned=pinned, held=held, loaded=loaded)
        return self._described(ref, loaded)

    def unpin(self, name: str, version: int | None) -> Sequence[AdapterInfo]:
        """Let a version, or all of a name, be evicted again. Gives those that were pinned."""
        with self._placement.acting():
            unpinned = [r for r in self._placement.matching(name, version) if r.pinned]
            for resident in unpinned:
                self._placement.unpin(resident)
        return [self.describe(resident.ref) for resident in unpinned]

    def in_memory(self, name: str, version: int | None) -> Sequence[AdapterInfo]:
        """The versions of a name that are in host or device memory, ascending; the store is not asked."""
        with self._placement.lock:
            refs = {resident.ref for resident in self._placement.matching(name, version)}
            refs |= self._placement.host_copies.of(name, version)
            infos = [self.describe(ref) for ref in refs]
        found = [info for info in infos if info.residency is not Residency.STORE]
        return sorted(found, key=lambda info: info.ref.version)

    def all_in_memory(self) -> dict[tuple[str, int], AdapterRef]:
        """All that are in host or device memory, by name and version."""
        with self._placement.lock:
            ready = {ref for ref, r in self._placement.residents.items() if r.state is State.READY}
            refs = ready | self._placement.host_copies.all()
        return {(ref.name, ref.version): ref for ref in refs}

    def unload(self, name: str, version: int | None, *, in_use: InUse) -> Future[int]:
        """Take a version, or all of a name, from device and host.

        The future gives the number of versions that were in memory. Requests that wait for one of them are
        not its users: they have it loaded anew, unless `in_use` is CANCEL.

        Raises:
            AdapterInUseError: requests use it and `in_use` is REFUSE, or it is pinned or merged.
        """
        self.quarantine.release(name, version)
        return unload(
            self._placement,
            name,
            version,
            in_use,
            cancel_users=self.cancel_users,
            changed=self.on_change,
        )

    def _described(self, ref: AdapterRef, done: Future[None]) -> Future[AdapterInfo]:
        """Where `ref` is once `done` is, or what that failed with."""
        described: Future[AdapterInfo] = Future()
        described.set_running_or_notify_cancel()

        def describe(done: Future[None]) -> None:
            if (error := done.exception()) is not None:
                described.set_exception(error)
            else:
                described.set_result(self.describe(ref))

        done.add_done_callback(describe)
        return described


def _promise() -> Future[None]:
    promise: Future[None] = Future()
    promise.set_running_or_notify_cancel()
    return promise
