"""Bounded queues, honest delays, and early refusals."""

import time

import pytest
from hotswap_server.core import GenerateRequest, SamplingParams, ScoreRequest
from hotswap_server.engine.engine import EngineOptions
from hotswap_server.engine.overload import Doorkeeper, Pace, QueueOptions
from hotswap_server.engine.sequence import Sequence
from hotswap_server.engine.waiting import WaitingQueue
from hotswap_server.errors import DeadlineTooShortError, OverloadedError
from support.models import random_prompt
from support.running import Running, wait_until

PROMPT = random_prompt(20, seed=0)


class Door:
    """A doorkeeper with a queue and a clock of its own."""

    def __init__(self, **options) -> None:
        self.now = 1000.0
        self.waiting = WaitingQueue()
        self.keeper = Doorkeeper(
            QueueOptions(**options), self.waiting, max_batch_tokens=32, clock=lambda: self.now
        )
        self.displacements = []
        self.inbox = []

    def submit(self, tenant="a", tokens=1, *, take=True, **sampling) -> Sequence:
        params = SamplingParams(**sampling)
        deadline = None
        request = GenerateRequest("x", (0,) * tokens, params, tenant=tenant, deadline=deadline)
        sequence = Sequence(request, lambda event: None, max_new_tokens=4)
        if displacement := self.keeper.enter(sequence):
            self.displacements.append(displacement)
        self.inbox.append(sequence)
        if take:
            self.take()
        return sequence

    def take(self) -> list[Sequence]:
        """What the engine does before a step; gives those that were displaced."""
        gone = []
        for displacement in self.displacements:
            for sequence, error in self.keeper.displaced(displacement):
                assert isinstance(error, OverloadedError)
                self.waiting.remove(sequence)
                gone.append(sequence)
        self.displacements.clear()
        for sequence in self.inbox:
            self.waiting.add(sequence)
        self.inbox.clear()
        self.keeper.entered()
        return gone


@pytest.mark.parametrize("take", [True, False], ids=["queued", "on their way"])
def test_the_queue_is_bounded_by_requests(take):
    door = Door(max_requests=3)
    for _ in range(3):
        door.submit(take=take)
    with pytest.raises(OverloadedError, match=r"3 requests are waiting already; retry in 1\.0 s"):
        door.submit(take=take)


@pytest.mark.parametrize("take", [True, False], ids=["queued", "on their way"])
def test_the_queue_is_bounded_by_tokens(take):
    door = Door(max_tokens=100)
    door.submit(tokens=60, take=take)
    with pytest.raises(OverloadedError, match="100 tokens are waiting already"):
        door.submit(tokens=41, take=take)
    door.submit(tokens=40, take=take)


def test_one_request_may_be_larger_than_the_queue():
    door = Door(max_tokens=10)
    door.submit(tokens=50)
    with pytest.raises(OverloadedError):
        door.submit()


def test_in_a_full_queue_the_latest_of_who_waits_with_most_makes_room():
    door = Door(max_requests=6)
    heavy = [door.submit("heavy") for _ in range(6)]
    door.submit("light", take=False)
    assert door.take() == [heavy[5]]
    door.submit("light", take=False)
    door.submit("light", take=False)
    assert door.take() == [heavy[4], heavy[3]]
    with pytest.raises(OverloadedError):
        door.submit("light")
    with pytest.raises(OverloadedError):
        door.submit("heavy")
    assert len(door.waiting) == 6


def test_in_a_queue_full_of_tokens_as_many_make_room_as_are_needed():
    door = Door(max_tokens=100)
    heavy = [door.submit("heavy", tokens=20) for _ in range(5)]
    door.submit("light", tokens=35, take=False)
    assert door.take() == [heavy[4], heavy[3]]
    with pytest.raises(OverloadedError):
        door.submit("light", tokens=35)
    assert door.waiting.num_tokens == 95


def test_the_delay_is_that_in_which_a_tenth_will_have_begun():
    door = Door(max_requests=40)
    queued = [door.submit() for _ in range(40)]
    door.keeper.step(0.1, 1)
    for sequence in queued[:10]:  # five a second
        door.now += 0.2
        door.waiting.start(sequence)
    for _ in range(10):
        door.submit()
    with pytest.raises(OverloadedError) as refused:
        door.submit()
    assert refused.value.retry_after == pytest.approx(4 / 5)


def fed(pace: Pace, seconds: float, tokens: int, steps: int = 20) -> Pace:
    for _ in range(steps):
        pace.step(seconds, tokens)
    return pace


