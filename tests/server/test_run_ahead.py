"""Steps launched before the tokens of the last are read: every answer is that of an engine that waits."""

import random
import threading
from functools import partial

import numpy as np
import pytest
import torch
from hotswap_server.core import Delta, FinishReason
from hotswap_server.engine.ahead import NextTokens
from hotswap_server.engine.buffers import StepBuffers
from hotswap_server.errors import EngineError
from structlog.testing import capture_logs
from support.adapters import write_bottleneck, write_lora, write_prefix
from support.models import random_prompt
from support.running import SOON_S, Outcome, Running, wait_until

CPU = torch.device("cpu")
PROMPT = random_prompt(20, seed=0)
EVERYONE = (None, "acme/lora", "globex/lora", "acme/bottleneck", "acme/prefix")


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    write_lora(llama, store / "acme" / "lora" / "1", r=4, target_modules="all-linear")
    write_lora(llama, store / "globex" / "lora" / "1", seed=1, r=7, target_modules=["q_proj", "down_proj"])
    write_bottleneck(llama, store / "acme" / "bottleneck" / "1", bottleneck_size=8)
    write_prefix(llama, store / "acme" / "prefix" / "1", tokens=20)
    return store


@pytest.fixture(autouse=True)
def logs():
    """What is logged; shown as tracebacks with all local variables, it would take seconds."""
    with capture_logs() as logs:
        yield logs


@pytest.fixture
def engine(llama_base, tokenizer, store):
    return partial(Running, llama_base, tokenizer, store, run_ahead=True)


@pytest.fixture
def running(engine):
    with engine() as running:
        yield running


@pytest.fixture(scope="module")
def expected(llama_base, tokenizer, store):
    """Sixty tokens after PROMPT for each of EVERYONE, by an engine that waits for every step."""
    with Running(llama_base, tokenizer, store, run_ahead=False) as running:
        outcomes = {name: running.generate(PROMPT, name, max_new_tokens=60) for name in EVERYONE}
        return {name: outcome.result().tokens for name, outcome in outcomes.items()}


def count_choices(running: Running, monkeypatch) -> list[int]:
    """The batch sizes of steps that choose their tokens themselves, as they are launched."""
    sizes: list[int] = []
    choose = running.engine._runner.choose

    def counted(inputs):
        sizes.append(len(inputs.rows_per_entry))
        return choose(inputs)

    monkeypatch.setattr(running.engine._runner, "choose", counted)
    return sizes


def random_requests(seed: int) -> list[tuple[str, dict]]:
    """What to send, as methods of Running with their arguments; most of it greedy."""
    rng = random.Random(seed)
    # Together more pages than there are, and no load to wait for: they preempt one another on any machine.
    long = [
        {"prompt": random_prompt(40, seed=1000 * number + seed), "max_new_tokens": 60}
        for number in range(1, 4)
    ]
    requests = [("generate", options) for options in long]
    for number in range(24):
        prompt = random_prompt(rng.randint(2, 70), seed=seed * 100 + number)
        adapter = rng.choice(EVERYONE)
        if rng.random() < 0.15:
            requests.append(("score", {"tokens": prompt, "adapter": adapter}))
            continue
        options = {"prompt": prompt, "adapter": adapter, "max_new_tokens": rng.choice([1, 2, 9, 30, 60])}
        if rng.random() < 0.4:
            options["stop_token_ids"] = tuple(rng.sample(range(300), 20))
        if rng.random() < 0.3:
            options["stop"] = tuple(rng.sample("abcdefghijklmnopqrstuvwxyz ", 3))
        kind = rng.random()
        if kind < 0.1:
            options |= {"temperature": 0.9, "seed": number, "top_k": 20}
        elif kind < 0.2:
            options["logprobs"] = 2
        elif kind < 0.25:
            options["repetition_penalty"] = 1.3
        requests.append(("generate", options))
    return requests


def told(outcome: Outcome) -> tuple[object, ...]:
    """All that does not depend on the clock; numbers as far as they agree between batches."""
    if outcome.result().deltas:
        finished = outcome.finished
        counts = (finished.num_prompt_tokens, finished.num_generated_tokens)
        logprobs = [round(entry.logprob, 2) for entry in outcome.logprobs]
        return outcome.tokens, outcome.text, finished.finish_reason, finished.path, counts, logprobs
    return [entry.token_id for entry in outcome.scored.logprobs], outcome.scored.num_prompt_tokens


