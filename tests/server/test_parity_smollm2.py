"""The real base against PEFT: SmolLM2-135M with adapters that PEFT made."""

from functools import partial

import pytest
import torch
from hotswap_server.engine.base import load_base
from hotswap_server.kernels import select_kernels
from support.adapters import ALL_LINEARS, Oracle, write_lora
from support.models import explain, next_logits
from support.running import Running
from transformers import AutoModelForCausalLM, AutoTokenizer

ADAPTERS = {
    "acme/qv": {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "acme/all": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ALL_LINEARS},
    "blue/some": {
        "r": 6,
        "lora_alpha": 12,
        "target_modules": ["o_proj", "down_proj"],
        "layers_to_transform": [0, 3, 29],
        "rank_pattern": {"o_proj": 3},
    },
}
TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a small village by the sea, there lived",
    "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
)


@pytest.fixture(scope="module", autouse=True)
def _threads():
    """More than tiny models need."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reference(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def smol_tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def store(reference, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        write_lora(reference, store / name / "1", seed=seed, std=0.02, **options)
    return store


@pytest.fixture(scope="module")
def oracle(reference, store):
    return Oracle(reference, {name: store / name / "1" for name in ADAPTERS})


@pytest.fixture(scope="module")
def base(smollm2):
    cpu = torch.device("cpu")
    return load_base(smollm2, kernels=select_kernels(cpu, torch.float32), device=cpu, dtype=torch.float32)


def test_a_mixed_batch_gets_peft_s_tokens(base, smol_tokenizer, store, oracle):
    new_tokens = 16
    users = [None, *ADAPTERS]
    prompts = [tuple(smol_tokenizer(text).input_ids) for text in TEXTS]
    with Running(base, smol_tokenizer, store, slots=3, max_batch_tokens=24) as running:
        outcomes = running.arrive(
            [
                partial(running.generate, prompt, user, max_new_tokens=new_tokens)
                for user, prompt in zip(users, prompts, strict=True)
            ],
            every=2,
        )
        assert max(step.distinct_adapters for step in running.recorder.steps) > 1
    answers = []
    for user, prompt, outcome in zip(users, prompts, outcomes, strict=True):
        expected = oracle.generate(user, prompt, new_tokens)
        got = outcome.tokens
        assert got == expected, f"{user}: " + explain(oracle.model(user), prompt, expected, got)
        answers.append(expected)
        if user is not None:
            adapted = next_logits(oracle.model(user), prompt)
            assert (adapted - next_logits(oracle.model(None), prompt)).abs().max() > 0.1
    assert "Paris" in smol_tokenizer.decode(answers[0])


def test_the_text_is_the_tokenizer_s(base, smol_tokenizer, store):
    prompt = tuple(smol_tokenizer("List some emoji: 🎉 🚀").input_ids)
    with Running(base, smol_tokenizer, store) as running:
        outcome = running.generate(prompt, temperature=1.5, seed=3, max_new_tokens=24).result()
    assert outcome.text == smol_tokenizer.decode(outcome.tokens, skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_crowd_under_pressure_gets_peft_s_tokens(base, smol_tokenizer, store, oracle):
    new_tokens = 48
    lengths = (1, 500, 3, 64, 17, 250, 16, 2, 120, 33, 9, 77, 5, 400, 48, 30)
    ids = smol_tokenizer(" ".join(TEXTS) * 20).input_ids
    users = [None, *ADAPTERS]
    requests = [
        (users[index % len(users)], tuple(ids[index * 7 : index * 7 + length]))
        for index, length in enumerate(lengths)
    ]
    with Running(
        base, smol_tokenizer, store, slots=2, kv_pages=300, page_size=2, max_batch_tokens=64
    ) as running:
        outcomes = running.arrive(
            [partial(running.generate, prompt, user, max_new_tokens=new_tokens) for user, prompt in requests],
            every=1,
        )
        assert running.engine.stats().preemptions > 0
        assert running.recorder.count("evicted") > 0
    for (user, prompt), outcome in zip(requests, outcomes, strict=True):
        expected = oracle.generate(user, prompt, new_tokens)
        got = outcome.tokens
        assert got == expected, f"{user}: " + explain(oracle.model(user), prompt, expected, got)
