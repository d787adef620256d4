"""One replica: continuous batching under the rules of `engine/scheduler.py`, for requests of one tenant.

Time goes from step to step. Where nothing can change for some steps, as while all that run decode and nobody
can join, those steps are computed at once.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from hotswap_server.fleet.arrivals import Arrivals, Floats, Ints
from hotswap_server.fleet.costs import Costs
from hotswap_server.fleet.options import PAGE_TOKENS, Fleet, FleetError
from hotswap_server.fleet.tiers import Tiers
from hotswap_server.fleet.waiting import Request, Waiting

_MANY: Final = 12  # steps from which numpy is quicker than a loop
_BLOCK: Final = 4096
_NEVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class ReplicaRun:
    """Times in seconds. `first` and `last` are those of a request's tokens, nan where it was refused.

    Of each step: when it ended, how long it took, and for how many requests that was the time between two
    tokens. `stalls` are such times of requests that were preempted between, with their ends before them.
    """

    first: Floats
    last: Floats
    step_ends: Floats
    step_seconds: Floats
    step_rows: Ints
    stalls: Floats  # [n, 2]
    loaded_at: Floats
    placed_at: Floats
    preemptions: int


class Replica:
    """`run` takes it from the first arrival to the last token.

    `warm` are adapters that were asked for before, in this order.
    """

    def __init__(
        self, costs: Costs, fleet: Fleet, arrivals: Arrivals, *, warm: Sequence[int] = (), seed: int = 0
    ) -> None:
        host_entries = fleet.host_cache_bytes // costs.adapter_bytes
        if host_entries < 1:
            raise FleetError(
                "host_cache_bytes",
                f"must hold one adapter of {costs.adapter_bytes} bytes, got {fleet.host_cache_bytes}",
            )
        self._arrivals = arrivals
        self._pages = None if fleet.kv_tokens is None else fleet.kv_tokens // PAGE_TOKENS
        longest = int((arrivals.prompts + arrivals.outputs).max(initial=0))
        if self._pages is not None and longest > self._pages * PAGE_TOKENS:
            raise FleetError(
                "kv_tokens", f"must hold the longest request, of {longest} tokens, got {fleet.kv_tokens}"
            )
        load = costs.load_seconds + fleet.store_latency
        self._fleet = fleet
        self._tiers = Tiers(fleet.adapter_slots, host_entries, fleet.load_workers, load, costs.swap_seconds)
        self._tiers.fill(warm)
        self._waiting = Waiting(self._tiers)
        self._step = costs.step
        self._table = costs.step.table(fleet.max_batch_tokens)
        self._noise = _Noise(costs.step.noise, seed)
        self._now = 0.0
        self._count = 0  # decode steps so far
        self._decoding: dict[int, Request] = {}
        self._context = 0  # tokens that those have behind them
        self._ends: list[tuple[int, int]] = []  # a heap of counts of decode steps, and whose end they are
        self._begun: deque[Request] = deque()  # prompts, the oldest first
        self._users: dict[int, int] = {}  # of each adapter that runs
        self._preemptions = 0
        self._first = np.full(len(arrivals), np.nan)
        self._last = np.full(len(arrivals), np.nan)
        self._step_ends: list[float] = []
        self._step_seconds: list[float] = []
        self._step_rows: list[int] = []
        self._stalls: list[tuple[float, float]] = []

    def run(self) -> ReplicaRun:
        times = self._arrivals.times.tolist()
        adapters, prompts, outputs = (
            column.tolist()
            for column in (self._arrivals.adapters, self._arrivals.prompts, self._arrivals.outputs)
        )
        following, total = 0, len(times)
        while True:
            self._tiers.advance_to(self._now)
            while following < total and times[following] <= self._now:
                if len(self._waiting) < self._fleet.max_queue:
                    request = Request(following, adapters[following], prompts[following], outputs[following])
                    self._waiting.add(request)
                following += 1
            self._waiting.poll()
            next_arrival = times[following] if following < total else _NEVER
            if not (self._many(next_arrival) or self._one()):
                # Idle: what is awaited is an arrival or an adapter.
                awaited = min(next_arrival, self._tiers.next_event)
                if awaited == _NEVER:
                    break
                self._now = awaited
        if len(self._waiting):
            raise RuntimeError(f"{len(self._waiting)} requests wait for nothing")
        return ReplicaRun(
            self._first,
            self._last,
            np.array(self._step_ends),
            np.array(self._step_seconds),
            np.array(self._step_rows, dtype=np.int64),
            np.array(self._stalls).reshape(-1, 2),
            np.array(self._tiers.loaded_at),
            np.array(self._tiers.placed_at),
            self._preemptions,
        )

    @property
    def _num_running(self) -> int:
        return len(self._decoding) + len(self._begun)

    def _many(self, next_arrival: float) -> bool:
        """Decode steps in which nobody comes or goes, up to the one that something happens in."""
        rows = len(self._decoding)
        if not rows or self._begun:
            return False
        if self._waiting.any_open and rows < self._fleet.max_batch_size:
            return False
        steps = min(self._steps_to_next_end(), self._waiting.quiet_polls + 1)
        if self._pages is not None:
            steps = min(steps, (PAGE_TOKENS * (self._pages - rows) - self._context) // rows)
        if steps < 2:
            return False
        stop = min(next_arrival, self._tiers.next_event)
        cost, growth = self._decode_cost(rows), self._step.per_context_token * rows
        if stop < self._now + 1e6 * cost:
            steps = min(steps, int((stop - self._now) / cost) + 2)
        done = 0
        if steps < _MANY:
            now = self._now
            while done < steps and now < stop:
                seconds = (cost + growth * done) * self._noise.one()
                now += seconds
                self._record(now, seconds, rows)
                done += 1
            self._now = now
        else:
            ahead = min(steps, _BLOCK)
            lengths = (cost + growth * np.arange(ahead)) * self._noise.peek(ahead)
            ends = self._now + np.cumsum(lengths)
            done = min(ahead, int(np.searchsorted(ends, stop)) + 1)
            self._noise.skip(done)
            self._step_ends.extend(ends[:done].tolist())
            self._step_seconds.extend(lengths[:done].tolist())
            self._step_rows.extend([rows] * done)
            self._now = float(ends[done - 1])
        self._waiting.skip(done - 1)
        self._decoded(done)
        return True

    def _one(self) -> bool:
        """The next step; False if there is nothing to run."""
        self._make_room_to_decode()
        rows = len(self._decoding)
        budget = self._fleet.max_batch_tokens - rows
        chunks: list[tuple[Request, int]] = []
        for request in list(self._begun):
            if budget and request in self._begun:
                budget -= self._extend(request, budget, chunks)
        while budget and self._num_running < self._fleet.max_batch_size:
            head = self._waiting.head()
            if head is None or not self._has_pages(head):
                break
            self._waiting.take()
            self._begun.append(head)
            self._users[head.adapter] = self._users.get(head.adapter, 0) + 1
            chunk = min(head.to_compute, budget)
            chunks.append((head, chunk))
            budget -= chunk
        chunks = [entry for entry in chunks if entry[0] in self._begun]
        rows = len(self._decoding)
        if not rows and not chunks:
            return False
        seconds = self._step_cost(rows, chunks) * self._noise.one()
        self._now += seconds
        self._record(self._now, seconds, rows)
        if rows:
            self._decoded(1)
        else:
            self._tiers.advance_to(self._now)
        for request, chunk in chunks:
            request.computed += chunk
            if request.computed == request.to_compute:
                self._begun.remove(request)
                self._first_decoded(request)
        return True

    def _decode_cost(self, rows: int) -> float:
        step = self._step
        linear = step.per_row * rows + step.per_adapter * len(self._users)
        return self._table[rows] + linear + step.per_context_token * self._context

    def _step_cost(self, rows: int, chunks: list[tuple[Request, int]]) -> float:
        step = self._step
        tokens, sampled, pairs = rows, rows, 0.0
        for request, chunk in chunks:
            tokens += chunk
            sampled += request.computed + chunk == request.to_compute
            pairs += chunk * (request.computed + chunk / 2)
        return (
            self._table[tokens]
            + step.per_row * sampled
            + step.per_adapter * len(self._users)
            + step.per_context_token * self._context
            + step.per_prompt_pair * pairs
        )

    def _record(self, end: float, seconds: float, rows: int) -> None:
        self._step_ends.append(end)
        self._step_seconds.append(seconds)
        self._step_rows.append(rows)

    def _steps_to_next_end(self) -> int:
        while True:
            count, index = self._ends[0]
            request = self._decoding.get(index)
            if request is not None and request.end == count:
                return count - self._count
            heapq.heappop(self._ends)  # it was preempted

    def _decoded(self, steps: int) -> None:
        """All that decode have `steps` more tokens; end those that have enough."""
        self._tiers.advance_to(self._now)
        self._count += steps
        self._context += steps * len(self._decoding)
        while self._ends and self._ends[0][0] <= self._count:
            count, index = heapq.heappop(self._ends)
            request = self._decoding.get(index)
            if request is not None and request.end == count:
                del self._decoding[index]
                self._context -= request.offset + self._count
                self._end(request)

    def _first_decoded(self, request: Request) -> None:
        """A prompt is done, or what was computed again: that gives a token."""
        if request.stalled_since is None:
            self._first[request.index] = self._now
        else:
            self._stalls.append((self._now, self._now - request.stalled_since))
            request.stalled_since = None
        request.left -= 1
        if request.left == 0:
            self._end(request)
            return
        request.offset = request.to_compute - self._count
        request.end = self._count + request.left
        self._context += request.to_compute
        self._decoding[request.index] = request
        heapq.heappush(self._ends, (request.end, request.index))

    def _end(self, request: Request) -> None:
        self._last[request.index] = self._now
        self._not_running(request)
        self._tiers.release(request.adapter)

    def _not_running(self, request: Request) -> None:
        self._users[request.adapter] -= 1
        if not self._users[request.adapter]:
            del self._users[request.adapter]

    # Pages of the key-value cache.

    def _used_pages(self, ahead: int = 0) -> int:
        """By all that run, those that decode having `ahead` tokens more."""
        decoding = (r.offset + self._count + ahead for r in self._decoding.values())
        return sum(map(_pages, decoding)) + sum(_pages(request.computed) for request in self._begun)

    def _make_room_to_decode(self) -> None:
        if self._pages is None:
            return
        computed = sum(request.computed for request in self._begun)
        most = (self._context + computed) // PAGE_TOKENS + 2 * self._num_running
        if most > self._pages:
            while self._used_pages(ahead=1) > self._pages:
                self._preempt(self._latest())

    def _extend(self, request: Request, budget: int, chunks: list[tuple[Request, int]]) -> int:
        """Plan the next tokens of a prompt that has begun; gives their number."""
        chunk = min(request.to_compute - request.computed, budget)
        if self._pages is not None:
            more = _pages(request.computed + chunk) - _pages(request.computed)
            while self._used_pages(ahead=1) + more > self._pages:
                victim = self._latest()
                self._preempt(victim)
                if victim is request:
                    return 0
        chunks.append((request, chunk))
        return chunk

    def _has_pages(self, request: Request) -> bool:
        if self._pages is None:
            return True
        needed = _pages(request.to_compute) + (1 if self._num_running else 0)
        return self._used_pages(ahead=1) + needed <= self._pages

    def _latest(self) -> Request:
        """Who gives way: the youngest."""
        return max((*self._decoding.values(), *self._begun), key=lambda request: request.index)

    def _preempt(self, request: Request) -> None:
        if request.index in self._decoding:
            del self._decoding[request.index]
            tokens = request.offset + self._count
            self._context -= tokens
            request.left = request.end - self._count
            request.to_compute = tokens + 1  # its last token was not computed yet
            request.stalled_since = self._now
        else:
            self._begun.remove(request)
        request.computed = 0
        self._not_running(request)
        self._preemptions += 1
        self._waiting.put_back(request)


class _Noise:
    """Factors drawn from the distribution of which `quantiles` are evenly spaced quantiles."""

    def __init__(self, quantiles: Sequence[float], seed: int) -> None:
        self._quantiles = np.array(quantiles)
        self._source = np.random.default_rng(seed)
        self._block: Any = np.empty(0)
        self._next = 0

    def peek(self, count: int) -> Floats:
        """The next `count`, at most `_BLOCK`."""
        if self._next + count > len(self._block):
            grid = np.linspace(0.0, 1.0, len(self._quantiles))
            fresh = np.interp(self._source.random(2 * _BLOCK), grid, self._quantiles)
            self._block = np.concatenate((self._block[self._next :], fresh))
            self._next = 0
        return np.asarray(self._block[self._next : self._next + count], dtype=np.float64)

    def skip(self, count: int) -> None:
        self._next += count

    def one(self) -> float:
        found = float(self.peek(1)[0])
        self._next += 1
        return found


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)
