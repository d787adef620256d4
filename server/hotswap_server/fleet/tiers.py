"""One replica's adapters: store, host memory, slots. The rules are those of `adapters/placement.py`."""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterable
from enum import IntEnum
from typing import Final

PATIENCE: Final = 32
"""As in `adapters/slots.py`: so often an adapter asks in vain before another one must make room for it."""


class State(IntEnum):
    QUEUED = 0  # the store is not asked yet
    FETCHING = 1
    WAITING = 2  # in host memory, in line for a slot
    PLACING = 3
    READY = 4


class Resident:
    """An adapter on its way to a slot, or in one."""

    __slots__ = ("asked", "last_used", "state", "used", "users", "yielding")

    def __init__(self) -> None:
        self.state = State.QUEUED
        self.users = 0
        self.last_used = 0
        self.used = False
        self.asked = 0
        self.yielding = False


class Tiers:
    """Adapters by number. All take the same bytes, so host memory holds `host_entries` of them.

    `changes` collects adapters with which something has happened that a request may wait for.
    """

    def __init__(
        self, slots: int, host_entries: int, workers: int, load_seconds: float, swap_seconds: float
    ) -> None:
        self._num_slots = slots
        self._host_entries = host_entries
        self._load_seconds = load_seconds
        self._swap_seconds = swap_seconds
        self._workers_free = [0.0] * workers
        self._copier_free = 0.0
        self._clock = itertools.count(1)
        self._order = itertools.count()
        self._events: list[tuple[float, int, int]] = []  # when, tie-breaker, adapter
        self._wanted: dict[int, int] = {}
        self._held: dict[int, Resident] = {}
        self._queue: OrderedDict[int, Resident] = OrderedDict()
        self._host: OrderedDict[int, None] = OrderedDict()
        self._leased: set[int] = set()
        self._num_fetching = 0
        self._now = 0.0
        self.residents: dict[int, Resident] = {}
        self.line: OrderedDict[int, Resident] = OrderedDict()
        self.changes: list[int] = []
        self.loaded_at: list[float] = []
        self.placed_at: list[float] = []

    def fill(self, adapters: Iterable[int]) -> None:
        """Be as after requests for these, one after another."""
        for adapter in adapters:
            self._to_host(adapter)
            if len(self._held) >= self._num_slots:
                oldest = next(iter(self._held))
                del self._held[oldest], self.residents[oldest]
            resident = self._held[adapter] = self.residents[adapter] = Resident()
            resident.state, resident.used, resident.last_used = State.READY, True, next(self._clock)

    @property
    def next_event(self) -> float:
        """When a load or a copy ends next."""
        return self._events[0][0] if self._events else float("inf")

    def advance_to(self, now: float) -> None:
        """Let happen what does until `now`."""
        while self._events and self._events[0][0] <= now:
            self._now, _, adapter = heapq.heappop(self._events)
            resident = self.residents[adapter]
            if resident.state is State.FETCHING:
                self._num_fetching -= 1
                self.loaded_at.append(self._now)
                self._to_host(adapter)
                self._line_up(adapter, resident)
            else:
                self._placed(adapter, resident)
            self._fetch()
        self._now = now

    def expect(self, adapter: int) -> None:
        """A request will need `adapter`."""
        self._wanted[adapter] = self._wanted.get(adapter, 0) + 1
        if adapter not in self.residents:
            self._bring(adapter)
            self._fetch()

    def try_acquire(self, adapter: int) -> bool:
        """Whether a request has the adapter's slot now, until `release`."""
        resident = self.residents[adapter]
        if resident.state is State.READY and not resident.yielding:
            resident.users += 1
            resident.used = True
            resident.last_used = next(self._clock)
            left = self._wanted[adapter] - 1
            if left:
                self._wanted[adapter] = left
            else:
                del self._wanted[adapter]
            return True
        if resident.state is State.WAITING:
            self.ask(resident, 1)
        return False

    def ask(self, resident: Resident, times: int) -> None:
        """An adapter that waits for a slot was asked for in vain."""
        before = resident.asked // PATIENCE
        resident.asked += times
        if resident.asked // PATIENCE > before:
            self._advance()
            self._fetch()

    def prefer(self, adapter: int) -> bool:
        """Have the adapter get the next slot; whether it waits for one."""
        for waiting in (self.line, self._queue):
            if adapter in waiting:
                waiting.move_to_end(adapter, last=False)
        return adapter in self.line

    def release(self, adapter: int) -> None:
        resident = self.residents[adapter]
        resident.users -= 1
        if resident.users == 0:
            if resident.yielding:
                self._leave(adapter)
            self._advance()
            self._fetch()

    def _bring(self, adapter: int) -> None:
        resident = self.residents[adapter] = Resident()
        if adapter in self._host:
            self._line_up(adapter, resident)
        else:
            self._queue[adapter] = resident

    def _fetch(self) -> None:
        """Ask the store, while what waits for slots leaves room in host memory."""
        while self._queue:
            expected = len(self._leased) + self._num_fetching + 1
            if expected > self._host_entries / 2 and (self.line or self._num_fetching > 1):
                break
            adapter, resident = self._queue.popitem(last=False)
            resident.state = State.FETCHING
            self._num_fetching += 1
            began = max(self._now, heapq.heappop(self._workers_free))
            heapq.heappush(self._workers_free, began + self._load_seconds)
            self._at(began + self._load_seconds, adapter)

    def _to_host(self, adapter: int) -> None:
        """Least recently used first out, never one that is on its way to a slot."""
        if adapter in self._host:
            self._host.move_to_end(adapter)
            return
        if len(self._leased) + 1 > self._host_entries:
            return  # it goes to its slot all the same
        while len(self._host) >= self._host_entries:
            del self._host[next(other for other in self._host if other not in self._leased)]
        self._host[adapter] = None

    def _line_up(self, adapter: int, resident: Resident) -> None:
        if adapter in self._host:
            self._host.move_to_end(adapter)
            self._leased.add(adapter)
        resident.state = State.WAITING
        self.line[adapter] = resident
        self.changes.append(adapter)
        self._advance()

    def _advance(self) -> None:
        while self.line:
            adapter, resident = next(iter(self.line.items()))
            if len(self._held) < self._num_slots:
                del self.line[adapter]
                self._held[adapter] = resident
                resident.state = State.PLACING
                self._copier_free = max(self._now, self._copier_free) + self._swap_seconds
                self._at(self._copier_free, adapter)
                continue
            victim = self._least_recent()
            if victim is None:
                victim = self._make_way()
            if victim is None:
                return
            self._leave(victim)
        self._make_way()

    def _placed(self, adapter: int, resident: Resident) -> None:
        self._leased.discard(adapter)
        self.placed_at.append(self._now)
        resident.state = State.READY
        resident.last_used = next(self._clock)
        self.changes.append(adapter)
        self._advance()

    def _leave(self, adapter: int) -> None:
        del self.residents[adapter], self._held[adapter]
        if adapter in self._wanted:
            self._bring(adapter)
            self.changes.append(adapter)

    def _least_recent(self) -> int | None:
        found, when = None, 0
        for adapter, resident in self._held.items():
            idle = resident.state is State.READY and resident.users == 0 and adapter not in self._wanted
            if idle and (found is None or resident.last_used < when):
                found, when = adapter, resident.last_used
        return found

    def _make_way(self) -> int | None:
        """Close as many adapters to new requests as impatient ones wait; an idle one is to leave now."""
        impatient = [
            resident
            for resident in itertools.islice(self.line.values(), self._num_slots)
            if resident.asked >= PATIENCE
        ]
        closed = [(adapter, resident) for adapter, resident in self._held.items() if resident.yielding]
        for adapter, resident in closed[len(impatient) :]:
            resident.yielding = False
            self.changes.append(adapter)
        for waiting in impatient[len(closed) :]:
            candidates = [
                (resident.users, resident.last_used, adapter)
                for adapter, resident in self._held.items()
                if resident.state is State.READY
                and not resident.yielding
                and (resident.used or waiting.asked >= 4 * PATIENCE)
            ]
            if not candidates:
                return None
            users, _, victim = min(candidates)
            if users == 0:
                return victim
            self._held[victim].yielding = True
        return None

    def _at(self, when: float, adapter: int) -> None:
        heapq.heappush(self._events, (when, next(self._order), adapter))
