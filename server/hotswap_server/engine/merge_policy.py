"""Which adapter deserves to be in the base's weights: one that has had the traffic to itself for a while."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

from hotswap_server.core import AdapterRef

_SLICES = 20
_KEPT = 2 / 3  # a merged adapter stays down to this part of the share that it was merged at
_MAX_REFUSED = 1000


class MergePolicy:
    """Counts tokens over the last `window_s` seconds, in slices of a twentieth.

    An adapter is to be merged once it has `share` of the tokens in the window and has had the most of all for
    that long; to be unmerged when it has less than two thirds of `share`. Neither happens within a window of
    the last change, so that a merge always pays. Without traffic nothing changes. Times are those of `clock`.
    """

    def __init__(self, *, share: float, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._window_s = window_s
        self._clock = clock
        self._slices: deque[tuple[float, Counter[AdapterRef | None]]] = deque()
        self._tokens: Counter[AdapterRef | None] = Counter()
        self._leader: AdapterRef | None = None
        self._led_since = self._changed_at = clock()
        self._let_be: AdapterRef | None = None
        self._refused: deque[AdapterRef] = deque(maxlen=_MAX_REFUSED)

    def observe(self, tokens: Mapping[AdapterRef | None, int]) -> bool:
        """Count the tokens of a step by adapter, None being the base; tells whether a new slice has begun."""
        now = self._clock()
        begun = not self._slices or now - self._slices[-1][0] >= self._window_s / _SLICES
        if begun:
            self._slices.append((now, Counter()))
        self._slices[-1][1].update(tokens)
        self._tokens.update(tokens)
        while now - self._slices[0][0] >= self._window_s:
            self._tokens -= self._slices.popleft()[1]
        leader = max(self._tokens, key=lambda ref: self._tokens[ref], default=None) if begun else self._leader
        if leader != self._leader:
            self._leader, self._led_since = leader, now
        if self._leader != self._let_be:
            self._let_be = None
        return begun

    def wanted(self, merged: AdapterRef | None) -> AdapterRef | None:
        """The adapter that is to be merged now, given the one that is."""
        now, leader, total = self._clock(), self._leader, self._tokens.total()
        if now - self._changed_at < self._window_s or not total:
            return merged
        if (
            leader is not None
            and now - self._led_since >= self._window_s
            and self._tokens[leader] >= self._share * total
            and leader != self._let_be
            and leader not in self._refused
        ):
            return leader
        if merged is not None and self._tokens[merged] < _KEPT * self._share * total:
            return None
        return merged

    def changed(self) -> None:
        """A merge or an unmerge was tried: leave things alone for a window."""
        self._changed_at = self._clock()

    def refuse(self, ref: AdapterRef) -> None:
        """Never want an adapter again, which cannot be merged."""
        self._refused.append(ref)

    def let_be(self, ref: AdapterRef) -> None:
        """Do not want an adapter, which somebody has unmerged, for as long as it leads."""
        self._let_be = ref
