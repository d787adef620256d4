"""Tiny random models of the served families, and a byte-level tokenizer for them."""

import copy
from typing import Any

import torch
from hotswap_server.engine.base import BaseModel, prepare_base
from hotswap_server.kernels import select_kernels
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 300  # more than the tokenizer's 258, as padded vocabularies are
MAX_CONTEXT = 1024
SLIDING_WINDOW = 24
_NO_TOKEN = 10**9  # as an end of sequence: None would mean the model's own

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    # Wide enough for logits that differ by much: greedy tokens then say something about the whole context.
    "initializer_range": 0.2,
}
_GEMMA: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": SLIDING_WINDOW}

FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=32),
    "mistral": MistralConfig(**SHAPE, sliding_window=SLIDING_WINDOW),
    "gemma": GemmaConfig(**SHAPE, head_dim=32),
    "gemma2": Gemma2Config(**SHAPE, **_GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=8.0),
    "gemma3": Gemma3TextConfig(**SHAPE, **_GEMMA, layer_types=["sliding_attention", "full_attention"]),
}


def tiny_model(config: PreTrainedConfig, *, seed: int = 0) -> nn.Module:
    """A float32 model with random weights, biases and norms, so that leaving any of them out shows."""
    torch.manual_seed(seed)
    # Models write into their configuration, which the others share.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    # The definition itself: some releases let Gemma 2 use SDPA, which leaves its soft cap out.
    model.set_attn_implementation("eager")
    return model.eval()


def prepared(model: nn.Module, kernels: str = "auto") -> BaseModel:
    """The engine's form of a copy of `model`."""
    chosen = select_kernels(torch.device("cpu"), torch.float32, kernels)
    return prepare_base(copy.deepcopy(model), kernels=chosen)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; `<s>` is 0 and `</s>` is 1."""
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def random_prompt(length: int, seed: int, vocab_size: int = VOCAB_SIZE) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, vocab_size, (length,), generator=generator).tolist())


def generate_greedily(model: nn.Module, prompt: tuple[int, ...], max_new_tokens: int) -> list[int]:
    """What transformers' `generate` gives for one prompt; it does not stop at the end of a sequence."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0, eos_token_id=_NO_TOKEN
    )
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def next_logits(model: nn.Module, tokens: list[int] | tuple[int, ...]) -> torch.Tensor:
    """The distribution after all of `tokens`, by a plain forward of the reference model."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1].float()


def explain(model: nn.Module, prompt: tuple[int, ...], expected: list[int], got: list[int]) -> str:
    """Where two continuations part, and how far apart the reference's logits of the two tokens are."""
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=False)):
        if ours != theirs:
            logits = next_logits(model, [*prompt, *expected[:index]])
            gap = float(logits[theirs] - logits[ours])
            return f"token {index} of {len(expected)}: {ours}, not {theirs}; logit gap {gap:.3g}"
    return f"{len(got)} tokens, not {len(expected)}"
