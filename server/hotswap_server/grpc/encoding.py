"""From a message's input to token ids, without holding up the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

from hotswap.prompts import PromptError, encode_continuation, encode_messages, encode_prompt
from hotswap.v1 import common_pb2

from hotswap_server.errors import InvalidRequestError
from hotswap_server.grpc.convert import checked_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters that are encoded in about a millisecond; longer texts leave the event loop.
_SHORT: Final = 2048


class InputEncoder:
    """Encodes what calls send. Ids outside the vocabulary, the caller's or the tokenizer's, are refused."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenizer")
        # The first call settles the tokenizer's truncation and padding, which threads must not do at once.
        encode_prompt(tokenizer, "warm-up")

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def encode(self, field: str, message: common_pb2.Input) -> tuple[int, ...]:
        """Token ids of an input; at least one.

        Raises:
            InvalidRequestError: it is empty, or the base cannot read it.
        """
        kind = message.WhichOneof("kind")
        if kind == "prompt":
            return await self.text(f"{field}.prompt", message.prompt)
        if kind == "messages":
            return await self._messages(f"{field}.messages", message.messages)
        if kind == "token_ids":
            return self.ids(f"{field}.token_ids", message.token_ids)
        raise InvalidRequestError(field, "is required; set prompt, messages or token_ids")

    async def text(self, field: str, text: str, *, continuation: bool = False) -> tuple[int, ...]:
        """Token ids of plain text; without special tokens if it is a `continuation` of other tokens."""
        encode = encode_continuation if continuation else encode_prompt
        return self._checked(field, await self._run(len(text), lambda: encode(self._tokenizer, text)))

    def ids(self, field: str, message: common_pb2.TokenIds) -> tuple[int, ...]:
        return self._checked(field, message.ids)

    async def _messages(self, field: str, message: common_pb2.ChatMessages) -> tuple[int, ...]:
        turns = [{"role": turn.role, "content": turn.content} for turn in message.messages]
        opened = message.add_generation_prompt if message.HasField("add_generation_prompt") else True
        length = sum(len(turn["content"]) for turn in turns)
        try:
            ids = await self._run(
                length, lambda: encode_messages(self._tokenizer, turns, add_generation_prompt=opened)
            )
        except PromptError as error:
            # Its text begins with the path below the input, such as `messages[0].role`.
            path, _, problem = str(error).partition(": ")
            raise InvalidRequestError(f"{field.removesuffix('messages')}{path}", problem) from None
        return self._checked(field, ids)

    async def _run(self, length: int, encode: Callable[[], list[int]]) -> list[int]:
        if length <= _SHORT:
            return encode()
        return await asyncio.get_running_loop().run_in_executor(self._executor, encode)

    def _checked(self, field: str, ids: object) -> tuple[int, ...]:
        result = checked_ids(field, ids, self.vocab_size)  # type: ignore[arg-type]
        if not result:
            raise InvalidRequestError(field, "holds no tokens; give at least one")
        return result
