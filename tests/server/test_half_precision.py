"""Every method in bfloat16: as near to the answer in float32 as PEFT's own bfloat16 is."""

import copy
import warnings

import pytest
import torch
from hotswap_server.engine.base import prepare_base
from hotswap_server.kernels import select_kernels
from peft import PeftModel
from support.mixed import NEW_TOKENS, TOGETHER, full_name, write_store
from support.models import random_prompt
from support.running import Outcome, Running

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NO_GPU)]
PROMPTS = 6
# Errors of single tokens have heavy tails, so the mean of a method's is known to some ten percent only.
EACH, ALL = 1.3, 1.1


def log_probs(model: torch.nn.Module, outcome: Outcome) -> torch.Tensor:
    """What `model` gives the tokens that were generated, [NEW_TOKENS] float32."""
    prompt, tokens = list(outcome.request.prompt_ids), outcome.result().tokens
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + tokens], device=device)).logits[
            0, -len(tokens) - 1 : -1
        ]
    chosen = torch.tensor(tokens, device=device)
    return logits.float().log_softmax(-1)[torch.arange(len(tokens)), chosen].cpu()


@pytest.fixture(scope="module")
def store(llama, tmp_path_factory):
    return write_store(llama, tmp_path_factory.mktemp("store"))


def peft_model(llama, store, name: str | None, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    model = copy.deepcopy(llama).to(device, dtype)
    if name is None:
        return model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="peft")
        adapted = PeftModel.from_pretrained(model, store / "acme" / name / "1", autocast_adapter_dtype=False)
    return adapted.to(device, dtype).eval()


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_costs_what_it_costs_in_peft(llama, tokenizer, store, device):
    device = torch.device(device)
    half = copy.deepcopy(llama).to(device, torch.bfloat16)
    base = prepare_base(half, kernels=select_kernels(device, torch.bfloat16))
    with Running(base, tokenizer, store, max_batch_size=64, max_batch_tokens=128) as running:
        outcomes = {
            name: [
                running.generate(
                    random_prompt(9 * seed + 4, seed=seed),
                    full_name(name),
                    max_new_tokens=NEW_TOKENS,
                    logprobs=1,
                )
                for seed in range(PROMPTS)
            ]
            for name in TOGETHER
        }
        for asked in outcomes.values():
            for outcome in asked:
                outcome.result()
    ours, theirs = {}, {}
    for name, asked in outcomes.items():
        exact_model = peft_model(llama, store, name, torch.float32, torch.device("cpu"))
        half_model = peft_model(llama, store, name, torch.bfloat16, device)
        exact = torch.cat([log_probs(exact_model, outcome) for outcome in asked])
        got = torch.tensor([entry.logprob for outcome in asked for entry in outcome.logprobs])
        ours[name] = (got - exact).square().mean()
        theirs[name] = (
            (torch.cat([log_probs(half_model, outcome) for outcome in asked]) - exact).square().mean()
        )
    ratios = {name: float((ours[name] / theirs[name]).sqrt()) for name in TOGETHER}
    overall = float((sum(ours.values()) / sum(theirs.values())).sqrt())
    assert max(ratios.values()) < EACH, ratios
    assert overall < ALL
