"""Steps that fail or hang, and adapters whose numbers are not finite."""

import shutil
import threading

import pytest
import torch
from hotswap_server.adapters.residency import InUse
from hotswap_server.engine.health import FAILURES_IN_A_ROW, EngineHealth
from hotswap_server.engine.prefixes import PrefixPages
from hotswap_server.errors import AdapterQuarantinedError, EngineError
from structlog.testing import capture_logs
from support.adapters import edit_tensors, write_lora, write_prefix
from support.models import random_prompt
from support.running import SOON_S, Running, wait_until

PROMPT = random_prompt(20, seed=0)


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    write_lora(llama, store / "acme" / "good" / "1", seed=1, r=4, target_modules=["q_proj", "down_proj"])
    write_lora(llama, store / "globex" / "good" / "1", seed=2, r=4, target_modules=["v_proj", "up_proj"])
    write_prefix(llama, store / "acme" / "prefix" / "1", 20)
    huge = write_lora(llama, store / "acme" / "huge" / "1", r=4, target_modules=["v_proj", "down_proj"])
    edit_tensors(huge, lambda tensors: {name: t * 1e25 for name, t in tensors.items()})
    shutil.copytree(huge, store / "acme" / "alias" / "1")
    return store


@pytest.fixture(autouse=True)
def logs():
    """What is logged; shown as tracebacks with all local variables, it would take seconds."""
    with capture_logs() as logs:
        yield logs


@pytest.fixture
def running(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store, max_batch_tokens=32, kv_pages=24) as running:
        yield running


@pytest.fixture
def break_steps(running, monkeypatch):
    """`break_steps(n)` makes the next `n` steps raise."""
    original = running.engine._runner.run
    left = 0

    def run(inputs):
        nonlocal left
        if left:
            left -= 1
            raise RuntimeError("out of memory")
        return original(inputs)

    monkeypatch.setattr(running.engine._runner, "run", run)

    def breaks(count: int) -> None:
        nonlocal left
        left = count

    return breaks


def fail_steps(running, break_steps, count: int) -> None:
    break_steps(count)
    for _ in range(count):
        with pytest.raises(EngineError):
            running.generate(PROMPT).result()


class Changes(list):
    def __init__(self, health: EngineHealth) -> None:
        health.on_change = self.append


def test_three_failures_in_a_row_break_the_engine_and_a_good_step_mends_it():
    health = EngineHealth()
    changes = Changes(health)
    for good in (False, False, None, True, False, False, None):
        health.began()
        health.ended(good=good)
    assert health.sound
    health.ended(good=False)
    assert not health.sound
    health.ended(good=None)
    assert not health.sound, "idling proves nothing"
    health.ended(good=True)
    assert changes == [False, True]
    assert health.num_failed == 5


def test_a_stuck_step_breaks_the_engine_until_it_ends():
    now = 0.0
    health = EngineHealth(lambda: now)
    changes = Changes(health)
    assert health.seconds_in_step() == 0
    assert not health.stuck(), "none has begun"
    health.began()
    now = 7.0
    assert health.seconds_in_step() == 7
    assert health.stuck()
    assert not health.stuck(), "once is enough"
    assert not health.sound
    health.ended(good=True)
    assert changes == [False, True]
    assert health.num_stuck == 1


def test_an_engine_that_fails_and_works_again_says_so(running, break_steps):
    changes = Changes(running.engine.health)
    fail_steps(running, break_steps, FAILURES_IN_A_ROW)
    wait_until(lambda: changes == [False])
    assert not running.engine.stats().sound
    assert running.generate(PROMPT).result().tokens
    wait_until(lambda: changes == [False, True])
    stats = running.engine.stats()
    assert (stats.sound, stats.steps_failed) == (True, 3)