@pytest.mark.parametrize("seed", range(4))
def test_random_mixes_are_answered_as_without(engine, monkeypatch, seed):
    """Under preemption, with fewer slots than adapters, and with requests that come and go."""
    requests = random_requests(seed)
    answers, sizes, preemptions = [], [], 0
    for run_ahead in (False, True):
        with engine(
            run_ahead=run_ahead, kv_pages=40, page_size=4, slots=2, max_batch_size=6, max_batch_tokens=32
        ) as running:
            if run_ahead:
                sizes = count_choices(running, monkeypatch)
            calls = [partial(getattr(running, method), **options) for method, options in requests]
            answers.append([told(outcome) for outcome in running.arrive(calls, every=2)])
            preemptions = running.engine.stats().preemptions
    assert answers[0] == answers[1]
    assert preemptions > 0
    assert len(sizes) > 20


def test_a_request_that_ends_by_its_length_costs_nothing(running, monkeypatch, expected):
    sizes = count_choices(running, monkeypatch)
    assert running.generate(PROMPT, max_new_tokens=5).result().tokens == expected[None][:5]
    running.assert_clean()
    assert sizes == [1] * 5
    assert running.generate(PROMPT, max_new_tokens=1).result().tokens == expected[None][:1]
    running.assert_clean()
    assert sizes == [1] * 6


@pytest.mark.parametrize("how", ["stop_token_ids", "stop"])
def test_a_request_that_ends_sooner_costs_one_row(running, monkeypatch, expected, how, tokenizer):
    whole = running.generate(PROMPT, max_new_tokens=30).result()
    at = next(i for i in range(3, 30) if whole.tokens[i] not in whole.tokens[:i] and whole.deltas[i].text)
    end = (whole.tokens[at],) if how == "stop_token_ids" else (whole.deltas[at].text,)
    running.assert_clean()
    sizes = count_choices(running, monkeypatch)
    before = len(running.recorder.steps)
    outcome = running.generate(PROMPT, max_new_tokens=30, **{how: end}).result()
    running.assert_clean()
    steps = len(outcome.tokens)
    assert outcome.tokens == whole.tokens[:steps]
    reason = FinishReason.STOP_TOKEN if how == "stop_token_ids" else FinishReason.STOP_STRING
    assert outcome.finished.finish_reason is reason
    wait_until(lambda: not running.engine._flights.underway)
    assert len(sizes) == steps + 1
    assert len(running.recorder.steps) - before == steps, "a step in vain is not told of"


def test_steps_that_someone_wants_more_of_are_waited_for(running, monkeypatch, expected):
    sizes = count_choices(running, monkeypatch)
    for options in ({"logprobs": 0}, {"repetition_penalty": 1.1}, {"temperature": 1.0, "seed": 1}):
        assert len(running.generate(PROMPT, max_new_tokens=4, **options).result().tokens) == 4
    assert running.score(PROMPT).scored.num_prompt_tokens == 20
    assert sizes == []
    beside = running.generate(PROMPT, "acme/prefix", max_new_tokens=60)
    assert running.generate(PROMPT, max_new_tokens=30, logprobs=1).result().tokens == expected[None][:30]
    assert beside.result().tokens == expected["acme/prefix"]


def test_a_slot_that_was_left_early_is_used_by_another_adapter_at_once(engine, expected):
    with engine(slots=1) as running:
        for name in ("acme/lora", "globex/lora") * 3:
            tokens = expected[name]
            end = next(i for i in range(2, 60) if tokens[i] not in tokens[:i])
            outcome = running.generate(PROMPT, name, max_new_tokens=60, stop_token_ids=(tokens[end],))
            assert outcome.result().tokens == tokens[: end + 1]


def test_an_adapter_is_brought_while_a_step_runs(running, monkeypatch, expected):
    choose, held, hold = running.engine._runner.choose, threading.Event(), threading.Event()

    def slow(inputs):
        held.set()
        assert hold.wait(SOON_S)
        return choose(inputs)

    monkeypatch.setattr(running.engine._runner, "choose", slow)
    first = running.generate(PROMPT, max_new_tokens=60)
    assert held.wait(SOON_S)
    outcome = running.generate(PROMPT, "acme/lora", max_new_tokens=60)
    wait_until(lambda: bool(running.recorder.loads))
    hold.set()
    assert outcome.result().tokens == expected["acme/lora"]
    assert first.result().tokens == expected[None]


def test_cancelled_while_a_step_is_underway(running, expected):
    others = [running.generate(PROMPT, name, max_new_tokens=60) for name in EVERYONE]
    gone = [running.generate(PROMPT, name, max_new_tokens=900) for name in EVERYONE]
    wait_until(lambda: all(outcome.deltas for outcome in gone))
    for outcome in gone:
        running.cancel(outcome)
    assert [outcome.result().tokens for outcome in others] == [expected[name] for name in EVERYONE]
    running.assert_clean()
    assert all(isinstance(event, Delta) for outcome in gone for event in outcome.events)


def test_stopped_while_a_step_is_underway(engine):
    with engine() as running:
        outcomes = [running.generate(PROMPT, name, max_new_tokens=900) for name in EVERYONE]
        wait_until(lambda: all(outcome.deltas for outcome in outcomes))
        running.engine.stop()
        assert all(outcome.error is not None for outcome in outcomes)


