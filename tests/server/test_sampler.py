import math

import pytest
import torch
from hotswap_server.core import SamplingParams
from hotswap_server.engine.sampler import SamplingRow, describe_logprob, sample, uniform
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

DRAWS = 6000


def random_logits(vocab: int, *, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference_probs(logits: torch.Tensor, params: SamplingParams, seen: list[int]) -> torch.Tensor:
    """The distribution that transformers' processors leave, in the order of its `generate`."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    scores = processors(torch.tensor([seen]), logits[None].clone())
    return scores.softmax(dim=-1)[0]


def draws(logits: torch.Tensor, params: SamplingParams, seen: list[int], count: int = DRAWS) -> torch.Tensor:
    """How often each token is drawn, by position and seed; as a share."""
    rows = [SamplingRow(params, seed, 0, seen) for seed in range(count)]
    chosen = [
        sampled.token_id
        for start in range(0, count, 500)
        for sampled in sample(logits.expand(500, -1).clone(), rows[start : start + 500])
        if sampled is not None
    ]
    assert len(chosen) == count
    return torch.bincount(torch.tensor(chosen), minlength=len(logits)) / count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10**6},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"top_p": 1e-6},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.5},
        {"temperature": 1.4, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(options):
    logits = random_logits(60)
    seen = [*logits.topk(5).indices.tolist(), 3, 3, 9]
    params = SamplingParams(**options)
    expected = reference_probs(logits, params, seen)
    got = draws(logits, params, seen)
    assert not got[expected == 0].any(), "a token that transformers filters out"
    # Four standard deviations of a share, and something for tokens that hardly occur.
    bound = 4 * (expected * (1 - expected) / DRAWS).sqrt() + 1e-3
    assert ((got - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_p": 0.2},
        {"min_p": 0.5},
        {"top_k": 2000, "top_p": 0.5},
        {"top_k": 1500},
        {"top_k": 3000, "top_p": 0.3, "min_p": 0.01},
        {"top_k": 900, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["flat", "steep"])
def test_the_same_tokens_are_kept_of_a_large_vocabulary(options, scale):
    """By inverse transform: the smallest and largest uniforms give the ends of the kept set, in order."""
    logits = random_logits(5000, scale=scale)
    params = SamplingParams(**options)
    expected = reference_probs(logits, params, [0])
    order = logits.sort(descending=True).indices
    cumulative = expected[order].double().cumsum(0)
    for seed in range(300):
        [sampled] = sample(logits[None].clone(), [SamplingRow(params, seed, 5, [0])])
        assert sampled is not None
        u = uniform(seed, 5) * float(cumulative[-1])
        position = int((order == sampled.token_id).nonzero())
        # Summation order moves a boundary by rounding.
        assert float(cumulative[position]) >= u - 1e-5
        assert position == 0 or float(cumulative[position - 1]) <= u + 1e-5


def test_greedy_takes_the_largest_after_the_penalty():
    logits = torch.tensor([1.0, 3.0, 2.9, -1.0])
    greedy = SamplingParams(temperature=0)
    penalised = SamplingParams(temperature=0, repetition_penalty=1.2)
    rows = [
        SamplingRow(greedy, 0, 0, [1]),
        SamplingRow(penalised, 0, 0, [1, 1]),
        SamplingRow(penalised, 0, 0, [3]),
    ]
    assert [sampled and sampled.token_id for sampled in sample(logits.expand(3, -1).clone(), rows)] == [
        1,
        2,
        1,
    ]


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5, 100.0])
@pytest.mark.parametrize("top_k", [0, 3])
def test_extreme_temperatures_draw_a_token(temperature, top_k):
    logits = random_logits(50)
    params = SamplingParams(temperature=temperature, top_k=top_k)
    tokens = {
        sampled.token_id
        for seed in range(20)
        for sampled in sample(logits[None].clone(), [SamplingRow(params, seed, 0, [0])])
        if sampled is not None
    }
    if temperature < 1:
        assert tokens == {int(logits.argmax())}
    else:
        assert len(tokens) > (1 if top_k else 10)


def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(40, 3000, generator=generator) * 2
    options = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.9},
        {"top_k": 9, "temperature": 2.0},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3, "logprobs": 2},
    ]
    rows = [SamplingRow(SamplingParams(**options[i % 6]), i, i, [i, i + 1]) for i in range(40)]
    together = sample(logits.clone(), rows)
    for index, row in enumerate(rows):
        assert sample(logits[index : index + 1].clone(), [row])[0] == together[index]


def test_the_same_seed_and_position_draw_the_same_and_others_differ():
    logits = random_logits(1000, scale=0.1)
    rows = [SamplingRow(SamplingParams(), seed, index, [0]) for seed in range(20) for index in range(20)]
    first, again = (sample(logits.expand(400, -1).clone(), rows) for _ in range(2))
    assert first == again
    assert len({sampled.token_id for sampled in first if sampled}) > 250


def test_uniforms_are_uniform():
    drawn = [uniform(seed, index) for seed in range(200) for index in range(200)]
    values = torch.tensor(drawn, dtype=torch.float64)
    assert ((values >= 0) & (values < 1)).all()
    counts = torch.histc(values, bins=50, min=0, max=1)
    chi_squared = float(((counts - 800) ** 2 / 800).sum())
    assert chi_squared < 49 + 5 * math.sqrt(2 * 49)
    grid = values.view(200, 200) - 0.5
    for shifted in (grid[:, 1:] * grid[:, :-1], grid[1:] * grid[:-1]):
        # Neither along a request nor between neighbouring seeds.
        assert abs(float(shifted.mean()) * 12) < 5 / math.sqrt(shifted.numel())
    assert len(set(values.tolist())) == 40_000
    assert all(0 <= uniform(seed, 10**6) < 1 for seed in (0, 2**63 - 1))


def test_the_smallest_and_largest_uniform_choose_tokens_that_may_be_chosen(monkeypatch):
    logits = torch.tensor([-math.inf, 0.0, 1.0, -math.inf])
    for value, expected in ((0.0, {1, 2}), (1 - 2**-53, {1, 2})):
        monkeypatch.setattr("hotswap_server.engine.sampler.uniform", lambda seed, index, value=value: value)
        for options in ({}, {"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.01}):
            [sampled] = sample(logits[None].clone(), [SamplingRow(SamplingParams(**options), 0, 0, [0])])
            assert sampled is not None
            assert sampled.token_id in expected


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.5, "logprobs": 3}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_nan_or_infinity_gives_none_and_leaves_the_others_alone(options, bad):
    logits = random_logits(30).repeat(3, 1)
    logits[1, 7] = bad
    rows = [SamplingRow(SamplingParams(**options), index, 0, [0]) for index in range(3)]
    first, broken, last = sample(logits.clone(), rows)
    assert broken is None
    for index, sampled in ((0, first), (2, last)):
        assert [sampled] == sample(random_logits(30)[None], [rows[index]])


def test_a_row_without_any_finite_value_gives_none():
    assert sample(torch.full((1, 4), -math.inf), [SamplingRow(SamplingParams(), 0, 0, [0])]) == [None]


def test_no_rows():
    assert sample(torch.empty(0, 5), []) == []


def test_logprobs_are_of_the_unmodified_distribution():
    logits = random_logits(40)
    expected = logits.log_softmax(-1)
    params = SamplingParams(temperature=0.3, top_k=2, repetition_penalty=2.0, logprobs=5)
    [sampled] = sample(logits[None].clone(), [SamplingRow(params, 1, 0, logits.topk(2).indices.tolist())])
    assert sampled is not None
    assert sampled.logprob is not None
    assert sampled.logprob.token_id == sampled.token_id
    assert sampled.logprob.logprob == pytest.approx(float(expected[sampled.token_id]), abs=1e-6)
    values, ids = expected.topk(5)
    assert [token for token, _ in sampled.logprob.top] == ids.tolist()
    assert [value for _, value in sampled.logprob.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_logprobs_only_where_they_were_asked_for():
    rows = [SamplingRow(SamplingParams(logprobs=n), 0, 0, [0]) for n in (None, 0, 1)]
    without, chosen_only, one = sample(random_logits(9).repeat(3, 1), rows)
    assert without is not None
    assert without.logprob is None
    assert chosen_only is not None
    assert chosen_only.logprob is not None
    assert chosen_only.logprob.top == ()
    assert one is not None
    assert one.logprob is not None
    assert len(one.logprob.top) == 1


def test_a_vocabulary_smaller_than_the_logprobs_asked_for():
    assert len(describe_logprob(random_logits(4).log_softmax(-1), 1, 20).top) == 4