def test_after_a_failed_step_what_waits_goes_on_by_itself(llama_base, tokenizer, store, monkeypatch):
    with Running(llama_base, tokenizer, store, max_batch_size=1) as running:
        original = running.engine._runner.run
        hold = threading.Event()

        def run(inputs):
            monkeypatch.setattr(running.engine._runner, "run", original)
            hold.wait(SOON_S)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(running.engine._runner, "run", run)
        broken = running.generate(PROMPT)
        wait_until(lambda: running.engine.stats().running == 1)
        waiting = [running.generate(PROMPT) for _ in range(2)]
        hold.set()
        assert isinstance(broken.error, EngineError)
        assert all(outcome.result().tokens for outcome in waiting)


def test_an_engine_that_nobody_asks_any_more_is_probed(running, break_steps):
    running.engine._watchdog._probe_every = 0.01
    changes = Changes(running.engine.health)
    fail_steps(running, break_steps, FAILURES_IN_A_ROW)
    wait_until(lambda: changes == [False, True])


def test_a_stuck_step_is_logged_with_its_stack(llama_base, tokenizer, store, monkeypatch, logs):
    hold = threading.Event()

    def where_it_hangs(inputs):
        hold.wait(SOON_S)
        return original(inputs)

    with Running(llama_base, tokenizer, store, step_timeout=0.05) as running:
        original = running.engine._runner.run
        monkeypatch.setattr(running.engine._runner, "run", where_it_hangs)
        outcome = running.generate(PROMPT, max_new_tokens=1)
        wait_until(lambda: not running.engine.health.sound)
        wait_until(lambda: any(entry["event"] == "step_stuck" for entry in logs))
        hold.set()
        assert outcome.result().tokens
        wait_until(lambda: running.engine.health.sound)
        [stuck] = [entry for entry in logs if entry["event"] == "step_stuck"]
        assert "where_it_hangs" in stuck["stack"]
        assert stuck["log_level"] == "error"
        assert running.engine.stats().steps_stuck == 1


@pytest.mark.parametrize("place", ["runner", "builder", "collector"])
def test_a_failed_step_leaks_no_prefix_page_and_no_slot(running, monkeypatch, place):
    expected = running.generate(PROMPT, "acme/prefix", max_new_tokens=20).result().tokens
    part = getattr(running.engine, f"_{place}")
    name = {"runner": "run", "builder": "build", "collector": "collect"}[place]
    original = getattr(part, name)
    outcomes = [running.generate(PROMPT, adapter) for adapter in ("acme/prefix", "acme/good", None)]

    def broken(*arguments):
        monkeypatch.setattr(part, name, original)
        raise RuntimeError("a fault")

    monkeypatch.setattr(part, name, broken)
    outcomes += [running.generate(PROMPT, "acme/prefix", max_new_tokens=60) for _ in range(2)]
    assert any(isinstance(outcome.error, EngineError) for outcome in outcomes)
    running.assert_clean()
    assert running.engine.stats().kv_pages_used == 1, "the prefix's full page, for the next that needs it"
    assert running.generate(PROMPT, "acme/prefix", max_new_tokens=20).result().tokens == expected


def test_a_prefix_that_cannot_be_written_leaves_nothing(running, monkeypatch):
    def broken(pages, prefix, page):
        monkeypatch.undo()
        raise RuntimeError("a fault")

    monkeypatch.setattr(PrefixPages, "write_rest", broken)
    with pytest.raises(EngineError):
        running.generate(PROMPT, "acme/prefix").result()
    running.assert_clean()
    assert running.generate(PROMPT, "acme/prefix").result().tokens


def test_messages_that_raise_do_not_end_the_engine(running, monkeypatch):
    def broken(scheduler, sequence):
        monkeypatch.undo()
        raise ArithmeticError("a bug")

    monkeypatch.setattr(type(running.engine._scheduler), "add", broken)
    with pytest.raises(EngineError):
        running.generate(PROMPT).result()
    assert running.generate(PROMPT).result().tokens


