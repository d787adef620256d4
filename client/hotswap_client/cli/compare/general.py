"""What a method may make the base forget, shipped: plain text, and questions of general knowledge."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

_DATA = Path(__file__).with_name("data")


@dataclass(frozen=True, slots=True)
class Item:
    """A question of general knowledge with its one right answer and wrong ones."""

    question: str
    answer: str
    others: tuple[str, ...]

    @property
    def context(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def choices(self) -> tuple[str, ...]:
        """As they follow the context; the right one is the first."""
        return tuple(f" {choice}" for choice in (self.answer, *self.others))


def paragraphs() -> list[str]:
    """Paragraphs of plain text on nothing in particular."""
    return [part.strip() for part in (_DATA / "general.txt").read_text("utf-8").split("\n\n") if part.strip()]


def knowledge(step: int = 1) -> list[Item]:
    """Every `step`th item."""
    lines = (_DATA / "knowledge.jsonl").read_text("utf-8").splitlines()[::step]
    return [Item(row["question"], row["answer"], tuple(row["others"])) for row in map(json.loads, lines)]


def digest() -> str:
    """SHA-256 of both."""
    return hashlib.sha256(
        b"".join((_DATA / name).read_bytes() for name in ("general.txt", "knowledge.jsonl"))
    ).hexdigest()
