"""Token ids to printable text as they come, and the search for stop strings in it."""

from __future__ import annotations

from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """The text of one request. Holds back bytes of an unfinished character and what may begin a stop string.

    A token's text depends on those before it (a leading space, the first bytes of a character), so tokens are
    decoded behind the ones that last gave text. Nothing that a model may say raises: it would end the step of
    all, which is why this is not `tokenizers.decoders.DecodeStream`.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        """`tokenizer` is a fast transformers tokenizer."""
        self._backend = tokenizer.backend_tokenizer
        self._stop = stop
        self._held = ""
        self._tail: list[int] = []  # the tokens that last gave text, and all that came since
        self._num_given = 0  # of those, how many have given theirs
        self._given = ""  # the text of these, without what is before them

    def add(self, token_id: int) -> tuple[str, bool]:
        """The text that became printable, and whether it ended before a stop string that was completed."""
        self._tail.append(token_id)
        text = self._decode()
        if len(text) <= len(self._given) or text.endswith(_REPLACEMENT):
            return "", False
        self._held += text[len(self._given) :]
        del self._tail[: self._num_given]
        self._num_given, self._given = len(self._tail), self._decode()
        return self._release_until_stop()

    def finish(self) -> str:
        """What is still held, including the replacement character of an unfinished one."""
        return self._held + self._decode()[len(self._given) :]

    def _decode(self) -> str:
        text: str = self._backend.decode(self._tail, skip_special_tokens=True)
        return text

    def _release_until_stop(self) -> tuple[str, bool]:
        found = [index for stop in self._stop if (index := self._held.find(stop)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
