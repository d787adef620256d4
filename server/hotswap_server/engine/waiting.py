"""Requests that wait: a line for each tenant, in it a lane for each adapter."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable

from hotswap_server.engine.fairness import FairnessOptions, VirtualTokenCounter
from hotswap_server.engine.lanes import Lane, LaneState, SlotLine, Tenant, first_lane, push_lane
from hotswap_server.engine.sequence import Sequence


class WaitingQueue:
    """All requests that wait. `first` and every change cost the logarithm of what waits, at most.

    A lane that cannot go on is parked, and looked at again only when `reopen` is called for it: the cost of a
    step does not depend on how many wait.
    """

    def __init__(
        self, options: FairnessOptions | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._options = options or FairnessOptions()
        self._clock = clock
        self.counter = VirtualTokenCounter(self._options)
        self.tenants: dict[str, Tenant] = {}
        self.num_tokens = 0
        """Tokens of the prompts that wait."""
        self.num_started = 0
        """Requests that have begun since the start."""
        self._lanes: dict[Sequence, Lane] = {}
        self._slot_lines: dict[str, SlotLine] = {}
        self._orders = itertools.count(1)

    def __len__(self) -> int:
        return len(self._lanes)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._lanes

    def tenant(self, sequence: Sequence) -> Tenant:
        """The tenant of a request that waits or runs."""
        return self.tenants[sequence.tenant]

    def add(self, sequence: Sequence) -> None:
        """Take in a request that has just arrived."""
        sequence.order = next(self._orders)
        self._push(self._open_tenant(sequence.tenant), sequence)

    def remove(self, sequence: Sequence) -> None:
        """A request that waits is gone."""
        self._leave(self._pop(sequence).tenant)

    def start(self, sequence: Sequence) -> float:
        """A request that waits runs now; the seconds of its waiting that were for its adapter."""
        lane = self._pop(sequence)
        lane.tenant.num_running += 1
        sequence.service_before = lane.tenant.account.service
        if not sequence.charged:
            # Once: what is computed again after a preemption is nothing that the tenant has got.
            sequence.charged = True
            self.counter.charge(lane.tenant.account, input_tokens=sequence.num_prompt_tokens)
            self.num_started += 1
        self._refresh(lane.tenant)
        return self._time_without_adapter(lane) - sequence.lane_time

    def put_back(self, sequence: Sequence) -> None:
        """A request that ran waits again, and is older than those that arrived after it."""
        tenant = self.tenants[sequence.tenant]
        tenant.num_running -= 1
        self._push(tenant, sequence)

    def finish(self, sequence: Sequence) -> None:
        """A request that ran is gone."""
        tenant = self.tenants[sequence.tenant]
        tenant.num_running -= 1
        self._refresh(tenant)
        self._leave(tenant)

    def first(self) -> Lane | None:
        """The lane whose turn it is; its first request is `head`."""
        account = self.counter.first()
        return None if account is None else self._first_lane(self.tenants[account.tenant])

    def head(self, lane: Lane) -> Sequence:
        """The oldest request of a lane that has one."""
        while lane.entries[0][1] not in self._lanes:
            heapq.heappop(lane.entries)
        return lane.entries[0][1]

    def sequences(self, lane: Lane) -> list[Sequence]:
        """All requests of a lane, the oldest first."""
        return [sequence for _, sequence in sorted(lane.entries) if sequence in self._lanes]

    def latest(self, tenant: Tenant) -> list[Sequence]:
        """What waits of a tenant and has never run, the latest first."""
        waiting = [s for lane in tenant.lanes.values() for s in self.sequences(lane) if not s.charged]
        return sorted(waiting, key=lambda sequence: -sequence.order)

    def park(self, lane: Lane, state: LaneState) -> None:
        """Pass a lane over until it is reopened."""
        self._change(lane, state)
        self._enqueue(lane)
        self._refresh(lane.tenant)

    def reopen(self, lane: Lane) -> None:
        self._change(lane, LaneState.OPEN)
        self._enqueue(lane)
        self._refresh(lane.tenant)

    def slot_line(self, method: str) -> SlotLine:
        """The lanes that wait for a slot of a method."""
        line = self._slot_lines.get(method)
        if line is None:
            line = self._slot_lines[method] = SlotLine(self._options, self.head)
        return line

    @property
    def methods_without_slot(self) -> list[str]:
        """Methods of which some lane may wait for a slot."""
        return [method for method, line in self._slot_lines.items() if line]

    def _open_tenant(self, name: str) -> Tenant:
        tenant = self.tenants.get(name)
        if tenant is None:
            tenant = self.tenants[name] = Tenant(self.counter.account(name))
        return tenant

    def _push(self, tenant: Tenant, sequence: Sequence) -> None:
        lane = tenant.lanes.get(sequence.request.adapter)
        if lane is None:
            lane = tenant.lanes[sequence.request.adapter] = Lane(tenant, sequence.request.adapter)
        heapq.heappush(lane.entries, (sequence.order, sequence))
        self._lanes[sequence] = lane
        lane.size += 1
        lane.num_tokens += sequence.num_prompt_tokens
        tenant.num_waiting += 1
        tenant.waiting_tokens += sequence.num_prompt_tokens
        self.num_tokens += sequence.num_prompt_tokens
        sequence.lane_time = self._time_without_adapter(lane)
        if sequence.slot is not None:
            self._change(lane, LaneState.OPEN)
        self._enqueue(lane)
        self._refresh(tenant)

    def _pop(self, sequence: Sequence) -> Lane:
        lane = self._lanes.pop(sequence)
        tenant = lane.tenant
        lane.size -= 1
        lane.num_tokens -= sequence.num_prompt_tokens
        tenant.num_waiting -= 1
        tenant.waiting_tokens -= sequence.num_prompt_tokens
        self.num_tokens -= sequence.num_prompt_tokens
        if lane.size == 0:
            self._change(lane, LaneState.OPEN)
            del tenant.lanes[lane.adapter]
            lane.entries.clear()
        elif len(lane.entries) > 2 * lane.size + 16:
            lane.entries = [entry for entry in lane.entries if entry[1] in self._lanes]
            heapq.heapify(lane.entries)
        self._refresh(tenant)
        return lane

    def _first_lane(self, tenant: Tenant) -> Lane | None:
        return first_lane(tenant.open, LaneState.OPEN, self.head)

    def _enqueue(self, lane: Lane) -> None:
        """Put a lane into the heap of its state, unless it is there already."""
        if lane.size == 0 or lane.state is LaneState.COMING:
            return
        order = self.head(lane).order
        # One whose head left has a key that is too low, which `first_lane` sees to.
        if lane.queued_as is not None and order >= lane.queued_as:
            return
        if lane.state is LaneState.OPEN:
            push_lane(lane.tenant.open, lane, order)
        elif lane.adapter is not None:
            self.slot_line(lane.adapter.method).add(lane, order)

    def _change(self, lane: Lane, state: LaneState) -> None:
        if lane.state is state:
            return
        lane.without_adapter = self._time_without_adapter(lane)
        lane.without_adapter_since = None if state is LaneState.OPEN else self._clock()
        lane.state = state
        lane.queued_as = None

    def _time_without_adapter(self, lane: Lane) -> float:
        since = lane.without_adapter_since
        return lane.without_adapter + (0.0 if since is None else self._clock() - since)

    def _refresh(self, tenant: Tenant) -> None:
        """Bring the tenant's place in the line up to date."""
        limit = self._options.max_running_per_tenant
        may_run = limit is None or tenant.num_running < limit
        if may_run and self._first_lane(tenant) is not None:
            self.counter.activate(tenant.account)
        else:
            self.counter.deactivate(tenant.account)

    def _leave(self, tenant: Tenant) -> None:
        if tenant.num_waiting or tenant.num_running:
            return
        del self.tenants[tenant.account.tenant]
        self.counter.close(tenant.account)
        if self.tenants:
            self.counter.forget(self.tenants)
        else:
            self.counter.reset()
            self._slot_lines.clear()
