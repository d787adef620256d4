import pytest
import torch
from hotswap_server.engine.base import prepare_base
from hotswap_server.errors import BaseModelError
from hotswap_server.kernels import select_kernels
from support.models import (
    FAMILIES,
    SLIDING_WINDOW,
    explain,
    generate_greedily,
    next_logits,
    prepared,
    random_prompt,
    tiny_model,
)
from support.running import Running
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

PROMPT_LENGTHS = (1, 2, 15, 16, 17, 40, 130)
NEW_TOKENS = 20


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_and_logits_equal_transformers(family, tokenizer, tmp_path):
    model = tiny_model(FAMILIES[family])
    prompts = [random_prompt(length, seed=length) for length in PROMPT_LENGTHS]
    assert max(PROMPT_LENGTHS) > 2 * SLIDING_WINDOW
    with Running(prepared(model), tokenizer, tmp_path, max_batch_tokens=50) as running:
        outcomes = [running.generate(prompt, max_new_tokens=NEW_TOKENS, logprobs=20) for prompt in prompts]
        scores = [running.score(prompt, top_logprobs=20) for prompt in prompts if len(prompt) > 1]
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            expected = generate_greedily(model, prompt, NEW_TOKENS)
            got = outcome.result().tokens
            assert got == expected, explain(model, prompt, expected, got)
            for index, entry in enumerate(outcome.logprobs):
                reference = next_logits(model, [*prompt, *expected[:index]]).log_softmax(-1)
                assert_close_logprobs(entry.top, reference)
        for outcome in scores:
            tokens = list(outcome.request.prompt_ids)
            with torch.inference_mode():
                reference = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
            for position, entry in enumerate(outcome.scored.logprobs):
                assert entry.token_id == tokens[position + 1]
                assert entry.logprob == pytest.approx(
                    float(reference[position, tokens[position + 1]]), abs=1e-4
                )
                assert_close_logprobs(entry.top, reference[position])


def assert_close_logprobs(top: tuple[tuple[int, float], ...], reference: torch.Tensor) -> None:
    ids, values = zip(*top, strict=True)
    torch.testing.assert_close(torch.tensor(values), reference[list(ids)], atol=1e-4, rtol=0)
    # Whatever the order among near ties, these are the largest.
    assert min(values) >= float(reference.sort(descending=True).values[len(top)]) - 1e-4


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_the_sliding_window_matters_in_the_test_above(family):
    model = tiny_model(FAMILIES[family])
    prompt = random_prompt(130, seed=130)
    moved = (prompt[0] + 1, *prompt[1:])
    window_only = family == "mistral"
    layers = model.config.num_hidden_layers
    reach = layers * (SLIDING_WINDOW - 1) + 1
    assert reach < len(prompt)
    same = torch.equal(next_logits(model, prompt), next_logits(model, moved))
    assert same is window_only, "a token beyond every layer's window changes nothing"


@pytest.mark.parametrize("kernels", ["native", "onednn", "reference"])
def test_every_kernel_set_gives_the_same_tokens(kernels, llama, tokenizer, tmp_path):
    prompts = [random_prompt(length, seed=length) for length in (1, 33, 200)]
    with Running(prepared(llama, kernels), tokenizer, tmp_path, max_batch_tokens=64) as running:
        assert running.engine.base.state.kernels.name == kernels
        outcomes = [running.generate(prompt, max_new_tokens=16) for prompt in prompts]
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            assert outcome.result().tokens == generate_greedily(llama, prompt, 16)


def test_linears_that_share_an_input_are_grouped(llama_base):
    names = [group.names for group in llama_base.projections]
    assert names[:4] == [
        tuple(f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"),
        ("model.layers.0.self_attn.o_proj",),
        ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"),
        ("model.layers.0.mlp.down_proj",),
    ]
    assert len(names) == 8
    assert llama_base.linear_shapes["model.layers.1.self_attn.k_proj"] == (32, 64)
    assert "lm_head" not in llama_base.linear_shapes
    assert llama_base.eos_token_ids == {1}
    assert [(site.heads, site.kv_heads, site.head_dim) for site in llama_base.attention] == [(4, 2, 16)] * 2


@pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
def test_rotary_embeddings_of_fixed_scale_are_served(rope_type, tokenizer, tmp_path):
    config = FAMILIES["llama"].to_dict() | {
        "rope_parameters": {
            "rope_type": rope_type,
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    }
    model = tiny_model(LlamaConfig(**config))
    prompt = random_prompt(300, seed=3)
    with Running(prepared(model), tokenizer, tmp_path) as running:
        assert running.generate(prompt).result().tokens == generate_greedily(model, prompt, 8)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_batch_are_refused(rope_type):
    config = FAMILIES["llama"].to_dict() | {
        "rope_parameters": {
            "rope_type": rope_type,
            "rope_theta": 10000.0,
            "factor": 4.0,
            "short_factor": [1.0] * 8,
            "long_factor": [2.0] * 8,
            "original_max_position_embeddings": 256,
        }
    }
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    with pytest.raises(BaseModelError, match=rf"rope_type '{rope_type}'"):
        prepare_base(model, kernels=select_kernels(torch.device("cpu"), torch.float32))


def test_an_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1))
    with pytest.raises(BaseModelError, match="encoder-decoder"):
        prepared(model)


def test_attention_sinks_are_refused_by_name():
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with pytest.raises(BaseModelError, match="s_aux"):
        prepared(AutoModelForCausalLM.from_config(config))
