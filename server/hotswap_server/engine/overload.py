"""What is refused before it is queued: too much at once, and what cannot be done in time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hotswap_server.engine.sequence import Sequence
from hotswap_server.engine.waiting import WaitingQueue
from hotswap_server.errors import DeadlineTooShortError, OverloadedError

_TRUSTED_STEPS: Final = 16  # before these, nothing is known of how long steps take
_DRIFT: Final = 1.02  # by which the fastest step seen is forgotten, so that a slow spell is believed in time
_MARGIN: Final = 1.5  # between the least a request can take and what it has left
_RATE_WINDOW_S: Final = 30.0
_RETRY_BOUNDS_S: Final = (0.1, 60.0)
_RETRY_UNKNOWN_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class QueueOptions:
    """Bounds of what waits, in requests and in tokens of their prompts."""

    max_requests: int = 1024
    max_tokens: int = 2**20
    early_refusal: bool = True


@dataclass(frozen=True, slots=True)
class Displacement:
    """Room that `tenant` was promised in a full queue, at the expense of the tenant that waits with most."""

    tenant: str
    requests: int
    tokens: int


class Pace:
    """The least time that work takes, from the fastest of the latest steps. One thread writes."""

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._num_steps = 0
        self._step = 0.0
        self._token = 0.0

    def step(self, seconds: float, num_tokens: int) -> None:
        """A step took `seconds` and computed `num_tokens`."""
        per_token = seconds / max(num_tokens, 1)
        if self._num_steps:
            self._step = min(seconds, self._step * _DRIFT)
            self._token = min(per_token, self._token * _DRIFT)
        else:
            self._step, self._token = seconds, per_token
        self._num_steps += 1

    def least_seconds(self, sequence: Sequence, tokens_before: int = 0) -> float:
        """No estimate, but a bound: less is not possible at the pace seen, were nobody else there.

        `tokens_before` are of prompts that come first. A generation that may stop early is counted as ending
        with its first token.
        """
        if self._num_steps < _TRUSTED_STEPS:
            return 0.0
        tokens = tokens_before + sequence.num_uncomputed
        prefill = max(-(-tokens // self._max_batch_tokens) * self._step, tokens * self._token)
        return prefill + (_certain_tokens(sequence) - 1) * self._step


class Doorkeeper:
    """Decides whether a request may be queued.

    A full queue takes a request of a tenant that waits with less than another: the latest of the tenant that
    waits with most makes room for it. Otherwise a tenant that floods the server would keep the others out.

    `enter` is called under the engine's lock, `entered`, `displaced` and `step` on its thread.
    """

    def __init__(
        self,
        options: QueueOptions,
        waiting: WaitingQueue,
        *,
        max_batch_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._options = options
        self._waiting = waiting
        self._clock = clock
        self._pace = Pace(max_batch_tokens)
        self._samples: deque[tuple[float, int]] = deque()  # times, and how many had begun
        # On their way to the engine's thread, by tenant.
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._promised_requests = self._promised_tokens = 0  # by displacements that are on their way too

    def enter(self, sequence: Sequence) -> Displacement | None:
        """Count a request in. What it displaces must reach `displaced` before the next `entered`.

        Raises:
            OverloadedError: the queue is full; `retry_after` says when a tenth of it will have begun.
            DeadlineTooShortError: the request cannot be done in time.
        """
        if (late := self.too_late(sequence, behind=True)) is not None:
            raise late
        tokens = sequence.num_prompt_tokens
        queued = len(self._waiting) + self._requests.total() - self._promised_requests
        requests_over = queued + 1 - self._options.max_requests
        queued_tokens = self._waiting.num_tokens + self._tokens.total() - self._promised_tokens
        # One that alone is larger than the queue may have it for itself.
        tokens_over = queued_tokens + tokens - self._options.max_tokens if queued_tokens else 0
        displacement = None
        if requests_over > 0 or tokens_over > 0:
            displacement = Displacement(sequence.tenant, max(requests_over, 0), max(tokens_over, 0))
            if not self._has_more(displacement, tokens):
                raise self._full(displacement)
            self._promised_requests += displacement.requests
            self._promised_tokens += displacement.tokens
        self._requests[sequence.tenant] += 1
        self._tokens[sequence.tenant] += tokens
        return displacement

    def entered(self) -> None:
        """All that were counted in are in the queue now."""
        self._requests.clear()
        self._tokens.clear()
        self._promised_requests = self._promised_tokens = 0

    def displaced(self, displacement: Displacement) -> list[tuple[Sequence, OverloadedError]]:
        """Whom to fail, so that a promise is kept."""
        requests, tokens = displacement.requests, displacement.tokens
        givers = [t for t in self._waiting.tenants.values() if t.account.tenant != displacement.tenant]
        if not givers:
            return []
        giver = max(givers, key=lambda tenant: tenant.waiting_tokens if tokens else tenant.num_waiting)
        victims: list[tuple[Sequence, OverloadedError]] = []
        for sequence in self._waiting.latest(giver):
            if requests <= 0 and tokens <= 0:
                break
            victims.append((sequence, self._full(displacement)))
            requests -= 1
            tokens -= sequence.num_prompt_tokens
        return victims

    def step(self, seconds: float, num_tokens: int) -> None:
        """A step has ended."""
        self._pace.step(seconds, num_tokens)
        now = self._clock()
        if not self._samples or now - self._samples[-1][0] >= 1.0:
            self._samples.append((now, self._waiting.num_started))
            while now - self._samples[0][0] > _RATE_WINDOW_S:
                self._samples.popleft()

    def too_late(self, sequence: Sequence, *, behind: bool = False) -> DeadlineTooShortError | None:
        """Why a request cannot be done before its deadline, if so; `behind` those for the same adapter."""
        deadline = sequence.request.deadline
        if deadline is None or not self._options.early_refusal:
            return None
        tenant = self._waiting.tenants.get(sequence.tenant) if behind else None
        lane = None if tenant is None else tenant.lanes.get(sequence.request.adapter)
        least = self._pace.least_seconds(sequence, 0 if lane is None else lane.num_tokens)
        left = deadline - self._clock()
        if least <= _MARGIN * max(left, 0.0):
            return None
        return DeadlineTooShortError(
            f"{max(left, 0.0):.3g} s are left of the call's deadline, and the request takes {least:.3g} s at "
            "least; allow more time, or ask for fewer tokens"
        )

    def _has_more(self, displacement: Displacement, tokens: int) -> bool:
        """Whether another tenant waits with no less than the newcomer will, even after it has made room."""
        by_tokens, name = displacement.tokens > 0, displacement.tenant
        others = {*list(self._waiting.tenants), *self._requests} - {name}
        most = max((self._load(other, by_tokens) for other in others), default=0)
        promised = self._promised_tokens if by_tokens else self._promised_requests
        freed = displacement.tokens if by_tokens else displacement.requests
        return most - promised - freed >= self._load(name, by_tokens) + (tokens if by_tokens else 1)

    def _load(self, name: str, by_tokens: bool) -> int:
        """What a tenant has waiting, here or on its way."""
        tenant = self._waiting.tenants.get(name)
        if by_tokens:
            return self._tokens[name] + (0 if tenant is None else tenant.waiting_tokens)
        return self._requests[name] + (0 if tenant is None else tenant.num_waiting)

    def _full(self, displacement: Displacement) -> OverloadedError:
        limit = (
            f"{self._options.max_tokens} tokens"
            if displacement.tokens > 0
            else f"{self._options.max_requests} requests"
        )
        retry_after = self._retry_after()
        return OverloadedError(
            f"{limit} are waiting already; retry in {retry_after:.1f} s", retry_after=retry_after
        )

    def _retry_after(self) -> float:
        """When a tenth of what waits will have begun, at the rate of the last half minute."""
        samples = list(self._samples)
        seconds = self._clock() - samples[0][0] if samples else 0.0
        started = self._waiting.num_started - samples[0][1] if samples else 0
        if seconds <= 0 or started <= 0:
            return _RETRY_UNKNOWN_S
        low, high = _RETRY_BOUNDS_S
        return min(max(max(len(self._waiting) / 10, 1) * seconds / started, low), high)


def _certain_tokens(sequence: Sequence) -> int:
    """How many tokens a generation has at least."""
    sampling = sequence.sampling
    fixed = sampling.ignore_eos and not sampling.stop and not sampling.stop_token_ids
    return sequence.max_new_tokens - sequence.num_generated if fixed and not sequence.is_score else 1
