"""Whose turn it is: a counter of the service that each tenant has had.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024 (the Virtual Token Counter).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hotswap_server.errors import InvalidRequestError


@dataclass(frozen=True, slots=True)
class FairnessOptions:
    """What a token costs, and what each tenant may have of the server.

    A tenant of weight 2 gets twice the tokens of one of weight 1, which is what those have that
    `tenant_weights` does not name. `max_running_per_tenant` None sets no limit.

    Raises:
        InvalidRequestError: a number is not over zero.
    """

    input_token_weight: float = 1.0
    output_token_weight: float = 2.0
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    max_running_per_tenant: int | None = None

    def __post_init__(self) -> None:
        for name in ("input_token_weight", "output_token_weight"):
            _require_positive(name, getattr(self, name))
        for tenant, weight in self.tenant_weights.items():
            _require_positive(f"tenant_weights.{tenant}", weight)
        if self.max_running_per_tenant is not None:
            _require_positive("max_running_per_tenant", self.max_running_per_tenant)


@dataclass(slots=True, eq=False)
class Account:
    """One tenant's service so far: the weighted tokens over the tenant's own weight."""

    tenant: str
    weight: float
    service: float = 0.0
    turn: int = 0  # of the last time it became active; 0 when it is not


class VirtualTokenCounter:
    """The accounts of all tenants, and the order in which the active ones come: the least served first.

    An account is active while its tenant has a request that could run now: one that waits for an adapter to
    load, or for another of its tenant to end, could not. One that becomes active is lifted to the least
    served of those that are: nobody saves up service for later.

    Of tenants that are active all the time, the accounts never differ by more than
    U = input weight x longest prompt + output weight x tokens that a full batch can still generate, each over
    the tenant's weight: only the least served one starts a request, and what it has started is all it can be
    served while it is not the least served. So their service in any span of time differs by 2U at most.
    Whoever waits is passed by each other tenant for U at most, and so is served as long as the tenants are
    finite in number.
    """

    def __init__(self, options: FairnessOptions) -> None:
        self._options = options
        self._accounts: dict[str, Account] = {}
        self._turns = itertools.count(1)
        self._active: list[tuple[float, int, Account]] = []  # keys may be too low: service only grows
        self._num_active = 0
        self._level = 0.0
        self._idle: list[tuple[float, int, Account]] = []
        self._idle_order = itertools.count()

    def account(self, tenant: str) -> Account:
        """The account of `tenant`, which is opened if it has none."""
        account = self._accounts.get(tenant)
        if account is None:
            weight = self._options.tenant_weights.get(tenant, 1.0)
            account = self._accounts[tenant] = Account(tenant, weight)
        return account

    def activate(self, account: Account) -> None:
        """Put a tenant in the line."""
        if account.turn:
            return
        first = self.first()
        if first is not None:
            self._level = max(self._level, first.service)
        account.service = max(account.service, self._level)
        account.turn = next(self._turns)
        self._num_active += 1
        heapq.heappush(self._active, self._key(account))

    def deactivate(self, account: Account) -> None:
        """Take a tenant out of the line."""
        if not account.turn:
            return
        account.turn = 0
        self._num_active -= 1
        if self._num_active == 0:
            self._level = max(self._level, account.service)

    def close(self, account: Account) -> None:
        """The tenant has no request left. Its account is kept only while it is ahead of the others."""
        self.deactivate(account)
        heapq.heappush(self._idle, (account.service, next(self._idle_order), account))

    def reset(self) -> None:
        """Nobody has a request left: there is nothing to be fair about, and all start anew."""
        self._accounts.clear()
        self._active.clear()
        self._idle.clear()
        self._num_active, self._level = 0, 0.0

    def forget(self, in_use: Mapping[str, object]) -> None:
        """Drop the accounts, but those `in_use`, that would be lifted anyway if their tenants came back."""
        while self._idle and self._idle[0][0] <= self._level:
            account = heapq.heappop(self._idle)[2]
            if account.tenant not in in_use and account.service <= self._level:
                self._accounts.pop(account.tenant, None)

    def charge(self, account: Account, *, input_tokens: int = 0, output_tokens: int = 0) -> None:
        options = self._options
        cost = input_tokens * options.input_token_weight + output_tokens * options.output_token_weight
        account.service += cost / account.weight

    def first(self) -> Account | None:
        """The active account with the least service; of equals, the one that became active last."""
        while self._active:
            key, turn, account = self._active[0]
            if -turn != account.turn:
                heapq.heappop(self._active)
            elif key != account.service:
                heapq.heapreplace(self._active, self._key(account))
            else:
                return account
        return None

    @staticmethod
    def _key(account: Account) -> tuple[float, int, Account]:
        # Heavy users are always in line, so of equals the newcomer is the one that has asked for less.
        return account.service, -account.turn, account


def _require_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InvalidRequestError(name, f"must be a finite number over 0, got {value}")