def test_numbers_that_are_not_finite_stay_with_their_adapter(running):
    """Real ones: the weights are finite, what they compute is not; pages of that are used by others after."""
    others = (None, "acme/good", "globex/good", "acme/prefix")
    expected = [running.generate(PROMPT, name, max_new_tokens=60).result().tokens for name in others]
    beside = [running.generate(PROMPT, name, max_new_tokens=60) for name in others]
    wait_until(lambda: all(outcome.deltas for outcome in beside))
    with pytest.raises(EngineError, match="acme/huge@1 gave no finite logits"):
        running.generate(PROMPT, "acme/huge").result()
    assert [outcome.result().tokens for outcome in beside] == expected
    after = [running.generate(PROMPT, name, max_new_tokens=60) for name in others]
    assert [outcome.result().tokens for outcome in after] == expected


def test_garbage_in_pages_that_nobody_has_written_matters_to_nobody(running):
    expected = running.generate(PROMPT, max_new_tokens=30).result().tokens
    running.assert_clean()
    for cache in (*running.engine.cache.keys, *running.engine.cache.values):
        cache.fill_(torch.nan)
    assert running.generate(PROMPT, max_new_tokens=30).result().tokens == expected


def test_a_quarantined_adapter_is_refused_by_content_until_it_is_unloaded(running, logs):
    with pytest.raises(EngineError):
        running.generate(PROMPT, "acme/huge").result()
    assert [entry["adapter"] for entry in logs if entry["event"] == "adapter_quarantined"] == ["acme/huge@1"]
    for name in ("acme/huge", "acme/alias"):
        with pytest.raises(AdapterQuarantinedError, match=f"{name}@1 gave logits that are not finite"):
            running.generate(PROMPT, name)
        assert "not finite" in running.adapters.get(name, None).error
    assert running.generate(PROMPT, "acme/good").result().tokens
    assert running.engine.stats().adapters_quarantined == 1
    running.adapters.unload("acme/alias", None, in_use=InUse.REFUSE).result(SOON_S)
    assert running.adapters.get("acme/huge", None).error is None
    with pytest.raises(EngineError, match="gave no finite logits"):
        running.generate(PROMPT, "acme/huge").result()


def test_a_republished_adapter_is_served_though_its_name_was_quarantined(
    llama, llama_base, tokenizer, tmp_path
):
    first = write_lora(llama, tmp_path / "acme" / "x" / "1", r=4, target_modules=["down_proj"])
    edit_tensors(first, lambda tensors: {name: t * 1e25 for name, t in tensors.items()})
    with Running(llama_base, tokenizer, tmp_path) as running:
        with pytest.raises(EngineError):
            running.generate(PROMPT, "acme/x").result()
        write_lora(llama, tmp_path / "acme" / "x" / "2", r=4, target_modules=["down_proj"])
        wait_until(lambda: running.adapters.resolve("acme/x", None).version == 2)
        assert running.generate(PROMPT, "acme/x").result().tokens


def test_what_waits_for_a_quarantined_adapter_is_refused_too(llama_base, tokenizer, store):
    with Running(llama_base, tokenizer, store, max_batch_size=1) as running:
        first = running.generate(PROMPT, max_new_tokens=300)
        wait_until(lambda: first.deltas)
        outcomes = [running.generate(PROMPT, "acme/huge") for _ in range(3)]
        running.cancel(first)
        kinds = [type(outcome.error) for outcome in outcomes]
        assert kinds == [EngineError, AdapterQuarantinedError, AdapterQuarantinedError]


def test_an_adapter_is_not_blamed_where_the_base_fails_too(running, monkeypatch):
    original, hold = running.engine._runner.run, threading.Event()

    def run(inputs):
        hold.wait(SOON_S)
        return original(inputs) * torch.nan

    monkeypatch.setattr(running.engine._runner, "run", run)
    first = running.generate(PROMPT[:5])
    wait_until(lambda: running.engine.stats().running == 1)
    outcomes = [running.generate(PROMPT[:5], name) for name in (None, "acme/good")]
    scored = running.score(PROMPT[:5])
    hold.set()
    for outcome in (first, *outcomes, scored):
        assert isinstance(outcome.error, EngineError)
    monkeypatch.undo()
    assert running.generate(PROMPT, "acme/good").result().tokens
