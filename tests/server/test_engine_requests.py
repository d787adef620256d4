"""What one request sees of the engine: events, limits, stops, scores, timings."""

import pytest
import torch
from hotswap_server.core import (
    Delta,
    Finished,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    Scored,
    ServingPath,
)
from hotswap_server.engine.engine import Engine, EngineOptions
from hotswap_server.engine.overload import QueueOptions
from hotswap_server.errors import DrainingError, InvalidRequestError, OverloadedError
from support.adapters import write_lora
from support.models import VOCAB_SIZE, generate_greedily, random_prompt
from support.running import Running, wait_until

PROMPT = random_prompt(10, seed=4)


@pytest.fixture(scope="module")
def running(llama, llama_base, tokenizer, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    write_lora(llama, store / "acme" / "a" / "1", r=2, target_modules=["q_proj"])
    with Running(llama_base, tokenizer, store, max_batch_tokens=40) as running:
        yield running


def test_deltas_then_one_finished(running, tokenizer):
    outcome = running.generate(PROMPT, "acme/a", max_new_tokens=30).result()
    assert [type(event) for event in outcome.events] == [Delta] * 30 + [Finished]
    assert all(len(delta.token_ids) == 1 for delta in outcome.deltas)
    assert outcome.text == tokenizer.decode(outcome.tokens, skip_special_tokens=True)
    finished = outcome.finished
    assert finished.finish_reason is FinishReason.LENGTH
    assert (finished.num_prompt_tokens, finished.num_generated_tokens) == (10, 30)
    assert finished.path is ServingPath.BATCHED
    assert finished.timings.prefill > 0
    assert finished.timings.decode > 0
    assert running.generate(PROMPT).finished.path is ServingPath.BASE
    record = running.recorder.requests[-2]
    assert (record.method, record.finish_reason, record.error) == ("lora", FinishReason.LENGTH, None)
    assert len(record.inter_token) == 29
    assert record.ttft > 0


def test_the_end_of_sequence_is_the_last_token_and_has_no_text(llama, running, tokenizer):
    expected = generate_greedily(llama, PROMPT, 12)
    prefix = expected[:5]
    assert expected[5] not in prefix
    outcome = running.generate(PROMPT, stop_token_ids=(expected[5],), max_new_tokens=12).result()
    assert outcome.tokens == expected[:6]
    assert outcome.text == tokenizer.decode(prefix)
    assert outcome.finished.finish_reason is FinishReason.STOP_TOKEN
    assert outcome.finished.num_generated_tokens == 6


def test_the_base_s_end_of_sequence_stops_unless_ignored(running, monkeypatch):
    end = running.generate(PROMPT, max_new_tokens=3).result().tokens[0]
    monkeypatch.setattr(running.engine._collector, "_eos_token_ids", frozenset({end}))
    stopped = running.generate(PROMPT, ignore_eos=False).result()
    assert (stopped.tokens, stopped.text) == ([end], "")
    assert stopped.finished.finish_reason is FinishReason.STOP_TOKEN
    assert len(running.generate(PROMPT, ignore_eos=True).result().tokens) == 8


def test_a_stop_string_ends_the_text_before_it(running):
    # Letters only, so that every token is printable.
    free = running.generate(PROMPT, max_new_tokens=40).result()
    texts = [delta.text for delta in free.deltas]
    index = next(i for i in range(3, 40) if texts[i] and texts[i] not in "".join(texts[:i]))
    stop = texts[index]
    outcome = running.generate(PROMPT, max_new_tokens=40, stop=(stop, "never there")).result()
    assert outcome.text == free.text[: free.text.index(stop)]
    assert outcome.tokens == free.tokens[: index + 1]
    assert outcome.finished.finish_reason is FinishReason.STOP_STRING


def test_logprobs_of_generated_tokens(llama, running):
    outcome = running.generate(PROMPT, temperature=0.9, top_k=3, seed=1, logprobs=4).result()
    ids = [*PROMPT, *outcome.tokens]
    with torch.inference_mode():
        logprobs = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert len(outcome.logprobs) == 8
    for index, entry in enumerate(outcome.logprobs):
        row = logprobs[len(PROMPT) + index - 1]
        assert entry.token_id == outcome.tokens[index]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(4).indices.tolist()


@pytest.mark.parametrize("score_from", [1, 2, 39, 40, 41, 100, 149])
@pytest.mark.parametrize("top", [0, 3])
def test_scores_equal_log_softmax_over_chunks(llama, running, score_from, top):
    tokens = random_prompt(150, seed=8)
    with torch.inference_mode():
        logprobs = llama(torch.tensor([tokens])).logits[0].log_softmax(-1)
    scored = running.score(tokens, score_from=score_from, top_logprobs=top).scored
    assert scored.num_prompt_tokens == 150
    assert [entry.token_id for entry in scored.logprobs] == list(tokens[score_from:])
    for position, entry in enumerate(scored.logprobs, start=score_from):
        row = logprobs[position - 1]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [value for _, value in entry.top] == pytest.approx(row.topk(top).values.tolist(), abs=1e-4)


def test_scores_beside_generations_under_preemption(llama, llama_base, tokenizer, tmp_path):
    texts = [random_prompt(length, seed=length) for length in (60, 2, 45, 30, 59)]
    with Running(llama_base, tokenizer, tmp_path, kv_pages=80, page_size=1, max_batch_tokens=16) as running:
        generations = [running.generate(random_prompt(20, seed=s), max_new_tokens=30) for s in (1, 2)]
        scores = [running.score(text) for text in texts]
        later = [running.generate(random_prompt(20, seed=s), max_new_tokens=30) for s in (3, 4)]
        for outcome in generations + later:
            assert outcome.result().tokens == generate_greedily(llama, outcome.request.prompt_ids, 30)
        for text, outcome in zip(texts, scores, strict=True):
            with torch.inference_mode():
                logprobs = llama(torch.tensor([text])).logits[0].log_softmax(-1)
            expected = logprobs[torch.arange(len(text) - 1), list(text[1:])].tolist()
            assert [entry.logprob for entry in outcome.scored.logprobs] == pytest.approx(expected, abs=1e-4)
        assert running.engine.stats().preemptions > 0


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        ((), "input: must hold at least one token"),
        ((5,) * 1024, "input: has 1024 tokens; this server takes 1023 at most"),
        ((1, VOCAB_SIZE), "token_ids: 300 is outside the vocabulary of 300"),
        ((1, -1), "token_ids: -1 is outside the vocabulary"),
    ],
)
def test_prompts_that_cannot_be_served_are_refused_at_once(running, prompt, field):
    with pytest.raises(InvalidRequestError, match=field):
        running.generate(prompt)


