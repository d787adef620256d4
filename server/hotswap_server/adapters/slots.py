"""The slots of one method's bank: who has one, who waits for one in turn, and who must make room."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Final

from hotswap_server.adapters.method import MethodAdapter
from hotswap_server.core import AdapterRef
from hotswap_server.errors import HotswapError

PATIENCE: Final = 32
"""How often an adapter that waits may be asked for in vain before another one must make room for it."""


class State(StrEnum):
    """How far a version has come."""

    QUEUED = "queued"  # the store is not asked yet
    FETCHING = "fetching"
    WAITING = "waiting"  # in host memory, in line for a slot
    PLACING = "placing"  # has a slot, which is being filled
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Facts:
    """What is told of an adapter long after its tensors have left host memory."""

    nbytes: int
    num_parameters: int
    details: Mapping[str, str]

    @classmethod
    def of(cls, adapter: MethodAdapter) -> Facts:
        return cls(adapter.nbytes, adapter.num_parameters, adapter.details)


@dataclass(slots=True, eq=False)
class Resident:
    """A version on its way to a slot, or in one."""

    ref: AdapterRef
    state: State = State.QUEUED
    slot: int | None = None
    users: int = 0
    last_used: int = 0
    used: bool = False  # by anyone, since it was placed
    asked: int = 0  # in vain, since it waits for a slot
    pinned: bool = False
    held: bool = False  # it is merged, or about to be
    yielding: bool = False  # its slot is promised to another: nobody new may use it
    leaving: bool = False  # unloaded: nobody new may use it
    adapter: MethodAdapter | None = None  # while it waits and is placed
    leased: bool = False  # the host cache keeps it for that time
    facts: Facts | None = None
    error: HotswapError | None = None
    since: float = field(default_factory=time.monotonic)
    waiting_since: float = 0.0
    on_loaded: list[Future[None]] = field(default_factory=list)
    on_left: list[Future[None]] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        """Whether its slot is not for others to have."""
        return self.pinned or self.held

    @property
    def impatient(self) -> bool:
        """Whether others must make room: it was asked for long enough, or an operator waits for it."""
        return self.asked >= PATIENCE or bool(self.on_loaded) or self.kept


class Slots:
    """`num_slots` slots, and a line in which adapters wait for them: first come, first served.

    Not safe for threads: its owner holds a lock.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.line: OrderedDict[AdapterRef, Resident] = OrderedDict()
        self.queue: OrderedDict[AdapterRef, Resident] = OrderedDict()
        """Before the line: those that the store is to be asked for."""
        self.reopened: list[AdapterRef] = []
        """What was closed to new requests and is so no longer, until somebody takes note."""
        self._free = list(range(num_slots))[::-1]
        self._held: dict[int, Resident] = {}

    @property
    def num_held(self) -> int:
        return len(self._held)

    def take(self, resident: Resident) -> bool:
        """Give `resident` a free slot; False when there is none."""
        if not self._free:
            return False
        resident.slot = self._free.pop()
        self._held[resident.slot] = resident
        return True

    def prefer(self, ref: AdapterRef) -> bool:
        """Put `ref` first where it waits; whether that is in the line."""
        for waiting in (self.line, self.queue):
            if ref in waiting:
                waiting.move_to_end(ref, last=False)
        return ref in self.line

    def give_back(self, resident: Resident) -> None:
        if resident.slot is not None:
            del self._held[resident.slot]
            self._free.append(resident.slot)
            resident.slot = None

    def least_recent(self, wanted: Callable[[AdapterRef], bool]) -> Resident | None:
        """The adapter to evict: idle, waited for by nobody, used least recently."""
        idle = (r for r in self._held.values() if _is_evictable(r) and r.users == 0 and not wanted(r.ref))
        return min(idle, key=lambda resident: resident.last_used, default=None)

    def make_way(self) -> Resident | None:
        """Close as many adapters to new requests as there are impatient ones in line.

        One that is idle is not closed but returned, to be evicted now. Which: the one with the fewest
        requests, the least recently used first; one that nobody used yet, only for who was asked for often.
        """
        impatient = [r for r in islice(self.line.values(), self.num_slots) if r.impatient]
        closed = [resident for resident in self._held.values() if resident.yielding]
        for resident in closed[len(impatient) :]:
            resident.yielding = False
            self.reopened.append(resident.ref)
        for waiting in impatient[len(closed) :]:
            candidates = [
                resident
                for resident in self._held.values()
                if _is_evictable(resident)
                and not resident.yielding
                and (resident.used or waiting.asked >= 4 * PATIENCE)
            ]
            victim = min(candidates, key=lambda resident: (resident.users, resident.last_used), default=None)
            if victim is None:
                return None
            if victim.users == 0:
                return victim
            victim.yielding = True
        return None


def _is_evictable(resident: Resident) -> bool:
    return resident.state is State.READY and not resident.kept and not resident.leaving
