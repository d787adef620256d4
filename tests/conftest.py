"""Fixtures that tests of several packages share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers directory: a random Llama with grouped-query attention, 258 byte tokens."""
    import torch
    from support.models import byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-base")
    fast = byte_tokenizer()
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def write_lora(tiny_base: Path) -> Callable[..., Path]:
    """`write_lora(directory, seed=0, **LoraConfig options)` writes a random LoRA of the tiny base."""

    def write(directory: Path, seed: int = 0, **options: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]} | options
        base = AutoModelForCausalLM.from_pretrained(tiny_base)
        with warnings.catch_warnings():
            # PEFT reads an attribute that transformers has renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.5)
        model.save_pretrained(directory)
        return directory

    return write


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A server of S3 on loopback that the environment points at; its address."""
    from support import object_stores

    with object_stores.s3_server() as address:
        yield address


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """The URL of an empty store on that server."""
    from support import object_stores

    return object_stores.s3_store()


@pytest.fixture
def memory_url() -> Iterator[str]:
    """The URL of an empty store in memory."""
    from support import object_stores

    with object_stores.memory_store() as url:
        yield url


@pytest.fixture(params=["directory", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of each kind. Tests of what S3 alone does take `s3_url`, which is not slow."""
    if request.param == "directory":
        return str(tmp_path / "store")
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url
