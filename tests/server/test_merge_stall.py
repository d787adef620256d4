"""How long requests wait while an adapter is merged into the real base."""

import itertools
import statistics
import time

import pytest
import torch
from hotswap_server.engine.base import load_base
from hotswap_server.kernels import select_kernels
from support.adapters import ALL_LINEARS, write_lora, write_prefix
from support.models import random_prompt
from support.running import Running, wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STALL_S = 1.0
MERGES = 4
WAIT_S = 600  # for all tokens, on a busy machine
NAMES = (None, "acme/merged", "acme/other", "acme/prefix")


@pytest.fixture(scope="module")
def store(smollm2, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for seed, name in enumerate(("merged", "other")):
        write_lora(model, store / "acme" / name / "1", seed=seed, r=16, std=0.02, target_modules=ALL_LINEARS)
    write_prefix(model, store / "acme" / "prefix" / "1", 20)
    return store


def test_no_request_fails_or_waits_a_second_for_a_merge(smollm2, store):
    """Requests of the base, of the adapter, of another LoRA and of a prefix decode through all of them."""
    cpu = torch.device("cpu")
    base = load_base(smollm2, kernels=select_kernels(cpu, torch.float32), device=cpu, dtype=torch.float32)
    with Running(base, AutoTokenizer.from_pretrained(smollm2), str(store), kv_pages=256) as running:
        for name in NAMES[1:]:
            running.adapters.load(name, None).result(WAIT_S)
        outcomes = [
            running.generate(random_prompt(16, seed=seed), name, max_new_tokens=400, ignore_eos=True)
            for seed, name in enumerate(NAMES)
        ]
        changes: list[float] = []
        while len(changes) < 2 * MERGES and not any(outcome.ended for outcome in outcomes):
            time.sleep(0.5)
            for change in (running.merge, running.unmerge):
                began = time.monotonic()
                change("acme/merged")
                changes.append(time.monotonic() - began)
                time.sleep(0.2)
        assert len(changes) >= 2, "the requests ended before anything was merged"
        wait_until(lambda: all(outcome.ended for outcome in outcomes), WAIT_S)
        gaps = [
            later - earlier for outcome in outcomes for earlier, later in itertools.pairwise(outcome.times)
        ]
        assert [outcome.error for outcome in outcomes] == [None] * len(NAMES)
    usual = statistics.median(gaps)
    print(f"merges and unmerges took {[round(s, 3) for s in changes]} s; {usual=:.3f} s, {max(gaps)=:.3f} s")
    assert max(gaps) - usual < STALL_S
