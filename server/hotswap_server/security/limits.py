"""Rate limits and quotas per principal: token buckets (https://en.wikipedia.org/wiki/Token_bucket)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hotswap_server.errors import RateLimitedError
from hotswap_server.security.principals import Principal

_MIN_RETRY_S = 0.05
_CONCURRENCY_RETRY_S = 1.0


@dataclass(slots=True)
class Bucket:
    """Holds up to `capacity`, refilled by `per_second`. Taking more than it holds leaves a debt."""

    capacity: float
    per_second: float
    level: float
    at: float

    def refill(self, now: float, capacity: float, per_second: float) -> None:
        """Bring the level to `now`; new limits hold from here on."""
        self.level += max(0.0, now - self.at) * self.per_second
        self.capacity, self.per_second, self.at = capacity, per_second, now
        self.level = min(self.level, capacity)

    def wait(self, amount: float) -> float:
        """Seconds until the bucket holds `amount`; 0 if it does."""
        return max(0.0, (amount - self.level) / self.per_second)


@dataclass(slots=True)
class _State:
    running: int = 0
    buckets: dict[str, Bucket] = field(default_factory=dict)


class Limiter:
    """Counts what principals ask for, by their name. For one event loop; `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[str, _State] = {}

    @contextmanager
    def admit(self, principal: Principal) -> Iterator[Callable[[int], None]]:
        """One call of `principal`; gives what to call with each number of tokens that it uses.

        Raises:
            RateLimitedError: a limit is met; `retry_after` says when the call may work.
        """
        state = self._states.setdefault(principal.name, _State())
        limits = principal.limits
        if limits.concurrent_requests is not None and state.running >= limits.concurrent_requests:
            raise RateLimitedError(
                f"{principal.name} has {state.running} calls running, as many as it may; wait for one to end",
                retry_after=_CONCURRENCY_RETRY_S,
            )
        tokens = self._bucket(state, "tokens", limits.tokens_per_minute, per=60.0)
        requests = self._bucket(state, "requests", limits.requests_per_second, per=1.0)
        waits = []
        if tokens is not None:
            waits.append((tokens.wait(1.0), f"{limits.tokens_per_minute} tokens a minute"))
        if requests is not None:
            waits.append((requests.wait(1.0), f"{limits.requests_per_second:g} requests a second"))
        wait, limit = max(waits, default=(0.0, ""))
        if wait > 0:
            raise RateLimitedError(
                f"{principal.name} has used up its {limit}; try again in {wait:.2f} s",
                retry_after=max(_MIN_RETRY_S, wait),
            )
        if requests is not None:
            requests.level -= 1.0
        state.running += 1
        try:
            yield lambda count: self._spend(state, count)
        finally:
            state.running -= 1

    def _spend(self, state: _State, count: int) -> None:
        tokens = state.buckets.get("tokens")
        if tokens is not None:
            tokens.refill(self._clock(), tokens.capacity, tokens.per_second)
            tokens.level -= count

    def _bucket(self, state: _State, name: str, limit: float | None, *, per: float) -> Bucket | None:
        """The bucket of `limit` units in `per` seconds, refilled; a new one is full."""
        if limit is None:
            state.buckets.pop(name, None)
            return None
        capacity, rate, now = max(1.0, float(limit)), limit / per, self._clock()
        bucket = state.buckets.setdefault(name, Bucket(capacity, rate, capacity, now))
        bucket.refill(now, capacity, rate)
        return bucket