@pytest.mark.parametrize(("length", "score_from"), [(1, 1), (5, 5), (5, 0)])
def test_scores_of_nothing_are_refused(running, length, score_from):
    with pytest.raises(InvalidRequestError, match="text: must hold a token to score"):
        running.score(PROMPT[:length], score_from=score_from)


def test_generation_ends_at_the_context(running):
    prompt = random_prompt(1015, seed=0)
    outcome = running.generate(prompt, max_new_tokens=None).result()
    assert outcome.finished.num_generated_tokens == 9
    assert outcome.finished.finish_reason is FinishReason.LENGTH
    assert len(running.score(random_prompt(1024, seed=1)).scored.logprobs) == 1023


def test_the_cache_bounds_the_context(llama_base, tokenizer, tmp_path):
    with Running(llama_base, tokenizer, tmp_path, kv_pages=3, page_size=8) as running:
        assert running.engine.max_context == 24
        assert len(running.generate(random_prompt(23, seed=0), max_new_tokens=50).result().tokens) == 1
        assert len(running.generate(random_prompt(2, seed=0), max_new_tokens=50).result().tokens) == 22
        with pytest.raises(InvalidRequestError, match="takes 23 at most"):
            running.generate(random_prompt(24, seed=0))
    with pytest.raises(InvalidRequestError, match="kv_cache_bytes: must hold at least one page"):
        Engine(llama_base, tokenizer, running.adapters, EngineOptions(kv_cache_bytes=10))


def test_a_full_queue_refuses(llama_base, tokenizer, tmp_path):
    with Running(
        llama_base, tokenizer, tmp_path, max_batch_size=1, queue=QueueOptions(max_requests=2)
    ) as running:
        first = running.generate(PROMPT, max_new_tokens=500)
        wait_until(lambda: first.deltas)
        others = [running.generate(PROMPT) for _ in range(2)]
        with pytest.raises(OverloadedError, match="2 requests are waiting already"):
            running.generate(PROMPT)
        assert first.result().tokens[:8] == others[0].result().tokens == others[1].result().tokens


def test_a_drained_engine_finishes_what_it_has_and_takes_no_more(llama_base, tokenizer, tmp_path):
    with Running(llama_base, tokenizer, tmp_path) as running:
        outcome = running.generate(PROMPT, max_new_tokens=50)
        running.engine.drain()
        with pytest.raises(DrainingError, match="shutting down"):
            running.generate(PROMPT)
        assert len(outcome.result().tokens) == 50


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1.0}, "sampling.temperature"),
        ({"temperature": float("nan")}, "sampling.temperature"),
        ({"top_p": 0.0}, "sampling.top_p"),
        ({"top_k": -1}, "sampling.top_k"),
        ({"min_p": 1.5}, "sampling.min_p"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty"),
        ({"seed": -1}, "sampling.seed"),
        ({"max_new_tokens": 0}, "sampling.max_new_tokens"),
        ({"stop": ("",)}, "sampling.stop"),
        ({"stop": ("x",) * 17}, "sampling.stop"),
        ({"logprobs": 21}, "sampling.logprobs"),
    ],
)
def test_sampling_parameters_out_of_range_name_the_field(options, field):
    with pytest.raises(InvalidRequestError, match=f"^{field}: ") as caught:
        GenerateRequest("x", (1,), SamplingParams(**options))
    assert caught.value.field == field


def test_only_scored_ends_a_score(running):
    assert [type(event) for event in running.score(PROMPT).result().events] == [Scored]
