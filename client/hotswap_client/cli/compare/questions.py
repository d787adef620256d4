"""What is trained on and asked: the shipped data or a user's JSONL, split in a way that the seed fixes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotswap_client.cli.compare.options import CompareError, CompareOptions
from hotswap_client.cli.demo.tasks import DATA

SHIPPED = ("tickets", "orders", "reviews")
ALL_SHIPPED = "demo"
_REMEDY = 'each line needs a prompt and a completion: {"prompt": "…", "completion": "…"}'


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out example. Its prompt is text, or a conversation of role and content."""

    prompt: str | tuple[Mapping[str, str], ...]
    answer: str

    def asked(self) -> dict[str, Any]:
        """As keywords of the client's `generate`."""
        return {"prompt": self.prompt} if isinstance(self.prompt, str) else {"messages": list(self.prompt)}

    def as_context(self) -> dict[str, Any]:
        """As keywords of the client's `score`."""
        return (
            {"context": self.prompt}
            if isinstance(self.prompt, str)
            else {"context_messages": list(self.prompt)}
        )

    def shown(self) -> str:
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in self.prompt)


@dataclass(frozen=True, slots=True)
class Material:
    """The training file with its SHA-256, and the held-out questions with theirs."""

    title: str
    train_file: Path
    train_digest: str
    num_train: int
    questions: tuple[Question, ...]
    test_digest: str


def prepare(options: CompareOptions, folder: Path) -> Material:
    """Read the data; what must be put together or split is written into `folder`.

    Raises:
        CompareError: a file is missing, empty, or has a line that is no example.
    """
    if options.data == ALL_SHIPPED or options.data in SHIPPED:
        if options.test_data is not None:
            raise CompareError("--test-data: the shipped data has its own; give --data FILE.jsonl beside it")
        tasks = SHIPPED if options.data == ALL_SHIPPED else (options.data,)
        train = _turns([_lines(DATA / f"{task}.train.jsonl") for task in tasks])
        test = _turns([_lines(DATA / f"{task}.test.jsonl") for task in tasks])
        title = f"the shipped {' + '.join(tasks)}"
    else:
        path = Path(options.data).expanduser()
        train, title = _lines(path), path.name
        for where, line in train:
            _question(line, where)
        if options.test_data is not None:
            test = _lines(options.test_data)
        else:
            train, test = _split(train, options.test_fraction, options.seed, path)
    questions = [_question(line, where) for where, line in test]
    content = "".join(line + "\n" for _, line in train).encode()
    digest = hashlib.sha256(content).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    train_file = folder / f"train-{digest[:12]}.jsonl"
    train_file.write_bytes(content)
    asked = _sample(questions, options.measuring.max_questions)
    test_digest = hashlib.sha256(repr(asked).encode()).hexdigest()
    return Material(title, train_file, digest, len(train), tuple(asked), test_digest)


def normalise(text: str) -> object:
    """What right answers have in common: the same JSON, or the same words in the same order."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict | list) else " ".join(text.split()).lower()


def is_right(question: Question, text: str) -> bool:
    return normalise(text) == normalise(question.answer)


_Line = tuple[str, str]
"""Where a line is, FILE:NUMBER, and the line."""


def _lines(path: Path) -> list[_Line]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        flags = f"--data: {ALL_SHIPPED}, {', '.join(SHIPPED)}, or a file"
        raise CompareError(f"{flags}; {path} cannot be read: {reason}") from None
    lines = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise CompareError(f"--data: {path} has no examples; {_REMEDY}")
    return lines


def _turns(groups: Sequence[Sequence[_Line]]) -> list[_Line]:
    """A line of each group in turn, so that any beginning has all of them."""
    longest = max(map(len, groups))
    return [group[index] for index in range(longest) for group in groups if index < len(group)]


def _split(lines: list[_Line], fraction: float, seed: int, path: Path) -> tuple[list[_Line], list[_Line]]:
    if len(lines) < 2:
        raise CompareError(
            f"--data: {path} has one example; holding some out for questions needs two or more"
        )
    count = min(max(1, round(fraction * len(lines))), len(lines) - 1)
    held_out = set(random.Random(seed).sample(range(len(lines)), count))
    return (
        [line for index, line in enumerate(lines) if index not in held_out],
        [line for index, line in enumerate(lines) if index in held_out],
    )


def _question(line: str, where: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CompareError(f"--data: {where} is not a line of JSON: {error}") from None
    match row:
        case {"prompt": str(prompt), "completion": str(completion)} if completion.strip():
            return Question(prompt, completion)
        case {"prompt": [*turns], "completion": [{"role": "assistant", "content": str(answer)}]}:
            return Question(_conversation(turns, where), answer)
        case {"messages": [*turns, {"role": "assistant", "content": str(answer)}]} if turns:
            return Question(_conversation(turns, where), answer)
    raise CompareError(
        f"--data: {where} has no question with an answer; {_REMEDY}, or messages that end with one"
    )


def _conversation(turns: Sequence[Any], where: str) -> tuple[Mapping[str, str], ...]:
    for turn in turns:
        match turn:
            case {"role": str(), "content": str()}:
                continue
        raise CompareError(f"--data: {where}: each message needs a role and a content of text")
    return tuple({"role": turn["role"], "content": turn["content"]} for turn in turns)


def _sample(questions: list[Question], count: int | None) -> list[Question]:
    """At most `count` of them, from the beginning on, where the shipped tasks take turns."""
    return questions if count is None else questions[:count]
