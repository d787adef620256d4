"""The steps of a simulated replica are those of the engine."""

import numpy as np
import pytest
from hotswap_server.fleet import Costs, Fleet, StepCosts
from hotswap_server.fleet.arrivals import Arrivals
from hotswap_server.fleet.replica import Replica
from support.models import random_prompt
from support.running import Running

# A step takes as many seconds as it has tokens.
TOKENS = Costs(StepCosts((1, 2), (1.0, 2.0)), 0.0, 0.0, 0.0, 1)


@pytest.mark.parametrize("kv_pages", [256, 9])
@pytest.mark.parametrize(("batch", "budget"), [(4, 16), (3, 50), (8, 8), (1, 7)])
def test_steps_have_the_tokens_of_the_engines(llama_base, tokenizer, tmp_path, batch, budget, kv_pages):
    source = np.random.default_rng(batch * budget)
    prompts, outputs = source.integers(1, 40, 12), source.integers(1, 30, 12)
    running = Running(
        llama_base, tokenizer, tmp_path, kv_pages=kv_pages, max_batch_size=batch, max_batch_tokens=budget
    )
    # All are there before the first step.
    outcomes = [
        running.generate(random_prompt(int(prompt), seed), max_new_tokens=int(output))
        for seed, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
    ]
    with running:
        for outcome in outcomes:
            outcome.result()
    steps = [step.num_prefill_tokens + step.num_decode_tokens for step in running.recorder.steps]
    fleet = Fleet(max_batch_size=batch, max_batch_tokens=budget, kv_tokens=16 * kv_pages)
    run = Replica(TOKENS, fleet, Arrivals(np.zeros(12), np.zeros(12, int), prompts, outputs), warm=[0]).run()
    np.testing.assert_array_equal(run.step_seconds.round(6), steps)
    assert run.preemptions == running.engine.stats().preemptions
    if (batch, kv_pages) == (8, 9):
        assert run.preemptions > 0  # so the rules of preemption were compared too
