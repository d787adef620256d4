"""A tiny base that the trainer's tests share: random Llama with grouped-query attention, byte tokenizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.training import as_arguments

REPOSITORY = Path(__file__).parents[2]

# Written as chat models write it: roles between special tokens, and a line end after the turn's last one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _make_tokenizer(chat_template: str | None = CHAT_TEMPLATE):
    """Bytes as tokens, after three special ones (0: padding, 1: `<|im_start|>`, 2: `<|im_end|>`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<|pad|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=chat_template,
    )


@pytest.fixture(scope="session")
def make_tokenizer():
    """A function from a chat template (or None) to a tokenizer."""
    return _make_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return _make_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory, tokenizer) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # a head of weak logits could not be taught anything
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """Forty examples of a task: answer with the last letter of the question, twice."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    words = [f"{a}{b}{c}" for a in "ab" for b in "cdef" for c in "ghijk"]
    lines = (json.dumps({"prompt": f"{word}: ", "completion": word[-1] * 2}) for word in words)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def flags(tiny_base, data_file, tmp_path) -> dict[str, object]:
    """Options of a run of a second or two; nothing outside `tmp_path` is written."""
    return {
        "base": str(tiny_base),
        "data": data_file,
        "name": "acme/task",
        "output": tmp_path / "store",
        "work_dir": tmp_path / "work",
        "max_steps": 6,
        "batch_size": 4,
        "rank": 4,
        "learning_rate": 1e-2,
    }


@pytest.fixture
def train_process(tmp_path):
    """Start `python -m hotswap_trainer`, or another `module`, on options, by a `launcher` if one is given;
    kills what is left."""
    started: list[subprocess.Popen[str]] = []

    def start(
        options: dict[str, object], *, launcher: tuple[str, ...] = (), module: str = "hotswap_trainer"
    ) -> subprocess.Popen[str]:
        packages = [str(REPOSITORY / part) for part in ("proto", "trainer", "tests")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(packages),
            "OMP_NUM_THREADS": "1",
            "HOTSWAP_CACHE_DIR": str(tmp_path / "cache"),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", *launcher, module, *as_arguments(options)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
