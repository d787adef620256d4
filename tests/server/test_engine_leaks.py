"""However a request ends, its pages and slots come back and the others' answers are the same."""

import threading

import pytest
import torch
from hotswap_server.adapters.methods.lora.bank import LoraBank
from hotswap_server.adapters.residency import InUse
from hotswap_server.core import Delta, GenerateRequest, SamplingParams
from hotswap_server.engine.engine import Engine
from hotswap_server.engine.scheduler import Scheduler
from hotswap_server.errors import (
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterUnloadedError,
    DrainingError,
    EngineError,
    InvalidRequestError,
)
from support.adapters import write_lora
from support.models import random_prompt
from support.running import SOON_S, Outcome, Running, wait_until

PROMPT = random_prompt(20, seed=0)
LONG = random_prompt(600, seed=1)


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for seed, name in enumerate("abc"):
        write_lora(llama, store / "acme" / name / "1", seed=seed, r=4, target_modules=["q_proj", "down_proj"])
    broken = write_lora(llama, store / "acme" / "broken" / "1", r=4, target_modules=["q_proj"])
    (broken / "adapter_model.safetensors").write_bytes(b"no such thing")
    return store


@pytest.fixture
def running(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store, max_batch_tokens=32) as running:
        yield running


@pytest.fixture
def gate(monkeypatch):
    """Holds every load before it fills its slot."""
    gate = threading.Event()
    put = LoraBank.put

    def held(bank, slot, adapter):
        assert gate.wait(SOON_S)
        put(bank, slot, adapter)

    monkeypatch.setattr(LoraBank, "put", held)
    yield gate
    gate.set()


def gone(running: Running, outcome: Outcome) -> None:
    """Cancel, and check that it is forgotten without another event."""
    running.cancel(outcome)
    running.assert_clean()
    assert all(isinstance(event, Delta) for event in outcome.events)


def test_cancel_while_it_decodes(running):
    outcome = running.generate(PROMPT, "acme/a", max_new_tokens=900)
    wait_until(lambda: len(outcome.deltas) > 3)
    gone(running, outcome)


def test_cancel_while_its_prompt_is_computed(running):
    seen = []

    def cancel() -> None:
        seen.append(running.engine.stats())
        running.cancel(outcome)

    running.recorder.after_step[3].append(cancel)
    outcome = running.generate(LONG, "acme/a")
    wait_until(lambda: bool(seen))
    running.assert_clean()
    assert seen[0].running == 1
    assert seen[0].kv_pages_used > 0
    assert outcome.events == []


def test_cancel_while_its_adapter_loads(running, gate):
    outcome = running.generate(PROMPT, "acme/a")
    wait_until(lambda: running.engine.stats().waiting == 1 and running.adapters.slot_counts()["lora"][0] == 1)
    gone(running, outcome)
    gate.set()
    assert running.generate(PROMPT, "acme/a").result().tokens


def test_cancel_while_it_waits_for_a_place(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store, max_batch_size=1) as running:
        first = running.generate(PROMPT, "acme/a", max_new_tokens=60)
        second = running.generate(PROMPT, "acme/b")
        running.cancel(second)
        assert len(first.result().tokens) == 60
        running.assert_clean()
        assert second.events == []


def test_cancel_before_the_engine_has_seen_it_and_of_nobody(running):
    for _ in range(20):
        running.cancel(running.generate(PROMPT, "acme/b", max_new_tokens=500))
    running.engine.cancel("nobody")
    running.assert_clean()


def test_cancel_under_preemption_leaves_the_others_alone(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store, kv_pages=90, page_size=1) as running:
        expected = {
            name: running.generate(PROMPT, name, max_new_tokens=50).result().tokens
            for name in (None, "acme/a")
        }
        outcomes = [
            running.generate(PROMPT, name, max_new_tokens=50) for name in (None, "acme/a", "acme/b", "acme/a")
        ]
        wait_until(lambda: running.engine.stats().preemptions > 0)
        running.cancel(outcomes[2])
        for index, name in ((0, None), (1, "acme/a"), (3, "acme/a")):
            assert outcomes[index].result().tokens == expected[name]


def test_a_load_that_fails(running):
    good = running.generate(PROMPT, "acme/a", max_new_tokens=40)
    bad = [running.generate(PROMPT, "acme/broken") for _ in range(3)]
    for outcome in bad:
        with pytest.raises(AdapterInvalidError):
            outcome.result()
    with pytest.raises(AdapterNotFoundError):
        running.generate(PROMPT, "acme/nobody")
    assert len(good.result().tokens) == 40
    assert running.adapters.slot_counts()["lora"][0] == 1