def sequence(prompt: int, new: int, **sampling) -> Sequence:
    request = GenerateRequest("x", (0,) * prompt, SamplingParams(**sampling))
    return Sequence(request, lambda event: None, max_new_tokens=new)


def test_the_least_time_counts_what_is_certain():
    pace = fed(Pace(max_batch_tokens=32), 0.5, 8)
    assert pace.least_seconds(sequence(20, 100)) == pytest.approx(20 * 0.5 / 8)
    assert pace.least_seconds(sequence(20, 101, ignore_eos=True)) == pytest.approx(20 / 16 + 100 * 0.5)
    stopping = sequence(20, 100, ignore_eos=True, stop=("x",))
    assert pace.least_seconds(stopping) == pace.least_seconds(sequence(20, 1))
    assert pace.least_seconds(sequence(20, 1), tokens_before=60) == pytest.approx(80 / 16)
    score = Sequence(ScoreRequest("x", (0,) * 20), lambda event: None, max_new_tokens=0)
    assert pace.least_seconds(score) == pytest.approx(20 / 16)


def test_the_pace_is_that_of_the_fastest_steps_of_late():
    pace = fed(Pace(max_batch_tokens=32), 1.0, 32)
    pace.step(0.25, 32)
    pace.step(9.0, 32)
    assert pace.least_seconds(sequence(32, 1)) == pytest.approx(0.25 * 1.02)
    fed(pace, 2.0, 32, steps=300)
    assert pace.least_seconds(sequence(32, 1)) == pytest.approx(2.0)


def test_nothing_is_refused_before_steps_were_measured():
    assert fed(Pace(max_batch_tokens=32), 100.0, 1, steps=3).least_seconds(sequence(32, 1)) == 0


@pytest.fixture
def running(llama_base, tokenizer, tmp_path):
    with Running(llama_base, tokenizer, tmp_path, max_batch_size=2, max_batch_tokens=32) as running:
        running.generate(PROMPT, max_new_tokens=30).result()
        yield running


def timed(running, seconds, new, **sampling):
    params = SamplingParams(max_new_tokens=new, temperature=0.0, **({"ignore_eos": True} | sampling))
    request = GenerateRequest(f"timed-{new}", tuple(PROMPT), params, deadline=time.perf_counter() + seconds)
    return running.submit(request)


def test_what_cannot_be_done_in_time_is_refused_at_once(running):
    for _ in range(20):
        running.engine._door.step(2.0, 1)  # as if it were a slow machine
    running.engine._door._pace._step = 2.0
    with pytest.raises(DeadlineTooShortError, match=r"takes .* at least; allow more time, or ask for fewer"):
        timed(running, 5.0, 100)
    assert running.engine.idle
    assert timed(running, 50.0, 3).result().tokens
    assert timed(running, 50.0, 100, ignore_eos=False).result(), "it may end with any token"


def test_a_deadline_that_passes_in_the_queue_ends_there(running):
    blockers = [running.generate(PROMPT, max_new_tokens=300) for _ in range(2)]
    wait_until(lambda: all(blocker.deltas for blocker in blockers))
    late = timed(running, 50.0, 3)
    running.engine._door._clock = lambda: time.perf_counter() + 100.0
    running.cancel(blockers[0])
    with pytest.raises(DeadlineTooShortError):
        late.result()
    assert not late.tokens
    running.cancel(blockers[1])


def test_early_refusal_can_be_switched_off(llama_base, tokenizer, tmp_path):
    queue = QueueOptions(early_refusal=False)
    with Running(llama_base, tokenizer, tmp_path, queue=queue) as running:
        running.generate(PROMPT, max_new_tokens=30).result()
        assert timed(running, -1.0, 50).result().tokens


def test_a_full_engine_displaces_the_latest_of_the_fullest_tenant(llama_base, tokenizer, tmp_path):
    queue = QueueOptions(max_requests=3)
    with Running(llama_base, tokenizer, tmp_path, max_batch_size=1, queue=queue) as running:
        first = running.generate(PROMPT, max_new_tokens=400)
        wait_until(lambda: first.deltas)
        heavy = [running.generate(PROMPT) for _ in range(3)]
        light = running.submit(
            GenerateRequest("light", tuple(PROMPT), SamplingParams(max_new_tokens=2), tenant="light")
        )
        with pytest.raises(OverloadedError):
            heavy[2].result()
        running.cancel(first)
        for outcome in (*heavy[:2], light):
            assert outcome.result().tokens


def test_the_defaults_bound_the_queue():
    assert EngineOptions().queue == QueueOptions(1024, 2**20, early_refusal=True)
