"""The demo's three tasks: what their tenants ask, what a right answer is, and how they are trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).with_name("data")
MAX_NEW_TOKENS = 40
"""The longest right answer has 20."""


@dataclass(frozen=True, slots=True)
class Question:
    """An example of the test set: a prompt and its right answer, neither of them seen in training."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """A tenant's task. `training` holds options of `hotswap train`, spelled as `training.json` spells them;
    `normalise` brings an answer into the form in which right ones are equal."""

    tenant: str
    name: str
    summary: str
    training: Mapping[str, object]
    normalise: Callable[[str], object]

    @property
    def adapter(self) -> str:
        return f"{self.tenant}/{self.name}"

    @property
    def method(self) -> str:
        return str(self.training["method"])

    @property
    def train_file(self) -> Path:
        return DATA / f"{self.name}.train.jsonl"

    def train_digest(self) -> str:
        """SHA-256 of the training data, in hex."""
        return hashlib.sha256(self.train_file.read_bytes()).hexdigest()

    def questions(self) -> list[Question]:
        """The test set."""
        lines = (DATA / f"{self.name}.test.jsonl").read_text("utf-8").splitlines()
        return [Question(row["prompt"], row["completion"]) for row in map(json.loads, lines)]

    def is_right(self, question: Question, text: str) -> bool:
        """Whether `text` says what the right answer says."""
        return self.normalise(text) == self.normalise(question.answer)


def _json_object(text: str) -> object:
    """The JSON object, whatever its spaces and the order of its keys; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _lines(text: str) -> object:
    """The slip's lines in any order: a kitchen does not mind."""
    return sorted(" ".join(line.split()) for line in text.strip().splitlines())


def _sentence(text: str) -> object:
    return " ".join(text.split()).lower()


def _training(method: str, learning_rate: float, epochs: float, **options: object) -> Mapping[str, object]:
    shared = {"batch_size": 8, "eval_fraction": 0.0, "seed": 0}
    return {"method": method, "learning_rate": learning_rate, "epochs": epochs, **options, **shared}


# A method each, so that one batch has them all.
TASKS: tuple[Task, ...] = (
    Task(
        "northwind",
        "tickets",
        "routes support tickets, in JSON",
        _training("lora", 1e-3, 3.0, rank=8),
        _json_object,
    ),
    Task(
        "corner-cafe",
        "orders",
        "writes the kitchen's slip of an order",
        _training("bottleneck", 2e-3, 2.0, bottleneck_size=32),
        _lines,
    ),
    Task(
        "blackbeard",
        "reviews",
        "judges reviews as a pirate does",
        _training("prefix", 1.5e-2, 6.0, num_virtual_tokens=20),
        _sentence,
    ),
)