def test_what_is_done_between_steps_finds_none_underway(running, expected):
    outcome = running.generate(PROMPT, max_new_tokens=60)
    engine = running.engine
    for _ in range(5):
        assert engine.between_steps(lambda: engine._flights.underway).result(SOON_S) is False
        assert engine.chores.submit(lambda: engine._flights.underway).result(SOON_S) is False
    assert outcome.result().tokens == expected[None]


def test_merged_and_unmerged_while_steps_are_underway(running, expected):
    outcomes = [running.generate(PROMPT, name, max_new_tokens=60) for name in (None, "acme/lora")]
    for _ in range(3):
        running.merge("acme/lora")
        running.unmerge("acme/lora")
    assert [outcome.result().tokens for outcome in outcomes] == [expected[None], expected["acme/lora"]]


def test_a_launch_that_raises_loses_no_token_of_the_step_before(running, monkeypatch, expected):
    runner = running.engine._runner
    choose, begun = runner.choose, threading.Event()

    def broken(inputs):
        if begun.is_set():
            monkeypatch.setattr(runner, "choose", choose)
            raise RuntimeError("out of memory")
        return choose(inputs)

    monkeypatch.setattr(runner, "choose", broken)
    outcomes = [running.generate(PROMPT, name, max_new_tokens=60) for name in (None, "acme/prefix")]
    wait_until(lambda: all(outcome.deltas for outcome in outcomes))
    begun.set()
    for outcome, name in zip(outcomes, (None, "acme/prefix"), strict=True):
        assert isinstance(outcome.error, EngineError)
        assert outcome.tokens == expected[name][: len(outcome.tokens)]
    running.assert_clean()
    assert running.generate(PROMPT, max_new_tokens=60).result().tokens == expected[None]


def test_a_choice_that_fails_ends_the_sequences_of_its_step(running, monkeypatch, expected):
    collector = running.engine._collector
    collect, begun = collector.collect_chosen, threading.Event()

    def broken(*arguments):
        if begun.is_set():
            monkeypatch.setattr(collector, "collect_chosen", collect)
            raise RuntimeError("an illegal memory access")
        collect(*arguments)

    monkeypatch.setattr(collector, "collect_chosen", broken)
    outcome = running.generate(PROMPT, max_new_tokens=60)
    wait_until(lambda: bool(outcome.deltas))
    begun.set()
    assert isinstance(outcome.error, EngineError)
    running.assert_clean()
    assert running.generate(PROMPT, "acme/lora", max_new_tokens=60).result().tokens == expected["acme/lora"]


def test_logits_that_are_not_finite_end_their_request_alone(running, monkeypatch, expected):
    run = running.engine._runner.run

    def poisoned(inputs):
        logits = run(inputs)
        slots = inputs.slots.get("lora")
        if slots is not None:
            logits[slots.index[inputs.logit_rows] >= 0] = torch.nan
        return logits

    monkeypatch.setattr(running.engine._runner, "run", poisoned)
    base = running.generate(PROMPT, max_new_tokens=60)
    wait_until(lambda: bool(base.deltas))
    with pytest.raises(EngineError, match="globex/lora@1 gave no finite logits"):
        running.generate(PROMPT, "globex/lora").result()
    assert base.result().tokens == expected[None]


def test_the_likeliest_token_of_each_row_and_none_where_nothing_is_finite():
    tokens = NextTokens(4, CPU)
    tokens.choose(torch.tensor([[0.0, 2.0, 2.0], [1.0, torch.nan, 0.0], [-torch.inf] * 3]))
    first = tokens.fetch(3)
    tokens.choose(torch.tensor([[5.0, 2.0, 2.0]]))
    second = tokens.fetch(1)
    assert first.wait() == [1, None, None]
    assert second.wait() == [0]
    assert tokens.tokens[0] == 0


def test_buffers_take_ids_from_what_was_chosen():
    buffers = StepBuffers(max_sequences=4, max_pages=1, device=CPU)
    buffers.chosen.copy_(torch.tensor([7, 8, 9, 10]))
    row = np.arange(3)
    fill = partial(
        buffers.fill, 4, ids=row + 20, positions=row, pages=row, offsets=row, context=row, slots={}
    )
    inputs = fill(chosen={0: 3, 2: 1})
    assert inputs.flat[inputs.sources].tolist() == [10, 21, 8, 0]
    assert inputs.flat[fill().sources].tolist() == [20, 21, 22, 0]


def test_a_side_that_may_be_on_its_way_is_not_written():
    buffers = StepBuffers(max_sequences=4, max_pages=1, device=CPU)
    first = buffers.turn()
    second = buffers.turn()
    second[0, 0] = 5
    assert first[0, 0] == 0
    assert np.shares_memory(buffers.turn(), first)
