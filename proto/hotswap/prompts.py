"""How text becomes token ids, in one place: the server sends to the model what the trainer trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""One chat turn: `role` (`system`, `user`, `assistant`, …) and `content`."""


class PromptError(ValueError):
    """The text cannot be turned into a prompt for this base."""


class NoChatTemplateError(PromptError):
    """Messages were given, but the base's tokenizer has no chat template."""


class ChatTemplateError(PromptError):
    """The base's chat template does not accept these messages."""


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a plain prompt, with the special tokens that the tokenizer adds by itself."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that goes on after other tokens: no special tokens are added."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation by the tokenizer's own chat template.

    The template writes its special tokens itself, so the tokenizer adds none (no second BOS).
    `add_generation_prompt` ends the ids with the opening of the assistant's turn.

    Raises:
        NoChatTemplateError: the tokenizer has no chat template.
        ChatTemplateError: a message lacks `role` or `content`, or the template refuses the roles.
    """
    import jinja2

    if not tokenizer.chat_template:
        raise NoChatTemplateError(
            "messages: this base's tokenizer has no chat template; send a plain prompt, or use a chat model"
        )
    _check_messages(messages)
    turns = [dict(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            turns, add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except (jinja2.TemplateError, TypeError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise ChatTemplateError(
            f"messages: this base's chat template refuses the roles ({roles}): {error}"
        ) from error
    return encode_continuation(tokenizer, str(text))


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise ChatTemplateError("messages: at least one message is needed")
    for index, message in enumerate(messages):
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise ChatTemplateError(f"messages[{index}].{field}: must be a string")
        if not message["role"]:
            raise ChatTemplateError(f"messages[{index}].role: must not be empty")
