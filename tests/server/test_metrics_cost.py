"""Metrics take at most a hundredth of the engine's time. Wants a quiet machine."""

import statistics
import time

import pytest
import torch
from hotswap_server.core import FinishReason, ServingPath, Timings
from hotswap_server.engine.base import load_base
from hotswap_server.engine.observer import RequestRecord, StepRecord
from hotswap_server.kernels import select_kernels
from hotswap_server.metrics import Metrics
from prometheus_client import generate_latest
from support.metrics import REF, exercised
from support.models import random_prompt
from support.running import Running
from transformers import AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHARE = 0.01
TOKENS = 64
GPU_STEP_S = {1: 6.5e-3, 64: 8.7e-3}
"""Of a fast server with an 8B model on an H100, at these batch sizes."""
SCRAPE_INTERVAL_S = 5.0


class Timed:
    """Passes on to `observer`, and adds up what that takes."""

    def __init__(self, observer) -> None:
        self._observer = observer
        self.seconds = self.steps = 0.0

    def step(self, record) -> None:
        started = time.perf_counter()
        self._observer.step(record)
        self.seconds += time.perf_counter() - started
        self.steps += record.seconds

    def finished(self, record) -> None:
        started = time.perf_counter()
        self._observer.finished(record)
        self.seconds += time.perf_counter() - started


def test_observing_beside_the_steps_of_a_real_base(smollm2, tmp_path):
    cpu = torch.device("cpu")
    base = load_base(smollm2, kernels=select_kernels(cpu, torch.float32), device=cpu, dtype=torch.float32)
    timed = Timed(Metrics(tenants=True))
    with Running(base, AutoTokenizer.from_pretrained(smollm2), tmp_path) as running:
        running.engine._observer = running.engine._collector._observer = timed
        outcomes = [running.generate(random_prompt(32, seed), max_new_tokens=40) for seed in range(8)]
        for outcome in outcomes:
            outcome.result()
    share = timed.seconds / timed.steps
    print(f"observing took {share:.4%} of {timed.steps:.1f} s in steps")
    assert share < SHARE


@pytest.mark.parametrize("batch", [1, 64])
def test_observing_beside_the_steps_of_a_fast_gpu(batch):
    """A step, and its part of the requests that end after 64 tokens each."""
    metrics = Metrics(tenants=True)
    step = StepRecord(0.01, 0, batch, batch, batch, batch, 0, 100, 1000)
    request = RequestRecord(
        method="lora",
        path=ServingPath.BATCHED,
        finish_reason=FinishReason.LENGTH,
        error=None,
        num_prompt_tokens=512,
        num_generated_tokens=TOKENS,
        timings=Timings(0.01, 0.0, 0.1, 0.6),
        ttft=0.1,
        inter_token=(0.0087,) * (TOKENS - 1),
        adapter=REF,
    )

    def seconds_per_step() -> float:
        started = time.thread_time()  # what others use of the machine is not the metrics'
        for _ in range(TOKENS):
            metrics.step(step)
        for _ in range(batch):
            metrics.finished(request)
        return (time.thread_time() - started) / TOKENS

    cost = statistics.median(seconds_per_step() for _ in range(50))
    print(f"batch {batch}: {cost * 1e6:.1f} us a step, {cost / GPU_STEP_S[batch]:.4%}")
    assert cost < SHARE * GPU_STEP_S[batch]


def test_a_scrape_every_five_seconds():
    metrics = exercised()

    def seconds() -> float:
        started = time.thread_time()
        generate_latest(metrics.registry)
        return time.thread_time() - started

    cost = statistics.median(seconds() for _ in range(20))
    print(f"a scrape takes {cost * 1e3:.1f} ms, {cost / SCRAPE_INTERVAL_S:.4%}")
    assert cost < SHARE * SCRAPE_INTERVAL_S