@pytest.mark.parametrize("place", ["run", "build"])
def test_a_step_that_raises_ends_its_requests_and_no_others(running, monkeypatch, place):
    part = running.engine._runner if place == "run" else running.engine._builder
    original = getattr(part, place)
    expected = running.generate(PROMPT, "acme/a", max_new_tokens=40).result().tokens
    outcomes = [running.generate(PROMPT, name, max_new_tokens=400) for name in (None, "acme/a", "acme/b")]
    wait_until(lambda: all(outcome.deltas for outcome in outcomes))

    def broken(*args):
        monkeypatch.setattr(part, place, original)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(part, place, broken)
    for outcome in outcomes:
        with pytest.raises(EngineError, match="the engine failed while it computed this request"):
            outcome.result()
    running.assert_clean()
    assert running.generate(PROMPT, "acme/a", max_new_tokens=40).result().tokens == expected
    assert sum(record.error is not None for record in running.recorder.requests) == 3


def test_nan_logits_end_their_request_alone(running, monkeypatch):
    expected = running.generate(PROMPT, max_new_tokens=30).result().tokens
    original = running.engine._runner.run

    def poisoned(inputs):
        logits = original(inputs)
        slots = inputs.slots.get("lora")
        if slots is not None:
            logits[slots.index[inputs.logit_rows] >= 0] = torch.nan
        return logits

    monkeypatch.setattr(running.engine._runner, "run", poisoned)
    base = running.generate(PROMPT, max_new_tokens=30)
    for send in (running.generate, running.score):
        with pytest.raises(EngineError, match="acme/a@1 gave no finite logits"):
            send(PROMPT, "acme/a").result()
        running.adapters.unload("acme/a", None, in_use=InUse.CANCEL).result()  # which ends its quarantine
    assert base.result().tokens == expected


def test_stop_fails_what_is_inside_and_keeps_nothing(llama_base, tokenizer, store, gate):
    running = Running(llama_base, tokenizer, store, max_batch_tokens=32, max_batch_size=2)
    with running:
        decoding = running.generate(PROMPT, max_new_tokens=900)
        wait_until(lambda: decoding.deltas)
        prompted = running.generate(LONG, max_new_tokens=900)
        loading = running.generate(PROMPT, "acme/a")
        waiting = running.generate(PROMPT, max_new_tokens=900)
        running.engine.stop()
        for outcome in (decoding, prompted, loading, waiting):
            assert isinstance(outcome.error, DrainingError)
        with pytest.raises(DrainingError):
            running.generate(PROMPT)
        gate.set()


def test_what_was_sent_to_an_engine_that_stops_is_answered(llama_base, tokenizer, store):
    """Submitted, but never seen by a step."""
    running = Running(llama_base, tokenizer, store)
    hold = threading.Event()
    with running:
        first = running.generate(PROMPT, max_new_tokens=5)
        running.recorder.after_step[1].append(lambda: hold.wait(SOON_S))
        wait_until(lambda: running.recorder.steps)
        second = running.generate(PROMPT)
        stopper = threading.Thread(target=running.engine.stop)
        stopper.start()
        wait_until(lambda: running.engine._stopping)
        hold.set()
        stopper.join(SOON_S)
        assert isinstance(first.error, DrainingError)
        assert isinstance(second.error, DrainingError)


def test_an_unloaded_adapter_fails_those_who_wait_for_it(running, gate):
    waiting = running.generate(PROMPT, "acme/c")
    wait_until(lambda: running.adapters.slot_counts()["lora"][0] == 1)
    left = running.adapters.unload("acme/c", None, in_use=InUse.CANCEL)
    with pytest.raises(AdapterUnloadedError):
        waiting.result()
    gate.set()
    assert left.result(SOON_S) == 1
    assert running.adapters.slot_counts()["lora"][0] == 0


def test_no_request_at_all(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store):
        pass
    engine = Engine(llama_base, tokenizer, None)
    engine.stop()


def test_a_scheduler_that_raises_fails_what_is_inside_and_the_engine_goes_on(running, monkeypatch):
    expected = running.generate(PROMPT, max_new_tokens=4).result().tokens

    def broken(scheduler: Scheduler) -> None:
        monkeypatch.undo()
        raise ArithmeticError("a bug")

    monkeypatch.setattr(Scheduler, "schedule", broken)
    with pytest.raises(EngineError, match="the engine failed"):
        running.generate(PROMPT, "acme/a").result()
    running.assert_clean()
    assert running.generate(PROMPT, max_new_tokens=4).result().tokens == expected


def test_an_observer_that_raises_changes_nothing(running, monkeypatch):
    expected = running.generate(PROMPT, max_new_tokens=4).result().tokens

    def broken(record: object) -> None:
        raise ArithmeticError("a bug")

    monkeypatch.setattr(running.recorder, "step", broken)
    monkeypatch.setattr(running.recorder, "finished", broken)
    assert running.generate(PROMPT, max_new_tokens=4).result().tokens == expected


def test_an_id_that_is_in_use_is_refused(running):
    request = GenerateRequest(
        "mine", PROMPT, SamplingParams(max_new_tokens=50, temperature=0.0, ignore_eos=True)
    )
    first = Outcome(request)
    running.engine.submit(request, first.sink)
    with pytest.raises(InvalidRequestError, match="mine is the id of a request"):
        running.engine.submit(request, Outcome(request).sink)
    assert len(first.result().tokens) == 50
