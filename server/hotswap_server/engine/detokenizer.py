"""Token ids to printable text as they come, and the search for stop strings in it."""

from __future__ import annotations

from typing import Any

from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one request. Holds back bytes of an unfinished character and what may begin a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        """`tokenizer` is a fast transformers tokenizer."""
        self._backend = tokenizer.backend_tokenizer
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = stop
        self._held = ""
        self._ids: list[int] = []
        self._released = 0  # characters given out, held ones excluded

    def add(self, token_id: int) -> tuple[str, bool]:
        """The text that became printable, and whether a stop string was completed (the text ends before it)."""
        self._ids.append(token_id)
        text = self._stream.step(self._backend, token_id)
        if not text:
            return "", False
        self._held += text
        return self._release_until_stop()

    def finish(self) -> str:
        """What is still held, including the replacement character of an unfinished one."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        rest: str = whole[self._released :]
        return rest

    def _release_until_stop(self) -> tuple[str, bool]:
        found = [index for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            self._released += len(text)
            return text, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._released += len(text)
        return text, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
