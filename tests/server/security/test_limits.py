"""Token buckets and the cap on calls at once, on a clock that tests move."""

from __future__ import annotations

import pytest
from hotswap_server.errors import RateLimitedError
from hotswap_server.security.limits import Limiter
from hotswap_server.security.principals import AdapterPatterns, Limits, Principal, Role
from hypothesis import given
from hypothesis import strategies as st


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limiter(clock):
    return Limiter(clock)


def somebody(name: str = "acme", **limits) -> Principal:
    return Principal(name, Role.USER, AdapterPatterns(), Limits(**limits))


def call(limiter: Limiter, principal: Principal, tokens: int = 0) -> None:
    with limiter.admit(principal) as spend:
        spend(tokens)


def refused(limiter: Limiter, principal: Principal) -> float:
    with pytest.raises(RateLimitedError) as caught, limiter.admit(principal):
        pass
    assert principal.name in str(caught.value)
    return caught.value.retry_after


def test_requests_come_in_bursts_of_a_second_and_then_at_their_rate(limiter, clock):
    acme = somebody(requests_per_second=5)
    for _ in range(5):
        call(limiter, acme)
    assert refused(limiter, acme) == pytest.approx(0.2)
    clock.now += 0.19
    refused(limiter, acme)
    clock.now += 0.02
    call(limiter, acme)
    refused(limiter, acme)
    clock.now += 3600
    for _ in range(5):
        call(limiter, acme)
    refused(limiter, acme)


def test_a_rate_below_one_lets_one_through(limiter, clock):
    acme = somebody(requests_per_second=0.1)
    call(limiter, acme)
    assert refused(limiter, acme) == pytest.approx(10)
    clock.now += 10.01
    call(limiter, acme)


def test_what_waits_as_told_gets_through(limiter, clock):
    acme = somebody(requests_per_second=3, tokens_per_minute=600)
    waits = []
    for tokens in (1, 700, 5, 0, 0, 0, 0, 40, 0):
        try:
            call(limiter, acme, tokens)
        except RateLimitedError as error:
            waits.append(error.retry_after)
            clock.now += error.retry_after + 1e-6
            call(limiter, acme, tokens)
    assert len(waits) >= 2


def test_tokens_are_charged_as_they_come_and_leave_a_debt(limiter, clock):
    acme = somebody(tokens_per_minute=60)
    with limiter.admit(acme) as spend:
        spend(50)
        call(limiter, acme)  # 10 are left
        spend(40)
        assert refused(limiter, acme) == pytest.approx(31)
    clock.now += 30.9
    refused(limiter, acme)
    clock.now += 0.2
    call(limiter, acme)


def test_a_call_refused_for_tokens_uses_up_no_request(limiter, clock):
    acme = somebody(requests_per_second=1, tokens_per_minute=60)
    call(limiter, acme, 62)
    clock.now += 1
    refused(limiter, acme)
    clock.now += 2.1
    call(limiter, acme)


def test_calls_at_once_are_counted_until_they_end_however_they_end(limiter):
    acme = somebody(concurrent_requests=2)
    with limiter.admit(acme):
        failing = limiter.admit(acme)
        failing.__enter__()
        refused(limiter, acme)
        with pytest.raises(KeyError):
            failing.gen.throw(KeyError())
        with limiter.admit(acme):
            refused(limiter, acme)
    call(limiter, acme)


def test_principals_do_not_share_and_keys_of_one_do(limiter):
    acme, globex, free = (
        somebody("acme", requests_per_second=1),
        somebody("globex", requests_per_second=1),
        somebody("free"),
    )
    call(limiter, acme)
    refused(limiter, somebody("acme", requests_per_second=1))
    call(limiter, globex)
    for _ in range(100):
        call(limiter, free, 10**9)


def test_new_limits_hold_at_once(limiter):
    for _ in range(10):
        call(limiter, somebody(requests_per_second=10))
    refused(limiter, somebody(requests_per_second=10))
    call(limiter, somebody())
    for _ in range(2):
        call(limiter, somebody(requests_per_second=2))
    refused(limiter, somebody(requests_per_second=2))


@given(
    rate=st.floats(0.1, 50),
    steps=st.lists(st.floats(0, 3, allow_subnormal=False), min_size=1, max_size=60),
)
def test_no_more_than_the_rate_and_one_burst_ever_passes(rate, steps):
    clock = Clock()
    limiter, acme, passed = Limiter(clock), somebody(requests_per_second=rate), 0
    for step in steps:
        clock.now += step
        for _ in range(20):
            try:
                call(limiter, acme)
            except RateLimitedError:
                break
            passed += 1
    assert passed <= max(1.0, rate) + rate * sum(steps) + 1e-6
