"""Two tenants on a real engine: who sends ten times the load does not keep the other waiting."""

import itertools
import time
from dataclasses import dataclass, field

import pytest
import torch
from hotswap_server.core import Delta, Event, GenerateRequest, SamplingParams
from hotswap_server.engine.base import load_base
from hotswap_server.kernels import select_kernels
from support.models import random_prompt
from support.running import Running, wait_until
from transformers import AutoTokenizer

_ids = itertools.count()


@dataclass
class Load:
    """Requests of `tenant`: `num_each` every `every` steps, until `until`."""

    running: Running
    tenant: str
    num_each: int
    every: int
    prompt: int
    new: int
    until: int
    first_token_steps: list[int] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    num_open: int = 0

    def start(self) -> None:
        """On the engine's thread, after a step, so that the steps are counted from there."""
        step = len(self.running.recorder.steps)
        if step < self.until:
            for _ in range(self.num_each):
                self.send()
            self.running.recorder.after_step[step + self.every].append(self.start)

    def send(self) -> None:
        number = next(_ids)
        sent_at, sent_in, seen = time.thread_time(), len(self.running.recorder.steps), []
        self.num_open += 1

        def sink(event: Event) -> None:
            if not isinstance(event, Delta):
                self.num_open -= 1
            elif not seen:
                seen.append(event)
                self.first_token_steps.append(len(self.running.recorder.steps) - sent_in)
                self.first_token_seconds.append(time.thread_time() - sent_at)

        params = SamplingParams(max_new_tokens=self.new, temperature=0.0, ignore_eos=True)
        prompt = tuple(random_prompt(self.prompt, seed=number))
        self.running.engine.submit(
            GenerateRequest(f"load-{number}", prompt, params, tenant=self.tenant), sink
        )


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * (len(values) - 1) + 0.999)]


def measure(base, tokenizer, store, *, with_heavy: bool, steps: int, prompt: int, **options) -> Load:
    with Running(base, tokenizer, store, **options) as running:
        keeper = Load(
            running, "keeper", 1, steps + 1, 2, steps + 20, 0
        )  # so that steps go on without the rest
        light = Load(running, "light", 1, 12, prompt, 6, steps)
        heavy = Load(running, "heavy", 10, 12, prompt, 12, steps if with_heavy else 0)
        keeper.send()
        for load in (heavy, light) if with_heavy else (light,):
            running.recorder.after_step[6 if load is light else 1].append(load.start)
        wait_until(lambda: len(running.recorder.steps) > steps, within=600)
        if with_heavy:
            assert running.engine.stats().waiting > 3, "more is sent than can be served"
        running.engine.stop()
        wait_until(lambda: not light.num_open)
    assert len(light.first_token_steps) > steps // 12 - 4
    return light


def test_the_light_tenants_first_tokens_come_within_twice_the_steps(llama_base, tokenizer, tmp_path):
    options = {"steps": 240, "prompt": 24, "max_batch_size": 8, "max_batch_tokens": 48}
    alone = measure(llama_base, tokenizer, tmp_path, with_heavy=False, **options)
    beside = measure(llama_base, tokenizer, tmp_path, with_heavy=True, **options)
    assert p95(beside.first_token_steps) <= 2 * p95(alone.first_token_steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_light_tenants_first_tokens_come_within_twice_the_time(smollm2, tmp_path):
    """Prompts take more than a step: what others add is the rest of theirs, and steps have a limit.

    The time is that of the engine's thread, which computes all alone here, so that a busy machine does not
    matter.
    """
    cpu = torch.device("cpu")
    base = load_base(smollm2, kernels=select_kernels(cpu, torch.float32), device=cpu, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    options = {"steps": 240, "prompt": 64, "max_batch_size": 4, "max_batch_tokens": 32}
    alone = measure(base, tokenizer, tmp_path, with_heavy=False, **options)
    beside = measure(base, tokenizer, tmp_path, with_heavy=True, **options)
    assert p95(beside.first_token_seconds) <= 2 * p95(alone.first_token_seconds)
