"""Prompts and messages as token ids."""

from __future__ import annotations

import pytest
from hotswap.prompts import (
    ChatTemplateError,
    NoChatTemplateError,
    encode_continuation,
    encode_messages,
    encode_prompt,
)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
BOS = 1


@pytest.fixture
def tokenizer():
    """Words as tokens; adds a BOS to plain text, as Llama's tokenizer does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "user", "assistant", "hello", "there"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def test_a_prompt_gets_the_tokenizers_special_tokens(tokenizer):
    assert encode_prompt(tokenizer, "hello there") == [BOS, 4, 5]


def test_a_continuation_gets_none(tokenizer):
    assert encode_continuation(tokenizer, "hello there") == [4, 5]


def test_messages_have_one_bos(tokenizer):
    ids = encode_messages(tokenizer, [{"role": "user", "content": "hello"}])
    assert ids == [BOS, 2, 4, 3]


def test_without_the_generation_prompt(tokenizer):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    assert encode_messages(tokenizer, messages, add_generation_prompt=False) == [BOS, 2, 4, 3, 5]


def test_a_tokenizer_without_template_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(NoChatTemplateError, match="no chat template; send a plain prompt"):
        encode_messages(tokenizer, [{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ([{"role": "user"}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": "a"}, {"role": "", "content": "a"}], r"messages\[1\]\.role"),
        ([{"role": "wizard", "content": "a"}], r"refuses the roles \(wizard\): unknown role"),
    ],
)
def test_messages_that_do_not_fit_are_refused(tokenizer, messages, message):
    with pytest.raises(ChatTemplateError, match=message):
        encode_messages(tokenizer, messages)
