"""What a base or an adapter knows: right answers to the task, and what it still knows of everything else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hotswap_client import AsyncClient, InvalidArgument, ScoreResult
from hotswap_client.cli.compare.general import Item
from hotswap_client.cli.compare.options import CompareError
from hotswap_client.cli.compare.questions import Question, is_right

_AT_ONCE = 32
"""Requests on their way to the server."""

_SPARE_TOKENS = 8
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Quiz:
    """All that a subject is asked. `max_new_tokens` leaves room for the longest right answer."""

    questions: tuple[Question, ...]
    paragraphs: tuple[str, ...]
    items: tuple[Item, ...]
    max_new_tokens: int

    @property
    def num_requests(self) -> int:
        choices = sum(len(item.choices) for item in self.items)
        return 2 * len(self.questions) + len(self.paragraphs) + choices


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Counts of right answers, and log-probabilities in nats per token, rounded past what batching changes.

    `answer_logprob` is of the right answers to the task's questions, `text_logprob` of the general text.
    """

    right: int
    num_questions: int
    answer_logprob: float
    text_logprob: float
    knowledge_right: int
    num_items: int
    sample: str
    """What it answers to the first question."""

    @property
    def accuracy(self) -> float:
        return self.right / self.num_questions

    @property
    def knowledge(self) -> float:
        return self.knowledge_right / self.num_items


async def longest_answer(client: AsyncClient, questions: Sequence[Question]) -> int:
    """Tokens for the longest right answer, and a few to spare."""
    counts = [(await client.tokenize(prompt=question.answer)).count for question in questions]
    return min(_MAX_NEW_TOKENS, max(counts) + _SPARE_TOKENS)


async def evaluate(
    client: AsyncClient, adapter: str | None, quiz: Quiz, answered: Callable[[], None] = lambda: None
) -> Evaluation:
    """Ask all of `quiz`, `_AT_ONCE` requests at a time; `answered` is called after each.

    Raises:
        CompareError: a question is too long for the base.
    """
    gate = asyncio.Semaphore(_AT_ONCE)

    async def turn(call: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            try:
                return await call()
            except InvalidArgument as error:
                raise CompareError(
                    f"--data: the server refuses a question: {' '.join(str(error).split())}"
                ) from None
            finally:
                answered()

    async def answer(question: Question) -> str:
        result = await turn(
            lambda: client.generate(
                adapter=adapter, max_new_tokens=quiz.max_new_tokens, temperature=0.0, **question.asked()
            )
        )
        text: str = result.text
        return text

    async def score(text: str, context: dict[str, Any]) -> ScoreResult:
        result: ScoreResult = await turn(lambda: client.score(adapter=adapter, text=text, **context))
        return result

    async def knows(item: Item) -> bool:
        """Whether the right choice has the highest log-probability per character."""
        scores = await asyncio.gather(*(score(choice, {"context": item.context}) for choice in item.choices))
        marks = [
            round(result.total_logprob / len(choice), 4)
            for result, choice in zip(scores, item.choices, strict=True)
        ]
        return marks[0] > max(marks[1:])

    texts, answers, paragraphs, known = await asyncio.gather(
        asyncio.gather(*map(answer, quiz.questions)),
        asyncio.gather(*(score(question.answer, question.as_context()) for question in quiz.questions)),
        asyncio.gather(*(score(paragraph, {}) for paragraph in quiz.paragraphs)),
        asyncio.gather(*map(knows, quiz.items)),
    )
    return Evaluation(
        right=sum(map(is_right, quiz.questions, texts)),
        num_questions=len(quiz.questions),
        answer_logprob=_per_token(answers),
        text_logprob=_per_token(paragraphs),
        knowledge_right=sum(known),
        num_items=len(quiz.items),
        sample=texts[0],
    )


def _per_token(scores: Sequence[ScoreResult]) -> float:
    count = sum(len(result.logprobs) for result in scores)
    return round(sum(result.total_logprob for result in scores) / max(1, count), 3)
