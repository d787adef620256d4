"""The requests of one replica that wait, in the order of arrival.

Those whose adapters are away are passed over. All are one tenant's, so there is no other order that is fair.
"""

from __future__ import annotations

import heapq

from hotswap_server.fleet.tiers import PATIENCE, Resident, Tiers


class Request:
    """One request on its way. `index` is its place in the order of arrival."""

    __slots__ = (
        "adapter",
        "computed",
        "end",
        "index",
        "left",
        "offset",
        "slot",
        "stalled_since",
        "to_compute",
    )

    def __init__(self, index: int, adapter: int, prompt: int, output: int) -> None:
        self.index = index
        self.adapter = adapter
        self.to_compute = prompt  # tokens, before it decodes
        self.computed = 0  # of those
        self.left = output  # tokens to generate, while it does not decode
        self.offset = 0  # of its tokens from the count of decode steps, while it decodes
        self.end = 0  # the count of decode steps at which it has all
        self.slot = False
        self.stalled_since: float | None = None  # its last token, when it was preempted after one


class Waiting:
    """As `engine/waiting.py` and `engine/slots.py`: lanes that lack an adapter are parked until it comes."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._open: list[tuple[int, Request]] = []  # a heap: those that may be tried
        self._parked: dict[int, list[Request]] = {}
        self._line: list[tuple[int, int]] = []  # a heap of parked adapters, by their first requests
        self._in_line: set[int] = set()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, request: Request) -> None:
        """Take in one that has arrived."""
        self._tiers.expect(request.adapter)
        self.put_back(request)

    def put_back(self, request: Request) -> None:
        """Take in one that ran, and keeps its slot."""
        self._size += 1
        heapq.heappush(self._open, (request.index, request))

    def poll(self) -> None:
        """Reopen the lanes of adapters that came, and ask for the first one that waits for a slot."""
        changes, self._tiers.changes = self._tiers.changes, []
        for adapter in changes:
            self._reopen(adapter)
        while self._line:
            adapter = self._line[0][1]
            if adapter in self._in_line:
                if self._tiers.prefer(adapter):
                    if self._tiers.try_acquire(adapter):
                        self._parked[adapter][0].slot = True
                        self._reopen(adapter)
                    return
                self._in_line.discard(adapter)
            heapq.heappop(self._line)

    def head(self) -> Request | None:
        """The first request that has its adapter; it has it until it ends."""
        while self._open:
            request = self._open[0][1]
            if request.slot:
                return request
            parked = self._parked.get(request.adapter)
            if parked is None:
                if self._tiers.try_acquire(request.adapter):
                    request.slot = True
                    return request
                parked = self._parked[request.adapter] = []
                heapq.heappush(self._line, (request.index, request.adapter))
                self._in_line.add(request.adapter)
            parked.append(request)
            heapq.heappop(self._open)
        return None

    def take(self) -> None:
        """The one that `head` gave runs now."""
        heapq.heappop(self._open)
        self._size -= 1

    @property
    def any_open(self) -> bool:
        return bool(self._open)

    @property
    def quiet_polls(self) -> int:
        """How often `poll` may be left out, if nothing else happens; `skip` makes up for it."""
        if self._tiers.changes:
            return 0
        resident = self._asking()
        return 1 << 30 if resident is None else PATIENCE - 1 - resident.asked % PATIENCE

    def skip(self, polls: int) -> None:
        resident = self._asking()
        if resident is not None and polls:
            resident.asked += polls

    def _asking(self) -> Resident | None:
        if self._line and self._line[0][1] in self._in_line:
            return self._tiers.line.get(self._line[0][1])
        return None

    def _reopen(self, adapter: int) -> None:
        self._in_line.discard(adapter)
        for request in self._parked.pop(adapter, ()):
            heapq.heappush(self._open, (request.index, request))
