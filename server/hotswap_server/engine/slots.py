"""Slots for the requests whose turn it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from hotswap_server.core import AdapterRef
from hotswap_server.engine.lanes import Lane, LaneState
from hotswap_server.engine.prefixes import PrefixPages
from hotswap_server.engine.sequence import Sequence
from hotswap_server.engine.waiting import WaitingQueue
from hotswap_server.errors import HotswapError


class AdapterResidency(Protocol):
    """Where the engine gets slots from; never waits.

    Each request is told of once by `expect`, which a successful `try_acquire` or a `forget` ends.
    """

    def expect(self, ref: AdapterRef) -> None:
        """A request will ask for `ref`: have it brought, and do not let it be evicted before that."""
        ...

    def try_acquire(self, ref: AdapterRef) -> int | None:
        """A slot that holds `ref`, kept until `release`; None while it is not there.

        One that is asked for again and again gets a slot in the end, from an adapter that others keep using.

        Raises:
            HotswapError: it cannot be loaded.
        """
        ...

    def prefer(self, ref: AdapterRef) -> bool:
        """Have `ref`, which is expected, get the next slot of its method; False if it does not wait for one.

        It does not while it is read, and once a slot is promised to it or it has one.
        """
        ...

    def take_changes(self) -> Mapping[AdapterRef, HotswapError | None]:
        """Expected adapters with which something has happened since the last call: they came, or came to
        wait for a slot, or with an error failed to come."""
        ...

    def forget(self, ref: AdapterRef) -> None:
        """A request that `expect` told of has ended without a slot."""
        ...

    def release(self, ref: AdapterRef) -> None: ...


class SlotKeeper:
    """Gives slots to the first requests of lanes, and parks the lanes that must wait for their adapters.

    A lane that is parked delays no other. Of those without a slot the first in line is asked for at every
    step, so that it comes next, and so that adapters which others use all the time make room for it: no
    stream of requests keeps a slot for ever.
    """

    def __init__(self, adapters: AdapterResidency, waiting: WaitingQueue, prefixes: PrefixPages) -> None:
        self._adapters = adapters
        self._waiting = waiting
        self._prefixes = prefixes

    def expect(self, sequence: Sequence) -> None:
        """A request has come that will need a slot. On any thread; the second time nothing happens."""
        if sequence.request.adapter is not None and not sequence.expected:
            sequence.expected = True
            self._adapters.expect(sequence.request.adapter)

    def acquire(self, lane: Lane) -> bool:
        """A slot for the first request of `lane`; otherwise the lane is parked.

        Raises:
            HotswapError: its adapter cannot be loaded.
        """
        sequence, ref = self._waiting.head(lane), lane.adapter
        if ref is None or sequence.slot is not None:
            return True
        slot = self._adapters.try_acquire(ref)
        if slot is None:
            self._waiting.park(lane, LaneState.NO_SLOT)
            return False
        self._waiting.slot_line(ref.method).charge(lane)
        lane.lined_up = lane.slot_charged = False
        sequence.slot = slot
        sequence.prefix = self._prefixes.placed(sequence.method, slot)
        return True

    def poll(self) -> list[tuple[Lane, HotswapError]]:
        """Reopen the lanes whose adapters have come; gives those whose adapters failed.

        Looks at what has changed, and for each method at the first lane without a slot.
        """
        failed: list[tuple[Lane, HotswapError]] = []
        for ref, error in self._adapters.take_changes().items():
            tenant = self._waiting.tenants.get(ref.tenant)
            lane = None if tenant is None else tenant.lanes.get(ref)
            if lane is not None and lane.state is not LaneState.OPEN:
                self._waiting.reopen(lane)
                if error is not None:
                    failed.append((lane, error))
        for method in self._waiting.methods_without_slot:
            line = self._waiting.slot_line(method)
            while (waiter := line.first()) is not None and waiter.adapter:
                if self._adapters.prefer(waiter.adapter):
                    try:
                        if self.acquire(waiter):
                            self._waiting.reopen(waiter)
                    except HotswapError as error:
                        self._waiting.reopen(waiter)
                        failed.append((waiter, error))
                    break
                line.charge(waiter)
                self._waiting.park(waiter, LaneState.COMING)
        return failed

    def release(self, sequence: Sequence) -> None:
        """A request has ended, with a slot or without."""
        ref = sequence.request.adapter
        if ref is None:
            return
        if sequence.slot is None:
            self._adapters.forget(ref)
        else:
            sequence.slot = None
            self._adapters.release(ref)
