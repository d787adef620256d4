"""An adapter's way from the store over host memory to a slot, and out again."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import structlog
import torch

from hotswap_server.adapters.deferred import Deferred
from hotswap_server.adapters.host_cache import HostCache
from hotswap_server.adapters.host_copies import HostCopies
from hotswap_server.adapters.loader import Loader
from hotswap_server.adapters.method import AdapterBank, ClearableBank, MethodAdapter
from hotswap_server.adapters.residency import (
    AdapterObserver,
    LoadRecord,
    Residency,
    ResidentAdapter,
    SlotStats,
)
from hotswap_server.adapters.slots import PATIENCE, Facts, Resident, Slots, State
from hotswap_server.adapters.transfer import beside_steps
from hotswap_server.core import AdapterRef
from hotswap_server.errors import (
    AdapterUnloadedError,
    CapacityError,
    DrainingError,
    HotswapError,
)

_FAILURE_SHARED_S = 1.0

_log = structlog.get_logger(__name__)


class Placement:
    """The slots of all methods. A version is known by its digest; nothing here waits.

    A version is read into host memory first and takes a slot only then, so a slow store keeps none occupied.
    Adapters wait for slots in the order in which they came to host memory. What gives way is the least
    recently used one that no request has or waits for; where all are used again and again, one of them is
    closed to new requests until its slot is free.

    `changed` is called, on any thread and without the lock, when something that a request waits for may be
    there. Methods whose names begin with an underscore, and those that say so, need the lock.
    """

    def __init__(
        self,
        banks: Mapping[str, AdapterBank],
        cache: HostCache[MethodAdapter],
        loader: Loader[MethodAdapter],
        observer: AdapterObserver,
        changed: Callable[[], None],
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        self._banks = banks
        self._cache = cache
        self._loader = loader
        self._observer = observer
        self._changed = changed
        self._slots = {name: Slots(bank.num_slots) for name, bank in banks.items()}
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copier")
        self._closed = False
        self._clock = itertools.count(1)
        self._wanted: Counter[AdapterRef] = Counter()  # requests that have no slot yet
        self._changes: dict[AdapterRef, HotswapError | None] = {}  # since the engine asked last
        self._num_swaps: Counter[str] = Counter()  # by method
        self._num_fetching = 0
        self._held_bytes = 0  # of adapters between host memory and a slot
        self._mean_bytes = 0.0
        self._deferred = Deferred(self._fetch)
        self.lock, self.acting = self._deferred.lock, self._deferred.acting
        self.residents: dict[AdapterRef, Resident] = {}
        self.host_copies = HostCopies(cache, lambda ref: observer.evicted(ref, Residency.HOST))

    def close(self) -> None:
        """End the copying, failing who waits for it; the loader must have ended."""
        self._copier.shutdown(wait=True)
        with self.acting():
            self._closed = True
            for resident in list(self.residents.values()):
                self._deferred.settle(
                    resident.on_loaded, DrainingError("the server is shutting down and loads no adapters")
                )

    # What the engine's scheduler asks, see `AdapterResidency`.

    def expect(self, ref: AdapterRef) -> None:
        with self.acting():
            self._wanted[ref] += 1
            self.bring(ref)

    def forget(self, ref: AdapterRef) -> None:
        with self.acting():
            self._unwant(ref)
            resident = self.residents.get(ref)
            if resident is not None and not self._is_needed(resident):
                if resident.state in (State.QUEUED, State.WAITING, State.FAILED):
                    self.leave(resident)
                self.advance(ref.method)

    def try_acquire(self, ref: AdapterRef) -> int | None:
        with self.lock:
            resident = self.residents.get(ref)
            if resident is None:  # nobody expected it
                raise KeyError(ref)
            if resident.state is State.FAILED:
                raise resident.error or CapacityError(f"{ref} could not be loaded")
            if resident.state is State.READY and not resident.leaving and not resident.yielding:
                resident.users += 1
                resident.used = True
                resident.last_used = next(self._clock)
                self._unwant(ref)
                return resident.slot
            if resident.state is not State.WAITING:
                return None
            resident.asked += 1
            if resident.asked % PATIENCE:
                return None
        with self.acting():
            self.advance(ref.method)
        return None

    def prefer(self, ref: AdapterRef) -> bool:
        with self.lock:
            return self._slots[ref.method].prefer(ref)

    def take_changes(self) -> dict[AdapterRef, HotswapError | None]:
        with self.lock:
            changes, self._changes = self._changes, {}
            for slots in self._slots.values():
                changes |= dict.fromkeys(slots.reopened)
                slots.reopened.clear()
        return changes

    def release(self, ref: AdapterRef) -> None:
        with self.acting():
            resident = self.residents[ref]
            resident.users -= 1
            if resident.users == 0:
                if resident.leaving or resident.yielding:
                    self.leave(resident)
                self.advance(ref.method)
                self._deferred.later(self._changed)

    # What the manager asks, holding the lock.

    def bring(
        self,
        ref: AdapterRef,
        *,
        pinned: bool = False,
        held: bool = False,
        loaded: Future[None] | None = None,
    ) -> Resident:
        """The entry of `ref`, whose way is begun if it is on none. `loaded` is settled once it has a slot."""
        resident = self.residents.get(ref)
        if resident is not None and resident.state is State.FAILED:
            # Those that wait share a failure; who comes later asks the loader, which remembers lasting ones.
            old = time.monotonic() - resident.since > _FAILURE_SHARED_S
            resident = None if old or loaded is not None else resident
        begun = resident is None
        if resident is None:
            resident = self.residents[ref] = Resident(ref)
        if pinned or held:
            resident.pinned, resident.held = resident.pinned or pinned, resident.held or held
            resident.yielding = False
            self._note(ref)
        if loaded is not None:
            resident.on_loaded.append(loaded)
        if begun:
            self._begin(resident)
        elif resident.state is State.READY:
            self._deferred.settle(resident.on_loaded)
        if pinned or loaded is not None:
            self.advance(ref.method)
        return resident

    def leave(self, resident: Resident) -> None:
        """Forget a version that no request has and that no thread works on."""
        ref = resident.ref
        if self.residents.get(ref) is resident:
            del self.residents[ref]
        self._slots[ref.method].queue.pop(ref, None)
        self._slots[ref.method].line.pop(ref, None)
        self._let_go(resident)
        if resident.slot is not None:
            self._num_swaps[ref.method] += not resident.leaving
            self._empty(resident)
            self._deferred.later(lambda: self._observer.evicted(ref, Residency.DEVICE))
        self._deferred.settle(
            resident.on_loaded, AdapterUnloadedError(f"{ref} was unloaded before it was loaded")
        )
        if resident.on_left:
            self.host_copies.drop(ref)
            self._loader.forget_failure(ref.digest)
            self._deferred.settle(resident.on_left)
        if self._wanted[ref]:
            self.bring(ref)
            self._note(ref)

    def advance(self, method: str) -> None:
        """Give slots to who is first in line, from those that are free or used by nobody."""
        slots = self._slots[method]
        while slots.line:
            first = next(iter(slots.line.values()))
            if slots.take(first):
                del slots.line[first.ref]
                first.state = State.PLACING
                self._submit(self._place, first)
                continue
            victim = slots.least_recent(lambda ref: self._wanted[ref] > 0) or slots.make_way()
            if victim is None:
                return
            self.leave(victim)
        slots.make_way()

    def matching(self, name: str, version: int | None) -> list[Resident]:
        """The entries of a version, or of all of a name, failed ones left out."""
        return [
            resident
            for resident in self.residents.values()
            if resident.ref.name == name
            and version in (None, resident.ref.version)
            and resident.state is not State.FAILED
        ]

    def unpin(self, resident: Resident) -> None:
        resident.pinned = False
        self._not_kept(resident)

    def let_go(self, ref: AdapterRef) -> None:
        resident = self.residents[ref]
        resident.held = False
        self._not_kept(resident)

    def _not_kept(self, resident: Resident) -> None:
        if resident.state in (State.QUEUED, State.WAITING) and not self._is_needed(resident):
            self.leave(resident)
        self.advance(resident.ref.method)

    def num_pinned(self, method: str) -> int:
        return sum(resident.pinned for resident in self.residents.values() if resident.ref.method == method)

    # What those who measure ask; see `Lender`.

    def borrow(self, ref: AdapterRef) -> int | None:
        """The slot of an adapter that is there, which stays until `release`. It does not count as a use."""
        with self.lock:
            resident = self.residents.get(ref)
            if resident is None or resident.state is not State.READY:
                return None
            if resident.leaving or resident.yielding:
                return None
            resident.users += 1
            return resident.slot

    def take_free(self, method: str, refs: Iterable[AdapterRef]) -> list[Resident]:
        """Free slots for adapters that nobody else knows, no more than half of them, or the only one."""
        slots = self._slots[method]
        with self.lock:
            free = slots.num_slots - slots.num_held
            taken = [Resident(ref, State.PLACING) for ref in islice(refs, max(free // 2, min(free, 1)))]
            return [resident for resident in taken if slots.take(resident)]

    def fill(self, resident: Resident, adapter: MethodAdapter) -> Future[None]:
        """Copy an adapter to a slot that was taken so."""
        return self._copier.submit(self._put, resident, adapter)

    def give_back(self, residents: Iterable[Resident]) -> None:
        with self.acting():
            for resident in residents:
                self._empty(resident)
                self.advance(resident.ref.method)

    # What anyone may ask.

    def slot_stats(self) -> dict[str, SlotStats]:
        """By method."""
        with self.lock:
            underway = Counter(
                resident.ref.method
                for resident in self.residents.values()
                if resident.state not in (State.READY, State.FAILED)
            )
            return {
                name: SlotStats(
                    slots.num_held,
                    slots.num_slots,
                    self.num_pinned(name),
                    underway[name],
                    self._num_swaps[name],
                )
                for name, slots in self._slots.items()
            }

    def adapters_in_memory(self) -> list[ResidentAdapter]:
        """What lies in host memory and what is ready on the device."""
        found = []
        with self.lock:
            for ref in self.host_copies.all():
                if (adapter := self._cache.peek(ref.digest)) is not None:
                    found.append(ResidentAdapter(ref, Residency.HOST, adapter.nbytes))
            for ref, resident in self.residents.items():
                if resident.state is State.READY:
                    nbytes = 0 if resident.facts is None else resident.facts.nbytes
                    found.append(ResidentAdapter(ref, Residency.DEVICE, nbytes))
        return found

    def users(self) -> int:
        """Requests that hold a slot now."""
        with self.lock:
            return sum(resident.users for resident in self.residents.values())

    # The way to a slot.

    def _begin(self, resident: Resident) -> None:
        if not self._line_up_cached(resident):
            self._slots[resident.ref.method].queue[resident.ref] = resident

    def _fetch(self) -> None:
        """Ask the loader for what is queued, while what waits for slots leaves room in host memory."""
        for slots in self._slots.values():
            while slots.queue:
                expected = self._held_bytes + (self._num_fetching + 1) * self._mean_bytes
                if expected > self._cache.budget_bytes / 2 and (slots.line or self._num_fetching > 1):
                    break
                _, resident = slots.queue.popitem(last=False)
                if self._line_up_cached(resident):
                    continue
                resident.state = State.FETCHING
                self._num_fetching += 1
                # Never on the calling thread, where a future that is done would call back at once.
                self._loader.load(resident.ref).add_done_callback(
                    lambda future, resident=resident: self._submit(self._fetched, resident, future)  # type: ignore[misc]
                )

    def _fetched(self, resident: Resident, future: Future[MethodAdapter]) -> None:
        error = future.exception()
        with self.acting():
            self._num_fetching -= 1
            if error is not None:
                self._fail(resident, error)
            else:
                adapter = future.result()
                self.host_copies.note(resident.ref)
                self._mean_bytes += (adapter.nbytes - self._mean_bytes) / 8
                if resident.leaving or not self._is_needed(resident):
                    self.leave(resident)
                else:
                    self._line_up(resident, adapter)

    def _line_up_cached(self, resident: Resident) -> bool:
        """Line up what is in host memory already."""
        digest = resident.ref.digest
        adapter = self._cache.get(digest) if digest in self._cache else None
        if adapter is not None:
            self._line_up(resident, adapter)
        return adapter is not None

    def _line_up(self, resident: Resident, adapter: MethodAdapter) -> None:
        self.host_copies.note(resident.ref)
        resident.state, resident.adapter = State.WAITING, adapter
        resident.facts = Facts.of(adapter)
        resident.leased = self._cache.pin(resident.ref.digest) is not None
        resident.waiting_since = time.monotonic()
        self._held_bytes += adapter.nbytes
        self._slots[resident.ref.method].line[resident.ref] = resident
        self._note(resident.ref)
        self.advance(resident.ref.method)

    def _place(self, resident: Resident) -> None:
        """On the copying thread. The slot is this adapter's alone, so the bank is filled outside the lock."""
        began = time.monotonic()
        error: Exception | None = None
        try:
            self._put(resident, resident.adapter)
        except torch.OutOfMemoryError:
            error = CapacityError(
                f"{resident.ref} does not fit into the device's memory; start the server with fewer "
                "--adapter-slots, or a smaller --max-lora-rank"
            )
        except Exception as failure:
            error = failure
        with self.acting():
            self._let_go(resident)
            if error is not None:
                self._empty(resident)
                self._fail(resident, error)
            else:
                resident.state = State.READY
                resident.last_used = next(self._clock)
                self._note(resident.ref)
                self._deferred.settle(resident.on_loaded)
                now = time.monotonic()
                record = LoadRecord(resident.ref, now - resident.since, began - resident.waiting_since)
                self._deferred.later(lambda: self._observer.loaded(record))
                if resident.leaving:
                    self.leave(resident)
            self.advance(resident.ref.method)
            self._deferred.later(self._changed)

    def _put(self, resident: Resident, adapter: MethodAdapter | None) -> None:
        with beside_steps(self._device):
            self._banks[resident.ref.method].put(resident.slot or 0, adapter)

    def _fail(self, resident: Resident, error: BaseException) -> None:
        ref = resident.ref
        if not isinstance(error, HotswapError):
            _log.error("adapter_not_loaded", adapter=str(ref), exc_info=error)
            error = HotswapError(f"{ref} could not be loaded: {type(error).__name__}")
        failure = error
        resident.state, resident.error, resident.since = State.FAILED, failure, time.monotonic()
        resident.pinned = resident.held = False
        self._note(ref, failure)
        self._deferred.settle(resident.on_loaded, failure)
        self._deferred.later(lambda: self._observer.failed(ref, failure))
        self._deferred.later(self._changed)
        if resident.leaving or not self._wanted[ref]:
            self.leave(resident)

    def _note(self, ref: AdapterRef, error: HotswapError | None = None) -> None:
        """Something for the engine, if it waits for `ref`."""
        if self._wanted[ref] > 0:
            self._changes[ref] = error

    def _let_go(self, resident: Resident) -> None:
        """Of the copy in host memory, which it needs no longer."""
        if resident.adapter is not None:
            self._held_bytes -= resident.adapter.nbytes
            resident.adapter = None
        if resident.leased:
            self._cache.unpin(resident.ref.digest)
            resident.leased = False

    def _empty(self, resident: Resident) -> None:
        bank = self._banks[resident.ref.method]
        if isinstance(bank, ClearableBank) and resident.slot is not None:
            bank.clear(resident.slot)
        self._slots[resident.ref.method].give_back(resident)

    def _is_needed(self, resident: Resident) -> bool:
        return self._wanted[resident.ref] > 0 or bool(resident.on_loaded) or resident.kept

    def _unwant(self, ref: AdapterRef) -> None:
        self._wanted[ref] -= 1
        if self._wanted[ref] <= 0:
            del self._wanted[ref]

    def _submit(self, call: Callable[..., None], *args: object) -> None:
        def guarded() -> None:
            try:
                call(*args)
            except Exception:
                _log.exception("placement_failed")

        if not self._closed:
            self._copier.submit(guarded)
