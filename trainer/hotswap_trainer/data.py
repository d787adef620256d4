"""From a JSONL file to token ids and labels, in the formats that TRL documents.

- `{"prompt": "…", "completion": "…"}`: joined as they are; loss on completion and end-of-sequence.
- `{"prompt": [messages], "completion": [messages]}`: one conversation; loss on the completion's answers.
- `{"messages": [messages]}`: loss on every answer: every assistant turn.
- `{"text": "…"}`: loss on everything, end-of-sequence included.

What a server sends for the same prompt is always an exact prefix of the ids trained on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hotswap.prompts import Message, PromptError, encode_continuation, encode_messages, encode_prompt

from hotswap_trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token without loss, as in torch's cross entropy."""

_FORMATS = (("messages",), ("prompt", "completion"), ("text",))


@dataclass(frozen=True, slots=True)
class Example:
    """`labels[i]` is `input_ids[i]` where the model learns to say that token, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Encoded examples, and what became of those over the length limit. `digest` is the file's SHA-256."""

    examples: list[Example]
    digest: str
    num_truncated: int = 0
    num_dropped: int = 0


@dataclass(frozen=True, slots=True)
class Encoder:
    """Turns records into examples. `stop_ids` end an answer; the first is appended where none does."""

    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]

    def encode(self, record: dict[str, Any]) -> list[Example]:
        """The examples of one record: one, or one per answer where the template rewrites earlier turns.

        Raises:
            DataError: a field is missing, has the wrong type, or is refused by the chat template.
        """
        match _format_of(record):
            case ("text",):
                ids = self._ended(encode_prompt(self.tokenizer, _text(record, "text")))
                return [_example(ids, [(1, len(ids))])]
            case ("messages",):
                messages = _messages(record, "messages")
                return self._conversation(messages, 0, "messages")
            case _ if isinstance(record["prompt"], str):
                prompt = encode_prompt(self.tokenizer, _text(record, "prompt"))
                completion = encode_continuation(self.tokenizer, _text(record, "completion"))
                ids = prompt + self._ended(completion)
                return [_example(ids, [(max(1, len(prompt)), len(ids))])]
            case _:
                prompt_turns = _messages(record, "prompt")
                turns = [*prompt_turns, *_messages(record, "completion")]
                return self._conversation(turns, len(prompt_turns), "completion")

    def _conversation(self, messages: Sequence[Message], first: int, field: str) -> list[Example]:
        # An assistant's message at the very start is context: no prompt leads to it.
        answers = [i for i in range(max(first, 1), len(messages)) if messages[i]["role"] == "assistant"]
        if not answers:
            raise DataError(f"field {field}: has no assistant message after another one to learn from")
        try:
            prompts = [encode_messages(self.tokenizer, messages[:i]) for i in answers]
            wholes = [
                encode_messages(self.tokenizer, messages[: i + 1], add_generation_prompt=False)
                for i in answers
            ]
        except PromptError as error:
            raise DataError(f"field {field}: {error}") from error
        spans, last = [], wholes[-1]
        for prompt, whole in zip(prompts, wholes, strict=True):
            spans.append((len(prompt), self._end_of_turn(whole, len(prompt))))
            if last[: len(prompt)] != prompt or last[: len(whole)] != whole:
                break
        else:
            if spans[-1][1] > spans[-1][0] and all(end > start for start, end in spans):
                ids = self._ended(last[: spans[-1][1]])
                return [_example(ids, [*spans[:-1], (spans[-1][0], len(ids))])]
        # The template rewrites earlier turns, or the turn's opening: each answer becomes its own example.
        contents = [encode_continuation(self.tokenizer, messages[i]["content"]) for i in answers]
        pairs = zip(prompts, map(self._ended, contents), strict=True)
        return [
            _example(prompt + answer, [(len(prompt), len(prompt) + len(answer))]) for prompt, answer in pairs
        ]

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        """Just after the turn's end-of-sequence: a server stops there and never sees what follows."""
        ends = [i + 1 for i in range(start, len(ids)) if ids[i] in self.stop_ids]
        return ends[-1] if ends else len(ids)

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if not self.stop_ids or (ids and ids[-1] in self.stop_ids) else [*ids, self.stop_ids[0]]


def load(
    path: Path, encoder: Encoder, *, max_length: int, overlong: Literal["truncate", "drop"] = "truncate"
) -> Dataset:
    """Read and encode a JSONL file.

    Raises:
        DataError: no such file, no examples, or a bad line; the message names file, line and field.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    examples: list[Example] = []
    truncated = dropped = 0
    for number, record in _records(path, content):
        try:
            encoded = encoder.encode(record)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        for example in encoded:
            if len(example.input_ids) <= max_length:
                examples.append(example)
                continue
            cut = Example(example.input_ids[:max_length], example.labels[:max_length])
            # A prompt that fills the limit leaves nothing to learn.
            if overlong == "drop" or all(label == IGNORED for label in cut.labels):
                dropped += 1
            else:
                truncated += 1
                examples.append(cut)
    if not examples:
        reason = (
            f"all {dropped} examples are over --max-length {max_length}" if dropped else "the file is empty"
        )
        raise DataError(f"{path}: nothing to train on: {reason}")
    return Dataset(examples, hashlib.sha256(content).hexdigest(), truncated, dropped)


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and evaluation examples: the same ones for the same file and seed, in the file's order.

    At least one example goes to either side, unless `fraction` is 0 or there is only one.
    """
    count = min(max(1, round(len(examples) * fraction)), len(examples) - 1) if fraction else 0
    held_out = set(random.Random(seed).sample(range(len(examples)), count))
    return (
        [example for i, example in enumerate(examples) if i not in held_out],
        [example for i, example in enumerate(examples) if i in held_out],
    )


def _records(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # JSON and UTF-8
            raise DataError(f"{path}:{number}: is not a line of JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: must be a JSON object, got {type(record).__name__}")
        yield number, record


def _format_of(record: dict[str, Any]) -> tuple[str, ...]:
    found = [fields for fields in _FORMATS if any(field in record for field in fields)]
    if len(found) != 1:
        has = " and ".join("+".join(fields) for fields in found) or ", ".join(record) or "no field"
        raise DataError(f"needs exactly one of messages, prompt+completion, or text; has {has}")
    for field in found[0]:
        if field not in record:
            raise DataError(f"field {field}: is missing beside {', '.join(set(found[0]) - {field})}")
    return found[0]


def _text(record: dict[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"field {field}: must be text, got {type(value).__name__}")
    if not value and field != "prompt":
        raise DataError(f"field {field}: must not be empty")
    return value


def _messages(record: dict[str, Any], field: str) -> list[Message]:
    value = record[field]
    if not isinstance(value, list) or not value:
        raise DataError(f"field {field}: must be a list of messages with role and content")
    for index, message in enumerate(value):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise DataError(f"field {field}[{index}].{key}: must be text")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _example(ids: list[int], spans: Sequence[tuple[int, int]]) -> Example:
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return Example(ids, labels)
