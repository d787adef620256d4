"""Every method in one batch over the real base, merged adapters too, against PEFT one request at a time."""

from functools import partial

import pytest
import torch
from hotswap_server.core import ServingPath
from hotswap_server.engine.base import load_base
from hotswap_server.kernels import select_kernels
from support.adapters import Oracle, write_bottleneck, write_ia3, write_lora, write_prefix
from support.models import explain, next_logits
from support.quantized import quantize
from support.running import Running
from transformers import AutoModelForCausalLM, AutoTokenizer

WRITERS = {
    "lora8": partial(write_lora, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], std=0.02),
    "dora4": partial(
        write_lora, r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"], use_dora=True, std=0.02
    ),
    "embeddings": partial(
        write_lora,
        r=8,
        lora_alpha=8,
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        alpha_pattern={"embed_tokens": 0.5},
        std=0.02,
    ),
    "biases": partial(
        write_lora,
        r=4,
        target_modules=["v_proj", "down_proj", "lm_head"],
        lora_bias=True,
        bias="all",
        std=0.05,
    ),
    "houlsby": partial(write_bottleneck, bottleneck_size=64, std=0.03),
    "parallel": partial(
        write_bottleneck, bottleneck_size=16, layout="parallel", activation="gelu", std=0.05, after_mlp=False
    ),
    "prefix20": partial(write_prefix, tokens=20, std=0.8),
    "prefix7": partial(write_prefix, tokens=7, std=0.8, seed=1),
    "ia3": partial(
        write_ia3, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}
NEW_TOKENS = 24
LENGTHS = (40, 1, 150, 17, 64, 5, 33, 90, 12, 70)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", [None, "nf4"])
def test_all_methods_under_pressure_get_peft_s_tokens(kind, smollm2, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for name, write in WRITERS.items():
        write(reference, tmp_path / "acme" / name / "1")
    if kind is not None:
        reference = quantize(smollm2, kind)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer("Once upon a time, in a small village by the sea, there lived a baker. " * 20).input_ids
    names = [None, *WRITERS]
    prompts = [tuple(ids[3 * i : 3 * i + length]) for i, length in enumerate(LENGTHS)]
    cpu = torch.device("cpu")
    base = load_base(
        smollm2,
        kernels=select_kernels(cpu, torch.float32),
        device=cpu,
        dtype=torch.float32,
        quantize=kind,
    )
    with Running(base, tokenizer, tmp_path, kv_pages=120, page_size=4, max_batch_tokens=64) as running:
        for name in WRITERS:
            running.adapters.load(f"acme/{name}", None).result()
        rounds = []
        for merged in (None, "lora8", "dora4"):
            if merged is not None:
                running.merge(f"acme/{merged}")
            outcomes = [
                running.generate(prompt, name and f"acme/{name}", max_new_tokens=NEW_TOKENS)
                for name, prompt in zip(names, prompts, strict=True)
            ]
            paths = {outcome.finished.path for outcome in outcomes}
            assert (ServingPath.MERGED in paths) == (merged is not None)
            rounds.append(outcomes)
        assert running.engine.stats().preemptions > 0
        assert max(step.distinct_adapters for step in running.recorder.steps) > 3
    for name, prompt, outcomes in zip(names, prompts, zip(*rounds, strict=True), strict=True):
        oracle = Oracle(reference, {} if name is None else {name: tmp_path / "acme" / name / "1"})
        expected = oracle.generate(name, prompt, NEW_TOKENS)
        model = oracle.model(name)
        for outcome in outcomes:
            got = outcome.tokens
            assert got == expected, f"{name}: " + explain(model, prompt, expected, got)
        if name is not None:
            with torch.inference_mode():
                adapted = model(input_ids=torch.tensor([prompt])).logits[0, -1]
            assert (adapted - next_logits(reference, prompt)).abs().max() > 0.1
