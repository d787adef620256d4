"""Lanes: what one tenant wants of one adapter; and the line in which lanes wait for slots."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from hotswap_server.core import AdapterRef
from hotswap_server.engine.fairness import Account, FairnessOptions, VirtualTokenCounter
from hotswap_server.engine.sequence import Sequence

_ticks = itertools.count()


class LaneState(Enum):
    """Whether a lane's first request may be tried, and if not, why."""

    OPEN = auto()
    NO_SLOT = auto()  # its adapter waits for a slot
    COMING = auto()  # its adapter is being read, or put into its slot


@dataclass(slots=True, eq=False)
class Lane:
    """What one tenant wants of one adapter, the oldest first."""

    tenant: Tenant
    adapter: AdapterRef | None
    state: LaneState = LaneState.OPEN
    entries: list[tuple[int, Sequence]] = field(default_factory=list)  # a heap; those that left are in it too
    size: int = 0
    num_tokens: int = 0  # of the prompts in it
    without_adapter: float = 0.0  # seconds
    without_adapter_since: float | None = None
    queued_as: int | None = None  # its key in the heap that it is in
    lined_up: bool = False  # for a slot, since its last request got one
    slot_charged: bool = False  # for the one that it lined up for


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant's lanes and counts."""

    account: Account
    lanes: dict[AdapterRef | None, Lane] = field(default_factory=dict)
    open: LaneHeap = field(default_factory=list)
    num_waiting: int = 0
    waiting_tokens: int = 0  # of the prompts that wait
    num_running: int = 0


LaneHeap = list[tuple[int, int, Lane]]
"""Lanes by the order of their first requests. What is not valid any more is dropped when it comes up."""


def push_lane(heap: LaneHeap, lane: Lane, order: int) -> None:
    """Put a lane in whose first request has `order`."""
    lane.queued_as = order
    heapq.heappush(heap, (order, next(_ticks), lane))


def first_lane(heap: LaneHeap, state: LaneState, head: Callable[[Lane], Sequence]) -> Lane | None:
    """The first lane of `heap` that is in `state`."""
    while heap:
        order, _, lane = heap[0]
        if lane.state is not state or lane.size == 0 or lane.queued_as != order:
            heapq.heappop(heap)
        elif (now := head(lane).order) != order:
            lane.queued_as = now
            heapq.heapreplace(heap, (now, next(_ticks), lane))
        else:
            return lane
    return None


class SlotLine:
    """Lanes that wait for a slot of one method: of the tenant that was given the fewest, the oldest.

    Slots have a count of their own. By the tokens it was served a tenant that is busy with one adapter would
    for ever come after others with another one.
    """

    def __init__(self, options: FairnessOptions, head: Callable[[Lane], Sequence]) -> None:
        self._counter = VirtualTokenCounter(FairnessOptions(1.0, tenant_weights=options.tenant_weights))
        self._head = head
        self._heaps: dict[str, LaneHeap] = {}

    def __bool__(self) -> bool:
        return bool(self._heaps)

    def add(self, lane: Lane, order: int) -> None:
        """Line up a lane whose first request has `order`."""
        name = lane.tenant.account.tenant
        lane.lined_up = True
        push_lane(self._heaps.setdefault(name, []), lane, order)
        self._counter.activate(self._counter.account(name))

    def first(self) -> Lane | None:
        """The lane that gets the next slot."""
        while (account := self._counter.first()) is not None:
            lane = first_lane(self._heaps[account.tenant], LaneState.NO_SLOT, self._head)
            if lane is not None:
                return lane
            del self._heaps[account.tenant]
            self._counter.close(account)
            self._counter.forget(self._heaps)
        self._counter.reset()
        return None

    def charge(self, lane: Lane) -> None:
        """A slot is on its way to `lane`: once, however often it comes back before it has it."""
        if lane.lined_up and not lane.slot_charged:
            lane.slot_charged = True
            account = self._counter.account(lane.tenant.account.tenant)
            self._counter.charge(account, input_tokens=1)
            if account.tenant not in self._heaps:
                self._counter.close(account)
                self._counter.forget(self._heaps)
