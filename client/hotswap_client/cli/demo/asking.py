"""Questions to the server: many at once for the accuracy, four streams at once for the eye."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from hotswap_client import AsyncClient, GenerateResult
from hotswap_client.cli.demo.tasks import MAX_NEW_TOKENS, Question, Task

LEARNT_MARGIN = 0.3
"""By how much an adapter's share of right answers must beat the base's."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Right answers to a task's test set, of the base (before) and of the adapter (after)."""

    task: Task
    num_questions: int
    before: int
    after: int

    @property
    def learnt(self) -> bool:
        return self.after - self.before >= LEARNT_MARGIN * self.num_questions


@dataclass(slots=True)
class Answer:
    """A streamed answer as it grows. Times are seconds of `time.perf_counter`."""

    question: Question
    task: Task | None
    """Whose adapter is asked; None: the base."""

    text: str = ""
    started: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    """When each piece of text came."""

    result: GenerateResult | None = None

    @property
    def first_token(self) -> float:
        return (self.arrivals[0] if self.arrivals else self.ended) - self.started

    @property
    def between_tokens(self) -> float:
        """The median time between two pieces; 0 with fewer than two."""
        gaps = [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]
        return median(gaps) if gaps else 0.0

    @property
    def total(self) -> float:
        return self.ended - self.started

    @property
    def is_right(self) -> bool | None:
        """None for the base, of which no format was asked in training, and while the answer grows."""
        if self.task is None or self.result is None:
            return None
        return self.task.is_right(self.question, self.text)


async def measure_accuracy(
    client: AsyncClient, tasks: Sequence[Task], answered: Callable[[], None] = lambda: None
) -> list[Accuracy]:
    """Ask every question of every task, of the base and of the adapter, all of them at once."""

    async def is_right(task: Task, question: Question, adapter: str | None) -> bool:
        result = await client.generate(
            adapter=adapter, prompt=question.prompt, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0
        )
        answered()
        return task.is_right(question, result.text)

    async def count_right(task: Task, questions: Sequence[Question], adapter: str | None) -> int:
        return sum(await asyncio.gather(*(is_right(task, question, adapter) for question in questions)))

    async def measure(task: Task) -> Accuracy:
        questions = task.questions()
        before, after = await asyncio.gather(
            count_right(task, questions, None), count_right(task, questions, task.adapter)
        )
        return Accuracy(task, len(questions), before, after)

    return await asyncio.gather(*map(measure, tasks))


def mixed_batch(tasks: Sequence[Task]) -> list[Answer]:
    """The question with the longest answer for each tenant's adapter, the first one for the base too."""
    answers = [
        Answer(max(task.questions(), key=lambda question: len(question.answer)), task) for task in tasks
    ]
    return [*answers, Answer(answers[0].question, None)]


async def stream_together(client: AsyncClient, answers: Sequence[Answer]) -> None:
    """Fill the answers, all at the same time."""
    await asyncio.gather(*(_stream(client, answer) for answer in answers))


async def stream_alone(client: AsyncClient, answers: Sequence[Answer]) -> None:
    """Fill the answers one after another."""
    for answer in answers:
        await _stream(client, answer)


async def _stream(client: AsyncClient, answer: Answer) -> None:
    answer.started = time.perf_counter()
    stream = client.stream(
        adapter=answer.task.adapter if answer.task else None,
        prompt=answer.question.prompt,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=0.0,
    )
    async with stream as deltas:
        async for delta in deltas:
            if delta.token_ids:
                answer.arrivals.append(time.perf_counter())
            answer.text += delta.text
    answer.ended = time.perf_counter()
    answer.result = stream.result
